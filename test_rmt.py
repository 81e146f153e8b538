"""What rmt.py claims, in the order of a textbook.

    The loop       segments, states, and where gradient stops
    Equivalence    two ways to compute one thing agree
    Memory         what crosses a boundary, and who sees what
    Family         Transformer-XL, controller and bottleneck, associative memory
    At work        generation, attention maps, diagonals
    Errors         a mistake is one line with value, rule and fix
    Tasks, scripts, notebooks, learning

The models are as small as they can be, in float64, so that "equal" means equal but for the last
digits. A claim about every variant is tested over a table of models, MODELS, which holds all of
VARIANTS, so that a row you add there is tested for free. Some docstrings tell which mistake of
released code a test is there for.

    python -m pytest                 the fast tests
    python -m pytest -m slow         minutes of training, killed processes, whole notebooks
    python -m pytest -k Gradient     one chapter
"""
import ast
import copy
import csv
import dataclasses
import gzip
import hashlib
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types
import weakref
import zipfile
from contextlib import contextmanager
from functools import partial
from itertools import count, groupby
from pathlib import Path
from subprocess import CompletedProcess

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rmt
import train_copy
import train_lm
from assets import figures
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
    tree_leaves,
    tree_map,
    unroll,
    unroll_diagonal,
)

ROOT = Path(rmt.__file__).resolve().parent
READMES = [ROOT / "README.md", ROOT / "assets/results/README.md"]

# The sizes of all models here, by their letters in the glossary of rmt.py.
V, T, L, H, D, M, C = 11, 4, 2, 2, 16, 3, 5
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


class Recurrent(nn.Module):
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
        return hidden, n_calls

    def forward(self, x, layout, carry):
        hidden, n_calls = carry
        y, hidden = self.gru(x, hidden[None])
        return x + self.scale * y, (hidden[0], n_calls + 1)


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


PUBLISHED = list(VARIANTS)
VARIANTS["student"] = Variant(False, False, False, "causal", StudentBlock)
VARIANTS["student_rmt"] = Variant(True, True, True, "paper", StudentBlock)
# Combinations that no paper has: a cache beside read rows, and controllers that hand nothing on.
VARIANTS["mem_xl"] = Variant(True, False, False, "paper", CacheBlock, cache=True)
VARIANTS["mem_controller_alone"] = Variant(True, False, False, "paper", ControllerBlock)
VARIANTS["mem_bottleneck_causal"] = VARIANTS["mem_bottleneck"]._replace(mask="causal")

# Every model that a claim about all variants is tested on, and how build makes it.
MODELS = {name: {"variant": name} for name in VARIANTS}
MODELS["armt, published"] = {"variant": "armt", "update": "armt"}
MODELS["armt, hebbian"] = {"variant": "armt", "update": "hebbian"}
MODELS["mem_bottleneck, window"] = {"variant": "mem_bottleneck", "window": 1}
MODELS["mem_bottleneck_encoder, window"] = {"variant": "mem_bottleneck_encoder", "window": 1}
for name in ("transformer", "mem_transformer", "rmt", "rmt_encoder"):
    MODELS[f"{name} around a GRU"] = {"variant": name, "backbone": Recurrent}


def row(model_name):
    """The row of VARIANTS that a model has."""
    return VARIANTS[MODELS[model_name]["variant"]]


def with_own_carry(model_name):
    """Whether a state that learns crosses inside the layers."""
    carries = (AssociativeBlock, StudentBlock)
    return row(model_name).block in carries or MODELS[model_name].get("backbone") is Recurrent


CAUSAL = [name for name in MODELS if row(name).mask != "full"]
RECURRENT = [name for name in MODELS if row(name).recurrent]
GRADIENT_CROSSES = [name for name in MODELS if row(name).recurrent or with_own_carry(name)]
OURS = [name for name in MODELS if issubclass(row(name).block, rmt.Block)
        and "backbone" not in MODELS[name]]
DIAGONAL = [name for name in MODELS if not row(name).recurrent and "backbone" not in MODELS[name]]
TWO_STEPS = [name for name in VARIANTS
             if row(name).block in (ControllerBlock, BottleneckBlock)]


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
    torch.manual_seed(0)
    model = RMT(Config(**settings), backbone() if backbone else None).eval()
    with torch.no_grad():
        model.memory.normal_()
        model.write_embedding.normal_()
        for weight_name, weight in model.backbone.named_parameters():
            weight.mul_(1 + torch.rand_like(weight))
            if weight_name.endswith("w_v.weight"):  # it starts at zero
                weight.normal_(std=0.02)
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


# ----------------------------------------------------------------------------------------- the loop


class TestLoop:
    """A long sequence is read segment by segment, and the state is all that connects them."""

    def test_unroll_is_a_loop_over_segments(self):
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
    def test_a_run_that_stops_saves_its_state_and_goes_on_is_one_run(self, name, tmp_path):
        """The ARMT code keeps its state on the modules, lost on save. Here it is a value."""
        model = build(name)
        tokens = text(3 * T + 2)
        logits, end = unroll(model, tokens)
        first, state = unroll(model, tokens[:, :2 * T])
        torch.save(tuple(state), tmp_path / "state.pt")
        state = State(*torch.load(tmp_path / "state.pt"))
        second, state = unroll(model, tokens[:, 2 * T:], state)
        assert torch.equal(torch.cat([first, second], dim=1), logits)
        assert all(map(torch.equal, tree_leaves(state), tree_leaves(end)))

    @models(MODELS)
    def test_earlier_segments_count_through_the_state_alone(self, name):
        """In the original RMT code the Transformer-XL cache leaks from one sample into the next."""
        model = build(name)
        segment = text(T)
        alone, _ = model(segment)
        one = unroll(model, text(8, seed=1))[1]
        two = unroll(model, text(8, seed=2))[1]
        assert torch.equal(model(segment)[0], alone)
        something_crosses = model.state_floats() > 0
        assert torch.equal(model(segment, one)[0], model(segment, two)[0]) != something_crosses

        start = model.initial_state(2)
        one = one._replace(memory=start.memory)
        two = two._replace(memory=start.memory)
        something_is_carried = len(tree_leaves(one.carry)) > 0
        assert torch.equal(model(segment, one)[0], model(segment, two)[0]) != something_is_carried

    @models(MODELS)
    def test_sequences_of_a_batch_do_not_touch(self, name):
        """The released diagonal batching is right for a batch of one only."""
        model = build(name)
        tokens = text(11, batch_size=4)
        order = torch.tensor([2, 0, 3, 1])
        logits, state = unroll(model, tokens)
        permuted_logits, permuted_state = unroll(model, tokens[order])
        assert_close(permuted_logits, logits[order])
        assert_close(permuted_state, tree_map(lambda t: t[order], state))
        assert_close(unroll(model, tokens[:1])[0], logits[:1])

    @models(CAUSAL)
    def test_a_short_last_segment_equals_the_start_of_a_full_one(self, name):
        model = build(name)
        tokens = text(12)
        logits, _ = unroll(model, tokens)
        for length in (1, 3, 5, 10):
            assert_close(unroll(model, tokens[:, :length])[0], logits[:, :length])

    def test_tokens_of_every_integer_type_mean_the_same(self):
        model = build()
        logits, _ = unroll(model, text(11))
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
            assert torch.equal(unroll(model, text(11).to(dtype))[0], logits)
        bytes_model = build(vocab_size=256)  # which is no uint8: a comparison with it can wrap
        assert unroll(bytes_model, torch.tensor([[0, 255]], dtype=torch.uint8))[0].isfinite().all()


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


def gradients_by_pair(name, n_segments):
    """[s][t]: what the loss of segment s says to the weights that segment t used.

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


class TestGradient:
    """How far gradient reaches, exactly."""

    def test_truncated_bptt_cuts_here(self):
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
    def test_the_last_loss_reaches_exactly_bptt_depth_segments_back(self, name):
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
    def test_without_a_learning_state_no_gradient_crosses(self, name):
        """A Transformer-XL cache carries information and no gradient [TXL] sec. 3.2."""
        assert gradient_reach(build(name), 4, None) == [[0], [1], [2], [3]]

    @models(["rmt", "rmt_xl", "armt", "student_rmt"])
    def test_truncated_gradient_is_its_share_of_the_full_one(self, name):
        """The original RMT code replays k segments from the newest memory, not the k-th last."""
        model = build(name)
        pairs = gradients_by_pair(name, 5)
        for n_segments in range(1, 6):
            tokens = text(5 * T)[:, :n_segments * T]
            for bptt_depth in (0, 1, 2, 3, 4, None):
                logits, _ = unroll(model, tokens, bptt_depth=bptt_depth)
                loss_of(logits, tokens).backward()
                depth = 5 if bptt_depth is None else bptt_depth
                cuts = range(n_segments - 1 - depth, 0, -depth - 1)
                kept = []
                for s in range(n_segments):
                    for t in range(s + 1):
                        if not any(t < cut <= s for cut in cuts):
                            kept.append((s, t))
                assert_close(gradients_of(model), sum_over(pairs, kept), 1e-10)

    def test_the_two_other_meanings_of_depth_work_as_unroll_describes(self):
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

    @models(RECURRENT)
    def test_the_initial_memory_learns_at_every_depth(self, name):
        model = build(name)
        tokens = text(4 * T)
        for bptt_depth in (0, 1, None):
            loss_of(unroll(model, tokens, bptt_depth=bptt_depth)[0], tokens).backward()
            assert model.memory.grad is not None
            assert all(memory_row.any() for memory_row in model.memory.grad)
            model.zero_grad()

    @models(["armt", "armt, published", "armt, hebbian", "mem_transformer"])
    def test_memory_tokens_that_are_the_same_in_every_segment_learn(self, name):
        model = build(name)
        tokens = text(3 * T)
        loss_of(unroll(model, tokens)[0], tokens).backward()
        assert (model.memory.grad.abs().amax(dim=1) > 0).all()

    def test_detach_cuts_and_keeps_the_values(self):
        _, state = unroll(build("armt"), text(8))
        cut = state.detach()
        assert isinstance(cut, State)
        assert any(t.requires_grad for t in tree_leaves(state))
        assert not any(t.requires_grad for t in tree_leaves(cut))
        assert all(map(torch.equal, tree_leaves(cut), tree_leaves(state)))

    @models(MODELS)
    def test_checkpointed_gradients_equal_plain_ones(self, name):
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
            results.append([logits, *tree_leaves(state), *gradients_of(model)])
        assert_close(*results)


# -------------------------------------------------------------------------------------- equivalence


def attention_in_loops(layer, x, context, mask, rows_at, columns_at):
    """Weights (B, H, N, C + N) and output of an Attention layer, one score at a time.

    rows_at and columns_at are the positions of rows and columns. Rotary positions are written as
    sums of products: the score of a pair of channels is |q| |k| cos(angle between them).
    """
    E = D // H
    frequency = [10000.0 ** (-2 * pair / E) for pair in range(E // 2)]
    w_q, w_k, w_v = (w.weight.view(H, E, D) for w in (layer.query, layer.key, layer.value))

    def score(query, key, distance):
        total = 0.0
        for i, f in enumerate(frequency):
            a, b = query[2 * i], query[2 * i + 1]
            c, d = key[2 * i], key[2 * i + 1]
            cos, sin = math.cos(distance * f), math.sin(distance * f)
            total = total + (a * c + b * d) * cos - (b * c - a * d) * sin
        return (total / math.sqrt(E)).exp()

    weights = []
    for b, head, r in itertools.product(range(len(x)), range(H), range(x.size(1))):
        query = w_q[head] @ x[b, r]
        scores = []
        for column in range(context.size(1)):
            if mask[r, column]:
                key = w_k[head] @ context[b, column]
                scores.append(score(query, key, rows_at[r] - columns_at[column]))
            else:
                scores.append(torch.zeros(()))
        weights.append(torch.stack(scores) / sum(scores))
    weights = torch.stack(weights).view(len(x), H, x.size(1), -1)
    values = torch.einsum("bcd,hed->bhce", context, w_v)
    output = torch.einsum("bhnc,bhce->bnhe", weights, values).flatten(-2) @ layer.out.weight.T
    return weights, output


def positions(model, n_tokens, n_cache):
    """The positions of rows and columns, counted along a full cache."""
    first = model.n_read + model.n_cache
    read = list(range(model.n_read))
    others = list(range(first, first + n_tokens + model.n_write))
    return read + others, read + list(range(first - n_cache, first)) + others


def feed_forward(block, rows):
    """The feed-forward sublayer of a block in plain matrix products."""
    centred = rows - rows.mean(-1, keepdim=True)
    size = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = centred / size * block.norm_2.weight
    wide = normed @ block.mlp[0].weight.T
    gelu = wide * (1 + torch.erf(wide / math.sqrt(2))) / 2
    return rows + gelu @ block.mlp[2].weight.T


def memory_transformer_in_loops(model, x, window):
    """What [MT] says of controller and bottleneck, row by row: who sees whom in each step."""
    block = model.backbone.blocks[0]
    N = x.size(1)
    memory = [r for r in range(N) if r < model.n_read or r >= N - model.n_write]
    tokens = [r for r in range(N) if r not in memory]
    at, _ = positions(model, len(tokens), 0)

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
        mask[:, 0] |= ~mask.any(dim=1)  # rows that are not asked for must see something too
        h = layer.norm_1(x)
        attended = x + attention_in_loops(layer.attn, h, h, mask, at, at)[1]
        return {r: feed_forward(layer, attended[:, r]) for r in rows}

    def everyone(r, column):
        return True

    def memory_and_neighbours(r, column):
        return column in memory or (r != column and abs(r - column) <= window)

    new = update(getattr(block, "controller", block), memory, everyone)
    if isinstance(block, ControllerBlock):
        new |= update(block, tokens, everyone)
    else:
        x = torch.stack([new.get(r, x[:, r]) for r in range(N)], dim=1)  # memory is new already
        new |= update(block, tokens, memory_and_neighbours)
    return torch.stack([new[r] for r in range(N)], dim=1)


class TestEquivalence:
    """Two computations of one thing agree, in values and in gradients."""

    @pytest.mark.parametrize("name, n_cache", [
        ("transformer", 0), ("rmt", 0), ("rmt_causal", 0), ("rmt_encoder", 0),
        ("transformer_xl", 2), ("rmt_xl", 3), ("rmt_xl", C)])
    def test_attention_equals_loops_over_scores(self, name, n_cache):
        model = build(name)
        layer = model.backbone.blocks[0].attn
        layout = model.layout(3, n_cache)
        x = torch.randn(2, model.n_read + 3 + model.n_write, D, requires_grad=True)
        cache = torch.randn(2, n_cache, D, requires_grad=True)
        context = torch.cat([x[:, :model.n_read], cache, x[:, model.n_read:]], dim=1)
        actual = layer(x, context, layout)
        _, expected = attention_in_loops(
            layer, x, context, layout.mask, *positions(model, 3, n_cache))
        assert_close(actual, expected)
        direction = torch.randn_like(x)
        inputs = [x, cache, *layer.parameters()]
        assert_close(
            torch.autograd.grad(actual, inputs, direction, materialize_grads=True),
            torch.autograd.grad(expected, inputs, direction, materialize_grads=True))

    @models([name for name in VARIANTS if row(name).block is rmt.Block])
    def test_a_layer_equals_its_two_sublayers_in_matrix_products(self, name):
        model = build(name)
        block = model.backbone.blocks[0]
        layout = model.layout(3)
        x = torch.randn(2, model.n_read + 3 + model.n_write, D)
        h = block.norm_1(x)
        at, _ = positions(model, 3, 0)
        attended = x + attention_in_loops(block.attn, h, h, layout.mask, at, at)[1]
        assert_close(block(x, layout, ())[0], feed_forward(block, attended))

    @models(TWO_STEPS)
    @pytest.mark.parametrize("window", [0, 2])
    def test_controller_and_bottleneck_equal_the_papers_two_steps_row_by_row(self, name, window):
        model = build(name, window=window)
        block = model.backbone.blocks[0]
        x = torch.randn(1, model.n_read + T + model.n_write, D, requires_grad=True)
        with torch.no_grad():
            for weight_name, weight in block.named_parameters():
                if "norm" in weight_name:
                    weight.add_(torch.rand_like(weight))
        actual, carry = block(x, model.layout(T), ())
        expected = memory_transformer_in_loops(model, x, window)
        assert_close(actual, expected)
        assert carry == ()
        direction = torch.randn_like(x)
        inputs = [x, *block.parameters()]
        assert_close(torch.autograd.grad(actual, inputs, direction),
                     torch.autograd.grad(expected, inputs, direction))

    @pytest.mark.parametrize("split", [[11], [4, 4, 3], [1, 4, 2, 4], [1] * 11], ids=str)
    def test_transformer_xl_with_a_long_cache_equals_one_long_transformer(self, split):
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

    def test_rmt_around_a_gru_equals_a_loop_by_hand(self):
        model = build("rmt around a GRU")
        gru = model.backbone.gru
        tokens = text(3 * T)
        memory = model.memory.expand(2, -1, -1)
        hidden = torch.zeros(1, 2, D)
        pieces = []
        for segment in tokens.split(T, dim=1):
            rows = torch.cat([memory, model.embed.weight[segment], memory], dim=1)
            y, hidden = gru(rows, hidden)
            y = model.norm(rows + model.backbone.scale * y)
            memory = y[:, -M:]
            pieces.append(y[:, M:-M] @ model.head.weight.T)
        logits, state = unroll(model, tokens)
        assert_close([logits, state.memory], [torch.cat(pieces, dim=1), memory])
        assert_close(state.carry, (hidden[0], torch.full((2,), 3.0)))

    @models([name for name in MODELS if row(name).block is not AssociativeBlock])
    def test_nothing_stays_behind_when_a_model_moves(self, name):
        """On the device "meta" nothing is computed, and nothing of another device can take part."""
        model = build(name).to("meta")
        logits, state = model(text(T).to("meta"))
        assert {t.device.type for t in [logits, *tree_leaves(state)]} == {"meta"}

    @models(MODELS)
    @pytest.mark.parametrize("tied", [False, True])
    def test_copies_and_state_dicts_give_the_same_logits(self, name, tied):
        """Also where embedding and head share their matrix."""
        model, loaded = build(name), build(name)
        if tied:
            model.head.weight = model.embed.weight
            loaded.head.weight = loaded.embed.weight
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        loaded.load_state_dict(model.state_dict())
        for other in (loaded, copy.deepcopy(model)):
            assert torch.equal(unroll(other, text(11))[0], unroll(model, text(11))[0])
            assert (other.head.weight is other.embed.weight) == tied

    def test_positions_are_exact_whatever_the_default_dtype(self):
        """Angles in bfloat16 gave 1,000 and 1,001 the same position."""
        exact = rmt.rotary_table(1024, 8)
        torch.set_default_dtype(torch.bfloat16)
        table = build("transformer", segment_len=1024).rotary_table
        assert table.dtype == torch.bfloat16
        assert (table.double() - exact).abs().max() < 0.01

    @models(MODELS)
    def test_autocast_to_bfloat16_stays_close_to_float32(self, name):
        torch.set_default_dtype(torch.float32)
        model = build(name)
        model.init_weights(keep=("backbone.",) if "backbone" in MODELS[name] else ())
        tokens = text(15)
        expected, _ = unroll(model, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            logits, state = unroll(model, tokens, bptt_depth=1)
            loss = loss_of(logits, tokens)
        loss.backward()
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.06)
        assert all(t.isfinite().all() for t in [*tree_leaves(state), *gradients_of(model)])

    def test_parts_of_yours_keep_their_weights_and_ours_go_where_they_are(self):
        parts = {"backbone": Recurrent(), "embed": nn.Embedding(V, D), "head": nn.Linear(D, V)}
        config = build().config
        for part_name, part in parts.items():
            model = RMT(config, **{part_name: copy.deepcopy(part)})
            assert_close(dict(getattr(model, part_name).state_dict()), dict(part.state_dict()), 0)
            moved = RMT(config, **{part_name: copy.deepcopy(part).to(torch.bfloat16)})
            assert {p.dtype for p in moved.parameters()} == {torch.bfloat16}
            moved = RMT(config, **{part_name: copy.deepcopy(part).to("meta")})
            assert {p.device.type for p in moved.parameters()} == {"meta"}

    def test_a_head_of_yours_gets_rows_as_the_backbone_leaves_them(self):
        model = RMT(build(write_slot="embedding").config, head=nn.Linear(D, V)).eval()
        with calls(model.backbone, model.head) as seen:
            _, state = model(text(T))
        (_, (x, _)), ((rows,), _) = seen
        assert torch.equal(rows, x[:, M:-M])
        assert torch.equal(state.memory, x[:, -M:])

    @pytest.mark.parametrize("kind, variant", [
        ("GPT2", "rmt"), ("GPT2", "rmt_causal"), ("Llama", "rmt")])
    def test_memory_around_a_hugging_face_model_equals_a_loop_by_hand(self, kind, variant):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        readmes = "".join(path.read_text(encoding="utf-8") for path in READMES)
        adapter = re.search(r"from transformers.*?(?=\ngpt =)", readmes, re.DOTALL)[0]
        exec(adapter, namespace := {"torch": torch})
        sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3,
                 "num_attention_heads": 4, "attn_implementation": "sdpa",
                 "bos_token_id": 0, "eos_token_id": 0}
        if kind == "Llama":
            sizes |= {"intermediate_size": 40, "num_key_value_heads": 2}
        hf_config = getattr(transformers, f"{kind}Config")(**sizes)
        inner = transformers.AutoModelForCausalLM.from_config(hf_config).double().eval()
        embed, head = inner.get_input_embeddings(), inner.get_output_embeddings()
        config = Config(variant, vocab_size=V, d_model=D, segment_len=T, n_mem=M)
        model = RMT(config, namespace["HuggingFace"](inner.base_model), embed, head).eval()

        N = M + T + M
        allowed = torch.ones(N, N).tril().bool()
        bias = None  # these models are causal by themselves
        if variant == "rmt":
            allowed[:M, :M] = True
            allowed[-M:] = True
            bias = torch.zeros(2, 1, N, N).masked_fill(~allowed, -1e9)
        tokens = text(3 * T)
        memory = model.memory.expand(2, -1, -1)
        pieces = []
        for segment in tokens.split(T, dim=1):
            rows = torch.cat([memory, embed(segment), memory], dim=1)
            rows = inner.base_model(inputs_embeds=rows, attention_mask=bias).last_hidden_state
            memory = rows[:, -M:]
            pieces.append(head(rows[:, M:-M]))
        logits, state = unroll(model, tokens)
        assert_close([logits, state.memory], [torch.cat(pieces, dim=1), memory], 1e-6)
        new = generate(model, tokens, 2 * T, temperature=0)
        offline, _ = unroll(model, torch.cat([tokens, new], dim=1))
        assert torch.equal(new, offline[:, 3 * T - 1:-1].argmax(-1))
        weights, _ = attention_maps(model, tokens[:, :T])
        assert weights.shape == (3, 2, 4, N, N)
        assert torch.equal(weights.amax(dim=(0, 1, 2)) > 0, allowed)


# ------------------------------------------------------------------------------------------- memory

MASKS = {  # rows look, columns are seen: read, cache, tokens, write
    ("paper", 2, 1, 3, 2, None): """
        xx . ... ..
        xx . ... ..
        xx x x.. ..
        xx x xx. ..
        xx x xxx ..
        xx . xxx xx
        xx . xxx xx""",
    ("causal", 2, 1, 3, 2, None): """
        x. . ... ..
        xx . ... ..
        xx x x.. ..
        xx x xx. ..
        xx x xxx ..
        xx x xxx x.
        xx x xxx xx""",
    ("full", 1, 2, 2, 1, None): """
        x xx xx x
        x xx xx x
        x xx xx x
        x xx xx x""",
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
    ("causal", 1, 0, 3, 1, 0): """
        x ... .
        x ... .
        x ... .
        x ... .
        x xxx x""",
    ("full", 1, 0, 4, 0, 1): """
        x xxxx
        x .x..
        x x.x.
        x .x.x
        x ..x.""",
}


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


class TestMemory:
    """What crosses a boundary, what does not, and who sees it."""

    @pytest.mark.parametrize("form, n_read, n_cache, n_tokens, n_write, window", MASKS)
    def test_a_mask_equals_its_picture(self, form, n_read, n_cache, n_tokens, n_write, window):
        mask = segment_mask(n_read, n_cache, n_tokens, n_write, form, window)
        picture = MASKS[form, n_read, n_cache, n_tokens, n_write, window]
        drawn = ["".join("x" if may_look else "." for may_look in line) for line in mask.tolist()]
        assert drawn == picture.replace(" ", "").split()

    def test_masks_are_those_of_the_papers(self):
        forms = {name: VARIANTS[name].mask for name in PUBLISHED}
        causal = {name for name, form in forms.items() if form == "causal"}
        full = {name for name, form in forms.items() if form == "full"}
        assert causal == {"transformer", "transformer_xl", "rmt_causal", "armt"}
        assert full == {"rmt_encoder", "mem_controller_encoder", "mem_bottleneck_encoder"}

    @models(CAUSAL)
    def test_no_token_sees_the_future(self, name):
        changes = changes_of(build(name), text(11))
        assert [positions[0] for positions in changes] == list(range(11))

    @models([name for name in MODELS if row(name).mask == "full"
             and "backbone" not in MODELS[name]])
    def test_an_encoder_sees_its_whole_segment_and_no_later_one(self, name):
        changes = changes_of(build(name), text(11))
        assert [positions[0] for positions in changes] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8]

    @models([name for name in OURS if row(name).block not in (ControllerBlock, BottleneckBlock)])
    @pytest.mark.parametrize("n_before", [0, T, 3 * T])
    def test_who_looks_at_whom_is_what_the_papers_say(self, name, n_before):
        """And the maps that show it equal the loops above."""
        model = build(name)
        segment = text(3)
        state = unroll(model, text(n_before, seed=1))[1] if n_before else model.initial_state(2)
        layers = [block.attn for block in model.backbone.blocks]
        with calls(*layers) as seen:
            logits, _ = model(segment, state)
        attend = F.scaled_dot_product_attention
        weights, widths = attention_maps(model, segment, state)
        assert F.scaled_dot_product_attention is attend
        at = positions(model, 3, model.cached(state))
        expected = [attention_in_loops(layer, x, context, layout.mask, *at)[0]
                    for layer, ((x, context, layout), _) in zip(layers, seen, strict=True)]
        assert_close(weights, torch.stack(expected))
        assert widths == [model.n_read, min(n_before, model.n_cache), 3, model.n_write]
        assert torch.equal(model(segment, state)[0], logits)  # nothing was left behind

        if model.variant.mask == "full":
            assert (weights > 0).all()
            return
        looks = (weights > 0).flatten(0, 2).split([model.n_read, 3, model.n_write], dim=1)
        (read_by_read, *read_by_others), by_tokens, by_write = [
            rows.split(widths, dim=-1) for rows in looks]
        assert not any(block.any() for block in read_by_others)
        assert by_tokens[0].all() and by_tokens[1].all() and not by_tokens[3].any()
        assert (by_tokens[2] == torch.ones(3, 3).tril().bool()).all()
        assert by_write[0].all() and by_write[2].all()
        both_ways = model.variant.mask == "paper"
        assert not (both_ways and by_write[1].any())
        for block in (read_by_read, by_write[3]):
            n = block.size(-1)
            among = torch.ones(n, n).bool() if both_ways else torch.ones(n, n).tril().bool()
            assert (block == among).all()

    @models(TWO_STEPS)
    def test_maps_of_controller_and_bottleneck_have_the_memory_rows_of_the_first_step(self, name):
        model = build(name, window=1)
        segment = text(T)
        layers = []
        for block in model.backbone.blocks:
            layers.append([getattr(block, "controller", block).attn, block.attn])
        with calls(*{layer for pair in layers for layer in pair}) as seen:
            model(segment)
        weights, _ = attention_maps(model, segment)
        at, _ = positions(model, T, 0)
        rows = rmt.memory_rows(model.layout(T))
        rows_at = [at[r] for r in rows.tolist()]
        for i, (of_memory, of_all) in enumerate(layers):
            (x, context, layout), _ = seen[2 * i]  # the step of memory, then the step of all rows
            memory, _ = attention_in_loops(of_memory, x, context, layout.mask, rows_at, at)
            (x, context, layout), _ = seen[2 * i + 1]
            expected, _ = attention_in_loops(of_all, x, context, layout.mask, at, at)
            expected[:, :, rows] = memory
            assert_close(weights[i], expected)

    @pytest.mark.parametrize("n_layer, cache_len, reach", [(2, 4, 11), (3, 8, 27), (2, 2, 9)])
    def test_caches_of_all_layers_add_up_to_the_reach_of_transformer_xl(self, n_layer, cache_len,
                                                                        reach):
        """T - 1 + L C tokens if C is a multiple of T; T - 1 + (L - 1) T + C if it is below T."""
        model = build("transformer_xl", n_layer=n_layer, cache_len=cache_len)
        changes = changes_of(model, text(32))
        assert [p for p in range(32) if 31 in changes[p]] == list(range(31 - reach, 32))

    @models([name for name in VARIANTS if row(name).cache])
    @pytest.mark.parametrize("cache_len", [1, 4, 6])
    def test_a_cache_holds_the_last_inputs_of_its_layer_without_memory_or_gradient(self, name,
                                                                                   cache_len):
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

    @models(PUBLISHED)
    def test_a_state_has_as_many_floats_as_its_formula_says(self, name):
        row = VARIANTS[name]
        K = 2 * 3 * 4
        expected = 0
        if row.recurrent:
            expected += M * D
        if row.cache:
            expected += L * C * D
        if row.block is AssociativeBlock:
            expected += L * D * K
        _, state = unroll(build(name), text(12, batch_size=1))
        assert sum(t.numel() for t in tree_leaves(state)) == expected
        assert build(name).state_floats() == expected
        if name == "armt":
            assert build(name, update="armt").state_floats() == expected + L * K

    @models(PUBLISHED)
    @pytest.mark.parametrize("changes", [
        {"segment_len": 1, "n_mem": 1}, {"segment_len": 1, "cache_len": 1}, {"cache_len": 9},
        {"segment_len": 20, "n_mem": 7}], ids=str)
    def test_shapes_at_odd_sizes(self, name, changes):
        model = build(name, **changes)
        for batch_size in (1, 3):
            logits, state = unroll(model, text(10, batch_size))
            assert logits.shape == (batch_size, 10, V)
            assert logits.isfinite().all()
            n_mem = model.config.n_mem if model.variant.recurrent else 0
            assert state.memory.shape == (batch_size, n_mem, D)

    @models(RECURRENT)
    @pytest.mark.parametrize("memory_form", ["norm", "raw"])
    def test_the_next_memory_is_the_written_rows_normed_or_raw(self, name, memory_form):
        model = build(name, memory_form=memory_form)
        model.norm.weight.data.normal_()
        with calls(model.backbone) as seen:
            _, state = model(text(T))
        (_, (x, _)), = seen
        written = x[:, -M:] if model.n_write else x[:, :M]
        expected = model.norm(written) if memory_form == "norm" else written
        assert torch.equal(state.memory, expected)
        storage = state.memory.untyped_storage()
        assert storage.nbytes() == state.memory.nbytes  # a view would keep its whole segment alive

    def test_memory_is_bounded_for_a_thousand_segments_and_grows_where_it_is_raw(self):
        size = {}
        for memory_form, n_segments in (("norm", 1000), ("raw", 20), ("raw", 200)):
            model = build(segment_len=1, memory_form=memory_form)
            with torch.no_grad():
                _, state = unroll(model, text(n_segments, batch_size=1), last_only=True)
            size[memory_form, n_segments] = state.memory.square().mean().sqrt()
        assert size["norm", 1000] <= 1
        assert size["raw", 200] > 5 * size["raw", 20]

    @pytest.mark.parametrize("write_slot", ["memory", "embedding", "both"])
    def test_write_rows_are_fed_what_write_slot_names(self, write_slot):
        model = build(write_slot=write_slot)
        memory = torch.randn(2, M, D)
        fed = memory
        if write_slot == "embedding":
            fed = model.write_embedding.expand(2, M, D)
        if write_slot == "both":
            fed = memory + model.write_embedding
        expected = torch.cat([memory, model.embed(text(T)), fed], dim=1)
        assert torch.equal(model.wrap(text(T), memory), expected)

    @pytest.mark.parametrize("memory_form", ["norm", "raw"])
    def test_noise_has_one_size_per_sequence_up_to_its_fraction_of_the_rms(self, memory_form):
        model = build(d_model=64, memory_noise=0.3, memory_form=memory_form)
        written = torch.randn(1000, 16, 64) * torch.logspace(-1, 1, 16)[:, None]
        clean = model.eval().next_memory(written)
        noise = model.train().next_memory(written) - clean
        per_row = (noise.square().mean(-1) / clean.square().mean(-1)).sqrt()
        per_sequence = per_row.square().mean(-1).sqrt()
        assert per_sequence.max() < 0.3 * 1.1
        assert per_sequence.min() < 0.01
        assert abs(per_sequence.mean() - 0.15) < 0.01
        assert (per_row / per_sequence[:, None]).std() < 0.12

    def test_no_gradient_flows_through_the_size_of_the_noise(self):
        model = build(memory_noise=0.5, memory_form="raw").train()
        written = torch.randn(2, M, D, requires_grad=True)
        model.next_memory(written).sum().backward()
        assert_close(written.grad, torch.ones(2, M, D))

    @models(MODELS)
    def test_dropout_and_noise_act_in_training_alone(self, name):
        plain, _ = unroll(build(name), text(11))
        tries = [{"dropout": 0.5}]
        if row(name).recurrent:
            tries.append({"memory_noise": 0.5})
        if row(name).recurrent and tree_leaves(build(name).initial_state(1).carry):
            tries.append({"carry_dropout": 0.5})
        for changes in tries:
            model = build(name, **changes)
            assert torch.equal(unroll(model, text(11))[0], plain)
            model.train()
            assert not torch.allclose(unroll(model, text(11))[0], plain)

    @models(OURS)
    def test_dropout_acts_on_the_embedding_and_on_every_sublayer(self, name):
        model = build(name, dropout=0.5).train()
        sites = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        with calls(*sites) as seen:
            model(text(T))
        per_layer = 4 if row(name).block in (ControllerBlock, BottleneckBlock) else 2
        assert len(seen) == 1 + L * per_layer
        for (given,), made in seen:
            assert (made == 0).sum() > (given == 0).sum()

    def test_carry_dropout_takes_the_whole_carry_of_some_sequences(self):
        """It forces rmt_xl to use its memory: with its cache at hand, it would not learn to."""
        model = build("rmt_xl", carry_dropout=0.4).train()
        carry = tree_map(lambda t: torch.ones(1000, C, D), model.initial_state(1).carry)
        left = torch.stack(tree_leaves(model.drop_carry(carry)))           # (L, 1000, C, D)
        kept = left.flatten(2).mean(-1)
        assert set(kept.unique().tolist()) == {0.0, 1.0}                   # all of it, or nothing
        assert (kept == kept[0]).all()                                     # in all layers alike
        assert abs(kept.mean() - 0.6) < 0.05
        assert model.eval().drop_carry(carry) is carry
        assert build("transformer_xl", carry_dropout=0.4).train().drop_carry(carry) is carry

    @models([name for name in VARIANTS if row(name).read])
    def test_initial_memory_rows_differ(self, name):
        """In the original RMT code all memory tokens start as one vector."""
        config = build(name).config
        assert torch.pdist(RMT(config).memory.detach()).min() > 0.02

    def test_weights_start_at_the_size_that_init_weights_gives_them(self):
        model = RMT(Config("mem_controller", d_model=64, n_mem=64, vocab_size=64, n_layer=3,
                           write_slot="both"))
        plain = 0.7 / math.sqrt(64)
        block = model.backbone.blocks[2].controller
        expected = {
            model.memory: 0.02,
            model.write_embedding: 0.02,
            model.embed.weight: 0.5,
            model.head.weight: plain,
            block.attn.query.weight: plain,
            block.attn.value.weight: plain,
            block.attn.out.weight: plain / math.sqrt(6),
            block.mlp[0].weight: plain,
            block.mlp[2].weight: plain / 2 / math.sqrt(6),
        }
        for weight, size in expected.items():
            assert abs(weight.std() / size - 1) < 0.05
        assert (block.norm_1.weight == 1).all()


# ------------------------------------------------------------------------------------------- family


class TestMemoryTransformer:
    """Controller and bottleneck: the rest is in the loops above."""

    @pytest.mark.parametrize("n_layer, window", [(1, 0), (2, 0), (1, 2), (2, 1)])
    def test_tokens_of_a_bottleneck_see_each_other_through_the_window_only(self, n_layer, window):
        """Windows of layers add up. In the next segment memory brings back everything."""
        model = build("mem_bottleneck", n_layer=n_layer, window=window, segment_len=8)
        changes = changes_of(model, text(16))
        for position in range(8):
            near = range(position, min(8, position + n_layer * window + 1))
            assert changes[position] == [*near, *range(8, 16)]


@pytest.fixture
def cell():
    """A function that makes a layer whose write row is [key | value], cut out by W_k and W_v."""
    def make(update, d_assoc=4, n_value=D - 4):
        config = Config("armt", d_model=d_assoc + n_value, n_head=1, d_assoc=d_assoc, n_mem=1,
                        update=update)
        block = AssociativeBlock(config)
        identity = torch.eye(d_assoc + n_value)
        with torch.no_grad():
            block.w_k.weight.copy_(identity[:d_assoc])
            block.w_q.weight.copy_(identity[:d_assoc])
            block.w_v.weight.copy_(identity.roll(d_assoc, 1))  # the value comes first
            block.w_b.weight.zero_()
            block.w_b.bias.fill_(50)  # beta = 1
        return block
    return make


def written(block, keys, values, carry=None):
    """The carry after one write per step: keys (steps, d_assoc), values (steps, n_value)."""
    if carry is None:
        carry = block.initial_carry(1)
    for key, value in zip(keys, values, strict=True):
        carry = block.write(torch.cat([key, value])[None, None], *carry)
    return carry


def read(block, keys, carry):
    """What the memory says of keys (n, d_assoc): (n, n_value)."""
    d_assoc = keys.size(1)
    rows = F.pad(keys, (0, block.w_v.weight.size(1) - d_assoc))[None]
    return block.read(block.features(block.w_q(rows)), *carry)[0, :, :-d_assoc]


def reads_of_a_rewritten_key(block):
    """One key is written 1, 2, 3, 4, 5: what the memory says of it after each write."""
    key = torch.randn(1, 4)
    carry = None
    seen = []
    for value in range(1, 6):
        carry = written(block, key, torch.full((1, D - 4), float(value)), carry)
        seen.append(read(block, key, carry)[0, 0].item())
    return seen


def associative_in_loops(block, x, n_write, carry):
    """One associative layer as papers.md has it, one row and one sum at a time.

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
                known = (z @ k).item()
                gamma = 1 - (known + eps) / ((k @ k).item() + eps)
                if known == 0:
                    gamma = 1.0
                new_z = new_z + min(max(gamma, 0), 1) * k
        carries.append((new_A, new_z))
    return torch.stack(reads), tuple(torch.stack(part) for part in zip(*carries, strict=True))


UPDATES = {"delta": "armt", "armt": "armt, published", "hebbian": "armt, hebbian"}


@pytest.mark.parametrize("update", UPDATES)
class TestAssociativeLayer:
    """One layer of ARMT against its equations."""

    def test_reads_writes_and_their_gradients_equal_the_equations_in_loops(self, update):
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
            for said, after in (actual, expected):
                loss = said.sin().sum() + sum(t.sin().sum() for t in after)
                gradients = torch.autograd.grad(loss, weights, retain_graph=True,
                                                materialize_grads=True)
                results.append([said, *after, *gradients])
            assert_close(*results, tolerance=1e-10)

    def test_a_layer_reads_before_its_first_norm_and_writes_what_comes_out(self, update):
        model = build(UPDATES[update])
        block = model.backbone.blocks[0]
        layout = model.layout(T)
        x = torch.randn(2, T + M, D)
        _, carry = block(x.flip(1), layout, block.initial_carry(2))
        y, after = block(x, layout, carry)
        said, _ = associative_in_loops(block, x, M, carry)
        plain, _ = rmt.Block.forward(block, x + said, layout, ())
        _, expected = associative_in_loops(block, plain, M, carry)
        assert_close([y, *after], [plain, *expected], tolerance=1e-10)
        part = layout._replace(n_tokens=T + M, n_write=0)
        _, after = block(x, part, carry)
        assert all(map(torch.equal, after, carry))  # a part of a segment writes nothing

    def test_an_empty_memory_says_nothing_and_the_order_of_write_rows_does_not_count(self, update):
        model = build(UPDATES[update])
        for block, carry in zip(model.backbone.blocks, model.initial_state(2).carry, strict=True):
            assert not block.read(block.features(torch.randn(2, 5, 4)), *carry).any()
            once = block.write(torch.randn(2, 6, D), *carry)
            m = torch.randn(2, 6, D)
            assert_close(block.write(m, *once), block.write(m.flip(1), *once))

    def test_a_key_written_1_to_5_reads_1_to_5_but_in_hebbian_their_sum(self, update, cell):
        expected = [1, 3, 6, 10, 15] if update == "hebbian" else [1, 2, 3, 4, 5]
        assert reads_of_a_rewritten_key(cell(update)) == pytest.approx(expected, rel=1e-2)

    def test_sixteen_keys_are_rewritten_500_times_but_in_hebbian(self, update, cell):
        """Each time with one of ten values. A read is right if the last value is nearest."""
        torch.manual_seed(0)
        block = cell(update, d_assoc=32, n_value=32)
        keys = torch.randn(16, 32)
        symbols = F.normalize(torch.randn(10, 32), dim=1)
        which = torch.randint(16, (500,))
        values = torch.randint(10, (500,))
        last = dict(zip(which.tolist(), values.tolist(), strict=True))
        carry = written(block, keys[which], symbols[values])
        answers = (read(block, keys, carry) @ symbols.T).argmax(dim=1)
        right = sum(answers[key] == value for key, value in last.items()) / len(last)
        assert right < 0.5 if update == "hebbian" else right > 0.8

    def test_untrained_it_leaves_the_plain_model(self, update):
        torch.manual_seed(0)
        model = RMT(Config("armt", **SIZES, update=update))
        plain = RMT(Config("transformer", **SIZES))
        plain.load_state_dict(model.state_dict() | {"memory": plain.memory}, strict=False)
        tokens = text(5 * T)
        logits, state = unroll(model, tokens)
        assert_close(logits, unroll(plain, tokens)[0])
        assert not any(A.any() for A, _ in state.carry)
        for block in model.backbone.blocks:
            assert torch.equal(block.w_q.weight, block.w_k.weight)  # it looks where it would write


class TestAssociativeMemory:
    """What holds for one rule of ARMT alone."""

    def test_dpfp_multiplies_what_is_positive(self):
        """x = (2, -3): r = (2, 0, 0, 3), times its neighbours one, two and three places before."""
        features = rmt.feature_map(torch.tensor([2.0, -3.0]), 3)
        assert features.tolist() == [6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6]

    def test_without_gamma_a_key_cannot_be_rewritten(self, cell, monkeypatch):
        block = cell("armt")
        monkeypatch.setattr(block, "newness", lambda k, z: torch.ones(1, 1, 1))
        expected = [1, 1, 4 / 3, 5 / 3, 2]
        assert reads_of_a_rewritten_key(block) == pytest.approx(expected, rel=1e-2)

    def test_delta_stays_bounded_where_many_write_rows_have_alike_keys(self):
        """All rows correct the same old A. Unshared, their steps add up, and 32 of them explode."""
        torch.manual_seed(0)
        block = build("armt", n_mem=32).backbone.blocks[0]
        with torch.no_grad():
            block.w_v.weight.normal_(std=0.7 / math.sqrt(D))
        carry = block.initial_carry(1)
        alike = torch.randn(1, 1, D) + 0.3 * torch.randn(1, 32, D)
        with torch.no_grad():
            for _ in range(1000):
                carry = block.write(alike + 0.1 * torch.randn(1, 32, D), *carry)
        assert carry[0].abs().max() < 5

    def test_a_published_key_is_new_where_nothing_like_it_was_written(self):
        """[ARMT] eq. 2 has no eps: gamma is exactly 1 there, also for short keys."""
        block = build("armt, published").backbone.blocks[0]
        short_key = 0.01 * torch.rand(1, 1, 24)
        assert block.newness(short_key, torch.zeros(1, 24)).item() == 1
        assert 0 < block.newness(short_key, short_key[0] / 2).item() < 1

    def test_z_never_decreases_and_the_memory_stays_in_float32_under_autocast(self):
        torch.set_default_dtype(torch.float32)
        model = build("armt, published")
        state = model.initial_state(2)
        for segment in text(20 * T).split(T, dim=1):
            with torch.autocast("cpu", torch.bfloat16):
                logits, later = model(segment, state)
            for (_, before), (_, after) in zip(state.carry, later.carry, strict=True):
                assert (after >= before).all()
            state = later
        assert logits.dtype == torch.bfloat16
        assert {t.dtype for t in tree_leaves(state.carry)} == {torch.float32}
        block = model.backbone.blocks[0]
        phi = torch.rand(2, 5, 24)
        with torch.autocast("cpu", torch.bfloat16):
            said = block.read(phi, *state.carry[0])
        assert said.dtype == torch.float32
        assert torch.equal(said, block.read(phi, *state.carry[0]))
        carry = model.bfloat16().initial_state(1).carry
        assert {t.dtype for t in tree_leaves(carry)} == {torch.float32}


# ------------------------------------------------------------------------------------------ at work


class TestGeneration:
    """New tokens, one row each."""

    @models(CAUSAL)
    @pytest.mark.parametrize("n_prompt", [1, T, T + 1, 2 * T + 1])
    def test_streaming_generation_equals_offline_argmax(self, name, n_prompt):
        """Later RMT code goes on behind the write tokens, and never hands memory on meanwhile.

        One offline pass is enough: a short segment equals the start of a full one, see above.
        """
        model = build(name)
        prompt = text(n_prompt)
        for state in (None, unroll(model, text(8, seed=1))[1]):
            new = generate(model, prompt, 3 * T, state, temperature=0)
            logits, _ = unroll(model, torch.cat([prompt, new], dim=1), state)
            assert torch.equal(new, logits[:, n_prompt - 1:-1].argmax(-1))

    @models([name for name in OURS if name in CAUSAL])
    def test_a_new_token_costs_one_row_and_a_new_segment_one_pass(self, name):
        """Later RMT code computes all segments again for every new token."""
        model = build(name)
        n_read = model.n_read
        n = n_read + T + model.n_write
        with calls(model.backbone) as seen:
            generate(model, text(2), 3 * T - 1, temperature=0)
        rows = [given[0].size(1) for given, _ in seen]
        first, later = [n_read + 2, *[1] * (T - 2)], [n_read + 1, *[1] * (T - 1)]
        assert rows == [*first, n, *later, n, *later]

    def test_stream_keeps_no_graph_and_no_logits_of_the_prompt(self):
        model = build()
        seen = []
        alive = []

        def watch(head, given, logits):
            assert not logits.requires_grad
            seen.append(weakref.ref(logits))
            alive.append(sum(ref() is not None for ref in seen))

        model.head.register_forward_hook(watch)
        next(stream(model, text(10 * T), temperature=0))
        assert len(seen) == 10
        assert max(alive) <= 2

    @pytest.mark.parametrize("temperature, top_k", [(1, None), (0.3, None), (2, 5), (1, 99)])
    def test_sampling_follows_the_softmax_of_the_most_likely_tokens(self, temperature, top_k):
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

    def test_top_k_1_takes_one_token_also_among_ties(self):
        logits = torch.zeros(500, V)
        drawn = rmt.sample(logits, 1.0, 1, torch.Generator().manual_seed(0))
        assert len(drawn.unique()) == 1

    def test_the_same_generator_seed_gives_the_same_text(self):
        texts = []
        for seed in (1, 1, 2):
            generator = torch.Generator().manual_seed(seed)
            texts.append(generate(build(), text(6), 30, generator=generator))
        assert torch.equal(texts[0], texts[1])
        assert not torch.equal(texts[0], texts[2])


class TestDiagonal:
    """Segments and layers side by side [DB]."""

    @models(DIAGONAL)
    @pytest.mark.parametrize("n_layer, length", [(1, 12), (3, 3), (3, 8), (3, 29)])
    def test_diagonals_equal_the_loop_over_segments(self, name, n_layer, length):
        """The released code is exact for one sequence, and takes one bias for all layers."""
        model = build(name, n_layer=n_layer)
        tokens = text(length)
        _, before = unroll(model, text(T + 1, seed=1))
        for start, bptt_depth in ((None, None), (before, None), (before, 0), (None, 2)):
            results = []
            for run in (unroll, unroll_diagonal):
                given = None
                if start is not None:
                    given = tree_map(lambda t: t.detach().requires_grad_(), start)
                logits, end = run(model, tokens, given, bptt_depth)
                loss = loss_of(logits, tokens) + sum(t.sin().sum() for t in tree_leaves(end))
                loss.backward()
                inputs = [] if given is None else tree_leaves(given)
                gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
                results.append([logits, *tree_leaves(end), *gradients, *gradients_of(model)])
                for t in tree_leaves(end.carry):  # no views of a whole diagonal
                    assert t.untyped_storage().nbytes() == t.nbytes
            assert_close(*results, tolerance=1e-10)

    @models(["armt", "transformer_xl", "student"])
    def test_options_and_a_mixture_with_unroll_give_the_same_numbers(self, name):
        model = build(name)
        tokens = text(50, batch_size=3)
        results = []
        diagonal = unroll_diagonal
        for first, second in ((unroll, unroll), (diagonal, unroll), (unroll, diagonal)):
            for options in ({}, {"checkpoint": True}, {"last_only": True}):
                logits, state = first(model, tokens[:, :4 * T], **options)
                more, state = second(model, tokens[:, 4 * T:], state, **options)
                loss_of(more[:, -2:], tokens[:, -2:]).backward()
                results.append([logits[:, -T:], more[:, -2:], *tree_leaves(state),
                                *gradients_of(model)])
                if "last_only" in options:
                    assert (logits.size(1), more.size(1)) == (T, 2)
        for result in results[1:]:
            assert_close(result, results[0], tolerance=1e-10)

    @pytest.mark.parametrize("n_segments, n_layer", [(1, 3), (2, 4), (6, 2)])
    def test_every_segment_meets_every_layer_once_in_s_plus_l_minus_1_steps(self, n_segments,
                                                                            n_layer, monkeypatch):
        model = build("armt", n_layer=n_layer)
        tokens = text(n_segments * T)
        with calls(*model.backbone.blocks) as cells:  # in the order of the loop
            unroll(model, tokens)
        diagonals = []
        side_by_side = rmt.side_by_side

        def recorded(blocks):
            layer = side_by_side(blocks)
            layer.register_forward_pre_hook(
                lambda _, given: diagonals.append((layer.norm_1.weight, given[0])))
            return layer

        monkeypatch.setattr(rmt, "side_by_side", recorded)
        unroll_diagonal(model, tokens)
        assert len(diagonals) == n_segments + n_layer - 1
        for step, (norms, x) in enumerate(diagonals):
            busy = [layer for layer in range(n_layer) if 0 <= step - layer < n_segments]
            for norm, rows, layer in zip(norms, x.split(2), busy, strict=True):
                (expected, *_), _ = cells[(step - layer) * n_layer + layer]
                assert_close(rows, expected)
                assert torch.equal(norm, model.backbone.blocks[layer].norm_1.weight)

    @pytest.mark.parametrize("n_cached, alone", [(0, 2), (1, 1), (2, 0), (9, 0)])
    def test_only_segments_before_a_full_cache_run_alone(self, n_cached, alone):
        """Two segments of 4 fill a cache of 5."""
        model = build("transformer_xl")
        state = unroll(model, text(n_cached * T))[1].detach() if n_cached else None
        with calls(model.backbone) as seen:
            unroll_diagonal(model, text(9 * T), state)
        assert len(seen) == alone


# ------------------------------------------------------------------------------------------- errors


class Returning(nn.Module):
    """A backbone that returns what a function makes of its rows."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def initial_carry(self, batch_size):
        return ()

    def forward(self, x, layout, carry):
        return self.made(x), carry


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


for name, block in {"gated": Gated, "rows_first": RowsFirst}.items():
    VARIANTS[name] = VARIANTS["student"]._replace(block=block)
    MODELS[name] = {"variant": name}


def unlike_layers():
    """A model with one layer that is not like the others."""
    model = build("transformer")
    model.backbone.blocks[1].mlp[1] = nn.ReLU()
    return model


def segment_of(tokens, state=None, name="rmt"):
    """Run one segment."""
    return build(name)(tokens, state)


def state_of(name="rmt", batch_size=2, **changes):
    """The state of some model after 20 tokens."""
    return unroll(build(name, **changes), text(20, batch_size))[1]


def not_finite():
    """Generate with a model whose training went wrong."""
    model = build()
    model.head.weight.data.fill_(math.nan)
    return generate(model, text(3), 1)


ERRORS = [  # a mistake, and what its message must say
    (lambda: Config(n_mem=8.0), "n_mem=8.0 must be an integer of at least 0"),
    (lambda: Config(n_layer=0), "n_layer=0 must be an integer of at least 1"),
    (lambda: Config(vocab_size=True), "vocab_size=True must be an integer of at least 1"),
    (lambda: Config(dropout=1.0), "dropout=1.0 must be a number from 0 to below 1"),
    (lambda: Config(memory_noise="1"), "memory_noise='1' must be a number from 0 to below inf"),
    (lambda: Config(carry_dropout=-1), "carry_dropout=-1 must be a number from 0 to below 1"),
    (lambda: Config(memory_form="sum"), "memory_form='sum' must be one of norm, raw"),
    (lambda: Config(write_slot="read"), "write_slot='read' must be one of memory, embedding, both"),
    (lambda: Config(update="hebb"), "update='hebb' must be one of delta, armt, hebbian"),
    (lambda: Config(d_model=18), "d_model=18 must be divisible by 2 * n_head=8"),
    (lambda: Config(nu=4, d_assoc=4), "nu=4 must be below d_assoc=4"),
    (lambda: RMT(Config("lstm")), "variant='lstm' must be one of transformer, mem_transformer"),
    (lambda: build(n_mem=0), "n_mem=0 must be at least 1 for 'rmt'"),
    (lambda: build("armt", n_mem=0), "n_mem=0 must be at least 1 for 'armt'"),
    (lambda: build("rmt_xl", cache_len=0), "cache_len=0 must be at least 1 for 'rmt_xl'"),
    (lambda: build("armt", backbone=Recurrent), "'armt' has layers of its own: give a backbone to"),
    (lambda: segment_mask(1, 0, 1, 1, "bidirectional"), "mask form 'bidirectional' must be"),
    (lambda: segment_of([[1, 2]]), "tokens are list and must be integers, as in torch.tensor("),
    (lambda: segment_of(torch.rand(2, 3)), "tokens are torch.float64 and must be integers"),
    (lambda: segment_of(text(3) > 5), "tokens are torch.bool and must be integers"),
    (lambda: segment_of(text(3)[0]), "tokens have shape (3,) and must be (batch, length)"),
    (lambda: unroll(build(), text(0)), "tokens have shape (2, 0) and must be (batch, length)"),
    (lambda: segment_of(torch.tensor([[3, 11]])), "tokens reach from 3 to 11, and vocab_size=11"),
    (lambda: unroll(build(), torch.tensor([[-1, 4]])), "tokens reach from -1 to 4, and vocab_size"),
    (lambda: segment_of(text(5)), "a segment of 5 tokens is longer than segment_len=4: give long"),
    (lambda: segment_of(text(3), tuple(state_of())), "state is a tuple and must be a State: start"),
    (lambda: segment_of(text(3), state_of(batch_size=3)), "start from model.initial_state(2)"),
    (lambda: segment_of(text(3), state_of(n_mem=2)), "shapes [(2, 2, 16)] does not fit 'rmt'"),
    (lambda: segment_of(text(3), state_of("rmt_xl")), "does not fit 'rmt' with 2 sequences"),
    (lambda: segment_of(text(3), state_of(), "rmt_xl"), "does not fit 'rmt_xl' with 2 sequences"),
    (lambda: segment_of(text(3), state_of("rmt_xl", n_layer=3), "rmt_xl"), "does not fit 'rmt_xl'"),
    (lambda: segment_of(text(3), state_of("rmt_xl", cache_len=6), "rmt_xl"), "does not fit"),
    (lambda: segment_of(text(3), state_of("armt", nu=2), "armt"), "does not fit 'armt' with 2"),
    (lambda: segment_of(text(3), state_of("armt, published"), "armt"), "does not fit 'armt'"),
    (lambda: segment_of(text(3), state_of(n_layer=3)), "does not fit 'rmt' with 2 sequences"),
    (lambda: segment_of(text(3), State(None, ())), "a state holds a NoneType and must"),
    (lambda: segment_of(text(3), tree_map(torch.Tensor.float, state_of())), "is torch.float32 and"),
    (lambda: unroll(build(), text(3), bptt_depth=-1), "bptt_depth=-1 must be None (gradient"),
    (lambda: unroll(build(), text(3), bptt_depth=True), "bptt_depth=True must be None (gradient"),
    (lambda: RMT(build().config, Returning(lambda x: x[:, 1:]))(text(T)),
     "the backbone turns rows (2, 10, 16) into (2, 9, 16): it must keep their shape"),
    (lambda: generate(build(), text(3), 0), "n_new=0 must be an integer of at least 1"),
    (lambda: generate(build(), text(3), 1, temperature=-1), "temperature=-1 must be 0 (the most"),
    (lambda: generate(build(), text(3), 1, temperature=1e-45), "a finite number from 1e-4 up"),
    (lambda: generate(build(), text(3), 1, top_k=0), "top_k=0 must be None or an integer above 0"),
    (lambda: generate(build("rmt_encoder"), text(3), 1), "sees whole segments and cannot generate"),
    (not_finite, "the model's logits are not finite: were its weights trained with too large a"),
    (lambda: attention_maps(build("rmt around a GRU"), text(3)),
     "attention_maps needs layers that call F.scaled_dot_product_attention, and these do not"),
    (lambda: unroll_diagonal(build(), text(3)), "the memory of 'rmt' goes from a segment's last"),
    (lambda: unroll_diagonal(build("transformer around a GRU"), text(3)), "Recurrent may have"),
    (lambda: unroll_diagonal(build("gated"), text(3)), "a Gated of this layer has other weights"),
    (lambda: unroll_diagonal(build("rows_first"), text(9)), "a layer gave (4, 2, 16) to a Linear"),
    (lambda: unroll_diagonal(unlike_layers(), text(3)), "needs layers that differ in the weights"),
    (lambda: unroll_diagonal(build("armt"), text(3), bptt_depth=-1), "bptt_depth=-1 must be None"),
    (lambda: unroll_diagonal(build("armt"), text(3), state_of("armt", 3)), "does not fit 'armt'"),
]


class TestErrors:
    """A mistake is refused at the border, with its value and what to do instead."""

    @pytest.mark.parametrize("mistake, message", ERRORS, ids=[message for _, message in ERRORS])
    def test_a_message_names_the_value_and_the_fix(self, mistake, message):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
            mistake()
        assert "\n" not in str(error.value)


# ==================================================================================================
# Tasks and scripts, and how scripts are run here

WORDS = "import the memory of a segment, and read it: (what) was 'written' in line 1, 2 or 30?\nSo"
TEXT = " ".join(random.Random(0).choices(WORDS.split(" "), k=5000))[:20_000]
TINY = "--batch 4 --steps 30 --n-mem 2 --d-model 16"
COPY = f"{TINY} --segments 6 --segment-len 4 --curriculum random --eval-segments 9"
LANGUAGE = (f"{TINY} --data a.txt --segment-len 8 --cache-len 5 --reset-every 7 --eval-every 10 "
            "--length 20")
both_scripts = pytest.mark.parametrize(
    "script, flags", [(train_copy, COPY), (train_lm, LANGUAGE)], ids=["train_copy", "train_lm"])


def arguments(script, flags=""):
    """The settings that a script reads from these flags, on the CPU; it writes to this folder."""
    args = script.parse(shlex.split(flags))
    args.device = "cpu"
    args.out = "."
    return args


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, empty but for a text of 20,000 bytes; scripts choose the CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that are started
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def run_here(folder, capsys):
    """A function that runs a script in this process: to start another one takes seconds."""

    def run(script, flags, expected_status=0):
        torch.set_default_dtype(torch.float32)
        source = Path(script.__file__).read_text(encoding="utf-8")
        last_lines = source.split('if __name__ == "__main__":\n')[1]
        capsys.readouterr()
        status = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script.__file__, *shlex.split(flags)])
            try:
                exec(textwrap.dedent(last_lines), vars(script))
            except SystemExit as end:
                status = end.code
            except Exception:
                traceback.print_exc()
                status = 1
        out, error = capsys.readouterr()
        assert status == expected_status, error
        return CompletedProcess(flags, status, out, error)

    return run


def start_process(script, flags, options=(), **environment):
    """Start a script as a user would: python OPTIONS SCRIPT FLAGS."""
    path = script if isinstance(script, str) else script.__file__
    return subprocess.Popen(
        [sys.executable, *options, path, *shlex.split(flags)], text=True, encoding="utf-8",
        errors="replace", env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end_process(process, expected_status=0):
    """Wait for a process that was started."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == expected_status, error
    return CompletedProcess(process.args, process.returncode, out, error)


def contents():
    """All files and folders below the current folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def checkpoint(name, model="rmt"):
    """What a run has saved of a model; it must be whole."""
    return torch.load(Path(name) / f"{model}.pt", weights_only=True)


def results(name):
    """The scores of the run in a folder."""
    return json.loads((Path(name) / "result.json").read_text())["results"]


def assert_one_line(run, words):
    """The script ended with one line that says what is wrong."""
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert words in run.stderr


def assert_same_run(one, other):
    """Two folders hold the same weights, to the last bit, and the same numbers along the way."""
    models = sorted(path.stem for path in Path(one).glob("*.pt"))
    assert models == sorted(path.stem for path in Path(other).glob("*.pt"))
    for model in models:
        saved, others = checkpoint(one, model), checkpoint(other, model)
        assert saved["rows"] == others["rows"] != []
        for key, weight in saved["model"].items():
            assert torch.equal(weight, others["model"][key])
    assert Path(one, "metrics.csv").read_text() == Path(other, "metrics.csv").read_text()


def learn(optimizer, learning_rate, logits, targets):
    """One step of training, as everybody writes it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def assert_same_training(model, by_hand, optimizer):
    """The weights, and the means of the gradients: Adam does not see how large gradients are."""
    saved = checkpoint(".")["optimizer"]["state"]
    pairs = zip(model.parameters(), by_hand.parameters(), strict=True)
    for i, (trained, weight) in enumerate(pairs):
        assert_close(trained, weight, 1e-9)
        assert_close(saved[i]["exp_avg"], optimizer.state[weight]["exp_avg"], 1e-9)


# ------------------------------------------------------------------------------------------- tasks

TASKS = {  # flags, the words that no sample holds (blanks are for encoders), and chance
    "copy": ("--segments 6 --segment-len 4", "? _", 1 / 10),
    "reverse": ("--segments 4 --segment-len 4", "? _", 1 / 10),
    "retrieval": ("--segments 4 --segment-len 6", "_", 1 / 10),
    "remember": ("--segments 9 --segment-len 3", "| ? _", 1 / 10),
    "rewrite": ("--segments 9 --segment-len 3 --keys 64", "| ? _", 1 / 10),
    "memorize": ("--segments 5 --segment-len 8", "_", 1 / 10),
    "detect": ("--segments 5 --segment-len 8", "_", 1 / 10),
    "facts": ("--segments 5 --segment-len 12", "| ? _", 1 / 6),
    "quadratic": ("--segments 6 --segment-len 30", "| ?", 1 / 10),  # the share of 2 and of =
}
QUESTION = {"retrieval": 2, "remember": 1}  # the words of a question, before its answer


def task_arguments(task, flags="", **settings):
    """The settings of a task, of sizes that fit."""
    args = arguments(train_copy, f"--task {task} {TASKS[task][0]} {flags}")
    vars(args).update(settings, eval_segments=[])
    train_copy.check_lengths(args)
    return args


def draw(args, batch=64, seed=0):
    """Samples of a task: the words of each, and which of them are answers."""
    task = train_copy.TASKS[args.task]
    generator = torch.Generator().manual_seed(seed)
    tokens, is_answer = task.draw(args, args.segments, batch, generator)
    words = task.words(args)
    return [[words[token] for token in row] for row in tokens.tolist()], is_answer.tolist()


def solve(task, shown, n, T):
    """The answer of n words to what is shown, and the segments in which it was found.

    By a reader who knows nothing of how samples are made.
    """
    if task in ("copy", "reverse"):
        source = shown[:shown.index("|")]
        return source * 2 if task == "copy" else source[::-1], set()
    if task in ("memorize", "detect"):
        start = shown.index("|") + 1
        return shown[start:start + n], {start // T}
    if task in ("retrieval", "remember", "rewrite"):
        known = {}
        for start in range(0, len(shown) - 2, T):
            key, *value = shown[start:start + T]
            assert task == "rewrite" or key not in known
            known[key] = [word for word in value if word != "|"], {start // T}
        return known[shown[-2] if task == "retrieval" else shown[-1]]
    *sentences, question = " ".join(shown).split(" . ")
    moves = [i for i, sentence in enumerate(sentences) if not sentence.startswith("the")]
    at = {}
    for i in moves:
        person, went, to, the, place = sentences[i].split()  # mary went to the garden
        assert (went, to, the) == ("went", "to", "the")
        at[person] = place
    return [at[question.split()[-1]]], {i * 6 // T for i in moves}


def left_side(equation, x):
    """The value of the left side of an equation of the task quadratic."""
    return eval(equation.removesuffix("=0").replace("^", "**"), {"x": x})


class TestTasks:
    """The tasks ask for what their docstrings show."""

    @pytest.mark.parametrize("task", TASKS)
    def test_a_sample_is_one_of_many_holds_all_words_and_is_guessed_by_chance(self, task):
        """Chance is what the best constant guess gets right, of all that is scored."""
        _, unused, chance = TASKS[task]
        args = task_arguments(task)
        samples, is_answer = draw(args, batch=500)
        assert draw(args)[0] == draw(args)[0] != draw(args, seed=1)[0]
        seen = {word for sample in samples for word in sample}
        assert seen == set(train_copy.TASKS[task].words(args)) - set(unused.split())
        answers = []
        for sample in samples:
            answers += [word for word, scored in zip(sample, is_answer, strict=True)
                        if scored and word != "_"]
        if task not in ("facts", "quadratic"):
            assert set(answers) == set("0123456789")
        best = max(answers.count(word) for word in set(answers)) / len(answers)
        assert best == pytest.approx(chance, abs=0.035)

    @pytest.mark.parametrize("task", train_copy.TASKS)
    def test_every_recipe_fits_its_task_and_builds(self, task):
        args = arguments(train_copy, f"--task {task}")
        assert vars(args).items() >= train_copy.TASKS[task].recipe.items()
        train_copy.check_lengths(args)
        model = train_copy.build(args, args.model)
        assert model.config.vocab_size == len(train_copy.TASKS[task].words(args))
        assert train_copy.training_lengths(args)[-1] == args.segments

    @pytest.mark.parametrize("task, flags", [
        *((task, "") for task in TASKS if task != "quadratic"),
        ("remember", "--segments 2 --segment-len 2 --keys 1"),
        ("rewrite", "--segments 40 --keys 200"),
    ])
    def test_the_answer_follows_from_what_was_shown(self, task, flags):
        """It can be in every segment but the last one, and in memorize in the first alone."""
        args = task_arguments(task, flags)
        samples, is_answer = draw(args, batch=500)
        start, end = train_copy.first_answer(torch.tensor(is_answer))
        found = set()
        for sample in samples:
            answer, segments = solve(task, sample[:start], end - start, args.segment_len)
            assert answer == sample[start:end]
            found |= segments
        nowhere_or_first = {"copy": set(), "reverse": set(), "memorize": {0}}
        assert found == nowhere_or_first.get(task, set(range(args.segments - 1)))

    @pytest.mark.parametrize("task", QUESTION)
    def test_every_pair_is_asked_about_once_in_any_order(self, task):
        args = task_arguments(task)
        T, n_pairs = args.segment_len, args.segments - 1
        samples, is_answer = draw(args)
        orders = set()
        for sample in samples:
            pairs = [sample[i * T:(i + 1) * T] for i in range(2 * n_pairs)]
            asked = []
            for question in pairs[n_pairs:]:
                shown = sample[:n_pairs * T] + question[:QUESTION[task]]
                answer, (segment,) = solve(task, shown, None, T)
                assert question[QUESTION[task]:][:len(answer)] == answer
                asked.append(segment)
            assert sorted(asked) == list(range(n_pairs))
            orders.add(tuple(asked))
        assert len(orders) > 5
        in_a_question = is_answer[n_pairs * T:][:T]
        assert in_a_question.index(True) == QUESTION[task]
        assert sum(in_a_question) == len(answer)
        assert is_answer == [False] * n_pairs * T + in_a_question * n_pairs

    def test_quadratic_equations_are_solved_in_six_fields(self):
        samples, is_answer = draw(task_arguments("quadratic"))
        assert is_answer == [False] * 30 + [True] * 150
        n_unsolved = 0
        for sample in samples:
            line = "".join(sample)
            fields = [line[start:start + 30].rstrip("_") for start in range(0, 180, 30)]
            given, monic, discriminant, *formulas, answer = fields
            a = (left_side(given, 1) + left_side(given, -1)) // 2 - left_side(given, 0)
            assert 1 <= abs(a) <= 10
            for x in (-1, 0, 1):
                assert left_side(given, x) == a * left_side(monic, x)
            q = left_side(monic, 0)
            p = left_side(monic, 1) - 1 - q
            assert discriminant == f"D={p * p - 4 * q}"
            if p * p < 4 * q:
                n_unsolved += 1
                assert {*formulas, answer} == {"none"}
                continue
            roots = [int(root) for root in answer.split(",")]
            assert -100 <= roots[0] <= roots[1] <= 100
            for formula, root in zip(formulas, roots, strict=True):
                assert left_side(given, root) == left_side(monic, root) == 0
                _, fraction, value = formula.split("=")  # x=(98-86)/2=6
                assert eval(fraction) == int(value) == root
        assert 5 <= n_unsolved <= 25

    def test_a_task_of_your_own_is_a_function_and_a_row(self, run_here, monkeypatch):
        def sort(args, segments, batch, generator):
            shape = batch, segments // 2 * args.segment_len
            source = train_copy.draw_symbols(args, shape, generator)
            mark = torch.full((batch, 1), train_copy.MARK)
            tokens = torch.cat([source, mark, source.sort(dim=1).values], dim=1)
            return train_copy.ends_with(source.size(1), tokens)

        row = train_copy.Task(sort, train_copy.symbols, {"segments": 4, "steps": 9}, multiple=2)
        monkeypatch.setitem(train_copy.TASKS, "sort", row)
        shown = run_here(train_copy, "--task sort --help").stdout
        assert "quadratic, sort" in " ".join(shown.split())
        assert "(default: 9)" in shown
        run = run_here(train_copy, "--task sort --segment-len 3 --baseline none")
        lines = run.stdout.splitlines()
        source = next(line for line in lines if "input" in line).split()[1]
        right = next(line for line in lines if "right  " in line).split()[1]
        assert source[-1] == "|" and sorted(source[:-1]) == [*right]
        assert checkpoint("out/sort-1")["flags"]["task"] == "sort"
        run_here(train_copy, "--resume out/sort-1 --steps 11")
        assert checkpoint("out/sort-1")["step"] == 11
        monkeypatch.delitem(train_copy.TASKS, "sort")
        assert_one_line(run_here(train_copy, "--resume out/sort-1", 2),
                        "holds a run of the task sort, which is not in TASKS")

        monkeypatch.setitem(train_copy.TASKS, "sort", row._replace(recipe={"segmens": 4}))
        assert_one_line(run_here(train_copy, "--task sort", 2),
                        "the recipe of --task sort names flags that do not exist: segmens")
        monkeypatch.setitem(train_copy.TASKS, "sort", row._replace(multiple=3))
        misfit = run_here(train_copy, "--task sort --segments 9 --segment-len 3", 2)
        assert_one_line(misfit, "--task sort over 9 segments of 3 tokens: the first answer must "
                                "end within 25 to 27 tokens, and ends after 24")


# -------------------------------------------------------------------------------------- train_copy


def train_beside_a_copy(args, variant, weight_decay):
    """A model that was trained; what it was before, with all that a loop by hand needs."""
    by_hand = train_copy.build(args, variant)
    model, run = train_copy.train(args, variant)
    optimizer = torch.optim.AdamW(
        by_hand.parameters(), betas=(0.9, 0.98), weight_decay=weight_decay)
    return model, run, by_hand, optimizer, torch.Generator().manual_seed(0)


def let_it_say(model, token):
    """A model of width 16 writes this token then, whatever it reads."""
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias = nn.Parameter(torch.ones(16))
        model.head.weight[token] = 1.0


@pytest.mark.usefixtures("folder")
class TestTrainCopy:
    """Samples, training and evaluation of train_copy.py equal what can be done by hand."""

    @pytest.mark.parametrize("variant", ["rmt", "rmt_encoder"])
    @pytest.mark.parametrize("task", ["copy", "retrieval"])
    def test_targets_are_the_next_tokens_and_an_encoder_fills_in_blanks(self, task, variant):
        args = task_arguments(task)
        model = build(variant)
        generator = torch.Generator().manual_seed(0)
        inputs, targets = train_copy.sample(args, model, args.segments, 5, generator)
        draw_tokens = train_copy.TASKS[task].draw
        tokens, is_answer = draw_tokens(args, args.segments, 5, generator.manual_seed(0))
        assert torch.equal(targets[:, is_answer[1:]], tokens[:, is_answer])
        assert (targets[:, ~is_answer[1:]] == train_copy.NO_TARGET).all()
        hidden = is_answer[:-1] if variant == "rmt_encoder" else torch.zeros_like(is_answer[:-1])
        assert torch.equal(inputs[:, ~hidden], tokens[:, :-1][:, ~hidden])
        assert (inputs[:, hidden] == train_copy.BLANK).all()

    @pytest.mark.parametrize("depth, cuts", [
        ("", []), ("--bptt-depth 0", [1, 2, 3, 4, 5]), ("--bptt-depth 1", [2, 4])])
    def test_training_equals_a_loop_by_hand(self, depth, cuts):
        flags = f"{COPY} --segment-len 2 --steps 60 --curriculum fixed {depth}"
        args = arguments(train_copy, flags)
        model, _, by_hand, optimizer, generator = train_beside_a_copy(args, "rmt", 0.01)
        for step in range(60):
            torch.randint(1, (), generator=generator)  # the curriculum chooses among one length
            tokens, _ = train_copy.copy(args, 6, 4, generator)
            state = by_hand.initial_state(4)
            outputs = []
            for s, segment in enumerate(tokens[:, :-1].split(2, dim=1)):
                if s in cuts:
                    state = state.detach()
                logits, state = by_hand(segment, state)
                outputs.append(logits)
            answers = torch.cat(outputs, dim=1)[:, -8:]
            rate = 4e-3 * min((step + 1) / 50, (60 - step) / 30)
            learn(optimizer, rate, answers, tokens[:, -8:])
        assert_same_training(model, by_hand, optimizer)

    def test_all_answers_are_trained_and_nothing_between_them(self):
        flags = f"{TINY} --steps 60 --segments 4 --segment-len 3 --curriculum fixed"
        args = arguments(train_copy, f"--task remember --model rmt --write-slot both {flags}")
        model, _, by_hand, optimizer, generator = train_beside_a_copy(args, "rmt", 1.0)
        for step in range(60):
            torch.randint(1, (), generator=generator)  # the curriculum chooses among one length
            tokens, _ = train_copy.remember(args, 4, args.batch, generator)
            logits, _ = unroll(by_hand, tokens[:, :-1])
            places = [9, 10, 12, 13, 15, 16]  # three pairs; then three times key, value, value
            rate = 3e-3 * min((step + 1) / 50, (60 - step) / 30)
            learn(optimizer, rate, logits[:, places], tokens[:, 1:][:, places])
        assert_same_training(model, by_hand, optimizer)

    @pytest.mark.parametrize("curriculum, unlocked, share_of_each", [
        ("fixed", 1, {6: 1.0}),
        ("random", 3, {2: 1 / 3, 4: 1 / 3, 6: 1 / 3}),
        ("grow", 1, {2: 1.0}),
        ("grow", 3, {2: 0.15, 4: 0.15, 6: 0.7}),
    ])
    def test_the_curriculum_chooses_the_lengths(self, curriculum, unlocked, share_of_each):
        """Once all lengths are unlocked, `grow` practises shorter ones in 30 % of the steps."""
        args = arguments(train_copy, f"{COPY} --task reverse --curriculum {curriculum} --steps 1")
        _, run = train_copy.train(args, "rmt")
        assert run.unlocked == (1 if curriculum == "grow" else len(share_of_each))
        lengths = train_copy.training_lengths(args)[:unlocked]
        generator = torch.Generator().manual_seed(0)
        chosen = [train_copy.choose_length(args, lengths, generator) for _ in range(2000)]
        for n in (2, 4, 6):
            assert chosen.count(n) / 2000 == pytest.approx(share_of_each.get(n, 0), abs=0.04)

    def test_longer_samples_are_unlocked_when_the_longest_ones_go_well(self):
        """Shorter ones may be forgotten, and longer ones have not been seen yet."""
        args = arguments(train_copy, f"{COPY} --task reverse --segments 8 --curriculum grow")
        args.steps = 1
        train_copy.train(args, "rmt")
        saved = checkpoint(".")
        assert saved["unlocked"] == 1
        args.steps = 2
        for right, unlocked in [({4: 0.9}, 3), ({2: 0.9}, 2), ({6: 0.9}, 2), ({4: 0.7}, 2)]:
            changed = {"unlocked": 2, "right": dict.fromkeys((2, 4, 6, 8), 0.0) | right}
            torch.save(saved | changed, "rmt.pt")
            _, run = train_copy.train(args, "rmt")
            assert run.unlocked == unlocked

    @pytest.mark.parametrize("task, T", [("copy", 2), ("retrieval", 5)])
    @pytest.mark.parametrize("variant", ["rmt", "rmt_xl", "rmt_encoder"])
    def test_evaluation_equals_a_loop_by_hand(self, task, T, variant):
        """Of the first answer. With two symbols, an untrained model gets some of them right."""
        args = arguments(train_copy, f"--task {task} --symbols 2 --segments 3 --segment-len {T}")
        model = build(variant, vocab_size=5, segment_len=T)
        with torch.no_grad():  # it answers in symbols, most often the one that it has just read
            model.embed.weight.normal_()
            model.head.weight.zero_()
            model.head.weight[3] = model.embed.weight[3] - model.embed.weight[4]
            model.head.weight[4] = -model.head.weight[3]
        scores, (inputs, targets, answers) = train_copy.evaluate(args, model, 3)
        start, n = {"copy": (2, 4), "retrieval": (11, 2)}[task]
        generator = torch.Generator().manual_seed(2**31)
        drawn, _ = train_copy.sample(args, model, 3, 128, generator)
        assert torch.equal(inputs, drawn[:, :start + n])
        tokens, _ = train_copy.TASKS[task].draw(args, 3, 128, generator.manual_seed(2**31))
        assert torch.equal(targets, tokens[:, start + 1:start + n + 1])

        forced = unroll(model, inputs)[0][:, start:].argmax(-1)
        free = forced
        if variant != "rmt_encoder":  # which writes all of its answer at once
            written = inputs[:, :start + 1]
            for _ in range(n):
                new = unroll(model, written)[0][:, -1:].argmax(-1)
                written = torch.cat([written, new], dim=1)
            free = written[:, -n:]
            assert not torch.equal(free, forced)
        assert torch.equal(answers, free)
        whole = [row == target for row, target in zip(free.tolist(), targets.tolist(), strict=True)]
        assert scores == pytest.approx({
            "teacher_forced": (forced == targets).double().mean().item(),
            "free_running": (free == targets).double().mean().item(),
            "whole_answers": sum(whole) / 128})
        assert 0 < scores["whole_answers"] < scores["free_running"]

    def test_blanks_of_an_equation_are_no_part_of_the_scores(self):
        """Of the answers of quadratic, two thirds are blanks, which every model learns first."""
        args = task_arguments("quadratic", f"{TINY} --steps 1 --lr 0")
        model = train_copy.build(args, "rmt")
        let_it_say(model, train_copy.BLANK)
        scores, (_, targets, answers) = train_copy.evaluate(args, model, 6, free=False)
        assert (answers == train_copy.BLANK).all()
        assert (targets == train_copy.BLANK).double().mean() > 0.5
        assert scores["teacher_forced"] == scores["free_running"] == 0
        assert train_copy.share_right(answers, targets) == 0

    def test_outputs_between_answers_are_no_part_of_the_scores(self):
        answers = torch.tensor([[3, 4, 5, 6]])
        targets = torch.tensor([[3, train_copy.NO_TARGET, 9, 6]])
        assert train_copy.share_right(answers, targets) == pytest.approx(2 / 3)

    def test_a_model_that_overflows_beyond_its_lengths_is_scored_all_the_same(self):
        args = arguments(train_copy, COPY)
        model = train_copy.build(args, "rmt")
        with torch.no_grad():
            model.head.weight.fill_(math.nan)
        scores, _ = train_copy.evaluate(args, model, 6)
        assert scores["teacher_forced"] == scores["free_running"] == 0

    def test_controls_equal_loops_by_hand(self, run_here):
        """A control that passes the state on untouched would tell that memory is worth nothing."""
        run_here(train_copy, COPY + " --steps 100 --baseline none --out a")
        args = arguments(train_copy, COPY)
        model = train_copy.build(args, "rmt")
        model.load_state_dict(checkpoint("a")["model"])
        _, (inputs, targets, _) = train_copy.evaluate(args, model, 6)
        another = torch.arange(len(inputs)) - 1
        seen = [results("a")["rmt"]["6"]["teacher_forced"]]
        for control in ("its initial state at every boundary", "the state of another sample"):
            state = model.initial_state(len(inputs))
            outputs = []
            for segment in inputs.split(4, dim=1):
                if control == "the state of another sample":
                    state = state._replace(memory=state.memory[another])
                else:
                    state = model.initial_state(len(inputs))
                logits, state = model(segment, state)
                outputs.append(logits)
            right = torch.cat(outputs, dim=1)[:, -16:].argmax(-1) == targets
            assert results("a")[control] == pytest.approx(right.double().mean().item())
            seen.append(results("a")[control])
        assert len(set(seen)) == 3

    def test_evaluation_never_draws_the_samples_of_training(self):
        """A CPU generator keeps 32 bits of its seed: seed + 2**32 was the stream of training."""
        args = arguments(train_copy, "--segment-len 4 --seed 7")
        model = build(vocab_size=13)
        _, (evaluated, _, _) = train_copy.evaluate(args, model, 3, free=False)
        trained, _ = train_copy.sample(args, model, 3, 128, torch.Generator().manual_seed(7))
        assert not torch.equal(evaluated, trained)

    def test_the_target_is_for_the_worst_trained_length(self, run_here, monkeypatch):
        evaluate = train_copy.evaluate

        def pretend(args, model, segments, *arguments, **options):
            scores, samples = evaluate(args, model, segments, *arguments, **options)
            return scores | {"teacher_forced": {3: 0.5, 6: 0.9, 9: 0.1}[segments]}, samples

        monkeypatch.setattr(train_copy, "evaluate", pretend)
        flags = COPY + " --steps 1 --baseline none"
        missed = run_here(train_copy, flags + " --target 0.6", expected_status=1)
        assert "target 0.6: MISSED, rmt gets at least 0.500 right" in missed.stdout
        assert "target 0.5: reached" in run_here(train_copy, flags + " --target 0.5").stdout

    def test_a_caret_marks_each_mistake(self, capsys):
        args = arguments(train_copy, "--task remember")
        right, answers = torch.tensor([[5]] * 3), torch.tensor([[5], [4], [13]])
        train_copy.print_examples(args, torch.tensor([[13, 5, 14]] * 3), right, answers)
        lines = capsys.readouterr().out.splitlines()
        assert lines[2:6] == ["    input   k0 2 k1", "    right   2", "    model   2", " " * 13]
        assert lines[8:10] == ["    model   1", " " * 12 + "^"]
        assert lines[12:14] == ["    model   k0", " " * 12 + "^^"]


# ---------------------------------------------------------------------------------------- train_lm


def language_arguments(flags=""):
    """The settings of train_lm.py for models of the sizes above."""
    sizes = f"--segment-len {T} --d-model {D} --n-head {H} --n-mem {M} --cache-len {C} --batch 4"
    return arguments(train_lm, f"{sizes} --reset-every 5 {flags}")


@torch.no_grad()
def bits_by_hand(model, tokens, boundary="carried"):
    """Bits of every token, (streams, length), from probabilities, one stream after another.

    boundary  what the state is there: carried, reset, or of another stream
    """
    T = model.config.segment_len
    n = max(1, min(64, (len(tokens) - 1) // (32 * T)))
    length = (len(tokens) - 1) // n
    bits = torch.zeros(n, length)
    states = [model.initial_state(1)] * n
    for start in range(0, length, T):
        end = min(start + T, length)
        if boundary == "reset":
            states = [model.initial_state(1)] * n
        elif boundary == "of another stream":
            states = states[-1:] + states[:-1]
        for i in range(n):
            stream = tokens[i * length:(i + 1) * length + 1].long()
            logits, states[i] = model(stream[None, start:end], states[i])
            for place, probabilities in enumerate(logits[0].softmax(-1), start):
                bits[i, place] = -math.log2(probabilities[stream[place + 1]])
    return bits


def saved_model(name, variant):
    """A trained model, and its vocabulary."""
    saved = checkpoint(name, variant)
    model = RMT(Config(**saved["config"])).eval()
    model.load_state_dict(saved["model"])
    return model, saved["vocabulary"]


@pytest.mark.usefixtures("folder")
class TestTrainLM:
    """Training, evaluation, reports and samples of train_lm.py equal what can be done by hand."""

    @pytest.mark.parametrize("depth", ["", "--bptt-depth 0"])
    def test_training_equals_a_loop_by_hand(self, depth):
        """The state is carried from step to step, detached; every fifth step starts anew."""
        args = language_arguments(f"--steps 16 {depth}")
        raw = TEXT[:500].encode()  # 450 for training: 4 streams of 112, which are 14 steps of 8
        parsed = train_lm.Text(raw)
        by_hand = train_lm.build(args, "rmt", len(parsed.vocabulary))
        model, _ = train_lm.train(args, "rmt", parsed)

        optimizer = torch.optim.AdamW(by_hand.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        numbers = torch.tensor([parsed.vocabulary.index(byte) for byte in raw[:450]])
        streams = torch.stack([numbers[i * 112:(i + 1) * 112 + 1] for i in range(4)])
        for step in range(16):
            place = step % 14 * 2 * T
            tokens = streams[:, place:place + 2 * T + 1]
            if step in (0, 5, 10, 14, 15):
                state = by_hand.initial_state(4)
            first, state = by_hand(tokens[:, :T], state)
            if depth:
                state = state.detach()
            second, state = by_hand(tokens[:, T:2 * T], state)
            state = state.detach()
            rate = 0.012 * min((step + 1) / 50, (1 + math.cos(math.pi * step / 16)) / 2)
            learn(optimizer, rate, torch.cat([first, second], dim=1), tokens[:, 1:])
        assert_same_training(model, by_hand, optimizer)

    def test_bfloat16_rounds(self, run_here):
        for flags in ("--out exact", "--out rounded --bf16"):
            run_here(train_lm, f"{LANGUAGE} --baseline none --steps 1 {flags}")
        exact, rounded = checkpoint("exact")["bits"], checkpoint("rounded")["bits"]
        assert 0 < abs(exact - rounded) < 0.05

    @pytest.mark.parametrize("variant", ["transformer", "rmt", "rmt_xl"])
    @pytest.mark.parametrize("length", [9, 64 * T + 1, 1001])
    def test_evaluation_equals_a_loop_over_streams(self, variant, length):
        """Also on a text shorter than a stream, and on streams that end within a segment."""
        model = build(variant)
        tokens = text(length, 1)[0].to(torch.uint8)
        bits = bits_by_hand(model, tokens)
        scores = train_lm.evaluate(language_arguments(), model, tokens)
        assert scores["bits_per_byte"] == pytest.approx(bits.mean().item(), rel=1e-9)
        for place in range(T):
            by_hand = bits[:, place::T].mean().item()
            assert scores["by_position"][place] == pytest.approx(by_hand, rel=1e-9)

    @pytest.mark.parametrize("variant", ["transformer", "rmt", "armt"])
    def test_a_run_reports_bits_of_the_test_part_by_hand(self, variant, run_here):
        """With the state carried, reset at every boundary, and taken from another stream."""
        run_here(train_lm, f"{LANGUAGE} --model {variant} --baseline none --out a")
        model, vocabulary = saved_model("a", variant)
        test = TEXT.encode()[19_000:]
        tokens = torch.tensor([vocabulary.index(byte) for byte in test])
        scores = results("a")[variant]
        seen = set()
        for boundary in {"carried", "reset", "of another stream"} & set(scores):
            seen.add(scores[boundary]["bits_per_byte"])
            bits = bits_by_hand(model, tokens, boundary).mean().item()
            assert scores[boundary]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert len(seen) == {"transformer": 1, "rmt": 3, "armt": 3}[variant]
        valid = torch.tensor([vocabulary.index(byte) for byte in TEXT.encode()[18_000:19_000]])
        bits = bits_by_hand(model, valid).mean().item()
        assert checkpoint("a", variant)["rows"][-1]["valid_bits"] == pytest.approx(bits, rel=1e-5)
        sample = Path("a/sample.txt").read_bytes()
        assert sample[:16] == test[:16] and len(sample) == 16 + 20

    def test_a_sample_is_what_generate_writes(self, run_here):
        run_here(train_lm, LANGUAGE + " --out a")
        for name, temperature, top_k in [("rmt", 0.0, 5), ("transformer", 0.0, 5), ("rmt", 2.0, 3)]:
            flags = f"--model {name} --length 100 --temperature {temperature} --top-k {top_k}"
            sample = run_here(train_lm, f"--sample a {flags} --prompt 'import t' --seed 7")
            model, vocabulary = saved_model("a", name)
            prompt = torch.tensor([[vocabulary.index(byte) for byte in b"import t"]])
            generator = torch.Generator().manual_seed(7)
            new = generate(model, prompt, 100, None, temperature, top_k, generator)[0]
            written = bytes(vocabulary[token] for token in new).decode()
            assert sample.stdout == f"import t{written}\n"
        texts = []
        for seed in (1, 1, 2):
            texts.append(run_here(train_lm, f"--sample a --length 50 --seed {seed}").stdout)
        assert texts[0] == texts[1] != texts[2]
        assert len(texts[0]) == 1 + 50 + 1  # a first byte, those written, the end of the line
        other = run_here(train_lm, "--sample a --model armt", 2)
        assert_one_line(other, "--sample a has no checkpoint of --model armt")
        cold = run_here(train_lm, "--sample a --temperature 1e-9", 2)
        assert_one_line(cold, "temperature=1e-09 must be 0 (the most likely token)")

    def test_bytes_are_called_bytes_and_bits_per_character_are_reported_too(self, run_here):
        """147,688 "characters" of Chinese were 50,810."""
        letters = "\u8bb0\u5fc6\u7f51\u7edc\u5b66\u4e60"  # of three bytes each
        chinese = "".join(random.Random(0).choices(letters, k=3000))
        Path("chinese.txt").write_text(chinese, encoding="utf-8")
        Path("french.txt").write_text((TEXT[:98] + "\u00e9 ") * 200, encoding="utf-8")
        Path("latin.txt").write_text((TEXT[:98] + "\u00e9 ") * 200, encoding="latin-1")
        ratios = {"chinese": 3.0, "french": 1.01, "latin": None}
        for name, ratio in ratios.items():
            flags = f"{LANGUAGE} --data {name}.txt --baseline none --steps 5 --out {name}"
            run = run_here(train_lm, flags)
            found = results(name)["bytes_per_character"]
            row = next(line for line in run.stdout.splitlines() if "carried" in line)
            if ratio is None:
                assert found is None and row.endswith("not UTF-8")
            else:
                assert found == pytest.approx(ratio, rel=1e-3)
                per_byte, per_character = map(float, row.split()[-2:])
                assert per_character == pytest.approx(ratio * per_byte, abs=0.003)
            for written in (run.stdout, Path(name, "metrics.csv").read_text()):
                assert "characters" not in written and "byte" in written
        sample = run_here(train_lm, f"--sample chinese --length 30 --prompt {letters}").stdout
        assert sample.startswith(letters)


@pytest.mark.usefixtures("folder")
class TestTexts:
    """Where the texts of train_lm.py come from, and how they are cut."""

    def test_a_text_is_cut_in_three_and_has_the_bytes_of_its_first_part(self):
        parsed = train_lm.Text(b"ab" * 450 + b"abc" * 16 + b"ad" + b"b" * 50)
        assert parsed.vocabulary == b"ab"
        assert parsed.n_unseen == 16 + 1
        assert parsed.train.tolist() == [0, 1] * 450
        assert parsed.decode(parsed.valid) == b"ab" * 16 + b"a"
        assert parsed.test.tolist() == [1] * 50
        rows = train_lm.streams(torch.arange(100), 3)  # each ends where the next one begins
        assert rows.tolist() == [list(range(0, 34)), list(range(33, 67)), list(range(66, 100))]

    def test_references_equal_counts_by_hand(self):
        """Counts begin at 1, so that no pair of the test part is impossible."""
        raw = TEXT.encode()[:4000]
        train, test = raw[:3600], raw[3800:]
        parsed = train_lm.Text(raw)
        V = len(parsed.vocabulary)
        unigram = bigram = 0
        for i in range(199):
            a, b = test[i], test[i + 1]
            n_pairs = sum(train[j] == a and train[j + 1] == b for j in range(3599))
            unigram -= math.log2((V + train[1:].count(b)) / (V * V + 3599)) / 199
            bigram -= math.log2((1 + n_pairs) / (V + train[:-1].count(a))) / 199
        assert train_lm.references(parsed) == pytest.approx({
            "uniform": math.log2(V), "unigram": unigram, "bigram": bigram,
            "gzip -9": 8 * len(gzip.compress(test, 9)) / 200})

    def test_the_default_text_is_the_standard_library_without_its_tests(self):
        raw = train_lm.read(["python"])
        places = [raw.index(Path(module.__file__).read_bytes()) for module in (gzip, json, shlex)]
        assert places == sorted(places)
        assert b"class CmdLineTest(" not in raw
        assert Path(pytest.__file__).read_bytes() not in raw

    def test_every_content_is_read_once_in_the_order_given_and_sorted_inside_a_folder(
            self, folder, capsys):
        """A file that is read twice is in the test part and in the training part."""
        files = {"b/z": "4", "b/c/y": "3", "b/.hidden": "no", "b/.git/z": "no", "x": "1",
                 "b/empty": "", "empty": ""}
        for name, content in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(content)
        assert train_lm.read(["x", "b", "empty"]) == b"134"
        assert train_lm.read(["x", "x", "./x", "b/../x", str(folder / "x")]) == b"1"
        assert train_lm.read(["b/z", "b", "b/c"]) == b"43"
        assert capsys.readouterr().out == ""
        Path("b/copy of y.txt").write_text("3")
        assert train_lm.read(["b"]) == b"34"
        words = "b/copy of y.txt is left out: it has the same content as b/c/y"
        assert words in capsys.readouterr().out.replace(os.sep, "/")
        Path("b/out/lm-1").mkdir(parents=True)
        Path("b/out/lm-1/config.json").write_text("of a run that was started in this folder")
        assert train_lm.read(["b"]) == b"34"

    def test_a_download_is_checked_kept_and_never_half_there(self, folder, monkeypatch, capsys):
        """It is kept beside the script, so that a run is resumed from any folder without it."""
        with zipfile.ZipFile("packed.zip", "w") as archive:
            archive.writestr("packed", TEXT)
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
        monkeypatch.setattr(handler.func, "log_message", lambda *_: None)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        packed = hashlib.sha256(Path("packed.zip").read_bytes()).hexdigest()
        plain = hashlib.sha256(TEXT.encode()).hexdigest()
        for name, file, sha256 in [("packed", "packed.zip", packed), ("plain", "a.txt", plain),
                                   ("wrong", "a.txt", packed)]:
            address = f"http://127.0.0.1:{server.server_port}/{file}"
            monkeypatch.setitem(train_lm.DOWNLOADS, name, (address, sha256))
        monkeypatch.setattr(train_lm, "__file__", str(folder / "clone/train_lm.py"))
        kept = folder / "clone/out/data"

        def refused(name):
            with pytest.raises(SystemExit, match="2"):
                train_lm.read([name])
            return capsys.readouterr().err

        assert re.search(r"wrong cannot be downloaded .*hash.*--data FILE", refused("wrong"))
        assert socket.getdefaulttimeout() is None
        assert not list(kept.iterdir())
        assert train_lm.read(["packed"]) == train_lm.read(["plain"]) == TEXT.encode()
        server.shutdown()
        server.server_close()
        Path("elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        assert train_lm.read(["packed"]) == train_lm.read(["plain"]) == TEXT.encode()
        (kept / "a.txt").write_text(TEXT[:-1])
        assert re.search(r"a\.txt has sha256 .* delete it", refused("plain"))


# ------------------------------------------------------------------------------------ both scripts

MISTAKES = [
    (train_copy, "--task swap", "invalid choice: 'swap'"),
    (train_copy, "--segments 8", "at least 2, and multiples of 3: 8 is not"),
    (train_copy, "--eval-segments 4", "at least 2, and multiples of 3: 4 is not"),
    (train_copy, "--task retrieval --segment-len 3", "over 5 segments of 3 tokens"),
    (train_copy, "--task remember --keys 4 --segments 6", "needs 5 different keys but there are 4"),
    (train_copy, "--task facts --segment-len 11", "--segment-len 11 must be a multiple of 6"),
    (train_copy, "--task quadratic --segments 12", "must end within 331 to 360 tokens"),
    (train_copy, "--task memorize --segment-len 1", "over 8 segments of 1 tokens"),
    (train_copy, "--symbols 99", "invalid choice: 99"),
    (train_lm, "--data no.txt", "no.txt' is no file or folder"),
    (train_lm, '--data ""', "--data '' is no file or folder"),
    (train_lm, "--data empty.txt", "its train part has 0 bytes and needs 2049"),
    (train_lm, "--data short.txt --batch 1", "its valid part has 10 bytes and needs 33"),
    (train_lm, "--data mixed", "zeros.bin has zero bytes: it is not text"),
    (train_lm, "--data notepad.txt", "notepad.txt is encoded in UTF-16 or UTF-32: save it"),
    (train_lm, "--data no.zip", "no.zip cannot be unpacked"),
    (train_lm, "--prompt \u00e9", "--prompt has '\u00e9', which the training text does not"),
    (train_lm, "--model rmt_encoder", "rmt_encoder sees whole segments, the next byte too"),
    (train_lm, "--temperature -1", "--temperature -1.0 must be a number of at least 0"),
    (train_lm, "--temperature 1e-9", "temperature=1e-09 must be 0 (the most likely token)"),
    (train_lm, "--sample nowhere", "nowhere holds no run"),
    (train_lm, "--sample nowhere --resume nowhere", "not allowed with argument"),
]
for script in (train_copy, train_lm):
    MISTAKES += [
        (script, "--model lstm", "invalid choice: 'lstm'"),
        (script, "--steps many", "invalid int value: 'many'"),
        (script, "--batch 0", "--batch 0 must be a number of at least 1"),
        (script, "--lr nan", "--lr nan must be a number of at least 0"),
        (script, "--bptt-depth -1", "--bptt-depth -1 must be a number of at least 0"),
        (script, "--segment 3", "unrecognized arguments: --segment 3"),
        (script, "--update sum", "update='sum' must be"),
        (script, "--d-model 10", "d_model=10 must be divisible by"),
        (script, "--device abacus", "--device abacus cannot be used here"),
        (script, "--device cuda:9", "--device cuda:9 cannot be used here"),
        (script, "--resume nowhere", "nowhere holds no run"),
        (script, '--resume "" --steps 1', "holds no run"),
        (script, "--resume mixed", "mixed holds no run"),
        (script, "--resume list", "list holds no run"),
        (script, "--out mixed", "--out 'mixed' is not a new or empty folder"),
        (script, '--out ""', "--out '' is not a new or empty folder"),
        (script, "--lr inf", "--lr inf must be a number of at least 0"),
        (script, "--steps 0", "--steps 0 must be a number of at least 1"),
        (script, "--out a.txt/x", "a.txt/x"),
    ]

REPORTED = {  # what a run prints, and the files that it writes
    train_copy: ["rmt  ", "transformer  ", "free-running", "its initial state at every boundary",
                 "the state of another sample", "longer than in training", "state of 32 floats",
                 "files in out/\\u8bb0"],
    train_lm: ["uniform  ", "unigram  ", "bigram  ", "gzip -9  ", "rmt  ", "transformer  ",
               "carried  ", "reset  ", "of another stream  ", "18081 bytes to train on",
               "state of 32 floats", "state of 0 floats", "files in out/lm-1",
               "python train_lm.py --sample out/lm-1"],
}
FILES = {
    train_copy: "attention.png config.json metrics.csv result.json rmt.pt training.png "
                "transformer.pt",
    train_lm: "config.json loss.png metrics.csv position.png result.json rmt.pt sample.txt "
              "transformer.pt",
}


@contextmanager
def at_call(script, n, act):
    """For a while, act() is called in the middle of the n-th step that a script trains."""
    calls = count(1)

    def unroll_and_act(*arguments, **options):
        if next(calls) == n:
            act()
        return unroll(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "unroll", unroll_and_act)
        yield


def interrupt():
    """What Ctrl-C does. (A process that a shell runs in the background ignores the signal.)"""
    raise KeyboardInterrupt


class TestScripts:
    """A mistake is one line, a run is safe, and what was stopped is resumed."""

    @pytest.mark.parametrize("script, flags, words", MISTAKES)
    def test_a_mistake_is_one_line_and_writes_nothing(self, script, flags, words, run_here):
        Path("empty.txt").touch()
        Path("no.zip").write_text("no archive")
        Path("short.txt").write_text("a short text, no more than this; " * 6 + "..")
        Path("notepad.txt").write_text(TEXT, encoding="utf-16")
        Path("mixed").mkdir()
        Path("mixed/zeros.bin").write_bytes(b"text" * 1000 + bytes(1))
        Path("mixed/config.json").write_text("{not json")
        Path("list").mkdir()
        Path("list/config.json").write_text("[1]")
        names_a_text = any(name in flags for name in ("--data", "--resume", "--sample"))
        if script is train_lm and not names_a_text:
            flags = "--data a.txt " + flags
        before = contents()
        run = run_here(script, flags, 2)
        assert_one_line(run, words)
        assert run.stdout == ""
        assert contents() == before

    @both_scripts
    def test_every_field_of_config_is_a_flag(self, script, flags):
        changes = {"segment_len": 6, "n_layer": 3, "n_head": 2, "d_model": 24, "n_mem": 5,
                   "dropout": 0.5, "memory_form": "raw", "write_slot": "both",
                   "memory_noise": 0.25, "cache_len": 7, "carry_dropout": 0.1, "window": 1,
                   "d_assoc": 9, "nu": 2, "update": "hebbian"}
        names = {field.name for field in dataclasses.fields(Config)}
        assert changes.keys() | {"variant", "vocab_size"} == names
        for name, value in changes.items():
            flags += f" --{name.replace('_', '-')} {value}"
        vocabulary = () if script is train_copy else (13,)
        model = script.build(arguments(script, flags), "armt", *vocabulary)
        assert model.config == Config("armt", vocab_size=13, **changes)

    @both_scripts
    def test_help_shows_every_default_and_fits_a_screen_and_a_half(
            self, script, flags, run_here, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        shown = run_here(script, "--help").stdout
        assert shown.count("(default:") == shown.count("\n  --") > 30
        assert len(shown.splitlines()) < 70
        if script is train_copy:
            assert "(default: 1100)" in shown
            assert "(default: 1100)" not in run_here(script, "--help --task facts").stdout

    @pytest.mark.parametrize("script, flags, encoding", [
        (train_copy, COPY, "ascii"), (train_lm, LANGUAGE, "ascii"), (train_lm, LANGUAGE, "cp1252")])
    def test_a_script_needs_only_the_model_beside_it_in_every_locale(
            self, script, flags, encoding, folder):
        """As a process: text of any alphabet, named like it, on a console that does not know it.

        Python is strict: a warning would be an error, and so would a file opened without encoding.
        """
        for file in (script.__file__, rmt.__file__):
            shutil.copy(file, folder)
        name = "\u8bb0\u00e9.txt"
        Path(name).write_text("\u00e9\u2192\U0001f600" * 10 + TEXT, encoding="utf-8")
        Path("copy of " + name).write_bytes(Path(name).read_bytes())
        flags = flags.replace("a.txt", f"{name} 'copy of {name}'") + " --memory-noise 0.5"
        if script is train_copy:
            flags += " --out out/\u8bb0"
        strict = ["-W", "error", "-X", "warn_default_encoding"]
        strict += ["-W", "ignore::EncodingWarning", "-W", "error::EncodingWarning:__main__"]
        run = end_process(start_process(f"{script.__name__}.py", flags, strict, LC_ALL="C.UTF-8",
                                        PYTHONIOENCODING=encoding, PYTHONPATH=""))
        assert run.stderr == ""
        for words in REPORTED[script]:
            assert words in run.stdout
        (written,) = Path("out").iterdir()
        assert sorted(path.name for path in written.iterdir()) == FILES[script].split()
        result = json.loads((written / "result.json").read_text())
        assert result["command"].startswith(f"python {script.__name__}.py --batch 4 --steps 30")
        assert {"seed", "date", "versions", "hardware", "flags"} < result.keys()
        if script is train_lm:
            assert "\\u8bb0" in run.stdout and "is left out" in run.stdout
            flags = f"--sample {written} --prompt '\u00e9\u2192'"
            sample = end_process(start_process("train_lm.py", flags, strict, LC_ALL="C.UTF-8",
                                               PYTHONIOENCODING=encoding, PYTHONPATH=""))
            assert "\\u2192" in sample.stdout

    @pytest.mark.slow
    @both_scripts
    @pytest.mark.parametrize("variant", PUBLISHED)
    def test_every_variant_trains_to_the_end_of_its_report(self, variant, script, flags, run_here):
        if script is train_lm and VARIANTS[variant].mask == "full":
            pytest.skip("an encoder is no language model")
        run_here(script, f"{flags} --model {variant} --baseline none --out a")

    @pytest.mark.slow
    @both_scripts
    def test_a_compiled_run_learns_the_same(self, script, flags, run_here, monkeypatch):
        compiled = []
        torch_compile = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda run: compiled.append(run) or torch_compile(run))
        flags += " --steps 5 --baseline none --curriculum fixed"
        if script is train_lm:
            flags = flags.replace(" --curriculum fixed", "")
        run_here(script, flags + " --out a")
        run_here(script, flags + " --out b --compile")
        for key, weight in checkpoint("a")["model"].items():
            torch.testing.assert_close(checkpoint("b")["model"][key], weight, rtol=0, atol=1e-4)
        assert compiled == [unroll]

    def test_attention_is_drawn_where_there_is_attention_to_memory(self, run_here):
        run_here(train_copy, COPY + " --steps 1 --model armt --baseline none")
        run_here(train_copy, COPY + " --steps 1 --model rmt --baseline none")  # in the next folder
        assert not Path("out/copy-1/attention.png").exists()
        assert Path("out/copy-2/attention.png").exists()

    @both_scripts
    def test_a_run_does_not_depend_on_what_is_trained_beside_it(self, script, flags, run_here):
        flags += " --memory-noise 0.5"
        run_here(script, flags + " --model rmt --baseline none --out alone")
        run_here(script, flags + " --model rmt_xl --baseline rmt --out beside")
        for key, weight in checkpoint("alone")["model"].items():
            assert torch.equal(weight, checkpoint("beside")["model"][key])
        key = {train_copy: "6", train_lm: "carried"}[script]
        assert results("alone")["rmt"][key] == results("beside")["rmt"][key]

    @both_scripts
    def test_it_trains_in_training_mode_and_evaluates_in_eval_mode(
            self, script, flags, run_here, monkeypatch):
        modes = []
        forward = RMT.forward

        def note(model, *arguments):
            modes.append(model.training)
            return forward(model, *arguments)

        monkeypatch.setattr(RMT, "forward", note)
        run_here(script, flags + " --steps 20 --baseline none")
        evaluations = {train_copy: 1, train_lm: 2}[script]
        seen = [mode for mode, _ in groupby(modes)]
        assert seen == [True, False] * evaluations

    @both_scripts
    def test_a_run_leaves_a_notebook_as_it_was(self, script, flags, run_here, monkeypatch):
        """After `%run train_lm.py` the figures of a notebook were no longer shown."""
        pyplot = "matplotlib.pyplot"
        assert pyplot not in Path(script.__file__).read_text(encoding="utf-8")
        before = matplotlib.get_backend(), dict(matplotlib.rcParams), torch.get_num_threads()
        figures_before = plt.get_fignums()
        run_here(script, f"{flags} --baseline none --steps 2 --threads 3")
        assert_one_line(run_here(script, f"{flags} --resume out --threads 3", 2), "holds no run")
        with at_call(script, 1, interrupt):
            run_here(script, f"{flags} --threads 3", expected_status=130)
        after = matplotlib.get_backend(), dict(matplotlib.rcParams), torch.get_num_threads()
        assert after == before
        assert plt.get_fignums() == figures_before
        with pytest.MonkeyPatch.context() as patch:  # whose stdout is no TextIOWrapper
            patch.setattr(sys, "stdout", types.SimpleNamespace(write=len, flush=lambda: None))
            run_here(script, f"{flags} --baseline none --steps 2")

    @both_scripts
    def test_metrics_grow_while_a_model_is_trained(self, script, flags, run_here):
        """With the norm of the gradient; what was written is what the checkpoint has."""
        def read_rows():
            with open("a/metrics.csv", newline="", encoding="utf-8") as file:
                rows.extend(csv.DictReader(file))

        rows = []
        with at_call(script, 25, read_rows):
            run_here(script, flags + " --baseline none --steps 45 --out a")
        assert [row["step"] for row in rows][-1] == "20"
        assert float(rows[-1]["grad_norm"]) > 0
        rows.clear()
        read_rows()
        saved = checkpoint("a")["rows"]
        as_text = [{name: "" if value is None else str(value) for name, value in row.items()}
                   for row in saved]
        assert rows == as_text
        assert rows[-1]["step"] == "45"

    @both_scripts
    def test_a_loss_that_is_no_number_ends_the_run_with_one_line(self, script, flags, run_here):
        """The last checkpoint stays, and its weights are finite."""
        run_here(script, flags + " --steps 100 --baseline none --out a")
        before = checkpoint("a")
        diverged = run_here(script, "--resume a --steps 200 --lr 1e9", 2)
        assert_one_line(diverged, "take an --lr below 1000000000.0")
        assert checkpoint("a")["step"] == before["step"] == 100
        for weight in checkpoint("a")["model"].values():
            assert weight.isfinite().all()

    @both_scripts
    def test_a_run_that_was_stopped_resumes_to_the_same_numbers(
            self, script, flags, run_here, monkeypatch):
        """By Ctrl-C in step 116 of one model, in step 20 of the other; then from another folder."""
        flags += " --steps 130 --memory-noise 0.5"
        run_here(script, flags + " --out whole")
        with at_call(script, 116, interrupt):
            stopped = run_here(script, f"{flags} --out parts", expected_status=130)
        with at_call(script, 50, interrupt):  # in the model beside it
            run_here(script, "--resume parts", expected_status=130)
        assert f"to resume: python {script.__file__} --resume parts" in stopped.stdout
        assert checkpoint("parts")["step"] == 130
        assert not Path("parts/transformer.pt").exists()
        Path("elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        for _ in range(2):  # once more, when all is done
            run_here(script, "--resume ../parts")
            assert_same_run("../parts", "../whole")
        for name in ("rmt", "transformer"):
            parts, whole = results("../parts")[name], results("../whole")[name]
            assert parts | {"cpu_seconds": 0} == whole | {"cpu_seconds": 0}
            assert parts["cpu_seconds"] > 0
        command = json.loads(Path("../parts/result.json").read_text())["command"]
        assert command.endswith(f"&& python {script.__name__}.py --resume ../parts")

    @both_scripts
    def test_ctrl_c_before_there_is_a_folder_is_silent(
            self, script, flags, run_here, monkeypatch):
        run_here(train_lm, LANGUAGE + " --steps 1 --baseline none --out a")
        monkeypatch.setattr(script, "build", lambda *_: interrupt())
        assert run_here(script, flags, expected_status=130).stderr == ""
        monkeypatch.setattr(train_lm, "stream", lambda *_: interrupt())
        assert run_here(train_lm, "--sample a", expected_status=130).stderr == ""
        assert [path.name for path in Path().iterdir()] in (["a", "a.txt"], ["a.txt", "a"])

    @both_scripts
    def test_a_run_goes_on_from_nothing_and_for_more_steps(self, script, flags, run_here):
        """A run that was stopped before its first checkpoint has a folder too."""
        with at_call(script, 3, interrupt):
            run_here(script, f"{flags} --baseline none --out a", expected_status=130)
        assert not Path("a/rmt.pt").exists()
        run_here(script, "--resume a --steps 35")
        assert checkpoint("a")["step"] == 35
        assert json.loads(Path("a/config.json").read_text())["steps"] == 35
        with at_call(script, 3, interrupt):
            run_here(script, "--resume a --steps 40", expected_status=130)
        run_here(script, "--resume a")  # the settings of the last command hold
        assert checkpoint("a")["step"] == 40

    @both_scripts
    def test_an_earlier_run_is_not_overwritten(self, script, flags, run_here):
        flags += " --steps 2 --baseline none"
        run_here(script, flags + " --out a")
        before = contents()
        assert_one_line(run_here(script, flags + " --out a", 2), "is not a new or empty folder")
        changes = {"task": "detect", "curriculum": "grow", "segments": 3, "d_model": 32}
        for flag in ["d_model", *script.KEPT]:
            was = checkpoint("a")["flags"][flag]
            now = changes.get(flag, 7)
            name = f"--{flag.replace('_', '-')}"
            changed = run_here(script, f"--resume a {name} {now} --n-mem 2", 2)
            assert_one_line(changed, f"a/rmt.pt was trained with {name} {was}, not {now}")
        fewer = run_here(script, "--resume a --steps 1", 2)
        assert_one_line(fewer, "a/rmt.pt has 2 steps already, more than --steps 1")
        other_script = {train_copy: train_lm, train_lm: train_copy}[script]
        foreign = run_here(other_script, "--resume a", 2)
        assert_one_line(foreign, "a holds a run of another script or edition than this train_")
        assert contents() == before

    @both_scripts
    def test_a_damaged_or_foreign_checkpoint_is_refused_and_nothing_is_lost(
            self, script, flags, run_here):
        """torch.load does not look at checksums: a flipped bit went into the weights."""
        run_here(script, flags + " --steps 2 --baseline none --out a")
        path = Path("a/rmt.pt")
        whole = path.read_bytes()
        place = whole.index(checkpoint("a")["model"]["head.weight"].numpy().tobytes())
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]
        foreign = io.BytesIO()
        torch.save({"runs": {}}, foreign)
        for content, words in [(flipped, "damaged"), (whole[:1000], "not a checkpoint"),
                               (b"", "not a checkpoint"),
                               (foreign.getvalue(), "not a checkpoint")]:
            path.write_bytes(content)
            before = contents()
            refused = run_here(script, "--resume a --steps 9", 2)
            assert_one_line(refused, f"a/rmt.pt is {words}")
            assert contents() == before
        settings = json.loads(Path("a/config.json").read_text())
        settings["config"] = {"dropout": 0.1}  # as the second edition wrote it
        Path("a/config.json").write_text(json.dumps(settings))
        assert_one_line(run_here(script, "--resume a", 2), "they differ in config")
        Path("a/config.json").write_text("{}")
        assert_one_line(run_here(script, "--resume a", 2), "they differ in baseline, batch, ")

    def test_a_language_model_continues_with_its_own_text_wherever_that_is(
            self, run_here, monkeypatch):
        """A Colab session ends; in the next one the text is in another folder."""
        run_here(train_lm, LANGUAGE + " --baseline none --steps 20 --out a")
        Path("drive").mkdir()
        Path("a.txt").rename("drive/b.txt")
        Path("other.txt").write_text("another text; " * 1500)
        before = contents()
        assert_one_line(run_here(train_lm, "--resume a", 2), "a.txt' is no file or folder")
        other = run_here(train_lm, "--resume a --data other.txt", 2)
        assert_one_line(other, "other.txt is not the text that a/rmt.pt was trained on")
        assert contents() == before
        run_here(train_lm, "--resume a --data drive --steps 25")
        assert checkpoint("a")["step"] == 25
        monkeypatch.chdir("drive")
        run_here(train_lm, "--resume ../a")

    @both_scripts
    def test_a_trained_model_is_used_as_the_docstring_shows(self, script, flags, run_here, capsys):
        """And as the README does, in the same lines."""
        name = {train_copy: "out/copy-1", train_lm: "out/lm-1"}[script]
        run_here(script, flags + " --steps 5 --baseline none")
        lines = script.__doc__.split("in your own code:\n")[1].split("This file needs")[0]
        capsys.readouterr()
        names = {}
        exec(textwrap.dedent(lines), names)
        by_hand, vocabulary = saved_model(name, "rmt")
        for key, weight in by_hand.state_dict().items():
            assert torch.equal(weight, names["model"].state_dict()[key])
        if script is train_copy:
            assert names["words"] == vocabulary == [*"|?_0123456789"]
        else:
            assert len(capsys.readouterr().out) > 50
            assert textwrap.dedent(lines).strip() in READMES[0].read_text(encoding="utf-8")

    @both_scripts
    def test_a_full_disk_leaves_a_whole_checkpoint(self, script, flags, run_here):
        resource = pytest.importorskip("resource")
        flags += " --steps 130 --baseline none --out a"
        with at_call(script, 110, interrupt):
            run_here(script, flags, expected_status=130)
        most = Path("a/rmt.pt").stat().st_size // 2
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            full = run_here(script, "--resume a", 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert_one_line(full, "a/rmt.pt could not be written, the last checkpoint stays")
        assert checkpoint("a")["step"] == 100
        run_here(script, "--resume a")
        assert checkpoint("a")["step"] == 130


def steps_done(name, model="rmt"):
    """The steps of a model in a checkpoint, which must be whole; 0 where there is none."""
    if not Path(name, f"{model}.pt").exists():
        return 0
    return checkpoint(name, model)["step"]


def wait_until(condition, process):
    """Wait for something that a process does, and fail if it ends before."""
    deadline = time.time() + 300
    while not condition():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)


@pytest.mark.slow
@both_scripts
def test_runs_killed_while_they_save_resume_to_the_same_numbers(script, flags, run_here):
    """Kill -9, three times, as real processes. What was last saved is whole."""
    flags += " --steps 800 --memory-noise 0.5"
    end_process(start_process(script, flags + " --out whole"))
    flags += " --out parts"
    for name, least in [("rmt", 1), ("rmt", 300), ("transformer", 1)]:
        process = start_process(script, flags)
        wait_until(lambda name=name, least=least: steps_done("parts", name) >= least, process)
        wait_until(lambda: list(Path("parts").glob("*.pt.tmp")), process)
        process.kill()
        end_process(process, -signal.SIGKILL)
        assert least <= steps_done("parts", name) < 800
        flags = "--resume parts"
    end_process(start_process(script, flags))
    assert_same_run("parts", "whole")


# ------------------------------------------------------------------------------------------ a GPU


def models_on_gpu(names):
    """As `models`; without a GPU one test that is skipped, and not one for every model."""
    return models(names if torch.cuda.is_available() else [])


def on_both(name, **changes):
    """The same model twice: on the CPU and on the GPU."""
    model = build(name, **changes)
    return model, copy.deepcopy(model).to("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
class TestGPU:
    """What the CPU computes in float64, a GPU computes too."""

    @models_on_gpu(MODELS)
    @torch.backends.cudnn.flags(enabled=False)  # its GRU has gradients in training mode only
    def test_logits_state_and_gradients_are_those_of_the_cpu(self, name):
        tokens = text(2 * T + 3)
        results = []
        for model in on_both(name):
            device = model.memory.device
            logits, state = unroll(model, tokens.to(device), bptt_depth=1)
            loss_of(logits, tokens.to(device)).backward()
            assert all(leaf.device == device for leaf in tree_leaves(state))
            computed = [logits, *tree_leaves(state), *gradients_of(model)]
            results.append([t.cpu() for t in computed])
        assert_close(*results, tolerance=1e-9)

    @models_on_gpu(DIAGONAL)
    def test_diagonals_equal_the_loop(self, name):
        _, model = on_both(name, n_layer=3)
        tokens = text(8 * T + 1).to("cuda")
        results = []
        for run in (unroll, unroll_diagonal):
            logits, state = run(model, tokens, checkpoint=True)
            loss_of(logits, tokens).backward()
            results.append([logits, *tree_leaves(state), *gradients_of(model)])
        assert_close(*results, tolerance=1e-9)

    @models_on_gpu(CAUSAL)
    def test_the_same_tokens_are_generated(self, name):
        on_cpu, on_gpu = on_both(name)
        prompt = text(T + 2)
        new = generate(on_gpu, prompt.to("cuda"), 2 * T, temperature=0)
        assert torch.equal(new.cpu(), generate(on_cpu, prompt, 2 * T, temperature=0))

    def test_a_token_out_of_range_is_refused_before_the_gpu_sees_it(self):
        """There it would be an assertion of the device, after which the process can do nothing."""
        _, model = on_both("rmt")
        with pytest.raises(ValueError, match=f"reach from 0 to {V}"):
            unroll(model, torch.tensor([[0, V]], device="cuda"))

    @pytest.mark.parametrize("script, flags", [(train_copy, COPY), (train_lm, LANGUAGE)])
    def test_scripts_train_resume_and_report_there(self, script, flags, run_here):
        """The numbers are near those of the CPU, and a run that goes on does so from its step."""
        flags = f"{flags} --baseline none"
        for device in ("cpu", "cuda"):
            run_here(script, f"{flags} --device {device} --out {device}")
        on_cpu, on_gpu = checkpoint("cpu"), torch.load("cuda/rmt.pt", map_location="cpu")
        for weight_name, weight in on_cpu["model"].items():
            torch.testing.assert_close(
                on_gpu["model"][weight_name], weight, rtol=0.05, atol=0.05)
        with at_call(script, 16, interrupt):
            run_here(script, f"{flags} --device cuda --out parts", expected_status=130)
        run_here(script, "--resume parts --device cuda")
        assert torch.load("parts/rmt.pt", map_location="cpu")["step"] == on_gpu["step"]
        assert torch.cuda.get_device_name() in (Path("cuda") / "result.json").read_text()


# ==================================================================================================
# README and notebooks


def test_the_readme_is_true():
    """Its programs run, and the tables are those of the recorded results."""
    assert READMES[0].stat().st_size <= 13_000
    readmes = "".join(path.read_text(encoding="utf-8") for path in READMES)
    tables = figures.tables()
    shown = re.findall(r"<!-- table (\S+) -->(.*?)<!-- end of table -->", readmes, re.DOTALL)
    assert "readme" in dict(shown)
    for name, lines in shown:
        assert lines.strip() == "\n".join(tables[name])

    first, of_train_lm, second = re.findall(r"```python\n(.*?)```", readmes, re.DOTALL)
    assert 'torch.load("out/lm-1/rmt.pt"' in of_train_lm  # it is run beside its docstring
    names = {}
    exec(first, names)
    assert names["logits"].shape == (1, 296, 256)
    pytest.importorskip("transformers")
    exec(second, names)
    assert unroll(names["model"], torch.tensor([[1, 2, 3]]))[0].shape == (1, 3, 50257)


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def load_module(path):
    """A module of the course, which is no package. The settings of figures stay as they were."""
    pytest.importorskip("IPython")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with matplotlib.rc_context():
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def course():
    return load_module(ROOT / "notebooks" / "course.py")


@pytest.fixture
def solutions():
    return load_module(ROOT / "notebooks" / "solutions.py")


def read_notebook(path):
    """A notebook as plain dictionaries, with every text in one piece."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        for output in cell.get("outputs", []):
            output["text"] = "".join(output.get("text", ""))
    return notebook


def cells_of(notebook, kind):
    """The sources of its cells, "code" or "markdown"."""
    return [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == kind]


def stubs(code):
    """The exercises in the code of a notebook: functions that return None with a comment."""
    stub = r"^def (\w+)\(.*\):\n(?:    .*\n)*?    return None  # your \w+$"
    return re.findall(stub, code, re.MULTILINE)


def printed_by(notebook):
    """All that the cells of a notebook have printed."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def cpu_seconds(printed):
    return int(re.search(r"this notebook took (\d+) CPU seconds", printed)[1])


def promised_seconds(notebook):
    return int(re.search(r"at most (\d+) CPU seconds", notebook["cells"][0]["source"])[1])


def with_answer(cell, name, function):
    """A copy of a cell, with a function of solutions.py where the stub of that name is."""
    source = inspect.getsource(function).replace(f"def {function.__name__}(", f"def {name}(")
    (stub,) = [node for node in ast.parse(cell["source"]).body if getattr(node, "name", "") == name]
    lines = cell["source"].split("\n")
    lines[stub.lineno - 1:stub.end_lineno] = source.rstrip().split("\n")
    return cell | {"source": "\n".join(lines), "id": f"{cell['id']}-{function.__name__}"}


def run_notebook(path, *attempts):
    """What a notebook prints; attempts {exercise: function} take the place of stubs, in turns."""
    notebook = read_notebook(path)
    cells = []
    for cell in notebook["cells"]:
        tries = [cell]
        if stubs(cell["source"]) and attempts:
            (name,) = stubs(cell["source"])
            tries = [with_answer(cell, name, answers[name]) for answers in attempts]
        cells.extend(tries)
    notebook["cells"] = cells
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    client = pytest.importorskip("nbclient").NotebookClient(
        pytest.importorskip("nbformat").from_dict(notebook), timeout=900,
        resources={"metadata": {"path": str(path.parent)}})
    return printed_by(client.execute())


@every_notebook
class TestNotebooks:
    """Every notebook has the form of the course, and was committed as it ran."""

    def test_it_was_committed_as_it_ran(self, path):
        notebook = read_notebook(path)
        printed = printed_by(notebook)
        assert "holds: " in printed and "does not hold" not in printed
        assert cpu_seconds(printed) <= promised_seconds(notebook)
        alt_texts = []
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                assert output["output_type"] != "error"
                if "image/png" in output.get("data", {}):
                    alt_texts.append(output["metadata"]["image/png"]["alt"])
        assert min(map(len, alt_texts)) > 50
        for alt_text in alt_texts:  # it is the caption too, which every page shows
            assert f"**What to see:** {alt_text}" in str(notebook["cells"]).replace("\\'", "'")

    def test_it_starts_anywhere(self, path):
        """In Colab too, and nothing in it tells of the machine that it was written on."""
        notebook = read_notebook(path)
        code = "\n".join(cells_of(notebook, "code"))
        raw = path.read_text(encoding="utf-8")
        assert len(raw) < 500_000 and "widget" not in raw
        assert not re.search(r"/(tmp|home|root|work|Users)/", raw)
        assert not re.search(r"^\s*[!%]", code, re.MULTILINE)
        first = read_notebook(NOTEBOOKS[0])
        assert cells_of(notebook, "code")[0] == cells_of(first, "code")[0]

    def test_it_has_the_form_of_a_lesson(self, path):
        notebook = read_notebook(path)
        texts, codes = cells_of(notebook, "markdown"), cells_of(notebook, "code")
        words = re.sub(r"<[^>]*>", "", "\n".join(texts)).split()
        assert len(notebook["cells"]) <= 25 and len(words) <= 900
        assert max(len(code.splitlines()) for code in codes) <= 20
        title = texts[0]
        for host in ("colab.research.google.com/github/OWNER/rmt/blob/main", "kaggle.com/kernels"):
            assert host in title
        assert title.count(f"notebooks/{path.name}") == 2
        assert "\n**" in title and title.count("\n- ") == 3 and "You need: " in title
        assert "## What you have seen" in texts[-1] and "**Try.** " in texts[-1]
        assert codes[-1] == "table_of_guesses()\ntimer()"
        for text in texts:
            for target in re.findall(r"\]\((?!http)([^)#]+)", text):
                assert (path.parent / target).exists(), target

    def test_a_guess_comes_before_every_measurement(self, path):
        code = "\n".join(cells_of(read_notebook(path), "code"))
        told = list(re.finditer(r'measured\(f?"([^"{]+)', code))
        assert len(told) >= 2
        for match in told:
            assert 0 <= code.find(f'guess("{match[1]}') < match.start()

    def test_every_exercise_has_hints_a_solution_and_a_wrong_answer(self, path, solutions):
        notebook = read_notebook(path)
        names = stubs("\n".join(cells_of(notebook, "code")))
        texts = [text for text in cells_of(notebook, "markdown") if "**Exercise" in text]
        assert len(names) == len(texts) >= 2
        assert re.search(r"\*\*Exercise 1 ● ", texts[0])
        for number, (name, text) in enumerate(zip(names, texts, strict=True), start=1):
            assert re.search(rf"\*\*Exercise {number} (●|●●|●●●) \(\d+ min\)\.\*\* `{name}", text)
            summaries = re.findall(r"<details><summary>(.*?)</summary>", text)
            assert summaries[:2] == ["Hint 1", "Hint 2"] and summaries[2].startswith("Help: ")
            assert text.rstrip().endswith(f"Solution: [solutions.py](solutions.py), `{name}`.")
            for function in (getattr(solutions, name), getattr(solutions, f"{name}_wrong")):
                assert function.__doc__
            assert solutions.SAYS[name].startswith("not yet. ")

    @pytest.mark.slow
    def test_all_that_it_claims_holds(self, path, monkeypatch):
        monkeypatch.delenv("RMT_FAST", raising=False)
        notebook = read_notebook(path)
        printed = run_notebook(path)
        assert "holds: " in printed and "does not hold" not in printed
        names = stubs("\n".join(cells_of(notebook, "code")))
        assert re.findall(r"^(\w+): TODO$", printed, re.MULTILINE) == names

    @pytest.mark.slow
    def test_wrong_answers_are_refused_and_the_solutions_are_right(
            self, path, solutions, monkeypatch):
        """One run tries both. Verdicts are compared whole: nothing in them tells what is right."""
        monkeypatch.setenv("RMT_FAST", "1")
        names = stubs("\n".join(cells_of(read_notebook(path), "code")))
        wrong = {name: getattr(solutions, f"{name}_wrong") for name in names}
        printed = run_notebook(path, wrong, {name: getattr(solutions, name) for name in names})
        for name in names:
            assert f"{name}: {solutions.SAYS[name]}\n" in printed
        assert re.findall(r"^(\w+): OK\. \w", printed, re.MULTILINE) == names


class TestCourse:
    """What the notebooks share."""

    def test_a_check_says_todo_ok_or_the_first_input_that_fails(self, course, capsys):
        def double(n):
            return 2 * n

        def verdict(function, inputs=((1,), (2,), (5,))):
            course.check("twice", function, inputs, double, meaning="So be it.")
            return capsys.readouterr().out

        assert verdict(lambda n: None) == "twice: TODO\n"
        assert verdict(double) == "twice: OK. So be it.\n"
        assert verdict(lambda n: n + 1) == "twice: not yet. twice(2) is not 3\n"
        assert verdict(lambda n: n / 0) == (
            "twice: not yet. twice(1) ends with ZeroDivisionError: division by zero\n")
        assert verdict(lambda n: "two") == "twice: not yet. twice(1) is not 'two'\n"
        assert verdict(lambda n: 2 if n == 1 else None) == "twice: not yet. twice(2) is None\n"
        assert verdict(lambda n: torch.tensor([2 * n])) == "twice: OK. So be it.\n"
        assert verdict(lambda n: torch.zeros(2)) == "twice: not yet. twice(1) is not [0.0, 0.0]\n"

    def test_a_check_compares_tensors_without_telling_what_is_right(self, course, capsys):
        def verdict(function, dtype=torch.float64):
            expected = torch.tensor([[0, 1], [0, 1]], dtype=dtype)
            course.check("f", function, [(torch.zeros(2, 2),)], lambda x: expected)
            return capsys.readouterr().out.strip()

        start = "f: not yet. f([[0.0, 0.0], [0.0, 0.0]]) "
        assert verdict(lambda x: torch.tensor([[0, 1], [0, 1]])) == "f: OK."
        assert verdict(lambda x: torch.eye(2)) == start + "is wrong at [0, 0]; 2 of 4 entries are"
        assert verdict(lambda x: torch.eye(2).bool(), torch.bool) == (
            start + "is wrong at [0, 0]; 2 of 4 entries are")
        assert verdict(lambda x: torch.eye(2), torch.bool) == (
            start + "must hold True and False (torch.bool), and holds torch.float64")
        assert verdict(lambda x: torch.eye(2).bool()) == (
            start + "must hold numbers, and holds torch.bool")
        assert verdict(lambda x: torch.eye(2), torch.int64) == (
            start + "must hold whole numbers (torch.int64), and holds torch.float64")
        assert verdict(lambda x: x[0]) == start + "must have the shape (2, 2), and has (2,)"
        assert verdict(lambda x: [[0, 1], [0, 1]]) == (
            start + "must be a tensor, and is of type list")
        assert verdict(lambda x: x / 0).endswith("4 of 4 entries are")
        assert verdict(lambda x: x.add_(1)) == start + "changes what it was given: work on a copy"

    def test_a_judge_complains_in_its_own_words(self, course, capsys):
        for complaint, verdict in [(None, "OK."), ("is odd", "not yet. f(3) is odd")]:
            course.check("f", lambda n: n, [(3,)], judge=lambda found, n, says=complaint: says)
            assert capsys.readouterr().out.strip() == f"f: {verdict}"
        course.check("f", lambda n: "x" * 99, [(3,)], judge=lambda found, n: found.shape)
        assert capsys.readouterr().out.strip() == (
            f"f: not yet. f(3) is '{'x' * 75} ..., and trying that ends with AttributeError: 'str' "
            "object has no attribute 'shape'")

    def test_a_check_wants_a_list_where_one_is_right(self, course, capsys):
        for answer, verdict in [([0], "OK."), (torch.tensor([0]), "OK."), ([], "is not []"),
                                ((0,), "must be a list, and is of type tuple"),
                                (0, "must be a list, and is of type int")]:
            course.check("f", lambda n, answer=answer: answer, [(1,)], lambda n: [0])
            assert capsys.readouterr().out.strip().endswith(verdict)

    def test_what_is_not_solved_stops_a_class_copy_without_a_traceback(self, course, solutions,
                                                                       monkeypatch):
        monkeypatch.setitem(sys.modules, "solutions", None)  # as where that file is not there
        with pytest.raises(course.NotYet) as stopped:
            course.use("wrap", None)
        assert stopped.value._render_traceback_() == [
            "The cells from here on need wrap: solve that exercise first."]
        monkeypatch.setitem(sys.modules, "solutions", solutions)
        assert course.use("wrap", None) is solutions.wrap
        course.check("wrap", len, [([1],)], len)
        assert course.use("wrap", len) is len

    def test_guesses_are_numbers_and_end_in_a_table(self, course, capsys, monkeypatch):
        shown = []
        monkeypatch.setattr(course, "display", lambda markdown: shown.append(markdown.data))
        course.table_of_guesses()
        assert "No guesses yet" in capsys.readouterr().out
        course.guess("share", np.float64(0.5))
        course.table_of_guesses()
        assert "None of your guesses has been measured" in capsys.readouterr().out
        course.guess("letters", 100)
        course.guess("nothing")
        course.guess("a word", "ten")
        course.guess("endless", math.inf)
        course.guess("huge", 10**400)
        course.guess("a word", "ten")
        assert capsys.readouterr().out.splitlines()[-1] == "a word? no guess yet"
        course.measured("share", 0.1, within=0.1)
        course.measured("letters", 250, factor=3)
        course.measured("nothing", 1)
        assert capsys.readouterr().out.splitlines() == [
            "share: measured 0.1, you said 0.5", "letters: measured 250, you said 100",
            "nothing: measured 1, no guess"]
        course.table_of_guesses()
        assert capsys.readouterr().out.strip() == "1 of 2 within reach; the largest surprise: share"
        assert "| letters | 100 | 250 |" in shown[-1] and "| a word | - | - |" in shown[-1]

    def test_a_claim_that_does_not_hold_stops_a_full_run_only(self, course, capsys, monkeypatch):
        course.claim(True, "this")
        with pytest.raises(AssertionError, match="that"):
            course.claim(False, "that")
        monkeypatch.setattr(course, "FAST", True)
        course.claim(False, "that")
        assert capsys.readouterr().out.split("\n")[:3] == [
            "holds: this", "does not hold: that", "does not hold: that"]

    def test_messages_end_with_what_must_be_said(self, course):
        tokens, letters = course.message(3, 5, torch.Generator().manual_seed(0))
        assert tokens.shape == (5, 6) and (tokens[:, 3] == course.BAR).all()
        assert torch.equal(tokens[:, :3], letters) and torch.equal(tokens[:, 4:], letters[:, :2])
        assert course.text(torch.tensor([0, 9, 10, 2]), T=2) == "AJ |C"

    def test_reciting_starts_at_the_bar_from_a_state_or_after_reading(self, course):
        torch.manual_seed(0)  # some untrained models say the same whatever they have read
        model = RMT(Config(vocab_size=11, segment_len=4)).eval()
        letters = course.message(8, 3)[1]
        _, state = unroll(model, letters)
        assert torch.equal(course.recite(model, letters), course.recite(model, letters, state))
        assert course.recite(model, letters, n=5).shape == (3, 5)

    def test_training_grows_when_enough_is_right(self, course):
        """The answer is always the same letter, so that few steps are enough."""
        model = RMT(Config(vocab_size=11, segment_len=4, d_model=16))
        drawn = []

        def sample(level, batch, generator):
            drawn.append(level)
            return course.message(4, batch, generator)[0], torch.full((batch, 4), 3)

        log = course.train(model, sample, 120, levels=3, grow_at=0.8)
        assert not model.training and log.level == drawn and len(log.right) == 120
        assert set(drawn) == {1, 2, 3}
        steps = [drawn.index(level) for level in (1, 2, 3)]
        assert steps[0] == 0 and steps[0] < steps[1] < steps[2]
        for step in steps[1:]:
            assert log.right[step - 1] > 0.8 > log.right[step]
        drawn.clear()
        before = copy.deepcopy(model.state_dict())
        course.train(model, sample, 5, levels=3, grow=False)
        assert drawn == [3] * 5
        assert any(not torch.equal(before[name], weight)
                   for name, weight in model.state_dict().items())

    def test_right_letters_are_counted_place_by_place(self, course):
        tokens, letters = course.message(3, 10, torch.Generator().manual_seed(0))
        answer = F.one_hot(letters, 11).double()
        answer[:4, 1] = answer[:4, 1].roll(1, dims=-1)
        share = course.by_place(lambda _: torch.cat([torch.zeros(10, 3, 11), answer], 1),
                                tokens, letters)
        assert share.tolist() == [1.0, 0.6, 1.0]

    def test_lines_of_code_are_counted_without_words(self, course):
        def three(x):
            """A docstring."""
            # A comment.

            y = (x +
                 1)
            return y

        assert course.count_lines(three) == 3

    def test_the_copy_for_a_class_has_no_outputs_and_no_solutions(self, folder, course):
        arguments = ["--student", "class", "--repo", "we/ours"]
        course.main(arguments)
        copies = sorted(Path("class/notebooks").glob("*.ipynb"))
        assert [path.name for path in copies] == [path.name for path in NOTEBOOKS]
        assert not list(Path("class").rglob("solutions.py"))
        for path in copies:
            notebook = read_notebook(path)
            assert not any(cell.get("outputs") for cell in notebook["cells"])
            raw = path.read_text(encoding="utf-8")
            assert "olution: " not in raw and "solutions.py" not in raw and "OWNER" not in raw
            assert raw.count("we/ours") == 3  # two badges and the set-up cell
            assert len(stubs("\n".join(cells_of(notebook, "code")))) >= 2
        before = contents()
        course.main(arguments)
        assert contents() == before

    def test_a_copy_is_not_written_where_it_cannot_be(self, folder, course, capsys):
        Path("file").write_text("")
        before = contents()
        for flags in (f"--student {ROOT}", "--student file", "--student new --repo http://a/b"):
            with pytest.raises(SystemExit, match="2"):
                course.main(flags.split())
            assert contents() == before
            words = flags.split()
            assert f"error: {words[-2]} " in capsys.readouterr().err

    @pytest.mark.slow
    def test_a_copy_for_a_class_runs_alone(self, folder, course, solutions, monkeypatch):
        monkeypatch.setenv("RMT_FAST", "1")
        course.main(["--student", "class"])
        path = folder / "class" / "notebooks" / NOTEBOOKS[1].name  # it needs its exercises to go on
        with pytest.raises(Exception, match="The cells from here on need wrap"):
            run_notebook(path)
        names = stubs("\n".join(cells_of(read_notebook(path), "code")))
        printed = run_notebook(path, {name: getattr(solutions, name) for name in names})
        assert re.findall(r"^(\w+): OK\. \w", printed, re.MULTILINE) == names


    def test_a_figure_is_kept_for_slides_with_its_caption(self, folder):
        """As python assets/figures.py --png keeps those of all notebooks."""
        new = pytest.importorskip("nbformat").v4
        cell = f"""import sys
sys.path.insert(0, {str(ROOT / "notebooks")!r})
import course
for caption in ("one", "two"):
    course.show(course.draw_lines({{"a": ([1, 2], [3, 4])}}, "title", "x", "y"), caption)"""
        notebook = new.new_notebook(cells=[new.new_code_cell(cell)])
        Path("n.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RMT_FIGURES", "")
            figures.draw_notebooks([Path("n.ipynb")], folder)
        page = Path("captions.md").read_text(encoding="utf-8")
        assert re.findall(r"!\[(\w+)\]\((\S+)\)\n\n(\w+)", page) == [
            ("one", "n-1.png", "one"), ("two", "n-2.png", "two")]
        assert plt.imread("n-1.png").shape[:2] == (800, 1800)  # 9 by 4 inches, for slides

    def test_the_page_for_teachers_names_every_notebook_and_answers_its_exam(self, solutions):
        page = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
        front = READMES[0].read_text(encoding="utf-8")
        for path in NOTEBOOKS:
            row = re.escape(f"]({path.name})") + r" \| (.+?) \| (\d+) \| (\d+) \|\n"
            question, minutes, seconds = re.search(row, page).groups()
            title = read_notebook(path)["cells"][0]["source"]
            assert f"Time: {minutes} minutes" in title and int(seconds) <= promised_seconds(
                read_notebook(path))
            assert f"| {question} | {minutes} | {seconds} |" in front
        exam = page.split("## Exam questions")[1].split("\n## ")[0]
        numbers = [int(number) for number in re.findall(r"^(\d+)\. ", exam, re.MULTILINE)]
        assert numbers == list(solutions.EXAM) == list(range(1, 11))
        for target in re.findall(r"\]\((?!http)([^)#]+)", page):
            assert (ROOT / "notebooks" / target).exists(), target
        assert len(page.splitlines()) <= 150


class TestSetUpCell:
    """The first cell of all notebooks, wherever it starts."""

    CELL = cells_of(read_notebook(NOTEBOOKS[0]), "code")[0] if NOTEBOOKS else ""
    PLACES = "\nprint(os.path.basename(os.getcwd()), course.__file__)"

    def start(self, place, repo=None, **environment):
        pytest.importorskip("IPython")
        cell = self.CELL + self.PLACES
        if repo is not None:
            cell = cell.replace("https://github.com/OWNER/rmt", str(repo))
        return subprocess.run([sys.executable, "-c", cell], cwd=place, text=True, timeout=300,
                              capture_output=True, env=os.environ | environment)

    def test_in_a_checkout_it_fetches_nothing(self):
        for place in (ROOT, ROOT / "notebooks"):
            run = self.start(place, repo="nowhere")
            assert run.returncode == 0, run.stderr
            assert run.stdout.split() == ["notebooks", str(ROOT / "notebooks" / "course.py")]

    @pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
    def test_alone_it_clones_once(self, folder):
        source = folder / "source"
        (source / "notebooks").mkdir(parents=True)
        for path in ("rmt.py", "notebooks/course.py"):
            shutil.copy(ROOT / path, source / path)
        who = "-c user.name=a -c user.email=a@b.c".split()
        for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]):
            subprocess.run(["git", "-C", source, *command], check=True)
        (folder / "empty").mkdir()
        for repo in (source.as_uri(), "nowhere"):  # the second time it is there
            run = self.start(folder / "empty", repo)
            assert run.returncode == 0, run.stderr
            name, where = run.stdout.split()
            assert name == "notebooks" and where.startswith(str(folder / "empty" / "rmt"))

    def test_where_it_cannot_fetch_it_says_so_in_one_line(self, folder):
        run = self.start(folder, folder / "nowhere", GIT_TERMINAL_PROMPT="0")
        assert run.returncode == 1 and "Traceback" not in run.stderr
        assert run.stderr.strip().split("\n")[-1] == (
            f"Could not fetch {folder / 'nowhere'}. Is the Internet on (Kaggle: Settings), and is "
            "REPO the address of this course?")


# ==================================================================================================
# Learning


@pytest.mark.slow
class TestLearning:
    """What the models learn, in minutes on a CPU."""

    def test_the_default_run_reaches_its_target_and_no_memory_stays_at_chance(self, run_here):
        run_here(train_copy, "--target 0.99 --out a")
        scores = results("a")
        assert scores["rmt"]["9"]["free_running"] >= 0.98
        assert scores["transformer"]["9"]["teacher_forced"] <= 0.15
        assert scores["its initial state at every boundary"] <= 0.2
        assert scores["the state of another sample"] <= 0.2

    def test_a_fact_is_read_after_4096_segments(self, run_here):
        run_here(train_copy, "--task memorize --baseline none --eval-segments 4096 --out a")
        assert results("a")["rmt"]["4096"]["teacher_forced"] >= 0.97

    def test_memory_is_worth_bits_in_language_most_of_all_where_segments_begin(self, run_here):
        run_here(train_lm, "--out a")
        scores = results("a")
        carried, none = scores["rmt"]["carried"], scores["transformer"]["carried"]
        bits = {state: scores["rmt"][state]["bits_per_byte"]
                for state in ("carried", "reset", "of another stream")}
        without = none["bits_per_byte"]
        assert bits["carried"] < without - 0.05 < scores["bigram"]["bits_per_byte"] - 1
        assert bits["carried"] < min(bits["reset"], bits["of another stream"]) - 0.05
        gains = torch.tensor(none["by_position"]) - torch.tensor(carried["by_position"])
        assert gains[:8].mean() > 2 * gains[8:].mean()

    @pytest.mark.parametrize("distance", [1, 2])
    def test_a_fact_is_learned_if_and_only_if_gradient_reaches_it(self, distance, run_here):
        """One boundary short, an untrained hand-off lets something through; two short, nothing."""
        flags = ("--task memorize --baseline none --curriculum fixed --steps 400 "
                 "--memory-noise 0")
        scores = []
        for depth in range(distance + 1):
            sizes = f"--segments {distance + 1} --bptt-depth {depth} --out {depth}"
            run_here(train_copy, f"{flags} {sizes}")
            scores.append(results(str(depth))["rmt"][str(distance + 1)]["teacher_forced"])
        assert scores[distance] > 0.95
        assert scores[distance - 1] < 0.75
        assert distance == 1 or scores[0] < 0.2

    @pytest.mark.parametrize("form", ["norm", "raw"])
    def test_normed_memory_is_alive_after_10_000_segments_and_raw_memory_is_not(self, form):
        """Every segment asks for the segment before it, for ever; the state is carried on."""
        torch.manual_seed(0)
        model = RMT(Config(vocab_size=10, segment_len=8, n_mem=8, memory_form=form))
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        state = None
        before = torch.randint(10, (32, 8))
        for step in range(400):
            tokens = torch.randint(10, (32, 16))
            logits, state = unroll(model, tokens, state)
            state = state.detach()
            rate = 3e-3 * min(1, (step + 1) / 50, 2 * (1 - step / 400))
            learn(optimizer, rate, logits, torch.cat([before, tokens[:, :8]], dim=1))
            before = tokens[:, 8:]
        tokens = torch.randint(10, (8, 10_000 * 8))
        with torch.no_grad():
            _, state = unroll(model.eval(), tokens, last_only=True)
            logits, _ = unroll(model, torch.randint(10, (8, 8)), state)
        right = (logits.argmax(-1) == tokens[:, -8:]).double().mean()
        size = state.memory.square().mean().sqrt()
        if form == "norm":
            assert right > 0.95 and size < 10
        else:
            assert right < 0.4 and size > 10
