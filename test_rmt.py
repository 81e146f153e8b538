"""What this project claims, and how you can see that it is true.

The file opens with the claims: the tests that a sceptical reader would ask for, each short enough
to be read in a minute. They come in the order of a textbook: the loop over segments, gradients,
attention, the relatives, a model at work. Then come details of rmt.py by chapter, the two training
scripts, and what is learned in minutes of training.

Models are as small as they can be and compute in float64, so that "equal" means equal but for the
last digits. A claim about every variant is tested over the table MODELS, which holds all rows of
VARIANTS, so that a row you add there is tested for free. Some docstrings name the mistake of
released code that a test is there for.

    python -m pytest                 the fast tests, about a minute
    python -m pytest -m slow         minutes of training, killed processes
    python -m pytest -k gradient     the tests with this word in their name
"""
import copy
import dataclasses
import gzip
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import textwrap
import time
import venv
import weakref
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rmt
import train_copy
import train_lm
from assets import benchmark, figures
from rmt import (
    RMT,
    VARIANTS,
    AssociativeBlock,
    BottleneckBlock,
    CacheBlock,
    Config,
    ControllerBlock,
    State,
    Variant,
    attention_maps,
    generate,
    segment_mask,
    stream,
    unroll,
    unroll_diagonal,
)

ROOT = Path(rmt.__file__).resolve().parent

# The sizes of all models here, by their letters in the glossary of rmt.py.
V, T, L, H, D, M, C = 11, 4, 2, 2, 16, 3, 5
E = D // H
SIZES = {
    "vocab_size": V,
    "segment_len": T,
    "n_layer": L,
    "n_head": H,
    "d_model": D,
    "n_mem": M,
    "cache_len": C,
    "d_assoc": 4,
}

# --------------------------------------------------------------------------- the models under test


class RecurrentBackbone(nn.Module):
    """A backbone that is no Transformer: a GRU over the rows, which carries its hidden state.

    It is as awkward as the contract allows: a scalar parameter, a carry of shape (B,), and False as
    its truth value.
    """

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(D, D, batch_first=True)
        self.scale = nn.Parameter(torch.ones(()))

    def __len__(self):
        return 0

    def initial_carry(self, batch_size):
        hidden = self.scale.new_zeros(batch_size, D)
        n_calls = self.scale.new_zeros(batch_size)
        return ((hidden, n_calls),)

    def forward(self, x, layout, carry):
        ((hidden, n_calls),) = carry
        y, hidden = self.gru(x, hidden[None])
        return x + self.scale * y, ((hidden[0], n_calls + 1),)


class StudentBlock(nn.Module):
    """A layer as a student writes it, of plain PyTorch: nothing of rmt.py but the layout's mask.

    It carries the mean of its rows into the next segment.
    """

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.LayerNorm(D), nn.Linear(D, D))

    def initial_carry(self, batch_size):
        return (self.qkv.bias.new_zeros(batch_size, 1, D),)

    def forward(self, x, layout, carry):
        (mean,) = carry
        q, k, v = self.qkv(self.norm(x + mean)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask)
        x = x + self.mlp(x)
        return x, (x.mean(dim=1, keepdim=True),)


class RunningMeanBlock(rmt.Block):
    """A layer that mixes rows outside its attention. Once, generation was silently wrong for it."""

    def forward(self, x, layout, carry):
        n = torch.arange(1, x.size(1) + 1)[:, None]
        return super().forward(x + x.cumsum(dim=1) / n, layout, carry)


class GatedRMT(RMT):
    """The commonest student project: a gate between the old memory and the written rows."""

    def __init__(self, config, *parts):
        super().__init__(config, *parts)
        self.gate = nn.Linear(D, D)

    def next_memory(self, written, memory):
        gate = self.gate(memory).sigmoid()
        return gate * memory + (1 - gate) * super().next_memory(written, memory)


PUBLISHED = list(VARIANTS)
VARIANTS["student"] = Variant(False, False, False, "causal", StudentBlock)
VARIANTS["student_rmt"] = Variant(True, True, True, "paper", StudentBlock)
VARIANTS["running_mean"] = Variant(False, False, False, "causal", RunningMeanBlock)
# Combinations that no paper has: a cache beside read rows, and a controller without recurrence.
VARIANTS["mem_xl"] = Variant(True, False, False, "paper", CacheBlock, cache=True)
VARIANTS["mem_controller_alone"] = Variant(True, False, False, "paper", ControllerBlock)
VARIANTS["mem_bottleneck_causal"] = VARIANTS["mem_bottleneck"]._replace(mask="causal")

# Every model that a claim about all variants is tested on, and how build makes it.
MODELS = {name: {"variant": name} for name in VARIANTS}
MODELS["armt, published"] = {"variant": "armt", "update": "armt"}
MODELS["armt, hebbian"] = {"variant": "armt", "update": "hebbian"}
MODELS["mem_bottleneck, window"] = {"variant": "mem_bottleneck", "window": 1}
MODELS["mem_bottleneck_encoder, window"] = {"variant": "mem_bottleneck_encoder", "window": 1}
MODELS["rmt, gated"] = {"variant": "rmt", "model": GatedRMT}
for name in ("transformer", "mem_transformer", "rmt", "rmt_encoder"):
    MODELS[f"{name} around a GRU"] = {"variant": name, "backbone": RecurrentBackbone}


def row(model_name):
    """The row of VARIANTS that a model has."""
    return VARIANTS[MODELS[model_name]["variant"]]


def carries_gradient(model_name):
    """Whether a state through which gradient flows crosses inside the layers."""
    has_backbone = "backbone" in MODELS[model_name]
    return has_backbone or row(model_name).block in (AssociativeBlock, StudentBlock)


CAUSAL = [name for name in MODELS if row(name).mask != "full"]
RECURRENT = [name for name in MODELS if row(name).recurrent]
GRADIENT_CROSSES = [name for name in MODELS if row(name).recurrent or carries_gradient(name)]
DIAGONAL = [name for name in MODELS if not row(name).recurrent and "backbone" not in MODELS[name]]
TWO_STEPS = [name for name in VARIANTS if row(name).block in (ControllerBlock, BottleneckBlock)]


def models(names):
    """Run a test once for each of these models."""
    return pytest.mark.parametrize("name", names)


@pytest.fixture(autouse=True)
def float64():
    """Models are built in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(name="rmt", **changes):
    """A small model of MODELS in eval mode, always the same, whose memory is large."""
    settings = SIZES | MODELS[name] | changes
    backbone = settings.pop("backbone", None)
    make = settings.pop("model", RMT)
    torch.manual_seed(0)
    model = make(Config(**settings), backbone() if backbone else None).eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight_name in ("memory", "write_embedding"):
                weight.normal_()
            elif weight_name.endswith("w_v.weight"):  # it starts at zero
                weight.normal_(std=0.02)
            elif weight_name.startswith("backbone"):
                weight.mul_(1 + torch.rand_like(weight))
    return model


def text(length, batch_size=2, seed=0):
    """Random tokens (batch_size, length)."""
    return torch.randint(V, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def loss_of(logits, tokens):
    """A loss that adds up over segments: every token is to be repeated."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")


def gradients_of(model):
    """The gradients of all parameters, taken off the model."""
    gradients = []
    for weight in model.parameters():
        gradients.append(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    model.zero_grad()
    return gradients


def assert_close(actual, expected, tolerance=1e-12):
    """Equal but for rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@contextmanager
def calls(*modules):
    """A list that fills with (arguments, output) of every call of the modules."""
    seen = []
    hooks = []
    for module in modules:
        hook = module.register_forward_hook(lambda _, given, made: seen.append((given, made)))
        hooks.append(hook)
    yield seen
    for hook in hooks:
        hook.remove()


# ==================================================================================================
# The claims. First: the loop over segments


def test_unroll_is_a_loop_over_segments():
    model = build()
    tokens = text(3 * T + 2)
    state = model.initial_state(2)
    pieces = []
    for start in range(0, 3 * T + 2, T):
        logits, state = model(tokens[:, start:start + T], state)
        pieces.append(logits)
    logits, end = unroll(model, tokens)
    assert torch.equal(logits, torch.cat(pieces, dim=1))
    assert torch.equal(end.memory, state.memory)
    assert torch.equal(unroll(model, tokens, last_only=True)[0], logits[:, -2:])
    assert torch.equal(model(tokens[:, :T])[0], logits[:, :T])  # it begins at the initial state


@models(MODELS)
def test_a_run_that_stops_and_saves_its_state_continues_as_one_run(name, tmp_path):
    """The ARMT code keeps its state on the modules, lost on save. Here it is a value."""
    model = build(name)
    tokens = text(3 * T + 2)
    logits, end = unroll(model, tokens)
    first, state = unroll(model, tokens[:, :2 * T])
    torch.save(tuple(state), tmp_path / "state.pt")
    state = State(*torch.load(tmp_path / "state.pt"))
    second, state = unroll(model, tokens[:, 2 * T:], state)
    assert torch.equal(torch.cat([first, second], dim=1), logits)
    assert all(map(torch.equal, state.tensors(), end.tensors()))


@models(MODELS)
def test_earlier_segments_count_through_the_state_alone(name):
    """In the original RMT code the Transformer-XL cache leaks from one sample into the next."""
    model = build(name)
    segment = text(T)
    alone, _ = model(segment)
    _, one = unroll(model, text(2 * T, seed=1))
    _, two = unroll(model, text(2 * T, seed=2))
    assert torch.equal(model(segment)[0], alone)
    something_crosses = model.state_floats() > 0
    assert torch.equal(model(segment, one)[0], model(segment, two)[0]) != something_crosses

    start = model.initial_state(2)
    one = one._replace(memory=start.memory)
    two = two._replace(memory=start.memory)
    something_is_carried = len(one.tensors()) > 1
    assert torch.equal(model(segment, one)[0], model(segment, two)[0]) != something_is_carried


@models(MODELS)
def test_the_sequences_of_a_batch_do_not_touch(name):
    """The released diagonal batching is right for a batch of one only."""
    model = build(name)
    tokens = text(11, batch_size=4)
    order = torch.tensor([2, 0, 3, 1])
    logits, state = unroll(model, tokens)
    permuted_logits, permuted_state = unroll(model, tokens[order])
    assert_close(permuted_logits, logits[order])
    assert_close(permuted_state, state.map(lambda tensor: tensor[order]))
    assert_close(unroll(model, tokens[:1])[0], logits[:1])


# ------------------------------------------------------------------------ how far gradient reaches


def gradient_reach(model, n_segments, bptt_depth):
    """For every segment, the segments whose embedded tokens its logits send gradient to."""
    with calls(model.embed) as seen:
        logits, _ = unroll(model, text(n_segments * T), bptt_depth=bptt_depth)
    embedded = [rows for _, rows in seen]
    reach = []
    for segment_logits in logits.split(T, dim=1):
        gradients = torch.autograd.grad(
            segment_logits.square().sum(), embedded, retain_graph=True, materialize_grads=True)
        reach.append([s for s, gradient in enumerate(gradients) if gradient.any()])
    return reach


def test_truncated_bptt_cuts_the_gradient_here():
    """The picture: who reaches whom over six segments, for each depth. Row s is a loss."""
    model = build()
    assert gradient_reach(model, 6, bptt_depth=0) == [[0], [1], [2], [3], [4], [5]]
    assert gradient_reach(model, 6, bptt_depth=1) == [[0], [0, 1], [2], [2, 3], [4], [4, 5]]
    assert gradient_reach(model, 6, bptt_depth=2) == [
        [0], [0, 1], [0, 1, 2], [3], [3, 4], [3, 4, 5]]
    assert gradient_reach(model, 5, bptt_depth=2) == [  # counted from the end
        [0], [0, 1], [2], [2, 3], [2, 3, 4]]
    assert gradient_reach(model, 3, bptt_depth=None) == [[0], [0, 1], [0, 1, 2]]


@models(GRADIENT_CROSSES)
def test_the_gradient_of_the_last_loss_reaches_exactly_bptt_depth_segments_back(name):
    """Later RMT code detaches a name that nobody reads: every depth is full backpropagation.

    The original RMT code takes 0 for "none" in one script and for "all" in another.
    """
    model = build(name)
    for n_segments, bptt_depth in [(1, 0), (4, 0), (4, 1), (4, 2), (4, 3), (4, 9), (4, None)]:
        depth = n_segments if bptt_depth is None else bptt_depth
        reach = gradient_reach(model, n_segments, bptt_depth)
        assert reach[-1] == list(range(max(0, n_segments - 1 - depth), n_segments))
        for s, reached in enumerate(reach):
            assert reached == list(range(reached[0], s + 1))
            assert reached[0] >= s - depth


@models([name for name in MODELS if name not in GRADIENT_CROSSES])
def test_no_gradient_crosses_where_no_learned_state_does(name):
    """A Transformer-XL cache carries information and no gradient [TXL] sec. 3.2."""
    assert gradient_reach(build(name), 4, None) == [[0], [1], [2], [3]]


def gradients_by_pair(name, n_segments):
    """[s][t]: the gradient of the loss of segment s with respect to the weights used in segment t.

    Every segment gets a copy of the model, so that autograd tells the uses of one weight apart.
    """
    copies = [build(name) for _ in range(n_segments)]
    tokens = text(n_segments * T)
    state = copies[0].initial_state(2)
    pairs = []
    for model, segment in zip(copies, tokens.split(T, dim=1), strict=True):
        logits, state = model(segment, state)
        loss = loss_of(logits, segment)
        pairs.append([torch.autograd.grad(loss, list(copy.parameters()), retain_graph=True,
                                          materialize_grads=True) for copy in copies])
    return pairs


def sum_over(pairs, kept):
    """The sum of gradients_by_pair over the kept pairs (s, t), weight by weight."""
    return [sum(weight) for weight in zip(*[pairs[s][t] for s, t in kept], strict=True)]


@models(["rmt", "rmt_xl", "armt", "student_rmt", "rmt, gated"])
def test_the_truncated_gradient_is_its_share_of_the_full_one(name):
    """The original RMT code replays k segments from the newest memory, not the k-th last."""
    model = build(name)
    pairs = gradients_by_pair(name, 4)
    for n_segments, bptt_depth in itertools.product((1, 3, 4), (0, 1, 2, None)):
        tokens = text(4 * T)[:, :n_segments * T]
        logits, _ = unroll(model, tokens, bptt_depth=bptt_depth)
        loss_of(logits, tokens).backward()
        depth = 4 if bptt_depth is None else bptt_depth
        cuts = range(n_segments - 1 - depth, 0, -depth - 1)
        kept = []
        for s in range(n_segments):
            for t in range(s + 1):
                if not any(t < cut <= s for cut in cuts):
                    kept.append((s, t))
        assert_close(gradients_of(model), sum_over(pairs, kept), 1e-10)


def test_the_two_other_kinds_of_gradient_depth_work_as_unroll_describes():
    model = build()
    pairs = gradients_by_pair("rmt", 5)
    tokens = text(5 * T)
    k = 2
    with torch.no_grad():  # gradient in the last k segments only
        _, state = unroll(model, tokens[:, :-k * T])
    logits, _ = unroll(model, tokens[:, -k * T:], state)
    loss_of(logits, tokens[:, -k * T:]).backward()
    assert_close(gradients_of(model), sum_over(pairs, [(3, 3), (4, 3), (4, 4)]), 1e-10)

    segments = tokens.split(T, dim=1)  # every loss back through k segments
    states = [model.initial_state(2)]
    for segment in segments:
        states.append(model(segment, states[-1])[1].detach())
    for s, segment in enumerate(segments):
        first = max(0, s - k)
        window = torch.cat(segments[first:s + 1], dim=1)
        logits, _ = unroll(model, window, states[first], last_only=True)
        loss_of(logits, segment).backward()
    kept = [(s, t) for s in range(5) for t in range(s + 1) if s - t <= k]
    assert_close(gradients_of(model), sum_over(pairs, kept), 1e-10)


@models([name for name in MODELS if row(name).read or row(name).write])
def test_every_row_of_the_initial_memory_gets_a_gradient_at_every_depth(name):
    model = build(name)
    tokens = text(4 * T)
    depths = (0, 1, None)
    if not row(name).recurrent and row(name).write:
        depths = (1, None)  # ARMT: what write rows do is seen in the next segment
    for bptt_depth in depths:
        loss_of(unroll(model, tokens, bptt_depth=bptt_depth)[0], tokens).backward()
        assert (model.memory.grad.abs().amax(dim=1) > 0).all()
        model.zero_grad()


@models(MODELS)
def test_checkpointed_gradients_equal_plain_ones(name):
    """The most-used port uses its cache in one of two passes: gradients off by up to 81 %."""
    model = build(name, dropout=0.3, memory_noise=0.5, carry_dropout=0.5).train()
    tokens = text(15)
    results = []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        with calls(model.embed) as seen:
            logits, state = unroll(model, tokens, bptt_depth=1, checkpoint=checkpoint)
            loss_of(logits, tokens).backward()
        assert len(seen) == (8 if checkpoint else 4)  # it does compute every segment again
        results.append([logits, *state.tensors(), *gradients_of(model)])
    assert_close(*results)


# -------------------------------------------------------------------- attention and who sees whom


def attention_in_loops(layer, columns, mask, positions):
    """Weights (B, H, N, C + N) and output of an Attention layer, one score at a time.

    Rotary positions are written as sums of products: the score of a pair of channels is
    |q| |k| cos(angle between them). Rows are the last N columns.
    """
    B, n_columns, _ = columns.shape
    N = len(mask)
    frequency = [10000.0 ** (-2 * pair / E) for pair in range(E // 2)]
    w_q, w_k, w_v = layer.qkv.weight.view(3, H, E, D)

    def score(query, key, distance):
        total = 0.0
        for i, f in enumerate(frequency):
            a, b = query[2 * i], query[2 * i + 1]
            c, d = key[2 * i], key[2 * i + 1]
            cos, sin = math.cos(distance * f), math.sin(distance * f)
            total = total + (a * c + b * d) * cos - (b * c - a * d) * sin
        return (total / math.sqrt(E)).exp()

    weights = []
    for b, head, r in itertools.product(range(B), range(H), range(N)):
        own = n_columns - N + r  # the column of this row
        query = w_q[head] @ columns[b, own]
        scores = []
        for column in range(n_columns):
            if mask[r, column]:
                key = w_k[head] @ columns[b, column]
                scores.append(score(query, key, positions[own] - positions[column]))
            else:
                scores.append(torch.zeros(()))
        weights.append(torch.stack(scores) / sum(scores))
    weights = torch.stack(weights).view(B, H, N, n_columns)
    values = torch.einsum("bcd,hed->bhce", columns, w_v)
    output = torch.einsum("bhnc,bhce->bnhe", weights, values).flatten(-2) @ layer.out.weight.T
    return weights, output


def positions_of(model, n_tokens, n_cached):
    """The position of every column, counted along a full cache."""
    first = model.n_read + model.n_cache
    cache = range(first - n_cached, first)
    read = range(model.n_read)
    rest = range(first, first + n_tokens + model.n_write)
    return [*cache, *read, *rest]


def state_with_cache(model, n_cached, batch_size=2):
    """A state whose caches hold so many random positions."""
    state = model.initial_state(batch_size)
    if not model.n_cache:
        return state
    caches = [(torch.randn(batch_size, n_cached, D),) for _ in range(L)]
    return state._replace(carry=tuple(caches))


@pytest.mark.parametrize("name, n_cached", [
    ("transformer", 0), ("rmt", 0), ("rmt_causal", 0), ("rmt_encoder", 0),
    ("transformer_xl", 2), ("rmt_xl", 3), ("rmt_xl", C)])
def test_attention_equals_loops_over_scores(name, n_cached):
    model = build(name)
    layer = model.backbone.blocks[0].attn
    layout = model.layout(3, state_with_cache(model, n_cached))
    x = torch.randn(2, model.n_read + 3 + model.n_write, D, requires_grad=True)
    cache = torch.randn(2, n_cached, D, requires_grad=True)
    actual = layer(x, layout, cache if model.n_cache else None)
    columns = torch.cat([cache, x], dim=1)
    sees = layout.mask == 0
    _, expected = attention_in_loops(layer, columns, sees, positions_of(model, 3, n_cached))
    assert_close(actual, expected)
    direction = torch.randn_like(x)
    inputs = [x, cache, *layer.parameters()]
    assert_close(
        torch.autograd.grad(actual, inputs, direction, materialize_grads=True),
        torch.autograd.grad(expected, inputs, direction, materialize_grads=True))


def feed_forward_by_hand(block, rows):
    """The feed-forward sublayer of a block in plain matrix products."""
    centred = rows - rows.mean(-1, keepdim=True)
    size = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = centred / size * block.norm_2.weight
    wide = normed @ block.mlp[0].weight.T
    gelu = wide * (1 + torch.erf(wide / math.sqrt(2))) / 2
    return rows + gelu @ block.mlp[2].weight.T


@models([name for name in VARIANTS if row(name).block is rmt.Block])
def test_a_layer_equals_its_two_sublayers_in_matrix_products(name):
    model = build(name)
    block = model.backbone.blocks[0]
    layout = model.layout(3, model.initial_state(2))
    x = torch.randn(2, model.n_read + 3 + model.n_write, D)
    _, attended = attention_in_loops(
        block.attn, block.norm_1(x), layout.mask == 0, positions_of(model, 3, 0))
    assert_close(block(x, layout, ())[0], feed_forward_by_hand(block, x + attended))


MASKS = {  # rows look, columns are seen: cache, read, tokens, write
    ("paper", 2, 1, 3, 2, None): """
        . xx ... ..
        . xx ... ..
        x xx x.. ..
        x xx xx. ..
        x xx xxx ..
        . xx xxx xx
        . xx xxx xx""",
    ("causal", 2, 1, 3, 2, None): """
        . x. ... ..
        . xx ... ..
        x xx x.. ..
        x xx xx. ..
        x xx xxx ..
        x xx xxx x.
        x xx xxx xx""",
    ("full", 1, 2, 2, 1, None): """
        xx x xx x
        xx x xx x
        xx x xx x
        xx x xx x""",
    ("causal", 0, 3, 2, 0, None): """
        xxx x.
        xxx xx""",
    ("paper", 1, 0, 4, 1, 2): """
        x .... .
        x .... .
        x x... .
        x xx.. .
        x .xx. .
        x xxxx x""",
    ("full", 1, 0, 4, 0, 1): """
        x xxxx
        x .x..
        x x.x.
        x .x.x
        x ..x.""",
}


@pytest.mark.parametrize("form, n_read, n_cache, n_tokens, n_write, window", MASKS)
def test_a_mask_equals_its_picture(form, n_read, n_cache, n_tokens, n_write, window):
    sees = segment_mask(n_read, n_cache, n_tokens, n_write, form, window)
    picture = MASKS[form, n_read, n_cache, n_tokens, n_write, window]
    drawn = ["".join("x" if may_look else "." for may_look in line) for line in sees.tolist()]
    assert drawn == picture.replace(" ", "").split()


def changes_of(model, tokens):
    """For every token, the positions whose logits change when it is edited."""
    logits, _ = unroll(model, tokens)
    changes = []
    for position in range(tokens.size(1)):
        edited = tokens.clone()
        edited[:, position] = (edited[:, position] + 1) % V
        changed = (unroll(model, edited)[0] != logits).any(-1).any(0)
        changes.append(changed.nonzero().flatten().tolist())
    return changes


@models(CAUSAL)
def test_no_token_sees_the_future(name):
    changes = changes_of(build(name), text(11))
    assert [positions[0] for positions in changes] == list(range(11))


@models([name for name in VARIANTS if row(name).mask == "full"])
def test_an_encoder_sees_its_whole_segment_and_no_later_one(name):
    changes = changes_of(build(name), text(11))
    assert [positions[0] for positions in changes] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8]


# ---------------------------------------------------------------------------------- the relatives


@pytest.mark.parametrize("split", [[11], [4, 4, 3], [1, 4, 2, 4], [1] * 11], ids=str)
def test_transformer_xl_with_a_long_cache_equals_one_long_transformer(split):
    """The most-used port joins a cache with absolute positions: two tokens share a position."""
    whole = build("transformer", segment_len=11, n_layer=3)
    cached = build("transformer_xl", segment_len=11, n_layer=3, cache_len=12)
    cached.load_state_dict(whole.state_dict())
    tokens = text(11)
    state = None
    pieces = []
    for segment in tokens.split(split, dim=1):
        logits, state = cached(segment, state)
        pieces.append(logits)
    assert_close(torch.cat(pieces, dim=1), unroll(whole, tokens)[0])


def memory_transformer_in_loops(model, x, window):
    """What [MT] says of controller and bottleneck, row by row: who sees whom in each step."""
    block = model.backbone.blocks[0]
    N = x.size(1)
    memory = [r for r in range(N) if r < model.n_read or r >= N - model.n_write]
    tokens = [r for r in range(N) if r not in memory]
    positions = positions_of(model, len(tokens), 0)

    def sees(r, column):
        if model.variant.mask == "full":
            return True
        if model.variant.mask == "causal":
            return column <= r
        if r < model.n_read:
            return column < model.n_read
        return r >= N - model.n_write or column <= r

    def update(layer, rows, also):
        mask = torch.tensor([[sees(r, c) and also(r, c) for c in range(N)] for r in range(N)])
        mask[:, 0] |= ~mask.any(dim=1)  # rows of the other step must see something too
        _, attended = attention_in_loops(layer.attn, layer.norm_1(x), mask, positions)
        return {r: feed_forward_by_hand(layer, (x + attended)[:, r]) for r in rows}

    def everyone(r, column):
        return True

    def memory_and_neighbours(r, column):
        return column in memory or (r != column and abs(r - column) <= window)

    # In the first step tokens see each other through the window too, but only memory is kept of it.
    new = update(getattr(block, "controller", block), memory, everyone)
    if isinstance(block, ControllerBlock):
        new |= update(block, tokens, everyone)
    else:
        x = torch.stack([new.get(r, x[:, r]) for r in range(N)], dim=1)  # memory is new already
        new |= update(block, tokens, memory_and_neighbours)
    return torch.stack([new[r] for r in range(N)], dim=1)


@models(TWO_STEPS)
@pytest.mark.parametrize("window", [0, 2])
def test_controller_and_bottleneck_equal_the_two_steps_of_the_paper_row_by_row(name, window):
    model = build(name, window=window)
    block = model.backbone.blocks[0]
    x = torch.randn(1, model.n_read + T + model.n_write, D, requires_grad=True)
    actual, carry = block(x, model.layout(T, model.initial_state(1)), ())
    expected = memory_transformer_in_loops(model, x, window)
    assert_close(actual, expected)
    assert carry == ()
    direction = torch.randn_like(x)
    inputs = [x, *block.parameters()]
    assert_close(torch.autograd.grad(actual, inputs, direction),
                 torch.autograd.grad(expected, inputs, direction))


def blocks_of(page):
    """The programs that a page shows."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def adapter():
    """What the README and pretrained.md define to put memory around a pretrained model."""
    names = {}
    exec(next(block for block in blocks_of("README.md") if "class HuggingFace" in block), names)
    for block in blocks_of("assets/results/pretrained.md")[1:]:
        exec(block, names)
    return names


class CappedHead(nn.Module):
    """As Gemma 2 caps its logits."""

    def __init__(self, head, cap):
        super().__init__()
        self.head = head
        self.cap = cap

    def forward(self, rows):
        return self.cap * torch.tanh(self.head(rows) / self.cap)


@pytest.mark.parametrize("kind, variant", [
    ("GPT2", "rmt"), ("GPT2", "rmt_causal"), ("Llama", "rmt"), ("Cohere", "rmt"),
    ("Gemma2", "rmt"), ("Bert", "rmt_encoder")])
def test_memory_around_a_hugging_face_model_equals_a_loop_by_hand(kind, variant):
    """With the README's adapter. The loop calls the whole model, with its own head."""
    transformers = pytest.importorskip("transformers")
    names = adapter()
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4,
             "max_position_embeddings": 3 * T, "bos_token_id": 0, "eos_token_id": 0,
             "pad_token_id": 0}
    if kind != "GPT2":
        sizes |= {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 4}
    purpose = "MaskedLM" if kind == "Bert" else "CausalLM"
    hf_config = getattr(transformers, f"{kind}Config")(**sizes)
    lm = getattr(transformers, f"AutoModelFor{purpose}").from_config(hf_config).double().eval()
    for weight in lm.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    head = lm.get_output_embeddings()
    if kind == "Cohere":
        head = names["ScaledHead"](head, lm.logit_scale)
    elif kind == "Gemma2":
        head = CappedHead(head, lm.config.final_logit_softcapping)
    elif kind == "Bert":
        head = lm.cls
    config = Config(variant, vocab_size=V, d_model=D, segment_len=T, n_mem=M)
    backbone = names["Encoder" if kind == "Bert" else "HuggingFace"](lm.base_model)
    model = RMT(config, backbone, lm.get_input_embeddings(), head).double().eval()

    N = model.n_read + T + model.n_write
    allowed = segment_mask(model.n_read, 0, T, model.n_write, model.variant.mask)
    bias = None  # these models are causal by themselves
    if variant != "rmt_causal":
        bias = torch.zeros(2, 1, N, N).masked_fill(~allowed, -1e9)
    tokens = text(3 * T)
    memory = model.memory.expand(2, -1, -1)
    pieces = []
    for segment in tokens.split(T, dim=1):
        rows = [memory, model.embed(segment), memory[:, :model.n_write]]
        seen = lm(inputs_embeds=torch.cat(rows, dim=1), attention_mask=bias, use_cache=False,
                  output_hidden_states=True)
        rows = seen.hidden_states[-1]
        memory = rows[:, -M:] if model.n_write else rows[:, :M]
        pieces.append(seen.logits[:, M:M + T])
    logits, state = unroll(model, tokens)
    assert_close([logits, state.memory], [torch.cat(pieces, dim=1), memory], 1e-6)
    long = dataclasses.replace(config, segment_len=3 * T)
    with pytest.raises(ValueError, match="positions: use a smaller segment_len or n_mem"):
        unroll(RMT(long, backbone, model.embed, head).double(), tokens)
    if kind == "Bert":
        return
    new = generate(model, tokens, 2 * T, temperature=0)
    offline, _ = unroll(model, torch.cat([tokens, new], dim=1))
    assert torch.equal(new, offline[:, 3 * T - 1:-1].argmax(-1))
    if lm.config._attn_implementation == "sdpa":
        weights, _ = attention_maps(model, tokens[:, :T])
        assert weights.shape == (3, 2, 4, N, N)
        assert torch.equal(weights.amax(dim=(0, 1, 2)) > 0, allowed)


def associative_in_loops(block, x, n_write, carry):
    """One associative layer by the equations of [ARMT], one row and one sum at a time.

    Returns what the rows x (B, N, D) read, and the carry after the last n_write of them.
    """
    d, nu, update, eps = block.w_q.weight.size(0), block.nu, block.update, 1e-5

    def features(x_row):
        r = [x_row[i].clamp(min=0) for i in range(d)] + [(-x_row[i]).clamp(min=0) for i in range(d)]
        products = []
        for j in range(1, nu + 1):
            for i in range(2 * d):
                products.append(r[i] * r[(i - j) % (2 * d)])
        products = torch.stack(products)
        if update == "armt":
            return products
        return products / (products.square().sum().sqrt() + eps)

    def recall(k, A, z):
        value = sum(A[:, j] * k[j] for j in range(len(k)))
        if update == "armt":
            value = value / (sum(z[j] * k[j] for j in range(len(k))) + eps)
        return value

    reads, carries = [], []
    for b in range(len(x)):
        A, z = carry[0][b], carry[1][b]
        reads.append(torch.stack([recall(features(block.w_q.weight @ r), A, z) for r in x[b]]))
        rows = list(x[b, x.size(1) - n_write:])
        keys = [features(block.w_k.weight @ m) for m in rows]
        betas = []
        for m in rows:
            betas.append(1 / (1 + (-(block.w_b.weight[0] @ m + block.w_b.bias[0])).exp()))
        new_A, new_z = A, z
        for k, m, beta in zip(keys, rows, betas, strict=True):
            v = block.w_v.weight @ m
            if update == "delta":
                shared = sum((k @ other) * b for other, b in zip(keys, betas, strict=True))
                beta = beta / max(shared, torch.ones(()))
            if update != "hebbian":
                v = v - recall(k, A, z)
            new_A = new_A + torch.outer(beta * v, k)
            if update == "armt":
                gamma = 1.0  # the first segment of the released code
                if z.any():
                    gamma = 1 - ((z @ k).item() + eps) / ((k @ k).item() + eps)
                new_z = new_z + min(max(gamma, 0), 1) * k
        carries.append((new_A, new_z))
    return torch.stack(reads), tuple(torch.stack(part) for part in zip(*carries, strict=True))


UPDATES = {"delta": "armt", "armt": "armt, published", "hebbian": "armt, hebbian"}


@pytest.mark.parametrize("update", UPDATES)
def test_armt_reads_writes_and_gradients_equal_its_equations_in_loops(update):
    block = build(UPDATES[update]).backbone.blocks[0]
    x = torch.randn(2, 5, D, requires_grad=True)
    _, first = associative_in_loops(block, x.flip(1), M, block.initial_carry(2))
    for carry in (block.initial_carry(2), first):
        expected = associative_in_loops(block, x, M, carry)
        actual = (block.read(block.features(block.w_q(x)), *carry),
                  block.write(x[:, -M:], *carry))
        results = []
        weights = [x, block.w_q.weight, block.w_k.weight, block.w_v.weight,
                   block.w_b.weight, block.w_b.bias]
        for value, after in (actual, expected):
            loss = value.sin().sum() + sum(t.sin().sum() for t in after)
            gradients = torch.autograd.grad(loss, weights, retain_graph=True,
                                            materialize_grads=True)
            results.append([value, *after, *gradients])
        assert_close(*results, tolerance=1e-10)


def test_the_delta_rule_stays_bounded_where_many_write_rows_have_alike_keys():
    """All rows correct the same old A. Unshared, their steps add up, and 32 of them explode."""
    torch.manual_seed(0)
    block = build("armt", n_mem=32).backbone.blocks[0]
    carry = block.initial_carry(1)
    alike = torch.randn(1, 1, D) + 0.3 * torch.randn(1, 32, D)
    with torch.no_grad():
        block.w_v.weight.normal_(std=0.7 / math.sqrt(D))
        for _ in range(1000):
            carry = block.write(alike + 0.1 * torch.randn(1, 32, D), *carry)
    assert carry[0].abs().max() < 5

    # 32 rows with one key together write it once: what it held goes towards zero, not beyond.
    same = torch.randn(1, 1, D).expand(1, 32, D)
    k = block.features(block.w_k(same[:, :1]))
    block.w_v.weight.data.zero_()
    A, z = carry
    before, after = block.read(k, A, z), block.read(k, *block.write(same, A, z))
    assert (before * after).min() > -1e-12


# ------------------------------------------------------------------------------- a model at work


@models(CAUSAL)
@pytest.mark.parametrize("n_prompt", [1, T, 2 * T + 1])
def test_streaming_generation_equals_offline_argmax(name, n_prompt):
    """Later RMT code continues behind the write tokens, and never passes memory on meanwhile."""
    model = build(name)
    prompt = text(n_prompt)
    for state in (None, unroll(model, text(2 * T, seed=1))[1]):
        new = generate(model, prompt, 3 * T, state, temperature=0)
        logits, _ = unroll(model, torch.cat([prompt, new], dim=1), state)
        assert torch.equal(new, logits[:, n_prompt - 1:-1].argmax(-1))


@models(DIAGONAL)
@pytest.mark.parametrize("n_layer, length", [(1, 12), (3, 3), (3, 8), (3, 29)])
def test_diagonals_equal_the_loop_over_segments(name, n_layer, length):
    """The released code is exact for one sequence, and takes one bias for all layers."""
    model = build(name, n_layer=n_layer)
    tokens = text(length)
    _, before = unroll(model, text(T + 1, seed=1))
    for start, bptt_depth in ((None, None), (before, 0), (before, 2)):
        results = []
        for run in (unroll, unroll_diagonal):
            given = None
            inputs = []
            if start is not None:
                given = start.map(lambda t: t.detach().requires_grad_())
                inputs = given.tensors()
            logits, end = run(model, tokens, given, bptt_depth)
            loss = loss_of(logits, tokens) + sum(t.sin().sum() for t in end.tensors())
            loss.backward()
            gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
            results.append([logits, *end.tensors(), *gradients, *gradients_of(model)])
            for t in end.tensors():  # no views of a whole diagonal
                assert t.untyped_storage().nbytes() == t.nbytes
        assert_close(*results, tolerance=1e-10)


class Unrolled(nn.Module):
    """A module whose forward is unroll: what DistributedDataParallel, export and others take."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return unroll(self.model, tokens)[0]


class CountKernels(TorchDispatchMode):
    """Count the operations that launch a kernel: all but views."""

    n = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        is_view = function.is_view or "view" in str(function)
        self.n += not is_view
        return function(*arguments, **(options or {}))


def test_a_training_step_launches_fewer_kernels_than_the_authors_design():
    """On a GPU, small models wait for launches. Four segments, two layers, forward and backward."""
    pytest.importorskip("transformers")
    config = Config(vocab_size=256, segment_len=32, n_mem=8)
    ours, authors = RMT(config), benchmark.Authors(config)
    tokens = torch.randint(256, (2, 4 * 32))
    n_kernels = []
    for run in (partial(unroll, ours), authors):
        with CountKernels() as count:
            logits, _ = run(tokens)
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        n_kernels.append(count.n)
    assert n_kernels[0] <= 0.86 * n_kernels[1], n_kernels


# ==================================================================================================
# More of rmt.py. Segments and states


@models(CAUSAL)
def test_a_short_segment_equals_the_start_of_a_full_one(name):
    model = build(name)
    tokens = text(12)
    logits, _ = unroll(model, tokens)
    for length in (1, 3, 5, 10):
        assert_close(unroll(model, tokens[:, :length])[0], logits[:, :length])


@models(PUBLISHED)
def test_padding_on_the_right_is_exact_for_tokens_but_not_for_states(name):
    """As the docstring of unroll says: a state is exact until the segment with the padding."""
    model = build(name)
    tokens = text(3 * T, batch_size=1)
    padded = tokens.clone()
    padded[:, T + 2:] = 0
    alone, end = unroll(model, tokens[:, :T + 2])
    logits, _ = unroll(model, padded)
    is_causal = model.variant.mask != "full"
    assert torch.equal(logits[:, :T], alone[:, :T])
    assert torch.allclose(logits[:, :T + 2], alone) == is_causal
    _, at_boundary = unroll(model, padded[:, :T])
    assert all(map(torch.equal, at_boundary.tensors(), unroll(model, tokens[:, :T])[1].tensors()))
    if model.state_floats() > 0:
        _, after = unroll(model, padded[:, :2 * T])
        shapes = [tensor.shape for tensor in end.tensors()]
        same_shapes = shapes == [tensor.shape for tensor in after.tensors()]
        assert not (same_shapes and all(map(torch.allclose, after.tensors(), end.tensors())))


@models([name for name in PUBLISHED if not row(name).cache])
def test_single_sequences_restart_as_the_docstring_of_unroll_shows(name):
    model = build(name)
    tokens = text(2 * T, batch_size=3)
    _, state = unroll(model, tokens)
    ended = torch.tensor([False, True, False])
    lines = unroll.__doc__.split("initial state:\n\n")[1].split("\n\n")[0]
    names = {"model": model, "state": state, "ended": ended, "torch": torch}
    exec(textwrap.dedent(lines), names)
    logits, _ = unroll(model, tokens, names["state"])
    assert_close(logits[1], unroll(model, tokens)[0][1])
    assert_close(logits[::2], unroll(model, tokens, state)[0][::2])


def test_tokens_of_every_integer_type_and_numbers_of_numpy_mean_the_same():
    """nanoGPT's data files hold uint16; a temperature comes from np.linspace."""
    model = build()
    logits, _ = unroll(model, text(11))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32):
        assert torch.equal(unroll(model, text(11).to(dtype))[0], logits)
        assert generate(model, text(3).to(dtype), 5, temperature=0).dtype == torch.int64
    for temperature in np.linspace(0, 1, 3):
        new = generate(model, text(3), np.int64(5), temperature=temperature, top_k=np.int64(2))
        assert new.shape == (2, 5)
    sizes = {name: np.int64(size) for name, size in SIZES.items()}
    assert torch.equal(unroll(build(**sizes), text(11))[0], logits)


def test_with_an_embedding_of_your_own_whatever_it_takes_is_input():
    """Series, observations, patches: floats (B, T, F) here."""
    torch.manual_seed(0)
    model = RMT(build().config, embed=nn.Linear(3, D), head=nn.Linear(D, 1))
    series = torch.randn(2, 3 * T + 1, 3)
    outputs, _ = unroll(model, series, bptt_depth=1)
    outputs.sum().backward()
    assert outputs.shape == (2, 3 * T + 1, 1)
    assert model.embed.weight.grad.any()
    assert torch.equal(unroll(model, series[:, :T])[0], outputs[:, :T])


def test_detach_and_map_keep_the_values():
    _, state = unroll(build("armt"), text(8))
    cut = state.detach()
    assert any(tensor.requires_grad for tensor in state.tensors())
    assert not any(tensor.requires_grad for tensor in cut.tensors())
    assert all(map(torch.equal, cut.tensors(), state.tensors()))
    both = state.map(lambda a, b: torch.cat([a, b]), cut)
    assert [len(tensor) for tensor in both.tensors()] == [4] * len(state.tensors())


# ---------------------------------------------------------------------------------------- memory


@models(["rmt", "rmt_encoder", "rmt_xl", "mem_controller"])
@pytest.mark.parametrize("memory_form", ["norm", "raw"])
def test_the_next_memory_is_the_written_rows_normed_or_raw(name, memory_form):
    model = build(name, memory_form=memory_form)
    model.norm.weight.data.normal_()
    with calls(model.backbone) as seen:
        _, state = model(text(T))
    (_, (x, _)), = seen
    written = x[:, -M:] if model.n_write else x[:, :M]
    expected = model.norm(written) if memory_form == "norm" else written
    assert_close(state.memory, expected)
    storage = state.memory.untyped_storage()
    assert storage.nbytes() == state.memory.nbytes  # a view would keep its whole segment alive


@pytest.mark.parametrize("write_slot", ["memory", "embedding", "both"])
def test_write_rows_are_fed_what_write_slot_names(write_slot):
    model = build(write_slot=write_slot)
    memory = torch.randn(2, M, D)
    fed = memory
    if write_slot == "embedding":
        fed = model.write_embedding.expand(2, M, D)
    if write_slot == "both":
        fed = memory + model.write_embedding
    expected = torch.cat([memory, model.embed(text(T)), fed], dim=1)
    assert torch.equal(model.wrap(text(T), memory), expected)


def test_noise_has_one_size_per_sequence_up_to_its_fraction_of_the_rms():
    model = build(d_model=64, memory_noise=0.3)
    clean = torch.randn(1000, 16, 64) * torch.logspace(-1, 1, 16)[:, None]
    clean.requires_grad_()
    noisy = model.train().next_memory(clean, None)
    noise = noisy - clean
    per_row = (noise.square().mean(-1) / clean.square().mean(-1)).sqrt()
    per_sequence = per_row.square().mean(-1).sqrt()
    assert per_sequence.max() < 0.3 * 1.1
    assert per_sequence.min() < 0.01
    assert abs(per_sequence.mean() - 0.15) < 0.01
    assert (per_row / per_sequence[:, None]).std() < 0.12
    noisy.sum().backward()
    assert_close(clean.grad, torch.ones_like(clean))  # no gradient through the size of the noise


@models(MODELS)
def test_dropout_and_noise_act_in_training_alone(name):
    plain, _ = unroll(build(name), text(11))
    tries = [{"dropout": 0.5}]
    if row(name).recurrent:
        tries.append({"memory_noise": 0.5})
    if row(name).recurrent and row(name).cache:
        tries.append({"carry_dropout": 0.5})
    for changes in tries:
        model = build(name, **changes)
        assert torch.equal(unroll(model, text(11))[0], plain)
        model.train()
        assert not torch.allclose(unroll(model, text(11))[0], plain)
    model = build(name, dropout=0.5).train()
    memory = model.initial_state(2).memory
    rows = model.wrap(text(T), memory)
    assert torch.equal(rows[:, :model.n_read], model.eval().wrap(text(T), memory)[:, :model.n_read])


def test_carry_dropout_takes_the_whole_cache_of_some_sequences():
    """It forces rmt_xl to use its memory: with its cache at hand, it would not learn to."""
    model = build("rmt_xl", carry_dropout=0.4).train()
    block = model.backbone.blocks[0]
    state = state_with_cache(model, C, batch_size=1000)
    layout = model.layout(1, state)
    x = torch.randn(1000, M + 1 + M, D)
    _, (cache,) = block(x, layout, state.carry[0])
    kept = (cache[:, :-1] != 0).flatten(1).double().mean(dim=1)
    assert set(kept.unique().tolist()) == {0.0, 1.0}  # all of it, or nothing
    assert abs(kept.mean() - 0.6) < 0.05
    assert build("transformer_xl", carry_dropout=0.4).backbone.blocks[0].carry_dropout == 0


def test_weights_start_at_their_sizes_and_no_parameter_is_empty():
    """In the original RMT code all memory tokens start as one vector."""
    model = RMT(Config("mem_controller", d_model=64, n_mem=64, vocab_size=64, n_layer=3,
                       write_slot="both"))
    plain = 0.7 / math.sqrt(64)
    block = model.backbone.blocks[2].controller
    expected = {
        model.memory: 0.02,
        model.write_embedding: 0.02,
        model.embed.weight: 0.5,
        model.head.weight: plain,
        block.attn.qkv.weight: plain,
        block.attn.out.weight: plain / math.sqrt(6),
        block.mlp[0].weight: plain,
        block.mlp[2].weight: plain / 2 / math.sqrt(6),
    }
    for weight, size in expected.items():
        assert abs(weight.std() / size - 1) < 0.05
    assert torch.pdist(model.memory.detach()).min() > 0.1
    for name in VARIANTS:
        assert all(weight.numel() > 0 for weight in build(name).parameters())


@models(PUBLISHED)
def test_a_state_has_as_many_floats_as_its_formula_says(name):
    K = 2 * 3 * 4
    expected = 0
    if row(name).recurrent:
        expected += M * D
    if row(name).cache:
        expected += L * C * D
    if row(name).block is AssociativeBlock:
        expected += L * D * K
    _, state = unroll(build(name), text(12, batch_size=1))
    assert sum(tensor.numel() for tensor in state.tensors()) == expected
    assert build(name).state_floats() == expected
    if name == "armt":
        assert build(name, update="armt").state_floats() == expected + L * K


@models(PUBLISHED)
@pytest.mark.parametrize("changes", [
    {"segment_len": 1, "n_mem": 1, "cache_len": 1}, {"cache_len": 9},
    {"segment_len": 20, "n_mem": 7}], ids=str)
def test_shapes_at_odd_sizes(name, changes):
    model = build(name, **changes)
    for batch_size in (1, 3):
        logits, state = unroll(model, text(10, batch_size))
        assert logits.shape == (batch_size, 10, V)
        assert logits.isfinite().all()
        n_mem = model.config.n_mem if model.variant.recurrent else 0
        assert state.memory.shape == (batch_size, n_mem, D)


# ------------------------------------------------------------------------------------ the relatives


def test_masks_are_those_of_the_papers():
    forms = {name: VARIANTS[name].mask for name in PUBLISHED}
    causal = {name for name, form in forms.items() if form == "causal"}
    full = {name for name, form in forms.items() if form == "full"}
    assert causal == {"transformer", "transformer_xl", "rmt_causal", "armt"}
    assert full == {"rmt_encoder", "mem_controller_encoder", "mem_bottleneck_encoder"}


@pytest.mark.parametrize("n_layer, cache_len, reach", [(2, 4, 11), (3, 8, 27), (2, 2, 9)])
def test_the_caches_of_all_layers_add_up_to_the_reach_of_transformer_xl(n_layer, cache_len, reach):
    """T - 1 + L C tokens if C is a multiple of T; T - 1 + (L - 1) T + C if it is below T."""
    model = build("transformer_xl", n_layer=n_layer, cache_len=cache_len)
    changes = changes_of(model, text(32))
    assert [p for p in range(32) if 31 in changes[p]] == list(range(31 - reach, 32))


@models([name for name in VARIANTS if row(name).cache])
@pytest.mark.parametrize("cache_len", [1, 4, 6])
def test_a_cache_holds_the_last_inputs_of_its_layer_without_memory_or_gradient(name, cache_len):
    model = build(name, cache_len=cache_len)
    inputs = [torch.empty(2, 0, D)] * L
    state = None
    for segment in text(15).split([4, 1, 3, 4, 2, 1], dim=1):
        with calls(*model.backbone.blocks) as seen:
            _, state = model(segment, state)
        for layer, ((x, *_), _) in enumerate(seen):
            tokens = x[:, model.n_read:x.size(1) - model.n_write]
            inputs[layer] = torch.cat([inputs[layer], tokens], dim=1)
            (cache,) = state.carry[layer]
            assert torch.equal(cache, inputs[layer][:, -cache_len:])
            assert not cache.requires_grad


def reads_of_a_rewritten_key(block):
    """One key is written with 1, 2, 3, 4, 5: what is read after each write.

    A row is [key | value], cut out by W_k and W_v, and beta is 1.
    """
    identity = torch.eye(D)
    with torch.no_grad():
        block.w_k.weight.copy_(identity[:4])
        block.w_q.weight.copy_(identity[:4])
        block.w_v.weight.copy_(identity.roll(4, 1))  # the value comes first
        block.w_b.weight.zero_()
        block.w_b.bias.fill_(50)
    carry = block.initial_carry(1)
    m = torch.randn(1, 1, D)
    reads = []
    for value in range(1, 6):
        m[..., 4:] = value
        carry = block.write(m, *carry)
        answer = block.read(block.features(block.w_q(m)), *carry)
        reads.append(answer[0, 0, 0].item())
    return reads


def test_a_key_written_1_to_5_reads_1_to_5_but_in_hebbian_their_sum(monkeypatch):
    """Without gamma the published rule cannot rewrite a key."""
    for update, expected in [("delta", [1, 2, 3, 4, 5]), ("armt", [1, 2, 3, 4, 5]),
                             ("hebbian", [1, 3, 6, 10, 15])]:
        block = build(UPDATES[update]).backbone.blocks[0]
        assert reads_of_a_rewritten_key(block) == pytest.approx(expected, rel=1e-2)
    block = build("armt, published").backbone.blocks[0]
    monkeypatch.setattr(block, "newness", lambda k, z: torch.ones(1, 1, 1))
    assert reads_of_a_rewritten_key(block) == pytest.approx([1, 1, 4 / 3, 5 / 3, 2], rel=1e-2)


@pytest.mark.parametrize("update", UPDATES)
def test_an_associative_layer_reads_before_its_first_norm_and_writes_what_comes_out(update):
    model = build(UPDATES[update])
    block = model.backbone.blocks[0]
    layout = model.layout(T, model.initial_state(2))
    x = torch.randn(2, T + M, D)
    _, carry = block(x.flip(1), layout, block.initial_carry(2))
    y, after = block(x, layout, carry)
    reads, _ = associative_in_loops(block, x, M, carry)
    plain, _ = rmt.Block.forward(block, x + reads, layout, ())
    _, expected = associative_in_loops(block, plain, M, carry)
    assert_close([y, *after], [plain, *expected], tolerance=1e-10)


@pytest.mark.parametrize("update", UPDATES)
def test_an_untrained_associative_memory_leaves_the_plain_model(update):
    torch.manual_seed(0)
    model = RMT(Config("armt", **SIZES, update=update))
    plain = RMT(Config("transformer", **SIZES))
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens = text(5 * T)
    logits, state = unroll(model, tokens)
    assert_close(logits, unroll(plain, tokens)[0])
    assert not any(A.any() for A, _ in state.carry)
    for block in model.backbone.blocks:
        assert torch.equal(block.w_q.weight, block.w_k.weight)  # it reads where it would write


def test_a_published_key_is_new_as_long_as_nothing_was_written():
    """As in the released layer: later, a short key is not new even where it is orthogonal to z."""
    block = build("armt, published").backbone.blocks[0]
    short_key = F.pad(torch.full((1, 1, 4), 1e-3), (0, 20))
    nothing = torch.zeros(1, 24)
    elsewhere = nothing.clone()
    elsewhere[0, 10] = 1.0
    assert block.newness(short_key, nothing).item() == 1
    assert block.newness(short_key, elsewhere).item() == pytest.approx(1 - 1e-5 / 1.4e-5)


def test_associative_memory_stays_in_float32_under_autocast():
    torch.set_default_dtype(torch.float32)
    model = build("armt, published")
    state = model.initial_state(2)
    for segment in text(5 * T).split(T, dim=1):
        with torch.autocast("cpu", torch.bfloat16):
            logits, later = model(segment, state)
        for (_, before), (_, after) in zip(state.carry, later.carry, strict=True):
            assert (after >= before).all()  # z never decreases
        state = later
    assert logits.dtype == torch.bfloat16
    assert {tensor.dtype for layer in state.carry for tensor in layer} == {torch.float32}
    phi = torch.rand(2, 5, 24)
    block = model.backbone.blocks[0]
    with torch.autocast("cpu", torch.bfloat16):
        value = block.read(phi, *state.carry[0])
    assert torch.equal(value, block.read(phi, *state.carry[0]))


# ------------------------------------------------------------------------------------ at work


def attention_layers(block):
    """The attention layers of a block, in the order in which it calls them."""
    if isinstance(block, ControllerBlock):
        return [block.controller.attn, block.attn]
    if isinstance(block, BottleneckBlock):
        return [block.attn, block.attn]
    return [block.attn]


@models([*PUBLISHED, "mem_xl", "mem_bottleneck, window"])
@pytest.mark.parametrize("n_before", [0, 3 * T])
def test_attention_maps_equal_the_loops_and_show_who_looks_at_whom(name, n_before):
    model = build(name)
    segment = text(3)
    state = model.initial_state(2)
    if n_before:
        _, state = unroll(model, text(n_before, seed=1))
    n_cached = model.n_cached(state)
    layers = [layer for block in model.backbone.blocks for layer in attention_layers(block)]
    with calls(*set(layers)) as seen:
        logits, _ = model(segment, state)
    window = model.config.window if model.variant.window else None
    sees = segment_mask(
        model.n_read, n_cached, 3, model.n_write, model.variant.mask, window)
    expected = []
    for layer, ((x, _, *cache), _) in zip(layers, seen, strict=True):
        columns = torch.cat([*cache, x], dim=1)
        weights, _ = attention_in_loops(layer, columns, sees, positions_of(model, 3, n_cached))
        expected.append(weights)
    expected = torch.stack(expected)
    if row(name).block in (ControllerBlock, BottleneckBlock):  # memory rows are of the first step
        is_memory = torch.ones(expected.size(-2), 1).bool()
        is_memory[model.n_read:model.n_read + 3] = False
        expected = torch.where(is_memory, expected[0::2], expected[1::2])

    attend = F.scaled_dot_product_attention
    weights, widths = attention_maps(model, segment, state)
    assert_close(weights, expected)
    assert torch.equal(weights.amax(dim=(0, 1, 2)) > 0, sees)
    assert widths == [min(n_before, model.n_cache), model.n_read, 3, model.n_write]
    assert F.scaled_dot_product_attention is attend
    assert torch.equal(model(segment, state)[0], logits)  # nothing was left behind


def test_generation_costs_one_segment_per_token_however_long_the_text_is():
    """Later RMT code computes all segments again for every new token, and keeps their logits."""
    model = build()
    alive = []
    references = []

    def watch(head, given, logits):
        assert not logits.requires_grad
        references.append(weakref.ref(logits))
        alive.append(sum(reference() is not None for reference in references))

    model.head.register_forward_hook(watch)
    continuation = stream(model, text(10 * T), temperature=0)
    next(continuation)
    assert len(references) == 9 + 3 + 1  # the prompt, the check that the model is causal, a token
    assert max(alive) <= 3
    references.clear()
    for _ in range(3 * T):
        next(continuation)
    assert len(references) == 3 * T + 3


@pytest.mark.parametrize("temperature, top_k", [(1, None), (0.3, None), (2, 5), (1, 99)])
def test_sampling_follows_the_softmax_of_the_most_likely_tokens(temperature, top_k):
    model = build()
    prompt = text(6, batch_size=1)
    n_draws = 2000
    logits = unroll(model, prompt)[0][0, -1]
    best = logits.topk(min(top_k or V, V)).indices
    expected = torch.zeros(V).scatter(0, best, (logits[best] / temperature).softmax(0))
    new = generate(model, prompt.expand(n_draws, -1), 1, temperature=temperature, top_k=top_k,
                   generator=torch.Generator().manual_seed(0))
    drawn = new.flatten().bincount(minlength=V) / n_draws
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / n_draws).sqrt()).all()


def test_the_same_generator_seed_gives_the_same_text():
    texts = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        texts.append(generate(build(), text(6), 30, generator=generator))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    tied = rmt.sample(torch.zeros(500, V), 1.0, 1, None)
    assert len(tied.unique()) == 1  # top_k 1 takes one token also among ties


@models(["armt", "transformer_xl", "student"])
def test_the_options_of_diagonals_and_a_mixture_with_unroll_give_the_same_numbers(name):
    model = build(name)
    tokens = text(50, batch_size=3)
    results = []
    diagonal = unroll_diagonal
    for first, second in ((unroll, unroll), (diagonal, unroll), (unroll, diagonal)):
        for options in ({}, {"checkpoint": True}, {"last_only": True}):
            logits, state = first(model, tokens[:, :4 * T], **options)
            more, state = second(model, tokens[:, 4 * T:], state, **options)
            loss_of(more[:, -2:], tokens[:, -2:]).backward()
            results.append([logits[:, -T:], more[:, -2:], *state.tensors(), *gradients_of(model)])
            if "last_only" in options:
                assert (logits.size(1), more.size(1)) == (T, 2)
    for result in results[1:]:
        assert_close(result, results[0], tolerance=1e-10)


@pytest.mark.parametrize("n_segments, n_layer", [(1, 3), (6, 2)])
def test_diagonals_take_s_plus_l_minus_1_steps(n_segments, n_layer, monkeypatch):
    model = build("armt", n_layer=n_layer)
    batches = []
    side_by_side = rmt.side_by_side

    def recorded(blocks):
        layer = side_by_side(blocks)
        layer.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
        return layer

    monkeypatch.setattr(rmt, "side_by_side", recorded)
    unroll_diagonal(model, text(n_segments * T))
    assert len(batches) == n_segments + n_layer - 1
    assert sum(batches) == 2 * n_segments * n_layer  # every segment meets every layer once


# ---------------------------------------------------------------------- in the world of PyTorch


@models(PUBLISHED)
def test_distributed_training_works_around_a_module_that_unrolls(name):
    """Parameters of size zero made the second step fail."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = build(name)
        distributed = nn.parallel.DistributedDataParallel(Unrolled(model))
        tokens = text(3 * T)
        for _ in range(3):
            loss_of(distributed(tokens), tokens).backward()
            gradients = gradients_of(model)
        loss_of(unroll(model, tokens)[0], tokens).backward()
        assert_close(gradients, gradients_of(model))
        with pytest.raises(TypeError, match="wrap a module whose forward calls unroll"):
            unroll(distributed, tokens)
    finally:
        torch.distributed.destroy_process_group()


@models(["rmt", "rmt_xl", "mem_bottleneck", "armt"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_sample_equal_those_of_single_sequences(name):
    model = build(name)
    tokens = text(11, batch_size=3)
    weights = {f"model.{key}": weight for key, weight in model.named_parameters()}

    def loss(weights, sequence):
        logits = torch.func.functional_call(Unrolled(model), weights, sequence[None])
        return loss_of(logits, sequence[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, tokens)
    for i in range(3):
        alone = torch.func.grad(loss)(weights, tokens[i])
        for key in weights:
            assert_close(per_sample[key][i], alone[key], 1e-10)


@models(["rmt", "rmt_xl", "armt"])
def test_a_model_can_be_exported(name):
    model = Unrolled(build(name))
    exported = torch.export.export(model, (text(11),)).module()
    assert_close(exported(text(11, seed=1)), model(text(11, seed=1)))


@models(["rmt", "armt"])
def test_compiled_without_a_break_a_model_is_one_graph_for_equal_segments(name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    model = build(name)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tokens = text(4 * T)
    with torch.no_grad():
        logits, _ = unroll(compiled, tokens)
        assert len(graphs) == 1
        whole = torch.compile(Unrolled(model), backend="eager", fullgraph=True)
        assert_close(whole(tokens), logits)
    assert_close(logits, unroll(model, tokens)[0])


@models(MODELS)
def test_copies_and_state_dicts_give_the_same_logits_also_where_weights_are_tied(name):
    model, loaded = build(name), build(name)
    for each in (model, loaded):
        each.head.weight = each.embed.weight
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    loaded.load_state_dict(model.state_dict())
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(unroll(other, text(11))[0], unroll(model, text(11))[0])
        assert other.head.weight is other.embed.weight


@models([name for name in MODELS if name != "running_mean" and row(name).block
         is not AssociativeBlock])
def test_nothing_stays_behind_when_a_model_moves(name):
    """On the device "meta" nothing is computed, and nothing of another device can take part."""
    model = build(name).to("meta")
    logits, state = model(text(T).to("meta"))
    assert {tensor.device.type for tensor in [logits, *state.tensors()]} == {"meta"}


@models(PUBLISHED)
def test_bfloat16_stays_close_to_float32(name):
    """Under autocast, and converted as a whole."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = RMT(Config(**SIZES | {"variant": name}))
    tokens = text(15)
    expected, _ = unroll(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = unroll(model, tokens, bptt_depth=1)
        loss = loss_of(logits, tokens)
    loss.backward()
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.06)
    assert all(t.isfinite().all() for t in [*state.tensors(), *gradients_of(model)])
    logits, _ = unroll(model.bfloat16(), tokens)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.1)


def test_positions_are_exact_whatever_the_default_dtype():
    """Angles in bfloat16 gave 1,000 and 1,001 the same position."""
    exact = rmt.rotary_table(1024, 8)
    torch.set_default_dtype(torch.bfloat16)
    table = build("transformer", segment_len=1024).rotary_table
    assert table.dtype == torch.bfloat16
    assert (table.double() - exact).abs().max() < 0.01


def test_parts_of_your_own_keep_their_weights_and_a_head_gets_raw_rows():
    parts = {"backbone": RecurrentBackbone(), "embed": nn.Embedding(V, D), "head": nn.Linear(D, V)}
    config = build(write_slot="embedding").config
    for part_name, part in parts.items():
        model = RMT(config, **{part_name: copy.deepcopy(part)})
        assert_close(dict(getattr(model, part_name).state_dict()), dict(part.state_dict()), 0)
    with calls(model.backbone, model.head) as seen:  # of the last one, whose head is its own
        _, state = model(text(T))
    (_, (x, _)), ((rows,), _) = seen
    assert torch.equal(rows, x[:, M:-M])
    assert torch.equal(state.memory, x[:, -M:])


# ------------------------------------------------------------------------------------------ errors


class Gated(StudentBlock):
    """A layer with a weight that is neither in an nn.Linear nor in an nn.LayerNorm."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.ones(()))


class RowsFirst(StudentBlock):
    """A layer whose feed-forward part sees the rows as the first axis, not the batch."""

    def forward(self, x, layout, carry):
        x, carry = super().forward(x, layout, carry)
        return x + self.mlp(x.transpose(0, 1)).transpose(0, 1), carry


class LooksAhead(rmt.Block):
    """A layer in which every row sees the mean of all rows."""

    def forward(self, x, layout, carry):
        return super().forward(x + x.mean(dim=1, keepdim=True), layout, carry)


class OneCarry(rmt.Block):
    """A layer whose carry is a tensor, and not a tuple of tensors."""

    def initial_carry(self, batch_size):
        return torch.zeros(batch_size, D)


OWN_BLOCKS = {block.__name__: VARIANTS["student"]._replace(block=block)
              for block in (Gated, RowsFirst, LooksAhead, OneCarry)}


def own(block, **changes):
    """A model whose layers are one of the classes above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "own", OWN_BLOCKS[block.__name__])
        return RMT(Config("own", **SIZES | changes))


def layers_that_differ():
    """A model whose layers differ in a plain number."""
    model = build("transformer")
    for i, block in enumerate(model.backbone.blocks):
        block._scale = 1 / (i + 1)
    return model


def layer_with_a_hook():
    """A model one of whose layers ends in a hook."""
    model = build("transformer")
    model.backbone.blocks[1].mlp.register_forward_hook(lambda module, x, y: 2 * y)
    return model


def layers_with_a_bias():
    """A model one of whose layers has a bias where the others have none."""
    model = build("transformer")
    model.backbone.blocks[1].attn.out = nn.Linear(D, D)
    return model


def carry_of_one_sequence():
    """A state whose memory has two sequences, and its carry one."""
    return build("armt").initial_state(2)._replace(carry=build("armt").initial_state(1).carry)


def state_of(name="rmt", batch_size=2, **changes):
    """The state of some model after 20 tokens."""
    return unroll(build(name, **changes), text(20, batch_size))[1]


def generate_with_nan():
    """Generate with a model whose training went wrong."""
    model = build()
    model.head.weight.data.fill_(math.nan)
    return generate(model, text(3), 1)


MISTAKES = [  # and what the message must say
    (lambda: Config("lstm"), "variant='lstm' must be one of transformer, mem_transformer"),
    (lambda: Config(memory_form="sum"), "memory_form='sum' must be one of norm, raw"),
    (lambda: Config(n_layer=0), "n_layer=0 must be at least 1"),
    (lambda: Config(cache_len=0), "cache_len=0 must be at least 1"),
    (lambda: Config(memory_noise=math.nan), "memory_noise=nan must be at least 0"),
    (lambda: Config(carry_dropout=1.5), "carry_dropout=1.5 must be from 0 to 1"),
    (lambda: Config(d_model=18), "d_model=18 must be divisible by 2 * n_head=8"),
    (lambda: build("armt", backbone=RecurrentBackbone), "'armt' has layers of its own: give a"),
    (lambda: segment_mask(1, 0, 1, 1, "bidirectional"), "mask form 'bidirectional' must be"),
    (lambda: build()(torch.rand(2, 3)), "tokens are torch.float64 of shape (2, 3) and must be"),
    (lambda: build()(text(3) > 5), "tokens are torch.bool of shape (2, 3) and must be integers"),
    (lambda: build()(text(3)[0]), "tokens are torch.int64 of shape (3,) and must be integers"),
    (lambda: unroll(build(), text(0)), "tokens have shape (2, 0): there must be a sequence"),
    (lambda: build()(torch.tensor([[3, 11]])), "tokens reach from 3 to 11, and vocab_size=11"),
    (lambda: unroll(build(), torch.tensor([[-1, 4]])), "tokens reach from -1 to 4, and vocab_size"),
    (lambda: build()(text(5)), "a segment of 5 tokens is longer than segment_len=4: give long"),
    (lambda: build()(text(3), tuple(state_of())), "state is a tuple and must be a State: start"),
    (lambda: build()(text(3), state_of(batch_size=3)), "start from model.initial_state(2)"),
    (lambda: build()(text(3), state_of(n_mem=2)), "shapes [(2, 2, 16)] does not fit 'rmt'"),
    (lambda: build()(text(3), state_of("rmt_xl")), "does not fit 'rmt' with 2 sequences"),
    (lambda: build("rmt_xl")(text(3), state_of()), "does not fit 'rmt_xl' with 2 sequences"),
    (lambda: build("rmt_xl")(text(3), state_of("rmt_xl", cache_len=6)), "does not fit 'rmt_xl'"),
    (lambda: build("armt")(text(3), state_of("armt", nu=2)), "does not fit 'armt' with 2"),
    (lambda: build("armt")(text(3), state_of("armt, published")), "does not fit 'armt'"),
    (lambda: build("armt")(text(3), state_of("armt", batch_size=1)), "does not fit 'armt' with 2"),
    (lambda: build("armt")(text(3), carry_of_one_sequence()), "does not fit 'armt' with 2 seq"),
    (lambda: unroll(build(), text(3), bptt_depth=-1), "bptt_depth=-1 must be None (the gradient"),
    (lambda: unroll(build(), text(3), bptt_depth=0.5), "bptt_depth=0.5 must be None (the gradient"),
    (lambda: generate(build(memory_noise=1.0).train(), text(9), 1), "the model is in training"),
    (lambda: generate(build(), text(3)[0], 1), "tokens are torch.int64 of shape (3,) and must be"),
    (lambda: generate(build(), text(3), 1, temperature=-1), "temperature=-1 must be 0 (the most"),
    (lambda: generate(build(), text(3), 1, temperature=1e-45), "a finite number from 1e-4 up"),
    (lambda: generate(build(), text(3), 1, top_k=0), "top_k=0 must be None or at least 1"),
    (lambda: generate(build("rmt_encoder"), text(3), 1), "sees whole segments and cannot generate"),
    (generate_with_nan, "the model's logits are not finite: was it trained with too large a"),
    (lambda: own(OneCarry), "the carry of a layer is a Tensor and must be a tuple of tensors"),
    (lambda: generate(own(LooksAhead), text(1), 1), "a layer looks at later tokens, or at how"),
    (lambda: generate(own(LooksAhead, segment_len=200), text(150), 1), "a layer looks at later"),
    (lambda: attention_maps(build("rmt around a GRU"), text(3)), "needs layers that call F.scaled"),
    (lambda: unroll_diagonal(build(), text(3)), "the memory of 'rmt' goes from a segment's last"),
    (lambda: unroll_diagonal(build("transformer around a GRU"), text(3)), "around a RecurrentBack"),
    (lambda: unroll_diagonal(layers_with_a_bias(), text(3)), "needs layers that differ in the"),
    (lambda: unroll_diagonal(own(Gated), text(3)), "a Gated of this layer has other weights"),
    (lambda: unroll_diagonal(own(RowsFirst), text(9)), "a layer gave (4, 2, 16) to a Linear"),
    (lambda: unroll_diagonal(layers_that_differ(), text(3)), "needs layers that differ in the"),
    (lambda: unroll_diagonal(layer_with_a_hook(), text(3)), "does not call hooks of the model"),
    (lambda: unroll_diagonal(build("armt"), text(3), state_of("armt", 3)), "does not fit 'armt'"),
]


@pytest.mark.parametrize("mistake, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_refused_in_one_line_with_its_value_and_the_fix(mistake, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
        mistake()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ a GPU


def models_on_gpu(names):
    """As `models`; without a GPU one test that is skipped, and not one for every model."""
    return models(names if torch.cuda.is_available() else [])


@models_on_gpu([name for name in MODELS if name != "running_mean"])
@torch.backends.cudnn.flags(enabled=False)  # its GRU has gradients in training mode only
def test_a_gpu_computes_what_the_cpu_computes(name):
    tokens = text(2 * T + 3)
    prompt = text(T + 2)
    results = []
    continuations = []
    for device in ("cpu", "cuda"):
        model = build(name).to(device)
        logits, state = unroll(model, tokens.to(device), bptt_depth=1)
        loss_of(logits, tokens.to(device)).backward()
        computed = [logits, *state.tensors(), *gradients_of(model)]
        results.append([tensor.cpu() for tensor in computed])
        if name in CAUSAL:
            new = generate(model, prompt.to(device), 2 * T, temperature=0)
            continuations.append(new.tolist())
    assert_close(*results, tolerance=1e-9)
    assert continuations == [] or continuations[0] == continuations[1]


@models_on_gpu(DIAGONAL)
def test_diagonals_on_a_gpu_equal_the_loop(name):
    model = build(name, n_layer=3).to("cuda")
    tokens = text(8 * T + 1).to("cuda")
    results = []
    for run in (unroll, unroll_diagonal):
        logits, state = run(model, tokens, checkpoint=True)
        loss_of(logits, tokens).backward()
        results.append([logits, *state.tensors(), *gradients_of(model)])
    assert_close(*results, tolerance=1e-9)


# ==================================================================================================
# Scripts: what the tests need

LINE = "import the memory of a segment, and read it: (what) was 'written' in line 1, 2 or 30?\nSo"
TEXT = " ".join(random.Random(0).choices(LINE.split(" "), k=5000))[:20_000]
TINY = "--steps 104 --batch 4 --n-layer 1 --n-mem 2 --d-model 16 --memory-noise 0.5 --device cpu"
FLAGS = {
    train_copy: f"{TINY} --segments 6 --segment-len 2 --symbols 2 --curriculum random --lr 4e-3",
    train_lm: f"{TINY} --data a.txt --segment-len 8 --reset-every 7 --eval-every 52 --length 20",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, empty but for a text of 20,000 bytes."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture(params=[train_copy, train_lm], ids=["train_copy", "train_lm"])
def script(request, folder):
    """A test with this argument is run for both scripts."""
    return request.param


@pytest.fixture
def trained(script, folder, tmp_path_factory):
    """The folder a holds a finished run of the script, of rmt and transformer. It is trained once,
    for all tests."""
    shared = tmp_path_factory.getbasetemp() / script.__name__
    if not shared.exists():
        run(script, f"{FLAGS[script]} --out {shared}")
    shutil.copytree(shared, "a")


def run(script, flags, status=0):
    """Run a script in this process, in float32 on the CPU; check its exit status -> its output."""
    torch.set_default_dtype(torch.float32)
    printed = StringIO()
    ended = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr(torch.cuda, "is_available", lambda: False)
        try:
            script.main(shlex.split(flags))
        except SystemExit as end:
            ended = end.code
    assert ended == status, printed.getvalue()
    return printed.getvalue()


def stop(script, n, flags):
    """Run a script until somebody presses Ctrl-C in the middle of its n-th step of training."""
    steps = count(1)

    def unroll_or_stop(*arguments, **options):
        if next(steps) == n:
            raise KeyboardInterrupt
        return unroll(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "unroll", unroll_or_stop)
        return run(script, flags, 130)


def refused(script, flags, words):
    """The script ends with exit status 2, prints one line with these words, and writes nothing."""
    files = [path for path in Path().rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    printed = run(script, flags, 2)
    assert words in printed
    assert len(printed.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def arguments(script, flags):
    """The settings that a script reads from flags, for a run in the current folder."""
    args = script.parse(shlex.split(f"{flags} --device cpu"))
    args.out = "."
    return args


def checkpoint(name, variant="rmt"):
    """What the run in a folder has saved of a model."""
    return torch.load(Path(name, f"{variant}.pt"), weights_only=True)


def saved_model(name, variant="rmt"):
    """A trained model, and its vocabulary."""
    saved = checkpoint(name, variant)
    model = RMT(Config(**saved["config"])).eval()
    model.load_state_dict(saved["model"])
    return model, saved["vocabulary"]


def results(name):
    """The scores of the run in a folder."""
    return json.loads(Path(name, "result.json").read_text())["results"]


def assert_same_weights(one, other, tolerance=0.0):
    """Two state dicts are equal, without a tolerance to the last bit."""
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def outputs_by_hand(model, tokens, boundary="carried"):
    """Logits of a loop over segments. At each boundary the state is carried, or it is the initial
    one, or that of another sequence."""
    state = model.initial_state(len(tokens))
    outputs = []
    for segment in tokens.split(model.config.segment_len, dim=1):
        if boundary == "initial":
            state = model.initial_state(len(tokens))
        elif boundary == "another":
            state = state._replace(memory=torch.cat([state.memory[-1:], state.memory[:-1]]))
        logits, state = model(segment, state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


def learn(optimizers, learning_rate, logits, targets):
    """One step of training, as everybody writes it."""
    weights = []
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
            weights += group["params"]
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in optimizers:
        optimizer.step()


# ==================================================================================================
# Tasks


def draw_words(args):
    """500 samples of a task, the words of each, and which of them are answers."""
    task = train_copy.TASKS[args.task]
    words = task.words(args)
    tokens, is_answer = task.draw(args, args.segments, 500, torch.Generator().manual_seed(0))
    return [[words[token] for token in sample] for sample in tokens.tolist()], is_answer


def solve(task, shown, n, T):
    """The answer of n words, by a reader of segments of T words who knows nothing else."""
    if task in ("copy", "reverse"):
        source = shown[:shown.index("|")]
        return source * 2 if task == "copy" else source[::-1]
    if task in ("memorize", "detect"):
        start = shown.index("|") + 1
        assert task == "detect" or start == 1
        return shown[start:start + n]
    if task in ("retrieval", "remember", "rewrite"):
        known = {}
        for start in range(0, len(shown) - 2, T):
            key, *value = shown[start:start + T]
            assert task == "rewrite" or key not in known
            known[key] = [word for word in value if word != "|"]
        return known[shown[-2] if task == "retrieval" else shown[-1]]
    *sentences, question = " ".join(shown).split(" . ")
    moves = [sentence.split() for sentence in sentences if " went to the " in sentence]
    place_of = {person: place for person, _, _, _, place in moves}  # mary went to the garden
    return [place_of[question.split()[-1]]]


def left_side(equation, x):
    """The value of the left side of an equation of the task quadratic."""
    return eval(equation.removesuffix("=0").replace("^", "**"), {"x": x})


@pytest.mark.usefixtures("folder")
class TestTasks:
    """The tasks ask for what their docstrings show."""

    @pytest.mark.parametrize("task", train_copy.TASKS)
    def test_a_recipe_builds_and_the_answer_follows_from_what_was_shown(self, task):
        """And a guess is right by chance: in one case of 10, or of 6 places."""
        args = arguments(train_copy, f"--task {task}")
        assert vars(args).items() >= train_copy.TASKS[task].recipe.items()
        train_copy.check_lengths(args)
        train_copy.build(args, args.model)
        samples, is_answer = draw_words(args)
        start, end = train_copy.first_answer(is_answer)
        answers = []
        for sample in samples if task != "quadratic" else []:  # it comes next
            answer = solve(task, sample[:start], end - start, args.segment_len)
            assert answer == sample[start:end]
            answers += answer
        for word in set(answers):
            chance = {"facts": 1 / 6}.get(task, 1 / 10)
            assert answers.count(word) / len(answers) == pytest.approx(chance, abs=0.05)

    @pytest.mark.parametrize("segment_len", [6, 60])
    def test_facts_asks_about_everybody_who_moved(self, segment_len):
        """In n segments there are 1 to 6 moves and not more than n - 1, whatever their length."""
        for n in range(2, 10):
            args = arguments(
                train_copy, f"--task facts --segment-len {segment_len} --segments {n}")
            samples, is_answer = draw_words(args)
            numbers_of_moves = set()
            for sample in samples:
                story, *questions = re.split(" ?where is ", " ".join(sample))
                assert len(story.split()) == (n - 1) * segment_len
                moves = re.findall(r"(\w+) went to the (\w+) \.", story)
                numbers_of_moves.add(len(moves))
                asked = dict(question.split() for question in questions)
                assert asked == dict(moves)  # in a dict, the latest place counts
                assert len(questions) == len(asked) == min(n - 1, 4)
                answers = [word for word, counts in zip(sample, is_answer, strict=True) if counts]
                assert answers == list(asked.values())
            assert numbers_of_moves == set(range(min(n - 1, 4), min(n - 1, 6) + 1))

    def test_quadratic_equations_are_solved_in_six_fields(self):
        samples, _ = draw_words(arguments(train_copy, "--task quadratic"))
        n_unsolved = 0
        for sample in samples:
            line = "".join(sample)
            fields = [line[start:start + 30].rstrip("_") for start in range(0, 180, 30)]
            given, monic, discriminant, *formulas, answer = fields
            q = left_side(monic, 0)
            p = left_side(monic, 1) - 1 - q
            assert discriminant == f"D={p * p - 4 * q}"
            if p * p < 4 * q:
                n_unsolved += 1
                assert {*formulas, answer} == {"none"}
                continue
            for formula, root in zip(formulas, answer.split(","), strict=True):
                _, fraction, value = formula.split("=")  # x=(98-86)/2=6
                assert eval(fraction) == int(value) == int(root)
                assert left_side(given, int(root)) == left_side(monic, int(root)) == 0
        assert n_unsolved / len(samples) == pytest.approx(0.2, abs=0.05)

    def test_a_task_of_your_own_is_a_function_and_a_row(self, monkeypatch):
        def sort(args, segments, batch, generator):
            shape = batch, segments // 2 * args.segment_len
            source = train_copy.draw_symbols(args, shape, generator)
            mark = torch.full((batch, 1), train_copy.MARK)
            tokens = torch.cat([source, mark, source.sort(dim=1).values], dim=1)
            return train_copy.ends_with(source.size(1), tokens)

        row = train_copy.Task(sort, train_copy.symbols, {"segments": 4, "steps": 9}, multiple=2)
        monkeypatch.setitem(train_copy.TASKS, "sort", row)
        printed = run(train_copy, "--task sort --segment-len 3 --d-model 16 --baseline none")
        source = printed.split("    input   ")[1].split("|")[0]
        right = printed.split("    right   ")[1].split("\n")[0]
        assert sorted(source) == [*right]
        assert checkpoint("out/sort-1")["step"] == 9


# ==================================================================================================
# train_copy.py


@pytest.mark.usefixtures("folder")
class TestTrainCopy:
    """Training and evaluation of train_copy.py equal what can be done by hand."""

    @pytest.mark.parametrize("task, depth, optimizer", [
        ("copy", 1, "adamw"), ("remember", None, "adamw"), ("copy", None, "muon")])
    def test_training_equals_a_loop_by_hand(self, task, depth, optimizer):
        """Lengths are drawn at random. All answers are trained, and nothing else. In remember, no
        answer is shown to the questions after it."""
        flags = f"{FLAGS[train_copy]} --task {task} --model rmt --steps 20 --memory-noise 0"
        flags += f" --optimizer {optimizer}"
        args = arguments(train_copy, f"{flags} --weight-decay 0.1 --lr 0.004")
        args.bptt_depth = depth
        by_hand = train_copy.build(args, "rmt")
        model, _ = train_copy.train(args, "rmt")

        weights = dict(by_hand.named_parameters())
        optimizers = []
        if optimizer == "muon":
            matrices = [weights.pop(f"backbone.blocks.{layer}.{name}.weight")
                        for layer in range(args.n_layer)
                        for name in ("attn.qkv", "attn.out", "mlp.0", "mlp.2")]
            optimizers.append(train_copy.Muon(matrices, lr=0.004, weight_decay=0.1))
        optimizers.append(
            torch.optim.AdamW(weights.values(), betas=(0.9, 0.98), weight_decay=0.1))
        generator = torch.Generator().manual_seed(0)
        lengths = {"copy": [3, 6], "remember": [2, 3, 4, 5, 6]}[task]
        for step in range(20):
            n = lengths[torch.randint(len(lengths), (), generator=generator)]
            tokens, is_answer = train_copy.TASKS[task].draw(args, n, 4, generator)
            shown = tokens[:, :-1].clone()
            if task == "remember":
                shown[:, 2 * n - 1::2] = train_copy.BLANK
            state = by_hand.initial_state(4)
            outputs = []
            for s, segment in enumerate(shown.split(2, dim=1)):
                if depth == 1 and s in {3: [1], 6: [2, 4]}[n]:
                    state = state.detach()
                logits, state = by_hand(segment, state)
                outputs.append(logits)
            logits = torch.cat(outputs, dim=1)[:, is_answer[1:]]
            rate = 0.004 * min((step + 1) / 50, (20 - step) / 10)
            learn(optimizers, rate, logits, tokens[:, is_answer])
        assert_same_weights(model.state_dict(), by_hand.state_dict(), 1e-9)

    @pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
    def test_muon_makes_the_singular_values_of_its_steps_nearly_equal(self, shape):
        by_hand = torch.randn(shape)
        matrix = nn.Parameter(by_hand.clone())
        optimizer = train_copy.Muon([matrix], lr=0.1, weight_decay=0.2)
        momentum = torch.zeros(shape)
        for _ in range(4):
            matrix.grad = torch.randn(shape)
            optimizer.step()
            momentum = 0.95 * momentum + 0.05 * matrix.grad
            direction = 0.95 * momentum + 0.05 * matrix.grad
            U, S, Vh = torch.linalg.svd(direction, full_matrices=False)
            S = S / S.norm()
            for _ in range(5):
                S = 3.4445 * S - 4.775 * S**3 + 2.0315 * S**5
            assert 0.68 < S.min() and S.max() < 1.21
            by_hand = 0.98 * by_hand - 0.1 * 0.2 * max(shape) ** 0.5 * U @ S.diag() @ Vh
        assert_close(matrix, by_hand, 1e-6)

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it since 2.9")
    @pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
    def test_muon_takes_the_steps_of_torch(self, shape):
        """Which computes in bfloat16, with 8 bits of precision."""
        ours = nn.Parameter(torch.randn(shape))
        theirs = nn.Parameter(ours.detach().clone())
        settings = {"lr": 0.1, "weight_decay": 0.2}
        optimizer = train_copy.Muon([ours], **settings)
        of_torch = torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw")
        for _ in range(4):
            ours.grad = theirs.grad = torch.randn(shape)
            optimizer.step()
            of_torch.step()
        assert_close(ours, theirs, 0.01)

    def test_muon_leaves_a_matrix_without_gradient_as_it_is(self):
        """As the keys and values of armt are with bptt_depth 0."""
        matrix = nn.Parameter(torch.randn(3, 2))
        before = matrix.detach().clone()
        train_copy.Muon([matrix], lr=0.1, weight_decay=0.2).step()
        assert matrix.equal(before)

    def test_symbols_and_then_lengths_are_added_when_training_goes_well(self, monkeypatch):
        """Two pairs of 2 symbols at first. With a share of 0.8 right, it takes a running mean 55
        steps to pass 0.75."""
        flags = "--task retrieval --curriculum grow --symbols 5 --first-symbols 2 --steps 40"
        args = arguments(train_copy, f"{flags} --model rmt --batch 2 --d-model 16")
        row = train_copy.TASKS["retrieval"]
        drawn = []

        def draw_and_note(args, segments, batch, generator):
            drawn.append((args.symbols, segments))
            return row.draw(args, segments, batch, generator)

        monkeypatch.setitem(train_copy.TASKS, "retrieval", row._replace(draw=draw_and_note))
        monkeypatch.setattr(train_copy, "share_right", lambda *_: 0.8)
        train_copy.train(args, "rmt")
        args.steps = 220
        train_copy.train(args, "rmt")  # resumes
        assert drawn[:165] == [(n, 3) for n in (2, 4, 5) for _ in range(55)]
        assert {*drawn[165:]} == {(5, 3), (5, 4)}
        train_copy.evaluate(args, train_copy.build(args, "rmt"), 5)
        assert drawn[-1] == (5, 5)

    def test_a_length_is_practised_in_proportion_to_what_it_gets_wrong(self):
        right = {3: 0.97, 6: 0.73, 9: 0.43}
        args = arguments(train_copy, "--curriculum grow")
        generator = torch.Generator().manual_seed(0)
        drawn = [train_copy.choose_length(args, [3, 6, 9], right, generator) for _ in range(10_000)]
        for length, share in {3: 0.06, 6: 0.3, 9: 0.6}.items():
            assert abs(drawn.count(length) / 10_000 - share / 0.96) < 0.02

    @pytest.mark.parametrize("script", [train_copy])
    @pytest.mark.parametrize("name", ["rmt", "transformer"])
    def test_scores_equal_those_by_hand(self, name, script, trained):
        """Teacher-forced, the model reads the right symbols; free-running, its own."""
        model, _ = saved_model("a", name)
        for n in (3, 6):
            tokens, right = copying(n)
            n_answer = right.size(1)
            forced = outputs_by_hand(model, tokens[:, :-1])[:, -n_answer:].argmax(-1)
            free = tokens[:, :-n_answer]
            for _ in range(n_answer):
                new = outputs_by_hand(model, free)[:, -1:].argmax(-1)
                free = torch.cat([free, new], dim=1)
            free = free[:, -n_answer:]
            assert results("a")[name][str(n)] == pytest.approx({
                "teacher_forced": (forced == right).double().mean().item(),
                "free_running": (free == right).double().mean().item(),
                "whole_answers": (free == right).all(dim=1).double().mean().item()})
        assert not torch.equal(free, forced)

    @pytest.mark.parametrize("script", [train_copy])
    def test_controls_equal_loops_by_hand(self, script, trained):
        """A control that passes the state on untouched would tell that memory is worth nothing."""
        model, _ = saved_model("a")
        tokens, right = copying(6)
        shares = {results("a")["rmt"]["6"]["teacher_forced"]}
        controls = {"initial": "its initial state at every boundary",
                    "another": "the state of another sample"}
        for boundary, control in controls.items():
            answers = outputs_by_hand(model, tokens[:, :-1], boundary)[:, -8:].argmax(-1)
            share = (answers == right).double().mean().item()
            assert results("a")[control] == pytest.approx(share)
            shares.add(share)
        assert len(shares) == 3

    def test_what_is_between_answers_is_not_scored_nor_are_blanks(self):
        between, blank = train_copy.NO_TARGET, train_copy.BLANK
        targets = torch.tensor([[between, 3, 9, blank, between, 6]])
        answers = torch.tensor([[3, 3, 4, blank, 5, 6]])
        assert train_copy.share_right(answers, targets) == pytest.approx(2 / 3)
        assert train_copy.first_answer(targets[0] != between) == (1, 4)

    @pytest.mark.parametrize("script", [train_copy])
    def test_the_target_is_for_the_worst_trained_length(self, script, trained):
        scores = results("a")["rmt"]
        worst = min(scores["3"]["teacher_forced"], scores["6"]["teacher_forced"])
        flags = "--resume a --baseline none --eval-segments 9 --target"
        assert "reached" in run(train_copy, f"{flags} {worst}")
        assert "MISSED" in run(train_copy, f"{flags} {worst + 0.001}", 1)

    def test_a_caret_marks_each_mistake(self, capsys):
        args = arguments(train_copy, "--task remember")
        right, answers = torch.tensor([[5, 6]] * 3), torch.tensor([[5, 6], [4, 6], [5, 13]])
        train_copy.print_examples(args, torch.tensor([[13, 5, 6, 14, 5]] * 3), right, answers)
        lines = capsys.readouterr().out.splitlines()
        assert lines[2:5] == ["    input   k0 2 3 k1", "    right   2 3", "    model   2 3"]
        assert [line[12:].rstrip() for line in lines[5::4]] == ["", "^", "  ^^"]


def copying(n):
    """The 128 samples of n segments that a model is evaluated on: all tokens, and the answers."""
    args = arguments(train_copy, FLAGS[train_copy])
    tokens, _ = train_copy.copy(args, n, 128, torch.Generator().manual_seed(2**31))
    return tokens, tokens[:, -4 * n // 3:]


# ==================================================================================================
# train_lm.py


def bits_by_hand(model, tokens, boundary):
    """Bits of every token, in streams of at least 32 segments: (streams, length)."""
    n = (len(tokens) - 1) // (32 * 8)
    length = (len(tokens) - 1) // n
    inputs = tokens[:n * length].view(n, length)
    targets = tokens[1:n * length + 1].view(n, length)
    logits = outputs_by_hand(model, inputs, boundary)
    return F.cross_entropy(logits.mT, targets, reduction="none") / math.log(2)


@pytest.mark.usefixtures("folder")
class TestTrainLM:
    """Training, evaluation and samples of train_lm.py equal what can be done by hand."""

    @pytest.mark.parametrize("depth", [None, 0])
    def test_training_equals_a_loop_by_hand(self, depth):
        """The state is carried from step to step, detached; every fifth step starts anew."""
        sizes = "--segment-len 4 --d-model 16 --n-mem 2 --batch 4"
        args = arguments(train_lm, f"{sizes} --reset-every 5 --steps 16")
        args.bptt_depth = depth
        raw = TEXT[:500].encode()  # 450 for training: 4 streams of 112, which are 14 steps of 8
        parsed = train_lm.Text(raw)
        by_hand = train_lm.build(args, "rmt", len(parsed.vocabulary))
        model, _ = train_lm.train(args, "rmt", parsed)

        optimizers = [torch.optim.AdamW(
            by_hand.parameters(), betas=(0.9, 0.98), weight_decay=0.01)]
        numbers = torch.tensor([parsed.vocabulary.index(byte) for byte in raw[:450]])
        streams = torch.stack([numbers[i * 112:(i + 1) * 112 + 1] for i in range(4)])
        for step in range(16):
            place = step % 14 * 8
            tokens = streams[:, place:place + 9]
            if step in (0, 5, 10, 14, 15):
                state = by_hand.initial_state(4)
            first, state = by_hand(tokens[:, :4], state)
            if depth == 0:
                state = state.detach()
            second, state = by_hand(tokens[:, 4:8], state)
            state = state.detach()
            rate = 0.012 * min((step + 1) / 50, (1 + math.cos(math.pi * step / 16)) / 2)
            learn(optimizers, rate, torch.cat([first, second], dim=1), tokens[:, 1:])
        assert_same_weights(model.state_dict(), by_hand.state_dict(), 1e-9)

    @pytest.mark.parametrize("script", [train_lm])
    @pytest.mark.parametrize("name, boundaries", [
        ("rmt", {"carried": "carried", "initial": "reset", "another": "of another stream"}),
        ("transformer", {"carried": "carried"})])
    def test_bits_per_byte_equal_those_by_hand(self, name, boundaries, script, trained):
        """Of the test part, and by the place in a segment; of the validation part in training."""
        model, vocabulary = saved_model("a", name)
        tokens = torch.tensor([vocabulary.index(byte) for byte in TEXT.encode()])
        seen = set()
        for boundary, reported_as in boundaries.items():
            bits = bits_by_hand(model, tokens[19_000:], boundary)
            score = results("a")[name][reported_as]
            assert score["bits_per_byte"] == pytest.approx(bits.mean().item(), rel=1e-5)
            by_position = [bits[:, place::8].mean().item() for place in range(8)]
            assert score["by_position"] == pytest.approx(by_position, rel=1e-5)
            seen.add(score["bits_per_byte"])
        assert len(seen) == len(boundaries)
        bits = bits_by_hand(model, tokens[18_000:19_000], "carried").mean().item()
        assert checkpoint("a", name)["rows"][-1]["valid_bits"] == pytest.approx(bits, rel=1e-5)

    def test_references_equal_counts_by_hand(self):
        """Counts begin at 1, so that no pair of the test part is impossible."""
        parsed = train_lm.Text(b"ab" * 45 + b"aabab" + b"abbaa")  # ab 45 times, ba 44 times
        bits = train_lm.references(parsed)
        unigram = 47 / 93 * 47 / 93 * 46 / 93 * 46 / 93
        bigram = 46 / 47 * 1 / 46 * 45 / 46 * 1 / 47
        assert bits["uniform"] == 1
        assert bits["unigram"] == pytest.approx(-math.log2(unigram) / 4)
        assert bits["bigram"] == pytest.approx(-math.log2(bigram) / 4)
        assert bits["gzip -9"] == 8 * len(gzip.compress(b"abbaa", 9)) / 5

    @pytest.mark.parametrize("script", [train_lm])
    def test_a_sample_is_what_generate_writes(self, script, trained):
        for name, temperature, top_k in [("rmt", 2.0, 3), ("transformer", 0.0, 5)]:
            flags = f"--model {name} --length 100 --temperature {temperature} --top-k {top_k}"
            sample = run(train_lm, f"--sample a {flags} --prompt 'import t' --seed 7")
            model, vocabulary = saved_model("a", name)
            prompt = torch.tensor([[vocabulary.index(byte) for byte in b"import t"]])
            generator = torch.Generator().manual_seed(7)
            new = generate(model, prompt, 100, None, temperature, top_k, generator)[0]
            written = bytes(vocabulary[token] for token in new).decode()
            assert sample == f"import t{written}\n"
        refused(train_lm, "--sample a --model armt", "a has no checkpoint of --model armt")

    def test_a_text_is_cut_in_three_and_has_the_bytes_of_its_first_part(self):
        parsed = train_lm.Text(b"ab" * 450 + b"abc" * 16 + b"ad" + b"b" * 50)
        assert parsed.vocabulary == b"ab"
        assert parsed.train.tolist() == [0, 1] * 450
        assert parsed.decode(parsed.valid) == b"ab" * 16 + b"a"
        assert parsed.test.tolist() == [1] * 50
        assert train_lm.bytes_per_character("\u8bb0".encode() * 100) == 3  # and not 1

    def test_every_content_is_read_once_and_a_folder_in_sorted_order(self, capsys):
        """A file that is read twice would be in the test part and in the training part."""
        files = {"b/z": "4", "b/c/y": "3", "b/.git/z": "no", "b/out/lm-1/z": "no", "x": "1"}
        for name, content in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(content)
        assert train_lm.read(["x", "b", "x", "b/../x"]) == b"134"
        assert capsys.readouterr().out == ""
        Path("b/copy").write_text("3")
        assert train_lm.read(["b"]) == b"34"
        assert "copy is left out: it has the same content as b" in capsys.readouterr().out


# ==================================================================================================
# Both scripts

BAD_FLAGS = [
    (train_copy, "--task swap", "invalid choice: 'swap'"),
    (train_copy, "--segments 8", "at least 2, and multiples of 3: 8 is not"),
    (train_copy, "--task retrieval --segment-len 3", "over 5 segments of 3 tokens"),
    (train_copy, "--task remember --keys 4 --segments 6", "needs 5 different keys but there are 4"),
    (train_copy, "--task memorize --first-symbols 4", "does not work with --task memorize"),
    (train_copy, "--first-symbols 11", "--first-symbols 11 must be from 1 to --symbols 10"),
    (train_copy, "--task retrieval --segments 2", "at least 3, and multiples of 1: 2 is not"),
    (train_copy, "--task retrieval --first-symbols 3", "needs 4 different keys but there are 3"),
    (train_copy, "--task facts --segment-len 11", "--segment-len 11 must be a multiple of 6"),
    (train_lm, "--data no.txt", "no.txt' is no file or folder"),
    (train_lm, "--data short.txt --batch 1", "its valid part has 10 bytes and needs 33"),
    (train_lm, "--data notepad.txt", "notepad.txt is encoded in UTF-16 or UTF-32: save it"),
    (train_lm, "--data a.txt --prompt \u00e9", "--prompt has '\u00e9', which the training text"),
    (train_lm, "--data a.txt --model rmt_encoder", "rmt_encoder sees whole segments"),
    (train_lm, "--data a.txt --temperature 1e-9", "temperature=1e-09 must be 0 (the most likely"),
    (train_lm, "--sample full", "full holds no run"),
]
for one in (train_copy, train_lm):
    BAD_FLAGS += [
        (one, "--model lstm", "invalid choice: 'lstm'"),
        (one, "--batch 0", "--batch 0 must be a number of at least 1"),
        (one, "--lr nan", "--lr nan must be a number of at least 0"),
        (one, "--segment 3", "unrecognized arguments: --segment 3"),
        (one, "--d-model 10 --n-head 4", "d_model=10 must be divisible by 2 * n_head=8"),
        (one, "--segment-len 0", "segment_len=0 must be at least 1"),
        (one, "--device abacus", "--device abacus cannot be used here"),
        (one, "--resume nowhere", "nowhere holds no run"),
        (one, "--out full", "--out 'full' is not a new or empty folder"),
    ]


class TestScripts:
    """A mistake is one line, a run is safe, and what was stopped is resumed."""

    @pytest.mark.parametrize("script, flags, words", BAD_FLAGS)
    def test_a_mistake_is_one_line_and_writes_nothing(self, script, flags, words, folder):
        Path("short.txt").write_text("a short text, no more than this; " * 6 + "..")
        Path("notepad.txt").write_text(TEXT, encoding="utf-16")
        Path("full").mkdir()
        Path("full/file").touch()
        if script is train_lm and "--data" not in flags:
            flags += " --data a.txt"
        refused(script, flags, words)

    def test_help_shows_every_default_and_fits_a_screen_and_a_half(self, script, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        shown = run(script, "--help")
        assert shown.count("(default:") == shown.count("\n  --") > 30
        assert len(shown.splitlines()) < 70

    def test_a_run_writes_numbers_and_pictures(self, script, trained):
        names = {"config.json", "metrics.csv", "result.json", "rmt.pt", "transformer.pt"}
        names |= {train_copy: {"attention.png", "training.png"},
                  train_lm: {"loss.png", "position.png", "sample.txt"}}[script]
        assert {path.name for path in Path("a").iterdir()} == names
        for picture in Path("a").glob("*.png"):
            assert picture.stat().st_size > 10_000
        assert json.loads(Path("a/result.json").read_text())["flags"]["steps"] == 104

    def test_a_baseline_learns_what_it_learns_alone(self, script, trained, monkeypatch):
        monkeypatch.setattr(script, "report", lambda *_: 1.0)  # it takes longer than training
        run(script, f"{FLAGS[script]} --model transformer --baseline none --out alone")
        alone, beside = checkpoint("alone", "transformer"), checkpoint("a", "transformer")
        assert_same_weights(alone["model"], beside["model"])

    def test_a_run_that_was_stopped_resumes_to_the_same_bits(self, script, trained, monkeypatch):
        """By Ctrl-C in step 102 of one model, in step 3 of the other; then from another folder."""
        stopped = stop(script, 102, f"{FLAGS[script]} --out parts")
        assert stopped.endswith("--resume parts\n")
        assert "\nrmt,100," in Path("parts/metrics.csv").read_text()  # it grows in training
        stop(script, 7, "--resume parts")
        assert checkpoint("parts")["step"] == 104
        assert not Path("parts/transformer.pt").exists()
        Path("elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        run(script, "--resume ../parts")
        for name in ("rmt", "transformer"):
            parts, whole = checkpoint("../parts", name), checkpoint("../a", name)
            assert_same_weights(parts["model"], whole["model"])
            times = {"cpu_seconds": 0}
            assert results("../parts")[name] | times == results("../a")[name] | times
        assert Path("../parts/metrics.csv").read_text() == Path("../a/metrics.csv").read_text()

    def test_an_earlier_run_is_not_overwritten(self, script, trained):
        refused(script, FLAGS[script] + " --out a", "'a' is not a new or empty folder")
        kept = {train_copy: {"task": "detect", "curriculum": "grow", "optimizer": "adamw"},
                train_lm: {"batch": 5, "segments_per_step": 3}}[script]
        kept |= {"d_model": 32, "seed": 1}
        for name, now in kept.items():
            was = checkpoint("a")["flags"][name]
            flag = f"--{name.replace('_', '-')} "
            words = f"a/rmt.pt was trained with {flag}{was}, not {now}"
            refused(script, f"--resume a {flag}{now} --n-mem 4", words)
        refused(script, "--resume a --steps 1", "has 104 steps already, more than --steps 1")

    def test_a_damaged_or_foreign_checkpoint_is_refused(self, script, trained):
        """torch.load does not look at checksums: a flipped bit would go into the weights."""
        path = Path("a/rmt.pt")
        whole = path.read_bytes()
        place = whole.index(checkpoint("a")["model"]["head.weight"].numpy().tobytes())
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]
        for content, words in [(flipped, "damaged"), (whole[:1000], "not a checkpoint")]:
            path.write_bytes(content)
            refused(script, "--resume a", f"a/rmt.pt is {words}")
        torch.save({"runs": {}}, path)
        refused(script, "--resume a", "a/rmt.pt is not a checkpoint")
        other_script = {train_copy: train_lm, train_lm: train_copy}[script]
        refused(other_script, "--resume a", "a holds a run of another script or edition than")
        settings = json.loads(Path("a/config.json").read_text())
        settings["config"] = {"dropout": 0.1}  # as the second edition wrote it
        Path("a/config.json").write_text(json.dumps(settings))
        refused(script, "--resume a", "they differ in config")

    def test_a_run_that_fails_keeps_its_last_checkpoint(self, script, trained):
        """Because the loss is no number; because the disk is full."""
        before = Path("a/rmt.pt").read_bytes()
        diverged = run(script, "--resume a --steps 199 --lr 1e9", 2)
        assert "take an --lr below 1000000000.0" in diverged.splitlines()[-1]
        assert Path("a/rmt.pt").read_bytes() == before
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        try:
            full = run(script, "--resume a --steps 106 --lr 0.001", 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "a/rmt.pt could not be written, the last checkpoint stays" in full
        assert Path("a/rmt.pt").read_bytes() == before

    def test_a_trained_model_is_used_as_the_docstring_shows(self, script, trained, capsys):
        """And as the README does, in the same lines."""
        lines = script.__doc__.split("in your own code:\n")[1].split("This file needs")[0]
        lines = textwrap.dedent(lines).strip()
        Path("out").mkdir()
        Path("a").rename({train_copy: "out/copy-1", train_lm: "out/lm-1"}[script])
        names = {}
        exec(lines, names)
        model, vocabulary = saved_model(*Path("out").iterdir())
        assert_same_weights(model.state_dict(), names["model"].state_dict())
        if script is train_copy:
            assert names["words"] == vocabulary == [*"|?_01"]
        else:
            assert len(capsys.readouterr().out) > 50
            readme = Path(rmt.__file__).with_name("README.md")
            assert lines in readme.read_text(encoding="utf-8")

    @pytest.mark.parametrize("script", [train_lm])
    def test_a_language_model_continues_after_its_text_moved(self, script, trained):
        """A Colab session ends; in the next one the text is in another folder."""
        settings = json.loads(Path("a/config.json").read_text())
        settings["data"] = ["/content/a.txt"]
        Path("a/config.json").write_text(json.dumps(settings))
        refused(train_lm, "--resume a", "'/content/a.txt' is no file or folder")
        Path("other.txt").write_text("another text; " * 1500)
        other = "other.txt is not the text that a/rmt.pt was trained on"
        refused(train_lm, "--resume a --data other.txt", other)
        stop(train_lm, 2, "--resume a --data a.txt --steps 106")


# ==================================================================================================
# README


def test_the_tables_of_the_pages_are_those_of_the_records():
    assert (ROOT / "README.md").stat().st_size <= 12_000
    pages = "".join(path.read_text(encoding="utf-8") for path in figures.PAGES)
    shown = re.findall(r"<!-- table (\S+) -->(.*?)<!-- end of table -->", pages, re.DOTALL)
    tables = figures.tables()
    assert dict(shown).keys() == tables.keys()
    for name, lines in shown:
        assert lines.strip() == tables[name]


def test_a_record_without_a_commit_has_the_settings_of_todays_recipe():
    scripts = {"train_copy.py": train_copy, "train_lm.py": train_lm}
    checked = 0
    for path in figures.RESULTS.glob("*.json"):
        runs = json.loads(path.read_text(encoding="utf-8"))
        for run_ in runs if isinstance(runs, list) else []:
            _, name, *flags = shlex.split(run_["command"])
            if name in scripts and "commit" not in run_:
                today = vars(scripts[name].parse(flags))
                for flag, value in run_["flags"].items():
                    assert value == today.get(flag, value), (path.name, run_["command"], flag)
                checked += 1
    assert checked > 100


def test_every_file_that_a_page_links_to_is_there():
    for page in [*figures.PAGES, ROOT / "notebooks" / "README.md"]:
        content = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", content):
            if not link.startswith("http"):
                path, _, anchor = link.partition("#")
                target = page.parent / path if path else page
                assert target.exists(), f"{page.name}: {link}"
                if anchor:
                    titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
                    anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                               for title in titles]
                    assert anchor in anchors, f"{page.name}: {link}"


def test_the_programs_of_the_readme_run(folder, monkeypatch):
    """One after the other. The one for a trained model is run beside the docstring it is from."""
    first, _, pretrained, task, gate, several = blocks_of("README.md")
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda module: module)
    torch.set_default_dtype(torch.float32)
    names = {}
    with redirect_stdout(StringIO()) as printed:
        exec(first, names)
    assert printed.getvalue().split("\n")[:2] == [
        "torch.Size([1, 296, 256]) torch.Size([1, 8, 64])", "torch.Size([1, 40])"]

    exec(gate, names)
    model = names["GatedRMT"](Config(**SIZES))
    _, state = unroll(model, text(3 * T))
    state.memory.sum().backward()
    assert model.gate.weight.grad.abs().max() > 0
    exec(several, names | {"model": model})

    Path("first.py").write_text(task, encoding="utf-8")
    flags = f"--task first {TINY} --baseline none --segment-len 2 --out a"
    monkeypatch.setattr(sys, "argv", ["first.py", *flags.split()])
    monkeypatch.setattr(train_copy, "TASKS", dict(train_copy.TASKS))
    with redirect_stdout(StringIO()) as printed:
        exec(compile(task, "first.py", "exec"), {"__name__": "__main__"})
    assert "over 4 segments of 2 tokens" in printed.getvalue()

    pytest.importorskip("transformers")
    exec(pretrained, names)
    check, *_ = blocks_of("assets/results/pretrained.md")
    with redirect_stdout(StringIO()) as printed:
        exec(check, names)
    assert re.match(r"tensor\(0\.", printed.getvalue())


@pytest.mark.parametrize("page, message", [
    ("<!-- table none -->\n<!-- end of table -->", "page.md: there is no table none, only one"),
    ("<!-- table one -->\n<!-- table one -->\n<!-- end of table -->", "needs an"),
    ("<!-- table one -->\n", "needs an <!-- end of table --> after it"),
])
def test_a_table_that_cannot_be_filled_is_an_error_in_one_line(page, message, folder):
    """And nothing is written."""
    Path("page.md").write_text(page, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        figures.fill(Path("page.md"), {"one": "| a |"})
    assert Path("page.md").read_text(encoding="utf-8") == page


def test_a_table_is_filled_in_and_the_rest_of_a_page_is_kept(folder):
    """As often as one likes."""
    page = "before\n<!-- table one -->{}<!-- end of table -->\nafter"
    Path("page.md").write_text(page.format("\n"), encoding="utf-8")
    for _ in range(2):
        figures.fill(Path("page.md"), {"one": "| \\1 |", "two": "no page needs it"})
        assert Path("page.md").read_text(encoding="utf-8") == page.format("\n\n| \\1 |\n\n")


def test_figures_are_small_and_their_text_is_text():
    """No picture of the pages is above 60 kB."""
    pictures = sorted(figures.ASSETS.glob("*.svg"))
    assert len(pictures) >= 14
    for path in pictures:
        assert path.stat().st_size < 60_000
        assert "<text" in path.read_text(encoding="utf-8")


def test_the_figures_of_a_notebook_are_kept_for_slides_with_their_captions(folder):
    """As python assets/figures.py --png keeps those of all notebooks."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    cell = f"""import sys
sys.path.insert(0, {str(ROOT / "notebooks")!r})
import course
for caption in ("one", "two"):
    course.show(course.draw_lines({{"a": ([1, 2], [3, 4])}}, "title", "x", "y"), caption)"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    Path("n.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RMT_FIGURES", "")
        figures.draw_notebooks([Path("n.ipynb")], folder)
    page = Path("captions.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[(\w+)\]\((\S+)\)\n\n(\w+)", page) == [
        ("one", "n-1.png", "one"), ("two", "n-2.png", "two")]
    for name in ("n-1.png", "n-2.png"):
        width_and_height = Path(name).read_bytes()[16:24]
        assert struct.unpack(">II", width_and_height) == (1800, 800)  # 9 by 4 inches, for slides


# ==================================================================================================
# Minutes


@pytest.mark.slow
def test_an_installed_clone_is_imported_in_every_folder(tmp_path):
    """Beside a clone called rmt, too, where a package of this name would be the folder."""
    clone = tmp_path / "rmt"
    clone.mkdir()
    for name in ("rmt.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    venv.create(tmp_path / "venv", with_pip=True)
    python = shutil.which("python", path=os.pathsep.join(
        str(tmp_path / "venv" / folder) for folder in ("bin", "Scripts")))
    install = [python, "-m", "pip", "install", "--no-deps", "-e", "./rmt"]
    installed = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True)
    if "No matching distribution" in installed.stderr:
        pytest.skip("pip finds no build backend without a network")
    assert installed.returncode == 0, installed.stderr
    find = "import importlib.util; print(importlib.util.find_spec('rmt').origin)"
    for folder in (tmp_path, clone, tmp_path / "venv"):
        found = subprocess.run([python, "-c", find], cwd=folder, capture_output=True, text=True)
        assert Path(found.stdout.strip()).resolve() == (clone / "rmt.py").resolve()


@pytest.mark.slow
def test_the_benchmark_runs():
    command = [sys.executable, ROOT / "assets/benchmark.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall("^## (.*)", done.stdout, re.MULTILINE) == list(benchmark.SECTIONS)


@pytest.mark.slow
class TestProcesses:
    """Processes that are killed, compiled runs, whole runs of every variant."""

    def test_runs_killed_while_they_save_resume_to_the_same_bits(self, script):
        """Kill -9, three times. The script needs only rmt.py beside it."""
        for file in (script.__file__, rmt.__file__):
            shutil.copy(file, ".")
        command = [sys.executable, f"{script.__name__}.py"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        flags = FLAGS[script] + " --steps 350"
        subprocess.run([*command, *flags.split(), "--out", "whole"], env=environment, check=True)
        flags += " --out parts"
        for name, least in [("rmt", 1), ("rmt", 200), ("transformer", 1)]:
            path = Path(f"parts/{name}.pt")
            process = subprocess.Popen([*command, *flags.split()], env=environment)
            while not path.exists() or checkpoint("parts", name)["step"] < least:
                assert process.poll() is None
                time.sleep(0.01)
            while not Path(f"{path}.tmp").exists():
                assert process.poll() is None
                time.sleep(0.001)
            process.kill()
            process.wait()
            assert least <= checkpoint("parts", name)["step"] < 350
            flags = "--resume parts"
        run(script, flags)
        for name in ("rmt", "transformer"):
            parts, whole = checkpoint("parts", name), checkpoint("whole", name)
            assert_same_weights(parts["model"], whole["model"])
        assert Path("parts/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()

    def test_a_compiled_run_learns_the_same(self, script, monkeypatch):
        compiled = []
        torch_compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda fn: compiled.append(fn) or torch_compile(fn))
        flags = FLAGS[script] + " --steps 5 --baseline none --memory-noise 0"
        run(script, flags + " --out a")
        run(script, flags + " --out b --compile")
        assert_same_weights(checkpoint("a")["model"], checkpoint("b")["model"], 1e-4)
        assert compiled == [unroll]

    @pytest.mark.parametrize("variant", PUBLISHED)
    def test_every_variant_trains_to_the_end_of_its_report(self, variant, script):
        """An encoder is no language model, and armt reads its memory without attention."""
        if script is train_lm and VARIANTS[variant].mask == "full":
            return
        run(script, f"{FLAGS[script]} --steps 5 --model {variant} --baseline none --out a")
        assert variant in results("a")
        if script is train_copy:
            assert Path("a/attention.png").exists() == (variant != "armt")


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
class TestLearning:
    """What the models learn, in minutes on a CPU. The notebooks assert more: how far gradient must
    reach in 3, language in 5, the delta rule in 6, noise in 7."""

    def test_the_default_run_reaches_its_target_and_no_memory_stays_at_chance(self):
        run(train_copy, "--target 0.99 --out a")
        scores = results("a")
        assert scores["rmt"]["9"]["free_running"] >= 0.98
        assert scores["transformer"]["9"]["teacher_forced"] <= 0.15
        assert scores["its initial state at every boundary"] <= 0.2
        assert scores["the state of another sample"] <= 0.2

    def test_a_fact_is_read_after_1024_segments(self):
        run(train_copy, "--task memorize --baseline none --eval-segments 1024 --out a")
        assert results("a")["rmt"]["1024"]["teacher_forced"] >= 0.97

    @pytest.mark.parametrize("form", ["norm", "raw"])
    def test_normed_memory_stays_alive_and_raw_memory_does_not(self, form):
        """The answer of every segment is the segment before it, in an endless stream."""
        torch.manual_seed(0)
        model = RMT(Config(vocab_size=10, segment_len=8, n_mem=8, memory_form=form))
        optimizers = [torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)]
        state = None
        before = torch.randint(10, (32, 8))
        for step in range(400):
            tokens = torch.randint(10, (32, 16))
            logits, state = unroll(model, tokens, state)
            state = state.detach()
            rate = 3e-3 * min(1, (step + 1) / 50, 2 * (1 - step / 400))
            learn(optimizers, rate, logits, torch.cat([before, tokens[:, :8]], dim=1))
            before = tokens[:, 8:]
        tokens = torch.randint(10, (8, 2_000 * 8))
        with torch.no_grad():
            _, state = unroll(model.eval(), tokens, last_only=True)
            logits, _ = unroll(model, torch.randint(10, (8, 8)), state)
        right = (logits.argmax(-1) == tokens[:, -8:]).double().mean()
        size = state.memory.square().mean().sqrt()
        if form == "norm":
            assert right > 0.95 and size < 10
        else:
            assert right < 0.4 and size > 10
