"""Draw the figures and write the tables of the pages, from the recorded results.

    python assets/figures.py
        Draw assets/*.svg from assets/results/*.json, and write the tables into README.md and the
        pages in assets and assets/results. A page has two lines for each, and its table between:
        <!-- table NAME --> and <!-- end of table -->.
    python assets/figures.py --png [FOLDER]
        Draw every figure as a PNG for slides instead, into out/slides where no folder is named.
        Then run the notebooks of the course, in minutes, for theirs; captions.md has the captions.
    python assets/figures.py film
        Draw assets/film.svg: run notebook 4, half a minute, and take its first figure.
    python assets/figures.py gather NAME FILE... [--commit HASH]
        Put results of the scripts into one record, assets/results/NAME.json. The commit is noted in
        every run, for those that a script of an earlier commit has made.

A record is a list of runs: command, seed, date, versions, hardware, flags and results, as a script
writes them to result.json. A table is a filter of runs for each row, and what to show of them in
each column. (The pictures in assets that no function here draws never change.)

It reads from top to bottom: records, tables, pages, how figures look, figures, notebooks, main.
"""
import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rmt import Config  # noqa: E402

ASSETS = ROOT / "assets"
RESULTS = ASSETS / "results"
PAGES = [ROOT / "README.md", *sorted(ASSETS.glob("*.md")), *sorted(RESULTS.glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))

# ==================================================================================================
# Records

NO_SETTING = {  # flags that do not change a result
    "command", "device", "device_flag", "eval_every", "length", "lengths", "out", "prompt",
    "resume", "sample", "save_every", "target", "temperature", "threads", "top_k",
}
DEFAULTS = {field.name: field.default for field in fields(Config)}


def gather(name, paths, commit=None):
    """Write the record NAME.json from what the scripts wrote to some files."""
    runs = []
    for path in sorted(paths):
        run = read_result(path)
        if commit is not None:
            run["commit"] = commit
        runs.append(run)
    write_record(name, runs)


def read_result(path):
    """A result.json, its numbers to six digits, with the flags that change a result."""
    text = Path(path).read_text(encoding="utf-8")
    run = json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))
    flags = run["flags"].items()
    run["flags"] = {flag: value for flag, value in flags if flag not in NO_SETTING}
    return run


def write_record(name, runs):
    """Write the record NAME.json: a line for every run."""
    text = ",\n".join(json.dumps(run) for run in runs)
    write_text(RESULTS / f"{name}.json", f"[\n{text}\n]\n")


def write_text(path, text):
    """Write a file whole or not at all."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


@cache
def read_runs():
    """The runs of all records. The name of its record is among the flags of a run."""
    runs = []
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            record = measurements(record)
        for run in record:
            run["flags"]["record"] = path.stem
            runs.append(run)
    return runs


def measurements(record):
    """A run for every number in a record of benchmark.py."""
    for section in record["sections"].values():
        for line in section["rows"]:
            for quantity, number in line.items():
                yield {"flags": line | {"quantity": quantity}, "results": number}


def setting(run, name):
    """A flag of a run, or the default of Config where the run has no such flag."""
    value = run["flags"].get(name, DEFAULTS.get(name))
    if name == "bptt_depth" and value == -1:
        return None  # all boundaries, as earlier scripts wrote it
    return value


def find(runs, **flags):
    """The runs that were made with these flags. Of a set, any value will do."""
    for name, wanted in flags.items():
        allowed = wanted if isinstance(wanted, set) else [wanted]
        runs = [run for run in runs if setting(run, name) in allowed]
    return runs


def result(run):
    """The results of --model."""
    return run["results"][run["flags"]["model"]]


def numbers(runs, path):
    """A number of each run that has it, by its path through the results.

    "cpu_seconds", "9.free_running" over 9 segments, "9" teacher-forced, "reset" in bits per byte,
    "carried.by_position.1-8" over the first eight positions of a segment.
    """
    found = []
    for run in runs:
        value = run["results"] | result(run)
        for name in path.split("."):
            if isinstance(value, list):
                first, last = name.split("-")
                value = float(np.mean(value[int(first) - 1:int(last)]))
            else:
                value = value.get(name, {})
        if isinstance(value, dict):
            value = value.get("teacher_forced", value.get("bits_per_byte"))
        if value is not None:
            found.append(value)
    return found


def by_length(run):
    """The share of right answers of one run, {segments: share}."""
    return {int(n): scores["teacher_forced"] for n, scores in result(run).items() if n.isdigit()}


# ==================================================================================================
# Tables
#
# A table has filters of runs, {label: flags}, one for each row, and columns, {heading: what}. What
# is a path of numbers, or a function of the runs of a row that gives text, or either of them after
# more flags. Where a row has several labels, " | " divides them.


class Table(NamedTuple):
    """What lines_of needs. The flags of a row come before those of all rows."""
    heading: str
    rows: dict
    columns: dict
    flags: dict = {}
    digits: int = 3


def lines_of(table):
    """The lines of a table. A row for which there are no runs is left out."""
    heading = row(table.heading, *table.columns)
    lines = [heading, "|---" * (heading.count(" | ") + 1) + "|"]
    for label, flags in table.rows.items():
        runs = find(read_runs(), **table.flags | flags)
        if runs:
            cells = [cell(runs, what, table.digits) for what in table.columns.values()]
            lines.append(row(label, *cells))
    return lines


def row(*cells):
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def cell(runs, what, digits):
    """The text of a cell."""
    if isinstance(what, tuple):
        flags, what = what
        return cell(find(runs, **flags), what, digits)
    if callable(what):
        return what(runs)
    return spread(numbers(runs, what), 0 if what in ("cpu_seconds", "state_floats") else digits)


def spread(found, digits=3):
    """The smallest and the largest of the seeds, with a dash between; nothing where none is."""
    if not found:
        return ""
    least = f"{min(found):.{digits}f}"
    most = f"{max(found):.{digits}f}"
    return least if least == most else f"{least}–{most}"


def ratio(number, digits=2):
    """A ratio as papers print it: .52, 1.03."""
    return f"{number:.{digits}f}".removeprefix("0")


def ratios(runs):
    """Numbers of benchmark.py."""
    return " / ".join(ratio(run["results"]) for run in runs)


def count(runs):
    """How many seeds there are."""
    return str(len(runs))


def published(runs, digits=2):
    """What a paper has, where it has it."""
    share = PUBLISHED.get((setting(runs[0], "task"), setting(runs[0], "model")))
    return "" if share is None else ratio(share, digits)


def thirds(n, how="teacher_forced"):
    """A column: right answers over one, two or three thirds of the longest length of training."""
    return lambda runs: spread(numbers(runs, f"{setting(runs[0], 'segments') * n // 3}.{how}"))


def symbols(segments):
    """The symbols that a sample of copy has to copy."""
    return segments // 3 * 8


def held(accuracy, n):
    """How many of n are held, from the share of right answers: guesses taken off [ARMT]."""
    return max(0, n * (10 * accuracy - 1) / 9)


def symbols_held(runs):
    """Symbols copied, less guesses, at the length where they are most."""
    return [max(held(share, symbols(n)) for n, share in by_length(run).items()) for run in runs]


def worse(runs):
    """By how many bits a run is worse than the recipe."""
    recipe = find(read_runs(), **RECIPE | {"model": "rmt", "record": "language_tried"}, seed=0)
    return f"{numbers(runs, 'carried')[0] - numbers(recipe, 'carried')[0]:+.3f}"


PUBLISHED = {  # [RMT], at the longest; [RMT-1M], over 4,096 segments, read off a figure
    ("copy", "rmt"): 1.0, ("copy", "transformer_xl"): 0.28, ("copy", "transformer"): 0.1,
    ("retrieval", "rmt"): 0.965,
    ("reverse", "rmt"): 0.9, ("reverse", "transformer_xl"): 0.67, ("reverse", "transformer"): 0.1,
    ("memorize", "rmt"): 0.906, ("detect", "rmt"): 0.961,
}
COPYING = {  # by the task and its lengths in training
    f"{task} | `{model}`": {"task": task.split(",")[0], "model": model}
    for task in ("copy, 3 / 6 / 9", "reverse, 2 / 4 / 6")
    for model in ("rmt", "rmt_xl", "transformer_xl", "mem_transformer", "transformer")
}
CAPACITY = {  # memory tokens of a width, by the floats that they have
    f"{n} of {width}": {"n_mem": n, "d_model": width}
    for n, width in [(2, 64), (4, 64), (16, 32), (8, 64), (4, 128), (16, 64)]
}
ASSOCIATIVE = {
    "`armt`, delta": {"model": "armt", "update": "delta"},
    "`armt`, armt": {"model": "armt", "update": "armt"},
    "`armt`, hebbian": {"model": "armt", "update": "hebbian"},
    "`rmt`, as large": {"model": "rmt", "n_mem": {48, 192}},
    "`rmt`, M 8": {"model": "rmt", "n_mem": 8},
    "`transformer_xl`": {"model": "transformer_xl"},
}
RECIPE = {  # of train_lm.py
    "data": ["python"], "segment_len": 32, "n_mem": 8, "memory_form": "raw",
    "write_slot": "embedding", "memory_noise": 0.0, "steps": 1500, "batch": 32,
    "segments_per_step": 2, "reset_every": 64, "bptt_depth": None, "record": "language",
}
FIRST_EDITION = {"record": "language_tried"}
LANGUAGE = {  # what a model adds to RECIPE
    "`transformer`": {"model": "transformer"},
    "`transformer`, 1.5 times the steps": {"model": "transformer", "steps": 2250, **FIRST_EDITION},
    "`transformer_xl`, C 4": {"model": "transformer_xl", "cache_len": 4},
    "`transformer_xl`, C 32": {"model": "transformer_xl", "cache_len": 32},
    "`rmt`, M 8": {"model": "rmt"},
    "`rmt_xl`, M 8, C 8": {"model": "rmt_xl", "cache_len": 8},
    "`rmt_xl`, M 8, C 32": {"model": "rmt_xl", "cache_len": 32, **FIRST_EDITION},
}
BESIDE = ("`transformer`", "`transformer_xl`, C 4", "`rmt`, M 8", "`rmt_xl`, M 8, C 8")
DEPTH = RECIPE | FIRST_EDITION | {"model": "rmt", "segments_per_step": 4, "steps": 750}
TRIED = {
    "`memory_form=norm`": {"memory_form": "norm"},
    "`write_slot=both`": {"write_slot": "both"},
    "`write_slot=memory`": {"write_slot": "memory"},
    "`memory_form=norm write_slot=both`": {"memory_form": "norm", "write_slot": "both"},
    "`memory_form=norm write_slot=memory`, the paper's":
        {"memory_form": "norm", "write_slot": "memory"},
    "`n_mem=4`": {"n_mem": 4},
    "`n_mem=16`": {"n_mem": 16},
    "`reset_every=8`": {"reset_every": 8},
    "`reset_every=0`, never": {"reset_every": 0},
    "`memory_noise=0.3`": {"memory_noise": 0.3},
    "`segments_per_step=1 steps=3000`": {"segments_per_step": 1, "steps": 3000},
    "`segments_per_step=4 steps=750`": DEPTH | {"bptt_depth": 3},  # which is all of them
    "`model=mem_transformer`": {"model": "mem_transformer"},
}
FORMS = {  # of memory
    "as in the paper": {"memory_form": "norm", "write_slot": "memory"},
    "normed, an embedding added": {"memory_form": "norm", "write_slot": "both"},
    "raw, the embedding alone": {"memory_form": "raw", "write_slot": "embedding"},
}
FORM_SCORES = {  # what a form is judged by
    "copy, 9 segments": ({"task": "copy", "model": "rmt", "record": {"forms", "copying"}}, "9"),
    "memorize, 4,096 segments": ({"task": "memorize", "memory_noise": 1.0}, "4096"),
    "language, bits per byte": ({"data": ["python"]}, "carried"),
}
AGES = {
    "`transformer_xl`, C 4": {"model": "transformer_xl", "cache_len": 4},
    "`rmt`": {"model": "rmt", **FORMS["raw, the embedding alone"]},
    "`rmt`, memory as in the paper": {"model": "rmt", **FORMS["as in the paper"]},
}
FAMILY = {
    "`rmt`": {"model": "rmt"},
    "`mem_controller`": {"model": "mem_controller"},
    "`mem_bottleneck`, window 8": {"model": "mem_bottleneck", "window": 8},
    "`mem_bottleneck`, window 2": {"model": "mem_bottleneck", "window": 2},
    "`mem_bottleneck`, window 0": {"model": "mem_bottleneck", "window": 0},
}
SPEED = {
    "time of the authors' design (GPT-2 of `transformers`) over ours": {"quantity": "GPT-2 / ours"},
    "time of `recurrent-memory-transformer-pytorch` over ours": {"quantity": "package / ours"},
    "time of `transformer` (no memory) over that of `rmt`": {"quantity": "transformer / ours"},
}
DIAGONAL = {
    "4 layers of width 64, segment 16": {"size": "small"},
    "12 layers of width 64, segment 16": {"size": "deep"},
    "4 layers of width 64, segment 32": {"size": "tiny"},
    "size S: 4 layers of width 256, segment 128": {"size": "S"},
}
BITS = {"all": "carried", "first 8": "carried.by_position.1-8",
        "the rest": "carried.by_position.9-32", "reset": "reset", "another's": "of another stream"}
COST = {"CPU s": "cpu_seconds"}
SIZE = {"floats": "state_floats"}

TABLES = {
    "copying": Table("task, segments | `--model`", COPYING, {
        "shortest": thirds(1), "middle": thirds(2), "longest": thirds(3),
        "longest, free-running": thirds(3, "free_running"), **COST, "paper, longest": published,
    }, {"record": "copying"}),
    "curriculum": Table("lengths practised", {
        "the longest only": {"record": "curriculum", "practice": "longest"},
        "all alike": {"record": "curriculum", "practice": "alike"},
        "each in proportion to its mistakes": {"record": "copying"},
    }, {
        **{f"{n} segments": str(n) for n in (3, 6, 9)}, "18, not trained": "18", **COST,
    }, {"task": "copy", "model": "rmt"}),
    "first": Table("recipe", {
        "AdamW, 4 heads, 8 memory tokens, 1,100 steps of 16 samples": {"optimizer": "adamw"},
        "Muon, 2 heads, 16 memory tokens, 600 steps of 12 samples": {"optimizer": "muon"},
    }, {
        "seeds": count, **{f"{n} segments": str(n) for n in (3, 6, 9)},
        "9, free-running": "9.free_running", **COST,
    }, {"record": "first"}),
    "capacity": Table("memory tokens", CAPACITY, {
        **SIZE, "24 symbols": "9", "40": "15", "56": "21", "64": "24", "72, not trained": "27",
        "symbols held": lambda runs: spread(symbols_held(runs), 0), **COST,
    }, {"record": "capacity"}),
    "length": Table("task | noise in training", {
        f"{task} | {noise}": {"task": task, "memory_noise": noise}
        for task, noise in [("memorize", 1.0), ("memorize", 0.0), ("detect", 0.6), ("detect", 0.0)]
    }, {
        "seeds": count, **{f"{n:,} segments": str(n) for n in (8, 64, 1024, 4096)},
        "paper, 4,096": partial(published, digits=3),
    }, {"record": "length"}),
    "associative": Table("`--model`, `update`", ASSOCIATIVE, {
        **SIZE, **{heading: ({"task": task}, segments) for heading, task, segments in [
            ("rewrite, 12 writes", "rewrite", "13"), ("512 writes", "rewrite", "513"),
            ("1,000 writes", "rewrite", "1001"), ("detect, 8 segments", "detect", "8"),
            ("detect, 1,000", "detect", "1000"), ("facts, 8 segments", "facts", "8"),
            ("facts, 1,000", "facts", "1000")]}, **COST,
    }, {"record": "associative", "task": {"rewrite", "detect", "facts"}}),
    "remember": Table("`--model`, `update` | questions", {
        f"{model} | {questions}": {**flags, "record": record}
        for questions, record in ((8, "questions"), (1, "associative"))
        for model, flags in ASSOCIATIVE.items()
    }, {
        **SIZE, "8 pairs": "9", "16": "17", "32": "33", "64": "65", "pairs held of 64":
        lambda runs: spread([held(share, 64) for share in numbers(runs, "65")], 0), **COST,
    }, {"task": "remember"}),
    "retrieval": Table("`--model` | lengths | symbols at first", {
        "`armt` | random | 10": {"model": "armt"},
        "`rmt` | fixed | 4": {"model": "rmt"},
        "`rmt_xl` | fixed | 4": {"model": "rmt_xl"},
    }, {
        "seeds": count, **SIZE, "4 pairs": "5", "paper, 4 pairs": partial(published, digits=3),
        "9 pairs, not trained": "10", **COST,
    }, {"record": "retrieval"}),
    "facts": Table("tokens of a segment | `--optimizer`", {
        "6 | adamw": {"segment_len": 6, "record": "associative"} | ASSOCIATIVE["`armt`, delta"],
        "60 | muon": {"segment_len": 60, "record": "facts"},
    }, {
        "seeds": count, "8 segments": "8", "64 segments": "64", "1,000 segments": "1000", **COST,
    }, {"task": "facts"}),
    "far": Table("tokens of a segment | longest sample of training", {
        "6 | 48 tokens": {"segment_len": 6},
        "252 | 2,016 tokens": {"segment_len": 252},
    }, {
        "over its segments": "8",
        **{f"{n:,} tokens": f"far.{n}" for n in (10**4, 10**5, 10**6, 10**7)}, "seeds": count,
    }, {"record": "far"}),
    "language": Table("model", LANGUAGE, SIZE | BITS | COST, RECIPE),
    "language-others": Table("setting", {
        "default": {},
        "`--data shakespeare`": {"data": ["shakespeare"], **FIRST_EDITION},
        "`--segment-len 64 --batch 16`": {"segment_len": 64, "batch": 16, **FIRST_EDITION},
        "`--steps 6000`": {"steps": 6000},
    }, {name: (LANGUAGE[name], "carried") for name in BESIDE}, RECIPE),
    "language-first": Table("model, steps", {
        f"{name}, {steps:,}": LANGUAGE[name] | {"steps": steps}
        for steps in (1500, 6000) for name in BESIDE
    }, {
        heading: f"carried.by_position.{places}" for heading, places in [
            ("1st", "1-1"), ("2nd", "2-2"), ("3rd", "3-3"), ("4th", "4-4"), ("5 to 8", "5-8"),
            ("9 to 32", "9-32")]
    }, RECIPE, digits=2),
    "language-depth": Table("`bptt_depth`", {
        str(depth): {"bptt_depth": depth} for depth in range(4)
    }, {name: BITS[name] for name in ("all", "first 8", "the rest")}, DEPTH),
    "language-tried": Table("changed, seed 0", TRIED, {
        "bits per byte": "carried", "worse by": worse,
    }, RECIPE | FIRST_EDITION | {"model": "rmt", "seed": 0}),
    "forms": Table("memory", FORMS, FORM_SCORES, {"record": {"forms", "copying", "length"}}),
    "ages": Table("model", AGES, {
        "began now": "history.0", **{f"{n} ago": f"history.{n}" for n in (1, 2, 4, 32)},
        **{f"frozen {n} ago": f"frozen.{n}" for n in (1, 16, 1024)},
    }, {"record": "ages"}),
    "family": Table("`--model`", FAMILY, {
        "copy, 9 segments": "9", "free-running": "9.free_running",
        "copy, CPU s": ({"task": "copy"}, "cpu_seconds"), "language, all": "carried",
        **{name: BITS[name] for name in ("first 8", "the rest", "reset", "another's")},
        "language, CPU s": ({"data": ["python"]}, "cpu_seconds"),
    }, {"record": "family"}),
}
for suffix, record in {"": "speed", "-gpu": "speed-cuda"}.items():
    TABLES[f"speed{suffix}"] = Table("training / inference", SPEED, {
        size: ({"size": size}, ratios) for size in ("copy", "lm", "tiny", "S", "M")
    }, {"record": record})
    TABLES[f"diagonal{suffix}"] = Table("`armt` / `transformer_xl`", DIAGONAL, {
        f"batch {batch}, {work}": ({"batch": batch, "quantity": f"{work}, ratio"}, ratios)
        for batch in (1, 8) for work in ("inference", "training")
    }, {"record": record})


def tables():
    """All tables, {name: text}."""
    made = {name: "\n".join(lines_of(table)) for name, table in TABLES.items()}
    return {"readme": readme_table(), **made}


def readme_table():
    """The one table that a newcomer should see."""
    def score(path, **flags):
        return spread(numbers(find(read_runs(), **flags), path))

    copy = partial(score, "9", record="copying", task="copy")
    reverse = partial(score, "6", record="copying", task="reverse")
    fact = partial(score, record="length", task="memorize", memory_noise=1.0)
    writes = partial(score, record="associative", task="rewrite", **ASSOCIATIVE["`armt`, delta"])
    plain, cached, ours, _ = [score("carried", **RECIPE | LANGUAGE[name]) for name in BESIDE]
    reset = "its initial state at every boundary"  # a control of train_copy.py
    lines = [row("what is tested", "model", "result", "for comparison")]
    lines.append("|---" * 4 + "|")
    for cells in [
        ("copy 24 symbols, over 9 segments", "`rmt`", f"{copy(model='rmt')} right",
         f"`transformer`: {copy(model='transformer')}"),
        ("write 24 symbols backwards, over 6 segments", "`rmt`",
         f"{reverse(model='rmt')} right", f"`transformer`: {reverse(model='transformer')}"),
        ("a fact, queried in segment 4,096; trained on at most 8", "`rmt`",
         f"{fact('4096')} right", f"memory reset, over 8 segments: {fact(reset)}"),
        ("512 writes to four keys; trained on at most 12", "`armt`",
         f"{writes('513')} right", f"matrix reset, over 12 writes: {writes(reset)}"),
        ("Python's library, bits per byte; lower is better", "`rmt`", ours,
         f"`transformer`: {plain}; `transformer_xl` with as large a state: {cached}"),
    ]:
        lines.append(row(*cells))
    return "\n".join(lines)


# ==================================================================================================
# Pages


def fill(path, tables):
    """Write the tables of a page between their lines. Exits where it cannot."""
    text = path.read_text(encoding="utf-8")
    between = r"<!-- table (\S+) -->(.*?)<!-- end of table -->"
    names = [name for name, _ in re.findall(between, text, re.DOTALL)]
    if not len(names) == text.count("<!-- table ") == text.count("<!-- end of table -->"):
        sys.exit(f"{path}: each <!-- table NAME --> needs an <!-- end of table --> after it")
    for name in names:
        if name not in tables:
            sys.exit(f"{path}: there is no table {name}, only {', '.join(tables)}")

    def filled(found):
        name = found[1]
        return f"<!-- table {name} -->\n\n{tables[name]}\n\n<!-- end of table -->"

    write_text(path, re.sub(between, filled, text, flags=re.DOTALL))


# ==================================================================================================
# How figures look
#
# The colours are those of Okabe and Ito that have a contrast of 3 and more to white. A model has
# the same colour, marker and line in every figure, and grey is for what is no model.

BLACK = "#000000"
GREY = "#595959"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#AA5A87"  # darker than theirs, for the contrast
PALE = "#CBE6F7"    # a light sky blue, for areas

MODELS = {
    "transformer": (BLACK, "x", ":"),
    "transformer_xl": (GREEN, "D", "--"),
    "rmt": (BLUE, "o", "-"),
    "rmt, as large": (BLUE, "d", ":"),
    "rmt_xl": (PURPLE, "s", "-."),
    "armt": (VERMILION, "^", "-"),
    "armt, armt": (VERMILION, "v", "--"),
    "armt, hebbian": (VERMILION, "P", ":"),
}
DOTS = (0, (1, 2))

STYLE = {
    "font.size": 12, "axes.titlesize": 12, "axes.labelsize": 12, "legend.fontsize": 12,
    "figure.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 2, "lines.markersize": 7,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial", "sans-serif"],
    "svg.fonttype": "none", "svg.hashsalt": "rmt",
}
WIDTH = 8.65  # inches; the README shows 830 pixels, so that 12 points are 12 points there


def look(name):
    """Colour, marker and line of a model, as a table calls it: `rmt`, M 8."""
    name = name.replace("`", "")
    return MODELS[name] if name in MODELS else MODELS[name.split(",")[0]]


def save(figure, name, folder=ASSETS, kind="svg"):
    """Write folder/NAME.svg, the same bytes every time, or NAME.png for slides."""
    path = folder / f"{name}.{kind}"
    figure.savefig(path, dpi=200)
    plt.close(figure)
    if kind == "svg":
        shorten(path)


def shorten(path):
    """Halve an SVG of Matplotlib: no date, numbers to two digits, and each style written once."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    text = re.sub(r'^ +| transform="rotate\(-0 .*?"', "", text, flags=re.MULTILINE)
    styles = {}

    def name(style):
        return f'class="s{styles.setdefault(style[1], len(styles))}"'

    text = re.sub(r'style="(.*?)"', name, text)
    rules = "\n".join(f".s{number} {{{style}}}" for style, number in styles.items())
    write_text(path, text.replace("</style>", f"\n{rules}\n</style>", 1))


def plot_seeds(axis, style, seeds, label, every=1):
    """The mean of seeds, each {x: y}, as a line; around it a band from the least to the most."""
    if not seeds:
        return
    color, marker, line = style
    xs = [x for x in sorted(seeds[0]) if all(x in seed for seed in seeds)]
    ys = np.array([[seed[x] for x in xs] for seed in seeds])
    axis.fill_between(xs, ys.min(0), ys.max(0), color=color, alpha=0.18, linewidth=0)
    axis.plot(xs, ys.mean(0), line, color=color, marker=marker, markevery=every, label=label)


def plot_points(axis, style, points, label=None, aside=1.0):
    """Seeds as points {x: [y, ...]}, moved aside by a factor, and a line through their means."""
    color, marker, line = style
    points = {x: seeds for x, seeds in points.items() if seeds}
    hollow = {"color": color, "marker": marker, "markerfacecolor": "none", "markeredgewidth": 1.5}
    axis.plot([x * aside for x in points], list(map(np.mean, points.values())), line, color=color)
    for x, seeds in points.items():
        axis.plot([x * aside] * len(seeds), seeds, linestyle="none", **hollow)
    axis.plot([], [], line, label=label, **hollow)  # for the legend


def band(axis, color=GREY):
    """Name the bands of plot_seeds in the legend."""
    axis.fill_between([], [], [], color=color, alpha=0.3, linewidth=0, label="band: all seeds")


def count_axis(axis, ticks, base=2):
    """A logarithmic axis with these numbers on it."""
    axis.set_xscale("log", base=base)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xticks([], minor=True)


def trained(axis, first, last):
    """A bar on the axis, along what was seen in training."""
    axis.plot([first, last], [0.012, 0.012], color=GREY, linewidth=6, solid_capstyle="butt",
              transform=axis.get_xaxis_transform(), label="lengths in training")


def chance(axis, share):
    """What guessing gets right."""
    axis.axhline(share, color=GREY, linestyle=DOTS, linewidth=1.5, label="guessing")


def legend_below(figure, axis, columns):
    """One legend for all panels, under them."""
    lines, labels = axis.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=columns)


def thinned(points, longest):
    """Points {segments: y}, without some of the many up to the longest length of training."""
    kept = (2, 2 + (longest - 1) // 2, longest)  # the shortest, a middle one and the longest
    return {n: y for n, y in points.items() if n in kept or n > longest}


# ==================================================================================================
# Figures


def draw_staircase():
    """A fact D segments back is learned where bptt_depth reaches it."""
    fixed = partial(find, read_runs(), record="staircase", curriculum="fixed")
    mixed = partial(find, read_runs(), record="staircase", curriculum="random")
    panels = [  # title, segments of the sample, runs
        ("1 segment back", 2, fixed(segments=2)),
        ("2 segments back", 3, fixed(segments=3)),
        ("3 segments back", 4, fixed(segments=4)),
        ("1 to 3, mixed", 4, mixed(segments=4)),
    ]
    depths = range(4)
    figure, axes = plt.subplots(1, 4, figsize=(WIDTH, 4), sharey=True, layout="constrained")
    for axis, (title, n, runs) in zip(axes, panels, strict=True):
        axis.axvspan(n - 1.5, 3.5, color=PALE, label="gradient reaches the farthest fact", zorder=0)
        chance(axis, 0.1)
        points = {depth: numbers(find(runs, bptt_depth=depth), str(n)) for depth in depths}
        plot_points(axis, look("rmt"), points, "rmt: seeds and mean")
        for depth in depths:
            if not points[depth]:
                axis.text(depth, 0.5, "not run", rotation=90, ha="center", va="center")
        axis.set(title=title, xlabel="bptt_depth", xticks=depths, xlim=(-0.5, 3.5), ylim=(0, 1.05))
    axes[0].set_ylabel("fact symbols right")
    figure.suptitle("A fact is learned where gradient, crossing bptt_depth boundaries, reaches it",
                    fontweight="bold")
    legend_below(figure, axes[0], 3)
    return figure


def draw_length():
    """Accuracy of memorize and detect over the segments, with and without noise on the memory."""
    where = {"memorize": "fact in the first segment", "detect": "fact in any segment"}
    lengths = [2, 8, 16, 64, 256, 1024, 4096]
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.6), sharey=True, layout="constrained")
    for axis, task in zip(axes, where, strict=True):
        runs = find(read_runs(), record="length", task=task)
        plain = find(runs, memory_noise=0.0)
        noisy = find(runs, memory_noise={0.6, 1.0})
        plot_points(axis, (BLACK, "s", "--"), {n: numbers(plain, str(n)) for n in lengths},
                    "no noise: seeds and mean", aside=0.93)
        plot_points(axis, look("rmt"), {n: numbers(noisy, str(n)) for n in lengths},
                    "noise on memory: seeds and mean", aside=1.07)
        axis.plot(4096, PUBLISHED[task, "rmt"], "*", color=GREY, markersize=14,
                  linestyle="none", label="published [RMT-1M]", clip_on=False, zorder=4)
        trained(axis, 2, 8)
        chance(axis, 0.1)
        count_axis(axis, lengths)
        axis.set(title=f"{task}: {where[task]}", xlabel="segments of the sample (log scale)",
                 ylim=(0, 1.05))
    axes[0].set_ylabel("fact symbols right")
    figure.suptitle("Does a fact last, with and without noise on the memory in training?",
                    fontweight="bold")
    legend_below(figure, axes[0], 3)
    return figure


def draw_capacity():
    """What is copied over the symbols to copy, and symbols held over the floats of the memory."""
    markers = {2: ("o", "-"), 4: ("s", "--"), 8: ("^", "-."), 16: ("D", ":")}  # by tokens
    colors = {64: BLUE, 32: GREEN, 128: VERMILION}  # by their width
    aside = {64: 1, 32: 0.9, 128: 1.1}
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 5), layout="constrained")
    for flags in CAPACITY.values():
        runs = find(read_runs(), record="capacity", **flags)
        tokens, width = flags.values()
        marker, line = markers[tokens]
        style = (colors[width], marker, line)
        if width == 64:
            seeds = [{symbols(n): share for n, share in by_length(run).items()} for run in runs]
            plot_seeds(left, style, seeds, f"{tokens} tokens")
        plot_points(right, style, {tokens * width: symbols_held(runs)}, aside=aside[width])
    for width, color in colors.items():
        left.plot([], [], color=color, linewidth=6, label=f"tokens of width {width}")
    band(left, BLUE)
    trained(left, symbols(3), symbols(24))
    chance(left, 0.1)
    left.set(xlabel="symbols to copy", ylabel="answer symbols right", ylim=(0, 1.05),
             xticks=range(8, 73, 8), title="More memory tokens copy more (width 64)")
    right.axhline(symbols(24), color=GREY, linewidth=1.5)
    right.annotate("64, the most in training", (128, symbols(24)), (0, 5),
                   textcoords="offset points")
    right.set(xlabel="floats of memory (log scale)", ylabel="symbols held",
              ylim=(0, 72), title="More floats hold more symbols")
    count_axis(right, [128, 256, 512, 1024])
    legend_below(figure, left, 3)
    return figure


def draw_language():
    """Bits per byte by position in the segment, and over bptt_depth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.8), layout="constrained",
                                         width_ratios=(3, 2))
    marked = [0, 1, 2, 3, 5, 7, 11, 15, 23, 31]  # of 32 positions
    for name in BESIDE:
        runs = find(read_runs(), **RECIPE | LANGUAGE[name])
        scores = [result(run)["carried"]["by_position"] for run in runs]
        seeds = [dict(enumerate(score, start=1)) for score in scores]
        plot_seeds(left, look(name), seeds, name.replace("`", ""), marked)
    band(left)
    count_axis(left, [1, 2, 4, 8, 16, 32])
    left.set(ylabel="bits per byte (lower is better)", title="Memory helps where a segment begins",
             xlabel="position in the segment, bytes (log scale)")
    points = {}
    for depth in range(4):
        points[depth] = numbers(find(read_runs(), **DEPTH | {"bptt_depth": depth}), "carried")
    plot_points(right, look("rmt"), points)
    left.plot([], [], "o", color=BLUE, markerfacecolor="none", label="a seed of rmt")
    right.set(xlabel="bptt_depth, boundaries", ylabel="bits per byte", xticks=range(4),
              xlim=(-0.4, 3.4), title="rmt: longer gradient, fewer bits")
    legend_below(figure, left, 3)
    return figure


def draw_forms():
    """No form of memory is best on all of three tasks."""
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.6), sharey=True, layout="constrained")
    for axis, (title, (flags, path)) in zip(axes, FORM_SCORES.items(), strict=True):
        for y, form in enumerate(FORMS.values()):
            runs = find(read_runs(), record={"forms", "copying", "length"}, **form)
            seeds = numbers(find(runs, **flags), path)
            axis.plot(seeds, [y] * len(seeds), "o", color=BLUE, markerfacecolor="none",
                      markeredgewidth=1.5, clip_on=False, label="" if y else "a seed")
            axis.axhline(y, color=GREY, linewidth=0.5, zorder=0)
        axis.set(title=title.replace(", ", "\n"), ylim=(2.5, -0.5))
        if path == "carried":
            axis.set_xlabel("axis reversed: fewer bits\nbetter →")
            axis.invert_xaxis()
        else:
            axis.set(xlim=(0, 1.05), xlabel="symbols right\nbetter →")
            axis.axvline(0.1, color=GREY, linestyle=DOTS, linewidth=1.5, label="guessing")
    axes[0].set_yticks(range(3), [name.replace(", ", ",\n") for name in FORMS])
    figure.suptitle("No form of memory is best at everything", fontweight="bold")
    legend_below(figure, axes[0], 2)
    return figure


def draw_associative():
    """Right answers over the length of a sample: above rules that update, below other models."""
    groups = {
        "The rules that update the matrix of armt: delta lasts longest":
            ("`armt`, delta", "`armt`, armt", "`armt`, hebbian"),
        "armt beside other models: the most, except on detect":
            ("`armt`, delta", "`rmt`, M 8", "`rmt`, as large", "`transformer_xl`"),
    }
    panels = {  # what is counted, the longest length of training, guessing, record
        "rewrite": ("segments", 13, 0.1, "associative"),
        "detect": ("segments", 8, 0.1, "associative"),
        "facts": ("segments", 8, 1 / 6, "associative"),
        "remember": ("pairs", 9, 0.1, "questions"),
    }
    figure = plt.figure(figsize=(WIDTH, 7.6), layout="constrained")
    for part, (title, names) in zip(figure.subfigures(2, 1), groups.items(), strict=True):
        part.suptitle(title, fontweight="bold")
        axes = part.subplots(1, len(panels), sharey=True)
        for axis, (task, (unit, longest, share, record)) in zip(axes, panels.items(), strict=True):
            less = 1 if unit == "pairs" else 0  # a segment for each pair, and one more
            for name in names:
                runs = find(read_runs(), record=record, task=task, **ASSOCIATIVE[name])
                seeds = [thinned(by_length(run), longest).items() for run in runs]
                seeds = [{n - less: right for n, right in seed} for seed in seeds]
                plot_seeds(axis, look(name), seeds, name.replace("`", ""))
            band(axis)
            trained(axis, 2 - less, longest - less)
            chance(axis, share)
            axis.set(ylim=(0, 1.05), yticks=[0, 0.5, 1], title=task, xlabel=f"{unit} (log)")
            count_axis(axis, [1, 4, 16, 64] if less else [10, 100, 1000], base=2 if less else 10)
        axes[0].set_ylabel("right answers")
        legend_below(part, axes[0], 4)
    return figure


FIGURES = {
    "staircase": draw_staircase,
    "length": draw_length,
    "capacity": draw_capacity,
    "language": draw_language,
    "forms": draw_forms,
    "associative": draw_associative,
}


# ==================================================================================================
# Figures of the notebooks


@contextmanager
def figures_of(path):
    """Run a notebook, and give the folder in which it has kept its figures: 1.svg, 1.png, 1.txt."""
    from nbclient import NotebookClient  # not among what rmt needs to run
    from nbformat import read

    here = {"metadata": {"path": str(path.parent)}}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RMT_FIGURES"] = folder
        try:
            NotebookClient(read(path, 4), timeout=900, resources=here).execute()
        finally:
            del os.environ["RMT_FIGURES"]
        yield Path(folder)


def draw_notebooks(paths, folder):
    """PNGs of all figures of some notebooks, and captions.md, which shows and explains them."""
    lines = ["# Figures of the course", ""]
    for path in paths:
        print(f"running {path.name}", flush=True)
        with figures_of(path) as kept:
            for number in range(1, len(list(kept.glob("*.txt"))) + 1):
                name = f"{path.stem}-{number}.png"
                shutil.copy(kept / f"{number}.png", folder / name)
                caption = (kept / f"{number}.txt").read_text(encoding="utf-8")
                lines += [f"## {name}", "", f"![{caption}]({name})", "", caption, ""]
    write_text(folder / "captions.md", "\n".join(lines))


def draw_film():
    """film.svg: the first figure of notebook 4."""
    with figures_of(ROOT / "notebooks" / "4_looking_inside.ipynb") as kept:
        shutil.copy(kept / "1.svg", ASSETS / "film.svg")
    shorten(ASSETS / "film.svg")


# ==================================================================================================
# Main


def parse(argv):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, nargs="?", const=ROOT / "out" / "slides",
                        metavar="FOLDER", help="draw every figure as a PNG for slides, those of "
                        "the notebooks too; default: out/slides")
    commands = parser.add_subparsers(dest="work")
    commands.add_parser("film", help="draw film.svg, as notebook 4 does")
    gathering = commands.add_parser("gather", help="put results into one record")
    gathering.add_argument("name")
    gathering.add_argument("files", type=Path, nargs="+")
    gathering.add_argument("--commit", metavar="HASH", help="of the script that made these runs")
    return parser.parse_args(argv)


def main(args):
    """Gather, or draw and fill in."""
    if args.work == "gather":
        gather(args.name, args.files, args.commit)
        return
    if args.work == "film":
        draw_film()
        return
    plt.switch_backend("Agg")
    plt.rcParams.update(STYLE)
    folder = args.png or ASSETS
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        save(draw(), name, folder, "png" if args.png else "svg")
    if args.png:
        draw_notebooks(NOTEBOOKS, folder)
        return
    made = tables()
    for path in PAGES:
        fill(path, made)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
