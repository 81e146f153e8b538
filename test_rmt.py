"""What rmt.py claims: Equivalence, Memory, Gradient, Errors, and at the end the mutations that these tests notice.

Exact claims are made in float64, on models of two layers and sixteen channels whose memory is drawn large enough to
matter. The variants that a claim holds for are chosen by the columns of VARIANTS: a new row is tested for free. Some
docstrings tell which mistake of released code a test is there for.
"""
import argparse
import ast
import copy
import gzip
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rmt
from assets import tasks
from assets.figures import attention_maps
from rmt import (
    RMT,
    VARIANTS,
    AssociativeBlock,
    Attention,
    BottleneckBlock,
    Config,
    ControllerBlock,
    State,
    generate,
    map_tensors,
    segment_mask,
    tensors,
    unroll,
    unroll_diagonal,
)

SIZES = {"V": 11, "T": 4, "L": 2, "H": 2, "D": 16, "M": 3, "C": 5, "K": 2 * 3 * 4}
V, T, L, H, D, M, C, K = SIZES.values()
ROOT = Path(rmt.__file__).resolve().parent
SOURCE = Path(rmt.__file__).read_text()
PUBLISHED = list(VARIANTS)
# Rows of our own: a cache beside read rows without write rows, and layers with two steps whose memory is not handed on.
VARIANTS["mem_transformer_xl"] = VARIANTS["transformer_xl"]._replace(read=True, mask="paper")
VARIANTS["mem_controller_alone"] = VARIANTS["mem_transformer"]._replace(block=ControllerBlock)
VARIANTS["mem_bottleneck_alone"] = VARIANTS["mem_transformer"]._replace(block=BottleneckBlock)


class Recurrent(nn.Module):
    """A backbone that is no Transformer: a GRU over the rows, which carries its hidden state and counts its calls.

    It is as awkward as the contract allows: a scalar parameter, a carry of shape (B,), and False as a truth value.
    """

    def __init__(self):
        super().__init__()
        self.gru, self.scale = nn.GRU(D, D, batch_first=True), nn.Parameter(torch.ones(()))

    def __len__(self):
        return 0

    def initial_carry(self, batch_size):
        return self.scale.new_zeros(batch_size, D), self.scale.new_zeros(batch_size)

    def forward(self, x, mask, carry):
        y, hidden = self.gru(x, carry[0][None])
        return x + self.scale * y, (hidden[0], carry[1] + 1)


ROWS = VARIANTS | {f"{name} around a GRU": row._replace(block=Recurrent)
                   for name, row in VARIANTS.items() if row.block is rmt.Block}
ROWS |= {f"armt by {update}": VARIANTS["armt"] for update in ("armt", "hebbian")}  # beside the default, delta
ROWS |= {f"{name} with window 1": row for name, row in VARIANTS.items() if row.block is BottleneckBlock}  # beside 0
CAUSAL = [name for name, row in ROWS.items() if row.mask != "full"]
RECURRENT = [name for name, row in ROWS.items() if row.recurrent]
READING = [name for name, row in VARIANTS.items() if row.read]
CACHED = [name for name, row in VARIANTS.items() if row.block is rmt.CacheBlock]
DIAGONAL = [name for name, row in ROWS.items() if not row.recurrent and row.block is not Recurrent]
CROSSED = [name for name, row in ROWS.items() if row.recurrent or row.block in (AssociativeBlock, Recurrent)]
TWO_STEPS = [name for name, row in ROWS.items() if row.block in (ControllerBlock, BottleneckBlock)]


def variants(names):
    """Run a test for each of these keys of ROWS."""
    return pytest.mark.parametrize("variant", names)


@pytest.fixture(autouse=True)
def float64():
    """Models, and the rotary tables they compute when they are built, are in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(variant="rmt", **changes):
    """A small model in eval mode, the same for the same arguments, in which memory and attention matter."""
    torch.manual_seed(0)
    config = {"variant": variant.split()[0], "vocab_size": V, "segment_len": T, "n_layer": L, "n_head": H, "d_model": D,
              "n_mem": M, "cache_len": C, "d_assoc": 4}
    if " by " in variant:
        config["update"] = variant.split()[-1]
    if " window " in variant:
        config["window"] = int(variant.split()[-1])
    model = RMT(Config(**config | changes), Recurrent() if variant.endswith("GRU") else None).eval()
    with torch.no_grad():
        model.memory.normal_()
        model.write_embedding.normal_()
        for name, weight in model.backbone.named_parameters():
            weight.mul_(1 + torch.rand_like(weight))
            if name.endswith("w_v.weight"):  # they start at zero
                weight.normal_(std=0.02)
    return model


def text(length, batch_size=2, seed=0):
    """Random tokens (batch_size, length)."""
    return torch.randint(V, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def floats_in_table(variant, sizes):
    """The floats of a state, computed from the comment beside the variant's row in VARIANTS."""
    comment = re.search(rf'"{variant}": .*\),\s+# (\S+(?: \S+)*)', SOURCE).group(1)
    return eval(re.sub(r"(?<=[\w)]) (?=[\w(])", "*", comment), {}, sizes)


def loss_of(logits, tokens):
    """A loss that adds up over segments: every token is to be repeated."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")


def gradients_of(model):
    """The gradients of all parameters, taken off the model."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return gradients


def assert_close(actual, expected, tolerance=1e-12):
    """Equal but for rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@contextmanager
def calls(*modules):
    """A list that fills with (arguments, output) of every call of the modules."""
    seen = []
    hooks = [module.register_forward_hook(lambda _, arguments, output: seen.append((arguments, output)))
             for module in modules]
    yield seen
    for hook in hooks:
        hook.remove()


def attention_in_loops(layer, x, context, mask):
    """Weights and output of one Attention layer, one score at a time, rotary positions as complex numbers."""
    (B, N, _), E, n_read, c = x.shape, D // H, layer.n_read, context.size(1) - x.size(1)
    now = [row if row < n_read else layer.n_cache + row for row in range(N)]
    seen = now[:n_read] + [layer.n_cache + n_read - c + column for column in range(c)] + now[n_read:]
    w_q, w_k, w_v = (w.view(H, E, D) for w in layer.qkv.weight.split(D))
    frequency = torch.tensor([10000.0 ** (-2 * pair / E) for pair in range(E // 2)])

    def turned(row, position):
        return torch.complex(row[:E // 2], row[E // 2:]) * torch.exp(1j * position * frequency)

    def weights_of(b, head, row):
        query, scores = turned(w_q[head] @ x[b, row], now[row]), []
        for column in range(N + c):
            key = turned(w_k[head] @ context[b, column], seen[column])
            may_look = column <= row if mask is None else mask[row, column]
            scores.append((query * key.conj()).real.sum().div(math.sqrt(E)).exp() if may_look else torch.zeros(()))
        return torch.stack(scores) / sum(scores)

    weights = torch.stack([weights_of(b, head, row) for b in range(B) for head in range(H) for row in range(N)])
    weights, values = weights.view(B, H, N, N + c), torch.einsum("bcd,hed->bhce", context, w_v)
    return weights, torch.einsum("bhnc,bhce->bnhe", weights, values).flatten(-2) @ layer.out.weight.T


def feed_forward(block, rows):
    """The feed-forward layer of a block in plain matrix products."""
    centred = rows - rows.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm_2.weight
    wide = normed @ block.mlp[0].weight.T
    return rows + (wide * (1 + torch.erf(wide / math.sqrt(2))) / 2) @ block.mlp[2].weight.T


def memory_transformer_in_loops(block, x, form, window):
    """What papers say of MemController and MemBottleneck, row by row: who looks is computed with whom it looks at."""
    N, n_read, n_write = x.size(1), block.n_read, block.n_write
    memory = [*range(n_read), *range(N - n_write, N)]

    def sees(row, column):
        if form == "full":
            return True
        if row < n_read:
            return column < n_read
        return row >= N - n_write or column <= row

    def update(layer, rows, seen):
        mask = torch.tensor([[column in seen(row) for column in range(N)] for row in range(N)])
        mask[:, 0] |= ~mask.any(dim=1)  # rows that are not asked for see something, or there is nothing to add up to 1
        context = layer.norm_1(x)
        attended = x + attention_in_loops(layer.attn, context, context, mask)[1]
        return {row: feed_forward(layer, attended[:, row]) for row in rows}

    new = update(getattr(block, "controller", block), memory, lambda row: [c for c in range(N) if sees(row, c)])
    tokens = [row for row in range(N) if row not in memory]
    if isinstance(block, ControllerBlock):
        new |= update(block, tokens, lambda row: [c for c in range(N) if sees(row, c)])
    else:
        x = torch.stack([new.get(row, x[:, row]) for row in range(N)], dim=1)  # memory is new, tokens are not
        near = {row: [c for c in tokens if c != row and abs(c - row) <= window and sees(row, c)] for row in tokens}
        new |= update(block, tokens, lambda row: [c for c in memory if sees(row, c)] + near.get(row, []))
    return torch.stack([new[row] for row in range(N)], dim=1)


class TestEquivalence:
    """Two computations of one thing agree."""

    @variants([name for name in TWO_STEPS if name in VARIANTS])
    @pytest.mark.parametrize("window", [0, 2])
    def test_controller_and_bottleneck_equal_the_papers_two_steps_row_by_row(self, variant, window):
        model = build(variant, window=window)
        block, x = model.backbone.blocks[0], torch.randn(2, model.n_read + T + model.n_write, D, requires_grad=True)
        with torch.no_grad():
            for name, weight in block.named_parameters():
                weight.add_(torch.rand_like(weight) * ("norm" in name))
        actual, carry = block(x, model.mask(T, 0), ())
        expected = memory_transformer_in_loops(block, x, model.mask_form, window)
        assert_close(actual, expected)
        assert carry == ()
        direction, inputs = torch.randn_like(x), [x, *block.parameters()]
        assert_close(torch.autograd.grad(actual, inputs, direction), torch.autograd.grad(expected, inputs, direction))

    @variants([name for name, row in VARIANTS.items() if row.block is ControllerBlock])
    def test_a_controller_with_the_weights_of_its_layer_leaves_shared_weights(self, variant, monkeypatch):
        monkeypatch.setitem(VARIANTS, "shared", VARIANTS[variant]._replace(block=rmt.Block))
        apart, shared, tokens = build(variant), build("shared"), text(11)
        shared.load_state_dict({name: p for name, p in apart.state_dict().items() if "controller" not in name})
        assert not torch.allclose(unroll(apart, tokens)[0], unroll(shared, tokens)[0])
        for block in apart.backbone.blocks:
            weights = {name: weight for name, weight in block.state_dict().items() if "controller" not in name}
            block.controller.load_state_dict(weights)
        results = []
        for model in (apart, shared):
            logits, state = unroll(model, tokens)
            loss_of(logits, tokens).backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            for name in [name for name in gradients if "controller." in name]:
                plain = name.replace("controller.", "")
                gradients[plain] = gradients[plain] + gradients.pop(name)
            results.append((logits, state.memory, gradients))
        assert_close(*results)

    @variants([name for name, row in VARIANTS.items() if row.block is BottleneckBlock])
    def test_memory_is_new_before_tokens_see_it(self, variant):
        """One layer brings a token to the others of its segment, through a memory row that sees the segment."""
        changes = changes_of(build(variant, n_layer=1), text(T))
        alone = [[position] for position in range(T)]
        assert changes == ([list(range(T))] * T if VARIANTS[variant].mask == "full" else alone)

    @pytest.mark.parametrize("n_layer", [1, 3])
    @pytest.mark.parametrize("split", [[11], [4, 4, 3], [1, 4, 2, 4], [10, 1], [1] * 11], ids=str)
    def test_transformer_xl_with_a_long_cache_equals_one_long_transformer(self, n_layer, split):
        """The most-used port joins a cache with absolute positions: two tokens share one position."""
        whole = build("transformer", segment_len=11, n_layer=n_layer)
        cached = build("transformer_xl", segment_len=11, n_layer=n_layer, cache_len=12)
        cached.load_state_dict(whole.state_dict())
        tokens, state, pieces = text(11), cached.initial_state(2), []
        for segment in tokens.split(split, dim=1):
            logits, state = cached(segment, state)
            pieces.append(logits)
        assert_close(torch.cat(pieces, dim=1), unroll(whole, tokens)[0])

    @pytest.mark.parametrize("n_read, n_cached, n_write, form", [
        (0, 0, 0, None), (2, 0, 2, None), (2, 0, 0, "full"), (2, 0, 2, "paper"), (2, 3, 2, "paper"), (2, 5, 2, "paper"),
        (0, 2, 0, "causal"), (2, 3, 2, "causal"), (2, 5, 0, "full")])
    def test_attention_equals_loops_over_complex_rotations(self, n_read, n_cached, n_write, form):
        layer = Attention(build(n_mem=2).config, n_read, n_cache=5 if n_cached else 0)
        x = torch.randn(2, n_read + 3 + n_write, D, requires_grad=True)
        cache = torch.randn(2, n_cached, D, requires_grad=True)
        context = torch.cat([x[:, :n_read], cache, x[:, n_read:]], dim=1)
        mask = segment_mask(n_read, n_cached, 3, n_write, form) if form else None
        (_, expected), actual = attention_in_loops(layer, x, context, mask), layer(x, context, mask)
        assert_close(actual, expected)
        direction, inputs = torch.randn_like(x), [x, layer.qkv.weight, layer.out.weight, *[cache] * (n_cached > 0)]
        assert_close(torch.autograd.grad(actual, inputs, direction), torch.autograd.grad(expected, inputs, direction))

    @variants([name for name in READING if name not in TWO_STEPS])
    def test_memory_hidden_from_the_tokens_leaves_the_model_without_memory(self, variant, monkeypatch):
        row = VARIANTS[variant]._replace(read=False, write=False, recurrent=False, mask="causal")
        monkeypatch.setitem(VARIANTS, "memoryless", row)
        model, memoryless, tokens = build(variant), build("memoryless"), text(11)
        memoryless.load_state_dict(model.state_dict() | {"memory": torch.empty(0, D)})

        def hidden(n_tokens, n_cache):
            mask = segment_mask(model.n_read, n_cache, n_tokens, model.n_write, "causal")
            mask[model.n_read:, :model.n_read] = False
            return mask

        expected = unroll(memoryless, tokens)[0]
        assert not torch.allclose(unroll(model, tokens)[0], expected)
        monkeypatch.setattr(model, "mask", hidden)
        assert_close(unroll(model, tokens)[0], expected)

    @variants(ROWS)
    def test_stop_save_load_and_resume_equals_one_run(self, variant, tmp_path):
        """The ARMT code keeps its state on the modules, where it is lost on save. Here it is a value."""
        model, tokens, pieces = build(variant), text(14), []
        logits, end = unroll(model, tokens)
        state = model.initial_state(2)
        for segment in tokens.split(T, dim=1):
            piece, state = model(segment, state)
            pieces.append(piece)
            torch.save(tuple(state), tmp_path / "state.pt")
            state = State(*torch.load(tmp_path / "state.pt"))
            rest = tokens[:, T * len(pieces):]
            if rest.numel():
                assert torch.equal(torch.cat([*pieces, unroll(model, rest, state)[0]], dim=1), logits)
        assert torch.equal(torch.cat(pieces, dim=1), logits)
        assert all(map(torch.equal, tensors(state), tensors(end)))
        assert torch.equal(unroll(model, tokens, last_only=True)[0], logits[:, 12:])

    @variants(ROWS)
    @pytest.mark.parametrize("bptt_depth", [None, 1])
    def test_checkpointed_gradients_equal_plain_ones(self, variant, bptt_depth):
        """The most-used port uses the cache in one of its two passes only: gradients off by up to 81 percent."""
        model, tokens, results = build(variant, dropout=0.3, memory_noise=0.5).train(), text(15), []
        for checkpoint in (False, True):
            torch.manual_seed(1)
            logits, state = unroll(model, tokens, bptt_depth=bptt_depth, checkpoint=checkpoint)
            loss_of(logits, tokens).backward()
            results.append([logits.detach(), *tensors(state.detach()), *gradients_of(model)])
        assert_close(*results)

    @variants(DIAGONAL)
    @pytest.mark.parametrize("n_layer", [1, 3])
    @pytest.mark.parametrize("length", [T, T - 1, 2 * T, 3 * T + 1, 7 * T])
    def test_diagonals_equal_the_loop_over_segments(self, variant, n_layer, length):
        """The released code is exact for one sequence, with the bias of the last layer for all layers."""
        model, tokens = build(variant, n_layer=n_layer), text(length)
        _, before = unroll(model, text(T + 1, seed=1))
        for state, bptt_depth in ((None, None), (before, None), (before, 0), (before, 1), (None, 2)):
            results = []
            for run in (unroll, unroll_diagonal):
                given = state and map_tensors(lambda t: t.detach().requires_grad_(), state)
                logits, end = run(model, tokens, given, bptt_depth)
                (loss_of(logits, tokens) + sum(t.sin().sum() for t in tensors(end))).backward()
                given = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors(given or ())]
                results.append([logits.detach(), *tensors(end.detach()), *given, *gradients_of(model)])
                assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors(end.carry))  # no views of more
            assert_close(*results, tolerance=1e-10)

    @variants(DIAGONAL)
    def test_diagonals_equal_the_loop_in_float32_whatever_the_options_and_mixed_with_it(self, variant):
        torch.set_default_dtype(torch.float32)
        model, tokens, results = build(variant), text(50, batch_size=3), []
        for first, second in ((unroll, unroll), (unroll_diagonal, unroll), (unroll, unroll_diagonal)):
            for options in ({}, {"checkpoint": True}, {"last_only": True}):
                logits, state = first(model, tokens[:, :4 * T], **options)
                more_logits, state = second(model, tokens[:, 4 * T:], state, **options)
                F.cross_entropy(more_logits[:, -2:].flatten(0, 1), tokens[:, -2:].flatten()).backward()
                results.append([logits[:, -T:].detach(), more_logits[:, -2:].detach(), *tensors(state.detach()),
                                *gradients_of(model)])
                assert options != {"last_only": True} or (logits.size(1), more_logits.size(1)) == (T, 2)
        for result in results[1:]:
            assert_close(result, results[0], tolerance=1e-4)

    @variants(["armt", "transformer_xl"])
    @pytest.mark.parametrize("n_cached, alone", [(0, 2), (1, 1), (2, 0), (9, 0)])
    def test_weights_are_stacked_once_and_only_segments_before_a_full_cache_run_alone(self, variant, n_cached, alone,
                                                                                      monkeypatch):
        model, counted = build(variant, n_layer=3), []
        alone = alone if variant == "transformer_xl" else 0  # two segments of 4 fill a cache of 5
        state = unroll(model, text(n_cached * T))[1].detach() if n_cached else None
        monkeypatch.setattr(torch, "stack", lambda parts, stack=torch.stack: counted.append(len(parts)) or stack(parts))
        for checkpoint in (False, True):
            seen = []
            hook = model.backbone.blocks[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
            logits, _ = unroll_diagonal(model, text(9 * T), state, checkpoint=checkpoint)
            n_forward = len(seen)
            logits.sum().backward()
            hook.remove()
            assert n_forward == alone + (9 - alone) + 3 - 1
            assert len(seen) == n_forward + checkpoint * (9 - alone + 3 - 1)
        assert counted == 2 * len(list(model.backbone.blocks[0].parameters())) * [3]

    @variants([name for name in DIAGONAL if name not in CACHED])
    @pytest.mark.parametrize("n_segments, n_layer", [(1, 3), (2, 4), (3, 3), (6, 2), (5, 1)])
    def test_every_segment_meets_every_layer_once_in_s_plus_l_minus_1_steps(self, variant, n_segments, n_layer):
        model, tokens, steps = build(variant, n_layer=n_layer), text(n_segments * T), []
        blocks = list(model.backbone.blocks)
        with calls(*blocks) as cells:  # in the order of the loop
            unroll(model, tokens)
        hook = blocks[0].register_forward_hook(lambda block, *_: steps.append(block.norm_1.weight.detach()))
        with calls(blocks[0]) as diagonals:
            unroll_diagonal(model, tokens)
        hook.remove()
        assert len(diagonals) == n_segments + n_layer - 1
        for step, (((x, *_), _), norms) in enumerate(zip(diagonals, steps, strict=True)):
            expected = [(step - layer, layer) for layer in range(n_layer) if 0 <= step - layer < n_segments]
            for rows, norm, (s, layer) in zip(x.split(len(tokens)), norms, expected, strict=True):
                assert_close(rows, cells[s * n_layer + layer][0][0])
                assert torch.equal(norm, blocks[layer].norm_1.weight)

    @variants([name for name in DIAGONAL if VARIANTS[name.split()[0]].block is AssociativeBlock])
    def test_untrained_associative_memory_leaves_the_plain_model(self, variant):
        torch.manual_seed(0)
        model = RMT(replace(build(variant).config, n_layer=3))
        plain = RMT(replace(model.config, variant="transformer"))
        plain.load_state_dict(model.state_dict() | {"memory": plain.memory}, strict=False)
        tokens = text(5 * T)
        _, state = unroll(model, tokens)
        assert_close(unroll(model, tokens)[0], unroll(plain, tokens)[0])
        assert not any(carry[0].any() for carry in state.carry)

    @variants(ROWS)
    def test_sequences_of_a_batch_do_not_touch(self, variant):
        """The released diagonal batching is right for a batch of one only."""
        model, tokens, order = build(variant), text(11, batch_size=4), torch.tensor([2, 0, 3, 1])
        logits, state = unroll(model, tokens)
        permuted_logits, permuted_state = unroll(model, tokens[order])
        assert_close(permuted_logits, logits[order])
        assert_close(permuted_state, rmt.map_tensors(lambda t: t[order], state))
        assert_close(unroll(model, tokens[:1])[0], logits[:1])

    @variants(CAUSAL)
    def test_a_short_last_segment_equals_the_start_of_a_full_one(self, variant):
        model, tokens = build(variant), text(12)
        logits, _ = unroll(model, tokens)
        for length in range(1, 12):
            assert_close(unroll(model, tokens[:, :length])[0], logits[:, :length])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
    def test_tokens_of_every_integer_type_mean_the_same(self, dtype):
        model, tokens = build(), text(11)
        assert torch.equal(unroll(model, tokens.to(dtype))[0], unroll(model, tokens)[0])
        assert torch.equal(generate(model, tokens.to(dtype), 6, top_k=1), generate(model, tokens, 6, top_k=1))

    @variants(CAUSAL)
    @pytest.mark.parametrize("n_prompt", range(1, 2 * T + 2))
    def test_streaming_generation_equals_offline_argmax(self, variant, n_prompt):
        """Later RMT code goes on behind the write tokens, and never hands memory on while it generates.

        One offline pass over prompt and answer is enough: the test above says that it equals a pass over each prefix.
        """
        model, prompt = build(variant), text(n_prompt)
        for state in (None, unroll(model, text(8, seed=1))[1]):
            new = generate(model, prompt, 3 * T, state, temperature=0)
            logits, _ = unroll(model, torch.cat([prompt, new], dim=1), state)
            assert torch.equal(new, logits[:, n_prompt - 1:-1].argmax(-1))
            assert torch.equal(new, generate(model, prompt, 3 * T, state, top_k=1))

    def test_streaming_follows_the_mask_of_the_variant(self, monkeypatch):
        monkeypatch.setitem(VARIANTS, "rmt_in_order", VARIANTS["rmt"]._replace(mask="causal"))
        model, prompt = build("rmt_in_order"), text(3)
        assert model.mask(T, 0) is None
        new = generate(model, prompt, 3 * T, temperature=0)
        assert torch.equal(new, unroll(model, torch.cat([prompt, new], dim=1))[0][:, 2:-1].argmax(-1))

    @variants([name for name in CAUSAL if name in VARIANTS])
    @pytest.mark.parametrize("memory_mask", ["paper", "causal"])
    def test_a_new_token_costs_one_row_and_a_new_segment_one_pass(self, variant, memory_mask):
        """Later RMT code computes all segments again for every new token."""
        model, prompt = build(variant, memory_mask=memory_mask), text(2)
        n_read, n = model.n_read, model.n_read + T + model.n_write
        with calls(model.backbone) as seen:
            new = generate(model, prompt, 3 * T - 1, temperature=0)
        rows = [arguments[0].size(1) for arguments, _ in seen]
        assert rows == [n_read + 2, *[1] * (T - 2), n, n_read + 1, *[1] * (T - 1), n, n_read + 1, *[1] * (T - 1)]
        logits, _ = unroll(model, torch.cat([prompt, new], dim=1))
        assert torch.equal(new, logits[:, 1:-1].argmax(-1))

    @pytest.mark.parametrize("temperature, top_k", [(1, None), (0.3, None), (3, None), (1, 3), (2, 5), (1, 99)])
    def test_generate_samples_the_softmax_of_the_most_likely_tokens(self, temperature, top_k):
        model, prompt, n_draws = build(), text(6, batch_size=1), 2000
        logits = unroll(model, prompt)[0][0, -1]
        best = logits.topk(min(top_k or V, V)).indices
        expected = torch.zeros(V).scatter(0, best, (logits[best] / temperature).softmax(0))
        new = generate(model, prompt.expand(n_draws, -1), 1, temperature=temperature, top_k=top_k,
                       generator=torch.Generator().manual_seed(0))
        drawn = new.flatten().bincount(minlength=V) / n_draws
        assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / n_draws).sqrt()).all()

    def test_generate_repeats_itself_with_the_same_generator_seed(self):
        first, again, other = (generate(build(), text(6), 30, generator=torch.Generator().manual_seed(seed))
                               for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)

    @variants(VARIANTS)
    def test_autocast_to_bfloat16_stays_close_to_float32(self, variant):
        torch.set_default_dtype(torch.float32)
        model, tokens = RMT(build(variant).config), text(15)
        expected, _ = unroll(model, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            logits, state = unroll(model, tokens, bptt_depth=1)
            loss = loss_of(logits, tokens)
        loss.backward()
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05)
        assert all(t.isfinite().all() for t in [*tensors(state), *gradients_of(model)])

    @variants(ROWS)
    @pytest.mark.parametrize("tie_weights", [False, True])
    def test_copies_and_state_dicts_give_the_same_logits(self, variant, tie_weights):
        model, loaded = build(variant, tie_weights=tie_weights), build(variant, tie_weights=tie_weights)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        loaded.load_state_dict(model.state_dict())
        for other in (loaded, copy.deepcopy(model)):
            assert torch.equal(unroll(other, text(11))[0], unroll(model, text(11))[0])
            assert (other.head.weight is other.embed.weight) == tie_weights

    def test_tied_weights_learn_from_both_ends(self):
        tied, free, tokens = build(tie_weights=True), build(), text(11)
        free.load_state_dict(tied.state_dict())
        for model in (tied, free):
            loss_of(unroll(model, tokens)[0], tokens).backward()
        assert tied.head.weight is tied.embed.weight
        assert_close(tied.embed.weight.grad, free.embed.weight.grad + free.head.weight.grad)

    def test_parts_of_yours_keep_their_weights_and_ours_go_where_they_are(self):
        parts = {"backbone": Recurrent(), "embed": nn.Embedding(V, D), "head": nn.Linear(D, V)}
        for given in [{name: part} for name, part in parts.items()] + [parts]:
            given, before = copy.deepcopy(given), copy.deepcopy(given)
            model = RMT(build().config, **given)
            for name, part in before.items():
                assert_close(dict(getattr(model, name).state_dict()), dict(part.state_dict()), 0)
        for name, part in parts.items():
            for place in (torch.bfloat16, "meta"):
                weights = RMT(build().config, **{name: copy.deepcopy(part).to(place)}).parameters()
                assert {p.dtype if place == torch.bfloat16 else p.device.type for p in weights} == {place}

    @variants([name for name, row in ROWS.items() if row.block is not AssociativeBlock])  # autocast knows no "meta"
    def test_nothing_stays_behind_when_a_model_moves(self, variant):
        """On the device "meta" nothing is computed, and nothing of another device can take part."""
        model = build(variant).to("meta")
        logits, state = model(text(T).to("meta"), model.initial_state(2))
        assert {t.device.type for t in [logits, *tensors(state)]} == {"meta"}

    @variants([name for name in VARIANTS if VARIANTS[name].block is not rmt.Block])
    def test_a_block_of_yours_keeps_what_its_parent_has(self, variant, monkeypatch):
        class Mine(VARIANTS[variant].block):
            pass
        monkeypatch.setitem(VARIANTS, "mine", VARIANTS[variant]._replace(block=Mine))
        for (logits, state), (expected, end) in [[unroll(build(name), text(11)) for name in ("mine", variant)]]:
            assert_close([logits, *tensors(state)], [expected, *tensors(end)], 0)

    def test_a_head_of_yours_gets_rows_as_the_backbone_leaves_them(self):
        model = RMT(build(write_slot="embedding").config, head=nn.Linear(D, V)).eval()
        with calls(model.backbone, model.head) as seen:
            _, state = model(text(T), model.initial_state(2))
        (_, (x, _)), ((rows,), _) = seen
        assert torch.equal(rows, x[:, M:-M]) and torch.equal(state.memory, x[:, -M:])
        assert state.memory.untyped_storage().nbytes() == 8 * state.memory.numel()

    @pytest.mark.parametrize("kind", ["GPT2", "Llama"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("memory_mask", ["paper", "causal"])
    def test_memory_around_a_hugging_face_model_equals_a_loop_by_hand(self, kind, attention, memory_mask):
        transformers = pytest.importorskip("transformers")
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        readme = re.search(r"from transformers.*?(?=\ngpt =)", (ROOT / "README.md").read_text(), re.DOTALL)[0]
        exec(readme, namespace := {"torch": torch})
        sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "attn_implementation": attention, "bos_token_id": 0, "eos_token_id": 0}
        sizes |= {"intermediate_size": 40, "num_key_value_heads": 2} if kind == "Llama" else {}
        inner = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes)).eval()
        before = copy.deepcopy(inner.state_dict())
        config = Config(vocab_size=V, d_model=D, segment_len=T, n_mem=M, memory_mask=memory_mask)
        model = RMT(config, namespace["HuggingFace"](inner.base_model), inner.get_input_embeddings(),
                    inner.get_output_embeddings()).eval()
        assert_close(dict(inner.state_dict()), dict(before), 0)
        tokens, memory, pieces = text(3 * T), model.memory.expand(2, -1, -1), []
        hidden = torch.tensor([[row < M <= column or (row < M + T and column > max(row, M - 1))
                                for column in range(M + T + M)] for row in range(M + T + M)])
        hidden = torch.zeros(2, 1, *hidden.shape).masked_fill(hidden, -1e9) if memory_mask == "paper" else None
        for segment in tokens.split(T, dim=1):
            rows = torch.cat([memory, inner.get_input_embeddings()(segment), memory], dim=1)
            rows = inner.base_model(inputs_embeds=rows, attention_mask=hidden).last_hidden_state
            memory = rows[:, -M:]
            pieces.append(inner.get_output_embeddings()(rows[:, M:-M]))
        logits, state = unroll(model, tokens)
        assert_close([logits, state.memory], [torch.cat(pieces, dim=1), memory], 1e-5)
        new = generate(model, tokens, 2 * T, temperature=0)
        assert torch.equal(new, unroll(model, torch.cat([tokens, new], dim=1))[0][:, 3 * T - 1:-1].argmax(-1))
        if attention == "eager":
            rows = model.wrap(tokens[:, :T], model.initial_state(2).memory)
            seen = inner.base_model(inputs_embeds=rows, attention_mask=hidden, output_attentions=True).attentions
            inner.config._attn_implementation = "sdpa"
            weights, _ = attention_maps(model, tokens[:, :T], model.initial_state(2))
            assert_close(weights, torch.stack(seen), 1e-5)

        start, optimizer = model.memory.detach().clone(), torch.optim.AdamW(model.parameters(), 0.01)
        losses = []
        for _ in range(20):  # only the last segment counts: the initial memory learns across two boundaries
            loss = F.cross_entropy(unroll(model, tokens)[0][:, -T:].flatten(0, 1), tokens[:, :T].flatten())
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        assert ((model.memory - start).norm(dim=-1) > 0.01).all() and losses[-1] < losses[0] / 2


PICTURES = {  # rows look, columns are seen: read, cache, tokens, write
    ("paper", 2, 1, 3, 2, None): "xx . ... ..|xx . ... ..|xx x x.. ..|xx x xx. ..|xx x xxx ..|xx . xxx xx|xx . xxx xx",
    ("causal", 2, 1, 3, 2, None): "x. . ... ..|xx . ... ..|xx x x.. ..|xx x xx. ..|xx x xxx ..|xx x xxx x.|xx x xxx xx",
    ("full", 1, 2, 2, 1, None): "x xx xx x|x xx xx x|x xx xx x|x xx xx x",
    ("paper", 1, 0, 2, 1, None): "x .. .|x x. .|x xx .|x xx x",
    ("causal", 2, 0, 2, 1, None): "x. .. .|xx .. .|xx x. .|xx xx .|xx xx x",
    ("full", 2, 0, 1, 0, None): "xx x|xx x|xx x",
    ("paper", 0, 3, 2, 0, None): "xxx x.|xxx xx",
    ("causal", 0, 3, 2, 0, None): "xxx x.|xxx xx",
    ("paper", 2, 0, 3, 1, 0): "xx ... .|xx ... .|xx ... .|xx ... .|xx ... .|xx xxx x",
    ("paper", 1, 0, 4, 1, 2): "x .... .|x .... .|x x... .|x xx.. .|x .xx. .|x xxxx x",
    ("causal", 1, 0, 3, 2, 1): "x ... ..|x ... ..|x x.. ..|x .x. ..|x xxx x.|x xxx xx",
    ("full", 1, 0, 4, 0, 0): "x xxxx|x ....|x ....|x ....|x ....",
    ("full", 1, 0, 4, 0, 2): "x xxxx|x .xx.|x x.xx|x xx.x|x .xx.",
}


@pytest.fixture
def cell():
    """A function that makes an AssociativeBlock whose write row is [key | value], cut out by W_k and W_v; beta = 1."""
    def make(update, d_assoc=4, n_value=D - 4):
        config = Config("armt", d_model=d_assoc + n_value, n_head=1, d_assoc=d_assoc, n_mem=1, update=update)
        block = AssociativeBlock(config, n_write=1)
        identity = torch.eye(d_assoc + n_value)
        with torch.no_grad():
            block.w_k.weight.copy_(identity[:d_assoc])
            block.w_q.weight.copy_(identity[:d_assoc])
            block.w_v.weight.copy_(identity.roll(d_assoc, 1))  # the value comes first
            block.w_b.weight.zero_()
            block.w_b.bias.fill_(50)
        return block
    return make


def written(block, keys, values, carry=None):
    """The carry after one write per step: keys (steps, d_assoc), values (steps, n_value)."""
    carry = block.initial_carry(1) if carry is None else carry
    for key, value in zip(keys, values, strict=True):
        carry = block.write(torch.cat([key, value])[None, None], *carry)
    return carry


def read(block, keys, carry):
    """What the memory says of keys (n, d_assoc): (n, n_value)."""
    d_assoc = keys.size(1)
    rows = F.pad(keys, (0, block.w_v.weight.size(1) - d_assoc))[None]
    return block.recall(block.phi(block.w_q(rows)), *carry)[0, :, :-d_assoc]


def associative_in_loops(block, x, carry):
    """One associative layer as papers.md has it, one row and one sum at a time: what is read, and the next carry."""
    d, nu, update, eps = block.w_q.weight.size(0), block.nu, block.update, 1e-5

    def phi(row):
        r = [row[i % (2 * d)].clamp(min=0) if i % (2 * d) < d else (-row[i % (2 * d) - d]).clamp(min=0)
             for i in range(2 * d)]
        products = torch.stack([r[i] * r[(i - j) % (2 * d)] for j in range(1, nu + 1) for i in range(2 * d)])
        return products if update == "armt" else products / (products.square().sum().sqrt() + eps)

    def recall(k, A, z):
        value = torch.stack([sum(A[i, j] * k[j] for j in range(len(k))) for i in range(len(A))])
        return value / (sum(z[j] * k[j] for j in range(len(k))) + eps) if update == "armt" else value

    reads, carries = [], []
    for b in range(len(x)):
        A, z = carry[0][b], carry[1][b] if update == "armt" else None
        reads.append(torch.stack([recall(phi(block.w_q.weight @ row), A, z) for row in x[b]]))
        new_A, new_z = A.clone(), z
        for m in x[b, -block.n_write:]:
            k, v = phi(block.w_k.weight @ m), block.w_v.weight @ m
            beta = 1 / (1 + (-(block.w_b.weight[0] @ m + block.w_b.bias[0])).exp())
            new_A = new_A + torch.outer(beta * (v if update == "hebbian" else v - recall(k, A, z)), k)
            if update == "armt":
                gamma = 1 - ((z @ k + eps) / (k @ k + eps)).item()
                new_z = new_z + min(max(gamma, 0), 1) * k
        carries.append((new_A, new_z) if update == "armt" else (new_A,))
    return torch.stack(reads), tuple(torch.stack(part) for part in zip(*carries, strict=True))


def changes_of(model, tokens):
    """For every token, the positions whose logits change when it is edited."""
    logits, changes = unroll(model, tokens)[0], []
    for position in range(tokens.size(1)):
        edited = tokens.clone()
        edited[:, position] = (edited[:, position] + 1) % V
        changes.append((unroll(model, edited)[0] != logits).any(-1).any(0).nonzero().flatten().tolist())
    return changes


class TestMemory:
    """What crosses a boundary, what does not, and who sees it."""

    @pytest.mark.parametrize("variant, has", {
        "transformer": "causal", "mem_transformer": "read paper", "transformer_xl": "cache causal",
        "rmt": "read write recurrent paper", "rmt_xl": "read write recurrent cache paper",
        "rmt_encoder": "read recurrent full", "armt": "write associative causal",
        "mem_controller": "read write recurrent controller paper",
        "mem_controller_encoder": "read recurrent controller full",
        "mem_bottleneck": "read write recurrent bottleneck paper",
        "mem_bottleneck_encoder": "read recurrent bottleneck full"}.items())
    def test_the_models_of_the_papers_keep_their_rows_of_the_table(self, variant, has):
        row = VARIANTS[variant]
        columns = row._asdict() | {"block": False, "mask": False, row.mask: True,
                                   row.block.__name__.removesuffix("Block").lower(): row.block is not rmt.Block}
        assert {name for name, value in columns.items() if value} == set(has.split())

    @pytest.mark.parametrize("form, n_read, n_cache, n_tokens, n_write, window", PICTURES)
    def test_mask_equals_its_picture(self, form, n_read, n_cache, n_tokens, n_write, window):
        mask = segment_mask(n_read, n_cache, n_tokens, n_write, form, window)
        picture = PICTURES[form, n_read, n_cache, n_tokens, n_write, window].replace(" ", "").split("|")
        assert ["".join(".x"[may_look] for may_look in row) for row in mask.tolist()] == picture

    @variants(CAUSAL)
    @pytest.mark.parametrize("memory_mask", ["paper", "causal"])
    def test_no_token_sees_the_future(self, variant, memory_mask):
        changes = changes_of(build(variant, memory_mask=memory_mask), text(11))
        assert [positions[0] for positions in changes] == list(range(11))

    @pytest.mark.parametrize("n_layer", [1, 2, 3])
    @pytest.mark.parametrize("window", [0, 1, 2])
    def test_without_a_window_a_bottleneck_hides_the_tokens_of_a_segment_from_each_other(self, n_layer, window):
        """With one, layers add up; in the next segments memory brings back everything."""
        changes = changes_of(build("mem_bottleneck", n_layer=n_layer, window=window, segment_len=8), text(16))
        for position in range(8):
            assert changes[position] == [*range(position, min(8, position + n_layer * window + 1)), *range(8, 16)]

    def test_no_token_sees_its_neighbours_in_a_bottleneck_whatever_the_order(self):
        model = build("mem_bottleneck", memory_mask="causal")
        assert changes_of(model, text(2 * T))[:T] == [[position, *range(T, 2 * T)] for position in range(T)]

    @variants([name for name, row in VARIANTS.items() if row.mask == "full"])
    def test_an_encoder_sees_its_whole_segment_and_no_later_one(self, variant):
        assert [positions[0] for positions in changes_of(build(variant), text(11))] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8]

    @pytest.mark.parametrize("n_layer, cache_len, reach", [(2, 4, 11), (3, 8, 27), (2, 2, 9), (3, 3, 14)])
    def test_caches_of_all_layers_add_up_to_the_reach_of_transformer_xl(self, n_layer, cache_len, reach):
        """T - 1 + L C tokens where C is a multiple of T, and T - 1 + (L - 1) T + C where it is below T."""
        changes = changes_of(build("transformer_xl", n_layer=n_layer, cache_len=cache_len), text(32))
        assert [position for position in range(32) if 31 in changes[position]] == list(range(31 - reach, 32))

    @variants([name for name in CAUSAL if ROWS[name].block is not Recurrent])
    def test_read_rows_see_no_segment_and_no_token_sees_write_rows_which_see_all(self, variant):
        model, segment = build(variant), text(3)
        weights, widths = attention_maps(model, segment, unroll(model, text(8, seed=1))[1])
        look = (weights > 0).flatten(0, 2).split([model.n_read, 3, model.n_write], dim=1)
        read, tokens, write = (rows.split(widths, dim=-1) for rows in look)
        assert read[0].all() and not any(block.any() for block in read[1:])
        assert tokens[0].all() and tokens[1].all() and not tokens[3].any()
        assert (tokens[2] == {None: torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]), 0: torch.zeros(3, 3),
                              1: torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0]])}[model.window]).all()
        among = torch.ones(M, M, dtype=torch.bool)
        among = (among.tril() if ROWS[variant].mask == "causal" else among)[:model.n_write, :model.n_write]
        assert (write[3] == among).all()
        assert write[0].all() and write[2].all() and not write[1].any()

    @variants([name for name in ROWS if ROWS[name].block is not Recurrent])
    @pytest.mark.parametrize("n_before", [0, T, 3 * T])
    def test_attention_maps_equal_loops_and_leave_the_model_as_it_was(self, variant, n_before):
        model, segment, attend = build(variant), text(3), F.scaled_dot_product_attention
        state = unroll(model, text(n_before, seed=1))[1] if n_before else model.initial_state(2)
        layers, seen = [module for module in model.modules() if isinstance(module, Attention)], []
        assert {(layer.n_read, layer.n_cache) for layer in layers} == {(model.n_read, model.n_cache)}
        hooks = [layer.register_forward_hook(lambda layer, given, _: seen.append((layer, *given))) for layer in layers]
        logits, _ = model(segment, state)
        for hook in hooks:
            hook.remove()
        weights, widths = attention_maps(model, segment, state)
        expected = torch.stack([attention_in_loops(layer, *given[:3])[0] for layer, *given in seen])
        if variant in TWO_STEPS:  # memory rows first
            memory, tokens = expected[::2], expected[1::2]
            expected = torch.cat([memory[..., :model.n_read, :], tokens[..., model.n_read:model.n_read + 3, :],
                                  memory[..., model.n_read + 3:, :]], dim=-2)
        assert len(weights) == L
        assert_close(weights, expected)
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert widths == [model.n_read, min(n_before, model.n_cache), 3, model.n_write]
        assert torch.equal(model(segment, state)[0], logits) and F.scaled_dot_product_attention is attend

    @variants(ROWS)
    def test_earlier_segments_count_through_the_state_alone(self, variant):
        """In the original RMT code the Transformer-XL baseline's cache leaks from one sample into the next."""
        model, segment = build(variant), text(T)
        start = model.initial_state(2)
        alone, _ = model(segment, start)
        states = [unroll(model, text(8, seed=seed))[1] for seed in (1, 2)]
        assert torch.equal(model(segment, start)[0], alone)
        assert torch.equal(model(segment, model.initial_state(2))[0], alone)
        carried = [model(segment, state)[0] for state in states]
        assert torch.equal(*carried) == (not any(t.numel() for t in tensors(states[0])))
        cut = [model(segment, state._replace(memory=start.memory))[0] for state in states]
        assert torch.equal(*cut) == (not any(t.numel() for t in tensors(states[0].carry)))

    @variants(CACHED)
    @pytest.mark.parametrize("cache_len", [1, 3, 4, 6, 8, 20])
    def test_cache_is_the_last_inputs_of_every_layer_without_memory_rows_or_gradient(self, variant, cache_len):
        model = build(variant, cache_len=cache_len)
        inputs, state = [torch.empty(2, 0, D)] * L, model.initial_state(2)
        for segment in text(15).split([4, 1, 3, 4, 2, 1], dim=1):
            with calls(*model.backbone.blocks) as seen:
                _, state = model(segment, state)
            for layer, ((x, *_), _) in enumerate(seen):
                tokens = x[:, model.n_read:x.size(1) - model.n_write]
                inputs[layer] = torch.cat([inputs[layer], tokens], dim=1)
                (cache,) = state.carry[layer]
                assert torch.equal(cache, inputs[layer][:, -cache_len:]) and not cache.requires_grad

    @variants(PUBLISHED)
    def test_state_has_as_many_floats_as_the_table_of_variants_says(self, variant):
        _, state = unroll(build(variant), text(12, batch_size=1))
        assert sum(t.numel() for t in tensors(state)) == floats_in_table(variant, SIZES)

    @variants(VARIANTS)
    @pytest.mark.parametrize("changes", [
        {"segment_len": 1, "n_mem": 1}, {"segment_len": 1, "cache_len": 1}, {"cache_len": 3}, {"cache_len": 4},
        {"cache_len": 9}, {"segment_len": 20}, {"n_mem": 7}], ids=str)
    def test_shapes_at_odd_sizes(self, variant, changes):
        model = build(variant, **changes)
        for batch_size in (1, 3):
            logits, state = unroll(model, text(10, batch_size))
            assert logits.shape == (batch_size, 10, V) and logits.isfinite().all()
            assert state.memory.shape == (batch_size, model.config.n_mem * model.variant.recurrent, D)
            for cache in tensors(state.carry) if variant in CACHED else ():
                assert cache.shape == (batch_size, min(10, model.config.cache_len), D)

    @variants(RECURRENT)
    @pytest.mark.parametrize("memory_form", ["norm", "raw"])
    def test_handed_on_memory_is_the_written_rows_normed_or_raw(self, variant, memory_form):
        """Raw memory is a copy: a view would keep all rows of its segment alive."""
        model = build(variant, memory_form=memory_form)
        model.norm.weight.data.normal_()
        with calls(model.backbone) as seen:
            _, state = model(text(T), model.initial_state(2))
        _, (x, _) = seen[0]
        written = x[:, -M:] if model.n_write else x[:, :M]
        assert torch.equal(state.memory, model.norm(written) if memory_form == "norm" else written)
        assert state.memory.untyped_storage().nbytes() == 8 * state.memory.numel()

    @variants([name for name in RECURRENT if name in VARIANTS])
    def test_memory_is_bounded_for_a_thousand_segments_and_grows_where_it_is_raw(self, variant):
        size = {}
        for memory_form, n_segments in (("norm", 1000), ("raw", 20), ("raw", 200)):
            model = build(variant, segment_len=1, memory_form=memory_form)
            with torch.no_grad():
                _, state = unroll(model, text(n_segments, batch_size=1), last_only=True)
            size[memory_form, n_segments] = state.memory.square().mean().sqrt()
        assert size["norm", 1000] <= 1 and size["raw", 200] > 5 * size["raw", 20]

    @variants([name for name, row in ROWS.items() if row.write and row.recurrent])
    @pytest.mark.parametrize("write_slot", ["memory", "embedding", "both"])
    def test_write_rows_are_fed_what_write_slot_names(self, variant, write_slot):
        model, memory = build(variant, write_slot=write_slot), torch.randn(2, M, D)
        fed = memory * (write_slot != "embedding")
        fed = fed + model.write_embedding if write_slot != "memory" else fed
        before = [memory] * model.variant.read
        assert torch.equal(model.wrap(text(T), memory), torch.cat([*before, model.embed(text(T)), fed], dim=1))

    @pytest.mark.parametrize("memory_form", ["norm", "raw"])
    def test_memory_noise_has_one_size_per_sequence_up_to_its_fraction_of_the_rms(self, memory_form):
        model = build(d_model=64, memory_noise=0.3, memory_form=memory_form)
        written = torch.randn(1000, 16, 64) * torch.logspace(-1, 1, 16)[:, None]
        clean, noisy = model.eval().hand_on(written), model.train().hand_on(written)
        per_row = ((noisy - clean).square().mean(-1) / clean.square().mean(-1)).sqrt()
        per_sequence = per_row.square().mean(-1).sqrt()
        assert per_sequence.max() < 0.3 * 1.1 and per_sequence.min() < 0.01 and abs(per_sequence.mean() - 0.15) < 0.01
        assert (per_row / per_sequence[:, None]).std() < 0.12

    @variants(ROWS)
    def test_dropout_and_memory_noise_act_in_training_alone(self, variant):
        for changes in [{"dropout": 0.5}] + [{"memory_noise": 0.5}] * (variant in RECURRENT):
            model = build(variant, **changes)
            assert torch.equal(unroll(model, text(11))[0], unroll(build(variant), text(11))[0])
            assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {model.config.dropout}
            model.train()
            assert not torch.allclose(unroll(model, text(11))[0], unroll(model, text(11))[0])

    @variants(READING)
    def test_initial_memory_rows_differ(self, variant):
        """In the original RMT code all memory tokens start as one vector."""
        assert torch.pdist(RMT(build(variant).config).memory.detach()).min() > 0.02

    @variants(["rmt", "mem_controller"])
    @pytest.mark.parametrize("tie_weights", [False, True])
    def test_weights_start_at_the_size_their_table_gives(self, variant, tie_weights):
        sizes = {"d_model": 64, "n_mem": 64, "vocab_size": 64, "n_layer": 3}
        model = RMT(build(variant, **sizes, write_slot="both", tie_weights=tie_weights).config)
        fan_in = 0.7 / math.sqrt(64)
        expected = {"memory": 0.02, "write_embedding": 0.02, "embed.weight": fan_in if tie_weights else 0.5,
                    "attn.out.weight": fan_in / math.sqrt(6), "mlp.2.weight": fan_in / 2 / math.sqrt(6)}
        for name, weight in model.named_parameters():
            size = expected.get(re.sub(r".*(\d|controller)\.(?=attn|mlp)", "", name), fan_in)
            assert (weight == 1).all() if "norm" in name else abs(weight.std() / size - 1) < 0.05
        for block in RMT(replace(model.config, variant="armt", d_assoc=64)).backbone.blocks:
            assert not block.w_v.weight.any() and torch.equal(block.w_q.weight, block.w_k.weight)
            assert abs(block.w_q.weight.std() / fan_in - 1) < 0.1


UPDATES = ["delta", "armt", "hebbian"]


class TestAssociative:
    """The cell of ARMT, without learning."""

    @variants(["armt", "armt by armt", "armt by hebbian", "mem_transformer"])
    def test_memory_tokens_that_are_the_same_in_every_segment_learn(self, variant):
        model, tokens = build(variant), text(3 * T)
        loss_of(unroll(model, tokens)[0], tokens).backward()
        assert (model.memory.grad.abs().amax(dim=1) > 0).all()

    @pytest.mark.parametrize("update", UPDATES)
    def test_reads_writes_and_their_gradients_equal_the_equations_in_loops(self, update):
        block = build(f"armt by {update}").backbone.blocks[0]
        x, carry, results = torch.randn(2, 5, D, requires_grad=True), block.initial_carry(2), []
        weights = [block.w_q.weight, block.w_k.weight, block.w_v.weight, block.w_b.weight, block.w_b.bias, x]
        _, carry = associative_in_loops(block, x, associative_in_loops(block, x.flip(1), carry)[1])
        for known in (associative_in_loops(block, x, carry),
                      (block.recall(block.phi(block.w_q(x)), *carry), block.write(x[:, -M:], *carry))):
            loss = sum(t.sin().sum() for t in tensors(known))
            results.append([*tensors(known), *torch.autograd.grad(loss, weights, retain_graph=True)])
        assert_close(*results, tolerance=1e-10)

    @pytest.mark.parametrize("update", UPDATES)
    def test_a_layer_reads_before_its_first_norm_and_writes_what_comes_out(self, update):
        model = build(f"armt by {update}")
        block, x = model.backbone.blocks[0], torch.randn(2, T + M, D)
        _, carry = block(x.flip(1), None, block.initial_carry(2))
        y, after = block(x, None, carry)
        said, _ = associative_in_loops(block, x, carry)
        plain = rmt.Block.forward(block, x + said, None, ())[0]
        assert_close([y, *after], [plain, *associative_in_loops(block, plain, carry)[1]], tolerance=1e-10)
        assert block(x, None, carry, [])[1] is carry  # a part of a segment writes nothing

    def test_dpfp_multiplies_what_is_positive(self):
        """x = (2, -3): r = (2, 0, 0, 3); its products with its neighbours one, two and three places before."""
        assert rmt.dpfp(torch.tensor([2.0, -3.0]), 3).tolist() == [6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6]

    @pytest.mark.parametrize("update, gamma, reads", [
        ("delta", True, [1, 2, 3, 4, 5]), ("armt", True, [1, 2, 3, 4, 5]), ("armt", False, [1, 1, 4 / 3, 5 / 3, 2]),
        ("hebbian", True, [1, 3, 6, 10, 15])])
    def test_one_key_written_1_to_5_reads_1_to_5(self, cell, monkeypatch, update, gamma, reads):
        if not gamma:  # only gamma is clamped
            monkeypatch.setattr(torch.Tensor, "clamp", lambda t, low, high: torch.ones_like(t))
        block, key, carry, seen = cell(update), torch.randn(1, 4), None, []
        for value in range(1, 6):
            carry = written(block, key, torch.full((1, D - 4), float(value)), carry)
            seen.append(read(block, key, carry)[0, 0].item())
        assert seen == pytest.approx(reads, rel=1e-2)

    @pytest.mark.parametrize("update, gamma, least, most", [
        ("delta", True, 0.8, 1), ("armt", True, 0.8, 1), ("armt", False, 0, 0.5), ("hebbian", True, 0, 0.5)])
    def test_sixteen_keys_are_rewritten_500_times(self, cell, monkeypatch, update, gamma, least, most):
        """Each time with one of ten values; a read is right if the last value is the nearest one."""
        if not gamma:
            monkeypatch.setattr(torch.Tensor, "clamp", lambda t, low, high: torch.ones_like(t))
        torch.manual_seed(0)
        block, keys = cell(update, d_assoc=32, n_value=32), torch.randn(16, 32)
        symbols, which = F.normalize(torch.randn(10, 32), dim=1), torch.randint(16, (500,))
        values, last = torch.randint(10, (500,)), {}
        for key, value in zip(which.tolist(), values.tolist(), strict=True):
            last[key] = value
        answers = (read(block, keys, written(block, keys[which], symbols[values])) @ symbols.T).argmax(dim=1)
        assert least <= sum(answers[key] == value for key, value in last.items()) / len(last) <= most

    @pytest.mark.parametrize("update, expected", [
        ("delta", (0.98, 0.81, 0.60)), ("armt", (0.93, 0.75, 0.60)), ("hebbian", (0.94, 0.47, 0.28))])
    def test_capacity_falls_from_25_to_100_to_200_pairs(self, cell, update, expected):
        """Mean of five draws of keys; without the correction of what a key finds already it falls faster."""
        right = []
        for n_pairs in (25, 100, 200):
            for seed in range(5):
                torch.manual_seed(seed)
                block, symbols = cell(update, d_assoc=32, n_value=32), F.normalize(torch.randn(10, 32), dim=1)
                keys, values = torch.randn(n_pairs, 32), torch.randint(10, (n_pairs,))
                answers = read(block, keys, written(block, keys, symbols[values])) @ symbols.T
                right.append((answers.argmax(dim=1) == values).double().mean())
        assert_close(torch.stack(right).view(3, 5).mean(1), torch.tensor(expected), tolerance=0.05)

    @pytest.mark.parametrize("update", UPDATES)
    def test_an_empty_memory_says_nothing_and_the_order_of_writes_in_a_segment_does_not_count(self, update):
        model = build(f"armt by {update}")
        for block, carry in zip(model.backbone.blocks, model.initial_state(2).carry, strict=True):
            assert not block.recall(block.phi(torch.randn(2, 5, 4)), *carry).any()
            m = torch.randn(2, 6, D)
            once = block.write(torch.randn(2, 6, D), *carry)
            assert_close(block.write(m, *once), block.write(m.flip(1), *once))

    def test_z_never_decreases_and_the_memory_stays_in_float32_under_autocast(self):
        torch.set_default_dtype(torch.float32)
        model, tokens = build("armt by armt"), text(40 * T)
        state = model.initial_state(2)
        for segment in tokens.split(T, dim=1):
            with torch.autocast("cpu", torch.bfloat16):
                logits, later = model(segment, state)
            assert all((after[1] >= before[1]).all() for before, after in zip(state.carry, later.carry, strict=True))
            state = later
        assert logits.dtype == torch.bfloat16 and {t.dtype for t in tensors(state.carry)} == {torch.float32}
        block, phi = model.backbone.blocks[0], torch.rand(2, 5, K)
        with torch.autocast("cpu", torch.bfloat16):
            known = block.recall(phi, *state.carry[0])
        assert known.dtype == torch.float32 and torch.equal(known, block.recall(phi, *state.carry[0]))
        assert {t.dtype for t in tensors(model.bfloat16().initial_state(1).carry)} == {torch.float32}



def gradient_reach(model, n_segments, bptt_depth):
    """For every segment, the segments whose embedded tokens its logits send gradient to."""
    with calls(model.embed) as seen:
        logits, _ = unroll(model, text(n_segments * T), bptt_depth=bptt_depth)
    embedded = [output for _, output in seen]
    gradients = [torch.autograd.grad(segment.square().sum(), embedded, retain_graph=True, materialize_grads=True)
                 for segment in logits.split(T, dim=1)]
    return [[t for t, gradient in enumerate(row) if gradient.any()] for row in gradients]


def gradients_by_pair(variant, n_segments):
    """[s][t]: what the loss of segment s says to the weights that segment t used, each with a copy of its own."""
    models, tokens, losses = [build(variant) for _ in range(n_segments)], text(n_segments * T), []
    state = models[0].initial_state(2)
    for model, segment in zip(models, tokens.split(T, dim=1), strict=True):
        logits, state = model(segment, state)
        losses.append(loss_of(logits, segment))
    return [[torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, materialize_grads=True)
             for model in models] for loss in losses]


def sum_over(pairs, kept):
    """The sum of gradients_by_pair over the kept pairs (s, t), weight by weight."""
    return [sum(weight) for weight in zip(*[pairs[s][t] for s, t in kept], strict=True)]


class TestGradient:
    """How far gradient reaches, exactly."""

    @variants(CROSSED)
    def test_truncated_gradient_reaches_exactly_bptt_depth_segments_back(self, variant):
        """Later RMT code detaches a name that nobody reads, so that every depth there is full backpropagation.

        The original RMT code takes 0 for "none" in one script and for "all" in another.
        """
        model = build(variant)
        for n_segments in range(1, 7):
            for bptt_depth in (0, 1, 2, 3, 4, 5, 6, None):
                depth, reach = 6 if bptt_depth is None else bptt_depth, gradient_reach(model, n_segments, bptt_depth)
                assert reach[-1] == list(range(max(0, n_segments - 1 - depth), n_segments))
                assert all(row == list(range(row[0], s + 1)) and row[0] >= s - depth for s, row in enumerate(reach))

    @variants([name for name in ROWS if name not in CROSSED])
    def test_without_recurrent_memory_no_gradient_crosses(self, variant):
        """A Transformer-XL cache carries information, as above, and no gradient [TXL] sec. 3.2."""
        assert gradient_reach(build(variant), 4, None) == [[0], [1], [2], [3]]

    @variants(CROSSED)
    def test_truncated_gradient_is_its_share_of_the_full_one(self, variant):
        """The original RMT code replays k segments from the newest memory, not from the one k segments ago."""
        model, pairs = build(variant), gradients_by_pair(variant, 6)
        for n_segments in range(1, 7):
            tokens = text(6 * T)[:, :n_segments * T]
            full_logits, _ = unroll(model, tokens)
            for bptt_depth in (0, 1, 2, 3, 4, 5, 6, None):
                logits, _ = unroll(model, tokens, bptt_depth=bptt_depth)
                assert torch.equal(logits, full_logits)
                loss_of(logits, tokens).backward()
                depth = 6 if bptt_depth is None else bptt_depth
                cuts = range(n_segments - 1 - depth, 0, -depth - 1)
                kept = [(s, t) for s in range(n_segments) for t in range(s + 1)
                        if not any(t < cut <= s for cut in cuts)]
                assert_close(gradients_of(model), sum_over(pairs, kept), 1e-10)

    @variants(CROSSED)
    def test_the_two_other_meanings_of_depth_work_as_unroll_describes(self, variant):
        model, pairs, tokens, k = build(variant), gradients_by_pair(variant, 5), text(5 * T), 2
        with torch.no_grad():
            _, state = unroll(model, tokens[:, :-k * T])
        logits, _ = unroll(model, tokens[:, -k * T:], state)
        loss_of(logits, tokens[:, -k * T:]).backward()
        assert_close(gradients_of(model), sum_over(pairs, [(3, 3), (4, 3), (4, 4)]), 1e-10)

        segments, states = tokens.split(T, dim=1), [model.initial_state(2)]  # not detached: the initial memory learns
        for segment in segments:
            states.append(model(segment, states[-1])[1].detach())
        for s, segment in enumerate(segments):
            first = max(0, s - k)
            logits, _ = unroll(model, torch.cat(segments[first:s + 1], dim=1), states[first], last_only=True)
            loss_of(logits, segment).backward()
        kept = [(s, t) for s in range(5) for t in range(s + 1) if s - t <= k]
        assert_close(gradients_of(model), sum_over(pairs, kept), 1e-10)

    @variants([name for name in RECURRENT if name in VARIANTS])
    def test_initial_memory_learns_at_every_depth(self, variant):
        model, tokens = build(variant), text(4 * T)
        for bptt_depth in (0, 1, 2, 3, None):
            loss_of(unroll(model, tokens, bptt_depth=bptt_depth)[0], tokens).backward()
            assert model.memory.grad is not None and all(row.any() for row in model.memory.grad)
            model.zero_grad()

    @variants(CROSSED)
    def test_detach_cuts_and_keeps_the_values(self, variant):
        _, state = unroll(build(variant), text(8))
        cut = state.detach()
        assert any(t.requires_grad for t in tensors(state)) and not any(t.requires_grad for t in tensors(cut))
        assert isinstance(cut, State) and all(map(torch.equal, tensors(cut), tensors(state)))


class Returning(nn.Module):
    """A backbone that returns what a function makes of its rows, and begins with any carry."""

    def __init__(self, returned, carry=()):
        super().__init__()
        self.returned, self.carry = returned, carry

    def initial_carry(self, batch_size):
        return self.carry

    def forward(self, x, mask, carry):
        return self.returned(x)


def around(backbone=None, embed=None, head=None, **changes):
    """A model with parts of somebody else's."""
    return RMT(build(**changes).config, backbone, embed, head)


def segment_of(tokens, state=None, variant="rmt"):
    """Run one segment, from the initial state for two sequences unless another is given."""
    model = build(variant)
    return model(tokens, state or model.initial_state(2))


def state_of(variant="rmt", batch_size=2, **changes):
    """The state of another model after 20 tokens."""
    return unroll(build(variant, **changes), text(20, batch_size))[1]


ERRORS = [  # a mistake, and what its message must say
    (lambda: Config(d_model=18), ValueError, "d_model=18 must be divisible by 2 * n_head=8"),
    (lambda: Config(memory_form="layer"), ValueError, "memory_form='layer' must be one of norm, raw"),
    (lambda: Config(write_slot="read"), ValueError, "write_slot='read' must be one of memory, embedding, both"),
    (lambda: Config(memory_mask="full"), ValueError, "memory_mask='full' must be one of paper, causal"),
    (lambda: Config(update="hebb"), ValueError, "update='hebb' must be one of delta, armt, hebbian"),
    (lambda: Config(nu=8, d_assoc=4), ValueError, "nu=8 must be below 2 * d_assoc=8"),
    (lambda: unroll_diagonal(build(), text(3)), ValueError, "the memory of 'rmt' goes from a segment's last layer to"),
    (lambda: unroll_diagonal(build("rmt_encoder"), text(3)), ValueError, "no two segments can run side by side: use"),
    (lambda: unroll_diagonal(build("transformer around a GRU"), text(3)), ValueError, "a Recurrent may have none: use"),
    (lambda: unroll_diagonal(build("armt"), text(3), bptt_depth=-1), ValueError, "bptt_depth=-1 must be None"),
    (lambda: unroll_diagonal(build("armt"), text(3), state_of("armt", 3)), ValueError, "does not fit 'armt' with 2"),
    (lambda: unroll_diagonal(build("armt"), text(3) / 2), TypeError, "tokens are torch.float64 and must be a tensor"),
    (lambda: segment_of(text(3), state_of("armt by armt"), "armt"), ValueError, "(2, 24)))) does not fit 'armt'"),
    (lambda: segment_of(text(3), state_of("armt"), "armt by armt"), ValueError, "does not fit 'armt' with 2 sequences"),
    (lambda: segment_of(text(3), state_of("armt", d_assoc=5), "armt"), ValueError, "does not fit 'armt' with 2"),
    (lambda: segment_of(text(3), state_of("transformer_xl", cache_len=9), "armt"), ValueError, "does not fit 'armt'"),
    (lambda: segment_of(text(3), state_of("armt", nu=2), "transformer_xl"), ValueError, "((2, 16, 16),)"),
    (lambda: segment_of(text(3), state_of("armt")), ValueError, "does not fit 'rmt' with 2 sequences"),
    (lambda: Config(dropout=1.0), ValueError, "dropout=1.0 must be from 0 to below 1"),
    (lambda: Config(dropout=-0.1), ValueError, "dropout=-0.1 must be from 0 to below 1"),
    (lambda: Config(memory_noise=-1), ValueError, "memory_noise=-1 must be from 0 to below inf"),
    (lambda: Config(memory_noise="1"), ValueError, "memory_noise='1' must be from 0 to below inf"),
    (lambda: Config(tie_weights="no"), ValueError, "tie_weights='no' must be True or False"),
    (lambda: Config(memory_noise=math.inf), ValueError, "memory_noise=inf must be from 0 to below inf"),
    (lambda: build("lstm"), ValueError, "variant='lstm' must be one of transformer, transformer_xl"),
    (lambda: segment_of([[1, 2]]), TypeError, "tokens are list and must be a tensor of integers, for example"),
    (lambda: segment_of(torch.rand(2, 3)), TypeError, "tokens are torch.float64 and must be a tensor of integers"),
    (lambda: segment_of(text(3) > 5), TypeError, "tokens are torch.bool and must be a tensor of integers"),
    (lambda: segment_of(text(3)[0]), ValueError, "tokens have shape (3,) and must be (batch, length)"),
    (lambda: segment_of(text(0)), ValueError, "tokens have shape (2, 0) and must be (batch, length), neither of"),
    (lambda: unroll(build(), text(3, 0)), ValueError, "tokens have shape (0, 3) and must be (batch, length)"),
    (lambda: segment_of(torch.tensor([[3, 11]])), ValueError, "tokens reach from 3 to 11; vocab_size=11 needs 0 .. 10"),
    (lambda: unroll(build(), torch.tensor([[-1, 4]])), ValueError, "tokens reach from -1 to 4; vocab_size=11 needs 0"),
    (lambda: generate(build(), torch.tensor([[12]]), 1), ValueError, "tokens reach from 12 to 12; vocab_size=11 needs"),
    (lambda: segment_of(text(5)), ValueError, "a segment of 5 tokens is longer than segment_len=4: give long"),
    (lambda: segment_of(text(3), tuple(state_of())), TypeError, "state is a tuple and must be a State: start from"),
    (lambda: segment_of(text(3), state_of(batch_size=3)), ValueError, "start from model.initial_state(2)"),
    (lambda: segment_of(text(3), state_of(n_mem=2)), ValueError, "shapes ((2, 2, 16), ((), ())) does not"),
    (lambda: segment_of(text(3), state_of(d_model=32)), ValueError, "shapes ((2, 3, 32), ((), ())) does not"),
    (lambda: segment_of(text(3), state_of("rmt_xl")), ValueError, "does not fit 'rmt' with 2 sequences"),
    (lambda: unroll(build("rmt_xl"), text(3), state_of()), ValueError, "does not fit 'rmt_xl' with 2 sequences"),
    (lambda: segment_of(text(3), state_of("rmt_xl", n_layer=3), "rmt_xl"), ValueError, "does not fit 'rmt_xl'"),
    (lambda: segment_of(text(3), state_of("rmt_xl", cache_len=6), "rmt_xl"), ValueError, "((2, 6, 16),))) does not"),
    (lambda: segment_of(text(3), state_of("rmt_xl", n_layer=3)), ValueError, "does not fit 'rmt' with 2 sequences"),
    (lambda: segment_of(text(3), state_of(n_layer=3)), ValueError, "does not fit 'rmt' with 2 sequences"),
    (lambda: segment_of(text(3), State(None, ())), ValueError, "a state of shapes (None, ()) does not fit 'rmt'"),
    (lambda: segment_of(text(3), State(state_of().memory, None)), ValueError, "None) does not fit 'rmt'"),
    (lambda: unroll(build(), text(3), bptt_depth=-1), ValueError, "bptt_depth=-1 must be None (gradient crosses all"),
    (lambda: unroll(build(), text(3), bptt_depth=2.0), ValueError, "bptt_depth=2.0 must be None (gradient crosses all"),
    (lambda: unroll(build(), text(3), bptt_depth=True), ValueError, "bptt_depth=True must be None (gradient"),
    (lambda: generate(build(), text(3), 0), ValueError, "n_new=0 must be an integer of at least 1"),
    (lambda: generate(build(), text(3), 2.0), ValueError, "n_new=2.0 must be an integer of at least 1"),
    (lambda: generate(build(), text(3), 1, temperature=-1), ValueError, "temperature=-1 must be 0 (the most likely"),
    (lambda: generate(build(), text(3), 1, temperature=math.nan), ValueError, "temperature=nan must be 0 (the most"),
    (lambda: generate(build(), text(3), 1, temperature=1e-45), ValueError, "a finite number from 1e-4 up"),
    (lambda: generate(build(), text(3), 1, temperature="1"), ValueError, "temperature='1' must be 0 (the most"),
    (lambda: generate(build(), text(3), 1, top_k=0), ValueError, "top_k=0 must be None or an integer above 0"),
    (lambda: generate(build("rmt_encoder"), text(3), 1), ValueError, "sees whole segments and cannot generate"),
    (lambda: attention_maps(build("rmt around a GRU"), text(3), build("rmt around a GRU").initial_state(2)), ValueError,
     "attention_maps needs layers that call F.scaled_dot_product_attention, and these do not"),
    (lambda: around(nn.GRU(D, D)), TypeError, "put your GRU into a module that has them"),
    (lambda: around(Recurrent(), d_model=32), ValueError, "backbone fails on (2, 10, 32), vocab_size=11: input"),
    (lambda: around(Returning(lambda x: (x[:, 1:], ()))), ValueError,
     "backbone makes (2, 9, 16) of (2, 10, 16) and must make (2, 10, 16)"),
    (lambda: around(Returning(lambda x: (x[..., 1:], ()))), ValueError, "backbone makes (2, 10, 15) of (2, 10, 16)"),
    (lambda: around(Returning(lambda x: x[:1])), ValueError, "backbone fails on (2, 10, 16), vocab_size=11: not"),
    (lambda: around(Returning(lambda x: ("x", ()))), ValueError, "backbone fails on (2, 10, 16), vocab_size=11: 'str'"),
    (lambda: around(Returning(lambda x: (x, None))), ValueError,
     "backbone takes a carry () and returns None: for 2 sequences both must be tuples of tensors (2, ...), alike"),
    (lambda: around(Returning(lambda x: (x, (x[0],)))), ValueError, "takes a carry () and returns ((10, 16),): for"),
    (lambda: around(Returning(lambda x: (x, (x[:1, 0],)), (torch.zeros(1, D),))), ValueError, "((1, 16),) and"),
    (lambda: around(Returning(lambda x: (x, [x]), [torch.zeros(2, 1)])), ValueError, "takes a carry [tensor("),
    (lambda: around(embed=nn.Embedding(V, D + 1)), ValueError, "embed makes (2, 4, 17) of (2, 4) and must make (2,"),
    (lambda: around(embed=nn.Embedding(V - 1, D)), ValueError, "embed fails on (2, 4), vocab_size=11: index out of"),
    (lambda: around(head=nn.Linear(D, V + 1)), ValueError, "head makes (2, 10, 12) of (2, 10, 16) and must make"),
    (lambda: around(head=nn.Linear(D + 1, V)), ValueError, "head fails on (2, 10, 16), vocab_size=11: mat1 and mat2"),
    (lambda: around(head=nn.Flatten(0, 1)), ValueError, "head makes (20, 16) of (2, 10, 16) and must make"),
    (lambda: around(head=nn.Linear(D, V), tie_weights=True), ValueError, "tie_weights=True ties our parts: tie yours"),
    (lambda: around(embed=nn.Embedding(V, D), tie_weights=True), ValueError, "tie_weights=True ties our parts"),
    *[(lambda name=name: build(name, n_mem=0), ValueError, f"n_mem=0 must be at least 1 for '{name}'")
      for name, row in VARIANTS.items() if row.read or row.write],
    *[(lambda name=name: build(name, cache_len=0), ValueError, f"cache_len=0 must be at least 1 for '{name}'")
      for name in CACHED],
    *[(lambda name=name: build(f"{name} around a GRU"), ValueError, "has layers of its own: a backbone fits 'rmt'")
      for name, row in VARIANTS.items() if row.block is not rmt.Block],
    *[(lambda name=name, value=value: Config(**{name: value}), ValueError, f"{name}={value!r} must be an integer")
      for name in ("vocab_size", "segment_len", "n_layer", "n_head", "d_model", "n_mem", "cache_len", "d_assoc", "nu",
                   "window")
      for value in (-1, 8.0, True, "8", *[0] * (name not in ("n_mem", "cache_len", "window")))],
]


class TestErrors:
    """A mistake is refused at the border, with its value and what to do instead."""

    @pytest.mark.parametrize("mistake, error, message", ERRORS, ids=[message for _, _, message in ERRORS])
    def test_message_names_the_value_and_the_fix(self, mistake, error, message):
        with pytest.raises(error, match=re.escape(message)):
            mistake()

    def test_every_check_of_rmt_has_its_mistake_in_the_table(self):
        checks, raised = {node.lineno for node in ast.walk(ast.parse(SOURCE))
                          if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require"}, set()
        for mistake, error, _ in ERRORS:
            with pytest.raises(error) as caught:
                mistake()
            if caught.traceback[-1].name == "require":
                raised.add(caught.traceback[-2].lineno + 1)
        assert raised == checks


# ------------------------------------------------------------------------------------------------------------- scripts

TINY = ("--segments 3 --segment-len 4 --n-mem 2 --d-model 16 --n-head 2 --batch 4 --steps 40 --eval-samples 32 "
        "--eval-segments 6").split()


def run_script(script, *flags, cwd, start=False, ranks=1, **options):
    """Run a script as a user would, or start it; on several ranks with torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    if start:
        return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, **options)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, **options)


run_train_copy = partial(run_script, "train_copy.py")
run_train_lm = partial(run_script, "train_lm.py")


def wait_for(condition, process, seconds=60):
    """Wait until the condition holds; fail when the process ends or the time is over before."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline, "the run ended before it could be interrupted"
        time.sleep(0.002)


def steps_done(checkpoint, model="rmt"):
    """The steps of one run in a checkpoint, which must be whole; 0 where there is none."""
    if not checkpoint.exists():
        return 0
    return torch.load(checkpoint, weights_only=True)["runs"].get(model, {"step": 0})["step"]


def stop(process, checkpoint, script, n_steps):
    """Press Ctrl-C: the run finishes its step, saves, says how to go on. Returns the steps that it has done."""
    wait_for(lambda: steps_done(checkpoint) >= 14, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"python {script} --resume --out parts" in out
    stopped_at = steps_done(checkpoint)
    assert 14 <= stopped_at < n_steps
    return stopped_at


def weights(folder):
    """Every tensor of the models in a checkpoint."""
    runs = torch.load(folder / "checkpoint.pt", weights_only=True)["runs"]
    return {f"{name}.{key}": t for name, run in runs.items() for key, t in run["model"].items()}


def assert_same_weights(*folders):
    """The models in two checkpoints are the same to the last bit."""
    a, b = map(weights, folders)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestScripts:
    """train_copy.py, run as a user would."""

    FILES = {"config.json", "metrics.csv", "checkpoint.pt", "result.json", "training.png", "attention.png"}

    @pytest.mark.parametrize("variant", PUBLISHED)
    def test_a_tiny_run_of_every_variant_writes_its_files(self, variant, tmp_path):
        names = ("memorize", "detect", "remember", "reverse", "retrieval", "copy", "rewrite")
        task = names[PUBLISHED.index(variant) % len(names)]
        sizes = {"reverse": ("--segments", "4", "--eval-segments", "8")}.get(task, ())
        run = run_train_copy(*TINY, "--task", task, "--model", variant, *sizes, "--baseline", "none", "--out", "a",
                             cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert {path.name for path in (tmp_path / "a").iterdir()} == self.FILES
        result = json.loads((tmp_path / "a" / "result.json").read_text())["results"][variant]
        assert result["state_floats"] == floats_in_table(variant, {"L": 2, "C": 8, "D": 16, "M": 2, "K": 96})
        scores = [score for n, row in result.items() if n.isdigit() for score in row.values()]
        assert len(scores) >= 6 and all(0 <= score <= 1 for score in scores)
        assert all((tmp_path / "a" / f"{name}.png").read_bytes()[1:4] == b"PNG" for name in ("training", "attention"))

    def test_report_names_both_models_the_controls_and_the_files(self, tmp_path):
        run = run_train_copy(*TINY, "--bptt-depth", 1, "--checkpoint", "--bf16", "--memory-noise", 0.5, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        for line in ("rmt  ", "transformer  ", "its initial state at every boundary", "the state of another sample",
                     "chance 0.100", "free-running", "longer than in training", "files in out/copy-1"):
            assert line in run.stdout
        again = run_train_copy(*TINY, "--baseline", "none", cwd=tmp_path)
        assert again.returncode == 0 and "files in out/copy-2" in again.stdout  # a second run loses nothing

    @pytest.mark.parametrize("flags, words", [
        ("--task sort", "sort must be one of copy"),
        ("--model lstm", "variant='lstm' must be one of transformer"),
        ("--baseline lstm", "variant='lstm' must be one of transformer"),
        ("--curriculum easy", "easy must be grow, random or fixed"),
        ("--segments 8", "8 segments must be at least 2 and a multiple of 3 for --task copy"),
        ("--eval-segments 10", "10 segments must be at least 2 and a multiple of 3"),
        ("--task reverse --segments 5", "multiple of 2"),
        ("--task memorize --segments 1", "1 segments must be at least 2"),
        ("--task retrieval --segment-len 3", "--segment-len 3 must be at least 4"),
        ("--task retrieval --symbols 4 --segments 6", "--symbols 4 must be at least"),
        ("--task remember --keys 4 --segments 6", "--keys 4 must be at least 5, a key for each pair of 6 segments"),
        ("--task facts --segment-len 5", "--segment-len 5 must be at least 6 for --task facts"),
        ("--task facts --segment-len 11", "--segment-len 11 must be a multiple of 6, a sentence"),
        ("--task facts --facts two", "--segment-len 6 must be a multiple of 6, a sentence, and at least 12 for"),
        ("--task rewrite --keys 40000", "--symbols 10 and --keys 40000 must be at most 32765 together"),
        ("--task facts --facts three", "--facts three must be one, two, relations"),
        ("--task quadratic --segments 12", "12 segments of 30 must be 6 of 30"),
        ("--task rewrite --keys 0", "--keys 0 must be at least 1"),
        ("--model armt --n-mem 0", "--n-mem 0 must be at least 1"),
        ("--model armt --d-assoc 1 --nu 2", "nu=2 must be below 2 * d_assoc=2"),
        ("--model armt --update add", "update='add' must be one of delta, armt, hebbian"),
        ("--segments 0", "--segments 0 must be at least 1"),
        ("--batch -3", "--batch -3 must be at least 1"),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--n-mem 0", "--n-mem 0 must be at least 1"),
        ("--steps many", "invalid int value: 'many'"),
        ("--lr nan", "--lr nan must be at least 0 and at most"),
        ("--memory-noise -1", "--memory-noise -1.0 must be at least 0"),
        ("--seed 99999999999", "--seed 99999999999 must be at least 0 and at most 2147483647"),
        ("--target 99", "--target 99.0 must be at least 0 and at most 1"),
        ("--model none", "variant='none' must be one of transformer"),
        ("--device meta", "--device meta: try --device cpu"),
        ("--bptt-depth -2", "--bptt-depth -2 must be at least -1"),
        ("--d-model 30", "d_model=30 must be divisible by 2 * n_head=8"),
        ("--memory-form sum", "memory_form='sum' must be one of norm, raw"),
        ("--device cuda:9", "--device cuda:9: try --device cpu"),
        ("--device abacus", "--device abacus: try --device cpu"),
        ("--resume", "name the folder of an earlier run"),
        ("--resume --out nowhere", "no run in --out 'nowhere'"),
        ("--out file/x", "--out file/x cannot be written"),
        ("--segment 3", "unrecognized arguments: --segment 3"),
    ])
    def test_a_bad_flag_is_one_line_and_writes_nothing(self, flags, words, tmp_path):
        (tmp_path / "file").write_text("not a folder")
        run = run_train_copy(*flags.split(), cwd=tmp_path)
        error = run.stderr.strip().splitlines()
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert error[-1].startswith("train_copy.py: error: ") and words in error[-1]
        assert {path.name for path in tmp_path.iterdir()} == {"file"}

    @pytest.mark.parametrize("script", ["train_copy.py", "train_lm.py"])
    def test_help_answers_without_torch(self, script):
        run = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / script), "--help"],
                             capture_output=True, text=True, timeout=60)
        assert run.returncode == 0 and "--bptt-depth" in run.stdout and "(default: " in run.stdout
        assert not any(line.split("|")[-1].strip() == "torch" for line in run.stderr.splitlines())

    def test_the_readme_is_true(self):
        readme, namespace = (ROOT / "README.md").read_text(), {}
        first, second = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        exec(first, namespace)
        assert namespace["logits"].shape == (1, 296, 256)
        from assets.figures import associative_tables, family_tables, language_tables, tables
        for line in [*tables(), *language_tables(), *associative_tables(), *family_tables()]:  # from assets/results
            assert line in readme
        pytest.importorskip("transformers")
        exec(second, namespace)
        assert unroll(namespace["model"], torch.tensor([[1, 2, 3]]))[0].shape == (1, 3, 50257)

    def test_a_missed_target_is_exit_status_1(self, tmp_path):
        run = run_train_copy(*TINY, "--baseline", "none", "--target", 1, cwd=tmp_path)
        assert run.returncode == 1 and "MISSED" in run.stdout

    def test_a_loss_that_is_no_number_ends_the_run_with_one_line(self, tmp_path):
        run = run_train_copy(*TINY, "--lr", 1e9, "--steps", 1000, "--baseline", "none", cwd=tmp_path)
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert re.search(r"error: the loss is (nan|inf) at step \d+: start anew with an --lr smaller", run.stderr)

    def test_stopped_and_killed_runs_resume_to_the_same_numbers(self, tmp_path):
        flags = [*TINY, "--steps", 120, "--save-every", 7, "--memory-noise", 0.5, "--curriculum", "random"]
        whole = run_train_copy(*flags, "--out", "whole", cwd=tmp_path)
        assert whole.returncode == 0, whole.stderr
        checkpoint = tmp_path / "parts" / "checkpoint.pt"

        process = run_train_copy(*flags, "--out", "parts", cwd=tmp_path, start=True)
        stopped_at = stop(process, checkpoint, "train_copy.py", 120)

        process = run_train_copy("--resume", "--out", "parts", cwd=tmp_path, start=True)
        wait_for(lambda: steps_done(checkpoint) > stopped_at + 7, process)
        process.kill()  # kill -9: what was last saved is whole
        process.communicate(timeout=60)
        assert stopped_at < steps_done(checkpoint) < 120

        resumed = run_train_copy("--resume", "--out", "parts", cwd=tmp_path)
        assert resumed.returncode == 0, resumed.stderr
        assert (tmp_path / "parts" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
        assert_same_weights(tmp_path / "parts", tmp_path / "whole")

    def test_kill_during_a_save_leaves_a_whole_checkpoint(self, tmp_path):
        flags = [*TINY, "--steps", 100000, "--save-every", 1, "--out", "a"]
        checkpoint = tmp_path / "a" / "checkpoint.pt"
        for more in ((), ("--resume",), ("--resume",)):  # nearly all of the time goes into saving
            before = steps_done(checkpoint)
            process = run_train_copy(*([*more, "--out", "a"] if more else flags), cwd=tmp_path, start=True)
            wait_for(lambda before=before: steps_done(checkpoint) > before + 3, process)
            wait_for((tmp_path / "a" / "checkpoint.pt.tmp").exists, process)
            process.kill()
            process.communicate(timeout=60)
            assert steps_done(checkpoint) > before + 3

    def test_an_earlier_run_is_neither_overwritten_nor_mixed_up(self, tmp_path):
        first = run_train_copy(*TINY, "--baseline", "none", "--out", "a", cwd=tmp_path)
        assert first.returncode == 0, first.stderr
        before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
        again = run_train_copy(*TINY, "--out", "a", cwd=tmp_path)
        assert again.returncode == 2 and "--out a already holds a run: add --resume" in again.stderr
        config = json.loads(before["config.json"])
        del config["keys"], config["update"], config["weight_decay"]  # a run from before there were these flags
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        assert run_train_copy("--resume", "--out", "a", cwd=tmp_path).returncode == 0
        before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
        other = run_train_copy("--resume", "--out", "a", "--segments", 6, cwd=tmp_path)
        assert other.returncode == 2 and "--segments 6: the run in a has 3" in other.stderr
        assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
        saved = torch.load(tmp_path / "a" / "checkpoint.pt")
        saved["runs"]["mem_controller"] = saved["runs"].pop("rmt")
        torch.save(saved, tmp_path / "a" / "checkpoint.pt")
        unfit = run_train_copy("--resume", "--out", "a", cwd=tmp_path)
        assert unfit.returncode == 2 and len(unfit.stderr.splitlines()) == 1
        assert "controller.norm_1.weight has shape none there, (16,) here" in unfit.stderr
        (tmp_path / "a" / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:1000])
        truncated = run_train_copy("--resume", "--out", "a", cwd=tmp_path)
        assert truncated.returncode == 2 and "--out a cannot be resumed" in truncated.stderr
        (tmp_path / "a" / "checkpoint.pt").unlink()
        missing = run_train_copy("--resume", "--out", "a", cwd=tmp_path)
        assert missing.returncode == 2 and "--out a cannot be resumed" in missing.stderr


class TestTasks:
    """The tasks ask for what their docstrings show."""

    @staticmethod
    def draw(task, segments, segment_len, **flags):
        args = argparse.Namespace(**{"task": task, "segments": segments, "segment_len": segment_len, "symbols": 10,
                                     "keys": 64, "facts": "one", "eval_segments": [], "curriculum": "fixed"} | flags)
        tasks.check(args)
        tokens, n = tasks.TASKS[task].sample(args, segments, 64, torch.Generator().manual_seed(0))
        assert n >= 1 and tokens.min() >= 0 and tokens.max() < len(tasks.vocabulary(args))
        assert task in ("facts", "quadratic") or (tokens[:, -n:] < args.symbols).all()
        return tokens, n

    def test_every_task_shows_an_example_and_has_a_chance_level_that_a_guess_reaches(self):
        for name, task in tasks.TASKS.items():
            assert re.search(r"input .*\n\s+target ", task.sample.__doc__)
            size, segments = {"quadratic": 30, "facts": 12}.get(name, 8), {"retrieval": 3}.get(name, 6)
            for kind in tasks.KINDS if name == "facts" else ["one"]:
                args = argparse.Namespace(task=name, symbols=10, keys=8, facts=kind, segment_len=size)
                tokens, n = task.sample(args, segments, 2000, torch.Generator().manual_seed(1))
                guess = tokens[:, -n:].long().flatten().bincount().max().item() / (n * 2000)  # always the same symbol
                assert guess == pytest.approx(task.chance(args), abs=0.05)

    @variants(["rmt", *[name for name, row in VARIANTS.items() if row.mask == "full"]])
    def test_an_encoder_fills_in_blanks_and_is_asked_for_what_was_there(self, variant):
        import train_copy
        args = argparse.Namespace(task="copy", symbols=10, keys=4, segment_len=4, device="cpu")
        inputs, targets = train_copy.sample(args, build(variant), 3, 5, torch.Generator().manual_seed(0))
        assert torch.equal(targets, inputs[:, :4].repeat(1, 2))
        blank = tasks.vocabulary(args).index("_")
        assert (inputs[:, 5:] == blank).all() if variant != "rmt" else torch.equal(inputs[:, 5:], targets[:, :-1])

    def test_evaluation_never_draws_the_samples_of_training(self):
        """A CPU generator keeps 32 bits of its seed: seed + 2**32 was the stream of training."""
        import train_copy
        model = build("rmt", segment_len=8, vocab_size=13)
        args = argparse.Namespace(task="copy", symbols=10, segment_len=8, seed=7, eval_samples=64, device="cpu")
        _, (evaluated, *_) = train_copy.evaluate(args, model, 3, free=False)
        trained, _ = train_copy.sample(args, model, 3, 64, torch.Generator().manual_seed(args.seed))
        assert evaluated.shape == trained.shape and not torch.equal(evaluated[:, :8], trained[:, :8])

    @pytest.mark.parametrize("segments, T", [(3, 8), (9, 8), (6, 1 + 2)])
    def test_copy_asks_for_the_source_twice_over_the_papers_number_of_segments(self, segments, T):
        tokens, n = self.draw("copy", segments, T)
        source = tokens[:, :segments // 3 * T]
        assert tokens.size(1) - 1 == segments * T and n == 2 * source.size(1)
        assert torch.equal(tokens[:, -n:], torch.cat([source, source], dim=1))
        assert (tokens[:, source.size(1)] == 10).all() and source.unique().tolist() == list(range(10))

    @pytest.mark.parametrize("segments, T", [(2, 8), (6, 8)])
    def test_reverse_asks_for_the_source_backwards(self, segments, T):
        tokens, n = self.draw("reverse", segments, T)
        assert tokens.size(1) - 1 == segments * T and torch.equal(tokens[:, -n:], tokens[:, :n].flip(1))

    @pytest.mark.parametrize("segments, T", [(3, 4), (8, 6)])
    def test_retrieval_has_one_pair_per_segment_and_no_key_twice(self, segments, T):
        tokens, n = self.draw("retrieval", segments, T)
        assert n == T - 3
        for row in tokens.tolist():
            pairs = {row[s * T]: row[s * T + 2:s * T + 2 + n] for s in range(segments - 1)}
            assert len(pairs) == segments - 1 and pairs[row[(segments - 1) * T]] == row[-n:]

    @pytest.mark.parametrize("task", ["remember", "rewrite"])
    @pytest.mark.parametrize("segments, keys, T", [(2, 1, 2), (9, 8, 2), (5, 4, 4), (40, 64, 3)])
    def test_remember_and_rewrite_ask_for_the_last_value_of_a_key(self, task, segments, keys, T):
        tokens, n = self.draw(task, segments, T, keys=keys)
        asked_again, places = 0, set()
        for row in tokens.tolist():
            written, asked = [(row[s * T], row[s * T + 1:s * T + T]) for s in range(segments - 1)], row[-n - 1]
            assert all(13 <= key < 13 + keys for key, _ in written) and dict(written)[asked] == row[-n:]
            assert task == "rewrite" or len(dict(written)) == len(written)
            asked_again += [key for key, _ in written].count(asked) > 1
            places.add([key for key, _ in written].index(asked))
        assert (asked_again > 0) == (task == "rewrite" and segments > 2) and len(places) > (segments - 1) // 3

    @pytest.mark.parametrize("kind", ["one", "two", "relations"])
    @pytest.mark.parametrize("segments, T", [(2, 12), (8, 12), (5, 18)])
    def test_answers_of_facts_follow_from_the_sentences(self, kind, segments, T):
        """Replayed by a reader of sentences who knows nothing of how they were made."""
        tokens, n = self.draw("facts", segments, T, facts=kind)
        verbs, places, noise, told_at, asked = set(), [], set(), set(), set()
        for row in tokens.tolist():
            words = [tasks.WORDS[token] for token in row]
            n_body = (segments - 1) * T
            at, holder, relation, told = {}, {}, {}, 0
            for i in range(0, n_body, 6):
                a, b, c, d, e, stop = words[i:i + 6]
                assert stop == "."
                if a == "the":
                    noise.add((b, c, d, e))
                else:
                    told += 1
                    told_at.add(i)
                if b == "went":
                    at[a] = e
                    at |= {thing: e for thing in holder if holder[thing] == a}
                elif b == "took":
                    assert d not in holder and at.get(d, at[a]) == at[a]  # nobody takes what is not there
                    holder[d], at[d] = a, at[a]
                elif b == "dropped":
                    assert holder.pop(d) == a
                elif b == "is":
                    relation[c, e] = a
                verbs.add(b if a != "the" else "")
            question, answer = words[n_body:-1], words[-1]
            if kind == "relations":
                what, _, side, _, other = question
                expected = ({relation[side, other]} if what == "what" else
                            {there for (way, there), here in relation.items() if (way, here) == (side, what)})
                assert expected == {answer}
            else:
                assert at[question[-1]] == answer
            places.append(answer)
            asked.add(question[0] if kind == "relations" else question[-1])
            assert min(2, n_body // 6) <= told <= 6
        assert set(places) == set(tasks.PLACES) and n == 1
        assert len(told_at) == n_body // 6 and (segments == 2 or len(noise) > 20)
        assert asked >= set({"one": tasks.PEOPLE, "two": tasks.OBJECTS, "relations": ["what", *tasks.PLACES]}[kind])
        known = {"one": {"went"}, "two": {"went", "took", "dropped"}, "relations": {"is"}}[kind]
        assert verbs - {""} == known - (set() if segments > 2 else {"dropped"})

    def test_quadratic_equations_are_solved_in_six_fields(self):
        tokens, n = self.draw("quadratic", 6, 30)
        unsolved, leading = 0, set()
        for row in tokens.tolist():
            line = "".join(tasks.CHARACTERS[token] for token in row)
            given, monic, discriminant, *roots, answer = (line[i:i + 30].rstrip("_") for i in range(0, 180, 30))
            a, b, c = map(int, re.fullmatch(r"(-?\d+)\*x\^2([+-]\d+)\*x([+-]\d+)=0", given).groups())
            p, q = map(int, re.fullmatch(r"x\^2([+-]\d+)\*x([+-]\d+)=0", monic).groups())
            assert 1 <= abs(a) <= 10 and (b, c) == (a * p, a * q) and discriminant == f"D={p * p - 4 * q}"
            leading.add(a)
            if p * p < 4 * q:
                unsolved += 1
                assert {*roots, answer} == {"none"}
            else:
                low, high = map(int, answer.split(","))
                assert -100 <= low <= high <= 100 and (p, q) == (-low - high, low * high)
                for text, x in zip(roots, (low, high), strict=True):
                    value = re.fullmatch(r"x=\((-?\d+)([+-]\d+)\)/2=(-?\d+)", text).groups()
                    assert (int(value[0]) + int(value[1])) / 2 == int(value[2]) == x
        assert n == 150 and 5 <= unsolved <= 25 and min(leading) < -7 and max(leading) > 7

    @pytest.mark.parametrize("task", ["memorize", "detect"])
    def test_facts_stand_where_they_should_in_noise_that_is_no_symbol(self, task):
        tokens, n = self.draw(task, 5, 8)
        starts = [row.index(10) for row in tokens.tolist()]
        assert tokens.size(1) == 4 * 8 + 1 + n and set(starts) == ({0} if task == "memorize" else {0, 8, 16, 24})
        for row, start in zip(tokens.tolist(), starts, strict=True):
            assert row[start + 1:start + 1 + n] == row[-n:] and row[-n - 1] == 11
            assert all(token >= 13 for i, token in enumerate(row[:-n - 1]) if not start <= i <= start + n)


# ------------------------------------------------------------------------------------------------------------ language

TINY_LM = ("--data a.txt --batch 4 --segment-len 8 --d-model 16 --n-head 2 --n-mem 2 --cache-len 5 --steps 30 "
           "--warmup 5 --reset-every 7 --eval-every 10 --save-every 10 --length 20").split()
WORDS = "import the memory of a segment, and read it: (what) was 'written' in line 1, 2 or 30?\nNext".split(" ")
TEXT = " ".join(random.Random(0).choices(WORDS, k=5000))[:20_000]


@pytest.fixture
def folder(tmp_path):
    """A folder with a text of 20,000 characters in it."""
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path


def lm_arguments(**changes):
    """The flags of TINY_LM and the defaults, as train_lm.py has them after parsing."""
    import train_lm
    args = {name: default for group in train_lm.FLAGS.values() for name, (default, _) in group.items()}
    sizes = {"segment_len": T, "d_model": D, "n_head": H, "n_mem": M, "cache_len": C}
    return argparse.Namespace(**args | sizes | {"device": "cpu", "batch": 4, "warmup": 3, "reset_every": 5} | changes)


class TestLanguage:
    """train_lm.py: texts, streams, evaluation, data parallelism, resuming, samples."""

    FILES = {"config.json", "metrics.csv", "checkpoint.pt", "result.json", "loss.png", "position.png", "sample.txt"}

    @variants([name for name in PUBLISHED if VARIANTS[name].mask != "full"])
    def test_a_tiny_run_of_every_variant_of_language_model_writes_its_files(self, variant, folder):
        run = run_train_lm(*TINY_LM, "--model", variant, "--baseline", "none", "--out", "a", cwd=folder)
        assert run.returncode == 0, run.stderr
        assert {path.name for path in (folder / "a").iterdir()} == self.FILES
        results = json.loads((folder / "a" / "result.json").read_text())["results"]
        crosses = VARIANTS[variant].recurrent or VARIANTS[variant].block is not rmt.Block
        assert ("reset" in results[variant]) == ("of another stream" in results[variant]) == crosses
        bits = results[variant]["carried"]
        assert len({results[variant][state]["bpc"] for state in ("carried", "reset", "of another stream") if crosses
                    }) == 3 * crosses
        assert 1 < bits["bpc"] < 6 and min(bits["by_position"]) < bits["bpc"] < max(bits["by_position"])
        assert results["bigram"]["bpc"] < results["unigram"]["bpc"] < results["uniform"]["bpc"]
        sample, test = (folder / "a" / "sample.txt").read_bytes(), TEXT.encode()[19_000:]
        assert sample[:16] == test[:16] and len(sample) == 16 + 20

    def test_report_names_both_models_the_controls_and_the_references(self, folder):
        options = "--bf16 --checkpoint --accumulate 2 --bptt-depth 0 --eval-length 1".split()
        run = run_train_lm(*TINY_LM, *options, cwd=folder)
        assert run.returncode == 0, run.stderr
        for line in ("uniform  ", "unigram  ", "bigram  ", "gzip -9  ", "rmt  carried", "transformer  carried",
                     "rmt  reset", "rmt  of another stream", "parameters, state of 32 floats",
                     "parameters, state of 0 floats", " characters per CPU second", "files in out/a-1",
                     "18000 + 1000 + 1000 characters"):
            assert line in re.sub("   +", "  ", run.stdout)
        again = run_train_lm(*TINY_LM, "--baseline", "none", cwd=folder)
        assert again.returncode == 0 and "files in out/a-2" in again.stdout  # a second run loses nothing

    @pytest.mark.parametrize("flags, words", [
        ("--data no.txt", "--data no.txt: no such file; give files, folders, python, shakespeare, enwik8, text8"),
        ("--data empty.txt", "its train part has 0 characters and must have 257"),
        ("--data short.txt", "its train part has 180 characters and must have 257"),
        ("--data short.txt --batch 1", "its valid part has 10 characters and must have 33"),
        ("--data zeros.bin", "--data zeros.bin holds zero bytes and is no text"),
        ("--data mixed", "/zeros.bin holds zero bytes and is no text"),
        ("--data nothing", "its train part has 0 characters"),
        ("--data a.txt short.txt --prompt \u00e9", "--prompt '\u00e9' has bytes that the training part has not: b"),
        ("--batch 6 --accumulate 4", "--batch 6 must be divisible by 1 ranks * --accumulate 4"),
        ("--model rmt_encoder", "'rmt_encoder' sees whole segments, the next character too: use 'rmt'"),
        ("--baseline rmt_encoder", "'rmt_encoder' sees whole segments"),
        ("--model none", "variant='none' must be one of transformer"),
        ("--model lstm", "variant='lstm' must be one of transformer"),
        ("--memory-form sum", "memory_form='sum' must be one of norm, raw"),
        ("--segments-per-step 0", "--segments-per-step 0 must be at least 1"),
        ("--lr nan", "--lr nan must be at least 0 and at most"),
        ("--temperature 1e-9", "temperature=1e-09 must be 0 (the most likely token)"),
        ("--batch 2000", "its train part has 18000 characters and must have 128001"),
        ("--device abacus", "abacus"),
        ("--device cuda:9", "cuda"),
        ("--resume", "no run in --out ''"),
        ("--sample --out nowhere", "no run in --out 'nowhere'"),
        ("--out a.txt", "a.txt/checkpoint.pt was not written"),
        ("--segment 3", "unrecognized arguments: --segment 3"),
    ])
    def test_a_bad_flag_is_one_line_and_writes_nothing(self, flags, words, folder):
        (folder / "empty.txt").touch()
        (folder / "short.txt").write_text("a short text, no more than this; " * 6 + "..")
        (folder / "zeros.bin").write_bytes(bytes(1000))
        (folder / "nothing").mkdir()
        (folder / "mixed").mkdir()
        (folder / "mixed" / "zeros.bin").write_bytes(b"text" * 1000 + bytes(1))
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        run = run_train_lm("--data", "a.txt", "--batch", 4, *flags.split(), cwd=folder)
        assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1
        assert run.stderr.startswith("train_lm.py: error: ") and words in run.stderr
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_a_stopped_and_killed_language_model_resumes_to_the_same_numbers(self, folder):
        flags = [*TINY_LM, "--steps", 90, "--save-every", 5, "--dropout", 0.1, "--memory-noise", 0.5, "--accumulate", 2]
        whole = run_train_lm(*flags, "--out", "whole", cwd=folder)
        assert whole.returncode == 0, whole.stderr
        checkpoint = folder / "parts" / "checkpoint.pt"

        process = run_train_lm(*flags, "--out", "parts", cwd=folder, start=True)
        stopped_at = stop(process, checkpoint, "train_lm.py", 90)

        for model, least in (("rmt", stopped_at + 7), ("transformer", 14)):
            process = run_train_lm("--resume", "--out", "parts", cwd=folder, start=True)
            wait_for(lambda model=model, least=least: steps_done(checkpoint, model) >= least, process)
            process.kill()  # kill -9: what was last saved is whole
            process.communicate(timeout=60)
            assert least <= steps_done(checkpoint, model) < 90

        resumed = run_train_lm("--resume", "--out", "parts", cwd=folder)
        assert resumed.returncode == 0, resumed.stderr
        tables = [[line.split(",")[:3] + line.split(",")[4:] for line in (folder / name / "metrics.csv").open()]
                  for name in ("whole", "parts")]
        assert tables[0] == tables[1] and len(tables[0]) > 8
        assert (folder / "parts" / "sample.txt").read_bytes() == (folder / "whole" / "sample.txt").read_bytes()
        assert_same_weights(folder / "parts", folder / "whole")

    def test_an_earlier_language_model_is_neither_overwritten_nor_mixed_up(self, folder):
        first = run_train_lm(*TINY_LM, "--baseline", "none", "--out", "a", cwd=folder)
        assert first.returncode == 0, first.stderr
        before = {path.name: path.read_bytes() for path in (folder / "a").iterdir()}
        again = run_train_lm(*TINY_LM, "--out", "a", cwd=folder)
        assert again.returncode == 2 and "--out a already holds a run: add --resume" in again.stderr
        other = run_train_lm("--resume", "--out", "a", "--n-mem", 3, cwd=folder)
        assert other.returncode == 2 and "--n-mem 3: the run in a has 2" in other.stderr
        model = run_train_lm("--sample", "--out", "a", "--model", "transformer", cwd=folder)
        assert model.returncode == 2 and "--model transformer: the checkpoint has rmt" in model.stderr
        prompt = run_train_lm("--sample", "--out", "a", "--prompt", "\u00e9", cwd=folder)
        assert prompt.returncode == 2 and "has bytes that the training part has not" in prompt.stderr
        other = run_train_lm("--sample", "--out", "a", "--segment-len", 9, cwd=folder)
        assert other.returncode == 2 and "--segment-len 9: the run in a has 8" in other.stderr
        (folder / "a.txt").write_text("#" * 20_000)
        text = run_train_lm("--resume", "--out", "a", cwd=folder)
        assert text.returncode == 2 and "the text has 1 different characters" in text.stderr
        assert {path.name: path.read_bytes() for path in (folder / "a").iterdir()} == before
        (folder / "a.txt").write_text(TEXT)
        saved = torch.load(folder / "a" / "checkpoint.pt")
        saved["runs"]["rmt"]["model"]["memory"] = torch.zeros(3, 16)
        torch.save(saved, folder / "a" / "checkpoint.pt")
        for flags in ("--resume", "--sample"):
            unfit = run_train_lm(flags, "--out", "a", cwd=folder)
            assert unfit.returncode == 2 and len(unfit.stderr.splitlines()) == 1
            assert "the checkpoint does not fit 'rmt': memory has shape (3, 16) there, (2, 16) here" in unfit.stderr
        saved["runs"]["transformer"] = saved["runs"].pop("rmt")
        torch.save(saved, folder / "a" / "checkpoint.pt")
        other = run_train_lm("--resume", "--out", "a", cwd=folder)
        assert other.returncode == 2 and "--model rmt: the checkpoint has transformer" in other.stderr
        (folder / "a" / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:1000])
        for flags in ("--resume", "--sample"):
            truncated = run_train_lm(flags, "--out", "a", cwd=folder)
            assert truncated.returncode == 2 and "a/checkpoint.pt is no checkpoint to go on with" in truncated.stderr

    def test_a_full_disk_is_one_line_and_leaves_a_whole_checkpoint(self, folder):
        resource = pytest.importorskip("resource")
        run = run_train_lm(*TINY_LM, "--baseline", "none", "--steps", 15, "--out", "a", cwd=folder)
        assert run.returncode == 0, run.stderr
        before = (folder / "a" / "checkpoint.pt").read_bytes()
        limits = (len(before) // 2, len(before) // 2)  # no file may grow larger
        full = run_train_lm(*TINY_LM, "--baseline", "none", "--out", "b", cwd=folder,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
        assert full.returncode == 2 and len(full.stderr.strip().splitlines()) == 1
        assert "b/checkpoint.pt was not written, and what stood there before is whole" in full.stderr
        assert steps_done(folder / "b" / "checkpoint.pt") == 0 and not list((folder / "b").glob("*.tmp"))

    @pytest.mark.parametrize("mode", [["--accumulate", 2], ["--ranks"]])
    def test_two_ranks_and_two_parts_have_the_gradients_of_one_process(self, mode, folder):
        """After a step the optimizer's first moment is a tenth of the gradient; by the fourth, states were carried."""
        ranks = 2 if mode == ["--ranks"] else 1
        for steps in (1, 4):
            flags = [*TINY_LM, "--baseline", "none", "--steps", steps, "--warmup", 1]
            one = run_train_lm(*flags, "--out", f"one-{steps}", cwd=folder)
            two = run_train_lm(*flags, *(mode if ranks == 1 else ()), "--out", f"two-{steps}", cwd=folder, ranks=ranks)
            assert one.returncode == two.returncode == 0, one.stderr + two.stderr
            a, b = (torch.load(folder / f"{name}-{steps}" / "checkpoint.pt", weights_only=True)
                    for name in ("one", "two"))
            moments = [[state["exp_avg"] for state in saved["runs"]["rmt"]["optimizer"]["state"].values()]
                       for saved in (a, b)]
            assert len(moments[0]) == len(dict(build().named_parameters()))
            torch.testing.assert_close(moments[1], moments[0], rtol=1e-3, atol=1e-6)
            assert all(moment.abs().max() > 1e-5 for moment in moments[0])
            states = [[part for rank in saved["ranks"] for part in rank["states"]["rmt"]] for saved in (a, b)]
            assert [len(part[0]) for part in states[1]] == [2, 2] and len(states[0]) == 1
            memory = torch.cat([part[0] for part in states[1]])
            torch.testing.assert_close(memory, states[0][0][0], rtol=1e-3, atol=1e-4)
            logs = [saved["runs"]["rmt"]["rows"] for saved in (a, b)]  # of the mean over all streams
            assert logs[0][-1][4] == pytest.approx(logs[1][-1][4], rel=1e-5) and two.stdout.count("parameters") == 1

    def test_two_ranks_resume_to_the_same_numbers(self, folder):
        flags = [*TINY_LM, "--baseline", "none", "--steps", 200, "--save-every", 5, "--dropout", 0.1]
        whole = run_train_lm(*flags, "--out", "whole", cwd=folder, ranks=2)
        assert whole.returncode == 0, whole.stderr
        process = run_train_lm(*flags, "--out", "parts", cwd=folder, ranks=2, start=True)
        checkpoint = folder / "parts" / "checkpoint.pt"
        wait_for(lambda: steps_done(checkpoint) >= 10, process)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert "torchrun --nproc-per-node 2 train_lm.py --resume --out parts" in out
        assert 10 <= steps_done(checkpoint) < 200
        alone = run_train_lm("--resume", "--out", "parts", cwd=folder)
        assert alone.returncode == 2 and "the run in parts began on 2 ranks, not 1" in alone.stderr
        resumed = run_train_lm("--resume", "--out", "parts", cwd=folder, ranks=2)
        assert resumed.returncode == 0, resumed.stderr
        assert_same_weights(folder / "parts", folder / "whole")

    def test_training_equals_a_loop_by_hand(self):
        """The state is carried from step to step, detached; every fifth step starts from the learned memory."""
        import train_lm
        args, raw = lm_arguments(steps=16), TEXT[:500].encode()  # 450 characters, 4 streams of 112: 14 steps a pass
        text = train_lm.Text(raw)
        run = train_lm.new_run(args, "rmt", len(text.vocabulary))
        model = copy.deepcopy(run["model"])
        train_lm.train(args, run, "rmt", text, lambda: None)

        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        numbers = [text.vocabulary.index(byte) for byte in raw[:450]]
        length, width, state = 449 // 4, 2 * T, None
        for step in range(16):
            place = step % 14 * width
            rows = torch.tensor([numbers[i * length:(i + 1) * length + 1][place:place + width + 1] for i in range(4)])
            if step in (0, 5, 10, 14, 15):
                state = model.initial_state(4)
            for group in optimizer.param_groups:
                group["lr"] = 0.012 * min((step + 1) / 3, (1 + math.cos(math.pi * step / 16)) / 2)
            first, state = model(rows[:, :T], state)
            second, state = model(rows[:, T:2 * T], state)
            state = State(state.memory.detach(), state.carry)
            optimizer.zero_grad()
            F.cross_entropy(torch.cat([first, second], dim=1).flatten(0, 1), rows[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        for ours, theirs in zip(run["model"].parameters(), model.parameters(), strict=True):
            assert_close(ours, theirs, 1e-9)

    def test_flags_reach_the_segments(self):
        """bptt_depth cuts within a step, checkpoint changes nothing, bf16 rounds."""
        import train_lm
        torch.set_default_dtype(torch.float32)
        tokens, losses, gradients = text(4 * T + 1), {}, {}
        for name, changes in {"": {}, "depth": {"bptt_depth": 0}, "checkpoint": {"checkpoint": True},
                              "bf16": {"bf16": True}}.items():
            model = RMT(build().config)
            with torch.no_grad():
                model.memory.normal_(generator=torch.Generator().manual_seed(0))
            torch.manual_seed(0)
            model.init_weights(("memory",))
            loss, state = train_lm.Segments(lm_arguments(**changes), model)(tokens[:, :-1], tokens[:, 1:], None)
            loss.backward()
            assert not state.memory.requires_grad
            losses[name], gradients[name] = loss.item(), torch.cat([g.flatten() for g in gradients_of(model)])
        assert losses["depth"] == losses[""] == losses["checkpoint"]
        assert torch.equal(gradients["checkpoint"], gradients[""])
        assert (gradients["depth"] - gradients[""]).abs().max() > 1e-5
        assert 0 < abs(losses["bf16"] - losses[""]) < 0.05

    @pytest.mark.parametrize("variant", ["transformer", "rmt", "rmt_xl"])
    @pytest.mark.parametrize("length", [9, 64 * T + 1, 1001])
    def test_evaluation_equals_a_loop_over_streams(self, variant, length):
        import train_lm
        model, tokens = build(variant), text(length, 1)[0].to(torch.uint8)
        n = max(1, min(64, (length - 1) // (32 * T)))
        bits = {state: [[] for _ in range(T)] for state in ("carried", "reset")}
        for i in range(n):
            row = tokens[i * ((length - 1) // n):][:(length - 1) // n + 1].long()
            for kind, by_position in bits.items():
                pieces = [row[:-1]] if kind == "carried" else row[:-1].split(T)
                logits = torch.cat([unroll(model, piece[None])[0][0] for piece in pieces])
                for place, (p, target) in enumerate(zip(logits.softmax(-1), row[1:], strict=True)):
                    by_position[place % T].append(-math.log2(p[target].item()))
        args = lm_arguments()
        for kind, between in (("reset", lambda state: model.initial_state(n)), ("carried", lambda state: state)):
            scores = train_lm.evaluate(args, model, tokens, between)
            every = [bit for place in bits[kind] for bit in place]
            assert scores["bpc"] == pytest.approx(sum(every) / len(every), rel=1e-9)
            assert scores["by_position"] == pytest.approx([sum(place) / len(place) for place in bits[kind]], rel=1e-9)
        cached = min(C, (length - 1) // n)
        assert scores["state_floats"] == {"transformer": 0, "rmt": M * D, "rmt_xl": M * D + L * D * cached}[variant]

    def test_a_text_is_cut_90_5_5_and_has_the_characters_of_its_first_part(self):
        import train_lm
        raw = b"ab" * 450 + b"abc" * 16 + b"ad" + b"b" * 50
        text = train_lm.Text(raw)
        assert text.vocabulary == b"ab" and text.n_unseen == 16 + 1
        assert text.train.tolist() == [0, 1] * 450 and len(text.valid) == 50 - 17 and text.test.tolist() == [1] * 50
        assert text.decode(text.valid) == b"ab" * 16 + b"a"
        rows = train_lm.streams(torch.arange(100), 3)
        assert rows.tolist() == [list(range(i * 33, i * 33 + 34)) for i in range(3)]

    def test_references_equal_counts_by_hand(self):
        """Counts begin at 1 for every pair of characters, so that no pair of the test part is impossible."""
        import train_lm
        text = train_lm.Text(TEXT.encode()[:4000])
        train, test, V = TEXT.encode()[:3600], text.decode(text.test), len(text.vocabulary)
        def p_two(a, b):
            return (1 + sum(train[i:i + 2] == bytes([a, b]) for i in range(3599))) / (V + train[:-1].count(a))
        def p_one(b):
            return (V + train[1:].count(b)) / (V * V + 3599)
        pairs = [(test[i], test[i + 1]) for i in range(len(test) - 1)]
        bits = train_lm.references(text)
        assert bits["uniform"] == math.log2(V)
        assert bits["unigram"] == pytest.approx(-sum(math.log2(p_one(b)) for _, b in pairs) / len(pairs))
        assert bits["bigram"] == pytest.approx(-sum(math.log2(p_two(a, b)) for a, b in pairs) / len(pairs))
        assert bits["gzip -9"] == 8 * len(gzip.compress(test, 9)) / len(test)

    def test_the_default_text_is_the_standard_library_without_its_tests(self):
        import train_lm
        raw = train_lm.read(["python"])
        assert raw == train_lm.read(["python"]) and len(raw) > 3_000_000
        assert Path(json.__file__).read_bytes() in raw and raw.index(Path(argparse.__file__).read_bytes()) < raw.index(
            Path(json.__file__).read_bytes())
        assert b"class CmdLineTest(" not in raw and Path(pytest.__file__).read_bytes() not in raw

    def test_files_and_folders_are_read_in_the_order_given_and_sorted_inside(self, folder):
        import train_lm
        (folder / "b" / "c").mkdir(parents=True)
        (folder / "b" / ".git").mkdir()
        for name, content in {"b/z": "4", "b/c/y": "3", "b/.hidden": "no", "b/.git/z": "no", "x": "1"}.items():
            (folder / name).write_text(content)
        assert train_lm.read([str(folder / "x"), str(folder / "b")]) == b"134"

    def test_a_download_is_kept_checked_and_never_half_there(self, folder, monkeypatch):
        import hashlib
        import http.server
        import threading
        import zipfile

        import assets.run
        import train_lm
        (folder / "server").mkdir()
        (folder / "home").mkdir()
        content = TEXT.encode()
        (folder / "server" / "plain.txt").write_bytes(content)
        with zipfile.ZipFile(folder / "server" / "packed.zip", "w") as archive:
            archive.writestr("packed", content)
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder / "server")
        monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.chdir(folder / "home")
        url = f"http://127.0.0.1:{server.server_port}"
        hashes = {name: hashlib.sha256((folder / "server" / name).read_bytes()).hexdigest()
                  for name in ("plain.txt", "packed.zip")}
        for name, file, sha256 in (("plain", "plain.txt", hashes["plain.txt"]), ("wrong", "plain.txt", "0" * 64),
                                   ("packed", "packed.zip", hashes["packed.zip"]), ("missing", "no.txt", "0" * 64)):
            monkeypatch.setitem(assets.run.DOWNLOADS, name, (f"{url}/{file}", sha256))
        for name, words in (("wrong", f"it has sha256 {hashes['plain.txt']}"), ("missing", "404")):
            with pytest.raises(ValueError, match=words) as error:
                train_lm.read([name])
            assert f"no {name} from {url}" in str(error.value) and f"(sha256 {'0' * 64})" in str(error.value)
            assert "--data FILE" in str(error.value)
            assert not list((folder / "home" / "out" / "data").iterdir())
        assert train_lm.read(["plain"]) == train_lm.read(["packed"]) == content
        server.shutdown()
        server.server_close()
        assert train_lm.read(["plain"]) == train_lm.read(["packed"]) == content  # kept
        kept = folder / "home" / "out" / "data" / "plain.txt"
        kept.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=r"delete out.data.plain\.txt"):
            train_lm.read(["plain"])
        kept.unlink()
        with pytest.raises(ValueError, match="refused"):
            train_lm.read(["plain"])

    def test_a_sample_is_what_generate_writes_past_segment_ends(self, folder):
        run = run_train_lm(*TINY_LM, "--out", "a", cwd=folder)
        assert run.returncode == 0, run.stderr
        torch.set_default_dtype(torch.float32)
        for model_name in ("rmt", "transformer"):
            flags = ("--sample", "--out", "a", "--prompt", "import t", "--length", 100, "--temperature", 0)
            sample = run_train_lm(*flags, "--model", model_name, cwd=folder)
            assert sample.returncode == 0, sample.stderr
            saved = torch.load(folder / "a" / "checkpoint.pt", weights_only=True)
            vocabulary = bytes(saved["vocabulary"])
            model = RMT(Config(model_name, len(vocabulary), 8, n_head=2, d_model=16, n_mem=2, cache_len=5,
                               memory_form="raw", write_slot="embedding")).eval()
            model.load_state_dict(saved["runs"][model_name]["model"])
            new = generate(model, torch.tensor([[vocabulary.index(byte) for byte in b"import t"]]), 100, temperature=0)
            assert sample.stdout == "import t" + bytes(vocabulary[i] for i in new[0].tolist()).decode() + "\n"
        flags = ("--sample", "--out", "a", "--length", 50, "--seed")
        texts = [run_train_lm(*flags, seed, cwd=folder).stdout for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 1 + 50 + 1


# ------------------------------------------------------------------------------------------------------------ learning

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def sources(notebook, kind):
    """The cells of a notebook of one kind, code or markdown."""
    return [cell["source"] for cell in notebook.cells if cell["cell_type"] == kind]


def solve(notebook):
    """Put each folded solution into the code cell that it begins like."""
    text = "\n".join(sources(notebook, "markdown"))
    for solution in re.findall(r"<summary>Solution.*?```python\n(.*?)\n```", text, re.DOTALL):
        (stub,) = [cell for cell in notebook.cells if cell["cell_type"] == "code"
                   and cell["source"].startswith(solution.split("\n")[0])]
        assert "return None" in stub["source"]
        stub["source"] = solution


def run_notebook(path, solved=False):
    """What a notebook prints when it is run in its folder; an error in it is raised."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, 4)
    if solved:
        solve(notebook)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebooks:
    """Every notebook runs, as it is and with its exercises solved, and was committed as it ran."""

    def test_a_quick_run_has_exercises_to_do(self, path, monkeypatch):
        monkeypatch.setenv("RMT_FAST", "1")
        printed = run_notebook(path)
        assert re.findall(r": (TODO|OK|not yet)", printed) == ["TODO"] * printed.count("TODO") != []

    def test_a_quick_run_with_the_solutions_is_right(self, path, monkeypatch):
        monkeypatch.setenv("RMT_FAST", "1")
        printed = run_notebook(path, solved=True)
        assert printed.count(": OK") > 1 and "TODO" not in printed and "not yet" not in printed

    @pytest.mark.slow
    def test_all_that_it_claims_holds(self, path, monkeypatch):
        monkeypatch.delenv("RMT_FAST", raising=False)
        printed = run_notebook(path)
        assert "holds: " in printed and "does not hold" not in printed

    def test_it_was_committed_as_it_ran_and_starts_anywhere(self, path):
        nbformat = pytest.importorskip("nbformat")
        notebook, raw = nbformat.read(path, 4), path.read_text()
        nbformat.validate(notebook)
        assert len(raw) < 500_000 and "widget" not in raw and not re.search(r"/(tmp|home|root|work|Users)/", raw)
        assert notebook.cells[0]["source"].startswith("[![Open In Colab](https://colab.research.google.com/assets/")
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        printed = "".join(output.get("text", "") for output in outputs)
        assert "holds: " in printed and "does not hold" not in printed
        assert not any(output["output_type"] == "error" for output in outputs)
        pictures = [output for output in outputs if "image/png" in output.get("data", {})]
        assert pictures and all(len(output["metadata"]["image/png"]["alt"]) > 50 for output in pictures)
        for source in sources(notebook, "code"):
            assert not re.search(r"^\s*[!%]", source, re.MULTILINE)
            for node in ast.walk(ast.parse(source)):
                assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 30
        (setup,) = [source for source in sources(notebook, "code") if '"clone"' in source]
        assert "rmt.py" in setup and "sys.path" in setup


@pytest.mark.slow
class TestLearning:
    """What the models learn, in minutes on a CPU."""

    def test_default_run_reaches_its_target_and_no_memory_stays_at_chance(self, tmp_path):
        run = run_train_copy("--target", 0.99, "--out", "a", cwd=tmp_path)
        assert run.returncode == 0, run.stdout + run.stderr
        results = json.loads((tmp_path / "a" / "result.json").read_text())["results"]
        assert results["rmt"]["9"]["free_running"] >= 0.98 and results["transformer"]["9"]["teacher_forced"] <= 0.15
        assert results["its initial state at every boundary"] <= 0.2 and results["the state of another sample"] <= 0.2

    def test_a_fact_is_read_after_4096_segments(self, tmp_path):
        flags = ("--task", "detect", "--baseline", "none", "--eval-segments", 4096)
        run = run_train_copy(*flags, "--out", "a", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        results = json.loads((tmp_path / "a" / "result.json").read_text())["results"]
        assert results["rmt"]["4096"]["teacher_forced"] >= 0.97

    def test_memory_is_worth_bits_in_language_first_of_all_where_segments_begin(self, tmp_path):
        run = run_train_lm("--out", "a", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        results = json.loads((tmp_path / "a" / "result.json").read_text())["results"]
        memory, none = results["rmt"], results["transformer"]["carried"]
        assert memory["carried"]["bpc"] < none["bpc"] - 0.05 < results["bigram"]["bpc"] - 1
        assert memory["carried"]["bpc"] < min(memory[how]["bpc"] for how in ("reset", "of another stream")) - 0.05
        gains = [a - b for a, b in zip(none["by_position"], memory["carried"]["by_position"], strict=True)]
        assert sum(gains[:8]) / 8 > 2 * sum(gains[8:]) / 24

    @pytest.mark.parametrize("distance", [1, 2])
    def test_a_fact_is_learned_if_and_only_if_gradient_reaches_it(self, distance, tmp_path):
        """One boundary short, an untrained hand-off still lets something through; two boundaries short, nothing."""
        flags, scores = (f"--task memorize --baseline none --curriculum fixed --memory-noise 0 --steps 400 "
                         f"--segments {distance + 1}").split(), {}
        for depth in range(distance + 1):
            run = run_train_copy(*flags, "--bptt-depth", depth, "--out", depth, cwd=tmp_path)
            assert run.returncode == 0, run.stderr
            results = json.loads((tmp_path / str(depth) / "result.json").read_text())["results"]
            scores[depth] = results["rmt"][str(distance + 1)]["teacher_forced"]
        assert scores[distance] > 0.95 and scores[distance - 1] < 0.75
        assert all(scores[depth] < 0.2 for depth in range(distance - 1))

    @pytest.mark.parametrize("form, alive", [("norm", True), ("raw", False)])
    def test_the_default_memory_is_alive_after_10_000_segments_and_the_raw_one_is_not(self, form, alive):
        """Every segment asks for the segment before it, for ever; the state is carried, also through training."""
        torch.manual_seed(0)
        model = RMT(Config(vocab_size=10, segment_len=8, n_mem=8, memory_form=form))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
        state, before = None, torch.randint(10, (32, 8))
        for step in range(400):
            tokens = torch.randint(10, (32, 16))
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1, (step + 1) / 50, 2 * (1 - step / 400))
            optimizer.zero_grad()
            logits, state = unroll(model, tokens, state)
            state, wanted = state.detach(), torch.cat([before, tokens[:, :8]], dim=1)
            F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            before = tokens[:, 8:]
        model.eval()
        stream = torch.randint(10, (8, 10_000 * 8))
        with torch.no_grad():
            _, state = unroll(model, stream, last_only=True)
            after = torch.randint(10, (8, 8))
            logits, _ = unroll(model, after, state)
        right = (logits.argmax(-1) == stream[:, -8:]).float().mean().item()
        assert (right > 0.95) if alive else (right < 0.4)
        assert (state.memory.square().mean().sqrt() < 10) == alive


# --------------------------------------------------------------------------------------------------------- benchmarks
# `pytest -m benchmark -s` prints a table per test. One thread; the contestants take turns, so that a busy machine slows
# them alike; a number is the median of CPU time. Nothing is asserted on time, only on results and on memory.

BENCHED = {"small": (Config(vocab_size=256, n_layer=4, d_model=64, n_head=4, segment_len=16, n_mem=4), 1),
           "deep": (Config(vocab_size=256, n_layer=12, d_model=64, n_head=4, segment_len=16, n_mem=4), 1),
           "tiny": (Config(vocab_size=256, n_layer=4, d_model=64, n_head=1, segment_len=32, n_mem=4), 8),
         "S": (Config(vocab_size=256, n_layer=4, d_model=256, n_head=4, segment_len=128, n_mem=8), 8),
         "M": (Config(vocab_size=256, n_layer=6, d_model=384, n_head=6, segment_len=256, n_mem=16), 4)}


@pytest.fixture
def one_thread(float64):
    """One thread, and float32 after all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_num_threads(threads)


def setup(size, n_segments, **changes):
    """A model of that size, and tokens (B, n_segments * T)."""
    config, B = BENCHED[size]
    torch.manual_seed(0)
    return RMT(replace(config, **changes)), torch.randint(256, (B, n_segments * config.segment_len))


def race(*contestants, seconds=3.0, least=7):
    """Median milliseconds of CPU time of each contestant; they are called in turns after a warm-up call."""
    results, times = [run() for run in contestants], [[] for _ in contestants]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[-1]) < least:
        for run, taken in zip(contestants, times, strict=True):
            start = time.process_time()
            run()
            taken.append(1000 * (time.process_time() - start))
    return [statistics.median(taken) for taken in times], results


def training(model, tokens, run=unroll, **options):
    """A training step without its optimizer: mean loss, with gradient through all segments."""
    def step():
        model.zero_grad()
        logits, _ = run(model, tokens, **options)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        return loss.item()
    return step


def inference(model, tokens, run=unroll):
    """A forward pass over all segments without gradient."""
    return torch.no_grad()(lambda: run(model.eval(), tokens)[0])


def matmuls(size, n_segments, backward):
    """The matrix products of a model of that size and nothing else, on operands of the same shapes -> run, FLOP."""
    c, B = BENCHED[size]
    N, D, E = c.segment_len + 2 * c.n_mem, c.d_model, c.d_model // c.n_head
    layer = [(1, B * N, D, 3 * D), (B * c.n_head, N, E, N), (B * c.n_head, N, N, E), (1, B * N, D, D),
             (1, B * N, D, 4 * D), (1, B * N, 4 * D, D)]
    shapes = c.n_layer * layer + [(1, B * c.segment_len, D, c.vocab_size)]
    a, b, y = ({s: torch.randn(s[0], s[i], s[j]).squeeze(0) for s in shapes} for i, j in [(1, 2), (3, 2), (1, 3)])

    def run():
        for s in n_segments * shapes:
            a[s] @ b[s].mT       # as in y = x W^T
            if backward:
                y[s] @ b[s]      # the gradient of x
                y[s].mT @ a[s]   # the gradient of W
    return run, n_segments * (1 + 2 * backward) * sum(2 * n * i * j * k for n, i, j, k in shapes)


@pytest.mark.benchmark
@pytest.mark.parametrize("size", ["tiny", "S", "M"])
def test_most_of_the_time_is_matrix_multiplication(size, one_thread):
    for name, n_segments, contestant in [("training", 4, training), ("inference", 8, inference)]:
        products, flop = matmuls(size, n_segments, backward=contestant is training)
        (ours, ceiling), _ = race(contestant(*setup(size, n_segments)), products)
        print(f"\n{size:5}{name:10}{ours:8.1f} ms{flop / ours / 1e6:8.1f} GFLOP/s, {ceiling / ours:.2f} of the ceiling")
        with FlopCounterMode(display=False) as counter:
            products()
        assert counter.get_total_flops() == flop


def lucidrains(size):
    """The package recurrent-memory-transformer-pytorch with its fastest flags, and its loop over segments."""
    peer, (c, _) = pytest.importorskip("recurrent_memory_transformer_pytorch"), BENCHED[size]
    model = peer.RecurrentMemoryTransformer(
        c.d_model, num_tokens=256, depth=c.n_layer, num_memory_tokens=c.n_mem, seq_len=c.segment_len, heads=c.n_head,
        use_flash_attn=True, memory_not_causal=False, use_xl_memories=False, num_residual_streams=1)
    wrapper = peer.RecurrentMemoryTransformerWrapper(model)
    return model, lambda _, tokens: wrapper(tokens)


def gpt2(size):
    """The authors' design: GPT-2 of transformers, memory tokens concatenated through inputs_embeds."""
    hf, (c, _) = pytest.importorskip("transformers"), BENCHED[size]
    model = hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=256, n_positions=c.segment_len + 2 * c.n_mem, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    model.memory = torch.nn.Parameter(0.02 * torch.randn(c.n_mem, c.d_model))

    def run(model, tokens):
        memory, outputs = model.memory.expand(len(tokens), -1, -1), []
        for segment in tokens.split(c.segment_len, dim=1):
            x = torch.cat([memory, model.transformer.wte(segment), memory], dim=1)
            x = model.transformer(inputs_embeds=x, use_cache=False).last_hidden_state
            memory = x[:, -c.n_mem:]
            outputs.append(model.lm_head(x[:, c.n_mem:-c.n_mem]))
        return torch.cat(outputs, dim=1), memory
    return model, run


@pytest.mark.benchmark
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", ["tiny", "S", "M"])
@pytest.mark.parametrize("peer", [lucidrains, gpt2])
def test_peers_are_no_faster(size, peer, one_thread):
    other, run = peer(size)
    for name, n_segments, contestant in [("training", 4, training), ("inference", 8, inference)]:
        model, tokens = setup(size, n_segments)
        (ours, theirs), _ = race(contestant(model, tokens), contestant(other, tokens, run))
        print(f"\n{size:5}{name:10}{ours:8.1f} ms, {peer.__name__} {theirs:8.1f} ms, {theirs / ours:.2f} of our time")
    n_ours, n_theirs = (sum(p.numel() for p in m.parameters()) for m in (model, other))
    assert n_theirs == pytest.approx(n_ours, rel=0.15)
    assert run(other, tokens)[0].shape == unroll(model, tokens)[0].shape


@pytest.mark.benchmark
@pytest.mark.parametrize("size", ["tiny", "S"])
def test_memory_costs_its_rows(size, one_thread):
    """Tokens of text per second beside the plain transformer; the share of rows that are tokens is T / (T + 2M)."""
    models = [setup(size, 4, variant=variant) for variant in ("rmt", "transformer")]
    (memory, plain), results = race(*(training(*pair) for pair in models))
    config = models[0][0].config
    share = config.segment_len / (config.segment_len + 2 * config.n_mem)
    print(f"\n{size:5}training, throughput of rmt over transformer {plain / memory:.2f}, tokens among rows {share:.2f}")
    assert all(map(math.isfinite, results))


class Opaque(nn.Module):
    """A backbone that `stream` does not know, so that it computes the segment again for every token."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.initial_carry = backbone, backbone.initial_carry

    def forward(self, x, mask, carry):
        return self.backbone(x, mask, carry)


@pytest.mark.benchmark
@pytest.mark.parametrize("size", ["tiny", "S"])
@pytest.mark.parametrize("variant", ["rmt", "rmt_xl"])
def test_a_new_token_costs_less_than_its_segment(variant, size, one_thread):
    changes = {"segment_len": 256, "variant": variant, "cache_len": 64}
    model, tokens = setup(size, 1, **changes)
    slow, prompt = copy.deepcopy(model), tokens[:1, :1]
    slow.backbone = Opaque(slow.backbone)
    (row, segment), results = race(*(lambda model=model: generate(model.eval(), prompt, 512, temperature=0)
                                     for model in (model, slow)))
    print(f"\n{size:5}{variant:7}T = 256: {row / 512:.2f} ms per new token, {segment / row:.1f} times faster than its "
          "segment again")
    assert torch.equal(*results)


@pytest.mark.benchmark
@pytest.mark.parametrize("size", ["small", "deep", "tiny", "S"])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("variant", ["armt", "transformer_xl"])
def test_diagonals(variant, size, batch_size, one_thread):
    """Where segments are small, running them along diagonals saves the overhead of S L small steps."""
    n_segments = 12 if size == "S" else 32
    model, tokens = setup(size, n_segments, variant=variant)
    tokens, ratios = tokens.repeat(batch_size, 1)[:batch_size], []
    for work in (inference, training):
        (loop, diagonal), results = race(work(model, tokens), work(model, tokens, run=unroll_diagonal))
        torch.testing.assert_close(*map(torch.as_tensor, results), rtol=1e-4, atol=1e-4)
        ratios.append(loop / diagonal)
    print(f"\n{variant:15}{size:6}batch {batch_size}, {n_segments} segments: unroll over unroll_diagonal, inference "
          f"{ratios[0]:.2f}, training {ratios[1]:.2f}")


@pytest.mark.benchmark
@pytest.mark.parametrize("size", ["S", "M"])
def test_bfloat16(size, one_thread):
    def autocast(model, tokens):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return unroll(model, tokens)

    model, tokens = setup(size, 4)
    (full, half), losses = race(training(model, tokens), training(model, tokens, autocast))
    print(f"\n{size:5}training, float32{full:8.1f} ms, bfloat16{half:8.1f} ms: {full / half:.2f} times faster")
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.benchmark
@pytest.mark.parametrize("variant", ["rmt", "transformer_xl", "rmt_xl"])
@pytest.mark.parametrize("size", ["tiny", "S"])
def test_compile(size, variant, one_thread):
    torch.compiler.reset()
    model, tokens = setup(size, 4, variant=variant)
    compiled = torch.compile(model)
    (eager, fast), losses = race(training(model, tokens), training(model, tokens, lambda _, x: unroll(compiled, x)))
    print(f"\n{size:5}{variant:15}training {eager:8.1f} ms, compiled{fast:8.1f} ms: {eager / fast:.2f} times faster")
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def memory_growth(size, prepare, command, **environment):
    """Megabytes by which a command raises the peak memory of a fresh process, in which `prepare` ran before.

    VmHWM, because ru_maxrss starts at the peak of the parent process and so hides whatever stays below that.
    """
    if not os.path.exists("/proc/self/status"):
        pytest.skip("peak memory is read from /proc")
    code = rf"""
import re, torch
from test_rmt import *
torch.set_num_threads(1)
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024
model, tokens = setup({size!r}, 1)
{prepare}
before = peak()
{command}
print(peak() - before)"""
    run = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(os.path.abspath(__file__)), text=True,
                         capture_output=True, check=True, env={**os.environ, **environment})
    return float(run.stdout)


@pytest.mark.benchmark
def test_a_million_tokens_take_the_memory_of_a_thousand():
    stream = "torch.no_grad()(unroll)(model.eval(), torch.randint(256, (1, {}), dtype=torch.uint8), last_only={})"
    flat = memory_growth("tiny", stream.format(1_000, True), stream.format(1_000_000, True))
    control = memory_growth("tiny", stream.format(1_000, True), stream.format(100_000, False))
    print(f"\nfrom 1,000 to 1,000,000 tokens the peak memory of inference grows by {flat:.1f} MB; "
          f"with the logits of all tokens, to 100,000, by {control:.0f} MB")
    assert flat < 5 and control > 90  # the control: 100,000 * 256 floats are 98 MB


@pytest.mark.benchmark
def test_checkpoint_takes_an_eighth_of_the_memory(one_thread):
    command = "model, tokens = setup('S', 32); training(model, tokens, checkpoint={})()"
    for malloc in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"}):  # the default heap keeps holes
        plain, ours = (memory_growth("S", "training(model, tokens[:1, :1])()", command.format(checkpoint), **malloc)
                       for checkpoint in (False, True))
        print(f"\nbackpropagation through 32 segments takes {plain:.0f} MB, checkpointed {ours:.0f} MB, "
              f"{ours / plain:.3f} {malloc or 'with the default malloc'}")
    assert 34 < ours < plain / 8  # at least the logits; asserted without the holes
    model, tokens = setup("S", 4)
    (plain, ours), losses = race(training(model, tokens), training(model, tokens, checkpoint=True))
    print(f"checkpointing takes {ours / plain:.2f} of the time")
    assert losses[0] == losses[1]


@pytest.mark.benchmark
@pytest.mark.parametrize("size", ["tiny", "S"])
def test_mask_and_checks_cost_little(size, one_thread):
    model, tokens = setup(size, 1)
    state, model = model.initial_state(len(tokens)), model.eval()
    (segment, mask, checks), results = race(
        inference(model, tokens), lambda: model.mask(tokens.size(1), 0), lambda: rmt.check(model, tokens, state))
    print(f"\n{size:5}one segment {segment:.3f} ms, of which mask {mask / segment:.1%}, checks {checks / segment:.1%}")
    assert torch.equal(results[1], model.mask(tokens.size(1), 0))


# ----------------------------------------------------------------------------------------------------------- mutations

MUTATIONS = [  # the story, a fragment of rmt.py, what it becomes, the test that notices
    ("truncation is a no-op", "state = state.detach() if cut else state", "cut",
     "test_truncated_gradient_reaches_exactly_bptt_depth_segments_back"),
    ("the initial memory is cut off", " and s > 0 and ", " and ", "test_initial_memory_learns_at_every_depth"),
    ("depth counts segments, not boundaries", "% (bptt_depth + 1)", "% max(1, bptt_depth)",
     "test_truncated_gradient_reaches_exactly_bptt_depth_segments_back"),
    ("cuts are counted from the start", "(n_segments - s) %", "s %",
     "test_truncated_gradient_is_its_share_of_the_full_one"),
    ("the replay loses the gradient to the state", "recompute(model, segment, state,",
     "recompute(model, segment, state.detach(),", "test_checkpointed_gradients_equal_plain_ones"),
    ("the replay draws other noise", "segment, state, use_reentrant=False)",
     "segment, state, use_reentrant=False, preserve_rng_state=False)",
     "test_checkpointed_gradients_equal_plain_ones"),
    ("a stop forgets the state", "if state is None else state\n    segments = tokens", "\n    segments = tokens",
     "test_stop_save_load_and_resume_equals_one_run"),
    ("the future leaks through read rows in two hops", "now[:n_read, :n_read] = True", "now[:n_read] = True",
     "test_no_token_sees_the_future"),
    ("tokens see later tokens", "now.tril_()", "now.tril_(1)", "test_no_token_sees_the_future"),
    ("an encoder is causal", "else self.variant.mask", 'else "causal"',
     "test_an_encoder_sees_its_whole_segment_and_no_later_one"),
    ("write rows see the cache", "cached[n - n_write:] = False", "cached[n - n_write:] = True",
     "test_mask_equals_its_picture"),
    ("read rows see the cache", "cached[:n_read] = False", "cached[:n_read] = True",
     "test_read_rows_see_no_segment_and_no_token_sees_write_rows_which_see_all"),
    ("gradient flows into the cache", ".detach().clone()", ".clone()",
     "test_without_recurrent_memory_no_gradient_crosses"),
    ("the cache is one too short", "[:, -self.n_cache:].detach()", "[:, 1 - self.n_cache:].detach()",
     "test_cache_is_the_last_inputs_of_every_layer_without_memory_rows_or_gradient"),
    ("the cache takes read rows", "tokens = x[:, self.n_read:", "tokens = x[:, 0:",
     "test_cache_is_the_last_inputs_of_every_layer_without_memory_rows_or_gradient"),
    ("cached and new tokens share positions", "self.n_read + self.n_cache - c:self.n_cache + n]", "self.n_read:c + n]",
     "test_transformer_xl_with_a_long_cache_equals_one_long_transformer"),
    ("rotation is a reflection", "a * sin + b * cos", "a * sin - b * cos",
     "test_attention_equals_loops_over_complex_rotations"),
    ("the state lives on the module", "segment alive\n",
     "segment alive\n        self.memory.data.copy_(memory[0])\n",
     "test_earlier_segments_count_through_the_state_alone"),
    ("read rows are handed on", "self.hand_on(write if self.n_write else read)", "self.hand_on(read)",
     "test_handed_on_memory_is_the_written_rows_normed_or_raw"),
    ("raw memory keeps its segment alive", "self.norm(written)).clone()", "self.norm(written))",
     "test_handed_on_memory_is_the_written_rows_normed_or_raw"),
    ("memory skips the norm", "(written if raw else self.norm(written))", "written",
     "test_memory_is_bounded_for_a_thousand_segments_and_grows_where_it_is_raw"),
    ("all memory rows start as one", '"memory": 0.02', '"memory": 0.0', "test_initial_memory_rows_differ"),
    ("noise in evaluation", "if self.training and self.config.memory_noise", "if self.config.memory_noise",
     "test_dropout_and_memory_noise_act_in_training_alone"),
    ("noise has one size per batch", "memory[:, :1, :1])", "memory[:1, :1, :1])",
     "test_memory_noise_has_one_size_per_sequence_up_to_its_fraction_of_the_rms"),
    ("the write embedding never comes alone", "else torch.zeros_like(write))", "else write)",
     "test_write_rows_are_fed_what_write_slot_names"),
    ("tied weights are two that start equal", "self.head.weight = self.embed.weight",
     "self.head.weight = nn.Parameter(self.embed.weight.detach().clone())", "test_tied_weights_learn_from_both_ends"),
    ("generation never hands memory on", "(_, state), segment = model(segment[:, :T], state), new", "segment = new",
     "test_streaming_generation_equals_offline_argmax"),
    ("new rows stand where the first ones stood", "self.n_cache + done:self.n_cache + done + n]",
     "self.n_cache:self.n_cache + n]", "test_streaming_generation_equals_offline_argmax"),
    ("new rows stand among the cached ones", "self.n_cache + done:self.n_cache + done + n]", "done:done + n]",
     "test_streaming_generation_equals_offline_argmax"),
    ("a new token computes the segment again", "if isinstance(model.backbone, Transformer) else", "if False else",
     "test_a_new_token_costs_one_row_and_a_new_segment_one_pass"),
    ("top_k is one too many", "min(top_k, logits", "min(top_k + 1, logits",
     "test_generate_samples_the_softmax_of_the_most_likely_tokens"),
    ("gradient flows through gamma", ".clamp(0, 1).detach()", ".clamp(0, 1)",
     "test_reads_writes_and_their_gradients_equal_the_equations_in_loops"),
    ("every key is new", ".clamp(0, 1).detach()", ".clamp(1, 1).detach()", "test_one_key_written_1_to_5_reads_1_to_5"),
    ("z normalises nothing", "value if z is None else value / (phi", "value if True else value / (phi",
     "test_reads_writes_and_their_gradients_equal_the_equations_in_loops"),
    ("delta keeps the length of its keys", 'phi if self.update == "armt" else', 'phi if self.update != "hebbian" else',
     "test_reads_writes_and_their_gradients_equal_the_equations_in_loops"),
    ("hebbian corrects", 'v if self.update == "hebbian" else', 'v if self.update == "hebb" else',
     "test_one_key_written_1_to_5_reads_1_to_5"),
    ("the memory is read after the norm", "self.phi(self.w_q(x))", "self.phi(self.w_q(self.norm_1(x)))",
     "test_a_layer_reads_before_its_first_norm_and_writes_what_comes_out"),
    ("a part of a segment writes", "if past is None else carry", "if True else carry",
     "test_a_layer_reads_before_its_first_norm_and_writes_what_comes_out"),
    ("an untrained memory speaks", '"w_v.weight": 0.0', '"w_v.weight": 0.1',
     "test_untrained_associative_memory_leaves_the_plain_model"),
    ("keys begin elsewhere than queries", 'name.replace("w_k", "w_q")', "name",
     "test_weights_start_at_the_size_their_table_gives"),
    ("the memory is in half precision", "torch.promote_types(weight.dtype, torch.float32)", "weight.dtype",
     "test_z_never_decreases_and_the_memory_stays_in_float32_under_autocast"),
    ("autocast reaches the memory", "torch.autocast(phi.device.type, enabled=False)", "torch.autocast(phi.device.type)",
     "test_z_never_decreases_and_the_memory_stays_in_float32_under_autocast"),
    ("all layers of a diagonal are the first", "weight[busy.start:busy.stop]", "weight[[0] * len(busy)]",
     "test_diagonals_equal_the_loop_over_segments"),
    ("diagonals ignore the depth", "if cut[first + step - l] else", "if False else",
     "test_diagonals_equal_the_loop_over_segments"),
    ("diagonals cut a segment late", "cut[first + step - l]", "cut[first + step - l - 1]",
     "test_diagonals_equal_the_loop_over_segments"),
    ("a short last segment is never cut off", "state.detach() if cut[-1] else state", "state",
     "test_diagonals_equal_the_loop_over_segments"),
    ("the controller is never asked", "update_memory(self.controller, x", "update_memory(self, x",
     "test_controller_and_bottleneck_equal_the_papers_two_steps_row_by_row"),
    ("tokens pass through the controller too", "h = torch.arange(-n_write, n_read", "h = torch.arange(x.size(1)",
     "test_controller_and_bottleneck_equal_the_papers_two_steps_row_by_row"),
    ("the controller starts large", "if name.endswith(end)", 'if name.endswith(end) and "controller" not in name',
     "test_weights_start_at_the_size_their_table_gives"),
    ("tokens see the memory before it is new", "super().forward(x.index_copy(1, rows, memory)", "super().forward(x",
     "test_memory_is_new_before_tokens_see_it"),
    ("memory reads the segment twice", "        return x.index_copy(1, rows, memory), carry\n\n\n# ",
     "        return x, carry\n\n\n# ",
     "test_controller_and_bottleneck_equal_the_papers_two_steps_row_by_row"),
    ("read rows of a part are not memory", "block.n_read * (not past)", "block.n_read * (past is None)",
     "test_streaming_generation_equals_offline_argmax"),
    ("the window is one wider", ".tril(window).triu(-window)", ".tril(window + 1).triu(-window - 1)",
     "test_mask_equals_its_picture"),
    ("a token of a bottleneck sees itself", "near.fill_diagonal_(False)", "near", "test_mask_equals_its_picture"),
    ("a bottleneck in causal order has no window", "and self.window is None\n", "\n",
     "test_no_token_sees_its_neighbours_in_a_bottleneck_whatever_the_order"),
    ("a backbone of yours is drawn anew", "keep=tuple(yours)", "keep=()",
     "test_parts_of_yours_keep_their_weights_and_ours_go_where_they_are"),
    ("a norm of ours comes before a head of yours", "if head is None else nn.Identity()", "",
     "test_a_head_of_yours_gets_rows_as_the_backbone_leaves_them"),
    ("a controller never drops out", "self.controller = Block(config, n_read, n_write)",
     "self.controller = Block(Config(**config.__dict__ | {'dropout': 0.0}), n_read, n_write)",
     "test_dropout_and_memory_noise_act_in_training_alone"),
    ("a layer of yours loses its window", "issubclass(block, BottleneckBlock)", "block is BottleneckBlock",
     "test_a_block_of_yours_keeps_what_its_parent_has"),
    ("a trial takes random numbers", "@torch.random.fork_rng(devices=[])", "#",
     "test_dropout_and_memory_noise_act_in_training_alone"),
    ("new tokens see beyond the window", "model.mask_form, model.window", "model.mask_form, None",
     "test_streaming_generation_equals_offline_argmax"),
]


SCRIPT_MUTATIONS = [  # the story, the file, a fragment of it, what it becomes, the test that notices
    ("the state is not carried", "train_lm.py", "loss, states[i] = segments(", "loss, _ = segments(",
     "test_training_equals_a_loop_by_hand"),
    ("every step starts anew", "train_lm.py", "step % args.reset_every == 0", "True",
     "test_training_equals_a_loop_by_hand"),
    ("evaluation forgets the state", "train_lm.py", "n, (logits, state) =", "n, (logits, _) =",
     "test_evaluation_equals_a_loop_over_streams"),
    ("every rank reads the same streams", "train_lm.py", ".chunk(RANKS)[RANK]", ".chunk(RANKS)[0]",
     "test_two_ranks_and_two_parts_have_the_gradients_of_one_process"),
    ("ranks keep their gradients", "train_lm.py", "    if RANKS > 1:  # where", "    if RANKS > 2:  # where",
     "test_two_ranks_and_two_parts_have_the_gradients_of_one_process"),
    ("another stream is the same one", "train_lm.py", "t.roll(1, 0)", "t.roll(0, 0)",
     "test_a_tiny_run_of_every_variant_of_language_model_writes_its_files"),
    ("the gradients of parts add up", "train_lm.py", "(loss / args.accumulate)", "loss",
     "test_two_ranks_and_two_parts_have_the_gradients_of_one_process"),
    ("a resumed run draws other random numbers", "train_lm.py", "torch.set_rng_state(mine", "len(mine",
     "test_a_stopped_and_killed_language_model_resumes_to_the_same_numbers"),
    ("a resumed run forgets its states", "train_lm.py", "[s and map_tensors(lambda", "[None and map_tensors(lambda",
     "test_a_stopped_and_killed_language_model_resumes_to_the_same_numbers"),
    ("the vocabulary is that of the whole text", "train_lm.py", "set(raw[:cuts[1]])", "set(raw)",
     "test_a_text_is_cut_90_5_5_and_has_the_characters_of_its_first_part"),
    ("blanks are written over the answers", "train_copy.py", ".to(args.device, copy=True)", ".to(args.device)",
     "test_an_encoder_fills_in_blanks_and_is_asked_for_what_was_there"),
    ("the first value of a key counts", "assets/tasks.py", "n_pairs - 1 - (keys == asked).flip(1)",
     "(keys == asked)", "test_remember_and_rewrite_ask_for_the_last_value_of_a_key"),
    ("what is dropped moves on", "assets/tasks.py", "            del holder[held[0]]\n", "",
     "test_answers_of_facts_follow_from_the_sentences"),
    ("both roots are one", "assets/tasks.py", "{root})/2={r}", "{root})/2={s}",
     "test_quadratic_equations_are_solved_in_six_fields"),
    ("what comes is not checked", "assets/run.py", "if found != sha256:", "if not found:",
     "test_a_download_is_kept_checked_and_never_half_there"),
    ("attention maps are left in place", "assets/figures.py", "with torch.no_grad(), mock.patch.object(F, ",
     "F.scaled_dot_product_attention = recorded\n    with torch.no_grad(), mock.patch.object(F, ",
     "test_attention_maps_equal_loops_and_leave_the_model_as_it_was"),
    ("maps of memory and tokens are swapped", "assets/figures.py", "maps[::2], maps[1::2]", "maps[1::2], maps[::2]",
     "test_attention_maps_equal_loops_and_leave_the_model_as_it_was"),
    ("weights of any shape are loaded", "assets/run.py", "if given.get(key) != needed.get(key):", "if False:",
     "test_an_earlier_language_model_is_neither_overwritten_nor_mixed_up"),
    ("a file is written in place", "assets/run.py", "        writer(temporary)\n", "        writer(path)\n",
     "test_a_full_disk_is_one_line_and_leaves_a_whole_checkpoint"),
]
ALL_MUTATIONS = [*((story, "rmt.py", *rest) for story, *rest in MUTATIONS), *SCRIPT_MUTATIONS]
SCRIPTS = ("train_copy.py", "train_lm.py", "assets/run.py", "assets/tasks.py", "assets/figures.py", "README.md")


def run_on_a_copy(sources, names, folder):
    """Run the named tests of this file, in another process, on a copy in which some files are others."""
    for name in ("rmt.py", "test_rmt.py", *SCRIPTS):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(sources.get(name) or (ROOT / name).read_text())
    command = [sys.executable, "-m", "pytest", "-qx", "test_rmt.py", "-k", f"({' or '.join(names)}) and not mutation"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("story, file, old, new, name", ALL_MUTATIONS, ids=[story for story, *_ in ALL_MUTATIONS])
def test_mutation_is_noticed(story, file, old, new, name, tmp_path):
    source = (ROOT / file).read_text()
    assert source.count(old) == 1
    result = run_on_a_copy({file: source.replace(old, new)}, [name], tmp_path)
    assert result.returncode == 1 and re.search("AssertionError|DID NOT RAISE", result.stdout), result.stdout


@pytest.mark.slow
def test_mutation_control_passes_all_named_tests_without_a_mutation(tmp_path):
    names = {name for *_, name in ALL_MUTATIONS}
    result = run_on_a_copy({}, sorted(names), tmp_path)
    assert result.returncode == 0 and all(f"def {name}(" in Path(__file__).read_text() for name in names), result.stdout
