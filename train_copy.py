"""Train the Recurrent Memory Transformer on tasks that need memory, beside a model without memory.

    python train_copy.py
        Copy 24 symbols across 9 segments, in one to two minutes on a laptop CPU. At the end, rmt
        gets at least 0.99 of the symbols right over 3, 6 and 9 segments. The baseline without
        memory gets about 0.10 over 9 segments, which is what guessing gives.
    python train_copy.py --task memorize --eval-segments 4096
        A fact, then noise, then a question about the fact. No training sample is longer than 8
        segments, and rmt still knows the fact 4,096 segments later.
    python train_copy.py --task rewrite
        Four keys whose values keep changing. armt ends at 1.0, the baseline near 0.10.
    python train_copy.py --resume out/copy-1
        Continue an interrupted run. It gives the numbers of an uninterrupted one, on a CPU to the
        last bit.

Each run writes to a folder of its own, out/TASK-1 (-2, -3, ...): metrics.csv, which grows during
training, a checkpoint of each model (rmt.pt, transformer.pt), config.json, result.json,
training.png and, unless the model is armt, attention.png.

To use a trained model in your own code:

    import torch
    from rmt import RMT, Config

    saved = torch.load("out/copy-1/rmt.pt", map_location="cpu")
    model = RMT(Config(**saved["config"]))
    model.load_state_dict(saved["model"])
    words = saved["vocabulary"]  # token 3 is printed as words[3]

This file needs rmt.py beside it and nothing else from this project. It begins with the training
loop; the sections after it are tasks, samples, evaluation, files, flags, report and main. A task of
your own is a function and a row of TASKS. The papers [RMT], [RMT-1M] and [ARMT] are listed in
rmt.py. Two more are [bAbI], Weston et al. Towards AI-Complete Question Answering. 2015,
arXiv:1502.05698, and [Muon], Jordan et al. Muon: An optimizer for hidden layers in neural networks.
2024, https://kellerjordan.github.io/posts/muon/.
"""
import argparse
import csv
import json
import math
import os
import platform
import random
import shlex
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from rmt import RMT, VARIANTS, AssociativeBlock, Config, attention_maps, generate, unroll

# ==================================================================================================
# Training


def train(args, variant):
    """Train one model for args.steps steps, from its checkpoint if it has one -> model, run."""
    model = build(args, variant)
    optimizers = build_optimizers(args, model)
    run_segments = torch.compile(unroll) if args.compile else unroll
    data = torch.Generator().manual_seed(args.seed)  # draws the samples
    torch.manual_seed(args.seed)                     # draws noise and dropout
    lengths = training_lengths(args)
    run = SimpleNamespace(
        step=0,
        unlocked=1 if args.curriculum == "grow" else len(lengths),  # how many lengths are in use
        symbols=args.first_symbols or args.symbols,                 # how many symbols are in use
        loss=0.0,                           # running mean, in nats per answer symbol
        right=dict.fromkeys(lengths, 0.0),  # running mean of the share of right symbols
        seconds=0.0,                        # of CPU time
        rows=[],                            # of metrics.csv
    )
    path = Path(args.out, f"{variant}.pt")
    if path.exists():
        load(args, path, run, model, optimizers, data)

    steps = range(run.step, args.steps)
    for step in tqdm(steps, variant, initial=run.step, total=args.steps, disable=None):
        began = time.process_time()

        # New samples, of a length that the curriculum chooses.
        n = choose_length(args, lengths[:run.unlocked], run.right, data)
        drawn_from = with_symbols(args, run.symbols)
        inputs, targets = sample(drawn_from, model, n, args.batch, data)

        # The learning rate rises over 50 steps, and falls over the second half of training.
        rate = args.lr * min(1, (step + 1) / 50, 2 * (1 - step / args.steps))

        # The update. Only the answers have targets.
        model.zero_grad()
        logits, _ = run_segments(model, inputs, bptt_depth=args.bptt_depth)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        if not math.isfinite(loss.item() + grad_norm.item()):
            fail(f"the loss is {loss.item()} and the norm of its gradient {grad_norm.item()} in "
                 f"step {step + 1}: take an --lr below {args.lr}")

        # Running means. When the longest samples go well, twice as many symbols come into use or,
        # if all of them are in use, the next length.
        right = share_right(logits.argmax(-1), targets)
        run.right[n] += 0.05 * (right - run.right[n])
        run.loss += (0.05 if step > 0 else 1.0) * (loss.item() - run.loss)
        longest = lengths[run.unlocked - 1]
        if run.right[longest] > 0.75:
            if run.symbols < args.symbols:
                run.symbols = min(2 * run.symbols, args.symbols)
                run.right[longest] = 0.0  # the mean begins anew
            elif run.unlocked < len(lengths):
                run.unlocked += 1
        run.seconds += time.process_time() - began
        run.step = step + 1

        # Metrics, a line on the screen, and a checkpoint.
        if run.step % 20 == 0 or run.step == args.steps:
            row = {"model": variant, "step": run.step, "loss": run.loss,
                   "grad_norm": grad_norm.item()}
            for length, share in run.right.items():
                row[f"right_{length}"] = share if share > 0 else None  # None: not seen yet
            run.rows.append(row)
            write_row(args.out, row)  # for Weights & Biases: wandb.log(row)
        if run.step % max(1, args.steps // 8) == 0 or run.step == args.steps:
            in_use = f"{longest} segments"
            if args.first_symbols is not None:
                in_use += f" of {run.symbols} symbols"
            tqdm.write(f"{variant:16} step {run.step:5}   {in_use}   loss {run.loss:.3f}   "
                       f"right {run.right[longest]:.3f}")
        if run.step % 100 == 0 or run.step == args.steps:
            save(args, path, run, model, optimizers, data)
    return model, run


def build_optimizers(args, model):
    """AdamW for all weights or, with --optimizer muon, Muon for the matrices of the layers."""
    matrices = []
    others = []
    for name, weight in model.named_parameters():
        of_a_layer = name.startswith("backbone.")
        if args.optimizer == "muon" and of_a_layer and weight.ndim == 2:
            matrices.append(weight)
        else:
            others.append(weight)
    optimizers = [
        torch.optim.AdamW(others, args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)]
    if matrices:
        optimizers.append(Muon(matrices, args.lr, args.weight_decay))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose steps change a matrix equally in all directions [Muon].

    The singular values of a step are made nearly equal, so that no direction is learned much later
    than the others. Steps are as large as those of AdamW, so both optimizers share --lr.

    torch.optim.Muon takes the same steps in bfloat16. That suits a GPU, but is more than ten times
    slower than float32 on a CPU without bfloat16 arithmetic.
    """

    def __init__(self, matrices, lr, weight_decay):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for matrix in group["params"]:
            if matrix.grad is None:
                continue
            state = self.state[matrix]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(matrix)
            momentum = state["momentum"]
            momentum.lerp_(matrix.grad, 0.05)
            direction = orthogonalize(matrix.grad.lerp(momentum, 0.95))
            # An entry changes by about 0.2 lr, as with AdamW (Liu et al. 2025, arXiv:2502.16982).
            factor = 0.2 * math.sqrt(max(matrix.shape))
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.sub_(group["lr"] * factor * direction)


def orthogonalize(matrix):
    """A matrix with the same singular vectors, and singular values between 0.68 and 1.21 [Muon].

    An iteration turns a singular value s into 3.4445 s - 4.7750 s^3 + 2.0315 s^5. Those below 1/500
    of the norm of the matrix would need more than five iterations, and stay smaller.
    """
    if matrix.size(0) > matrix.size(1):
        return orthogonalize(matrix.T).T  # the products below are smaller
    X = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def training_lengths(args):
    """How long training samples can be, in segments."""
    if args.curriculum == "fixed":
        return [args.segments]
    task = TASKS[args.task]
    return [n for n in range(task.shortest, args.segments + 1) if n % task.multiple == 0]


def choose_length(args, lengths, right, generator):
    """The length of the next training samples, one of those unlocked so far."""
    if args.curriculum == "grow":
        # A length is practised in proportion to the answers that are still wrong. The 0.03 keeps
        # the others in practice, or the model would forget them.
        wrong = torch.tensor([1.03 - right[n] for n in lengths])
        i = torch.multinomial(wrong, 1, generator=generator)
    else:
        i = torch.randint(len(lengths), (), generator=generator)
    return lengths[i.item()]


# ==================================================================================================
# Tasks
#
# A task draws samples: tokens (B, length), and which of them are answers, bool (length,). The model
# reads all tokens but the last one, and is scored where the next token belongs to an answer. A
# sample of n segments has its first answer in the last of them; more questions may follow. In the
# examples a segment has 4 tokens, unless another number is given. Spaces separate the segments, and
# a dot is an output that is not scored.

MARK, QUESTION, BLANK = range(3)  # written | ? _
SYMBOL = 3                        # the first of --symbols symbols; keys or noise come after them
N_NOISE = 16                      # different noise tokens, written a .. p


def copy(args, segments, batch, generator):
    """A source sequence, and then the same sequence twice [RMT] sec. 4.

        input    3 1 4 1   | 3 1 4   1 3 1 4
        target   . . . .   3 1 4 1   3 1 4 1
    """
    source = draw_symbols(args, (batch, segments // 3 * args.segment_len), generator)
    mark = torch.full((batch, 1), MARK)
    return ends_with(2 * source.size(1), torch.cat([source, mark, source, source], dim=1))


def reverse(args, segments, batch, generator):
    """A source sequence, and then the same sequence backwards [RMT] sec. 4.

        input    3 1 4 1   | 1 4 1
        target   . . . .   1 4 1 3
    """
    source = draw_symbols(args, (batch, segments // 2 * args.segment_len), generator)
    mark = torch.full((batch, 1), MARK)
    return ends_with(source.size(1), torch.cat([source, mark, source.flip(1)], dim=1))


def draw_symbols(args, shape, generator):
    """Random symbols."""
    return SYMBOL + torch.randint(args.symbols, shape, generator=generator)


def ends_with(n, tokens):
    """The answer is the last n tokens."""
    return tokens, torch.arange(tokens.size(1)) >= tokens.size(1) - n


# A sample of pairs asks about every pair, one question after the other: with a single question,
# most pairs would teach the model nothing. No question is repeated, or the model would learn to
# look for the earlier answer. And `sample` hides each answer (its last symbol) from the questions
# after it: models that see the answers learn which values there are, and find the next answer by
# elimination, without knowing which key has which value. In evaluation only the first question
# counts.


def retrieval(args, segments, batch, generator):
    """A key and its value in each segment, all keys different; then questions [RMT] sec. 4. The
    marks are those of [ARMT].

        input    7 | 2 |   5 | 9 |   5 ? _ |   7 ? _
        target   . . . .   . . . .   . 9 . .   . 2 .
    """
    n_pairs = segments - 1
    keys = SYMBOL + draw_distinct(args.symbols, n_pairs, batch, generator)
    values = draw_symbols(args, (batch, n_pairs, args.segment_len - 3), generator)
    asked = draw_distinct(n_pairs, n_pairs, batch, generator)
    mark = torch.full((batch, n_pairs, 1), MARK)
    pairs = torch.cat([keys[..., None], mark, values, mark], dim=2)
    tokens, is_answer = ask_about(pairs, asked, answer=slice(2, -1))
    tokens[:, n_pairs * args.segment_len + 1::args.segment_len] = QUESTION
    return tokens, is_answer


def remember(args, segments, batch, generator):
    """As retrieval, without marks, and keys are not symbols but tokens of their own [ARMT] sec. 4.

        input    k7 2   k1 9   k1 _   k7        (2 tokens a segment)
        target    . .    . .    9 .    2
    """
    n_pairs = segments - 1
    keys = SYMBOL + args.symbols + draw_distinct(args.keys, n_pairs, batch, generator)
    values = draw_symbols(args, (batch, n_pairs, args.segment_len - 1), generator)
    asked = draw_distinct(n_pairs, n_pairs, batch, generator)
    pairs = torch.cat([keys[..., None], values], dim=2)
    return ask_about(pairs, asked, answer=slice(1, None))


def rewrite(args, segments, batch, generator):
    """As remember, but keys recur with new values, of which the latest counts [ARMT] sec. 4.

        input    k7 2   k1 9   k7 5   k7        (2 tokens a segment)
        target    . .    . .    . .    5
    """
    n_pairs = segments - 1
    keys = SYMBOL + args.symbols + torch.randint(args.keys, (batch, n_pairs), generator=generator)
    values = draw_symbols(args, (batch, n_pairs, args.segment_len - 1), generator)
    asked = torch.randint(n_pairs, (batch, 1), generator=generator)
    same_key = keys == keys.gather(1, asked)
    last = (same_key * torch.arange(n_pairs)).amax(dim=1, keepdim=True)
    pairs = torch.cat([keys[..., None], values], dim=2)
    return ask_about(pairs, last, answer=slice(1, None))


def draw_distinct(n, n_drawn, batch, generator):
    """Some of the numbers 0 .. n - 1 in random order, none of them twice: (B, n_drawn)."""
    if n_drawn > n:
        fail(f"a sample needs {n_drawn} different keys but there are {n}: use fewer --segments or "
             "--eval-segments, or more --keys (in retrieval, --symbols or --first-symbols)")
    return torch.rand(batch, n, generator=generator).argsort(dim=1)[:, :n_drawn]


def ask_about(pairs, asked, answer):
    """Pairs (B, pairs, T), and then those that are asked about (B, questions) once more.

    answer  which tokens of a pair are the answer when the pair is repeated
    """
    batch, n_pairs, T = pairs.shape
    questions = pairs[torch.arange(batch)[:, None], asked]
    tokens = torch.cat([pairs.flatten(1), questions.flatten(1)], dim=1)
    is_answer = torch.zeros(tokens.size(1) // T, T, dtype=torch.bool)
    is_answer[n_pairs:, answer] = True
    return tokens, is_answer.flatten()


def memorize(args, segments, batch, generator):
    """A fact in the first segment, noise, and a question [RMT-1M] sec. 4.

        input    | 3 1 a   b c d e   ? 3
        target   . . . .   . . . .   3 1
    """
    where = torch.zeros(batch, 1, dtype=torch.long)
    return fact_in_noise(args, segments, where, generator)


def detect(args, segments, batch, generator):
    """As memorize, with the fact in any segment but the last [RMT-1M] sec. 4.

        input    a b c d   | 3 1 e   ? 3
        target   . . . .   . . . .   3 1
    """
    where = torch.randint(segments - 1, (batch, 1), generator=generator)
    return fact_in_noise(args, segments, where, generator)


def fact_in_noise(args, segments, where, generator):
    """Noise, with a fact of half a segment at the start of segment `where` (B, 1); a question."""
    batch = len(where)
    T = args.segment_len
    n = T // 2
    fact = draw_symbols(args, (batch, n), generator)
    shape = (batch, (segments - 1) * T)
    noise = SYMBOL + args.symbols + torch.randint(N_NOISE, shape, generator=generator)
    mark = torch.full((batch, 1), MARK)
    question = torch.full((batch, 1), QUESTION)
    noise.scatter_(1, where * T + torch.arange(1 + n), torch.cat([mark, fact], dim=1))
    return ends_with(n, torch.cat([noise, question, fact], dim=1))


PEOPLE = "mary john sandra daniel".split()
PLACES = "kitchen garden office bathroom hallway bedroom".split()
NOISE_WORDS = [  # a sentence of noise has one word of each
    "the".split(),
    "old quiet green narrow".split(),
    "river road wind stone".split(),
    "follows crosses meets leaves".split(),
    "hills fields clouds trees".split(),
    ".".split(),
]
SENTENCE = len(NOISE_WORDS)  # words of every sentence
WORDS = ["|", "?", "_", *PEOPLE, *PLACES, *chain(*NOISE_WORDS), *"went to where is".split()]


def facts(args, segments, batch, generator):
    """People move, in sentences scattered among noise; then, where is each of them? As in [bAbI].

        input    mary went to the office .   the old river meets trees .   where is mary _
        target   .    .    .  .   .      .   .   .   .     .     .     .   .     .  office

    A sample of n segments has at most n - 1 moves, so that with the curriculum "grow" a model meets
    one move first, even where a segment has room for many.
    """
    if args.segment_len % SENTENCE != 0:
        fail(f"--segment-len {args.segment_len} must be a multiple of {SENTENCE}, the words of a "
             "sentence of --task facts")
    rng = random.Random(torch.randint(2**62, (), generator=generator).item())
    n_sentences = (segments - 1) * args.segment_len // SENTENCE
    n_people = min(4, segments - 1)
    samples = []
    for _ in range(batch):
        people = rng.sample(PEOPLE, n_people)
        n_more_moves = rng.randint(0, min(6, segments - 1) - n_people)
        movers = [*people, *rng.choices(people, k=n_more_moves)]
        rng.shuffle(movers)
        story = [" ".join(map(rng.choice, NOISE_WORDS)) for _ in range(n_sentences)]
        moments = sorted(rng.sample(range(n_sentences), len(movers)))
        place_of = {}
        for i, person in zip(moments, movers, strict=True):
            place_of[person] = rng.choice(PLACES)
            story[i] = f"{person} went to the {place_of[person]} ."
        questions = [f"where is {person} {place_of[person]}" for person in people]
        line = " ".join(story + questions)
        samples.append([WORDS.index(word) for word in line.split()])
    tokens = torch.tensor(samples)
    is_answer = torch.zeros(tokens.size(1), dtype=torch.bool)
    is_answer[n_sentences * SENTENCE + 3::4] = True  # where is mary office
    return tokens, is_answer


CHARACTERS = "|?_0123456789+-*/^=,()xDnoe"  # blanks _ fill up the fields of an equation


def quadratic(args, segments, batch, generator):
    """An equation, its monic form, the discriminant D, two roots, and the answer [RMT] sec. 4.

        input    -4*x^2+392*x-2208=0__  x^2-98*x+552=0_______ ... (six fields of 30 characters)
        target   ....................x  ^2-98*x+552=0_______D ... D=7396 x=(98-86)/2=6 ... 6,92
    """
    rng = random.Random(torch.randint(2**62, (), generator=generator).item())
    samples = []
    for _ in range(batch):
        a = rng.choice([*range(-10, 0), *range(1, 11)])
        r, s = sorted(rng.choices(range(-100, 101), k=2))
        p = -(r + s)
        q = r * s
        solvable = rng.random() >= 0.2
        if not solvable:
            q = rng.randint(p * p // 4 + 1, p * p // 4 + 10_000)
        D = p * p - 4 * q
        steps = ["none", "none", "none"]
        if solvable:
            root = math.isqrt(D)
            steps = [f"x=({-p}-{root})/2={r}", f"x=({-p}+{root})/2={s}", f"{r},{s}"]
        given = f"{a}*x^2{a * p:+}*x{a * q:+}=0"
        equation = [given, f"x^2{p:+}*x{q:+}=0", f"D={D}", *steps]
        line = "".join(field.ljust(30, "_") for field in equation)
        samples.append([CHARACTERS.index(character) for character in line])
    return ends_with(150, torch.tensor(samples))


def symbols(args):
    """The vocabulary of most tasks: marks and symbols."""
    return [*"|?_", *"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:args.symbols]]


def symbols_and_noise(args):
    """The vocabulary of tasks with noise."""
    return [*symbols(args), *"abcdefghijklmnop"]


def symbols_and_keys(args):
    """The vocabulary of tasks whose keys are not symbols."""
    return [*symbols(args), *(f"k{i}" for i in range(args.keys))]


class Task(NamedTuple):
    """Everything about one task. It is trained with --task NAME once it has a row in TASKS.

    A task in a file of your own: import train_copy, set train_copy.TASKS["sort"] = Task(...), and
    end with train_copy.main(sys.argv[1:]).
    """
    draw: Callable     # (args, segments, batch, generator) -> tokens, which of them are answers
    words: Callable    # (args) -> the vocabulary, a list of strings
    recipe: dict       # the flags whose defaults differ for this task
    multiple: int = 1  # the number of segments is a multiple of this
    shortest: int = 2  # segments of the shortest samples in training


COPYING = {"n_mem": 16, "n_head": 2, "steps": 600, "batch": 12, "optimizer": "muon", "lr": 1.4e-2,
           "curriculum": "grow", "write_slot": "both", "carry_dropout": 0.7}
FACT = {"segments": 8, "eval_segments": [16, 32], "n_mem": 4,
        "memory_noise": 1.0}  # with noise in training, a fact lasts
PAIRS = {"model": "armt", "segment_len": 2, "n_mem": 4, "batch": 64, "curriculum": "grow",
         "weight_decay": 1.0}  # with weight decay, values last
TASKS = {
    "copy": Task(copy, symbols, COPYING | {"segments": 9}, multiple=3),
    "reverse": Task(reverse, symbols, COPYING | {"segments": 6}, multiple=2),
    "retrieval": Task(retrieval, symbols,
                      PAIRS | {"segments": 5, "eval_segments": [10, 11], "segment_len": 4,
                               "curriculum": "random"},
                      shortest=3),  # with a single pair there is nothing to tell apart
    "remember": Task(remember, symbols_and_keys,
                     PAIRS | {"segments": 9, "eval_segments": [18, 36]}),
    "rewrite": Task(rewrite, symbols_and_keys,
                    PAIRS | {"segments": 13, "eval_segments": [26, 52], "keys": 4, "n_mem": 2,
                             "steps": 600, "batch": 32, "lr": 2e-3, "curriculum": "random",
                             "write_slot": "both"}),
    "memorize": Task(memorize, symbols_and_noise, FACT),
    "detect": Task(detect, symbols_and_noise,
                   FACT | {"curriculum": "grow", "steps": 2000, "memory_noise": 0.6}),
    "facts": Task(facts, lambda args: WORDS,
                  PAIRS | {"segments": 8, "eval_segments": [16, 32], "segment_len": SENTENCE,
                           "steps": 800}),
    "quadratic": Task(quadratic, lambda args: list(CHARACTERS),
                      {"segments": 6, "segment_len": 30, "curriculum": "fixed", "d_model": 128,
                       "n_mem": 8, "write_slot": "both", "carry_dropout": 0.7, "steps": 5000,
                       "optimizer": "muon", "lr": 4e-3}, multiple=6),
}


# ==================================================================================================
# Model and samples


def build(args, variant):
    """A model of one row of VARIANTS, untrained. Raises ValueError where sizes do not fit."""
    torch.manual_seed(args.seed)
    settings = {name: getattr(args, name) for name in config_fields()}
    vocabulary = TASKS[args.task].words(args)
    return RMT(Config(variant, len(vocabulary), **settings)).to(args.device)


def config_fields():
    """The fields of Config that are flags. (--model is the variant; the task has a vocabulary.)"""
    names = [field.name for field in fields(Config)]
    names.remove("variant")
    names.remove("vocab_size")
    return names


NO_TARGET = -100  # of outputs that are not scored


def sample(args, model, segments, batch, generator):
    """Inputs (B, length), and for each the next token if it is an answer, else NO_TARGET."""
    tokens, is_answer = TASKS[args.task].draw(args, segments, batch, generator)
    targets = tokens[:, 1:].masked_fill(~is_answer[1:], NO_TARGET)
    # Only later questions would see the last symbol of an answer, and could exclude that value.
    hidden = is_answer[:-1] & ~is_answer[1:]
    if model.variant.mask == "full":
        # An encoder sees later tokens too, and so the answers. It gets blanks to fill in instead.
        hidden = is_answer[:-1]
    inputs = tokens[:, :-1].masked_fill(hidden, BLANK)
    return inputs.to(args.device), targets.to(args.device)


def with_symbols(args, n_symbols):
    """The same settings with another number of symbols."""
    return argparse.Namespace(**vars(args) | {"symbols": n_symbols})


def first_answer(scored):
    """Where the first answer begins and ends, if scored (length,) tells which outputs count."""
    start = scored.int().argmax()
    n = scored[start:].int().cumprod(dim=0).sum()  # how many are scored in a row
    return start.item(), (start + n).item()


def check_lengths(args):
    """End with one line unless samples of every length fill their segments."""
    T = args.segment_len
    task = TASKS[args.task]
    for n in [args.segments, *training_lengths(args), *args.eval_segments]:
        if n < task.shortest or n % task.multiple != 0:
            fail(f"--task {args.task} needs --segments and --eval-segments of at least "
                 f"{task.shortest}, and multiples of {task.multiple}: {n} is not")
        _, is_answer = task.draw(args, n, 1, torch.Generator())
        _, end = first_answer(is_answer[1:])
        if not (n - 1) * T < end <= n * T:
            fail(f"--task {args.task} over {n} segments of {T} tokens: the first answer must end "
                 f"within {(n - 1) * T + 1} to {n * T} tokens, and ends after {end}: take another "
                 "--segment-len or other --segments")


def check_first_symbols(args):
    """End with one line unless the task can be drawn from --first-symbols symbols."""
    if args.first_symbols is None:
        return
    if TASKS[args.task].words is not symbols:
        fail(f"--first-symbols does not work with --task {args.task}, where other tokens come "
             "after the symbols: take copy, reverse or retrieval")
    if not 1 <= args.first_symbols <= args.symbols:
        fail(f"--first-symbols {args.first_symbols} must be from 1 to --symbols {args.symbols}")
    lengths = training_lengths(args)
    length = lengths[0] if args.curriculum == "grow" else lengths[-1]
    fewer = with_symbols(args, args.first_symbols)
    TASKS[args.task].draw(fewer, length, 1, torch.Generator())  # enough different keys?


def share_right(answers, targets):
    """The share of right symbols. Blanks, which fill up the fields of an equation, do not count."""
    scored = (targets != NO_TARGET) & (targets != BLANK)
    right = (answers == targets) & scored
    return right.sum().item() / scored.sum().item()


# ==================================================================================================
# Evaluation


@torch.no_grad()
def evaluate(args, model, segments, between=lambda state: state, free=True):
    """Shares of right answers on 128 new samples, and the samples: inputs, targets, answers.

    between  a function that may tamper with the state at each boundary
    free     also let the model run free, reading back each symbol that it has answered. When it is
             teacher-forced, it reads the right symbols
    """
    model.eval()
    T = args.segment_len
    n_samples = max(16, min(128, 2**22 // (segments * T)))  # fewer where they are very long
    generator = torch.Generator().manual_seed(args.seed + 2**31)  # not the samples of training
    inputs, targets = sample(args, model, segments, n_samples, generator)
    start, end = first_answer(targets[0] != NO_TARGET)
    inputs = inputs[:, :end]
    targets = targets[:, start:end]
    first = start // T  # the segment in which the answer begins

    state = model.initial_state(n_samples)
    answer_logits = []
    pieces = inputs.split(T, dim=1)
    progress = tqdm(pieces, f"{segments} segments", leave=False, delay=2, disable=None)
    for s, piece in enumerate(progress):
        state = between(state)
        if s == first:
            before_answer = state
        logits, state = model(piece, state)
        if s >= first:
            answer_logits.append(logits)
    answer_logits = torch.cat(answer_logits, dim=1)[:, start - first * T:]
    forced = answer_logits.argmax(-1)

    answers = forced
    # An encoder answers all at once. Far beyond the lengths of training, logits may overflow.
    if free and model.variant.mask != "full" and answer_logits.isfinite().all():
        prompt = inputs[:, first * T:start + 1]
        answers = generate(model, prompt, end - start, before_answer, temperature=0)
    whole = ((answers == targets) | (targets == BLANK)).all(dim=1)
    scores = {
        "teacher_forced": share_right(forced, targets),
        "free_running": share_right(answers, targets),
        "whole_answers": whole.sum().item() / n_samples,
    }
    return scores, (inputs, targets, answers)


# ==================================================================================================
# Files
#
# A checkpoint has all that the next step depends on. However the process ends, the run resumes from
# its last checkpoint, and its numbers are those of a run that was never interrupted.


def save(args, path, run, model, optimizers, data):
    """Write a checkpoint. The file is complete at any moment, even if the process is killed."""
    checkpoint = vars(run) | {
        "config": asdict(model.config),
        "vocabulary": TASKS[args.task].words(args),
        "flags": vars(args),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "data": data.get_state(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(args.device) if on_gpu(args) else None,
    }
    try:
        torch.save(checkpoint, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except RuntimeError as reason:  # what torch.save raises when the disk is full
        fail(f"{path} could not be written, the last checkpoint stays: {reason}")


def load(args, path, run, model, optimizers, data):
    """Restore a checkpoint that save has written."""
    saved = read_checkpoint(args, path, model)
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    data.set_state(saved["data"])
    torch.set_rng_state(saved["random"])
    if on_gpu(args) and saved["random_cuda"] is not None:
        torch.cuda.set_rng_state(saved["random_cuda"], args.device)
    for name in vars(run):
        setattr(run, name, saved[name])


# Flags that cannot change when a run is resumed, besides those of Config.
KEPT = ["task", "symbols", "first_symbols", "keys", "segments", "curriculum", "optimizer",
        "weight_decay", "seed"]


def read_checkpoint(args, path, model):
    """Load a checkpoint and give the model its weights. One line if the file does not fit."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load ignores checksums
        if damaged is not None:
            fail(f"{path} is damaged: the checksum of {damaged} is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name in KEPT + config_fields():
            flag = f"--{name.replace('_', '-')}"
            was = saved["flags"][name]
            now = getattr(args, name)
            if was != now:
                fail(f"{path} was trained with {flag} {was}, not {now}: leave out that flag")
        if saved["step"] > args.steps:
            fail(f"{path} has {saved['step']} steps already, more than --steps {args.steps}")
        model.load_state_dict(saved["model"])
        return saved
    except Exception as reason:  # whatever is wrong with a file, the user gets one line
        fail(f"{path} is not a checkpoint of train_copy.py: {reason!r}")


def on_gpu(args):
    """Whether --device is a CUDA GPU."""
    return args.device.startswith("cuda")


def write_row(folder, row):
    """Append a row to metrics.csv."""
    path = Path(folder, "metrics.csv")
    is_first = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if is_first:
            writer.writeheader()
        writer.writerow(row)


def write_json(path, content):
    """Write a JSON file, whole or not at all."""
    Path(f"{path}.tmp").write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def write_settings(args):
    """Write config.json, from which --resume takes its settings."""
    settings = dict(vars(args))
    for name in ("out", "resume"):
        del settings[name]
    write_json(Path(args.out, "config.json"), settings)


def new_folder(args):
    """Make the folder of a new run: --out, or the first out/TASK-N that does not exist."""
    if args.out is not None:
        folder = Path(args.out)
        if args.out == "" or (folder.exists() and any(folder.iterdir())):
            fail(f"--out {args.out!r} is not a new or empty folder: take another name (--resume "
                 "continues a run)")
        folder.mkdir(parents=True, exist_ok=True)
        return args.out
    n = 1
    while True:
        folder = Path(f"out/{args.task}-{n}")
        try:
            folder.mkdir(parents=True)
            return folder.as_posix()
        except FileExistsError:  # perhaps of a run that began at the same moment
            n += 1


def fail(message):
    """End with one line and exit status 2."""
    print(f"train_copy.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


# ==================================================================================================
# Flags


def parse(argv):
    """The settings of a run: the flags given, else those of a run resumed, or the task's recipe."""
    parser = argparse.ArgumentParser(
        usage="python train_copy.py [flags]", description=__doc__.splitlines()[0],
        formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=30),
        allow_abbrev=False)
    parser.error = fail

    flag = parser.add_argument_group(
        "task, which sets defaults of its own (--task NAME --help shows them)").add_argument
    flag("--task", choices=TASKS, default="copy", metavar="NAME",
         help=f"what to learn: {', '.join(TASKS)}")
    flag("--symbols", type=int, default=10, choices=range(2, 37), metavar="2..36",
         help="different symbols")
    flag("--first-symbols", type=int, metavar="N",
         help="symbols to begin with, doubled when training goes well; None: all (copy, "
         "reverse, retrieval)")
    flag("--keys", type=int, default=64, metavar="N", help="keys of remember and rewrite")
    flag("--segments", type=int, default=8, metavar="N", help="segments of the longest samples")
    flag("--curriculum", choices=["grow", "random", "fixed"], default="random",
         help="longer and longer samples, all lengths, or the longest only")

    flag = parser.add_argument_group("training").add_argument
    flag("--model", choices=VARIANTS, default="rmt", metavar="NAME", help=", ".join(VARIANTS))
    flag("--baseline", choices=[*VARIANTS, "none"], default="transformer", metavar="NAME",
         help="another model to train and compare, or none")
    flag("--steps", type=int, default=1000, metavar="N", help="optimizer steps")
    flag("--batch", type=int, default=32, metavar="N", help="samples per step")
    flag("--optimizer", choices=["adamw", "muon"], default="adamw",
         help="for the matrices of the layers")
    flag("--lr", type=float, default=3e-3, metavar="X", help="learning rate at its peak")
    flag("--weight-decay", type=float, default=0.01, metavar="X", help="weight decay")
    flag("--bptt-depth", type=int, metavar="N", help="boundaries that gradient crosses; None: all")
    flag("--seed", type=int, default=0, metavar="N", help="random seed of weights and samples")
    flag("--compile", action="store_true", help="torch.compile, slow to start")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    flag("--threads", type=int, default=1, metavar="N", help="CPU threads; 1 is fastest here")

    group = parser.add_argument_group("run")
    flag = group.add_argument
    flag("--eval-segments", type=int, nargs="+", default=[], metavar="N",
         help="longer samples to try after training")
    flag("--target", type=float, default=0.0, metavar="X",
         help="exit with status 1 if less than this is right")
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--out", metavar="FOLDER", help="where to write; None: out/TASK-1, -2, ...")
    flag("--resume", metavar="FOLDER", help="continue the run in a folder")

    flag = parser.add_argument_group("model, the fields of Config in rmt.py").add_argument
    for name in config_fields():
        default = getattr(Config, name)
        kind = type(default)
        flag(f"--{name.replace('_', '-')}", type=kind, default=default, metavar=kind.__name__,
             help="(default: %(default)s)")
    parser.set_defaults(segment_len=8, cache_len=8)  # shorter than those of Config

    # A first look, without --help, which shows the defaults of the task.
    args, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    recipe = TASKS[args.task].recipe
    unknown = recipe.keys() - vars(args).keys()
    if unknown:
        fail(f"the recipe of --task {args.task} names flags that do not exist: "
             f"{', '.join(sorted(unknown))}")
    parser.set_defaults(**recipe)
    command = shlex.join(["python", Path(sys.argv[0]).name, *argv])
    if args.resume is not None:
        settings = read_settings(args)
        parser.set_defaults(**settings)
        command = f"{settings['command']} && {command}"
    parser.set_defaults(command=command)
    args = parser.parse_args(argv)

    at_least = {"keys": 1, "steps": 1, "seed": 0, "batch": 1, "lr": 0, "weight_decay": 0,
                "bptt_depth": 0, "threads": 1}
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:  # nan fails too
            fail(f"--{name.replace('_', '-')} {value} must be a number of at least {least}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as reason:
        fail(f"--device {args.device} cannot be used here, take --device cpu: "
             f"{str(reason).splitlines()[0]}")
    return args


def read_settings(args):
    """The settings of the run in --resume."""
    try:
        settings = json.loads(Path(args.resume, "config.json").read_text(encoding="utf-8"))
        differing = settings.keys() ^ ({*vars(args), "command"} - {"out", "resume"})
    except (OSError, ValueError, AttributeError) as reason:
        fail(f"--resume {args.resume} holds no run: {reason}")
    if differing:
        fail(f"{args.resume} holds a run of another script or edition than this train_copy.py: "
             f"they differ in {', '.join(sorted(differing))}")
    task = settings["task"]
    if task not in TASKS:
        fail(f"{args.resume} holds a run of the task {task}, which is not in TASKS: resume it with "
             "the script that adds it")
    return settings


# ==================================================================================================
# Report


def report(args, trained):
    """Evaluate, print and draw. Returns what --model gets right over its worst trained length."""
    lengths = training_lengths(args)
    lengths = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    longer = sorted(set(args.eval_segments) - set(lengths))

    print("\nshare of answer symbols right, on new samples")
    print("model             segments  teacher-forced  free-running  whole answers")
    results = {}
    for name, (model, run) in trained.items():
        results[name] = {
            "cpu_seconds": round(run.seconds, 1), "state_floats": model.state_floats()}
        for n in lengths + (longer if name == args.model else []):
            scores, samples = evaluate(args, model, n)
            results[name][n] = scores
            note = "   longer than in training" if n > args.segments else ""
            print(f"{name:18}{n:8}{scores['teacher_forced']:16.3f}{scores['free_running']:14.3f}"
                  f"{scores['whole_answers']:15.3f}{note}")
            if n == args.segments and name == args.model:
                examples = samples

    # Is memory really used? Take the state away, or exchange it, and see what is left.
    model, _ = trained[args.model]
    controls = {
        "its initial state at every boundary": lambda state: model.initial_state(len(state.memory)),
        "the state of another sample": lambda state: state.map(lambda t: t.roll(1, 0)),
    }
    print(f"\ncontrols: {args.model} over {args.segments} segments, teacher-forced, if it gets")
    for name, between in controls.items():
        scores, _ = evaluate(args, model, args.segments, between, free=False)
        results[name] = scores["teacher_forced"]
        print(f"    {name:38}{results[name]:.3f}")
    print_examples(args, *examples)

    with matplotlib.rc_context({"font.size": 12}):
        draw_training(args, trained).savefig(Path(args.out, "training.png"))
        if model.variant.block is not AssociativeBlock:  # armt reads memory without attention
            draw_attention(args, model, *examples[:2]).savefig(Path(args.out, "attention.png"))
    write_result(args, results)

    print()
    segments = " / ".join(map(str, lengths))
    for name, (_, run) in trained.items():
        shares = " / ".join(f"{results[name][n]['teacher_forced']:.3f}" for n in lengths)
        print(f"{name}: {shares} of the answer symbols right over {segments} segments, after "
              f"{run.seconds:.0f} CPU seconds of training")
    print(f"pictures and numbers are in {args.out}")
    return min(results[args.model][n]["teacher_forced"] for n in lengths)


def print_examples(args, inputs, targets, answers):
    """The first three samples, with a caret below each mistake."""
    words = TASKS[args.task].words(args)
    space = " " if max(map(len, words)) > 1 else ""
    n_prompt = inputs.size(1) - targets.size(1) + 1
    print(f"\nthree answers of {args.model}, free-running; ^ marks a mistake")
    for i in range(3):
        prompt = [words[token] for token in inputs[i, :n_prompt]]
        right = [words[token] for token in targets[i]]
        answer = [words[token] for token in answers[i]]
        marks = []
        for word, right_word in zip(answer, right, strict=True):
            mark = " " if word == right_word else "^"
            marks.append(mark * len(word))
        print("    input  ", space.join(prompt))
        print("    right  ", space.join(right))
        print("    model  ", space.join(answer))
        print("           ", space.join(marks))


def write_result(args, results):
    """Write result.json: the results, and how they were obtained."""
    hardware = f"{args.device} on {platform.machine()}, threads: {args.threads}"
    if on_gpu(args):
        hardware = torch.cuda.get_device_name(args.device)
    write_json(Path(args.out, "result.json"), {
        "command": args.command,
        "seed": args.seed,
        "date": time.strftime("%Y-%m-%d"),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "hardware": hardware,
        "flags": vars(args),
        "results": results,
    })


# Pictures are drawn without pyplot, so that a notebook that runs this script keeps its settings.


def draw_training(args, trained):
    """Loss, and the share of right symbols for every length, over the steps of training."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = [("-", "#0072B2"), ("--", "#D55E00")]  # of --model and --baseline
    for (line, color), (name, (_, run)) in zip(styles, trained.items(), strict=False):
        steps = [row["step"] for row in run.rows]
        losses = [row["loss"] for row in run.rows]
        left.plot(steps, losses, line, color=color, label=name)
    _, run = trained[args.model]
    for i, n in enumerate(run.right):
        seen = [row for row in run.rows if row[f"right_{n}"] is not None]
        steps = [row["step"] for row in seen]
        shares = [row[f"right_{n}"] for row in seen]
        color = matplotlib.colormaps["viridis"](0.85 * i / max(1, len(run.right) - 1))
        right.plot(steps, shares, color=color, label=f"{n} segments")
    left.set(xlabel="training step", ylabel="loss, nats per answer symbol",
             title="training loss (running mean)")
    right.set(xlabel="training step", ylabel="share of answer symbols right", ylim=(0, 1.03),
              title=f"{args.model} learns {args.task} (running mean)")
    left.legend()
    right.legend(fontsize=9)
    return figure


def draw_attention(args, model, inputs, targets):
    """Attention weights in two segments: the first, and the one in which the answer begins."""
    T, n_layer = args.segment_len, model.config.n_layer
    answer = (inputs.size(1) - targets.size(1)) // T
    figure = Figure(figsize=(5 * n_layer, 10), layout="constrained")
    axes = figure.subplots(2, n_layer, squeeze=False)
    state = model.initial_state(1)
    for s, segment in enumerate(inputs[:1].split(T, dim=1)[:answer + 1]):
        if s in (0, answer):
            weights, widths = attention_maps(model, segment, state)
            for layer in range(n_layer):
                axis = axes[0 if s == 0 else 1, layer]
                draw_map(axis, weights[layer, 0].amax(dim=0), widths)
                axis.set_title(f"segment {s + 1}, layer {layer + 1}")
        with torch.no_grad():
            _, state = model(segment, state)
    figure.suptitle("Attention: the largest weight of all heads, from 0 (white) to 1 (black)")
    return figure


def draw_map(axis, weights, widths):
    """One attention matrix, with the names of its blocks and lines between them."""
    axis.imshow(weights.cpu().numpy(), cmap="Greys", vmin=0, vmax=1)
    names = "cache", "read", "tokens", "write"
    columns = {name: n for name, n in zip(names, widths, strict=True) if n > 0}
    rows = {name: n for name, n in columns.items() if name != "cache"}
    for blocks, draw_line, set_ticks in [
            (columns, axis.axvline, axis.set_xticks), (rows, axis.axhline, axis.set_yticks)]:
        ends = [end - 0.5 for end in accumulate(blocks.values())]
        middles = [end - n / 2 for end, n in zip(ends, blocks.values(), strict=True)]
        set_ticks(middles, list(blocks))
        for end in ends[:-1]:
            draw_line(end, color="black", linewidth=0.8)
    axis.set(xlabel="key: what is seen", ylabel="query: who looks")


# ==================================================================================================
# Main


def main(argv):
    """Train --model and --baseline, and report."""
    args = parse(argv)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        reached = run_all(args)
    except KeyboardInterrupt:
        if args.out is not None:
            print(f"\nstopped; to resume: python {sys.argv[0]} --resume {shlex.quote(args.out)}")
        sys.exit(130)
    except OSError as reason:  # a folder or a file that cannot be written
        fail(reason)
    finally:
        torch.set_num_threads(threads_before)  # in case a notebook runs this script
    if args.target > 0:
        verdict = "reached" if reached >= args.target else "MISSED"
        print(f"target {args.target}: {verdict}, {args.model} gets at least {reached:.3f} right")
        if verdict == "MISSED":
            sys.exit(1)


def run_all(args):
    """Check all settings before anything is written; train; report."""
    names = [args.model]
    if args.baseline not in ("none", args.model):
        names.append(args.baseline)
    try:
        models = {name: build(args, name) for name in names}
    except ValueError as reason:  # sizes that do not fit
        fail(reason)
    check_lengths(args)
    check_first_symbols(args)

    rows = []  # of metrics.csv, as far as the checkpoints are
    if args.resume is not None:
        for name, model in models.items():
            path = Path(args.resume, f"{name}.pt")
            if path.exists():
                rows += read_checkpoint(args, path, model)["rows"]

    args.out = args.resume or new_folder(args)
    write_settings(args)
    Path(args.out, "metrics.csv").unlink(missing_ok=True)
    for row in rows:
        write_row(args.out, row)
    print(f"{args.task} over {args.segments} segments of {args.segment_len} tokens: device "
          f"{args.device}, seed {args.seed}, files in {args.out}")
    for name, model in models.items():
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: {n_parameters} parameters, state of {model.state_floats()} floats")
    return report(args, {name: train(args, name) for name in names})


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        # Lines are shown as they are printed. What the console cannot show is escaped.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    main(sys.argv[1:])
