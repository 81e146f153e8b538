"""What the notebooks of the course share, and what you need not read to follow a lesson.

It reads from top to bottom: guesses and claims, a report to hand in, messages and training,
instruments, pictures. The checks of the exercises are in exercises.py, and what a teacher runs is
in teacher.py:

    python notebooks/course.py --student FOLDER    write a copy of the course for a class
    python notebooks/course.py --grade FOLDER      check what the students of a class handed in

Environment variables change how the notebooks run: with RMT_FAST=1 they hardly train anything, and
print claims without asserting them; RMT_SEED=1 takes another seed. RMT_FIGURES=FOLDER keeps all
figures there, for slides: python assets/figures.py --png does that for all notebooks.
"""
import argparse
import ast
import base64
import hashlib
import inspect
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import HTML, Markdown, display
from matplotlib.animation import FuncAnimation

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from rmt import RMT, Config, generate, unroll  # noqa: E402

FAST = os.environ.get("RMT_FAST") == "1"
SEED = int(os.environ.get("RMT_SEED", "0"))
torch.set_num_threads(1)  # models this small are fastest with one
if FAST:
    print("Quick run: figures and numbers are not those of the course.")
START = sum(os.times()[:4])  # CPU seconds of this process and those that it has started

# ==================================================================================================
# Guesses and claims


@dataclass
class Guess:
    """A number that you expected, and the one that was measured."""
    value: float | None
    found: float | None = None
    error: float = 0.0                 # 1 is the largest that counts as within reach
    first: float | None = None         # the first number that you typed,
    first_time: str | None = None      # when its cell ran,
    measured_time: str | None = None   # and when the first measurement ran


GUESSES = {}  # question: Guess


def guess(question, value=None):
    """Write down a number that you expect, before you see it. None means no guess."""
    if value is not None:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            print(f"{question}: your guess must be a number or None, and {value!r:.40} is neither")
            value = None
        else:
            value = number
    mine = GUESSES.setdefault(question, Guess(None))
    mine.value, mine.found = value, None
    if mine.first is None and value is not None:
        mine.first, mine.first_time = value, now()
    print(f"{question}? " + ("no guess yet" if value is None else f"your guess: {short(value)}"))


def measured(question, found, within=None, factor=None):
    """Put a measured number beside its guess, which may be off by `within`, or by a factor."""
    mine = GUESSES.setdefault(question, Guess(None))
    mine.found = found
    mine.measured_time = mine.measured_time or now()
    guessed = "no guess"
    if mine.value is not None:
        guessed = f"your guess {short(mine.value)}"
        mine.error = abs(mine.value - found) / (within or 1)
        if factor is not None and mine.value > 0 and found > 0:
            mine.error = abs(math.log(mine.value / found)) / math.log(factor)
    print(f"{question}: measured {short(found)}, {guessed}")


def now():
    """The time of day, to the second."""
    return datetime.now().isoformat(timespec="seconds")


def short(number):
    """A number in a few digits: 0.317, 2,048."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def table_of_guesses():
    """Your guesses beside what was measured, at the end of a notebook."""
    rows = ["| question | your guess | measured |", "|---|---|---|"]
    made = []
    for question, mine in GUESSES.items():
        found = "-" if mine.found is None else short(mine.found)
        said = "-" if mine.value is None else short(mine.value)
        rows.append(f"| {question} | {said} | {found} |")
        if mine.value is not None and mine.found is not None:
            made.append((mine.error, question))
    display(Markdown("\n".join(rows)))
    if not made:
        guessed = any(mine.value is not None for mine in GUESSES.values())
        print("None of your guesses has been measured yet." if guessed else
              "No guesses yet. A guess that you wrote down before you looked teaches more than one "
              "that was right.")
        return
    error, surprise = max(made)
    near = sum(error <= 1 for error, _ in made)
    print(f"{near} of {len(made)} within reach"
          + (f"; the largest surprise: {surprise}" if error > 1 else ""))


def claim(holds, text):
    """Print whether a claim holds, and stop if it does not. A fast run does not stop."""
    print(f"{'holds' if holds else 'does not hold'}: {text}")
    assert holds or FAST, text


def report():
    """Write progress.json, a file that you can hand in. All notebooks add to the same file.

    It holds the verdict on every exercise, a hash of every answer, and every guess: the first
    number that you typed, when its cell ran, and when the result was first measured.
    """
    import exercises

    path = HERE / "progress.json"
    progress = {"exercises": {}, "guesses": {}}
    if path.exists():
        try:
            progress = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            print(f"{path.name} is not a report of this course: rename it, and run this cell again")
            return
    for name, verdict in exercises.VERDICTS.items():
        source = exercises.SOURCES[name].encode()
        progress["exercises"][name] = {
            "verdict": verdict, "answer": hashlib.sha256(source).hexdigest()[:16], "time": now()}
    for question, mine in GUESSES.items():
        before = progress["guesses"].get(question, {})
        if before.get("guess") is None:
            before |= {"guess": mine.first, "time": mine.first_time}
        if before.get("measured") is None:
            before |= {"measured": mine.found, "measured_time": mine.measured_time}
        progress["guesses"][question] = before
    write(path, json.dumps(progress, indent=1, ensure_ascii=False) + "\n")
    solved = sum(entry["verdict"].startswith("OK") for entry in progress["exercises"].values())
    guessed = sum(entry["guess"] is not None for entry in progress["guesses"].values())
    print(f"{path.name}: {solved} exercises OK, {guessed} guesses")


def write(path, content):
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def timer():
    """The CPU seconds of this notebook so far."""
    print(f"this notebook took {sum(os.times()[:4]) - START:.0f} CPU seconds")


def many(n, fast=None):
    """n steps or samples; in a fast run a tenth of them, or `fast`."""
    if not FAST:
        return n
    return max(1, n // 10) if fast is None else fast


# ==================================================================================================
# Messages and training

LETTERS = "ABCDEFGHIJ"
BAR = 10  # the token after a message: now say it


def message(n, batch=1, generator=None):
    """Tokens (batch, 2 n) of n random letters, a bar and the letters again, and the letters.

    The last n outputs are the answer: the first of them is made at the bar.
    """
    letters = torch.randint(10, (batch, n), generator=generator)
    bar = torch.full((batch, 1), BAR)
    return torch.cat([letters, bar, letters[:, :-1]], dim=1), letters


def text(tokens, T=None):
    """Tokens (n,) as letters, and a space after each page of T."""
    words = ["".join("ABCDEFGHIJ|"[token] for token in tokens.tolist())]
    if T is not None:
        words = [words[0][i:i + T] for i in range(0, len(words[0]), T)]
    return " ".join(words)


def spell(word):
    """The tokens (n,) of a word of the letters A to J. Raises ValueError for other letters."""
    letters = word.upper().replace(" ", "")
    for letter in letters:
        if letter not in LETTERS:
            raise ValueError(f"{word!r}: {letter!r} is not one of {LETTERS}")
    return torch.tensor([LETTERS.index(letter) for letter in letters])


@dataclass
class Learning:
    """What a training run has to tell."""
    right: list = field(default_factory=list)  # running share of right letters, one per step
    level: list = field(default_factory=list)  # how far the task had grown, one per step
    seconds: float = 0.0                       # CPU seconds of training


def train(model, sample, steps, read=None, levels=1, lr=4e-3, batch=16, grow=True, grow_at=0.75,
          weight_decay=0.01, seed=SEED):
    """The training loop of notebook 2, for all notebooks. Returns a Learning.

    sample(level, batch, generator) -> tokens and the letters that the last outputs must say. The
    task grows by a level when the share of right letters passes grow_at; with grow=False, all steps
    are on the last level. read(tokens) -> logits; default: unroll the model.
    """
    read = read or (lambda tokens: unroll(model, tokens)[0])
    steps = many(steps)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98),
                                  weight_decay=weight_decay)
    log, start = Learning(), time.process_time()
    level, right = (1 if grow else levels), 0.0
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50, 2 * (1 - step / steps))
        tokens, letters = sample(level, batch, generator)
        logits = read(tokens)[:, -letters.size(1):]
        loss = F.cross_entropy(logits.flatten(0, 1), letters.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = (logits.argmax(-1) == letters).double().mean().item()
        right += 0.05 * (share - right)
        log.right.append(right)
        log.level.append(level)
        if right > grow_at and level < levels:
            level, right = level + 1, 0.0
    log.seconds = time.process_time() - start
    model.eval()
    return log


@torch.no_grad()
def by_place(read, tokens, letters):
    """Share of right letters at each place of the answer, after the right ones before it."""
    answer = read(tokens)[:, -letters.size(1):].argmax(-1)
    return (answer == letters).double().mean(0)


def recite(model, letters, state=None, n=None):
    """What an RMT answers to messages (B, n), each letter after its own, not after the right ones.

    With a state, the letters were read before, and only the bar is read here.
    """
    prompt = torch.full((len(letters), 1), BAR)
    if state is None:
        prompt = torch.cat([letters, prompt], dim=1)
    return generate(model, prompt, n or letters.size(1), state, temperature=0)


def language(variant):
    """A model that has read Python's standard library for half a minute, its settings, its text.

    It runs train_lm.py with 600 steps, as you would in a terminal; a cache has four positions, so
    that it passes on as many numbers as eight memory tokens.
    """
    import train_lm

    root = Path(train_lm.__file__).parent
    short_run = f"--steps 40 --batch 8 --data {shlex.quote(str(root / 'rmt.py'))}"
    flags = short_run if FAST else "--steps 600"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "train_lm.py", *shlex.split(flags), "--model", variant,
                   "--baseline", "none", "--cache-len", "4", "--seed", str(SEED),
                   "--eval-every", "600", "--device", "cpu", "--out", str(out)]
        run = subprocess.run(command, cwd=root, text=True, encoding="utf-8", stdout=subprocess.PIPE,
                             env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        print(re.findall(rf"^{variant}: .* CPU seconds of training$", run.stdout, re.MULTILINE)[-1])
        saved = torch.load(out / f"{variant}.pt", weights_only=True)
    args = argparse.Namespace(**saved["flags"])
    corpus = train_lm.Text(train_lm.read(args.data))
    model = train_lm.build(args, variant, len(corpus.vocabulary))
    model.load_state_dict(saved["model"])
    return model.eval(), args, corpus


# ==================================================================================================
# Instruments: what notebooks measure, and you need not build yourself


def count_lines(*things):
    """Lines of code of functions and classes, without blank lines, comments and docstrings."""
    total = 0
    for thing in things:
        if inspect.isclass(thing):  # the source of a class is not always found in a notebook
            methods = [method for method in vars(thing).values() if inspect.isfunction(method)]
            total += 1 + count_lines(*methods)
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
        (function,) = tree.body
        if ast.get_docstring(function) is not None:
            function.body = function.body[1:]
        total += len(ast.unparse(tree).splitlines())
    return total


def small_model(variant, **options):
    """An untrained model in float64, so that what is not connected has exactly no effect."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "segment_len": 4, "n_mem": 2, "d_model": 32, "cache_len": 4}
    model = RMT(Config(variant, **(sizes | options))).double().eval()
    for name, weight in model.named_parameters():
        if name.endswith("w_v.weight"):  # an untrained armt writes nothing: give it a voice
            torch.nn.init.normal_(weight, std=0.05)
    return model


@torch.no_grad()
def influence(model, tokens):
    """(pages, pages): how much replacing page t (column) changes the outputs on page s (row)."""
    T, V = model.config.segment_len, model.config.vocab_size
    page_of = torch.arange(tokens.size(1)) // T
    logits, _ = unroll(model, tokens)
    columns = []
    for t in range(tokens.size(1) // T):
        replaced = torch.where(page_of == t, (tokens + 1) % V, tokens)
        change = (unroll(model, replaced)[0] - logits).unflatten(1, (-1, T))
        columns.append(change.square().mean(dim=(0, 2, 3)).sqrt())
    return torch.stack(columns, dim=1)


def gradient_reach(model, tokens, depth=None, read=None):
    """(pages, pages): the norm of the gradient that the loss on page s (row) has at the embedded
    letters of page t (column).

    read(model, tokens, depth) -> logits; default: unroll the model with this bptt_depth.
    """
    if read is None:
        def read(model, tokens, depth):
            return unroll(model, tokens, bptt_depth=depth)[0]
    embedded = []  # one tensor per page
    hook = model.embed.register_forward_hook(lambda layer, given, out: embedded.append(out))
    logits = read(model, tokens, depth)
    hook.remove()
    T, rows = model.config.segment_len, []
    for page_logits, page in zip(logits.split(T, dim=1), tokens.split(T, dim=1), strict=True):
        loss = F.cross_entropy(page_logits.flatten(0, 1), page.flatten())
        gradients = torch.autograd.grad(loss, embedded, retain_graph=True, materialize_grads=True)
        rows.append(torch.stack([gradient.norm() for gradient in gradients]))
    return torch.stack(rows)


def peak_kept(model, run, *arguments):
    """MB that autograd keeps for the backward pass, at the highest while run(*arguments) runs.

    Weights are not counted: they are there anyway.
    """
    own = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    held = {}  # (address, bytes) of a storage: how many saved tensors use it
    peak = 0

    class Kept:
        def __init__(self, tensor):
            nonlocal peak
            storage = tensor.untyped_storage()
            self.tensor, self.place = tensor, (storage.data_ptr(), storage.nbytes())
            if storage.data_ptr() not in own:
                held[self.place] = held.get(self.place, 0) + 1
                peak = max(peak, sum(size for _, size in held))

        def __del__(self):  # the backward pass has used this tensor
            if self.place in held:
                held[self.place] -= 1
                if held[self.place] == 0:
                    del held[self.place]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run(*arguments)
    return peak / 1e6


def backward_at_cuts(model, tokens, depth):
    """Truncated backpropagation with a backward pass at every cut, not only at the end."""
    group_len = model.config.segment_len * (depth + 1)
    state = model.initial_state(len(tokens))
    for group in tokens.split(group_len, dim=1):
        logits, state = unroll(model, group, state)
        F.cross_entropy(logits.flatten(0, 1), group.flatten()).backward()
        state = state.detach()


@torch.no_grad()
def segments_back(variant, n_layer=2, cache_len=8, segment_len=4):
    """How many of the last eight segments change the outputs of the next one, if replaced?"""
    model = small_model(variant, n_layer=n_layer, cache_len=cache_len, segment_len=segment_len)
    tokens = torch.randint(11, (1, 9 * segment_len), generator=torch.Generator().manual_seed(0))
    influences = influence(model, tokens)[8, :8]
    return int((influences > 0).sum())


# ==================================================================================================
# Pictures: for a slide, readable from the last row

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#B87F00"
PURPLE, BLACK, PALE = "#CC79A7", "#000000", "#CBE6F7"
LOOKS = [(BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"),
         (BLACK, "x", "-"), (ORANGE, "v", "--")]
plt.rcParams.update({
    "font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "legend.fontsize": 12,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "lines.linewidth": 2, "lines.markersize": 7, "svg.fonttype": "none", "svg.hashsalt": "rmt",
})


def show(figure, caption):
    """Show a figure. Its caption says what to see, and is its alternative text too."""
    keep(figure, caption)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=80)
    plt.close(figure)
    png = base64.b64encode(data.getvalue()).decode()
    display_captioned("image/png", png, caption)


def picture(name, caption):
    """Show a drawing from assets/, with its caption."""
    drawing = (HERE.parent / "assets" / f"{name}.svg").read_text(encoding="utf-8")
    display_captioned("image/svg+xml", drawing, caption)


def display_captioned(kind, data, caption):
    """An image with its caption below, which is its alternative text too."""
    display({kind: data, "text/plain": caption}, raw=True, metadata={kind: {"alt": caption}})
    display(Markdown(f"**What to see:** {caption}"))


def keep(figure, caption):
    """Where RMT_FIGURES names a folder, keep the figure there: 1.svg, 1.png for slides, 1.txt."""
    if "RMT_FIGURES" in os.environ:
        folder = Path(os.environ["RMT_FIGURES"])
        number = len(list(folder.glob("*.txt"))) + 1
        for kind in ("svg", "png"):
            figure.savefig(folder / f"{number}.{kind}", dpi=200)
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")


def draw_lines(curves, title, xlabel, ylabel, **axis_settings):
    """Lines {label: (x, y)}, each with a colour, a marker and a line of its own."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for (label, (x, y)), (color, marker, line) in zip(curves.items(), LOOKS, strict=False):
        every = max(1, len(x) // 16)
        axis.plot(x, y, line, color=color, marker=marker, markevery=every, label=label)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, **axis_settings)
    if len(curves) > 1:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_bars(groups, title, ylabel, labels):
    """Bars {group: one height per label} side by side, with their numbers."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(labels)
    hatches = ["", "//", "..", "xx"]
    for i, (label, (color, _, _)) in enumerate(zip(labels, LOOKS, strict=False)):
        places = [group + (i - (len(labels) - 1) / 2) * width for group in range(len(groups))]
        heights = [values[i] for values in groups.values()]
        bars = axis.bar(places, heights, width, color=color, label=label, hatch=hatches[i % 4],
                        edgecolor="white")
        axis.bar_label(bars, fmt="%.2f", padding=2)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set(title=title, ylabel=ylabel, ylim=(0, 1.12))
    if len(labels) > 1:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_grids(matrices, xlabel, ylabel, xticks=None, yticks=None, numbers=False, borders=None):
    """Matrices {title: (rows, columns)} of numbers from 0, white, to 1, black, side by side."""
    sizes = [len(matrix[0]) for matrix in matrices.values()]
    figure, axes = plt.subplots(
        1, len(matrices), figsize=(2 + 0.42 * sum(sizes) + 0.6 * len(sizes), 4.6), sharey=True,
        layout="constrained", squeeze=False, gridspec_kw={"width_ratios": sizes})
    for axis, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
        matrix = torch.as_tensor(matrix).double()
        axis.imshow(matrix.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
        rows, columns = matrix.shape
        axis.set_xticks(range(columns), xticks or range(1, columns + 1))
        axis.set_yticks(range(rows), yticks or range(1, rows + 1))
        axis.set(title=title, xlabel=xlabel)
        for border in borders or []:
            axis.axvline(border - 0.5, color=VERMILION, linestyle=":")
        if numbers:
            for row, column in torch.cartesian_prod(torch.arange(rows), torch.arange(columns)):
                value = matrix[row, column].item()
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=10,
                          color="white" if value > 0.5 else "black")
    axes[0, 0].set_ylabel(ylabel)
    return figure


def draw_mask(mask, n_read, n_write):
    """A mask: rows look, columns are seen, a filled cell may be looked at."""
    n = len(mask)
    names = ["r"] * n_read + ["t"] * (n - n_read - n_write) + ["w"] * n_write
    figure, axis = plt.subplots(figsize=(4.6, 4.6), layout="constrained")
    axis.pcolormesh(mask.double().flip(0).numpy(), cmap="Blues", vmin=0, vmax=1.4,
                    edgecolors="white", linewidth=2)
    axis.set_xticks([i + 0.5 for i in range(n)], names)
    axis.set_yticks([i + 0.5 for i in range(n)], names[::-1])
    axis.set(title="who may look at whom", xlabel="is seen", ylabel="looks", aspect="equal")
    axis.tick_params(length=0)
    return figure


def draw_reach(cases):
    """Gradient above, influence below, of cases (variant, depth, gradient, influence), in logs."""
    figure, axes = plt.subplots(2, len(cases), figsize=(14, 4.8), layout="constrained",
                                sharex=True, sharey=True, squeeze=False)
    for (variant, depth, *matrices), column in zip(cases, axes.T, strict=True):
        for axis, matrix in zip(column, matrices, strict=True):
            shade = (matrix / matrix.max()).log10().clamp(min=-4)  # -inf where there is nothing
            axis.imshow(shade.numpy(), cmap="Greys", vmin=-4, vmax=0)
            axis.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
        column[0].set_title(variant if depth is None else f"{variant}, depth {depth}")
        column[1].set_xlabel("page t")
    axes[0, 0].set_ylabel("gradient of the\nloss on page s")
    axes[1, 0].set_ylabel("influence on the\noutputs on page s")
    return figure


def draw_film(letters, panels, T=4):
    """What a probe reads in the memory after each page, a column per page, panels side by side.

    letters  the message (n,), read on pages of T and then said
    panels   {title: (readings (pages, n) of letters, -1 where none is found; after how many pages
             the memory was changed, or None; and where it was swapped, the other message (n,))}
    """
    n = len(letters)
    bar = n // T
    looks = {  # colour of the cell, of the letter, and its weight
        "a letter of the message": (PALE, "black", "normal"),
        "of the other message": (ORANGE, "black", "bold"),
        "another letter": (BLACK, "white", "bold"),
    }
    drawn = set()
    figure, axes = plt.subplots(1, len(panels), figsize=(8.65, 6), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, (title, (readings, cut, *other)) in zip(axes[0], panels.items(), strict=True):
        pages = len(readings)
        for page, place in (readings >= 0).nonzero().tolist():
            letter = readings[page, place]
            known = [letters[place], *(message[place] for message in other)]
            kind = known.index(letter) if letter in known else 2
            label = list(looks)[kind]
            drawn.add(label)
            cell, ink, weight = looks[label]
            axis.add_patch(plt.Rectangle((page, place), 1, 1, facecolor=cell, edgecolor="white",
                                         linewidth=2))
            axis.text(page + 0.5, place + 0.5, LETTERS[letter], color=ink, weight=weight,
                      ha="center", va="center")
        for border in range(T, n, T):
            axis.axhline(border, color="0.4", linewidth=1)
        axis.axvline(bar, color="black", linestyle=":", label="the bar: from here she answers")
        axis.axvline(cut or -1, color=VERMILION, linewidth=4, label="memory burnt or swapped")
        axis.set(xlim=(0, pages), ylim=(n, 0), xlabel="after page",
                 xticks=[page + 0.5 for page in range(pages)], xticklabels=range(1, pages + 1))
        axis.set_title(title.replace(" with ", " with\n"), loc="left", fontsize=12)
        axis.tick_params(length=0)
    axes[0, 0].set_yticks([place + 0.5 for place in range(n)],
                          [f"{place + 1}  {LETTERS[v]}" for place, v in enumerate(letters)])
    axes[0, 0].set_ylabel("place in the message, and its letter")
    handles, _ = axes[0, 0].get_legend_handles_labels()
    for label, (cell, _, _) in looks.items():
        if label in drawn:
            handles.append(plt.Rectangle((0, 0), 1, 1, facecolor=cell, label=label))
    handles.append(plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="0.4",
                                 label="none found"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def draw_masks(models):
    """The masks of models {title: RMT} side by side, in cells of one size, blocks by letter."""
    figure, axis = plt.subplots(figsize=(13, 2.9), layout="constrained")
    left = bottom = 0
    for title, model in models.items():
        T = model.config.segment_len
        mask = model.mask(T, model.n_cache) == 0
        rows, columns = mask.shape
        parts = {"c": model.n_cache, "r": model.n_read, "t": T, "w": model.n_write}
        names = "".join(name * n for name, n in parts.items())
        colors = dict(zip("rctw", (BLUE, ORANGE, BLACK, VERMILION), strict=True))
        for j, name in enumerate(names):
            axis.text(left + j + 0.5, -0.2, name, color=colors[name], ha="center", va="bottom")
            for i in range(rows):
                face = colors[name] if mask[i, j] else "0.94"
                axis.add_patch(plt.Rectangle((left + j, i), 1, 1, facecolor=face,
                                             edgecolor="white", linewidth=1.5))
        for i, name in enumerate(names.replace("c", "")):
            axis.text(left - 0.2, i + 0.5, name, color=colors[name], ha="right", va="center")
        axis.text(left, -1.5, title, va="bottom")
        left, bottom = left + max(columns, 7.5) + 2, max(bottom, rows)
    axis.set(xlim=(-1, left - 2), ylim=(bottom, -3), aspect="equal")
    axis.axis("off")
    return figure


def draw_schedules(schedules):
    """Schedules {title: steps, each a list of (layer, segment)}: which step runs which cell."""
    figure, axes = plt.subplots(1, len(schedules), figsize=(13, 3.4), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, (title, steps) in zip(axes[0], schedules.items(), strict=True):
        cells = [(layer, segment, i) for i, step in enumerate(steps) for layer, segment in step]
        for layer, segment, i in cells:
            shade = i / len(steps)
            axis.add_patch(plt.Rectangle((segment - 0.5, layer - 0.5), 1, 1, edgecolor="white",
                                         facecolor=plt.cm.Blues(0.1 + 0.9 * shade), linewidth=2))
            axis.text(segment, layer, i + 1, ha="center", va="center", fontsize=14,
                      color="white" if shade > 0.6 else "black")
        n_layers, n_segments, _ = (max(column) + 1 for column in zip(*cells, strict=True))
        axis.set(xlim=(-0.5, n_segments - 0.5), ylim=(-0.5, n_layers - 0.5),
                 xticks=range(n_segments), yticks=range(n_layers), xlabel="segment",
                 title=f"{title}: {len(steps)} steps")
        axis.tick_params(length=0)
    axes[0, 0].set_ylabel("layer")
    return figure


def scrub(memories, read, caption):
    """Memories (pages, cards, width) page by page, to be moved through with a slider, and a still.

    The title says what a probe reads, letters (pages, places), -1 where it is not sure.
    """
    largest = memories.abs().max().item()

    def draw(page):
        axis.clear()
        axis.imshow(memories[page].numpy(), cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto")
        letters = "".join("." if letter < 0 else LETTERS[letter] for letter in read[page].tolist())
        axis.set(title=f"after page {page + 1} a probe reads {letters}", xlabel="channel",
                 ylabel="card")
        axis.set_yticks(range(memories.size(1)), range(1, memories.size(1) + 1))

    figure, axis = plt.subplots(figsize=(9, 2.8), dpi=60, layout="constrained")
    film = FuncAnimation(figure, draw, frames=len(memories), interval=1000)
    player = film.to_jshtml(default_mode="once")
    draw(len(memories) // 2 - 1)
    show(figure, caption)
    display(HTML(player))


if __name__ == "__main__":
    try:
        from teacher import main
    except ImportError:
        sys.exit("teacher.py is not here: run this in the full repository, not in a class copy")
    main(sys.argv[1:])
