"""The Recurrent Memory Transformer and its family, in one file.

A Transformer reads a long sequence one segment at a time. State can cross a segment boundary in two
places:

    over the top      memory tokens: the first layer reads what the last layer wrote        RMT
    inside a layer    a carry: cached inputs (Transformer-XL) or an associative matrix (ARMT)

              segment t                              segment t + 1
    logits            ^     written ---.       logits            ^     written
    layer L   =======================  |       layer L   =======================
    ...       =======================  |  carry   -->    =======================
    layer 1   =======================  |       layer 1   =======================
              read | tokens | write    '------------->   read | tokens | write

The memory that was written fills both memory blocks of the next segment. The whole method is this
loop; `unroll` is the same loop with its options:

    state = model.initial_state(batch_size)
    for segment in segments:
        if gradient_stops_here:                   # truncated backpropagation through time (BPTT)
            state = state.detach()
        logits, state = model(segment, state)     # one segment, always

The file has three parts. Part I is the Recurrent Memory Transformer, whole; you can stop after it.
Part II adds its relatives, one mechanism after the other: each is a layer, its equations, and its
row of the table VARIANTS. Part III puts a model to work: it generates text, shows where a model
looks, and runs many segments at once where that is possible. The comment "Departure" stands where
this file differs from a paper.

Glossary
    B  batch size      T  segment_len, tokens of a segment    V  vocab_size
    D  d_model         M  n_mem, memory tokens                L  n_layer
    H  n_head          E  D / H, channels of one head         K  features of an associative key
    N  rows of a segment: read + tokens + write               C  cached positions, at most cache_len

    memory          (B, M, D), "mem_t" in [RMT]; it goes over the top
    read, write     the memory tokens before and after the tokens of a segment
    carry           what the layers hand on to themselves
    state           all that crosses a boundary: State(memory, carry), passed in and returned
    bptt_depth      how many boundaries gradient may cross, "BPTT-k" in [RMT]

References
    [RMT]     Bulatov, Kuratov, Burtsev. Recurrent Memory Transformer. 2022, arXiv:2207.06881
    [RMT-1M]  Bulatov, Kuratov, Burtsev. Scaling Transformer to 1M tokens and beyond with RMT.
              2023, arXiv:2304.11062
    [RoPE]    Su et al. RoFormer: Enhanced Transformer with Rotary Position Embedding. 2021,
              arXiv:2104.09864
    [TXL]     Dai et al. Transformer-XL. 2019, arXiv:1901.02860
    [MT]      Burtsev, Kuratov, Peganov, Sapunov. Memory Transformer. 2020, arXiv:2006.11527
    [ARMT]    Rodkin, Kuratov, Bulatov, Burtsev. Associative Recurrent Memory Transformer. 2024,
              arXiv:2407.04841
    [DB]      Sivtsov et al. Diagonal Batching Unlocks Parallelism in Recurrent Memory Transformers
              for Long Contexts. 2025, arXiv:2506.05229
"""
from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

# ==================================================================================================
# Part I. The Recurrent Memory Transformer
# ==================================================================================================


@dataclass(frozen=True)
class Config:
    """The sizes and choices of one model. Raises ValueError naming field, value and rule."""
    variant: str = "rmt"        # a row of VARIANTS
    vocab_size: int = 64        # V
    segment_len: int = 32       # T, tokens
    n_layer: int = 2            # L
    n_head: int = 4             # H
    d_model: int = 64           # D
    n_mem: int = 8              # M, memory tokens
    dropout: float = 0.0        # on the embedded tokens and on the output of every sublayer

    # How memory is handed on. The first value of each choice is the one of the paper [RMT].
    memory_form: str = "norm"    # the written rows after the final norm, or "raw": before it
    write_slot: str = "memory"   # what the write rows are fed: the incoming memory, a learned
                                 # "embedding", or the sum of "both"
    memory_noise: float = 0.0    # in training: noise, scaled by 0 to this times the memory's RMS

    # Part II: transformer_xl and rmt_xl
    cache_len: int = 32          # positions that every layer caches, "mem_len" in [TXL]
    carry_dropout: float = 0.0   # rmt_xl, in training: how often a sequence loses its carry
    # Part II: mem_bottleneck
    window: int = 0              # how far a token sees other tokens, besides memory
    # Part II: armt
    d_assoc: int = 16            # channels of an associative key, which become K = 2 nu d_assoc
    nu: int = 3                  # products that the feature map makes of every channel
    update: str = "delta"        # the rule that writes: "delta", "armt" as published, "hebbian"

    def __post_init__(self):
        validate_config(self)


class State(NamedTuple):
    """All that crosses a segment boundary: plain tensors, owned by no module.

    `torch.save(tuple(state), path)` stores a state, `State(*torch.load(path))` brings it back.
    """
    memory: Tensor  # (B, M, D); (B, 0, D) where no memory goes over the top
    carry: tuple    # nested tuples of tensors (B, ...); in Transformer, one tuple per layer

    def detach(self) -> State:
        """The same values, cut off from the graph that computed them."""
        return tree_map(torch.detach, self)


def tree_map(fn, tree):
    """Apply fn to every tensor of nested tuples: `tree_map(lambda t: t.to("cuda"), state)`."""
    if isinstance(tree, State):
        return State(tree_map(fn, tree.memory), tree_map(fn, tree.carry))
    if isinstance(tree, tuple):
        return tuple(tree_map(fn, branch) for branch in tree)
    return fn(tree)


def tree_leaves(tree) -> list[Tensor]:
    """The tensors of nested tuples: `sum(t.numel() for t in tree_leaves(state))` counts floats."""
    if isinstance(tree, Tensor):
        return [tree]
    if not isinstance(tree, tuple):
        raise TypeError(f"a state holds a {type(tree).__name__} and must hold tensors, in tuples")
    leaves = []
    for branch in tree:
        leaves.extend(tree_leaves(branch))
    return leaves


class Layout(NamedTuple):
    """Where the rows of a segment stand, and who may look at whom: the same for every layer.

        rows      read | tokens | write            what a layer computes         N of them
        columns   read | cache | tokens | write    what its attention sees   C + N of them

    In Part I there is no cache: rows and columns are the same.
    """
    n_read: int
    n_cache: int
    n_tokens: int
    n_write: int
    mask: Tensor               # (N, C + N), True = this row may look at this column
    causal: bool               # the mask is the lower triangle, which fast kernels know
    row_rotation: Tensor       # (N, E / 2) complex, the positions of the rows
    column_rotation: Tensor    # (C + N, E / 2) complex, the positions of the columns
    kv_cache: dict | None = None  # Part III: keys and values of the segment's earlier rows

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows x (B, N, D) -> those of the read memory, of the tokens and of the write memory."""
        return x.split([self.n_read, self.n_tokens, self.n_write], dim=1)


def rotary_table(n_positions: int, width: int) -> Tensor:
    """cos and sin of every position's angles, (n_positions, width / 2, 2), in float64 [RoPE]."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(n_positions)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions [RoPE]: turn each pair of channels of x (B, n, H, E) by its row's angle.

    A pair is a complex number, rotation (n, E / 2) is e^(i angle), and turning is their product.
    """
    pairs = x.unflatten(-1, (-1, 2)).to(rotation.real.dtype)   # (B, n, H, E / 2, 2)
    turned = torch.view_as_complex(pairs) * rotation[:, None]  # (B, n, H, E / 2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions.

    Departure: [RMT] has absolute positions, [TXL] relative ones. Here all variants have the same.
    """

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.n_head = config.n_head
        self.query = nn.Linear(D, D, bias=False)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.out = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, context: Tensor, layout: Layout) -> Tensor:
        """The rows x (B, N, D) look at the columns context (B, C + N, D) -> (B, N, D)."""
        q = self.split_heads(self.query(x))                          # (B, N, H, E)
        k = self.split_heads(self.key(context))                      # (B, C + N, H, E)
        v = self.split_heads(self.value(context)).transpose(1, 2)    # (B, H, C + N, E)
        q = rotate(q, layout.row_rotation).transpose(1, 2)           # (B, H, N, E)
        k = rotate(k, layout.column_rotation).transpose(1, 2)        # (B, H, C + N, E)

        if layout.kv_cache is not None:  # Part III: the rows before these were computed earlier
            k, v = self.extend(layout.kv_cache, k, v)
        mask = None if layout.causal else layout.mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=layout.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, H, E)"""
        return x.unflatten(-1, (self.n_head, -1))

    def extend(self, kv_cache: dict, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values of earlier rows before k and v, and remember them all."""
        if self in kv_cache:
            earlier_k, earlier_v = kv_cache[self]
            k = torch.cat([earlier_k, k], dim=2)
            v = torch.cat([earlier_v, v], dim=2)
        kv_cache[self] = k, v
        return k, v


class Block(nn.Module):
    """A pre-norm Transformer layer. It carries nothing from one segment to the next."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.norm_1 = nn.LayerNorm(D, bias=False)
        self.norm_2 = nn.LayerNorm(D, bias=False)
        self.attn = Attention(config)
        self.mlp = nn.Sequential(
            nn.Linear(D, 4 * D, bias=False),
            nn.GELU(),
            nn.Linear(4 * D, D, bias=False),
        )
        self.dropout = nn.Dropout(config.dropout)

    def init_weights(self):
        """Called after RMT has drawn all matrices: a layer may set some of its own. Here: none."""

    def initial_carry(self, batch_size: int) -> tuple:
        """What the first segment carries in: a tuple of tensors (B, ...), here none."""
        return ()

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        """Rows x (B, N, D) and this layer's carry -> rows of the same shape, the next carry."""
        h = self.norm_1(x)
        x = x + self.dropout(self.attn(h, h, layout))
        x = x + self.dropout(self.mlp(self.norm_2(x)))
        return x, carry


class Transformer(nn.Module):
    """The backbone: L layers. Plain layers treat all rows alike, those of memory too.

    Any module with `initial_carry(batch_size)` and `forward(x, layout, carry) -> (x, carry)` can
    take its place.
    """

    def __init__(self, config: Config, block: type = Block):
        super().__init__()
        self.blocks = nn.ModuleList([block(config) for _ in range(config.n_layer)])

    def initial_carry(self, batch_size: int) -> tuple:
        """One carry for every layer."""
        return tuple(block.initial_carry(batch_size) for block in self.blocks)

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        """Rows x (B, N, D) -> rows (B, N, D), without a final norm, and the next carry."""
        next_carry = []
        for block, layer_carry in zip(self.blocks, carry, strict=True):
            x, layer_carry = block(x, layout, layer_carry)
            next_carry.append(layer_carry)
        return x, tuple(next_carry)


def segment_mask(n_read: int, n_cache: int, n_tokens: int, n_write: int, form: str = "paper",
                 window: int | None = None, device=None) -> Tensor:
    """Who may look at whom in one segment: bool (N, C + N), True = may look [RMT] sec. 3.

                     read   cache  tokens  write         the form "paper"
            read     x x    . .    . . .   . .       read rows see each other only
                     x x    . .    . . .   . .
            tokens   x x    x x    x . .   . .       tokens are causal; they see what was read
                     x x    x x    x x .   . .       and what is cached
                     x x    x x    x x x   . .
            write    x x    . .    x x x   x x       write rows see the segment and each other
                     x x    . .    x x x   x x

    In the form "causal" a row sees itself and the rows before it; all but the read rows see the
    cache too. In the form "full" every row sees every column. With a window (Part II), a token sees
    the other tokens at most that many positions away, but not itself.
    Raises ValueError for an unknown form.
    """
    if form not in ("paper", "causal", "full"):
        raise ValueError(f"mask form {form!r} must be 'paper', 'causal' or 'full'")
    n = n_read + n_tokens + n_write
    now = torch.ones(n, n, dtype=torch.bool, device=device)
    cached = torch.ones(n, n_cache, dtype=torch.bool, device=device)
    if form != "full":
        now = now.tril()
        cached[:n_read] = False
    if form == "paper":
        now[:n_read, :n_read] = True
        now[n - n_write:] = True
        cached[n - n_write:] = False
    if window is not None:
        near = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device)
        near = near.tril(window).triu(-window)
        near.fill_diagonal_(False)
        now[n_read:n - n_write, n_read:n - n_write] &= near
    return torch.cat([now[:, :n_read], cached, now[:, n_read:]], dim=1)


class Variant(NamedTuple):
    """A member of the family."""
    read: bool             # are there memory tokens before the segment?
    write: bool            # are there memory tokens after the segment?
    recurrent: bool        # does their output become the memory of the next segment?
    mask: str              # who looks at whom, a form of segment_mask
    block: type = Block    # the layer
    cache: bool = False    # Part II: do tokens also see cached positions of earlier segments?
    window: bool = False   # Part II: do tokens see each other through a window only?


# Recurrent memory is read from the output of the write rows; without them, of the read rows.
VARIANTS = {
    #                          read   write  recurrent  mask
    "transformer":     Variant(False, False, False,     "causal"),  # no memory
    "mem_transformer": Variant(True,  False, False,     "paper"),   # [MT]; memory sees no token
    "rmt":             Variant(True,  True,  True,      "paper"),   # [RMT] sec. 3
    "rmt_causal":      Variant(True,  True,  True,      "causal"),  # every row is causal
    "rmt_encoder":     Variant(True,  False, True,      "full"),    # [RMT-1M]; sees later tokens
}


class RMT(nn.Module):
    """Memory tokens around a backbone. It runs one segment.

    backbone  a module of yours in place of Transformer, for variants of plain layers
    embed     a module of yours, tokens (B, T) -> rows (B, T, D)
    head      a module of yours, rows (B, T, D) as the backbone leaves them -> logits (B, T, V). It
              replaces the final norm too, so that memory_form "norm" and "raw" are then the same
    Parts of yours keep their weights; ours go to their device and dtype.
    Raises ValueError where the config does not fit its variant or the parts.
    """

    def __init__(self, config: Config, backbone: nn.Module | None = None,
                 embed: nn.Module | None = None, head: nn.Module | None = None):
        super().__init__()
        validate_model(config, backbone, embed, head)
        D, V = config.d_model, config.vocab_size
        self.config = config
        self.variant = VARIANTS[config.variant]
        self.n_read = config.n_mem if self.variant.read else 0
        self.n_write = config.n_mem if self.variant.write else 0
        self.n_cache = config.cache_len if self.variant.cache else 0
        n_mem = max(self.n_read, self.n_write)
        n_embedding = self.n_write if config.write_slot != "memory" else 0

        # The modules. Yours are those that came as arguments.
        yours = {"backbone": backbone, "embed": embed, "head": head}
        where = place_of(yours.values())
        self.embed = nn.Embedding(V, D, **where) if embed is None else embed
        self.memory = nn.Parameter(torch.empty(n_mem, D, **where))  # of the first segment
        self.write_embedding = nn.Parameter(torch.empty(n_embedding, D, **where))
        if backbone is None:
            backbone = Transformer(config, self.variant.block).to(**where)
        self.backbone = backbone
        self.norm = nn.LayerNorm(D, bias=False, **where) if head is None else nn.Identity()
        self.head = nn.Linear(D, V, bias=False, **where) if head is None else head
        self.dropout = nn.Dropout(config.dropout)

        n_positions = self.n_read + self.n_cache + config.segment_len + self.n_write
        table = rotary_table(n_positions, D // config.n_head).to(self.memory)
        self.register_buffer("rotary_table", table, persistent=False)
        full_mask = self.mask(config.segment_len, self.n_cache)
        self.register_buffer("full_mask", full_mask, persistent=False)
        self.init_weights(keep=tuple(f"{name}." for name in yours if yours[name] is not None))
        self.state_form = state_form(self.initial_state(1))

    @torch.no_grad()
    def init_weights(self, keep: tuple = ()):
        """Draw all matrices, except those whose names begin with a prefix in keep."""
        for name, weight in self.named_parameters():
            if weight.dim() != 2 or name.startswith(keep):
                continue
            # Models of this size learn far faster from this than from GPT-2's 0.02.
            std = 0.7 / math.sqrt(weight.size(1))
            if name.endswith(("attn.out.weight", "mlp.2.weight")):
                std = std / math.sqrt(2 * self.config.n_layer)  # they end the residual branches
            if name == "embed.weight":
                std = 0.5
            if name in ("memory", "write_embedding"):
                std = 0.02  # drawn one by one, because the memory rows must differ
            weight.normal_(std=std)
        for name, module in self.named_modules():
            if isinstance(module, Block) and not name.startswith(keep):
                module.init_weights()

    def initial_state(self, batch_size: int) -> State:
        """The learned memory, the same for every sequence, and the backbone's initial carry."""
        memory = self.memory
        if not self.variant.recurrent:
            memory = memory[:0]
        memory = memory.expand(batch_size, -1, -1).clone()
        return State(memory, self.backbone.initial_carry(batch_size))

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run one segment.

        tokens (B, T or fewer), state (default: the initial one) -> logits (B, T, V), next state.
        Raises TypeError or ValueError for tokens or a state that do not fit.
        """
        validate_segment(self, tokens)
        if state is None:
            state = self.initial_state(len(tokens))
        validate_state(self, state, tokens)
        layout = self.layout(tokens.size(1), self.cached(state))
        rows = self.wrap(tokens, state.memory)                                  # (B, N, D)
        x, carry = self.backbone(rows, layout, self.drop_carry(state.carry))    # (B, N, D)
        if x.shape != rows.shape:
            raise ValueError(f"the backbone turns rows {tuple(rows.shape)} into {tuple(x.shape)}: "
                             "it must keep their shape")

        read, hidden, write = layout.split(x)
        logits = self.head(self.norm(hidden))                                   # (B, T, V)
        memory = state.memory
        if self.variant.recurrent:
            memory = self.next_memory(write if self.variant.write else read)    # (B, M, D)
        return logits, State(memory, carry)

    def wrap(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """tokens (B, T), memory (B, M, D) -> the rows [read | tokens | write] (B, N, D)."""
        if not self.variant.recurrent:
            memory = self.memory.expand(len(tokens), -1, -1)  # the same in every segment
        read = memory[:, :self.n_read]
        write = memory[:, :self.n_write]
        # Departure, where it is chosen: [RMT] feeds the write rows the incoming memory alone.
        if self.config.write_slot == "embedding":
            write = self.write_embedding.expand_as(write)
        elif self.config.write_slot == "both":
            write = write + self.write_embedding
        x = self.dropout(self.embed(tokens.long()))
        return torch.cat([read, x, write], dim=1)

    def next_memory(self, written: Tensor) -> Tensor:
        """The written rows (B, M, D), as the backbone leaves them -> the next segment's memory."""
        if self.config.memory_form == "norm":
            written = self.norm(written)
        memory = written.clone()  # a view would keep all rows of its segment alive
        if self.training and self.config.memory_noise > 0:
            # Departure: the network learns to restore what it keeps. One size for each sequence.
            size = self.config.memory_noise * torch.rand_like(memory[:, :1, :1])
            rms = memory.detach().square().mean(dim=-1, keepdim=True).sqrt()
            memory = memory + size * rms * torch.randn_like(memory)
        return memory

    def layout(self, n_tokens: int, n_cache: int = 0) -> Layout:
        """The layout of a segment of n_tokens, after n_cache cached positions.

        Positions are those of a full cache: the distance from read memory to the tokens never
        changes, and cached positions come right before the tokens that followed them.
        """
        causal = False
        if self.variant.mask == "causal" and n_cache == 0 and not self.variant.window:
            causal = True
        mask = self.full_mask
        if (n_tokens, n_cache) != (self.config.segment_len, self.n_cache):
            mask = self.mask(n_tokens, n_cache)
        table = self.rotary_table
        table = torch.view_as_complex(table.to(torch.promote_types(table.dtype, torch.float32)))
        first = self.n_read + self.n_cache  # the position of the first token
        end = first + n_tokens + self.n_write
        return Layout(
            n_read=self.n_read,
            n_cache=n_cache,
            n_tokens=n_tokens,
            n_write=self.n_write,
            mask=mask,
            causal=causal,
            row_rotation=torch.cat([table[:self.n_read], table[first:end]]),
            column_rotation=torch.cat([table[:self.n_read], table[first - n_cache:end]]),
        )

    def mask(self, n_tokens: int, n_cache: int = 0) -> Tensor:
        """Who may look at whom in a segment of n_tokens: bool (N, C + N), see segment_mask."""
        window = self.config.window if self.variant.window else None
        return segment_mask(self.n_read, n_cache, n_tokens, self.n_write, self.variant.mask,
                            window, self.memory.device)

    def state_floats(self) -> int:
        """How many floats of each sequence cross a boundary, once the caches are full."""
        floats = sum(leaf.numel() for leaf in tree_leaves(self.initial_state(1)))
        return floats + self.config.n_layer * self.n_cache * self.config.d_model

    # What the layers of Part II need.

    def cached(self, state: State) -> int:
        """How many positions the caches of a state hold."""
        if self.n_cache == 0:
            return 0
        return state.carry[0][0].size(1)

    def drop_carry(self, carry: tuple) -> tuple:
        """In training, set the carry of some sequences to 0: they must use memory."""
        rate = self.config.carry_dropout
        if not (self.training and self.variant.recurrent and rate > 0 and tree_leaves(carry)):
            return carry
        batch_size = len(tree_leaves(carry)[0])
        kept = torch.rand(batch_size, device=self.memory.device) >= rate

        def drop(t):
            shape = [batch_size] + [1] * (t.dim() - 1)
            return t * kept.view(shape)
        return tree_map(drop, carry)


def place_of(modules) -> dict:
    """Device and dtype of the first parameter of some modules, of which some are None."""
    for module in modules:
        if module is not None:
            for weight in module.parameters():
                return {"device": weight.device, "dtype": weight.dtype}
    return {}


def unroll(model: RMT, tokens: Tensor, state: State | None = None, bptt_depth: int | None = None,
           checkpoint: bool = False, last_only: bool = False) -> tuple[Tensor, State]:
    """The loop over segments: tokens (B, length) -> logits (B, length, V), the state at the end.

    state       where to start; default: the initial state. To train on a stream in pieces, hand the
                returned state on with state.detach().
    bptt_depth  how many segment boundaries gradient may cross: None all of them, 0 none. Cuts are
                counted from the end: the loss of the last segment reaches back bptt_depth segments,
                or to the start, and that of any other segment at most that far.
    checkpoint  keep only the states, and compute each segment again in the backward pass.
    last_only   return the logits of the last segment only. Without gradient, a million tokens then
                take the memory of one segment.

    Released code knows two other depths. Gradient in the last k segments only: unroll the others
    under torch.no_grad(), then those k. Every loss back through k segments: keep a list of detached
    states; for each segment s, unroll segments s - k .. s from the state before them, last_only.
    Raises TypeError or ValueError for tokens, a state or a depth that do not fit.
    """
    validate_tokens(model, tokens)
    validate_depth(bptt_depth)
    if state is None:
        state = model.initial_state(len(tokens))
    T = model.config.segment_len
    n_segments = math.ceil(tokens.size(1) / T)

    outputs = deque(maxlen=1 if last_only else None)
    for s in range(n_segments):
        segment = tokens[:, s * T:(s + 1) * T]
        if gradient_stops(s, n_segments, bptt_depth):
            state = state.detach()
        if checkpoint:
            logits, state = recompute(model, segment, state, use_reentrant=False)
        else:
            logits, state = model(segment, state)
        outputs.append(logits)
    return torch.cat(list(outputs), dim=1), state


def gradient_stops(s: int, n_segments: int, bptt_depth: int | None) -> bool:
    """Whether truncated BPTT cuts the boundary before segment s, for example at depth 1:

        segments      0  1 | 2  3 | 4  5        n_segments 6
        segments      0 | 1  2 | 3  4           n_segments 5
    """
    if bptt_depth is None or s == 0:  # never before the first: the initial memory must learn
        return False
    return (n_segments - s) % (bptt_depth + 1) == 0


# ==================================================================================================
# Part II. The family: a mechanism is a layer, and a row of the table
# ==================================================================================================

# Transformer-XL caches the inputs of every layer [TXL] sec. 3.2:
#
#     h~ = [SG(cache) ; h]      SG: no gradient into the cache; norms are left out here
#     q = W_q h                 k, v = W_k h~, W_v h~
#
# What crosses a boundary: L C D floats; in rmt_xl also the M D of memory [RMT] sec. 3.


class CacheBlock(Block):
    """Tokens also see this layer's inputs for the C tokens before the segment, without gradient.

    The carry is (cache,): the last c inputs of tokens (B, c, D), before norm and rotation. c grows
    from 0 to C.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.cache_len = config.cache_len

    def initial_carry(self, batch_size: int) -> tuple:
        """An empty cache (B, 0, D)."""
        weight = self.norm_1.weight
        return (weight.new_zeros(batch_size, 0, len(weight)),)

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        (cache,) = carry
        h = self.norm_1(x)
        context = h
        if layout.n_cache > 0:
            read, tokens, write = layout.split(h)
            context = torch.cat([read, self.norm_1(cache), tokens, write], dim=1)

        if layout.kv_cache is None:  # Part III runs a segment that is full once more, for its state
            _, tokens, _ = layout.split(x)
            cache = torch.cat([cache, tokens], dim=1)[:, -self.cache_len:]
            cache = cache.detach().clone()  # a view would keep all rows of its segment alive

        x = x + self.dropout(self.attn(h, context, layout))
        x = x + self.dropout(self.mlp(self.norm_2(x)))
        return x, (cache,)


VARIANTS["transformer_xl"] = Variant(
    read=False, write=False, recurrent=False, mask="causal", block=CacheBlock, cache=True)
VARIANTS["rmt_xl"] = Variant(
    read=True, write=True, recurrent=True, mask="paper", block=CacheBlock, cache=True)


# The Memory Transformer has two more forms [MT] sec. 3. In both, memory and tokens are updated in
# two steps (a stroke marks what is new):
#
#     controller    memory' = layer'([memory ; tokens])     layer' has weights of its own
#                   tokens' = layer([memory ; tokens])      both steps see the old rows
#     bottleneck    memory' = layer([memory ; tokens])
#                   tokens' = layer([memory' ; other tokens in the window])
#
# Departure: the paper has one segment; here memory is handed on, M D floats, as in rmt (a decoder)
# or in rmt_encoder. The window of the bottleneck is ours: in the paper tokens see memory only.


def memory_rows(layout: Layout) -> Tensor:
    """The indices (2 M or M,) of the memory rows: the first n_read and the last n_write rows."""
    first_write = layout.n_read + layout.n_tokens
    read = torch.arange(layout.n_read)
    write = torch.arange(first_write, first_write + layout.n_write)
    return torch.cat([read, write]).to(layout.mask.device)


def update_memory(block: Block, x: Tensor, layout: Layout, rows: Tensor) -> Tensor:
    """The memory rows (B, 2 M or M, D) as they leave the block, after looking at all rows x."""
    narrow = layout._replace(
        mask=layout.mask[rows],
        causal=False,
        row_rotation=layout.row_rotation[rows],
        kv_cache=None,
    )
    h = block.norm_1(x)
    memory = x[:, rows] + block.dropout(block.attn(h[:, rows], h, narrow))
    return memory + block.dropout(block.mlp(block.norm_2(memory)))


class ControllerBlock(Block):
    """Memory rows have attention and feed-forward weights of their own: the memory controller."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.controller = Block(config)

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        rows = memory_rows(layout)
        if len(rows) == 0:  # Part III: the later rows of a segment, one by one
            return super().forward(x, layout, carry)
        memory = update_memory(self.controller, x, layout, rows)
        x, carry = super().forward(x, layout, carry)
        return x.index_copy(1, rows, memory), carry


class BottleneckBlock(Block):
    """Memory rows are updated first, and tokens see the new memory; the mask keeps tokens apart.

    In the encoder form that memory has read the whole segment. In the decoder form tokens see the
    read memory, which sees no token: what is beyond the window reaches them in the next segment.
    Both steps have the same weights.
    """

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        rows = memory_rows(layout)
        if len(rows) == 0:
            return super().forward(x, layout, carry)
        memory = update_memory(self, x, layout, rows)
        x, carry = super().forward(x.index_copy(1, rows, memory), layout, carry)
        return x.index_copy(1, rows, memory), carry


VARIANTS["mem_controller"] = Variant(
    read=True, write=True, recurrent=True, mask="paper", block=ControllerBlock)
VARIANTS["mem_controller_encoder"] = Variant(
    read=True, write=False, recurrent=True, mask="full", block=ControllerBlock)
VARIANTS["mem_bottleneck"] = Variant(
    read=True, write=True, recurrent=True, mask="paper", block=BottleneckBlock, window=True)
VARIANTS["mem_bottleneck_encoder"] = Variant(
    read=True, write=False, recurrent=True, mask="full", block=BottleneckBlock, window=True)


# The Associative Recurrent Memory Transformer: a matrix A in every layer, which all rows read and
# the write rows m rewrite after the layer [ARMT] sec. 3. phi makes K features of unit length.
#
#     read     h += A phi(W_q h)
#     write    k = phi(W_k m)    v = W_v m    beta = sigmoid(W_b m + b)       for each write row
#              beta_i /= max(1, sum over j of (k_i . k_j) beta_j)             keys that are alike
#              A += sum of beta (v - A k) k^T                                 over the write rows
#
# That is update "delta", a departure. The published one, "armt", has the plain beta, a phi that is
# not scaled, and a normaliser z:
#
#     read     h += A phi(W_q h) / (z . phi(W_q h) + eps)       likewise A k / (z . k + eps) for A k
#     write    gamma = clip(1 - (z . k + eps) / (|k|^2 + eps), 0, 1)          how new is the key?
#              z += sum of gamma k                                            no gradient in gamma
#
# "hebbian" is delta without the correction: A += sum of beta v k^T.
# In "delta" no write amplifies what A held; the other two have no such bound.
# What crosses a boundary: L D K floats, for "armt" also the L K of z.


def feature_map(x: Tensor, nu: int) -> Tensor:
    """DPFP, a deterministic parameter-free projection [ARMT]: x (..., d) -> (..., 2 nu d).

    With r = [relu(x) ; relu(-x)], the features are the products r_i r_{i - j} for j = 1 .. nu; the
    last r comes before the first.
    """
    r = torch.cat([x.relu(), (-x).relu()], dim=-1)
    products = [r * r.roll(shift, dims=-1) for shift in range(1, nu + 1)]
    return torch.cat(products, dim=-1)


class AssociativeBlock(Block):
    """Every row reads a matrix before the layer; the write rows rewrite it after the layer [ARMT].

    The carry is (A, z): A (B, D, K); z (B, K) for update "armt", else (B, 0). Both are float32 or
    wider, under autocast too.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        D = config.d_model
        self.nu = config.nu
        self.update = config.update
        self.eps = 1e-5
        self.w_q = nn.Linear(D, config.d_assoc, bias=False)
        self.w_k = nn.Linear(D, config.d_assoc, bias=False)
        self.w_v = nn.Linear(D, D, bias=False)
        self.w_b = nn.Linear(D, 1)

    def init_weights(self):
        """Called after RMT has drawn all matrices."""
        self.w_v.weight.zero_()                 # an untrained memory says nothing
        self.w_k.weight.copy_(self.w_q.weight)  # departure: a row reads where it would write

    def initial_carry(self, batch_size: int) -> tuple:
        """An empty memory."""
        d, D = self.w_q.weight.shape
        K = 2 * self.nu * d
        dtype = torch.promote_types(self.w_q.weight.dtype, torch.float32)
        A = self.w_q.weight.new_zeros(batch_size, D, K, dtype=dtype)
        z = A.new_zeros(batch_size, K if self.update == "armt" else 0)
        return A, z

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        A, z = carry
        x = x + self.read(self.features(self.w_q(x)), A, z).to(x.dtype)
        x, _ = super().forward(x, layout, ())
        if layout.n_write > 0:
            _, _, m = layout.split(x)
            A, z = self.write(m, A, z)
        return x, (A, z)

    def features(self, x: Tensor) -> Tensor:
        """x (B, n, d_assoc) -> phi (B, n, K), of unit length except for update "armt"."""
        phi = feature_map(x.to(torch.promote_types(x.dtype, torch.float32)), self.nu)
        if self.update == "armt":
            return phi
        return phi / (phi.norm(dim=-1, keepdim=True) + self.eps)

    def read(self, phi: Tensor, A: Tensor, z: Tensor) -> Tensor:
        """What the memory answers to the features phi (B, n, K): (B, n, D)."""
        with torch.autocast(phi.device.type, enabled=False):
            value = phi @ A.mT
            if self.update == "armt":
                value = value / (phi @ z[..., None] + self.eps)
            return value

    def write(self, m: Tensor, A: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The memory after the write rows m (B, M, D), all of which correct the same old A."""
        k = self.features(self.w_k(m))                     # (B, M, K)
        v = self.w_v(m).to(A.dtype)                        # (B, M, D)
        beta = self.w_b(m).to(A.dtype).sigmoid()           # (B, M, 1)
        with torch.autocast(m.device.type, enabled=False):
            if self.update != "hebbian":
                v = v - self.read(k, A, z)                 # what A does not know yet
            if self.update == "delta":
                # Write rows with alike keys share one step: no eigenvalue of sum of beta k k^T is
                # above 1 then, and no write amplifies what A held. Else 16 rows can make A explode.
                beta = beta / (k @ k.mT @ beta).clamp(min=1)
            if self.update == "armt":
                z = z + self.newness(k, z).mul(k).sum(dim=1)
            return torch.baddbmm(A, (beta * v).mT, k), z

    def newness(self, k: Tensor, z: Tensor) -> Tensor:
        """gamma (B, M, 1) of keys k (B, M, K): 1 for a key that is new, 0 for one that is known."""
        known = k @ z[..., None]
        length = k.square().sum(dim=-1, keepdim=True)
        gamma = 1 - (known + self.eps) / (length + self.eps)
        gamma = gamma.clamp(0, 1).detach()
        # The paper's equation has no eps: where nothing is known yet, gamma is 1.
        return torch.where(known == 0, 1.0, gamma)


VARIANTS["armt"] = Variant(
    read=False, write=True, recurrent=False, mask="causal", block=AssociativeBlock)


# ==================================================================================================
# Part III. At work: generation, attention maps, diagonal batching
# ==================================================================================================


@torch.no_grad()
def stream(model: RMT, tokens: Tensor, state: State | None = None, temperature: float = 1.0,
           top_k: int | None = None, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Continue tokens (B, length), which begin at a segment boundary: yield new tokens forever.

    A new token (B, 1) costs one row, since the keys and values of earlier rows are kept; a segment
    that is full runs once more, for its state. Call model.eval() first.

    A layer of yours must mix rows in Attention alone, each in an Attention of its own. Layers that
    use no Attention, and backbones of yours, compute the segment again for every token.

    temperature  0 takes the most likely token, 1 samples the model's distribution
    top_k        sample among this many most likely tokens only
    generator    where the random numbers come from
    Raises TypeError or ValueError when the first token is asked for.
    """
    validate_tokens(model, tokens)
    validate_sampling(model, temperature, top_k)
    T = model.config.segment_len
    if state is None:
        state = model.initial_state(len(tokens))
    # Segments that are full, and followed by another one, hand on their state.
    n_done = (tokens.size(1) - 1) // T * T
    if n_done > 0:
        _, state = unroll(model, tokens[:, :n_done], state, last_only=True)
    segment = tokens[:, n_done:].long()
    validate_state(model, state, segment)
    while True:
        decoder = SegmentDecoder(model, state)
        while segment.size(1) <= T:
            logits = decoder.next_logits(segment)
            new = sample(logits, temperature, top_k, generator)
            yield new
            segment = torch.cat([segment, new], dim=1)
        _, state = model(segment[:, :T], state)
        segment = new


def generate(model: RMT, tokens: Tensor, n_new: int, state: State | None = None,
             temperature: float = 1.0, top_k: int | None = None,
             generator: torch.Generator | None = None) -> Tensor:
    """Continue tokens (B, length) by n_new tokens (B, n_new); otherwise as `stream`."""
    if type(n_new) is not int or n_new < 1:
        raise ValueError(f"n_new={n_new!r} must be an integer of at least 1")
    new = islice(stream(model, tokens, state, temperature, top_k, generator), n_new)
    return torch.cat(list(new), dim=1)


class SegmentDecoder:
    """The logits of the next token of one segment that grows; every row is computed once."""

    def __init__(self, model: RMT, state: State):
        self.model = model
        self.state = state
        self.layout = model.layout(model.config.segment_len, model.cached(state))
        self.kv_cache = {}
        self.n_rows = 0  # rows whose keys and values are in the kv_cache

    def next_logits(self, segment: Tensor) -> Tensor:
        """The segment so far (B, t), longer than last time -> logits (B, V) of its next token."""
        model = self.model
        start = self.n_rows                        # the first row that was not computed yet
        end = model.n_read + segment.size(1)       # one after the last token's row
        if start == 0:
            rows = model.wrap(segment, self.state.memory)[:, :end]  # without the write rows
        else:
            rows = model.dropout(model.embed(segment[:, start - model.n_read:]))
        x, _ = model.backbone(rows, self.part(start, end), self.state.carry)
        if self.kv_cache:  # otherwise the layers keep nothing, and need all rows again
            self.n_rows = end
        return model.head(model.norm(x[:, -1:]))[:, 0]

    def part(self, start: int, end: int) -> Layout:
        """The layout of the rows start .. end; tokens do not see write rows, which come later."""
        whole = self.layout
        n_read = whole.n_read if start == 0 else 0
        n_cache = whole.n_cache if start == 0 else 0
        first_column = 0 if start == 0 else whole.n_cache + start
        last_column = whole.n_cache + end
        return Layout(
            n_read=n_read,
            n_cache=n_cache,
            n_tokens=end - start - n_read,
            n_write=0,
            mask=whole.mask[start:end, :last_column],
            causal=whole.causal and start == 0,
            row_rotation=whole.row_rotation[start:end],
            column_rotation=whole.column_rotation[first_column:last_column],
            kv_cache=self.kv_cache,
        )


def sample(logits: Tensor, temperature: float, top_k: int | None,
           generator: torch.Generator | None) -> Tensor:
    """Draw a token (B, 1) from logits (B, V). Raises ValueError where they are not finite."""
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: were its weights trained with too "
                         "large a learning rate?")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    n = logits.size(-1) if top_k is None else min(top_k, logits.size(-1))
    best = logits.float().topk(n)
    drawn = torch.multinomial((best.values / temperature).softmax(-1), 1, generator=generator)
    return best.indices.gather(1, drawn)


def attention_maps(model: RMT, tokens: Tensor, state: State | None = None
                   ) -> tuple[Tensor, list[int]]:
    """Where a model looks: the attention weights of one segment, tokens (B, T or fewer).

    Returns weights (L, B, H, N, C + N), where row n looks at column m, and the widths of the blocks
    of columns: `read, cache, tokens, write = weights.split(widths, dim=-1)`. Works for any backbone
    whose layers call F.scaled_dot_product_attention, and raises ValueError for others.
    """
    validate_segment(model, tokens)
    if state is None:
        state = model.initial_state(len(tokens))
    attend = F.scaled_dot_product_attention
    seen = []

    def record(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        seen.append(attention_weights(q, k, attn_mask, is_causal, options.get("scale")))
        return attend(q, k, v, attn_mask, dropout_p, is_causal, **options)

    F.scaled_dot_product_attention = record
    try:
        with torch.no_grad():
            model(tokens, state)
    finally:
        F.scaled_dot_product_attention = attend
    if not seen:
        raise ValueError("attention_maps needs layers that call F.scaled_dot_product_attention, "
                         "and these do not")

    layout = model.layout(tokens.size(1), model.cached(state))
    maps = []
    of_memory = None
    for weights in seen:
        if weights.size(-2) < len(layout.mask):
            of_memory = weights  # in a controller or bottleneck, the memory rows look first
            continue
        if of_memory is not None:
            weights = weights.index_copy(-2, memory_rows(layout), of_memory)
        maps.append(weights)
    return torch.stack(maps), [layout.n_read, layout.n_cache, layout.n_tokens, layout.n_write]


def attention_weights(q, k, mask, is_causal, scale) -> Tensor:
    """softmax(q k^T scale) under the mask, as F.scaled_dot_product_attention defines it."""
    if scale is None:
        scale = q.size(-1) ** -0.5
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # grouped queries share their keys
    scores = q @ k.mT * scale
    if is_causal:
        mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if mask is None:
        return scores.softmax(dim=-1)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return (scores + mask).softmax(dim=-1)


def unroll_diagonal(model: RMT, tokens: Tensor, state: State | None = None,
                    bptt_depth: int | None = None, checkpoint: bool = False,
                    last_only: bool = False) -> tuple[Tensor, State]:
    """`unroll` for S segments in S + L - 1 steps instead of S L, equal up to rounding [DB].

    Where no memory goes over the top, segment s in layer l needs two things only: its rows from
    layer l - 1, and what layer l carries out of segment s - 1. So all cells with one s + l run at
    once, side by side in the batch, through one layer that holds the stacked weights of all layers:

                     s = 0   1   2   3   4
            layer 0      0   1   2   3   4
            layer 1      1   2   3   4   5       the step in which each cell runs
            layer 2      2   3   4   5   6

    The random numbers of dropout differ. Segments that cannot join run one by one, and without
    checkpoint: the first ones, until a cache is full, and a last one that is short. Layers may
    differ in the weights of nn.Linear and nn.LayerNorm only, and must not mix sequences.
    Raises what unroll raises, and ValueError for models whose layers cannot run side by side.
    """
    validate_diagonal(model)
    validate_tokens(model, tokens)
    validate_depth(bptt_depth)
    if state is None:
        state = model.initial_state(len(tokens))
    T = model.config.segment_len
    validate_state(model, state, tokens)
    n_segments = math.ceil(tokens.size(1) / T)
    n_first = min(math.ceil((model.n_cache - model.cached(state)) / T), n_segments)
    n_full = max(n_first, tokens.size(1) // T)
    segments = [tokens[:, s * T:(s + 1) * T] for s in range(n_segments)]
    cuts = [gradient_stops(s, n_segments, bptt_depth) for s in range(n_segments)]
    outputs = deque(maxlen=1 if last_only else None)

    def one_by_one(start, end, state):
        for segment, cut in zip(segments[start:end], cuts[start:end], strict=True):
            logits, state = model(segment, state.detach() if cut else state)
            outputs.append(logits)
        return state

    state = one_by_one(0, n_first, state)
    state = along_diagonals(
        model, segments[n_first:n_full], cuts[n_first:n_full], state, checkpoint, outputs)
    state = one_by_one(n_full, n_segments, state)
    return torch.cat(list(outputs), dim=1), state


def along_diagonals(model, segments, cuts, state, checkpoint, outputs) -> State:
    """Run full segments along diagonals, append their logits to outputs, return the last state."""
    S, L = len(segments), len(model.backbone.blocks)
    if S == 0:
        return state
    B = len(segments[0])
    layout = model.layout(model.config.segment_len, model.n_cache)
    layer = side_by_side(model.backbone.blocks)
    stacked = [module for module in layer.modules() if isinstance(module, Stacked)]

    def run(busy, x, carries):
        for module in stacked:
            module.select(busy, len(x))
        return layer(x, layout, carries)

    rows = [None] * (L + 1)    # rows[l]: what layer l reads next; rows[L]: what the last one made
    carry = list(state.carry)  # carry[l]: what layer l carries into its next segment
    for step in range(S + L - 1):
        busy = range(max(0, step - S + 1), min(L, step + 1))  # layer l works on segment step - l
        if step < S:
            rows[0] = model.wrap(segments[step], state.memory)
        for l in busy:
            if cuts[step - l]:
                carry[l] = tree_map(torch.detach, carry[l])

        # The busy layers compute at once, with their rows and carries side by side in the batch.
        x = torch.cat([rows[l] for l in busy])
        carries = tuple(torch.cat(parts) for parts in zip(*[carry[l] for l in busy], strict=True))
        if checkpoint:
            x, carries = recompute(run, busy, x, carries, use_reentrant=False)
        else:
            x, carries = run(busy, x, carries)

        pieces = x.split(B)
        carries = [part.split(B) for part in carries]
        for i, l in enumerate(busy):
            rows[l + 1] = pieces[i]
            carry[l] = tuple(part[i] for part in carries)
        if busy.stop == L:
            _, hidden, _ = layout.split(rows[L])
            outputs.append(model.head(model.norm(hidden)))
    carry = tree_map(torch.clone, tuple(carry))  # a view would keep its whole diagonal alive
    return State(state.memory, carry)


def side_by_side(blocks) -> nn.Module:
    """One layer that computes several of the blocks at once, with their weights stacked."""
    # deepcopy takes what stands in its memo from there: here the weights, which need no copies.
    memo = {id(weight): weight for weight in blocks[0].parameters()}
    layer = copy.deepcopy(blocks[0], memo)
    for name, module in list(layer.named_modules(remove_duplicate=False)):
        same_place = [block.get_submodule(name) for block in blocks]
        if type(module) is nn.Linear:
            layer.set_submodule(name, StackedLinear(same_place))
        elif type(module) is nn.LayerNorm and module.weight is not None:
            layer.set_submodule(name, StackedLayerNorm(same_place))
    return layer


class Stacked(nn.Module):
    """The weights and biases of modules that stand at one place in all layers: (L, ...)."""

    def __init__(self, modules: list[nn.Module]):
        super().__init__()
        self.all_weights = torch.stack([module.weight for module in modules])
        self.all_biases = None
        if modules[0].bias is not None:
            self.all_biases = torch.stack([module.bias for module in modules])

    def select(self, busy: range, batch: int):
        """Compute with the weights (n, ...) of these n layers, on rows (batch, ...)."""
        self.n = len(busy)
        self.batch = batch
        self.weight, self.bias = self.all_weights, self.all_biases
        if len(busy) < len(self.all_weights):
            self.weight = self.weight[busy.start:busy.stop]
            if self.bias is not None:
                self.bias = self.bias[busy.start:busy.stop]

    def by_layer(self, x: Tensor, shape: tuple) -> Tensor:
        """x (n B, ..., *shape) -> (n, rows, *shape)"""
        if len(x) != self.batch:
            raise ValueError(f"unroll_diagonal needs the batch as the first axis, and a layer gave "
                             f"{tuple(x.shape)} to a Linear or LayerNorm: use unroll")
        n_rows = x.numel() // (self.n * math.prod(shape))
        return x.reshape(self.n, n_rows, *shape)


class StackedLinear(Stacked):
    """The nn.Linear of n layers: rows x (n B, ..., in) -> (n B, ..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.bmm(self.by_layer(x, x.shape[-1:]), self.weight.mT)
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.view(*x.shape[:-1], y.size(-1))


class StackedLayerNorm(Stacked):
    """The nn.LayerNorm of n layers: rows x (n B, ..., D) -> rows of the same shape."""

    def __init__(self, modules: list[nn.LayerNorm]):
        super().__init__(modules)
        self.shape = modules[0].normalized_shape
        self.eps = modules[0].eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, self.shape, eps=self.eps)
        y = self.by_layer(y, self.shape) * self.weight[:, None]
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.view(x.shape)


# ==================================================================================================
# Checks: what goes wrong most often is refused, in one line with the value, the rule and the fix
# ==================================================================================================


def validate_config(config: Config):
    """Raise ValueError unless every field of a config makes sense; RMT looks at its variant."""
    positive = "vocab_size segment_len n_layer n_head d_model d_assoc nu".split()
    for name in [*positive, "n_mem", "cache_len", "window"]:
        value = getattr(config, name)
        least = 1 if name in positive else 0
        if type(value) is not int or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    for name, end in {"dropout": 1, "carry_dropout": 1, "memory_noise": math.inf}.items():
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 <= value < end:
            raise ValueError(f"{name}={value!r} must be a number from 0 to below {end}")
    choices = {
        "memory_form": ("norm", "raw"),
        "write_slot": ("memory", "embedding", "both"),
        "update": ("delta", "armt", "hebbian"),
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, allowed))}")
    divisor = 2 * config.n_head
    if config.d_model % divisor != 0:
        raise ValueError(f"d_model={config.d_model} must be divisible by 2 * n_head={divisor}: "
                         "rotary positions turn pairs of channels")
    if config.nu >= config.d_assoc:
        raise ValueError(f"nu={config.nu} must be below d_assoc={config.d_assoc}: some features "
                         "would be zero forever")


def validate_model(config: Config, backbone, embed, head):
    """Raise ValueError where a config does not fit its variant, or the parts that come with it."""
    if config.variant not in VARIANTS:
        raise ValueError(f"variant={config.variant!r} must be one of {', '.join(VARIANTS)}")
    variant = VARIANTS[config.variant]
    if (variant.read or variant.write) and config.n_mem == 0:
        raise ValueError(f"n_mem=0 must be at least 1 for {config.variant!r}")
    if variant.cache and config.cache_len == 0:
        raise ValueError(f"cache_len=0 must be at least 1 for {config.variant!r}")
    if backbone is not None and variant.block is not Block:
        raise ValueError(f"{config.variant!r} has layers of its own: give a backbone to 'rmt'")


def validate_tokens(model: RMT, tokens: Tensor, check_range: bool = True):
    """Raise TypeError or ValueError unless tokens are integers (B, length) from 0 to V - 1."""
    kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
    if kind not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"tokens are {kind} and must be integers, as in torch.tensor([[1, 2, 3]])")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)} and must be (batch, length), "
                         "neither of them 0")
    if check_range and not tokens.is_meta and not torch.compiler.is_compiling():
        V = model.config.vocab_size
        low, high = tokens.min().item(), tokens.max().item()
        if low < 0 or high >= V:
            raise ValueError(f"tokens reach from {low} to {high}, and vocab_size={V} allows "
                             f"0 .. {V - 1}")


def validate_depth(bptt_depth: int | None):
    """Raise ValueError unless bptt_depth is None or an integer of at least 0."""
    if bptt_depth is not None and (type(bptt_depth) is not int or bptt_depth < 0):
        raise ValueError(f"bptt_depth={bptt_depth!r} must be None (gradient crosses all "
                         "boundaries) or an integer of at least 0")


def validate_segment(model: RMT, tokens: Tensor):
    """Raise TypeError or ValueError unless tokens are one segment (B, T or fewer)."""
    # On a GPU, looking at the tokens would make the program wait for it in every segment.
    on_cpu = isinstance(tokens, Tensor) and tokens.is_cpu
    validate_tokens(model, tokens, check_range=on_cpu)
    T = model.config.segment_len
    if tokens.size(1) > T:
        raise ValueError(f"a segment of {tokens.size(1)} tokens is longer than segment_len={T}: "
                         "give long sequences to unroll(model, tokens)")


def validate_state(model: RMT, state: State, tokens: Tensor):
    """Raise TypeError or ValueError unless a state fits the model and the tokens (B, T)."""
    B = len(tokens)
    if not isinstance(state, State):
        raise TypeError(f"state is a {type(state).__name__} and must be a State: start from "
                        "model.initial_state(batch_size), or wrap what you loaded, State(*loaded)")
    leaves = tree_leaves(state)
    fits = state_form(state) == model.state_form and all(t.shape[:1] == (B,) for t in leaves)
    if not fits or model.cached(state) > model.n_cache:
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(f"a state of shapes {shapes} does not fit {model.config.variant!r} with "
                         f"{B} sequences: start from model.initial_state({B})")
    dtype = model.memory.dtype
    if state.memory.dtype != dtype and not torch.is_autocast_enabled(tokens.device.type):
        raise ValueError(f"the state is {state.memory.dtype} and the model {dtype}: convert it, "
                         f"tree_map(lambda t: t.to({dtype}), state)")


def state_form(state: State) -> tuple:
    """What all states of a model share: memory's shape, and the last axis of what is carried."""
    carried = tree_map(lambda leaf: leaf.shape[1:][-1:], state.carry)  # [1:]: never the batch
    return state.memory.shape[1:], carried


def validate_sampling(model: RMT, temperature: float, top_k: int | None):
    """Raise ValueError where a model cannot generate, or a sampling argument makes no sense."""
    if model.variant.mask == "full":
        raise ValueError(f"{model.config.variant!r} sees whole segments and cannot generate: use "
                         "'rmt'")
    number = type(temperature) in (int, float)
    if not number or not (temperature == 0 or 1e-4 <= temperature < math.inf):
        raise ValueError(f"temperature={temperature!r} must be 0 (the most likely token) or a "
                         "finite number from 1e-4 up")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ValueError(f"top_k={top_k!r} must be None or an integer above 0")


def validate_diagonal(model: RMT):
    """Raise ValueError where the layers of a model cannot run side by side."""
    if model.variant.recurrent:
        raise ValueError(f"the memory of {model.config.variant!r} goes from a segment's last layer "
                         "to the next one's first layer, so that no two segments can run side by "
                         "side: use unroll")
    if not isinstance(model.backbone, Transformer):
        kind = type(model.backbone).__name__
        raise ValueError(f"unroll_diagonal runs the layers of a Transformer side by side, and a "
                         f"{kind} may have none: use unroll")
    first = model.backbone.blocks[0]
    form = repr(first)  # its modules and their settings, without the weights
    for block in model.backbone.blocks:
        if repr(block) != form or list(block.buffers()):
            raise ValueError("unroll_diagonal needs layers that differ in the weights of nn.Linear "
                             "and nn.LayerNorm only: use unroll")
    for module in first.modules():
        stackable = type(module) in (nn.Linear, nn.LayerNorm)
        if not stackable and list(module.parameters(recurse=False)):
            kind = type(module).__name__
            raise ValueError(f"unroll_diagonal stacks nn.Linear and nn.LayerNorm, and a {kind} of "
                             "this layer has other weights: use unroll")
