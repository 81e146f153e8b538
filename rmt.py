"""Recurrent Memory Transformer and its family, in one file.

A Transformer reads a long sequence one segment at a time. State can cross a segment boundary in two places:
    over the top      memory tokens: what the last layer wrote is what the first layer reads next    RMT
    inside a layer    a carry: the layer's own inputs in the segment before                          Transformer-XL
                               or a matrix that the layer reads, and rewrites at the write tokens    ARMT

             segment t                               segment t + 1
    logits           ^      written ---.       logits         ^      written
    layer L   ========================  |             ========================
    ...       ========================  -- carry -->  ========================
    layer 1   ========================  |             ========================
              read | tokens | write     '-----------> read | tokens | write     (it fills both blocks)

The method is this loop; `unroll`, near the end, is the same loop with its options and checks:
    state = model.initial_state(batch_size)
    for segment in tokens.split(segment_len, dim=1):
        if a_cut_falls_here:
            state = state.detach()                # truncated backpropagation through time (BPTT)
        logits, state = model(segment, state)     # one segment, always

Glossary
    B  batch    S  segments    L  n_layer    D  d_model    H  n_head    E  D / H    V  vocab_size
    T  segment_len, tokens per segment    M  n_mem, memory tokens    C  cache_len, "mem_len" in [TXL]
    N  rows of one segment: read + tokens + write                    K  2 nu d_assoc, width of associative keys
    state        all that crosses a boundary: State(memory, carry), plain tensors, never stored on a module
    memory       (B, M, D), "mem_t" in [RMT]; never the Transformer-XL cache
    carry        the backbone's part of the state
    read, write  the memory tokens before and after the tokens of a segment, "H^mem" in [RMT]
    bptt_depth   boundaries that gradient may cross, "BPTT-k" in [RMT]
References
    [RMT]     Bulatov, Kuratov, Burtsev. Recurrent Memory Transformer. NeurIPS 2022, arXiv:2207.06881
    [RMT-1M]  Bulatov, Kuratov, Burtsev. Scaling Transformer to 1M tokens and beyond with RMT. 2023, arXiv:2304.11062
    [TXL]     Dai, Yang, Yang, Carbonell, Le, Salakhutdinov. Transformer-XL. 2019, arXiv:1901.02860
    [MT]      Burtsev, Kuratov, Peganov, Sapunov. Memory Transformer. 2020, arXiv:2006.11527
    [ARMT]    Rodkin, Kuratov, Bulatov, Burtsev. Associative Recurrent Memory Transformer. 2024, arXiv:2407.04841
    [DB]      Sivtsov et al. Diagonal Batching Unlocks Parallelism in Recurrent Memory ... 2025, arXiv:2506.05229
"""
from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recompute

# -------------------------------------------------------------------------------------------------- 1. config and state
# In: plain numbers. Out: a validated Config, and the value that crosses segments.

def require(condition: bool, message: str, error: type = ValueError):
    """Raise error(message) unless the condition holds."""
    if not condition:
        raise error(message)


@dataclass(frozen=True)
class Config:
    """Sizes and choices of one model. Raises ValueError naming field, value and rule; RMT checks the variant."""
    variant: str = "rmt"         # a key of VARIANTS
    vocab_size: int = 64         # V
    segment_len: int = 32        # T, tokens
    n_layer: int = 2             # L
    n_head: int = 4              # H
    d_model: int = 64            # D
    n_mem: int = 8               # M, memory tokens
    cache_len: int = 32          # C, cached positions per layer
    d_assoc: int = 16            # width of associative keys before dpfp; after it K = 2 nu d_assoc
    nu: int = 3                  # how many products dpfp makes of every channel
    window: int = 0              # tokens next to it that a token of a bottleneck sees beside memory
    update: str = "delta"        # of the associative memory: lasts longest; "armt" [ARMT]; "hebbian": cannot rewrite
    memory_form: str = "norm"    # handed on: written rows after the final norm [RMT], or "raw", the residual stream
    write_slot: str = "memory"   # fed to the write rows: the incoming memory [RMT], an "embedding", or "both" added up
    memory_mask: str = "paper"   # a memory block sees itself both ways; "causal": it does not, fast kernels on a GPU
    memory_noise: float = 0.0    # in training, noise on the memory over the top: up to this fraction of its RMS
    dropout: float = 0.0         # on the embeddings and on the output of each sublayer
    tie_weights: bool = False    # one matrix for embedding and head

    def __post_init__(self):
        for name, least in {"vocab_size": 1, "segment_len": 1, "n_layer": 1, "n_head": 1, "d_model": 1, "n_mem": 0,
                            "cache_len": 0, "window": 0, "d_assoc": 1, "nu": 1}.items():
            value = getattr(self, name)
            require(type(value) is int and value >= least, f"{name}={value!r} must be an integer of at least {least}")
        require(self.nu < 2 * self.d_assoc, f"nu={self.nu} must be below 2 * d_assoc={2 * self.d_assoc}")
        D, pairs = self.d_model, 2 * self.n_head
        require(D % pairs == 0, f"d_model={D} must be divisible by 2 * n_head={pairs}: rotary positions turn pairs")
        for name, choices in (("memory_form", ("norm", "raw")), ("write_slot", ("memory", "embedding", "both")),
                              ("memory_mask", ("paper", "causal")), ("update", ("delta", "armt", "hebbian"))):
            value = getattr(self, name)
            require(value in choices, f"{name}={value!r} must be one of {', '.join(choices)}")
        for name, end in (("dropout", 1), ("memory_noise", math.inf)):
            value = getattr(self, name)
            require(type(value) in (int, float) and 0 <= value < end, f"{name}={value!r} must be from 0 to below {end}")
        require(type(self.tie_weights) is bool, f"tie_weights={self.tie_weights!r} must be True or False")


class State(NamedTuple):
    """All that crosses a segment boundary. `torch.save(tuple(state), path)` and `State(*torch.load(path))` keep it."""
    memory: Tensor  # (B, M, D); (B, 0, D) where memory is not recurrent
    carry: tuple    # nested tuples of tensors, batch first; here one tuple per layer

    def detach(self) -> State:
        """The same values, the gradient cut."""
        return map_tensors(torch.detach, self)


def map_tensors(fn, tree):
    """Apply fn to every tensor of nested tuples, as in `map_tensors(lambda t: t.to("cuda"), state)`."""
    if not isinstance(tree, tuple):
        return fn(tree) if isinstance(tree, Tensor) else tree
    mapped = [map_tensors(fn, branch) for branch in tree]
    return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)


def tensors(tree) -> list[Tensor]:
    """The tensors of nested tuples, as in `sum(t.numel() for t in tensors(state))` for the floats of a state."""
    return [tree] if isinstance(tree, Tensor) else [t for branch in tree for t in tensors(branch)]


# --------------------------------------------------------------------------------------------- 2. the Transformer layer
# In: rows x (B, N, D) and a mask. Out: rows of the same shape.

def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x (B, H, n, E) to the positions whose angles are in rope (2, n, E / 2)."""
    cos, sin = rope.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Linear(nn.Linear):
    """nn.Linear, or those of l layers at once: x (l B, n, in), weight (l, out, in), bias (l, out); unroll_diagonal."""
    def forward(self, x, out=None):  # out: a slice of what comes out, where there is no bias
        weight = self.weight if out is None else self.weight[..., out, :]
        if weight.dim() == 2:
            return F.linear(x, weight, self.bias)
        y = x.reshape(len(weight), -1, x.size(-1)) @ weight.mT
        return (y if self.bias is None else y + self.bias[:, None]).view(*x.shape[:2], -1)


class Norm(nn.LayerNorm):
    """nn.LayerNorm without bias, or those of l layers at once: x (l B, n, D), weight (l, D)."""
    def forward(self, x):
        if self.weight.dim() == 1:
            return super().forward(x)
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps).unflatten(0, (len(self.weight), -1))
        return (y * self.weight[:, None, None]).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head attention of rows x = [read | tokens | write] to context = [read | cache | tokens | write].

    Departure: rotary positions, where [RMT] has absolute ones and [TXL] relative biases. They count along a full cache,
    so tokens stand at one distance from the read memory, and cached rows right before the tokens that followed them.
    """
    def __init__(self, config: Config, n_read: int = 0, n_cache: int = 0):
        super().__init__()
        self.n_head, self.n_read, self.n_cache = config.n_head, n_read, n_cache
        self.qkv = Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = Linear(config.d_model, config.d_model, bias=False)
        position, E = torch.arange(n_cache + config.segment_len + 2 * config.n_mem), config.d_model // config.n_head
        angle = position[:, None] * 10000.0 ** (-torch.arange(0, E, 2) / E)
        self.register_buffer("rope", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, past: list | None = None) -> Tensor:
        """x (B, N, D), context (B, c + N, D), mask (N, c + N), True = may look, None = causal -> (B, N, D).

        With past, [] at the start of a segment and then [rows so far, their keys, their values], x can be a part of the
        segment's rows: the next call gets those that follow and a mask (N, all keys so far), and past grows by them.
        """
        n, c, done = x.size(1), context.size(1) - x.size(1), past[0] if past else 0
        if c == 0:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            D = x.size(-1)
            q, (k, v) = self.qkv(x, slice(0, D)), self.qkv(context, slice(D, 3 * D)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, rows, E)
        q, k = rotate(q, self.angles(n, 0, done)), rotate(k, self.angles(n, c, done))
        if past is not None:
            k, v = (torch.cat([past[1], k], dim=2), torch.cat([past[2], v], dim=2)) if past else (k, v)
            past[:] = done + n, k, v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(-2))

    def angles(self, n, c, done):
        """For n rows after the first done, and c cached ones between the read rows and the rest: (2, c + n, E / 2)."""
        if self.n_cache == 0 or done > 0:
            return self.rope[:, self.n_cache + done:self.n_cache + done + n]
        return torch.cat([self.rope[:, :self.n_read], self.rope[:, self.n_read + self.n_cache - c:self.n_cache + n]], 1)


class Block(nn.Module):
    """One pre-norm layer that carries nothing. A new mechanism is a subclass made of Linear and Norm, and a Variant."""
    def __init__(self, config: Config, n_read: int = 0, n_write: int = 0, n_cache: int = 0):
        super().__init__()
        D, self.n_read, self.n_write, self.n_cache = config.d_model, n_read, n_write, n_cache
        self.norm_1, self.norm_2 = Norm(D, bias=False), Norm(D, bias=False)
        self.attn = Attention(config, n_read, n_cache)
        self.mlp = nn.Sequential(Linear(D, 4 * D, bias=False), nn.GELU(), Linear(4 * D, D, bias=False))
        self.dropout = nn.Dropout(config.dropout)

    def initial_carry(self, batch_size: int) -> tuple:
        """What the first segment carries in: a tuple of tensors, here none."""
        return ()

    def forward(self, x: Tensor, mask: Tensor | None, carry: tuple, past: list | None = None) -> tuple[Tensor, tuple]:
        """x (B, N, D), mask (N, N) or None, carry -> x (B, N, D), next carry. For past see Attention.forward."""
        h = self.norm_1(x)
        return self.residual(x, h, h, mask, past), carry

    def residual(self, x, h, context, mask, past=None, rows=slice(None)):
        """Both sublayers, for some rows: attention of the normed rows h to the context, then the feed-forward layer."""
        x = (x + self.dropout(self.attn(h, context, mask, past=past)))[:, rows]
        return x + self.dropout(self.mlp(self.norm_2(x)))


# ----------------------------------------------------------------------------------- 3. layers that carry, or do more
# In: x, a mask and the layer's carry, as in Block.forward. Out: x and the next carry.

class CacheBlock(Block):
    """Tokens also see this layer's inputs for the tokens before the segment, gradient stopped [TXL].

    The carry is (cache,): the last C inputs of tokens (B, c, D), before norm and rotation, c growing from 0 to C.
    """
    def __init__(self, config: Config, n_read: int = 0, n_write: int = 0):
        super().__init__(config, n_read, n_write, n_cache=config.cache_len)

    def initial_carry(self, batch_size: int) -> tuple:
        """An empty cache (B, 0, D)."""
        return (self.norm_1.weight.new_zeros(batch_size, 0, len(self.norm_1.weight)),)

    def forward(self, x: Tensor, mask: Tensor | None, carry: tuple, past: list | None = None) -> tuple[Tensor, tuple]:
        (cache,), h = carry, self.norm_1(x)
        if past:
            return self.residual(x, h, h, mask, past), carry  # the cache is in the past already
        context = torch.cat([h[:, :self.n_read], self.norm_1(cache), h[:, self.n_read:]], dim=1)
        tokens = x[:, self.n_read:x.size(1) - self.n_write]
        cache = torch.cat([cache, tokens], dim=1)[:, -self.n_cache:].detach().clone()  # a view would keep all rows
        return self.residual(x, h, context, mask, past), (cache,)


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Deterministic parameter-free projection, x (..., d) -> (..., 2 nu d), nowhere negative [ARMT]."""
    r = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], dim=-1)


class AssociativeBlock(Block):
    """All rows h first read a matrix A of the layer's own; what comes out at the write rows m is written to it [ARMT].

        read    h += A phi(W_q h) / (z . phi(W_q h) + eps)                        phi = dpfp, K channels
        write   k = phi(W_k m)    v = W_v m    beta = sigmoid(W_b m + b)          of each write row
                v_old = A k / (z . k + eps)                                       what A says so far
                gamma = clip(1 - (z . k + eps) / (|k|^2 + eps), 0, 1)             how new k is; no gradient
                A += sum of beta (v - v_old) k^T    z += sum of gamma k           over the write rows

    That is update "armt". In "delta" phi has unit length and there is no z: h += A phi(W_q h), v_old = A k.
    "hebbian" is delta with v_old = 0. The carry is (A, z) or (A,): A (B, D, K), z (B, K), float32 even under autocast.
    """
    def __init__(self, config: Config, n_read: int = 0, n_write: int = 0):
        super().__init__(config, n_read, n_write)
        D, d, self.nu, self.update, self.eps = config.d_model, config.d_assoc, config.nu, config.update, 1e-5
        self.w_q, self.w_k, self.w_v = (Linear(D, width, bias=False) for width in (d, d, D))
        self.w_b = Linear(D, 1)

    def initial_carry(self, batch_size: int) -> tuple:
        """An empty memory: every read is zero."""
        (d, D), weight = self.w_q.weight.shape, self.w_q.weight
        A = weight.new_zeros(batch_size, D, 2 * self.nu * d, dtype=torch.promote_types(weight.dtype, torch.float32))
        return (A, torch.zeros_like(A[:, 0])) if self.update == "armt" else (A,)

    def forward(self, x: Tensor, mask: Tensor | None, carry: tuple, past: list | None = None) -> tuple[Tensor, tuple]:
        x = x + self.recall(self.phi(self.w_q(x)), *carry).to(x.dtype)
        x, _ = super().forward(x, mask, (), past)
        return x, self.write(x[:, x.size(1) - self.n_write:], *carry) if past is None else carry

    def phi(self, x):
        """The features by which A is looked up, x (B, n, d_assoc) -> (B, n, K)."""
        phi = dpfp(x.to(torch.promote_types(x.dtype, torch.float32)), self.nu)
        return phi if self.update == "armt" else phi / (phi.norm(dim=-1, keepdim=True) + self.eps)

    def recall(self, phi, A, z=None):
        """What A says of phi (B, n, K): (B, n, D)."""
        with torch.autocast(phi.device.type, enabled=False):
            value = phi @ A.mT
            return value if z is None else value / (phi @ z[..., None] + self.eps)

    def write(self, m, A, z=None):
        """The carry after the write rows m (B, M, D), all of which correct the same old A."""
        k, v, beta = self.phi(self.w_k(m)), self.w_v(m).to(A.dtype), self.w_b(m).to(A.dtype).sigmoid()
        new = v if self.update == "hebbian" else v - self.recall(k, A, z)
        with torch.autocast(m.device.type, enabled=False):
            A = torch.baddbmm(A, (beta * new).mT, k)
            if z is None:
                return (A,)
            known, length = k @ z[..., None], k.square().sum(-1, keepdim=True)
            gamma = (1 - (known + self.eps) / (length + self.eps)).clamp(0, 1).detach()
            return A, z + (gamma * k).sum(dim=1)


def update_memory(block: Block, x: Tensor, mask: Tensor | None, past: list | None) -> tuple[Tensor, Tensor]:
    """Which of the rows x are memory rows, and these after the block; past as in Attention.forward."""
    n_write = block.n_write * (past is None)  # a part of a segment has none yet
    n_read = block.n_read * (not past)        # a later part has none: they are in the past
    rows, h = torch.arange(-n_write, n_read, device=x.device) % x.size(1), block.norm_1(x)
    return rows, block.residual(x, h, h, mask, rows=rows) if len(rows) else x[:, rows]


class ControllerBlock(Block):
    """Memory rows have attention and feed-forward weights of their own, with keys and values of all rows [MT]."""
    def __init__(self, config: Config, n_read: int = 0, n_write: int = 0):
        super().__init__(config, n_read, n_write)
        self.controller = Block(config, n_read, n_write)

    def forward(self, x: Tensor, mask: Tensor | None, carry: tuple, past: list | None = None) -> tuple[Tensor, tuple]:
        rows, memory = update_memory(self.controller, x, mask, past)
        x, _ = super().forward(x, mask, (), past)
        return x.index_copy(1, rows, memory), carry


class BottleneckBlock(Block):
    """Memory rows read the segment first; then tokens see these new rows, and of the others a window at most [MT].

    What tokens see stands in the mask, see segment_mask. Both steps have the same weights.
    """
    def forward(self, x: Tensor, mask: Tensor | None, carry: tuple, past: list | None = None) -> tuple[Tensor, tuple]:
        rows, memory = update_memory(self, x, mask, past)
        x, _ = super().forward(x.index_copy(1, rows, memory), mask, (), past)
        return x.index_copy(1, rows, memory), carry


# --------------------------------------------------------------------------------------------------------- 4. the model
# In: the tokens of one segment (B, T) and a state. Out: logits (B, T, V) and the next state.

def segment_mask(n_read: int, n_cache: int, n_tokens: int, n_write: int, form: str = "paper",
                 window: int | None = None, device=None) -> Tensor:
    """Who may look at whom in one segment [RMT] sec. 3: bool (N, C + N), True = may look. The form "paper":

                     read   cache  tokens  write
            read     x x    . .    . . .   . .       read rows see each other only
                     x x    . .    . . .   . .
            tokens   x x    x x    x . .   . .       tokens are causal and see what was read and what is cached
                     x x    x x    x x .   . .
                     x x    x x    x x x   . .
            write    x x    . .    x x x   x x       write rows see the segment and each other
                     x x    . .    x x x   x x

    The form "causal" is the lower triangle in this order of columns; in the form "full" every row sees all. With a
    window, of the tokens that its form shows it a token sees those at most so far away, and not itself (bottleneck).
    """
    n = n_read + n_tokens + n_write
    now = torch.ones(n, n, dtype=torch.bool, device=device)
    cached = torch.ones(n, n_cache, dtype=torch.bool, device=device)
    if form != "full":
        now.tril_()
        cached[:n_read] = False
    if form == "paper":
        now[:n_read, :n_read] = True
        now[n - n_write:] = True
        cached[n - n_write:] = False
    if window is not None:
        near = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril(window).triu(-window)
        now[n_read:n - n_write, n_read:n - n_write] &= near.fill_diagonal_(False)
    return torch.cat([now[:, :n_read], cached, now[:, n_read:]], dim=1)


class Transformer(nn.Module):
    """The backbone. Any module with `initial_carry(B)` and `backbone(x, mask, carry) -> (x, carry)` can replace it."""
    def __init__(self, config: Config, block: type = Block, n_read: int = 0, n_write: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList(block(config, n_read, n_write) for _ in range(config.n_layer))

    def initial_carry(self, batch_size: int) -> tuple:
        """One carry per layer."""
        return tuple(block.initial_carry(batch_size) for block in self.blocks)

    def forward(self, x: Tensor, mask: Tensor | None, carry: tuple, *past: list) -> tuple[Tensor, tuple]:
        """x (B, N, D), mask (N, C + N) or None, carry, past per layer -> x (B, N, D) before the norm, next carry."""
        carries = list(carry)
        for i, block in enumerate(self.blocks):
            x, carries[i] = block(x, mask, carry[i], *past[i:i + 1])
        return x, tuple(carries)


class Variant(NamedTuple):
    """What makes a member of the family."""
    read: bool       # memory tokens before the segment
    write: bool      # memory tokens after the segment
    recurrent: bool  # is the output at the write rows (without them: the read rows) the next segment's memory?
    block: type      # a layer: what it carries, and whose weights memory rows have
    mask: str        # its paper's, a form of segment_mask; where that is "paper", Config.memory_mask can change it

VARIANTS = {             #            read   write  recurrent  block       mask      floats that cross a boundary
    "transformer":            Variant(False, False, False, Block,            "causal"),  # 0
    "transformer_xl":         Variant(False, False, False, CacheBlock,       "causal"),  # L C D        [TXL]
    "rmt":                    Variant(True,  True,  True,  Block,            "paper"),   # M D          [RMT] sec. 3
    "rmt_xl":                 Variant(True,  True,  True,  CacheBlock,       "paper"),   # M D + L C D  [RMT] sec. 3
    "rmt_encoder":            Variant(True,  False, True,  Block,            "full"),    # M D          [RMT-1M]
    "armt":                   Variant(False, True,  False, AssociativeBlock, "causal"),  # L K D  + L K for z  [ARMT]
    "mem_transformer":        Variant(True,  False, False, Block,            "paper"),   # 0            [MT], a decoder
    "mem_controller":         Variant(True,  True,  True,  ControllerBlock,  "paper"),   # M D          [MT], handed on
    "mem_bottleneck":         Variant(True,  True,  True,  BottleneckBlock,  "paper"),   # M D          [MT], handed on
    "mem_controller_encoder": Variant(True,  False, True,  ControllerBlock,  "full"),    # M D          [MT], handed on
    "mem_bottleneck_encoder": Variant(True,  False, True,  BottleneckBlock,  "full"),    # M D          [MT], handed on
}


class RMT(nn.Module):
    """Memory tokens around a backbone that does not know they are there, one segment at a time.

    Parts of yours keep their weights: a backbone (see Transformer), for variants whose layers are plain; embed, tokens
    (B, n) -> rows (B, n, D); head, rows as the backbone leaves them, without a norm of ours -> logits (B, n, V).
    Raises ValueError where config does not fit its variant, or a part of yours the config.
    """
    def __init__(self, config: Config, backbone: nn.Module | None = None, embed=None, head=None):
        super().__init__()
        require(config.variant in VARIANTS, f"variant={config.variant!r} must be one of {', '.join(VARIANTS)}")
        self.config, self.variant, D, V = config, VARIANTS[config.variant], config.d_model, config.vocab_size
        block, missing = self.variant.block, f"=0 must be at least 1 for {config.variant!r}"
        require(config.n_mem > 0 or not (self.variant.read or self.variant.write), "n_mem" + missing)
        require(config.cache_len > 0 or not issubclass(block, CacheBlock), "cache_len" + missing)
        require(backbone is None or block is Block, f"{config.variant!r} has layers of its own: a backbone fits 'rmt'")
        require(not config.tie_weights or (embed, head) == (None, None), "tie_weights=True ties our parts: tie yours")
        self.n_read, self.n_write = config.n_mem * self.variant.read, config.n_mem * self.variant.write
        self.n_cache = config.cache_len if issubclass(block, CacheBlock) else 0
        self.window = config.window if issubclass(block, BottleneckBlock) else None
        self.mask_form = config.memory_mask if self.variant.mask == "paper" else self.variant.mask
        parts = {"backbone.": backbone, "embed.": embed, "head.": head}
        yours = {name: part for name, part in parts.items() if part is not None}
        where = next(({"device": p.device, "dtype": p.dtype} for part in yours.values() for p in part.parameters()), {})
        self.embed = nn.Embedding(V, D, **where) if embed is None else embed
        self.memory = nn.Parameter(torch.empty(max(self.n_read, self.n_write), D, **where))
        self.write_embedding = nn.Parameter(torch.empty(self.n_write * (config.write_slot != "memory"), D, **where))
        self.backbone = (Transformer(config, block, self.n_read, self.n_write).to(**where) if backbone is None
                         else backbone)
        self.norm = nn.LayerNorm(D, bias=False, **where) if head is None else nn.Identity()
        self.head = nn.Linear(D, V, bias=False, **where) if head is None else head
        self.dropout = nn.Dropout(config.dropout)
        if config.tie_weights:
            self.head.weight = self.embed.weight
        self.init_weights(keep=tuple(yours))
        if yours:
            try_out(self)
        self.state_shapes = self.lasting_shapes(self.initial_state(1))

    @torch.no_grad()
    def init_weights(self, keep: tuple = ()):
        """Draw all matrices but those whose names begin with one of keep; norms start at 1, biases as PyTorch's."""
        matrices = [(name, p) for name, p in self.named_parameters() if p.dim() == 2 and not name.startswith(keep)]
        for name, weight in matrices:
            std, depth = 0.7 / math.sqrt(weight.size(1)), math.sqrt(2 * self.config.n_layer)  # GPT-2's 0.02 is slow
            table = {"memory": 0.02, "write_embedding": 0.02,                      # independent: the rows must differ
                     "embed.weight": std if self.config.tie_weights else 0.5,
                     "attn.out.weight": std / depth, "mlp.2.weight": std / depth,  # they end residual branches
                     "w_v.weight": 0.0}                                            # [ARMT]: untrained, a plain layer
            weight.normal_(std=next((size for end, size in table.items() if name.endswith(end)), std))
            if name.endswith("w_k.weight"):  # departure: a row looks for what it would be written under
                weight.copy_(self.get_parameter(name.replace("w_k", "w_q")))

    def initial_state(self, batch_size: int) -> State:
        """The learned memory (B, M, D), the same for every sequence, and an empty carry."""
        memory = self.memory[:len(self.memory) * self.variant.recurrent]
        return State(memory.expand(batch_size, -1, -1), self.backbone.initial_carry(batch_size))

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One segment: tokens (B, T or fewer), state -> logits (B, T, V), next state. Raises what check raises."""
        check(self, tokens, state)
        mask = self.mask(tokens.size(1), self.cached(state))
        x, carry = self.backbone(self.wrap(tokens, state.memory), mask, state.carry)
        logits, memory = self.unwrap(x, state.memory)
        return logits, State(memory, carry)

    def wrap(self, tokens, memory):
        """tokens (B, T), memory (B, M, D) -> x (B, N, D) = [read | tokens | write]."""
        x = self.dropout(self.embed(tokens.long()))
        memory = memory if self.variant.recurrent else self.memory.expand(len(tokens), -1, -1)
        write = memory[:, :self.n_write]
        if self.n_write and self.config.write_slot != "memory":  # departure: [RMT] feeds the incoming memory alone
            write = self.write_embedding + (write if self.config.write_slot == "both" else torch.zeros_like(write))
        return torch.cat([memory[:, :self.n_read], x, write], dim=1)

    def unwrap(self, x, memory):
        """x (B, N, D) -> logits (B, T, V), next memory (B, M, D)."""
        read, tokens, write = x.split([self.n_read, x.size(1) - self.n_read - self.n_write, self.n_write], dim=1)
        memory = self.hand_on(write if self.n_write else read) if self.variant.recurrent else memory
        return self.head(self.norm(tokens)), memory

    def hand_on(self, written):
        """What the next segment gets of the written rows (B, M, D)."""
        raw = self.config.memory_form == "raw"  # departure: unbounded, what is new drowns in an endless stream
        memory = (written if raw else self.norm(written)).clone()  # a view would keep all rows of its segment alive
        if self.training and self.config.memory_noise:  # departure: the network learns to restore what it keeps
            size = self.config.memory_noise * torch.rand_like(memory[:, :1, :1])  # one size per sequence
            memory = memory + size * torch.randn_like(memory) * memory.detach().square().mean(-1, keepdim=True).sqrt()
        return memory

    def cached(self, state):
        """How many positions the caches of a state hold."""
        return state.carry[0][0].size(1) if self.n_cache else 0

    def mask(self, n_tokens, n_cache):
        """The segment's mask, or None where it is plain causal, which fast GPU kernels know."""
        sizes = self.n_read, n_cache, n_tokens, self.n_write
        plain = n_cache == 0 and self.mask_form == "causal" and self.window is None
        return None if plain else segment_mask(*sizes, self.mask_form, self.window, self.memory.device)

    def lasting_shapes(self, state):
        """What of a state's shapes is always the same: all but B and the length of a cache."""
        kept = map_tensors(lambda t: (t.dim(), *t.shape[2 if self.n_cache else 1:]), state)
        return kept, getattr(state.memory, "shape", ())[1:]


@torch.random.fork_rng(devices=[])  # the CPU's random numbers, for dropout, are given back
@torch.no_grad()
def try_out(model):
    """Send 2 sequences through parts of yours. Raises ValueError or TypeError, with shapes, where one does not fit."""
    def run(part, width, given, *rest):
        shape, needed = tuple(given.shape), (*given.shape[:2], width)
        try:
            made = getattr(model, part)(given, *rest)
            rows, carry = made if rest else (made, ())
            found = tuple(rows.shape)
        except Exception as reason:
            raise ValueError(f"{part} fails on {shape}, vocab_size={V}: {' '.join(str(reason).split())}") from reason
        require(found == needed, f"{part} makes {found} of {shape} and must make {needed}")
        return rows, carry

    require(hasattr(model.backbone, "initial_carry"), "a backbone needs initial_carry(B) and forward(x, mask, carry), "
            f"see Transformer: put your {type(model.backbone).__name__} into a module that has them", TypeError)
    D, T, V, state = model.config.d_model, model.config.segment_len, model.config.vocab_size, model.initial_state(2)
    tokens = torch.full((2, T), V - 1, device=model.memory.device)
    run("embed", D, tokens)
    rows, carry = run("backbone", D, model.wrap(tokens, state.memory), model.mask(T, 0), state.carry)
    run("head", V, rows)
    old, new = (map_tensors(lambda t: tuple(t.shape), some) for some in (state.carry, carry))
    fits = isinstance(old, tuple) and old == new and all(t.shape[:1] == (2,) for t in tensors(carry))
    require(fits or model.n_cache > 0, f"backbone takes a carry {old} and returns {new}: for 2 sequences both must be "
            "tuples of tensors (2, ...), alike")


def check(model, tokens, state=None):
    """Raise TypeError or ValueError unless tokens (B, length) fit the model and, with a state, both fit one segment."""
    config, kind = model.config, tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
    require(kind in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
            f"tokens are {kind} and must be a tensor of integers, for example torch.tensor([[1, 2, 3]])", TypeError)
    require(tokens.dim() == 2 and tokens.numel() > 0,
            f"tokens have shape {tuple(tokens.shape)} and must be (batch, length), neither of them 0")
    if (state is None or tokens.is_cpu) and not torch.compiler.is_compiling():  # a GPU would wait in every segment
        low, high, V = tokens.min().item(), tokens.max().item(), config.vocab_size
        require(0 <= low and high < V, f"tokens reach from {low} to {high}; vocab_size={V} needs 0 .. {V - 1}")
    if state is not None:
        B, T = tokens.shape
        require(T <= config.segment_len, f"a segment of {T} tokens is longer than segment_len={config.segment_len}: "
                "give long sequences to unroll(model, tokens)")
        require(isinstance(state, State), f"state is a {type(state).__name__} and must be a State: start from "
                "model.initial_state(batch_size), or wrap what you loaded, State(*loaded)", TypeError)
        fits = model.lasting_shapes(state) == model.state_shapes and all(len(t) == B for t in tensors(state))
        cached = {t.size(1) for t in tensors(state.carry)} if fits and model.n_cache else {0}
        fits = fits and len(cached) == 1 and max(cached) <= model.n_cache
        shapes = "" if fits else tuple(map_tensors(lambda t: tuple(t.shape), state))
        require(fits, f"a state of shapes {shapes} does not fit {config.variant!r} with {B} sequences: start from "
                f"model.initial_state({B})")


# -------------------------------------------------------------------------------------------------- 5. the segment loop
# In: tokens (B, any length) and a state. Out: logits or new tokens, and the state after the last segment.

def unroll(model, tokens: Tensor, state: State | None = None, bptt_depth: int | None = None, checkpoint: bool = False,
           last_only: bool = False) -> tuple[Tensor, State]:
    """Run a model over tokens (B, length), segment by segment -> logits (B, length, V), state after the last one.

    state       where to start, default model.initial_state(B). To train on a stream in pieces, pass the returned state
                on detached, or gradient crosses into the piece before.
    bptt_depth  boundaries that gradient may cross: None all, 0 none. Cuts are counted from the end: the last segment's
                loss reaches back exactly bptt_depth segments, any other loss at most that; BPTT-k in [RMT].
    checkpoint  keep only the states and recompute each segment's activations in the backward pass.
    last_only   the logits of the last segment only: without gradient, a million tokens take the memory of one segment.

    "Depth k" has two other meanings in released code. Gradient in the last k segments only: unroll the others under
    torch.no_grad, then those k. Every loss back through k segments: keep the detached state before each segment in a
    list (the initial one as it is); for each s, unroll segments s - k .. s from states[s - k] with last_only, backward.
    Raises ValueError or TypeError for tokens, a state or a depth that do not fit.
    """
    check(model, tokens)
    outputs = deque(maxlen=1 if last_only else None)
    state = model.initial_state(len(tokens)) if state is None else state
    segments = tokens.split(model.config.segment_len, dim=1)
    for segment, cut in zip(segments, cuts(len(segments), bptt_depth), strict=True):
        state = state.detach() if cut else state
        logits, state = recompute(model, segment, state, use_reentrant=False) if checkpoint else model(segment, state)
        outputs.append(logits)
    return torch.cat(tuple(outputs), dim=1), state


def cuts(n_segments, bptt_depth):
    """Before which segments gradient stops: never before the first, or the learned initial memory would not learn."""
    require(bptt_depth is None or (type(bptt_depth) is int and bptt_depth >= 0),
            f"bptt_depth={bptt_depth!r} must be None (gradient crosses all boundaries) or an integer of at least 0")
    return [bptt_depth is not None and s > 0 and (n_segments - s) % (bptt_depth + 1) == 0 for s in range(n_segments)]


def unroll_diagonal(model, tokens: Tensor, state: State | None = None, bptt_depth: int | None = None,
                    checkpoint: bool = False, last_only: bool = False) -> tuple[Tensor, State]:
    """`unroll` in S + L - 1 steps instead of S L, the same but for rounding and the random numbers of dropout [DB].

    Segment s in layer l needs the rows of (s, l - 1) and the carry of (s - 1, l), no more. So all of one s + l run at
    once, side by side in the batch axis, through one layer that has the stacked weights of all of them:

                     s = 0   1   2   3   4
            layer 0      0   1   2   3   4
            layer 1      1   2   3   4   5       the step in which each of them runs
            layer 2      2   3   4   5   6

    Segments of another shape run on their own: the first, until a cache is full, and a short last one.
    Raises what unroll raises, and ValueError where state does not stay inside its layer.
    """
    require(not model.variant.recurrent, f"the memory of {model.config.variant!r} goes from a segment's last layer to "
            "the next one's first layer, so that no two segments can run side by side: use unroll")
    require(isinstance(model.backbone, Transformer), "unroll_diagonal runs the layers of rmt.Transformer side by side, "
            f"and a {type(model.backbone).__name__} may have none: use unroll")
    check(model, tokens)
    state = model.initial_state(len(tokens)) if state is None else state
    segments, blocks, T = tokens.split(model.config.segment_len, dim=1), model.backbone.blocks, model.config.segment_len
    check(model, segments[0], state)
    cut, L, first = cuts(len(segments), bptt_depth), len(blocks), -(-(model.n_cache - model.cached(state)) // T)
    S, outputs = max(0, tokens.size(1) // T - first), deque(maxlen=1 if last_only else None)
    for segment in segments[:first]:
        logits, state = model(segment, state)
        outputs.append(logits)

    stacked = {name: torch.stack([b.get_parameter(name) for b in blocks]) for name, _ in blocks[0].named_parameters()}
    mask, x, carry = model.mask(T, model.n_cache), [None] * (L + 1), list(state.carry)  # x, carry: a layer's next input
    for step in range(S + L - 1 if S else 0):
        busy = range(max(0, step - S + 1), min(L, step + 1))  # layers
        if step < S:
            x[0] = model.wrap(segments[first + step], state.memory)
        weights = stacked if len(busy) == L else {n: weight[busy.start:busy.stop] for n, weight in stacked.items()}
        for l in busy:
            carry[l] = map_tensors(torch.detach, carry[l]) if cut[first + step - l] else carry[l]
        rows, *carries = [torch.cat(parts) for parts in zip(*((x[l], *carry[l]) for l in busy), strict=True)]
        cell = blocks[0], weights, (rows, mask, tuple(carries))
        rows, carries = recompute(functional_call, *cell, use_reentrant=False) if checkpoint else functional_call(*cell)
        for l, *parts in zip(busy, *(t.split(len(tokens)) for t in (rows, *carries)), strict=True):
            x[l + 1], carry[l] = parts[0], tuple(parts[1:])
        if busy.stop == L:
            outputs.append(model.unwrap(x[L], state.memory)[0])
    state = State(state.memory, map_tensors(torch.clone, tuple(carry)))  # views would keep whole diagonals alive
    for segment in segments[first + S:]:
        logits, state = model(segment, state.detach() if cut[-1] else state)
        outputs.append(logits)
    return torch.cat(tuple(outputs), dim=1), state


@torch.no_grad()
def stream(model, tokens: Tensor, state: State | None = None, temperature: float = 1.0, top_k: int | None = None,
           generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Continue tokens (B, length), which begin at a segment boundary from state: yield new tokens (B, 1) without end.

    A new token costs one row, whose keys and values are kept until the segment is full and hands its state on; a
    backbone other than Transformer recomputes the segment so far. Temperature 0 takes the most likely token, top_k
    samples among the k most likely. Call model.eval() first. Raises ValueError or TypeError with the first token.
    """
    check(model, tokens)
    require(model.variant.mask != "full", f"{model.config.variant!r} sees whole segments and cannot generate: use rmt")
    require(type(temperature) in (int, float) and (temperature == 0 or 1e-4 <= temperature < math.inf),
            f"temperature={temperature!r} must be 0 (the most likely token) or a finite number from 1e-4 up")
    require(top_k is None or (type(top_k) is int and top_k > 0), f"top_k={top_k!r} must be None or an integer above 0")
    T, state = model.config.segment_len, model.initial_state(len(tokens)) if state is None else state
    n_full = (tokens.size(1) - 1) // T * T  # tokens of segments that are full and have a successor
    _, state = unroll(model, tokens[:, :n_full], state, last_only=True) if n_full else (None, state)
    segment = tokens[:, n_full:].long()
    check(model, segment, state)
    while True:
        past = [[] for _ in model.backbone.blocks] if isinstance(model.backbone, Transformer) else []
        mask = segment_mask(model.n_read, model.cached(state), T, 0, model.mask_form, model.window, segment.device)
        for _ in range(segment.size(1), T + 1):
            rows = slice(past[0][0] if any(past) else 0, model.n_read + segment.size(1))  # those that past lacks
            x, visible = model.wrap(segment, state.memory)[:, rows], mask[rows, :model.cached(state) + rows.stop]
            x, _ = model.backbone(x, visible, state.carry, *past)  # what it carries on counts when the segment is full
            logits = model.head(model.norm(x[:, -1:]))[:, 0]
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
            new = (logits.argmax(-1, keepdim=True) if temperature == 0 else
                   torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator))
            yield new
            segment = torch.cat([segment, new], dim=1)
        (_, state), segment = model(segment[:, :T], state), new


def generate(model, tokens: Tensor, n_new: int, state: State | None = None, temperature: float = 1.0,
             top_k: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Continue tokens (B, length) by n_new tokens -> (B, n_new). Arguments and errors are those of `stream`."""
    require(type(n_new) is int and n_new > 0, f"n_new={n_new!r} must be an integer of at least 1")
    return torch.cat([*islice(stream(model, tokens, state, temperature, top_k, generator), n_new)], dim=1)
