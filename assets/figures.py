"""Draw the figures and write the tables of the READMEs, from the recorded results.

    python assets/figures.py
        Draw assets/*.svg from assets/results/*.json, and write the tables into README.md and
        assets/results/README.md, each between two lines of its own there:
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
writes them to result.json. A figure or table whose record is missing is left as it is.

It reads from top to bottom: records, tables, how figures look, figures, main.
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
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rmt import RMT, VARIANTS, Config  # noqa: E402

ASSETS = ROOT / "assets"
RESULTS = ASSETS / "results"
READMES = [ROOT / "README.md", RESULTS / "README.md"]

# ==================================================================================================
# Records

NO_SETTING = {  # flags that do not change a result
    "command", "device", "device_flag", "eval_every", "length", "lengths", "out", "prompt",
    "resume", "sample", "save_every", "target", "temperature", "threads", "top_k",
}
DEFAULTS = {field.name: field.default for field in fields(Config)}


def gather(name, paths, commit=None, folder=RESULTS):
    """Write folder/NAME.json from what the scripts wrote to some files."""
    runs = []
    for path in sorted(paths):
        run = read_result(path)
        if commit is not None:
            run["commit"] = commit
        runs.append(run)
    write_record(name, runs, folder)


def read_result(path):
    """A result.json, its numbers to six digits, with the flags that change a result."""
    run = json.loads(Path(path).read_text(encoding="utf-8"), parse_float=six_digits)
    flags = run["flags"].items()
    run["flags"] = {flag: value for flag, value in flags if flag not in NO_SETTING}
    return run


def write_record(name, runs, folder=RESULTS):
    """Write folder/NAME.json: a line for every run."""
    text = ",\n".join(json.dumps(run) for run in runs)
    write_text(folder / f"{name}.json", f"[\n{text}\n]\n")


def write_text(path, text):
    """Write a file whole or not at all."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def six_digits(text):
    """The number that a text says, to six digits."""
    return float(f"{float(text):.6g}")


def read_records(folder=RESULTS):
    """All records, {name: runs}."""
    records = {}
    for path in sorted(folder.glob("*.json")):
        records[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return records


def setting(run, name):
    """A flag of a run, or the default of Config where the run has no such flag."""
    value = run["flags"].get(name, DEFAULTS.get(name))
    if name == "bptt_depth" and value == -1:
        return None  # all boundaries, as earlier scripts wrote it
    return value


def find(runs, **flags):
    """The runs that were made with these flags."""
    found = []
    for run in runs:
        if all(setting(run, name) == value for name, value in flags.items()):
            found.append(run)
    return found


def result(run):
    """What a run says about its --model."""
    return run["results"][run["flags"]["model"]]


def by_length(run, how="teacher_forced"):
    """The share of right answers, {segments: share}."""
    return {int(n): scores[how] for n, scores in result(run).items() if n.isdigit()}


def at_length(runs, segments, how="teacher_forced"):
    """The share of right answers of each seed over so many segments."""
    return [by_length(run, how)[segments] for run in runs if segments in by_length(run, how)]


RESET = "its initial state at every boundary"  # a control of train_copy.py


# ==================================================================================================
# Tables
#
# A function for each table, which takes the records and yields lines. At the end of this part,
# TABLES has them by their names.


def spread(numbers, digits=3):
    """The smallest and the largest of the seeds, with a dash between; nothing where none is."""
    if not numbers:
        return ""
    least = f"{min(numbers):.{digits}f}"
    most = f"{max(numbers):.{digits}f}"
    return least if least == most else f"{least}–{most}"


def row(*cells):
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells):
    """The two lines that begin a table."""
    yield row(*cells)
    yield "|---" * len(cells) + "|"


def all_of(runs, key):
    """A number of each seed, such as its CPU seconds, where it has one."""
    return [result(run)[key] for run in runs if key in result(run)]


COPYING = {"copy": (3, 6, 9), "reverse": (2, 4, 6)}  # trained lengths, in segments
COPYING_MODELS = ("rmt", "rmt_xl", "transformer_xl", "mem_transformer", "transformer")
PUBLISHED = {  # at the longest, with 4 layers of width 128 [RMT]
    ("copy", "rmt"): "1.00",
    ("copy", "transformer_xl"): ".28",
    ("copy", "transformer"): ".10",
    ("reverse", "rmt"): ".90",
    ("reverse", "transformer_xl"): ".67",
    ("reverse", "transformer"): ".10",
}


def copying_table(records):
    """Copying across segments: every model, teacher-forced over three lengths and free-running."""
    yield from header("task, segments", "`--model`", "shortest", "middle", "longest",
                      "longest, free-running", "CPU s", "paper, longest")
    for task, lengths in COPYING.items():
        for model in COPYING_MODELS:
            runs = find(records["copying"], task=task, model=model)
            forced = [spread(at_length(runs, n)) for n in lengths]
            free = spread(at_length(runs, lengths[-1], "free_running"))
            yield row(f"{task}, {' / '.join(map(str, lengths))}", f"`{model}`", *forced, free,
                      spread(all_of(runs, "cpu_seconds"), 0), PUBLISHED.get((task, model), ""))


CURRICULA = {  # two records of `python train_copy.py`
    "curriculum": "longest length only",
    "copying": "30 % on shorter lengths",
}


CAPACITY = {  # memory tokens of a width, by the floats that they have
    "2 of 64": {"n_mem": 2, "d_model": 64},
    "4 of 64": {"n_mem": 4, "d_model": 64},
    "16 of 32": {"n_mem": 16, "d_model": 32},
    "8 of 64": {"n_mem": 8, "d_model": 64},
    "4 of 128": {"n_mem": 4, "d_model": 128},
    "16 of 64": {"n_mem": 16, "d_model": 64},
}


def symbols(segments):
    """The symbols that a sample of copy has to copy."""
    return segments // 3 * 8


def symbols_held(run):
    """At the length where they are most: symbols copied, but for guesses."""
    return max(pairs_held(right, symbols(n)) for n, right in by_length(run).items())


def capacity_table(records):
    """How much is copied with how large a memory."""
    yield from header("memory tokens", "floats", "24 symbols", "40", "56", "64",
                      "72, not trained", "symbols held", "CPU s")
    for name, flags in CAPACITY.items():
        runs = find(records["capacity"], **flags)
        yield row(name, spread(all_of(runs, "state_floats"), 0),
                  *(spread(at_length(runs, n)) for n in (9, 15, 21, 24, 27)),
                  spread([symbols_held(run) for run in runs], 0),
                  spread(all_of(runs, "cpu_seconds"), 0))


def curriculum_table(records):
    """The default run of rmt, with the curriculum as it was before and as it is."""
    lengths = (3, 6, 9, 18, 36)
    yield from header("steps once a length is unlocked", *(f"{n} segments" for n in lengths))
    for name, curriculum in CURRICULA.items():
        runs = find(records[name], task="copy", model="rmt")
        yield row(curriculum, *(spread(at_length(runs, n)) for n in lengths))


LENGTH = {  # noise in training; the share over 4,096 segments read off a figure of [RMT-1M]
    "memorize": (1.0, 0.906),
    "detect": (0.6, 0.961),
}


def length_table(records):
    """A fact, long after the lengths of training, with and without noise on the memory."""
    lengths = (8, 64, 1024, 4096)
    yield from header("task", "noise in training", "seeds", *(f"{n:,} segments" for n in lengths),
                      "paper, 4,096")
    for task, (most, published) in LENGTH.items():
        for noise in (most, 0.0):
            runs = find(records["length"], task=task, memory_noise=noise)
            scores = [spread(at_length(runs, n)) for n in lengths]
            yield row(task, noise, len(runs), *scores, ratio(published, 3))


ASSOCIATIVE = {  # what the associative tables call a model, and its flags
    "`armt`, delta": {"model": "armt", "update": "delta"},
    "`armt`, armt": {"model": "armt", "update": "armt"},
    "`armt`, hebbian": {"model": "armt", "update": "hebbian"},
    "`rmt`, as large": {"model": "rmt"},
    "`rmt`, M 8": {"model": "rmt", "n_mem": 8},
    "`transformer_xl`": {"model": "transformer_xl"},
}
ASSOCIATIVE_LENGTHS = {  # segments of a sample: as in training, and longer
    "rewrite": (13, 513, 1001),
    "detect": (8, 1000),
    "facts": (8, 1000),
    "remember": (9, 17, 33, 65),
}


def associative(records, task, name, record="associative"):
    """The runs of one task and one model of ASSOCIATIVE."""
    runs = find(records[record], task=task, **ASSOCIATIVE[name])
    if name == "`rmt`, as large":
        return [run for run in runs if setting(run, "n_mem") > 8]
    return runs


def pairs_held(accuracy, pairs, values=10):
    """Pairs held, from the share of right answers: guesses taken off [ARMT]."""
    return max(0, pairs * (values * accuracy - 1) / (values - 1))


def associative_table(records):
    """The associative memory beside others: tasks in which one thing is asked for."""
    yield from header("`--model`, `update`", "floats", "rewrite, 12 writes", "512", "1,000",
                      "detect, 8 segments", "1,000", "facts, 8 segments", "1,000", "CPU s")
    for name in ASSOCIATIVE:
        cells = []
        everything = []
        for task in ("rewrite", "detect", "facts"):
            runs = associative(records, task, name)
            cells += [spread(at_length(runs, n)) for n in ASSOCIATIVE_LENGTHS[task]]
            everything += runs
        floats = spread(all_of(everything, "state_floats"), 0)
        seconds = spread(all_of(everything, "cpu_seconds"), 0)
        yield row(name, floats, *cells, seconds)


def remember_table(records):
    """How many pairs of a key and a value are held, by the questions about a training sample."""
    yield from header("`--model`, `update`", "questions", "floats", "8 pairs", "16", "32", "64",
                      "pairs held of 64", "CPU s")
    for questions, record in (8, "questions"), (1, "associative"):
        for name in ASSOCIATIVE:
            runs = associative(records, "remember", name, record)
            if not runs:
                continue
            cells = [spread(at_length(runs, n)) for n in ASSOCIATIVE_LENGTHS["remember"]]
            held = [pairs_held(accuracy, 64) for accuracy in at_length(runs, 65)]
            yield row(name, questions, spread(all_of(runs, "state_floats"), 0), *cells,
                      spread(held, 0), spread(all_of(runs, "cpu_seconds"), 0))


FAR = (10**4, 10**5, 10**6, 10**7)  # tokens


def far_table(records):
    """Facts found in far more tokens than any sample of training had."""
    yield from header("tokens of a segment", "longest sample of training", "over its segments",
                      *(f"{n:,} tokens" for n in FAR), "seeds")
    for T in (6, 252):
        runs = find(records["far"], task="facts", segment_len=T)
        segments = setting(runs[0], "segments")
        cells = []
        for n in FAR:
            found = [result(run)["far"] for run in runs]
            cells.append(spread([far[str(n)] for far in found if str(n) in far]))
        yield row(T, f"{segments * T:,} tokens", spread(at_length(runs, segments)), *cells,
                  len(runs))


RECIPE = {  # of train_lm.py
    "data": ["python"], "model": "rmt", "segment_len": 32, "cache_len": 32, "n_mem": 8,
    "memory_form": "raw", "write_slot": "embedding", "memory_noise": 0.0, "steps": 1500,
    "batch": 32, "segments_per_step": 2, "reset_every": 64, "bptt_depth": None,
}
LANGUAGE = {  # what the language tables call a model, and the flags in which it differs from RECIPE
    "`transformer`": {"model": "transformer"},
    "`transformer`, 1.5 times the steps": {"model": "transformer", "steps": 2250},
    "`transformer_xl`, C 4": {"model": "transformer_xl", "cache_len": 4},
    "`transformer_xl`, C 32": {"model": "transformer_xl"},
    "`rmt`, M 8": {},
    "`rmt_xl`, M 8, C 8": {"model": "rmt_xl", "cache_len": 8},
    "`rmt_xl`, M 8, C 32": {"model": "rmt_xl"},
}
BESIDE = ("`transformer`", "`transformer_xl`, C 4", "`rmt`, M 8", "`rmt_xl`, M 8, C 8")
OTHERS = {
    "default": {},
    "`--data shakespeare`": {"data": ["shakespeare"]},
    "`--segment-len 64 --batch 16`": {"segment_len": 64, "batch": 16},
    "`--steps 6000`": {"steps": 6000},
}
DEPTH = {"segments_per_step": 4, "steps": 750}
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


def language(records, **flags):
    """The runs of train_lm.py's recipe with some flags changed, by the first record to have any."""
    for name in ("language", "language_tried"):
        runs = find(records.get(name, []), **RECIPE | flags)
        if runs:
            return runs
    return []


def bits(runs, state="carried", places=None):
    """Bits per byte of each seed, over all positions in the segment or at some places."""
    scores = []
    for run in runs:
        if state not in result(run):
            continue
        score = result(run)[state]
        if places is None:
            scores.append(score["bits_per_byte"])
        else:
            scores.append(float(np.mean(score["by_position"][places])))
    return scores


def by_position(runs, state="carried"):
    """Bits per byte at each position of a segment, {position: bits} for each seed."""
    return [dict(enumerate(result(run)[state]["by_position"], start=1)) for run in runs]


FIRST = slice(8)
REST = slice(8, None)
LANGUAGE_CELLS = ("all", "first 8", "the rest", "reset", "another's")


def language_cells(runs):
    """The cells of bits per byte that the tables of language models share."""
    return [
        spread(bits(runs)),
        spread(bits(runs, "carried", FIRST)),
        spread(bits(runs, "carried", REST)),
        spread(bits(runs, "reset")),
        spread(bits(runs, "of another stream")),
    ]


def language_table(records):
    """Language models side by side."""
    yield from header("model", "floats", *LANGUAGE_CELLS, "CPU s")
    for name, flags in LANGUAGE.items():
        runs = language(records, **flags)
        floats = spread(all_of(runs, "state_floats"), 0)
        yield row(name, floats, *language_cells(runs), spread(all_of(runs, "cpu_seconds"), 0))


def language_others_table(records):
    """The same models on other text, with other segments, with more training."""
    yield from header("setting", *BESIDE)
    for name, flags in OTHERS.items():
        runs = [language(records, **LANGUAGE[model] | flags) for model in BESIDE]
        yield row(name, *(spread(bits(seeds)) for seeds in runs))


def language_first_table(records):
    """Bits of the first characters of a segment, after the default training and four times it."""
    places = {"1st": slice(1), "2nd": slice(1, 2), "3rd": slice(2, 3), "4th": slice(3, 4),
              "5 to 8": slice(4, 8), "9 to 32": slice(8, 32)}
    yield from header("model, steps", *places)
    for steps in (1500, 6000):
        for name in BESIDE:
            runs = language(records, **LANGUAGE[name] | {"steps": steps})
            cells = [spread(bits(runs, places=place), 2) for place in places.values()]
            yield row(f"{name}, {steps:,}", *cells)


def language_depth_table(records):
    """How many boundaries gradient crosses in training."""
    yield from header("`bptt_depth`", "all", "first 8", "the rest")
    for depth in range(4):
        runs = language(records, **DEPTH, bptt_depth=depth)
        yield row(depth, *language_cells(runs)[:3])


def language_tried_table(records):
    """What else was tried, beside the seed 0 of the recipe that was recorded with it."""
    tried = records["language_tried"]
    base = find(tried, **RECIPE, seed=0) or find(records["language"], **RECIPE, seed=0)
    yield from header("changed, seed 0", "bits per byte", "worse by")
    for name, flags in TRIED.items():
        runs = find(tried, **RECIPE | flags, seed=0)
        if runs and base:
            change = f"{bits(runs)[0] - bits(base)[0]:+.3f}"
            yield row(name, spread(bits(runs)), change)


FORMS = {  # of memory, and the fields of Config that choose it
    "as in the paper": {"memory_form": "norm", "write_slot": "memory"},
    "normed, an\nembedding added": {"memory_form": "norm", "write_slot": "both"},
    "raw, the\nembedding alone": {"memory_form": "raw", "write_slot": "embedding"},
}


def by_form(records, form):
    """What the seeds of one form reach, {task: [score, ...]}."""
    runs = [run for name in ("forms", "copying", "length") for run in records[name]]
    copy = find(runs, task="copy", model="rmt", **form)
    memorize = find(runs, task="memorize", memory_noise=1.0, **form)
    return {
        "copy": at_length(copy, 9),
        "memorize": at_length(memorize, 4096),
        "language": bits(find(records["forms"], data=["python"], **form)),
    }


def forms_table(records):
    """Every form of memory on three tasks."""
    yield from header("memory", "copy, 9 segments", "memorize, 4,096 segments",
                      "language, bits per byte")
    for name, form in FORMS.items():
        yield row(name.replace("\n", " "), *map(spread, by_form(records, form).values()))


AGES = {  # the models whose state is followed back
    "`transformer_xl`, C 4": {"model": "transformer_xl", "cache_len": 4},
    "`rmt`": {"model": "rmt", "memory_form": "raw", "write_slot": "embedding"},
    "`rmt`, memory as in the paper": {"model": "rmt", **FORMS["as in the paper"]},
}


def ages(runs, kind):
    """Bits of every seed, {segments: bits}, of a kind, "frozen" or "history"."""
    return [{int(n): bits for n, bits in result(run)[kind].items()} for run in runs]


def ages_table(records):
    """Bits per byte over the length of a history and over the age of a state."""
    histories, frozen = (0, 1, 2, 4, 32), (1, 16, 1024)
    yield from header("model", "began now", *[f"{n} ago" for n in histories[1:]],
                      *[f"frozen {n} ago" for n in frozen])
    for name, flags in AGES.items():
        runs = find(records["ages"], **flags)
        cells = [spread([seed[n] for seed in ages(runs, "history")]) for n in histories]
        cells += [spread([seed[n] for seed in ages(runs, "frozen")]) for n in frozen]
        yield row(name, *cells)


FAMILY = {  # what the table of the Memory Transformer's forms calls a model, and its flags
    "`rmt`": {"model": "rmt"},
    "`mem_controller`": {"model": "mem_controller"},
    "`mem_bottleneck`, window 8": {"model": "mem_bottleneck", "window": 8},
    "`mem_bottleneck`, window 2": {"model": "mem_bottleneck", "window": 2},
    "`mem_bottleneck`, window 0": {"model": "mem_bottleneck", "window": 0},
}


def family(records, name, script):
    """The runs of one model of FAMILY by train_copy.py or train_lm.py."""
    runs = find(records["family"], **FAMILY[name])
    return [run for run in runs if script in run["command"]]


def family_table(records):
    """The forms of the Memory Transformer: copying, and language."""
    yield from header("`--model`", "copy, 9 segments", "free-running", "CPU s",
                      "language, all", *LANGUAGE_CELLS[1:], "CPU s")
    for name in FAMILY:
        copy = family(records, name, "train_copy.py")
        text = family(records, name, "train_lm.py")
        yield row(name, spread(at_length(copy, 9)), spread(at_length(copy, 9, "free_running")),
                  spread(all_of(copy, "cpu_seconds"), 0),
                  *language_cells(text), spread(all_of(text, "cpu_seconds"), 0))


SIZES = ("copy", "lm", "tiny", "S", "M")  # of benchmark.py


def ratio(number, digits=2):
    """A ratio in the way of the speed tables: .52, 1.03."""
    return f"{number:.{digits}f}".removeprefix("0")


def benchmark(record, section, **cells):
    """The rows of a section of a record of benchmark.py that have these cells."""
    found = []
    for line in record["sections"][section]["rows"]:
        if all(line.get(name) == value for name, value in cells.items()):
            found.append(line)
    return found


def both_works(record, section, key, size):
    """A ratio in training and in inference; nothing where it was not measured."""
    numbers = []
    for work in ("training", "inference"):
        lines = benchmark(record, section, size=size, work=work)
        numbers += [ratio(line[key]) for line in lines if key in line]
    return " / ".join(numbers)


def speed_table(records, name="speed"):
    """Time of others over ours, and the share of the machine's rate that we reach."""
    record = records[name]
    package = record["about"]["versions"].get("recurrent_memory_transformer_pytorch", "")
    contents = {
        "time of the authors' design (GPT-2 of `transformers`) over ours":
            ("peers", "GPT-2 / ours"),
        f"time of `recurrent-memory-transformer-pytorch` {package} over ours":
            ("peers", "package / ours"),
        "time of `transformer` (no memory) over that of `rmt`":
            ("peers", "transformer / ours"),
        "share of the rate of the bare matrix products":
            ("ceiling", "share"),
    }
    yield from header("training / inference", *SIZES)
    for content, (section, key) in contents.items():
        yield row(content, *(both_works(record, section, key, size) for size in SIZES))


DIAGONAL_SIZES = {
    "small": "4 layers of width 64, segment 16",
    "deep": "12 layers of width 64, segment 16",
    "tiny": "4 layers of width 64, segment 32",
    "S": "size S: 4 layers of width 256, segment 128",
}


def diagonal_table(records, name="speed"):
    """Time of unroll over time of unroll_diagonal."""
    yield from header("`armt` / `transformer_xl`", "batch 1, inference", "training",
                      "batch 8, inference", "training")
    for size, words in DIAGONAL_SIZES.items():
        cells = []
        for batch in (1, 8):
            lines = benchmark(records[name], "diagonal", size=size, batch=batch)
            for work in ("inference", "training"):
                numbers = {line["variant"]: ratio(line[f"{work}, ratio"]) for line in lines}
                both = [numbers.get(variant, "") for variant in ("armt", "transformer_xl")]
                cells.append(" / ".join(both))
        yield row(words, *cells)


def readme_table(records):
    """The one table that a newcomer should see."""
    yield from header("what is tested", "model", "result", "for comparison", "record")

    def line(what, model, here, without, record):
        return row(what, f"`{model}`", here, without, f"[{record}](assets/results/{record}.json)")

    copying = records["copying"]
    for task, what in (("copy", "copy 24 symbols, over 9 segments"),
                       ("reverse", "write 24 symbols backwards, over 6 segments")):
        n = COPYING[task][-1]
        ours = at_length(find(copying, task=task, model="rmt"), n)
        plain = at_length(find(copying, task=task, model="transformer"), n)
        yield line(what, "rmt", f"{spread(ours)} right", f"`transformer`: {spread(plain)}",
                   "copying")

    runs = find(records["length"], task="memorize", memory_noise=LENGTH["memorize"][0])
    reset = spread([run["results"][RESET] for run in runs])
    yield line("a fact, asked for in segment 4,096; trained on at most 8", "rmt",
               f"{spread(at_length(runs, 4096))} right",
               f"memory reset, over 8 segments: {reset}", "length")

    runs = associative(records, "rewrite", "`armt`, delta")
    reset = spread([run["results"][RESET] for run in runs])
    yield line("512 writes to four keys; trained on at most 12", "armt",
               f"{spread(at_length(runs, 513))} right",
               f"matrix reset, over 12 writes: {reset}", "associative")

    plain, cached, ours, _ = [spread(bits(language(records, **LANGUAGE[name]))) for name in BESIDE]
    without = f"`transformer`: {plain}; `transformer_xl` with as large a state: {cached}"
    what = "Python's library, bits per byte; lower is better"
    yield line(what, "rmt", ours, without, "language")


TABLES = {  # name in the READMEs: the function, and the records that it needs
    "readme": (readme_table, ["copying", "length", "associative", "language"]),
    "copying": (copying_table, ["copying"]),
    "curriculum": (curriculum_table, ["copying", "curriculum"]),
    "capacity": (capacity_table, ["capacity"]),
    "length": (length_table, ["length"]),
    "associative": (associative_table, ["associative"]),
    "remember": (remember_table, ["associative", "questions"]),
    "far": (far_table, ["far"]),
    "language": (language_table, ["language"]),
    "language-others": (language_others_table, ["language"]),
    "language-first": (language_first_table, ["language"]),
    "language-depth": (language_depth_table, ["language_tried"]),
    "language-tried": (language_tried_table, ["language", "language_tried"]),
    "forms": (forms_table, ["forms", "copying", "length"]),
    "ages": (ages_table, ["ages"]),
    "family": (family_table, ["family"]),
    "speed": (speed_table, ["speed"]),
    "speed-gpu": (partial(speed_table, name="speed-cuda"), ["speed-cuda"]),
    "diagonal": (diagonal_table, ["speed"]),
    "diagonal-gpu": (partial(diagonal_table, name="speed-cuda"), ["speed-cuda"]),
}


def tables(folder=RESULTS):
    """All tables of the records in a folder, {name: lines}."""
    records = read_records(folder)
    made = {}
    for name, (table, needs) in TABLES.items():
        if is_there(f"table {name}", needs, records):
            made[name] = list(table(records))
    return made


def is_there(what, needs, records):
    """Whether all records are there that something needs. If not, a line says so."""
    missing = [name for name in needs if name not in records]
    if missing:
        print(f"{what} is skipped: there is no record {', '.join(missing)}")
    return not missing


def fill(path, tables):
    """Write tables between their lines of a file. Raises ValueError where one is missing."""
    text = path.read_text(encoding="utf-8")
    pieces = re.split(r"(<!-- table [\w-]+ -->|<!-- end of table -->)", text)
    marks = pieces[1::2]
    for begin, end in zip(marks[::2], marks[1::2], strict=False):
        if "end" in begin or "end" not in end:
            raise ValueError(f"{path}: after {begin} comes {end}; tables need both lines, in turns")
    if len(marks) % 2 == 1:
        raise ValueError(f"{path}: after {marks[-1]} there is no <!-- end of table -->")
    for i in range(1, len(pieces), 4):
        name = pieces[i].split()[2]
        if name in tables:
            lines = "\n".join(tables[name])
            pieces[i + 1] = f"\n\n{lines}\n\n"
        else:
            print(f"{path}: nothing is written to table {name}")
    write_text(path, "".join(pieces))


# ==================================================================================================
# How figures look
#
# The colours are those of Okabe and Ito that have a contrast of 3 and more to white, and their
# orange, darkened until it has. A model has the same colour, marker and line in every figure.

BLACK = "#000000"
GREY = "#595959"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
ORANGE = "#B87F00"
PALE = "#CBE6F7"    # a light sky blue, for areas

MODELS = {
    "transformer": (BLACK, "x", ":"),
    "transformer_xl": (GREEN, "D", "--"),
    "rmt": (BLUE, "o", "-"),
    "rmt, as large": (BLUE, "d", ":"),
    "rmt, memory as in the paper": (BLUE, "d", ":"),
    "rmt_xl": (PURPLE, "s", "-."),
    "armt": (VERMILION, "^", "-"),
    "armt, armt": (VERMILION, "v", "--"),
    "armt, hebbian": (VERMILION, "P", ":"),
    "mem_controller": (GREY, "p", "-."),
    "mem_bottleneck, window 8": (ORANGE, "<", "-"),
    "mem_bottleneck, window 2": (ORANGE, ">", "--"),
    "mem_bottleneck, window 0": (ORANGE, "*", ":"),
}
AS_BEFORE = (BLACK, "s", "--")  # the same model without what a figure is about

STYLE = {
    "font.size": 12, "axes.titlesize": 12, "axes.labelsize": 12, "legend.fontsize": 12,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "lines.linewidth": 2, "lines.markersize": 7,
    "svg.fonttype": "path", "svg.hashsalt": "rmt",
}
WIDTH = 9  # inches; as many as the README shows, so that 12 points are 12 points there


def look(name):
    """Colour, marker and line of a model, as a table calls it: `rmt`, M 8."""
    name = name.replace("`", "")
    return MODELS[name] if name in MODELS else MODELS[name.split(",")[0]]


def save(figure, name, folder=ASSETS, kind="svg"):
    """Write folder/NAME.svg, the same bytes every time, or NAME.png for slides."""
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {}
    path = folder / f"{name}.{kind}"
    figure.savefig(f"{path}.tmp", format=kind, dpi=200, metadata=metadata)
    os.replace(f"{path}.tmp", path)
    plt.close(figure)


def plot_seeds(axis, style, seeds, label, every=1):
    """The mean of seeds, each {x: y}, as a line; around it a band from the least to the most."""
    if not seeds:
        return
    color, marker, line = style
    xs = [x for x in sorted(seeds[0]) if all(x in seed for seed in seeds)]
    ys = np.array([[seed[x] for x in xs] for seed in seeds])
    axis.fill_between(xs, ys.min(0), ys.max(0), color=color, alpha=0.15, linewidth=0)
    axis.plot(xs, ys.mean(0), line, color=color, marker=marker, markevery=every, label=label)


def plot_positions(axis, name, seeds):
    """Bits of a model, {position: bits} for each seed; some of the 32 positions are marked."""
    places = [0, 1, 2, 3, 5, 7, 11, 15, 23, 31]
    plot_seeds(axis, look(name), seeds, name.replace("`", ""), places)
    axis.set_xlabel("position in the segment, bytes")
    count_axis(axis, [1, 2, 4, 8, 16, 32])


def plot_points(axis, style, points, label=None, aside=0.0):
    """Seeds as points {x: [y, ...]}, moved aside a little, and a line through their means."""
    color, marker, line = style
    xs = [x for x, seeds in points.items() if seeds]
    means = [np.mean(points[x]) for x in xs]
    places = [x + aside for x in xs]
    axis.plot(places, means, line, color=color, linewidth=1.5)
    for place, x in zip(places, xs, strict=True):
        axis.plot([place] * len(points[x]), points[x], marker, color=color,
                  markerfacecolor="none", markeredgewidth=1.5, label=label)
        label = None


def count_axis(axis, ticks, base=2):
    """A logarithmic axis with these numbers on it."""
    axis.set_xscale("log", base=base)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xticks([], minor=True)


def shade(axis, first, last, label=None):
    """What was seen in training."""
    axis.axvspan(first, last, color="#E4E4E4", label=label, zorder=0)


def thinned(points, longest):
    """Points {segments: y}, without some of the many up to the longest length of training."""
    kept = (2, 2 + (longest - 1) // 2, longest)  # the shortest, a middle one and the longest
    return {n: y for n, y in points.items() if n in kept or n > longest}


def chance(axis, share, label=None):
    """What guessing gets right."""
    axis.axhline(share, color=GREY, linestyle=(0, (1, 2)), linewidth=1.5, label=label)


def legend_below(figure, axis, columns):
    """One legend for all panels, under them."""
    lines, labels = axis.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=columns)


# ==================================================================================================
# Figures
#
# A function for each, which takes the records and returns a figure. FIGURES has their names.


def draw_method(records):
    """Three segments, the memory handed on over the top, the carry handed on inside each layer."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4))
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    axis.set(xlim=(0, WIDTH), ylim=(0, 4))
    axis.axis("off")
    width = 2.3   # of a segment, in inches
    gap = 0.9     # between segments
    parts = {"read": 0.65, "tokens": 1.0, "write": 0.65}

    def box(x, y, width, height, text, color):
        axis.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=BLACK))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center")

    def line(points, color, style="-", width=2.5):
        xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, style, color=color, linewidth=width, zorder=3)

    def arrow(begin, end, color, style="-", width=2.5):
        shape = "-|>,head_width=.35,head_length=.6"
        axis.annotate("", end, begin, zorder=3, arrowprops={
            "arrowstyle": shape, "color": color, "linewidth": width, "linestyle": style,
            "shrinkA": 0, "shrinkB": 0})

    for s in range(3):
        left = 0.15 + s * (width + gap)
        right = left + width
        middle = left + width / 2
        axis.text(middle, 0.1, f"segment {s + 1}", ha="center")
        start = left
        for name, size in parts.items():
            box(start, 0.95, size, 0.4, name, "white" if name == "tokens" else PALE)
            arrow((start + size / 2, 1.35), (start + size / 2, 1.62), GREY, width=1.2)
            start += size
        for layer in range(2):
            y = 1.62 + 0.72 * layer
            box(left, y, width, 0.45, f"layer {layer + 1}", "#EEEEEE")
            arrow((middle, y + 0.45), (middle, y + 0.72), GREY, width=1.2)
            if s < 2:
                arrow((right, y + 0.22), (right + gap, y + 0.22), VERMILION, "--")
        axis.text(middle, 3.1, "logits", ha="center")

        if s < 2:
            written = right - parts["write"] / 2
            down = right + 0.4
            read = right + gap + parts["read"] / 2
            write = written + gap + width
            line([(down, 3), (down, 0.7)], "white", width=8)
            over = [(written, 2.79), (written, 3.25), (down, 3.25), (down, 0.55), (write, 0.55)]
            line(over, BLUE)
            arrow((read, 0.54), (read, 0.95), BLUE)
            arrow((write, 0.54), (write, 0.95), BLUE)

    line([(0.2, 3.75), (0.8, 3.75)], BLUE)
    axis.text(0.9, 3.75, "memory, over the top: RMT", color=BLUE, fontweight="bold", va="center")
    line([(3.95, 3.75), (4.55, 3.75)], VERMILION, "--")
    axis.text(4.65, 3.75, "carry, inside a layer: Transformer-XL, ARMT", color=VERMILION,
              fontweight="bold", va="center")
    return figure


BLOCKS = {  # of the columns and rows of a mask: letter, colour, colour where nobody may look
    "cache": ("C", VERMILION, "#FBE9DD"),
    "read memory": ("R", BLUE, "#E3F0F8"),
    "tokens": ("T", GREY, "#ECECEC"),
    "write memory": ("W", GREEN, "#E0F3EE"),
}


def draw_masks(records=None):
    """The mask of every variant, with a full cache, and that of a bottleneck with a window."""
    n_tokens = 5
    shown = dict.fromkeys(VARIANTS, 0) | {"mem_bottleneck, window 2": 2}
    n_across = 5
    n_down = -(-(len(shown) + 1) // n_across)
    across = 15  # cells from panel to panel
    down = 16
    size = (n_across * across, n_down * down)
    figure, axis = plt.subplots(figsize=(WIDTH, WIDTH * size[1] / size[0]))
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    axis.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="equal")
    axis.axis("off")

    for i, (name, window) in enumerate(shown.items()):
        model = RMT(Config(name.split(",")[0], segment_len=n_tokens, n_mem=2, cache_len=3,
                           window=window))
        mask = (model.mask(n_tokens, model.n_cache) == 0).tolist()
        columns = [model.n_cache, model.n_read, n_tokens, model.n_write]
        rows = [0, model.n_read, n_tokens, model.n_write]
        left = i % n_across * across + 2
        top = i // n_across * down + 5
        title = name.replace(", ", ",\n").replace("_encoder", "\n_encoder")
        if name == "rmt_encoder":
            title = name
        axis.text(left, top - 2.1, title, va="bottom", linespacing=1.1)
        draw_mask(axis, left, top, mask, columns, rows)

    x = len(shown) % n_across * across + 2
    y = len(shown) // n_across * down + 5
    axis.text(x, y - 1, "A row may look at\nthe filled columns.", va="center")
    for i, (name, (letter, color, _)) in enumerate(BLOCKS.items()):
        axis.add_patch(Rectangle((x, y + 1.5 + 2 * i), 1.4, 1.4, facecolor=color))
        axis.text(x + 2.2, y + 2.2 + 2 * i, f"{letter}  {name}", va="center")
    return figure


def draw_mask(axis, left, top, mask, columns, rows):
    """One mask with its corner at (left, top), in cells, and the letters of its blocks."""
    looks = list(BLOCKS.values())
    x = left
    for size, (letter, color, light) in zip(columns, looks, strict=True):
        if size > 0:
            axis.add_patch(Rectangle((x, top), size, len(mask), facecolor=light))
            axis.text(x + size / 2, top - 1, letter, ha="center", va="center", color=color)
        for column in range(x, x + size):
            for row in range(len(mask)):
                if mask[row][column - left]:
                    corner = (column + 0.06, top + row + 0.06)
                    axis.add_patch(Rectangle(corner, 0.88, 0.88, facecolor=color))
        x += size
        if 0 < size and x < left + sum(columns):
            axis.plot([x, x], [top, top + len(mask)], color=BLACK, linewidth=1)
    y = top
    for size, (letter, color, _) in zip(rows, looks, strict=True):
        if size > 0:
            axis.text(left - 1, y + size / 2, letter, ha="center", va="center", color=color)
        y += size
        if 0 < size and y < top + len(mask):
            axis.plot([left, left + sum(columns)], [y, y], color=BLACK, linewidth=1)


def draw_diagonal(records):
    """In which step each segment meets each layer: one after another, and along diagonals."""
    n_layer = 4
    n_segments = 8
    now = 4  # a step that stands out
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.8), layout="constrained")
    ways = {"unroll": (n_layer, "one cell each"), "unroll_diagonal": (1, "a diagonal each")}
    for axis, (name, (wait, each)) in zip(axes, ways.items(), strict=True):
        last = wait * (n_segments - 1) + n_layer
        for s in range(n_segments):
            for layer in range(n_layer):
                step = wait * s + layer + 1
                ink, paper = ("white", BLUE) if step == now else (BLACK, PALE)
                axis.add_patch(Rectangle((s + 0.5, layer + 0.5), 1, 1, facecolor=paper,
                                         edgecolor="white", linewidth=1.5))
                axis.text(s + 1, layer + 1, step, ha="center", va="center", color=ink)
        axis.set(xlim=(0.5, n_segments + 0.5), ylim=(0.5, n_layer + 0.5), aspect="equal",
                 xticks=range(1, n_segments + 1), yticks=range(1, n_layer + 1),
                 xlabel="segment", ylabel="layer", title=f"{name}: {last} steps, {each}")
        axis.tick_params(length=0)
    return figure


def draw_staircase(records):
    """A fact D segments back is learned where bptt_depth reaches it."""
    runs = records["staircase"]
    fixed = find(runs, curriculum="fixed")
    mixed = find(runs, curriculum="random")
    panels = []  # title, segments of the sample, runs
    for n in sorted({setting(run, "segments") for run in fixed}):
        title = "1 segment back" if n == 2 else f"{n - 1} segments back"
        panels.append((title, n, find(fixed, segments=n)))
    for n in sorted({setting(run, "segments") for run in mixed}):
        panels.append((f"1 to {n - 1} back, mixed", n, find(mixed, segments=n)))

    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.7), sharey=True,
                                layout="constrained")
    depths = sorted({setting(run, "bptt_depth") for run in runs})
    for axis, (title, n, seeds) in zip(axes, panels, strict=True):
        axis.axvspan(n - 1.5, depths[-1] + 0.5, color=PALE, zorder=0)
        chance(axis, 0.1)
        points = {depth: at_length(find(seeds, bptt_depth=depth), n) for depth in depths}
        plot_points(axis, look("rmt"), points)
        axis.set(title=title, xticks=depths, ylim=(0, 1.05),
                 xlim=(depths[0] - 0.5, depths[-1] + 0.5))
    axes[0].set_ylabel("fact symbols right")
    figure.suptitle("How far back the fact stands; shaded: gradient reaches it", fontsize=12)
    figure.supxlabel("bptt_depth, boundaries that gradient crosses in training", fontsize=12)
    return figure


def draw_length(records):
    """Accuracy of memorize and detect over the segments, with and without noise on the memory."""
    where = {"memorize": "the fact is in the first segment", "detect": "the fact is in any segment"}
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.6), sharey=True, layout="constrained")
    for axis, (task, (most, published)) in zip(axes, LENGTH.items(), strict=True):
        noisy = find(records["length"], task=task, memory_noise=most)
        plain = find(records["length"], task=task, memory_noise=0.0)
        plot_seeds(axis, AS_BEFORE, [thinned(by_length(run), 8) for run in plain],
                   "rmt, trained without noise")
        plot_seeds(axis, look("rmt"), [thinned(by_length(run), 8) for run in noisy],
                   "rmt, trained with noise on its memory")
        axis.plot(4096, published, "*", color=BLACK, markerfacecolor="white", markersize=16,
                  linestyle="none", label="published [RMT-1M]", clip_on=False, zorder=4)
        shade(axis, 2, 8, "lengths of training samples")
        chance(axis, 0.1, "guessing")
        axis.set(title=f"{task}: {where[task]}", xlabel="segments of the sample", ylim=(0, 1.05))
        count_axis(axis, [2, 8, 64, 512, 4096])
    axes[0].set_ylabel("fact symbols right")
    legend_below(figure, axes[0], 2)
    return figure


def draw_curriculum(records):
    """The default run of rmt over its training lengths, with two curricula."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    styles = {"curriculum": AS_BEFORE, "copying": look("rmt")}
    labels = {
        "curriculum": "all steps on the longest\nlength so far",
        "copying": "30 % of the steps\non shorter lengths",
    }
    lengths = COPYING["copy"]
    for i, (name, style) in enumerate(styles.items()):
        runs = find(records[name], task="copy", model="rmt")
        points = {x: at_length(runs, n) for x, n in enumerate(lengths)}
        label = f"{labels[name]} ({len(runs)} seeds)"
        plot_points(axis, style, points, label, aside=0.06 * i - 0.03)
    chance(axis, 0.1, "guessing")
    axis.set(xlabel="segments of the sample, all of them trained", ylabel="answer symbols right",
             xticks=range(len(lengths)), xticklabels=lengths, ylim=(0, 1.05), xlim=(-0.3, 2.3),
             title="copy over each trained length, after two curricula")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), labelspacing=1)
    return figure


def draw_capacity(records):
    """What is copied over the symbols to copy, and symbols held over the floats of the memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.4), layout="constrained")
    blues = {2: "#9ECAE1", 4: "#5BA3D0", 8: BLUE, 16: "#08306B"}
    widths = {64: (BLUE, "o", "-"), 32: (GREEN, "^", "-"), 128: (VERMILION, "s", "-")}
    aside = {64: 0, 32: -25, 128: 25}
    shade(left, symbols(3), symbols(24), "trained")
    labelled = set()
    for flags in CAPACITY.values():
        runs = find(records["capacity"], **flags)
        M, D = flags["n_mem"], flags["d_model"]
        if D == 64:
            seeds = [{symbols(n): share for n, share in by_length(run).items()} for run in runs]
            plot_seeds(left, (blues[M], "o", "-"), seeds, f"{M} tokens")
        held = [symbols_held(run) for run in runs]
        label = None if D in labelled else f"width {D}"
        labelled.add(D)
        plot_points(right, widths[D], {M * D: held}, label, aside[D])
    chance(left, 0.1, "guessing")
    left.set(xlabel="symbols to copy", ylabel="answer symbols right", ylim=(0, 1.05),
             xticks=range(8, 73, 16), title="copy with 2 to 16 tokens of width 64")
    right.axhline(symbols(24), color=GREY, linestyle=(0, (1, 2)), label="the longest trained")
    right.set(xlabel="floats handed on", ylabel="symbols held", ylim=(0, 72),
              xticks=[128, 256, 512, 1024], title="by the size of the memory")
    left.legend(loc="lower left", bbox_to_anchor=(0, 0.13), fontsize=10)
    right.legend(loc="lower right", fontsize=10)
    return figure


def draw_language(records):
    """Bits per byte by position in the segment, and over bptt_depth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.6), layout="constrained",
                                         width_ratios=(3, 2))
    for name in BESIDE:
        plot_positions(left, name, by_position(language(records, **LANGUAGE[name])))
    left.set(ylabel="bits per byte", title="What memory is worth, by position")
    left.set_yscale("log")
    left.set_yticks([2, 2.25, 2.5, 3, 3.5], ["2.00", "2.25", "2.50", "3.00", "3.50"])
    left.set_yticks([], minor=True)
    depths = {depth: bits(language(records, **DEPTH, bptt_depth=depth)) for depth in range(4)}
    plot_points(right, look("rmt"), depths)
    right.set(xlabel="bptt_depth, boundaries", ylabel="bits per byte", xticks=range(4),
              xlim=(-0.4, 3.4), title="rmt, by the reach of gradient")
    legend_below(figure, left, 4)
    return figure


def draw_forms(records):
    """No form of memory is best on all of three tasks."""
    panels = {  # the title, and what its axis says
        "copy": ("copy, 9 segments", "answer symbols right"),
        "memorize": ("memorize, 4,096 segments", "fact symbols right"),
        "language": ("language", "bits per byte"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.8), sharey=True, layout="constrained")
    for axis, (task, (title, label)) in zip(axes, panels.items(), strict=True):
        for y, form in enumerate(FORMS.values()):
            scores = by_form(records, form)[task]
            axis.plot(scores, [y] * len(scores), "o", color=BLUE, markerfacecolor="none",
                      markeredgewidth=1.5)
        axis.set(title=title, xlabel=label, ylim=(len(FORMS) - 0.5, -0.5))
        axis.grid(axis="y", color="#E4E4E4")
        axis.set_axisbelow(True)
        if task == "language":
            axis.invert_xaxis()  # further right is better, in all panels
        else:
            axis.set_xlim(0, 1.05)
    axes[0].set_yticks(range(len(FORMS)), FORMS)
    return figure


def draw_ages(records):
    """What a state is worth over the length of its history, and over its age."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.8), sharey=True,
                                         layout="constrained")
    for name, flags in AGES.items():
        runs = find(records["ages"], **flags)
        history = ages(runs, "history")
        label = name.replace("`", "")
        plot_seeds(left, look(name), history, label)
        plot_seeds(right, look(name), ages(runs, "frozen"), label)
        without = np.mean([seed[0] for seed in history])
        right.axhline(without, color=look(name)[0], linestyle=(0, (1, 2)), linewidth=1.5)
    right.annotate("with the initial state", (16, without), (6, -44), textcoords="offset points")
    left.set(title="A state that began some segments ago", ylabel="bits per byte",
             xlabel="segments that it has seen")
    right.set(title="The state of some segments ago", xlabel="its age, segments")
    for axis, ticks in ((left, [0, 1, 2, 4, 8, 16, 32]), (right, [0, 1, 4, 16, 128, 1024])):
        axis.set_xscale("symlog", base=2, linthresh=1)  # which has a place for 0
        axis.set_xlim(-0.3, 1.5 * ticks[-1])
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_xticks([], minor=True)
    legend_below(figure, left, 3)
    return figure


def draw_family(records):
    """Bits per byte by position in the segment, and what a reset of the memory costs there."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.8), layout="constrained")
    for name in FAMILY:
        runs = family(records, name, "train_lm.py")
        carried = by_position(runs)
        reset = by_position(runs, "reset")
        cost = []
        for ours, without in zip(carried, reset, strict=True):
            cost.append({x: without[x] - ours[x] for x in ours})
        plot_positions(left, name, carried)
        plot_positions(right, name, cost)
    left.set(ylabel="bits per byte", title="Language, memory carried on")
    right.set(ylabel="more bits per byte", title="What it costs to reset the memory")
    right.set_yscale("log")
    right.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    right.set_yticks([], minor=True)
    legend_below(figure, left, 3)
    return figure


def draw_associative(records):
    """Right answers over the length of a sample: above rules that update, below other models."""
    groups = {
        "armt, by the rule that updates its matrix":
            ("`armt`, delta", "`armt`, armt", "`armt`, hebbian"),
        "armt, beside other models":
            ("`armt`, delta", "`rmt`, M 8", "`rmt`, as large", "`transformer_xl`"),
    }
    figure = plt.figure(figsize=(WIDTH, 7.6), layout="constrained")
    for part, (title, names) in zip(figure.subfigures(2, 1), groups.items(), strict=True):
        part.suptitle(title, fontsize=12, fontweight="bold")
        axes = part.subplots(1, len(ASSOCIATIVE_LENGTHS), sharey=True)
        for task, axis in zip(ASSOCIATIVE_LENGTHS, axes, strict=True):
            draw_associative_task(records, axis, task, names)
        axes[0].set_ylabel("right answers")
        legend_below(part, axes[0], 3)
    return figure


def draw_associative_task(records, axis, task, names):
    """One panel of draw_associative."""
    longest = ASSOCIATIVE_LENGTHS[task][0]
    record = "questions" if task == "remember" else "associative"
    for name in names:
        runs = associative(records, task, name, record)
        seeds = [thinned(by_length(run), longest) for run in runs]
        if task == "remember":
            seeds = [{n - 1: share for n, share in seed.items()} for seed in seeds]
        plot_seeds(axis, look(name), seeds, name.replace("`", ""))
    axis.set(ylim=(0, 1.05), title=task)
    if task == "remember":
        shade(axis, 1, longest - 1, "lengths in training")
        axis.set_xlabel("pairs")
        count_axis(axis, [1, 4, 16, 64])
    else:
        shade(axis, 2, longest, "lengths in training")
        axis.set_xlabel("segments")
        count_axis(axis, [10, 100, 1000], base=10)
    chance(axis, 1 / 6 if task == "facts" else 0.1, "guessing")


FIGURES = {  # name: the function, and the records that it needs
    "method": (draw_method, []),
    "masks": (draw_masks, []),
    "diagonal": (draw_diagonal, []),
    "staircase": (draw_staircase, ["staircase"]),
    "length": (draw_length, ["length"]),
    "curriculum": (draw_curriculum, ["copying", "curriculum"]),
    "capacity": (draw_capacity, ["capacity"]),
    "language": (draw_language, ["language"]),
    "forms": (draw_forms, ["forms", "copying", "length"]),
    "ages": (draw_ages, ["ages"]),
    "family": (draw_family, ["family"]),
    "associative": (draw_associative, ["associative", "questions"]),
}


# ==================================================================================================
# Figures of the notebooks

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


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


def draw_film(folder):
    """film.svg: the first figure of notebook 4."""
    with figures_of(ROOT / "notebooks" / "4_looking_inside.ipynb") as kept:
        shutil.copy(kept / "1.svg", folder / "film.svg")


# ==================================================================================================
# Main


def parse(argv):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--png", type=Path, nargs="?", const=ROOT / "out" / "slides", metavar="FOLDER",
         help="draw every figure as a PNG for slides, those of the notebooks too; default: "
              "out/slides")
    flag("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the records are")
    flag("--out", type=Path, default=ASSETS, metavar="FOLDER", help="where the figures go")
    flag("--readme", type=Path, nargs="*", default=READMES, metavar="FILE",
         help="files that get the tables")
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
        gather(args.name, args.files, args.commit, args.results)
        return
    plt.switch_backend("Agg")
    plt.rcParams.update(STYLE)
    folder = args.png or args.out
    kind = "png" if args.png else "svg"
    folder.mkdir(parents=True, exist_ok=True)
    if args.work == "film":
        draw_film(folder)
        return
    records = read_records(args.results)
    for name, (draw, needs) in FIGURES.items():
        if is_there(f"figure {name}", needs, records):
            save(draw(records), name, folder, kind)
    if args.png is not None:
        draw_notebooks(NOTEBOOKS, folder)
    else:
        made = tables(args.results)
        for path in args.readme:
            if path.exists():
                fill(path, made)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
