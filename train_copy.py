"""Train the Recurrent Memory Transformer on tasks that need memory, beside a model without memory.

    python train_copy.py
        Copy 24 symbols over 9 segments; a minute on a laptop. The last lines say that rmt gets 0.99
        and more right over 3, 6 and 9 segments, and transformer about 0.10, which is guessing.
    python train_copy.py --task memorize --eval-segments 4096
        A fact, then noise, then a question; two minutes. rmt still knows it 4,096 segments later.
    python train_copy.py --task rewrite
        Four keys whose values change; a minute and a half. armt ends at 1.0, transformer near 0.10.

A folder out/TASK-1 (-2, -3, ...) gets config.json, metrics.csv, checkpoint.pt, result.json,
training.png and, but for armt, attention.png. Ctrl-C saves the run; `--resume FOLDER` goes on.

This file needs rmt.py beside it and nothing else of this project. It reads from top to bottom:
tasks, flags, model and samples, evaluation, training, files, report, main. The papers [RMT],
[RMT-1M] and [ARMT] are listed in rmt.py; [bAbI] is Weston et al. Towards AI-Complete Question
Answering. 2015, arXiv:1502.05698.
"""
import argparse
import ast
import csv
import dataclasses
import json
import math
import os
import platform
import random
import re
import shlex
import signal
import sys
import time
import zipfile
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from tqdm import tqdm

from rmt import RMT, VARIANTS, AssociativeBlock, Config, attention_maps, generate, tree_map, unroll

# ==================================================================================================
# Tasks
#
# A task is a function that draws samples. It returns tokens (B, length + 1) and the length of the
# answer that ends them. The model reads all tokens but the last, and its outputs over the answer
# are scored. The examples have 4 tokens a segment, unless they say otherwise; segments are set
# apart by spaces, and a dot is an output that is not scored.
#
# Where many things can be asked for, one question teaches little. So the tasks in ASKING can ask
# several (--questions), one after the other, with answers at equal distances: see `answers_of`.
# Nothing is asked for twice, or a model would learn to look for the earlier answer.

MARK, QUESTION, BLANK = range(3)  # written | ? _
SYMBOL = 3                        # the first of --symbols symbols; keys or noise come after them
N_NOISE = 16                      # tokens that noise is made of, written a .. p


def draw_symbols(args, shape, generator):
    """Random symbols."""
    return SYMBOL + torch.randint(args.symbols, shape, generator=generator)


def copy(args, segments, batch, generator):
    """A source, and then the source twice [RMT] sec. 4.

        input    3 1 4 1   | 3 1 4   1 3 1 4
        target   . . . .   3 1 4 1   3 1 4 1
    """
    source = draw_symbols(args, (batch, segments // 3 * args.segment_len), generator)
    mark = torch.full((batch, 1), MARK)
    return torch.cat([source, mark, source, source], dim=1), 2 * source.size(1)


def reverse(args, segments, batch, generator):
    """A source, and then the source backwards [RMT] sec. 4.

        input    3 1 4 1   | 1 4 1
        target   . . . .   1 4 1 3
    """
    source = draw_symbols(args, (batch, segments // 2 * args.segment_len), generator)
    mark = torch.full((batch, 1), MARK)
    return torch.cat([source, mark, source.flip(1)], dim=1), source.size(1)


def retrieval(args, segments, batch, generator):
    """A key and its value in each segment, no key twice; then one key is asked for [RMT] sec. 4.
    The marks are those of [ARMT].

        input    7 | 2 |   5 | 9 |   7 ?
        target   . . . .   . . . .   . 2
    """
    keys = SYMBOL + draw_distinct(args.symbols, segments - 1, batch, generator)
    values = draw_symbols(args, (batch, segments - 1, args.segment_len - 3), generator)
    mark = torch.full((batch, segments - 1, 1), MARK)
    pairs = torch.cat([keys[..., None], mark, values, mark], dim=2)
    asked, answers = choose_pairs(args, keys, values, generator)
    question = torch.full_like(asked, QUESTION)
    end = torch.full_like(asked, MARK)
    questions = torch.cat([asked, question, answers, end], dim=2)
    tokens = torch.cat([pairs.flatten(1), questions.flatten(1)], dim=1)
    return tokens[:, :-1], answers.size(2)


def remember(args, segments, batch, generator):
    """As retrieval, without marks, and with tokens of their own for keys [ARMT] sec. 4.

        input    k7 2   k1 9   k7        (2 tokens a segment)
        target    . .    . .    2
    """
    keys = draw_distinct(args.keys, segments - 1, batch, generator)
    return ask_about_pairs(args, keys, generator)


def rewrite(args, segments, batch, generator):
    """As remember, but keys come again with new values, and the last value counts [ARMT] sec. 4.

        input    k7 2   k1 9   k7 5   k7        (2 tokens a segment)
        target    . .    . .    . .    5
    """
    keys = torch.randint(args.keys, (batch, segments - 1), generator=generator)
    return ask_about_pairs(args, keys, generator)


def ask_about_pairs(args, keys, generator):
    """Keys (B, pairs), each with a value; then some of the keys, each with its last value."""
    keys = SYMBOL + args.symbols + keys
    values = draw_symbols(args, (*keys.shape, args.segment_len - 1), generator)
    pairs = torch.cat([keys[..., None], values], dim=2)
    asked, answers = choose_pairs(args, keys, values, generator)
    questions = torch.cat([asked, answers], dim=2)
    return torch.cat([pairs.flatten(1), questions.flatten(1)], dim=1), answers.size(2)


def choose_pairs(args, keys, values, generator):
    """Some of keys (B, pairs) to ask for, as (B, questions, 1), and the last value of each."""
    batch, n_pairs = keys.shape
    first = torch.randint(n_pairs, (batch, 1), generator=generator)
    chosen = first
    if args.questions > 1:
        n = min(args.questions, n_pairs)
        further = 1 + draw_distinct(n_pairs - 1, n - 1, batch, generator)
        chosen = torch.cat([first, (first + further) % n_pairs], dim=1)
    rows = torch.arange(batch)[:, None]
    asked = keys[rows, chosen]
    same = keys[:, None, :] == asked[:, :, None]  # (B, questions, pairs)
    last = n_pairs - 1 - same.flip(2).int().argmax(dim=2)
    return asked[..., None], values[rows, last]


def draw_distinct(n_keys, n, batch, generator):
    """n of the numbers 0 .. n_keys - 1, none of them twice: (B, n)."""
    return torch.rand(batch, n_keys, generator=generator).argsort(dim=1)[:, :n]


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
    batch, T = len(where), args.segment_len
    n = T // 2
    fact = draw_symbols(args, (batch, n), generator)
    shape = (batch, (segments - 1) * T)
    noise = SYMBOL + args.symbols + torch.randint(N_NOISE, shape, generator=generator)
    mark = torch.full((batch, 1), MARK)
    question = torch.full((batch, 1), QUESTION)
    noise.scatter_(1, where * T + torch.arange(1 + n), torch.cat([mark, fact], dim=1))
    return torch.cat([noise, question, fact], dim=1), n


# Facts about people and places, in the manner of bAbI [bAbI].

PEOPLE = "mary john sandra daniel".split()
OBJECTS = "apple football milk book".split()
PLACES = "kitchen garden office bathroom hallway bedroom".split()
SIDES = "north south east west".split()
NOISE_WORDS = [  # a sentence of noise takes one word of each
    "the".split(),
    "old quiet green narrow".split(),
    "river road wind stone".split(),
    "follows crosses meets leaves".split(),
    "hills fields clouds trees".split(),
    ".".split(),
]
SENTENCE = len(NOISE_WORDS)  # words of every sentence
OTHER_WORDS = "went to took dropped there is where what of".split()
WORDS = ["|", "?", "_", *PEOPLE, *OBJECTS, *PLACES, *SIDES, *chain(*NOISE_WORDS), *OTHER_WORDS]
NUMBER = {word: i for i, word in enumerate(WORDS)}


def one_fact(rng, n):
    """People move. Where somebody is depends on one fact, the last move.

    A story returns its facts, and the questions that can be asked with their answers.
    """
    at = {}
    facts = []
    for _ in range(n):
        person = rng.choice(PEOPLE)
        at[person] = rng.choice(PLACES)
        facts.append(f"{person} went to the {at[person]} .")
    return facts, [(f"where is {person}", place) for person, place in at.items()]


def two_facts(rng, n):
    """People move, take things and drop them. Where a thing is depends on a move and on a take."""
    at = {}       # person: place
    holder = {}   # thing that somebody holds: person
    lies = {}     # thing that somebody dropped: place
    facts = []
    for i in range(n):
        person = rng.choice(PEOPLE if i % 2 == 0 else list(at))
        held = [thing for thing in OBJECTS if holder.get(thing) == person]
        here = [thing for thing in OBJECTS if thing not in holder
                and lies.get(thing, at.get(person)) == at.get(person)]
        if i % 2 == 1 and held and rng.random() < 0.3:
            thing = held[0]
            del holder[thing]
            lies[thing] = at[person]
            facts.append(f"{person} dropped the {thing} there .")
        elif i % 2 == 1 and here:
            thing = rng.choice(here)
            holder[thing] = person
            lies.pop(thing, None)
            facts.append(f"{person} took the {thing} there .")
        else:
            at[person] = rng.choice(PLACES)
            facts.append(f"{person} went to the {at[person]} .")
    where = {thing: at[person] for thing, person in holder.items()} | lies
    return facts, [(f"where is the {thing}", place) for thing, place in where.items()]


def relations(rng, n):
    """Places lie around each other, in a chain. One of two neighbours is asked for."""
    places = rng.sample(PLACES, min(n + 1, len(PLACES)))
    links = [(a, rng.choice(SIDES), b) for a, b in pairwise(places)]
    rng.shuffle(links)
    facts = [f"{a} is {side} of {b} ." for a, side, b in links]
    questions = []  # one about each link: the other one would be answered by it
    for a, side, b in links:
        first, second = (f"what is {side} of {b}", a), (f"{a} is {side} of what", b)
        questions.append(first if rng.random() < 0.5 else second)
    return facts, questions


STORIES = {"facts": one_fact, "two-facts": two_facts, "relations": relations}
MOST_FACTS = 6  # of a story


def choose_questions(questions, n, rng):
    """n of the questions, with their answers; where there are fewer, blanks come before them."""
    chosen = rng.sample(questions, min(n, len(questions)))
    question, _ = chosen[0]
    blank = " ".join("_" for _ in question.split()), "_"
    return [blank] * (n - len(chosen)) + chosen


def facts(args, segments, batch, generator):
    """Sentences of a small world scattered in noise, six words each, and a question [bAbI].

        input    mary went to the office .   the old river meets trees .   where is mary
        target   .    .    .  .   .      .   .   .   .     .     .     .   .     .  office

    The tasks two-facts and relations are the same with other stories. Three questions about two
    people (blanks are no part of the scores):

        input    ...   _ _ _ _ . .   where is mary office . .   where is john
        target   ...   . . . _ . .   .     .  office .    . .   .     .  garden
    """
    rng = random.Random(torch.randint(2**62, (), generator=generator).item())
    n_sentences = (segments - 1) * args.segment_len // SENTENCE
    samples = []
    for _ in range(batch):
        sentences = [" ".join(map(rng.choice, NOISE_WORDS)) for _ in range(n_sentences)]
        n_facts = rng.randint(min(2, n_sentences), min(MOST_FACTS, n_sentences))
        told, questions = STORIES[args.task](rng, n_facts)
        asked = choose_questions(questions, n_questions(args, segments), rng)
        places = sorted(rng.sample(range(n_sentences), len(told)))
        for place, sentence in zip(places, told, strict=True):
            sentences[place] = sentence
        words = " ".join(sentences).split()
        for question, answer in asked:
            words += ["."] * (-len(words) % SENTENCE)  # a question is as long as a sentence
            words += [*question.split(), answer]
        samples.append([NUMBER[word] for word in words])
    return torch.tensor(samples), 1


CHARACTERS = "|?_0123456789+-*/^=,()xDnoe"  # BLANK fills up the fields of an equation


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
        fields = [given, f"x^2{p:+}*x{q:+}=0", f"D={D}", *steps]
        line = "".join(field.ljust(30, "_") for field in fields)
        samples.append([CHARACTERS.index(character) for character in line])
    return torch.tensor(samples), 150


TASKS = {
    "copy": copy, "reverse": reverse, "retrieval": retrieval, "remember": remember,
    "rewrite": rewrite, "memorize": memorize, "detect": detect, "facts": facts,
    "two-facts": facts, "relations": facts, "quadratic": quadratic,
}
ASKING = ["retrieval", "remember", *STORIES]  # tasks with --questions
MULTIPLE = {"copy": 3, "reverse": 2, "quadratic": 6}  # segments come in multiples of these


def answer_distance(args):
    """From a question's answer to that of the next one, in tokens: a sentence, or a segment."""
    return SENTENCE if args.task in STORIES else args.segment_len


def n_questions(args, segments):
    """How many questions are asked about a sample: at most one for each pair or sentence."""
    return min(args.questions, (segments - 1) * args.segment_len // answer_distance(args))


def longest_sample(args):
    """The segments of the longest training sample, those of its questions too."""
    more = (n_questions(args, args.segments) - 1) * answer_distance(args)
    return args.segments + math.ceil(more / args.segment_len)


def vocabulary(args):
    """The tokens of a task, as strings."""
    if args.task in STORIES:
        return WORDS
    if args.task == "quadratic":
        return list(CHARACTERS)
    words = [*"|?_", *"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:args.symbols]]
    if args.task in ("memorize", "detect"):
        words += [*"abcdefghijklmnop"]
    if args.task in ("remember", "rewrite"):
        words += [f"k{i}" for i in range(args.keys)]
    return words


def chance(args):
    """The share of answer symbols that the best constant guess gets right."""
    if args.task == "quadratic":
        return 0.1  # measured: the share of the most frequent symbols, 2 and =
    return 1 / (len(PLACES) if args.task in STORIES else args.symbols)


def check_sizes(args):
    """Raise ValueError with one line that says which size does not fit the task."""
    T = args.segment_len
    least = {"retrieval": 4, "facts": 6, "two-facts": 12, "relations": 6}.get(args.task, 2)
    multiple = MULTIPLE.get(args.task, 1)
    if args.questions > 1 and args.task not in ASKING:
        raise ValueError(f"--questions {args.questions} must be 1 for --task {args.task}; more are "
                         f"for {', '.join(ASKING)}")
    if T < least:
        raise ValueError(f"--segment-len {T} must be at least {least} for --task {args.task}")
    if args.task in STORIES and T % SENTENCE != 0:
        raise ValueError(f"--segment-len {T} must be a multiple of {SENTENCE}, the length of a "
                         "sentence")
    for n in [args.segments, *args.eval_segments]:
        if args.task == "quadratic" and (n, T) != (6, 30):
            raise ValueError(f"{n} segments of {T} must be 6 of 30 for --task quadratic")
        if n % multiple != 0:
            raise ValueError(f"{n} segments must be a multiple of {multiple} for --task "
                             f"{args.task}")
        if n > most_segments(args):
            raise ValueError(f"{n} segments must be at most {most_segments(args)} for --task "
                             f"{args.task}, with --keys and --symbols as they are")
    check_memory(args)


def check_memory(args):
    """Raise ValueError where even a low estimate of what a step needs is more than there is."""
    L, D = args.n_layer, args.d_model
    weights = 12 * L * D**2 + 2 * len(vocabulary(args)) * D
    rows = args.batch * longest_sample(args) * (args.segment_len + 2 * args.n_mem)
    needed = 4 * (4 * weights + 16 * L * D * rows)  # bytes: AdamW's four, what backward keeps
    if args.device == "cpu" and hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            raise ValueError(f"a step needs {needed / 2**30:.1f} GiB or more, and there are "
                             f"{memory / 2**30:.1f}: take a smaller --batch, --d-model or --n-mem")


def most_segments(args):
    """The longest sample that a task has. Where no key comes twice, there must be enough keys."""
    most = {"quadratic": 6, "retrieval": args.symbols + 1, "remember": args.keys + 1}
    return most.get(args.task, 10**6)  # which is hours of evaluation


# ==================================================================================================
# Flags

COPYING = {  # flags in which a task differs from the others; `config` are fields of Config
    "model": "rmt", "segment_len": 8, "n_mem": 8, "steps": 1100, "batch": 16, "lr": 4e-3,
    "weight_decay": 0.01, "curriculum": "grow",
    "config": {"write_slot": "both", "carry_dropout": 0.5},
}
FACTS = {
    "model": "rmt", "segment_len": 8, "n_mem": 4, "steps": 1000, "batch": 32, "lr": 3e-3,
    "weight_decay": 0.01, "curriculum": "random",
    "config": {"memory_noise": 1.0},  # with noise in training, a fact lasts
}
PAIRS = {
    "model": "armt", "segment_len": 2, "n_mem": 4, "steps": 1200, "batch": 64, "lr": 3e-3,
    "weight_decay": 1.0, "curriculum": "grow",  # with weight decay, values last
    "config": {},
}
RECIPES = {
    "copy": COPYING | {"segments": 9},
    "reverse": COPYING | {"segments": 6},
    "memorize": FACTS | {"segments": 8},
    "detect": FACTS | {"segments": 8, "steps": 2000, "config": {"memory_noise": 0.6}},
    "retrieval": PAIRS | {"segments": 5, "segment_len": 4, "questions": 4, "steps": 1000,
                          "curriculum": "random"},
    "remember": PAIRS | {"segments": 9, "questions": 8, "steps": 1000},
    "rewrite": PAIRS | {"segments": 13, "keys": 4, "n_mem": 2, "batch": 32, "steps": 600,
                        "lr": 2e-3, "curriculum": "random", "config": {"write_slot": "both"}},
    "facts": PAIRS | {"segments": 8, "segment_len": 6, "steps": 800},
    "two-facts": PAIRS | {"segments": 5, "segment_len": 12, "steps": 800},
    "relations": PAIRS | {"segments": 8, "segment_len": 6, "steps": 800},
    "quadratic": COPYING | {"segments": 6, "segment_len": 30, "batch": 32, "lr": 2e-3,
                            "steps": 4000, "d_model": 128, "curriculum": "fixed"},
}


WITH_RESUME = ["--resume", "--device", "--threads", "--steps", "--eval-segments", "--target"]


def parse(argv):
    """The settings of a run: the flags given, else the recipe of the task or the run resumed."""
    parser = argparse.ArgumentParser(usage="python train_copy.py [flags]", description=__doc__,
                                     formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = fail

    flag = parser.add_argument_group("task (the defaults of most flags depend on it)").add_argument
    flag("--task", choices=TASKS, default="copy", help="what to learn")
    flag("--symbols", type=number(int, 2, 36), default=10, help="different symbols")
    flag("--keys", type=number(int, 1, 10_000), default=64, help="keys of remember and rewrite")
    flag("--segments", type=number(int, 2), help="segments of the longest training sample")
    flag("--segment-len", type=number(int, 1), help="T, tokens per segment")
    flag("--curriculum", choices=["grow", "random", "fixed"], help="segments of a training sample")
    flag("--questions", type=number(int, 1, 1000), default=1,
         help=f"questions about each training sample of {', '.join(ASKING)}")

    flag = parser.add_argument_group("model").add_argument
    flag("--model", choices=VARIANTS, help="a row of VARIANTS in rmt.py")
    flag("--baseline", choices=[*VARIANTS, "none"], default="transformer", help="trained beside it")
    flag("--n-layer", type=number(int, 1), default=2, help="L, layers")
    flag("--d-model", type=number(int, 1), default=64, help="D, width")
    flag("--n-mem", type=number(int, 0), help="M, memory tokens")
    flag("--cache-len", type=number(int, 0), default=8, help="C, cached positions of an _xl model")
    flag("--config", type=config_field, nargs="+", metavar="NAME=VALUE",
         help="other fields of Config in rmt.py, such as n_head=2 update=hebbian")

    flag = parser.add_argument_group("training").add_argument
    flag("--steps", type=number(int, 1), help="optimizer steps")
    flag("--batch", type=number(int, 1), help="samples per step")
    flag("--lr", type=number(float, 0), help="learning rate, at its highest")
    flag("--weight-decay", type=number(float, 0), help="of AdamW")
    flag("--bptt-depth", type=number(int, 0), help="boundaries that gradient crosses; None: all")
    flag("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of weights and data")

    flag = parser.add_argument_group("run").add_argument
    flag("--device", type=device, default="auto", help="cpu, cuda, mps; auto: cuda, or else cpu")
    flag("--threads", type=number(int, 1, 1024), default=1, help="of the CPU; 1 is fastest here")
    flag("--eval-segments", type=number(int, 2), nargs="+", metavar="N",
         help="longer samples to try; None: twice and four times --segments")
    flag("--target", type=number(float, 0, 1), default=0.0,
         help="exit with status 1 unless the model gets this share right over trained lengths")
    flag("--out", metavar="FOLDER", help="where to write; None: the first free out/TASK-N")
    flag("--resume", metavar="FOLDER", help="go on with a run, to the same numbers")

    parser.set_defaults(**RECIPES["copy"])  # for --help
    args, _ = parser.parse_known_args(argv)
    names = [word.split("=")[0] for word in argv]
    for name in ("--config", "--eval-segments"):
        if names.count(name) > 1:
            fail(f"{name} is given twice: put all after the first one")
    recipe = RECIPES[args.task]
    if args.resume is not None:
        for name in names:
            if name.startswith("--") and name not in WITH_RESUME:
                fail(f"{name} cannot be given with --resume: the run in {args.resume} stays as it "
                     "began")
        recipe = load(Path(args.resume))["settings"]
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    args.config = recipe["config"] | dict(args.config)
    if args.eval_segments is None:
        args.eval_segments = sorted({min(n * args.segments, most_segments(args)) for n in (2, 4)})
    if args.resume is None:
        args.command = shlex.join(["python", "train_copy.py", *argv])
    return args


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and the docstring above line by line."""


def number(kind, least, most=10**9):
    """An argparse type: a number of this kind from least to most."""
    def parse_number(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} must be from {least} to {most}")
        return value
    parse_number.__name__ = kind.__name__  # argparse shows it: "invalid int value"
    return parse_number


def device(text):
    """An argparse type: a device that can be used here."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError) as reason:
        first_line = str(reason).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {first_line}") from reason
    return text


def config_field(text):
    """An argparse type: NAME=VALUE, for a field of Config that has no flag of its own."""
    name, _, value = text.partition("=")
    flags = {"variant", "vocab_size", "segment_len", "n_layer", "d_model", "n_mem", "cache_len"}
    names = [f.name for f in dataclasses.fields(Config) if f.name not in flags]
    if name not in names:
        choices = ", ".join(names)
        raise argparse.ArgumentTypeError(f"{text} must be NAME=VALUE, NAME one of {choices}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value  # a word


def fail(message):
    """End with one line and exit status 2."""
    print(f"train_copy.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


# ==================================================================================================
# Model and samples


def build(args, variant):
    """A model of one row of VARIANTS, at its initial weights."""
    torch.manual_seed(args.seed)
    config = Config(
        variant, len(vocabulary(args)), args.segment_len, n_layer=args.n_layer,
        d_model=args.d_model, n_mem=args.n_mem, cache_len=args.cache_len, **args.config)
    return RMT(config).to(args.device)


NO_TARGET = -100  # of an output between two answers: cross_entropy leaves it out


def answers_of(args, tokens, n, segments):
    """All from the first answer to the last one, of n tokens each; NO_TARGET between them."""
    distance = answer_distance(args)
    targets = tokens[:, -n - (n_questions(args, segments) - 1) * distance:].clone()
    places = torch.arange(targets.size(1))  # an answer takes the first n of every distance
    targets[:, places % distance >= n] = NO_TARGET
    return targets


def sample(args, model, segments, batch, generator):
    """Inputs (B, length), and targets (B, n), which belong to the last n outputs.

    Between two answers, the targets are NO_TARGET.
    """
    tokens, n = TASKS[args.task](args, segments, batch, generator)
    inputs = tokens[:, :-1].to(args.device)
    targets = answers_of(args, tokens, n, segments).to(args.device)
    if model.variant.mask == "full":
        # An encoder would see the answers among its inputs, so it fills in blanks.
        after_targets = inputs[:, inputs.size(1) - targets.size(1) + 1:]
        after_targets[targets[:, :-1] != NO_TARGET] = BLANK
    return inputs, targets


# ==================================================================================================
# Evaluation


N_EVAL = 128  # samples per evaluation, fewer where they are very long


@torch.no_grad()
def evaluate(args, model, segments, between=lambda state: state, free=True):
    """Shares of right answers on fresh samples, and the samples: inputs, targets, answers.

    However many questions there are in training, here it is one about each sample.

    between  a function that may tamper with the state at each boundary
    free     let the model also run free: each symbol is then read after the model's own, and not
             after the right one, as it is when the answer is teacher-forced
    """
    model.eval()
    args = Namespace(**vars(args) | {"questions": 1})
    T = args.segment_len
    n_samples = max(16, min(N_EVAL, 2**22 // (segments * T)))
    generator = torch.Generator().manual_seed(args.seed + 2**31)  # not the stream of training
    inputs, targets = sample(args, model, segments, n_samples, generator)
    n = targets.size(1)
    first = (inputs.size(1) - n) // T  # the segment in which the answer begins

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
    answer_logits = torch.cat(answer_logits, dim=1)[:, -n:]
    forced = answer_logits.argmax(-1)
    finite = answer_logits.isfinite().all()
    if not finite and segments <= args.segments:
        fail(f"the outputs of the model are nan or infinite: take an --lr below {args.lr}")
    if not finite:
        forced = torch.full_like(targets, -1)  # beyond its lengths it may overflow: no answer

    answers = forced
    if free and finite and model.variant.mask != "full":  # an encoder writes all at once
        prompt = inputs[:, first * T:inputs.size(1) - n + 1]
        answers = generate(model, prompt, n, before_answer, temperature=0)

    scored = targets != BLANK  # blanks, which fill up the fields of an equation, are only trained
    scores = {
        "teacher_forced": share(forced[scored] == targets[scored]),
        "free_running": share(answers[scored] == targets[scored]),
        "whole_answers": share(((answers == targets) | ~scored).all(dim=1)),
    }
    return scores, (inputs, targets, answers)


def share(right):
    """The share of True."""
    return right.double().mean().item()


# ==================================================================================================
# Training


@dataclass
class Run:
    """All that training changes: a model on its way."""
    model: RMT
    optimizer: torch.optim.Optimizer
    data: torch.Generator
    accuracy: dict      # for every length, in segments: the running mean in training
    unlocked: int       # how many of these lengths the curriculum uses
    step: int = 0
    loss: float = 0.0   # the running mean, nats per symbol
    seconds: float = 0.0
    rows: list = dataclasses.field(default_factory=list)  # of metrics.csv


def new_run(args, variant):
    """A run at step 0."""
    model = build(args, variant)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    data = torch.Generator().manual_seed(args.seed)
    accuracy = dict.fromkeys(training_lengths(args), 0.0)
    unlocked = 1 if args.curriculum == "grow" else len(accuracy)
    return Run(model, optimizer, data, accuracy, unlocked)


def training_lengths(args):
    """How many segments a training sample can have."""
    if args.curriculum == "fixed":
        return [args.segments]
    return [n for n in range(2, args.segments + 1) if n % MULTIPLE.get(args.task, 1) == 0]


def choose_length(args, run):
    """The segments of the next training samples, by the curriculum."""
    lengths = list(run.accuracy)[:run.unlocked]
    if args.curriculum == "grow" and len(lengths) > 1:
        # It goes on practising shorter lengths in 30 % of the steps, or they are forgotten.
        practise = torch.rand((), generator=run.data) < 0.3
        lengths = lengths[:-1] if practise else lengths[-1:]
    return lengths[torch.randint(len(lengths), (), generator=run.data)]


def train(args, run, name, save):
    """Train a run to args.steps. A request to stop ends it after a whole step, which is saved."""
    model = run.model.train()
    if run.step == 0:
        torch.manual_seed(args.seed)  # of noise and dropout, whatever was computed before
    steps = range(run.step, args.steps)
    with stop_requests() as stop:
        for step in tqdm(steps, name, initial=run.step, total=args.steps, disable=None):
            began = time.process_time()

            # Samples of a length that the curriculum chooses, always fresh.
            segments = choose_length(args, run)
            inputs, targets = sample(args, model, segments, args.batch, run.data)

            # The learning rate rises over 50 steps, and falls over the second half.
            rate = args.lr * min(1, (step + 1) / 50, 2 * (1 - step / args.steps))
            for group in run.optimizer.param_groups:
                group["lr"] = rate

            # The update. Only the answer counts.
            run.optimizer.zero_grad()
            logits, _ = unroll(model, inputs, bptt_depth=args.bptt_depth)
            logits = logits[:, -targets.size(1):]
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.optimizer.step()
            if not (math.isfinite(loss.item()) and math.isfinite(norm)):
                fail(f"the loss is {loss.item()}, and the norm of its gradient {norm}, at step "
                     f"{step + 1}: take an --lr below {args.lr}")

            # Running means, and longer samples when the longest ones go well.
            scored = (targets != BLANK) & (targets != NO_TARGET)
            right = share(logits.argmax(-1)[scored] == targets[scored])
            run.accuracy[segments] += 0.05 * (right - run.accuracy[segments])
            run.loss += (0.05 if step > 0 else 1.0) * (loss.item() - run.loss)
            longest = list(run.accuracy)[run.unlocked - 1]
            if run.accuracy[longest] > 0.75 and run.unlocked < len(run.accuracy):
                run.unlocked += 1
            run.step = step + 1
            run.seconds += time.process_time() - began

            if run.step % 20 == 0:
                run.rows.append([name, run.step, segments, run.loss, *run.accuracy.values()])
            if run.step % max(1, args.steps // 8) == 0:
                tqdm.write(f"{name:16} step {run.step:5}   {longest} segments   "
                           f"loss {run.loss:.3f}   right {run.accuracy[longest]:.3f}")
            stopping = len(stop) > 0  # read once: a signal can come at any moment
            if run.step % 200 == 0 or run.step == args.steps or stopping:
                save()
            if stopping:
                break
        if stop:
            raise KeyboardInterrupt


@contextmanager
def stop_requests():
    """A list that Ctrl-C and SIGTERM fill, so that a step is finished first. Twice stops it."""
    requests = []

    def on_signal(action):
        signal.signal(signal.SIGINT, action)
        signal.signal(signal.SIGTERM, action)

    def ask(number, _):
        requests.append(number)
        on_signal(signal.default_int_handler)  # which raises KeyboardInterrupt

    on_signal(ask)
    try:
        yield requests
    finally:
        on_signal(signal.default_int_handler)


# ==================================================================================================
# Files: whole or not there


def write(path, writer):
    """Let writer fill a temporary file, and move it into place. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as reason:  # on a full disk, torch.save raises the second
        raise OSError(f"{path} was not written, the old one stays: {reason}") from reason
    finally:
        temporary.unlink(missing_ok=True)


def save_runs(args, runs):
    """checkpoint.pt, with all that an exact resume needs, and metrics.csv."""
    states = {}
    for name, run in runs.items():
        states[name] = vars(run) | {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "data": run.data.get_state(),
        }
    random_state = [torch.get_rng_state()]
    if args.device.startswith("cuda"):
        random_state.append(torch.cuda.get_rng_state(args.device))
    checkpoint = {"settings": settings_of(args), "runs": states, "random_state": random_state}
    write(args.out / "checkpoint.pt", partial(torch.save, checkpoint))

    columns = ["model", "step", "segments", "loss"]
    columns += [f"accuracy_{n}" for n in training_lengths(args)]

    def write_rows(path):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for run in runs.values():
                writer.writerows(run.rows)
    write(args.out / "metrics.csv", write_rows)


def settings_of(args):
    """The flags as plain values."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "resume")}


def load(folder):
    """What save_runs put into a folder. One line where there is nothing of use."""
    path = folder / "checkpoint.pt"
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch does not look at checksums
        if damaged:
            fail(f"{path} is damaged: {damaged} no longer has the checksum it was written with")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("settings", "runs", "random_state")}
    except Exception as reason:  # whatever is wrong with a file, it is one line for the user
        fail(f"{path} is no run of train_copy.py to go on with: {reason!r}")


def load_runs(args, runs):
    """Bring new runs to where those of the checkpoint stand."""
    saved = load(args.out)
    for name, run in runs.items():
        state = saved["runs"][name]
        run.model.load_state_dict(state.pop("model"))
        run.optimizer.load_state_dict(state.pop("optimizer"))
        run.data.set_state(state.pop("data"))
        vars(run).update(state)
    torch.set_rng_state(saved["random_state"][0])
    if args.device.startswith("cuda") and len(saved["random_state"]) > 1:
        torch.cuda.set_rng_state(saved["random_state"][1], args.device)


def open_folder(args):
    """The folder of this run. Until this process ends, no other run gets into it."""
    if args.resume is not None:
        folder = Path(args.resume)
    elif args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = new_folder(args.task)
    lock(folder)
    for leftover in folder.glob("*.tmp"):  # of a run that was killed while it saved
        leftover.unlink()
    if args.resume is None and (folder / "checkpoint.pt").exists():
        fail(f"--out {folder} holds a run: --resume {folder} goes on with it; or name another")
    return folder


def new_folder(stem):
    """Make the first folder out/STEM-N that is not there yet."""
    for n in count(1):
        folder = Path("out") / f"{stem}-{n}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            pass


LOCKS = []  # open files: one that nobody refers to is closed


def lock(folder):
    """Hold a file of the folder until the process ends: the system lets it go, even if killed."""
    file = (folder / ".lock").open("w", encoding="utf-8")
    LOCKS.append(file)
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"{folder} is in use by another run: wait for its end, or name another folder")
    except OSError:
        pass  # some network drives know no locks


# ==================================================================================================
# Report


def report(args, runs):
    """Evaluate, print and draw. Returns the lowest accuracy of --model at a trained length."""
    lengths = training_lengths(args)
    trained = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    longer = [n for n in args.eval_segments if n not in trained]

    print(f"\nshare of answer symbols right, on fresh samples; chance is {chance(args):.3f}")
    print("model             segments  teacher-forced  free-running  whole answers")
    results = {}
    for name, run in runs.items():
        results[name] = {
            "cpu_seconds": round(run.seconds, 1), "state_floats": run.model.state_floats()}
        for n in trained + (longer if name == args.model else []):
            scores, samples = evaluate(args, run.model, n)
            results[name][n] = scores
            note = "   longer than in training" if n > args.segments else ""
            print(f"{name:18}{n:8}{scores['teacher_forced']:16.3f}{scores['free_running']:14.3f}"
                  f"{scores['whole_answers']:15.3f}{note}", flush=True)
            if n == args.segments and name == args.model:
                examples = samples

    model = runs[args.model].model
    results |= print_controls(args, model)
    print_examples(args, examples)
    pictures = draw(args, runs, examples)
    write_json(args.out / "result.json", {
        "command": args.command,
        "seed": args.seed,
        "date": time.strftime("%Y-%m-%d"),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "hardware": hardware(args),
        "flags": settings_of(args),
        "results": results,
    })

    print()
    for name, run in runs.items():
        scores = " / ".join(f"{results[name][n]['teacher_forced']:.3f}" for n in trained)
        segments = " / ".join(map(str, trained))
        print(f"{name}: {scores} of the answer symbols over {segments} segments, after "
              f"{run.seconds:.0f} CPU seconds of training")
    files = ", ".join([*pictures, "result.json", "metrics.csv"])
    print(f"pictures and numbers are in {args.out}: {files}")
    return min(results[args.model][n]["teacher_forced"] for n in trained)


def print_controls(args, model):
    """What is left when the state is taken away, or exchanged: if nothing, memory did the work."""
    controls = {
        "its initial state at every boundary": lambda state: model.initial_state(len(state.memory)),
        "the state of another sample": lambda state: tree_map(lambda t: t.roll(1, 0), state),
    }
    print(f"\ncontrols: {args.model} over {args.segments} segments, teacher-forced, with")
    results = {}
    for name, between in controls.items():
        scores, _ = evaluate(args, model, args.segments, between, free=False)
        results[name] = scores["teacher_forced"]
        print(f"    {name:38}{results[name]:.3f}")
    return results


def print_examples(args, samples):
    """The first three samples, with the mistakes marked."""
    print(f"\nthree answers of {args.model}, free-running; ^ is a mistake")
    inputs, targets, answers = samples
    for i in range(3):
        prompt = inputs[i, :inputs.size(1) - targets.size(1) + 1]
        print(f"    input   {text(args, prompt)}")
        print(f"    right   {text(args, targets[i])}")
        print(f"    model   {text(args, answers[i])}")
        print(f"            {carets(args, answers[i], answers[i] != targets[i])}")


def text(args, row):
    """Tokens (length,) as a line."""
    words = vocabulary(args)
    return separator(words).join(words[token] for token in row.tolist())


def carets(args, row, wrong):
    """What to put below the line of these tokens: carets where they are wrong."""
    words = vocabulary(args)
    marks = []
    for token, is_wrong in zip(row.tolist(), wrong.tolist(), strict=True):
        mark = "^" if is_wrong else " "
        marks.append(mark * len(words[token]))
    return separator(words).join(marks)


def separator(words):
    """What stands between two tokens of a line: nothing where all are single characters."""
    return "" if max(map(len, words)) == 1 else " "


def hardware(args):
    """What the run was computed on."""
    if args.device.startswith("cuda"):
        return torch.cuda.get_device_name(args.device)
    return f"{args.device} on {platform.machine()}, threads: {args.threads}"


def write_json(path, content):
    """A dict as a JSON file."""
    text = json.dumps(content, indent=1)
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def draw(args, runs, samples):
    """Write training.png and attention.png. Returns their names."""
    pictures = {"training.png": draw_training(args, runs)}
    model = runs[args.model].model
    if model.variant.block is not AssociativeBlock:  # which reads its memory without attention
        inputs, targets, _ = samples
        pictures["attention.png"] = draw_attention(args, model, inputs[:1], targets.size(1))
    for name, picture in pictures.items():
        write(args.out / name, partial(picture.savefig, format="png"))
        plt.close(picture)
    return list(pictures)


def draw_training(args, runs):
    """Loss, and accuracy for every length, over the steps of training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    styles = [("-", "#0072B2"), ("--", "#D55E00")]
    for (line, color), (name, run) in zip(styles, runs.items(), strict=False):
        steps = [row[1] for row in run.rows]
        losses = [row[3] for row in run.rows]
        left.plot(steps, losses, line, color=color, label=name)
    run = runs[args.model]
    for i, n in enumerate(run.accuracy):
        seen = [row for row in run.rows if row[4 + i] > 0]
        steps = [row[1] for row in seen]
        accuracies = [row[4 + i] for row in seen]
        color = plt.cm.viridis(0.85 * i / max(1, len(run.accuracy) - 1))
        right.plot(steps, accuracies, color=color, label=f"{n} segments")
    right.axhline(chance(args), color="black", linestyle=":", label="chance")
    left.set(xlabel="training step", ylabel="loss, nats per answer symbol", title="running mean")
    right.set(xlabel="training step", ylabel="share of answer symbols right", ylim=(0, 1.03),
              title=f"{args.model} learns {args.task}, running mean")
    left.legend()
    right.legend(fontsize=9)
    return figure


def draw_attention(args, model, tokens, n_answer):
    """Where the rows of two segments look: the first, and the one in which the answer begins."""
    T = args.segment_len
    answer = (tokens.size(1) - n_answer) // T
    n_layer = model.config.n_layer
    figure, axes = plt.subplots(
        2, n_layer, squeeze=False, figsize=(5 * n_layer, 10), layout="constrained")
    state = model.initial_state(1)
    for s, segment in enumerate(tokens.split(T, dim=1)[:answer + 1]):
        if s in (0, answer):
            weights, widths = attention_maps(model, segment, state)
            for layer in range(n_layer):
                axis = axes[0 if s == 0 else 1, layer]
                draw_map(axis, weights[layer, 0].amax(dim=0), widths)
                axis.set_title(f"segment {s + 1}, layer {layer + 1}")
        with torch.no_grad():
            _, state = model(segment, state)
    figure.suptitle("Who looks at whom: the largest weight of all heads, 0 white, 1 black")
    return figure


def draw_map(axis, weights, widths):
    """One matrix, with borders and names of its blocks; rows have no cache."""
    axis.imshow(weights.cpu().numpy(), cmap="Greys", vmin=0, vmax=1)
    read, _, tokens, write = widths
    blocks = [
        (widths, axis.axvline, axis.set_xticks),
        ((read, 0, tokens, write), axis.axhline, axis.set_yticks),
    ]
    for sizes, line, set_ticks in blocks:
        start = -0.5
        ticks = {}
        for name, size in zip(("read", "cache", "tokens", "write"), sizes, strict=True):
            if size > 0:
                ticks[name] = start + size / 2
                line(start, color="black", linewidth=0.8)
            start += size
        set_ticks(list(ticks.values()), list(ticks))
    axis.set(xlabel="seen", ylabel="looks")


# ==================================================================================================
# Main


def main(args):
    """Check all there is to check before anything is written; train; report."""
    plt.switch_backend("Agg")  # pictures go to files
    plt.rcParams["font.size"] = 12
    torch.set_num_threads(args.threads)
    names = [args.model]
    if args.baseline not in ("none", args.model):
        names.append(args.baseline)
    try:
        check_sizes(args)
        runs = {name: new_run(args, name) for name in names}
    except ValueError as reason:
        fail(reason)

    args.out = open_folder(args)
    if args.resume is not None:
        load_runs(args, runs)
    save_runs(args, runs)
    write_json(args.out / "config.json", settings_of(args))
    n_tokens = args.batch * longest_sample(args) * args.segment_len
    print(f"{args.task} over {args.segments} segments of {args.segment_len} tokens, at most "
          f"{n_tokens} a step: device {args.device}, seed {args.seed}, files in {args.out}")
    for name, run in runs.items():
        n_parameters = sum(p.numel() for p in run.model.parameters())
        print(f"{name}: {n_parameters} parameters, state of {run.model.state_floats()} floats")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    try:
        for name, run in runs.items():
            train(args, run, name, lambda: save_runs(args, runs))
        reached = report(args, runs)
    except KeyboardInterrupt:
        folder = shlex.quote(str(args.out))
        print(f"\nstopped; to go on: python train_copy.py --resume {folder}")
        sys.exit(130)
    if args.target > 0:
        verdict = "reached" if reached >= args.target else "MISSED"
        print(f"target {args.target}: {verdict}, {args.model} gets at least {reached:.3f} right")
        sys.exit(0 if reached >= args.target else 1)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as reason:
        fail(reason)
    except (MemoryError, RuntimeError) as reason:
        of_memory = re.search("allocate|out of memory", str(reason))
        if isinstance(reason, RuntimeError) and not of_memory:
            raise
        fail(f"this does not fit in memory, take a smaller --batch, --d-model or --n-mem: {reason}")
