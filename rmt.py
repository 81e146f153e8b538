"""The Recurrent Memory Transformer and its family, in one file.

A Transformer reads a long sequence one segment at a time. Information can cross from one segment to
the next in two places:

    over the top      memory tokens: the first layer reads what the last layer wrote        RMT
    inside a layer    a carry: cached inputs (Transformer-XL) or an associative matrix (ARMT)

              segment t                              segment t + 1
    logits            ^     written ---.       logits            ^     written
    layer L   =======================  |       layer L   =======================
    ...       =======================  |  carry   -->    =======================
    layer 1   =======================  |       layer 1   =======================
              read | tokens | write    '------------->   read | tokens | write

The written memory fills both memory blocks of the next segment. The whole method is this loop, and
`unroll` is the same loop with its options:

    state = model.initial_state(batch_size)
    for segment in segments:
        if gradient_stops_here:                   # truncated backpropagation through time (BPTT)
            state = state.detach()
        logits, state = model(segment, state)     # one segment, always

The file has three parts. Part I is the Recurrent Memory Transformer, complete; you can stop reading
after it. Part II adds its relatives, one mechanism at a time: each is a layer, its equations, and
its row of the table VARIANTS. Part III puts a model to work: it generates text, shows where a model
looks, and runs many segments at once where that is possible. A comment with the word "departure"
marks a place where this file differs from a paper.

Glossary
    B  batch size      T  segment_len, tokens per segment     V  vocab_size
    D  d_model         M  n_mem, memory tokens                L  n_layer
    H  n_head          E  D / H, channels per head            K  features of an associative key
    N  rows of a segment: read + tokens + write               C  cached positions, at most cache_len

    memory          (B, M, D), "mem_t" in [RMT]; it goes over the top
    read, write     the memory tokens before and after the tokens of a segment
    carry           what each layer passes to itself in the next segment
    state           everything that crosses a boundary: State(memory, carry)
    bptt_depth      how many boundaries the gradient may cross, "BPTT-k" in [RMT]

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
    """The sizes and choices of one model. Raises ValueError with name, value and rule."""
    variant: str = "rmt"        # a row of VARIANTS
    vocab_size: int = 64        # V
    segment_len: int = 32       # T, tokens
    n_layer: int = 2            # L
    n_head: int = 4             # H
    d_model: int = 64           # D
    n_mem: int = 8              # M, memory tokens
    dropout: float = 0.0        # on the embedded tokens and on the output of every sublayer

    # How memory is passed to the next segment. The first value is that of the paper [RMT].
    memory_form: str = "norm"    # the written rows after the final norm, or "raw": before it
    write_slot: str = "memory"   # what the write rows are fed: the incoming memory, a learned
                                 # "embedding", or the sum of "both"
    memory_noise: float = 0.0    # in training: noise, scaled by 0 to this times the memory's RMS

    # Part II: transformer_xl and rmt_xl
    cache_len: int = 32          # positions that every layer caches, "mem_len" in [TXL]
    carry_dropout: float = 0.0   # rmt_xl, in training: how likely a layer drops a sequence's cache
    # Part II: mem_bottleneck
    window: int = 0              # how far a token sees other tokens, besides memory
    # Part II: armt
    d_assoc: int = 16            # channels of an associative key, which become K = 2 nu d_assoc
    nu: int = 3                  # products that the feature map makes of every channel
    update: str = "delta"        # the rule that writes: "delta", "armt" as published, "hebbian"

    def __post_init__(self):
        check_config(self)


class State(NamedTuple):
    """Everything that crosses a segment boundary: plain tensors, which belong to no module.

    `torch.save(tuple(state), path)` stores a state, `State(*torch.load(path))` brings it back.
    """
    memory: Tensor  # (B, M, D); (B, 0, D) where no memory goes over the top
    carry: tuple    # for every layer of the backbone, a tuple of tensors (B, ...)

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        return [self.memory, *[tensor for layer in self.carry for tensor in layer]]

    def map(self, fn, *others: State) -> State:
        """Apply fn to every tensor, and to the same tensor of other states.

            state.map(lambda tensor: tensor.to("cuda"))
            state.map(lambda a, b: torch.cat([a, b]), other)      # two batches become one
        """
        memory = fn(self.memory, *[other.memory for other in others])
        carry = []
        for layers in zip(self.carry, *[other.carry for other in others], strict=True):
            carry.append(tuple(map(fn, *layers)))
        return State(memory, tuple(carry))

    def detach(self) -> State:
        """The same values, cut off from the graph that computed them."""
        return self.map(torch.detach)


class Layout(NamedTuple):
    """Where the rows of a segment are, and which row sees which: the same for every layer.

        rows              read | tokens | write     what a layer computes          N of them
        columns   cache | read | tokens | write     what its attention sees    C + N of them

    In Part I there is no cache, and rows and columns are the same.
    """
    n_read: int
    n_write: int
    mask: Tensor      # (N, C + N), added to scores: 0 where a row sees a column, -inf elsewhere
    causal: bool      # whether the mask is just the lower triangle, which fast kernels know
    rotation: Tensor  # (C + N, 1, E / 2) complex, the position of every column as an angle

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows x (B, N, D) -> the rows of read memory, of tokens and of write memory."""
        n_tokens = x.size(1) - self.n_read - self.n_write
        return x.split([self.n_read, n_tokens, self.n_write], dim=1)


def segment_mask(n_read: int, n_cache: int, n_tokens: int, n_write: int, form: str = "paper",
                 window: int | None = None) -> Tensor:
    """Which row sees which column in one segment: bool (N, C + N) [RMT] sec. 3.

                     cache  read   tokens  write         the form "paper"
            read     . .    x x    . . .   . .       read rows see each other only
                     . .    x x    . . .   . .
            tokens   x x    x x    x . .   . .       tokens are causal, and see the cache and
                     x x    x x    x x .   . .       the read memory
                     x x    x x    x x x   . .
            write    . .    x x    x x x   x x       write rows see the segment and each other
                     . .    x x    x x x   x x

    In the form "causal" a row sees itself and the rows before it, and all but the read rows see the
    cache too. In the form "full" every row sees every column. With a window (Part II), a token sees
    the other tokens at most that many positions away, but not itself.
    Raises ValueError for an unknown form.
    """
    if form not in ("paper", "causal", "full"):
        raise ValueError(f"mask form {form!r} must be 'paper', 'causal' or 'full'")
    n = n_read + n_tokens + n_write
    rows = torch.ones(n, n, dtype=torch.bool)
    cache = torch.ones(n, n_cache, dtype=torch.bool)
    if form != "full":
        rows = rows.tril()
        cache[:n_read] = False
    if form == "paper":
        rows[:n_read, :n_read] = True
        rows[n - n_write:] = True
        cache[n - n_write:] = False
    if window is not None:
        near = torch.ones(n_tokens, n_tokens, dtype=torch.bool)
        near = near.tril(window).triu(-window)
        near.fill_diagonal_(False)
        rows[n_read:n - n_write, n_read:n - n_write] &= near
    return torch.cat([cache, rows], dim=1)


def rotary_table(n_positions: int, width: int) -> Tensor:
    """cos and sin of the angles of all positions [RoPE]: float64 (n_positions, 1, width / 2, 2)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(n_positions)[:, None, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of channels of x (B, n, heads, E) by the angle of its position [RoPE].

    A pair is a complex number, rotation (n, 1, E / 2) is e^(i angle), and turning is their product.
    """
    pairs = x.unflatten(-1, (-1, 2)).to(rotation.real.dtype)   # (B, n, heads, E / 2, 2)
    turned = torch.view_as_complex(pairs) * rotation           # (B, n, heads, E / 2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def linear(n_in: int, n_out: int, scale: float = 1.0, bias: bool = False) -> nn.Linear:
    """A linear map whose weights start at 0.7 scale / sqrt(n_in).

    Models this small learn far faster from it than from GPT-2's 0.02.
    """
    layer = nn.Linear(n_in, n_out, bias=bias)
    nn.init.normal_(layer.weight, std=0.7 * scale / math.sqrt(n_in))
    return layer


class Attention(nn.Module):
    """Multi-head attention with rotary positions.

    Departure: [RMT] has absolute positions, [TXL] relative ones. Here all variants have the same.
    """

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.n_head = config.n_head
        self.qkv = linear(D, 3 * D)
        self.out = linear(D, D, scale=1 / math.sqrt(2 * config.n_layer))

    def forward(self, x: Tensor, layout: Layout, cache: Tensor | None = None) -> Tensor:
        """The rows x (B, N, D) look at each other, and at the cache (B, C, D) if there is one."""
        columns = x if cache is None else torch.cat([cache, x], dim=1)    # (B, C + N, D)
        heads = self.qkv(columns).unflatten(-1, (3 * self.n_head, -1))    # (B, C + N, 3 H, E)
        qk, v = heads.split([2 * self.n_head, self.n_head], dim=2)
        q, k = rotate(qk, layout.rotation).chunk(2, dim=2)                # (B, C + N, H, E)
        if cache is not None:
            q = q[:, cache.size(1):]                                      # (B, N, H, E)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),      # (B, H, ..., E)
            attn_mask=None if layout.causal else layout.mask,
            is_causal=layout.causal)
        return self.out(y.transpose(1, 2).flatten(2))                     # (B, N, D)


class Block(nn.Module):
    """A pre-norm Transformer layer. It carries nothing from one segment to the next."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.norm_1 = nn.LayerNorm(D, bias=False)
        self.norm_2 = nn.LayerNorm(D, bias=False)
        self.attn = Attention(config)
        self.mlp = nn.Sequential(
            linear(D, 4 * D),
            nn.GELU(),
            linear(4 * D, D, scale=1 / math.sqrt(2 * config.n_layer)),
        )
        self.dropout = nn.Dropout(config.dropout)

    def initial_carry(self, batch_size: int) -> tuple:
        """The carry of the first segment: a tuple of tensors (B, ...), here none."""
        return ()

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        """Rows x (B, N, D) and this layer's carry -> rows of the same shape, the next carry."""
        x = x + self.dropout(self.attn(self.norm_1(x), layout))
        x = x + self.dropout(self.mlp(self.norm_2(x)))
        return x, carry


class Transformer(nn.Module):
    """The backbone: L layers. Plain layers treat the rows of memory like all others.

    Any module with `initial_carry(batch_size)` and `forward(x, layout, carry) -> (x, carry)` can
    take its place.
    """

    def __init__(self, config: Config, block: type = Block):
        super().__init__()
        self.blocks = nn.ModuleList([block(config) for _ in range(config.n_layer)])

    def initial_carry(self, batch_size: int) -> tuple:
        """One carry, a tuple of tensors, for every layer."""
        return tuple(block.initial_carry(batch_size) for block in self.blocks)

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        """Rows x (B, N, D) -> rows (B, N, D), without a final norm, and the next carry."""
        next_carry = []
        for block, layer_carry in zip(self.blocks, carry, strict=True):
            x, layer_carry = block(x, layout, layer_carry)
            next_carry.append(layer_carry)
        return x, tuple(next_carry)


class Variant(NamedTuple):
    """A member of the family."""
    read: bool             # are there memory tokens before the segment?
    write: bool            # are there memory tokens after the segment?
    recurrent: bool        # does their output become the memory of the next segment?
    mask: str              # which row sees which, a form of segment_mask
    block: type = Block    # the layer
    cache: bool = False    # Part II: do tokens also see cached positions of earlier segments?
    window: bool = False   # Part II: do tokens see each other through a window only?


# Recurrent memory is taken from the output of the write rows or, without them, of the read rows.
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

    backbone  a module of your own in place of Transformer, for variants with plain layers
    embed     a module of your own: whatever it takes, (B, T, ...), -> rows (B, T, D)
    head      a module of your own: rows (B, T, D) as the backbone leaves them -> logits (B, T, V).
              It replaces the final norm too, so memory_form "norm" and "raw" are then the same
    Raises ValueError for a backbone where the variant has layers of its own.
    """

    def __init__(self, config: Config, backbone: nn.Module | None = None,
                 embed: nn.Module | None = None, head: nn.Module | None = None):
        super().__init__()
        D, V, M = config.d_model, config.vocab_size, config.n_mem
        self.config = config
        self.variant = VARIANTS[config.variant]
        if backbone is not None and self.variant.block is not Block:
            raise ValueError(f"{config.variant!r} has layers of its own: give a backbone to 'rmt'")
        self.n_read = M if self.variant.read else 0
        self.n_write = M if self.variant.write else 0
        self.n_cache = config.cache_len if self.variant.cache else 0

        # Memory rows are drawn one by one, because they must differ from each other.
        self.memory = None  # of the first segment
        if self.variant.read or self.variant.write:
            self.memory = nn.Parameter(0.02 * torch.randn(M, D))
        self.write_embedding = None
        if self.variant.write and config.write_slot != "memory":
            self.write_embedding = nn.Parameter(0.02 * torch.randn(M, D))

        self.embed = embed
        if embed is None:
            self.embed = nn.Embedding(V, D)
            nn.init.normal_(self.embed.weight, std=0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.backbone = backbone
        if backbone is None:
            self.backbone = Transformer(config, self.variant.block)
        self.norm = nn.Identity()
        self.head = head
        if head is None:
            self.norm = nn.LayerNorm(D, bias=False)
            self.head = linear(D, V)

        n_positions = self.n_cache + self.n_read + config.segment_len + self.n_write
        table = rotary_table(n_positions, D // config.n_head).to(torch.get_default_dtype())
        self.register_buffer("rotary_table", table, persistent=False)
        full_mask = self.mask(config.segment_len, self.n_cache)
        self.register_buffer("full_mask", full_mask, persistent=False)
        self.carry_form = carry_form(self.backbone.initial_carry(1))

    def initial_state(self, batch_size: int) -> State:
        """The learned memory, the same for every sequence, and the initial carry."""
        if self.variant.recurrent:
            memory = self.memory.expand(batch_size, -1, -1).clone()
        else:
            memory = self.full_mask.new_zeros(batch_size, 0, self.config.d_model)
        return State(memory, self.backbone.initial_carry(batch_size))

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run one segment.

        tokens (B, T or fewer), state (default: the initial one) -> logits (B, T, V), next state.
        Raises ValueError for tokens or a state that do not fit.
        """
        check_tokens(self, tokens, longest=self.config.segment_len)
        if state is None:
            state = self.initial_state(len(tokens))
        check_state(self, state, len(tokens))

        layout = self.layout(tokens.size(1), state)
        x = self.wrap(tokens, state.memory)                                # (B, N, D)
        x, carry = self.backbone(x, layout, state.carry)                   # (B, N, D)
        normed = self.norm(x)                                              # (B, N, D)
        _, hidden, _ = layout.split(normed)
        logits = self.head(hidden)                                         # (B, T, V)

        memory = state.memory
        if self.variant.recurrent:
            read, _, write = layout.split(normed if self.config.memory_form == "norm" else x)
            written = write if self.variant.write else read
            memory = self.next_memory(written, memory)                     # (B, M, D)
        return logits, State(memory, carry)

    def wrap(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """tokens (B, T), memory (B, M, D) -> the rows [read | tokens | write] (B, N, D)."""
        if self.memory is not None and not self.variant.recurrent:
            memory = self.memory.expand(len(tokens), -1, -1)  # the same in every segment
        write = memory
        # Departure, where it is chosen: [RMT] feeds the write rows the incoming memory alone.
        if self.write_embedding is not None:
            write = self.write_embedding.expand_as(memory)
            if self.config.write_slot == "both":
                write = write + memory

        rows = [self.dropout(self.embedded(tokens))]
        if self.variant.read:
            rows.insert(0, memory)
        if self.variant.write:
            rows.append(write)
        return torch.cat(rows, dim=1)

    def embedded(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> rows (B, T, D). Raises ValueError for a token out of range, on a CPU."""
        if not isinstance(self.embed, nn.Embedding):
            return self.embed(tokens)
        try:
            return self.embed(tokens.long())
        except IndexError as error:
            V = self.embed.num_embeddings
            raise ValueError(f"tokens reach from {tokens.min()} to {tokens.max()}, and vocab_size="
                             f"{V} allows 0 .. {V - 1}") from error

    def next_memory(self, written: Tensor, memory: Tensor) -> Tensor:
        """The written rows and the memory of this segment -> the memory of the next: (B, M, D).

        To add a gate between old and new, override this method.
        """
        next_memory = written.clone()  # a view would keep all rows of its segment alive
        if self.training and self.config.memory_noise > 0:
            # Departure: the network learns to restore what it keeps. One size for each sequence.
            size = self.config.memory_noise * torch.rand_like(written[:, :1, :1])
            rms = written.detach().square().mean(dim=-1, keepdim=True).sqrt()
            next_memory = next_memory + size * rms * torch.randn_like(written)
        return next_memory

    def layout(self, n_tokens: int, state: State) -> Layout:
        """The layout of a segment of n_tokens that starts from a state.

        Every column has a position. With M 2, T 4 and 3 cached positions:

            columns      cache      read    tokens       write
            position     2  3  4    0  1    5  6  7  8   9  10

        A cache that is still filling up has the last of its positions, 4 or 3 and 4. So cached
        tokens come right before the tokens that followed them, and the distance from read memory to
        the tokens never changes.
        """
        n_cache = self.n_cached(state)
        mask = self.full_mask
        if (n_tokens, n_cache) != (self.config.segment_len, self.n_cache):
            mask = self.mask(n_tokens, n_cache).to(mask)
        table = self.rotary_table
        table = torch.view_as_complex(table.to(torch.promote_types(table.dtype, torch.float32)))
        first = self.n_read + self.n_cache  # the position of the first token
        cache = table[first - n_cache:first]
        read = table[:self.n_read]
        rest = table[first:first + n_tokens + self.n_write]
        return Layout(
            n_read=self.n_read,
            n_write=self.n_write,
            mask=mask,
            causal=self.variant.mask == "causal" and n_cache == 0 and not self.variant.window,
            rotation=torch.cat([cache, read, rest]),
        )

    def mask(self, n_tokens: int, n_cache: int) -> Tensor:
        """What to add to the scores of a segment of n_tokens: (N, C + N), see segment_mask."""
        window = self.config.window if self.variant.window else None
        sees = segment_mask(self.n_read, n_cache, n_tokens, self.n_write, self.variant.mask, window)
        return torch.zeros(sees.shape).masked_fill(~sees, -math.inf)

    def n_cached(self, state: State) -> int:
        """How many positions the cache of a state holds; without a cache, 0."""
        if self.n_cache == 0:
            return 0
        first_layer = state.carry[0]
        return first_layer[0].size(1)

    def state_floats(self) -> int:
        """How many floats of each sequence cross a boundary, once the caches are full."""
        floats = sum(tensor.numel() for tensor in self.initial_state(1).tensors())
        return floats + self.config.n_layer * self.n_cache * self.config.d_model


def unroll(model: RMT, tokens: Tensor, state: State | None = None, bptt_depth: int | None = None,
           checkpoint: bool = False, last_only: bool = False) -> tuple[Tensor, State]:
    """The loop over segments: tokens (B, length) -> logits (B, length, V), the state at the end.

    state       where to start; default: the initial state. To train on a stream in pieces, pass
                state.detach() on to the next piece.
    bptt_depth  how many segment boundaries the gradient may cross: None all of them, 0 none. Cuts
                are counted from the end: the loss of the last segment reaches back bptt_depth
                segments, or to the start, and that of any other segment at most that far.
    checkpoint  keep only the states, and compute each segment again in the backward pass.
    last_only   return the logits of the last segment only. Without gradient, a million tokens then
                take the memory of one segment.

    The authors' released code has two other kinds of depth. Gradient in the last k segments only:
    unroll the others under torch.no_grad(), then those k. Every loss back through k segments: keep
    a list of detached states; for each segment s, unroll segments s - k .. s from the state before
    them, with last_only.

    Sequences of different lengths: pad them on the right and leave the padding out of the loss. The
    logits of their tokens are exact in every variant but the encoders, which see the padding of
    their segment. A state is exact in every variant up to the last boundary before the padding, and
    not after it: to continue from there, take each sequence's rows of the state at its boundary.
    These lines send some sequences of a batch, ended (B,) = True, back to the initial state:

        def restart(old, new):
            return torch.where(ended.view(-1, *[1] * (old.dim() - 1)), new, old)
        state = state.map(restart, model.initial_state(len(ended)))

    (A cache has one length for all sequences, so transformer_xl and rmt_xl cannot do this.)
    Raises ValueError for tokens, a state or a depth that do not fit.
    """
    check_tokens(model, tokens)
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

    Raises ValueError for a depth that is not a whole number, or below 0.
    """
    if bptt_depth is not None and (bptt_depth < 0 or bptt_depth % 1 != 0):
        raise ValueError(f"bptt_depth={bptt_depth} must be None (the gradient crosses all "
                         "boundaries) or a whole number of at least 0")
    if bptt_depth is None or s == 0:  # never before the first: the initial memory must learn
        return False
    return (n_segments - s) % (bptt_depth + 1) == 0


# ==================================================================================================
# Part II. The family: each mechanism is a layer, and a row of the table
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
        has_memory = VARIANTS[config.variant].recurrent
        self.carry_dropout = config.carry_dropout if has_memory else 0.0

    def initial_carry(self, batch_size: int) -> tuple:
        """An empty cache (B, 0, D)."""
        weight = self.norm_1.weight
        return (weight.new_zeros(batch_size, 0, len(weight)),)

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        (cache,) = carry
        if self.training and self.carry_dropout > 0:  # so that it does not rely on its cache alone
            kept = torch.rand(len(x), 1, 1, device=x.device) >= self.carry_dropout
            cache = cache * kept
        _, tokens, _ = layout.split(x)
        next_cache = torch.cat([cache, tokens], dim=1)[:, -self.cache_len:]
        next_cache = next_cache.detach().clone()  # a view would keep all rows of its segment alive

        x = x + self.dropout(self.attn(self.norm_1(x), layout, self.norm_1(cache)))
        x = x + self.dropout(self.mlp(self.norm_2(x)))
        return x, (next_cache,)


VARIANTS["transformer_xl"] = Variant(
    read=False, write=False, recurrent=False, mask="causal", block=CacheBlock, cache=True)
VARIANTS["rmt_xl"] = Variant(
    read=True, write=True, recurrent=True, mask="paper", block=CacheBlock, cache=True)


# The Memory Transformer has two more forms [MT] sec. 3. Both update memory and tokens in two steps
# (a prime marks what is new):
#
#     controller    memory' = layer'([memory ; tokens])     layer' has weights of its own
#                   tokens' = layer([memory ; tokens])      both steps see the old rows
#     bottleneck    memory' = layer([memory ; tokens])
#                   tokens' = layer([memory' ; other tokens in the window])
#
# Departure: the paper has one segment; here memory is passed to the next, M D floats, as in rmt
# (a decoder) or rmt_encoder. The window of the bottleneck is ours: in the paper tokens see only
# memory. For clarity both steps compute all rows, and each row is taken from its own step.


def memory_rows(x: Tensor, layout: Layout) -> Tensor:
    """Which of the rows x (B, N, D) are memory: bool (N, 1)."""
    row = torch.arange(x.size(1), device=x.device)[:, None]
    is_read = row < layout.n_read
    is_write = row >= x.size(1) - layout.n_write
    return is_read | is_write


class ControllerBlock(Block):
    """Memory rows have attention and feed-forward weights of their own: the memory controller."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.controller = Block(config)

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        memory, _ = self.controller(x, layout, carry)
        tokens, _ = super().forward(x, layout, carry)
        return torch.where(memory_rows(x, layout), memory, tokens), carry


class BottleneckBlock(Block):
    """Memory rows are updated first, and tokens see the new memory; the mask keeps tokens apart.

    In the encoder form that memory has read the whole segment. In the decoder form tokens see the
    read memory, which sees no token: what is beyond the window reaches them in the next segment.
    Both steps have the same weights.
    """

    def forward(self, x: Tensor, layout: Layout, carry: tuple) -> tuple[Tensor, tuple]:
        is_memory = memory_rows(x, layout)
        memory, _ = super().forward(x, layout, carry)
        x = torch.where(is_memory, memory, x)
        tokens, _ = super().forward(x, layout, carry)
        return torch.where(is_memory, memory, tokens), carry


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
# where gamma is 1 for every key of the first write. "hebbian" is delta without the correction:
# A += sum of beta v k^T. In "delta" no write amplifies what A held; the other two have no such
# bound. What crosses a boundary: L D K floats, for "armt" also the L K of z.


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
        self.w_q = linear(D, config.d_assoc)
        self.w_k = linear(D, config.d_assoc)
        self.w_k.load_state_dict(self.w_q.state_dict())  # departure: reads find what is written
        self.w_v = linear(D, D, scale=0)                 # an untrained memory changes nothing
        self.w_b = linear(D, 1, bias=True)

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
        _, _, m = layout.split(x)
        return x, self.write(m, A, z)

    def features(self, x: Tensor) -> Tensor:
        """x (B, n, d_assoc) -> phi (B, n, K), of unit length except for update "armt"."""
        phi = feature_map(x.to(torch.promote_types(x.dtype, torch.float32)), self.nu)
        if self.update == "armt":
            return phi
        return phi / (phi.norm(dim=-1, keepdim=True) + self.eps)

    def read(self, phi: Tensor, A: Tensor, z: Tensor) -> Tensor:
        """The memory's answer to the features phi (B, n, K): (B, n, D)."""
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
                # Write rows with alike keys share one step: then no eigenvalue of sum beta k k^T is
                # above 1, and no write amplifies what A held. Otherwise 16 rows can make A explode.
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
        is_first_write = (z == 0).all(dim=-1)[:, None, None]  # every key is new, however short
        return torch.where(is_first_write, 1.0, gamma)


VARIANTS["armt"] = Variant(
    read=False, write=True, recurrent=False, mask="causal", block=AssociativeBlock)


# ==================================================================================================
# Part III. At work: generation, attention maps, diagonal batching
# ==================================================================================================


@torch.no_grad()
def stream(model: RMT, tokens: Tensor, state: State | None = None, temperature: float = 1.0,
           top_k: int | None = None, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Continue tokens (B, length), which begin at a segment boundary: yield new tokens forever.

    Each new token (B, 1) reruns its segment, so its cost does not depend on how long the text is.
    No keys and values are cached: generation is simple and right for every layer, and a few times
    slower in long segments. Call model.eval() first.

    temperature  0 takes the most likely token, 1 samples the model's distribution
    top_k        sample among this many most likely tokens only
    generator    where the random numbers come from
    Raises ValueError, with the first token, for a model that is not causal and for what unroll
    refuses.
    """
    check_sampling(model, temperature, top_k)
    check_tokens(model, tokens)
    T = model.config.segment_len
    if state is None:
        state = model.initial_state(len(tokens))
    # Full segments that are followed by another one only count through the state they leave.
    n_done = (tokens.size(1) - 1) // T * T
    if n_done > 0:
        _, state = unroll(model, tokens[:, :n_done], state, last_only=True)
    segment = tokens[:, n_done:].long()
    check_causal(model, segment, state)
    while True:
        if segment.size(1) > T:
            _, state = model(segment[:, :T], state)
            segment = segment[:, T:]
        logits, _ = model(segment, state)
        new = sample(logits[:, -1], temperature, top_k, generator)
        yield new
        segment = torch.cat([segment, new], dim=1)


def generate(model: RMT, tokens: Tensor, n_new: int, state: State | None = None,
             temperature: float = 1.0, top_k: int | None = None,
             generator: torch.Generator | None = None) -> Tensor:
    """Continue tokens (B, length) by n_new tokens (B, n_new); otherwise like `stream`."""
    new = list(islice(stream(model, tokens, state, temperature, top_k, generator), n_new))
    return torch.cat([tokens[:, :0].long(), *new], dim=1)


def sample(logits: Tensor, temperature: float, top_k: int | None,
           generator: torch.Generator | None) -> Tensor:
    """Draw a token (B, 1) from logits (B, V). Raises ValueError where they are not finite."""
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: was it trained with too large a "
                         "learning rate?")
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
    of columns: `cache, read, tokens, write = weights.split(widths, dim=-1)`. Works for any backbone
    whose layers call F.scaled_dot_product_attention once each, and raises ValueError for others.
    """
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
    layout = model.layout(tokens.size(1), state)
    N, n_columns = layout.mask.shape
    if not seen or any(weights.shape[-2:] != (N, n_columns) for weights in seen):
        raise ValueError(f"attention_maps needs layers that call F.scaled_dot_product_attention "
                         f"for all {N} rows and {n_columns} columns, and these do not")

    weights = torch.stack(seen)
    if issubclass(model.variant.block, (ControllerBlock, BottleneckBlock)):
        is_memory = memory_rows(layout.mask[None], layout)
        weights = torch.where(is_memory, weights[0::2], weights[1::2])  # the steps of each layer
    n_tokens = N - layout.n_read - layout.n_write
    return weights, [n_columns - N, layout.n_read, n_tokens, layout.n_write]


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
    layer l - 1, and what layer l carries out of segment s - 1. So all cells with the same s + l run
    at once, side by side in the batch, through one layer that holds the stacked weights of all
    layers:

                     s = 0   1   2   3   4
            layer 0      0   1   2   3   4
            layer 1      1   2   3   4   5       the step in which each cell runs
            layer 2      2   3   4   5   6

    The random numbers of dropout differ. Segments that cannot join run one by one, and without
    checkpoint: the first ones, until a cache is full, and a last one that is short. Layers may
    differ in the weights of nn.Linear and nn.LayerNorm only, and must not mix sequences.
    Raises what unroll raises, and ValueError for models whose layers cannot run side by side.
    """
    check_diagonal(model)
    check_tokens(model, tokens)
    if state is None:
        state = model.initial_state(len(tokens))
    check_state(model, state, len(tokens))
    T = model.config.segment_len
    n_segments = math.ceil(tokens.size(1) / T)
    n_first = min(math.ceil((model.n_cache - model.n_cached(state)) / T), n_segments)
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
    layout = model.layout(model.config.segment_len, state)
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
                carry[l] = tuple(map(torch.detach, carry[l]))

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
    # A view would keep its whole diagonal alive.
    return State(state.memory, tuple(carry)).map(torch.clone)


def side_by_side(blocks) -> nn.Module:
    """One layer that computes several of the blocks at once, with their weights stacked."""
    # deepcopy takes an object from its memo instead of copying it: the weights need no copies.
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
    """The weights and biases of the modules at one place in all layers: (L, ...)."""

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
# Checks: common mistakes, and those that would go unnoticed, are refused in one line
# ==================================================================================================


def check_config(config: Config):
    """Raise ValueError for a choice that does not exist, or a size that cannot be."""
    choices = {
        "variant": VARIANTS,
        "memory_form": ("norm", "raw"),
        "write_slot": ("memory", "embedding", "both"),
        "update": ("delta", "armt", "hebbian"),
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")
    ranges = {
        "vocab_size segment_len n_layer n_head d_model n_mem cache_len d_assoc nu": (1, math.inf),
        "memory_noise window": (0, math.inf),
        "dropout carry_dropout": (0, 1),
    }
    for names, (least, most) in ranges.items():
        for name in names.split():
            value = getattr(config, name)
            if not least <= value <= most:  # which is true for nan
                rule = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise ValueError(f"{name}={value} must be {rule}")
    if config.d_model % (2 * config.n_head) != 0:
        raise ValueError(f"d_model={config.d_model} must be divisible by 2 * n_head="
                         f"{2 * config.n_head}: rotary positions turn pairs of channels")


def check_tokens(model: RMT, tokens: Tensor, longest: int | None = None):
    """Raise TypeError or ValueError for what the model cannot read, whatever the values are."""
    if not hasattr(model, "initial_state"):
        raise TypeError(f"model is a {type(model).__name__} and must be an RMT: for distributed "
                        "training, wrap a module whose forward calls unroll")
    shape = tuple(tokens.shape)
    if isinstance(model.embed, nn.Embedding):
        kind = tokens.dtype
        is_integer = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
        if not is_integer or len(shape) != 2:
            raise ValueError(f"tokens are {kind} of shape {shape} and must be integers (batch, "
                             "length)")
    if 0 in shape[:2]:
        raise ValueError(f"tokens have shape {shape}: there must be a sequence, and a token in it")
    if longest is not None and shape[1] > longest:
        raise ValueError(f"a segment of {shape[1]} tokens is longer than segment_len={longest}: "
                         "give long sequences to unroll(model, tokens)")


def check_state(model: RMT, state: State, batch_size: int):
    """Raise TypeError or ValueError for the state of another model or batch."""
    if not isinstance(state, State):
        raise TypeError(f"state is a {type(state).__name__} and must be a State: start from "
                        "model.initial_state(batch_size), or restore one with State(*saved)")
    n_mem = model.config.n_mem if model.variant.recurrent else 0
    fits = (
        state.memory.shape == (batch_size, n_mem, model.config.d_model)
        and carry_form(state.carry) == model.carry_form
        and all(len(tensor) == batch_size for tensor in state.tensors())
        and model.n_cached(state) <= model.n_cache
    )
    if not fits:
        shapes = [tuple(tensor.shape) for tensor in state.tensors()]
        raise ValueError(f"a state of shapes {shapes} does not fit {model.config.variant!r} with "
                         f"{batch_size} sequences: start from model.initial_state({batch_size})")


def carry_form(carry: tuple) -> list:
    """What all carries of a model have in common: the last axis of the tensors of every layer."""
    form = []
    for layer in carry:
        if not isinstance(layer, tuple):
            raise TypeError(f"the carry of a layer is a {type(layer).__name__} and must be a tuple "
                            "of tensors, as in return x, (tensor,)")
        form.append([tensor.shape[1:][-1:] for tensor in layer])
    return form


def check_sampling(model: RMT, temperature: float, top_k: int | None):
    """Raise ValueError where a model cannot generate, or a sampling argument makes no sense."""
    if model.variant.mask == "full":
        raise ValueError(f"{model.config.variant!r} sees whole segments and cannot generate: use "
                         "'rmt'")
    if not (temperature == 0 or 1e-4 <= temperature < math.inf):
        raise ValueError(f"temperature={temperature} must be 0 (the most likely token) or a finite "
                         "number from 1e-4 up")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be None or at least 1")


def check_causal(model: RMT, segment: Tensor, state: State):
    """Raise ValueError where logits are random, or depend on the tokens after them."""
    noises = (model.config.dropout, model.config.memory_noise, model.config.carry_dropout)
    if model.training and max(noises) > 0:
        raise ValueError("the model is in training mode, where dropout and noise are on: call "
                         "model.eval() first")
    others = (segment + 1) % model.config.vocab_size
    segment = torch.cat([segment, others], dim=1)[:, :model.config.segment_len]
    longer, _ = model(segment, state)
    for n in {1, segment.size(1) - 1}:  # the same where there are two tokens
        if not 0 < n < segment.size(1):
            continue
        shorter, _ = model(segment[:, :n], state)
        difference = (longer[:, :n] - shorter).abs().max()
        if difference > 0.02 * shorter.abs().max():  # far more than rounding, in bfloat16 too
            raise ValueError(f"logits change by up to {difference:.2g} when the segment gets "
                             "longer: a layer looks at later tokens, or at how many there are, "
                             "and the model cannot generate (with dropout of its own, call "
                             "model.eval() first)")


def check_diagonal(model: RMT):
    """Raise ValueError where the layers of a model cannot run side by side."""
    if model.variant.recurrent:
        raise ValueError(f"the memory of {model.config.variant!r} goes from a segment's last layer "
                         "to the first layer of the next, so no two segments can run side by side: "
                         "use unroll")
    if type(model).forward is not RMT.forward or getattr(
            type(model.backbone), "forward", None) is not Transformer.forward:
        kinds = f"{type(model).__name__} around a {type(model.backbone).__name__}"
        raise ValueError(f"unroll_diagonal knows the forward of an RMT around a Transformer, and "
                         f"not that of your {kinds}: use unroll")
    first, *others = [settings_of(block) for block in model.backbone.blocks]
    if any(settings != first for settings in others) or list(model.backbone.buffers()):
        raise ValueError("unroll_diagonal needs layers that differ in the weights of nn.Linear and "
                         "nn.LayerNorm only: use unroll")
    for module in [model, *model.backbone.modules()]:
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"unroll_diagonal does not call hooks of the model and its layers, "
                             f"and a {type(module).__name__} has one: use unroll")
    for module in model.backbone.blocks[0].modules():
        stackable = type(module) in (nn.Linear, nn.LayerNorm)
        if not stackable and list(module.parameters(recurse=False)):
            kind = type(module).__name__
            raise ValueError(f"unroll_diagonal stacks nn.Linear and nn.LayerNorm, and a {kind} of "
                             "this layer has other weights: use unroll")


def settings_of(block: nn.Module) -> list:
    """All that makes a layer what it is, except its weights."""
    of_pytorch = vars(nn.Module()).keys() - {"training"}
    settings = []
    for name, module in block.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in of_pytorch}
        weights = [key for key, _ in module.named_parameters(recurse=False)]
        settings.append((name, type(module), repr(own), weights))
    return settings
