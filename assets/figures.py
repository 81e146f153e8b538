"""Draw the README's pictures from the recorded results.

    python assets/figures.py                                      draws assets/*.png from assets/results/*.json, and
                                                                  prints the README's tables
    python assets/figures.py gather length out/*/result.json      puts results of the scripts into one record

The scripts take the pictures of a run from here.
"""
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

ASSETS = Path(__file__).parent


def gather(name, paths):
    """One line per run in assets/results/NAME.json, numbers to six digits."""
    runs = [json.loads(Path(p).read_text(), parse_float=lambda x: float(f"{float(x):.6g}")) for p in sorted(paths)]
    lines = ",\n".join(json.dumps(run) for run in runs)
    (ASSETS / "results" / f"{name}.json").write_text(f"[\n{lines}\n]\n")


def record(name, **flags):
    """The runs of one record that were made with these flags."""
    runs = json.loads((ASSETS / "results" / f"{name}.json").read_text())
    return [run for run in runs if all(run["flags"][name] == value for name, value in flags.items())]


def spread(numbers, digits=3):
    """The smallest and the largest of the seeds, as 0.996-1.000; nothing where there is none."""
    return "–".join(dict.fromkeys(f"{n:.{digits}f}" for n in (min(numbers), max(numbers)))) if numbers else ""


LENGTH = {  # noise in training, and the published accuracy at 4,096 segments, read off a figure of [RMT-1M]
    "memorize": (1.0, 0.906), "detect": (0.6, 0.961)}


def tables():
    """The README's tables, line by line."""
    paper = {("copy", "rmt"): "1.00", ("copy", "transformer_xl"): ".28", ("copy", "transformer"): ".10",
             ("reverse", "rmt"): ".90", ("reverse", "transformer_xl"): ".67", ("reverse", "transformer"): ".10"}
    yield "| task | `--model` | teacher-forced | free-running | CPU seconds | paper |"
    yield "|---|---|---|---|---|---|"
    for task, segments in (("copy", "9"), ("reverse", "6")):
        for model in ("rmt", "rmt_xl", "transformer_xl", "mem_transformer", "transformer"):
            runs = [run["results"][model] for run in record("copying", task=task, model=model)]
            forced, free = ([run[segments][how] for run in runs] for how in ("teacher_forced", "free_running"))
            seconds = spread([run["cpu_seconds"] for run in runs], 0)
            yield (f"| {task}, {segments} segments | `{model}` | {spread(forced)} | {spread(free)} | {seconds} | "
                   f"{paper.get((task, model), '')} |")
    yield "| task | noise in training | 8 segments | 64 | 1,024 | 4,096 | paper, 4,096 |"
    yield "|---|---|---|---|---|---|---|"
    for task, (most, published) in LENGTH.items():
        for noise in (most, 0.0):
            runs = [run["results"]["rmt"] for run in record("length", task=task, memory_noise=noise)]
            scores = " | ".join(spread([run[n]["teacher_forced"] for run in runs]) for n in ("8", "64", "1024", "4096"))
            yield f"| {task} | {noise} | {scores} | {f'{published:.3f}'.lstrip('0')} |"


ASSOCIATIVE = {  # what the associative tables call a model: its flags, its line
    "`armt`, delta": ({"model": "armt", "update": "delta"}, "o-", "0"),
    "`armt`, armt": ({"model": "armt", "update": "armt"}, "s--", "0.35"),
    "`armt`, hebbian": ({"model": "armt", "update": "hebbian"}, "x:", "0.35"),
    "`rmt`, as large": ({"model": "rmt"}, "^-", "0.6"), "`rmt`, M 8": ({"model": "rmt", "n_mem": 8}, "^:", "0.6"),
    "`transformer_xl`": ({"model": "transformer_xl"}, "v:", "0.6")}
LENGTHS = {  # tasks of the associative tables, and the segments of a sample: as in training, and longer
    "rewrite": (13, 513, 1001), "detect": (8, 1000), "facts": (8, 1000), "remember": (9, 17, 33, 65)}


def associative(task, name):
    """The result of each seed of one task and one model, by number of segments."""
    runs = record("associative", task=task, **ASSOCIATIVE[name][0])
    if name == "`rmt`, as large":
        runs = [run for run in runs if run["flags"]["n_mem"] > 8]
    return [run["results"][run["flags"]["model"]] for run in runs]


def held(accuracy, pairs, values=10):
    """Pairs held, from the share of right answers: guesses taken off [ARMT]."""
    return max(0, pairs * (values * accuracy - 1) / (values - 1))


def associative_tables():
    """The README's tables of the associative memory, line by line."""
    yield ("| `--model`, `--update` | floats | rewrite, 12 writes | 512 | 1,000 | detect, 8 segments | 1,000 "
           "| facts, 8 segments | 1,000 | CPU s |")
    yield "|---" * 10 + "|"
    for name in ASSOCIATIVE:
        cells, everything = [], []
        for task in ("rewrite", "detect", "facts"):
            runs = associative(task, name)
            cells += [spread([run[str(n)]["teacher_forced"] for run in runs]) for n in LENGTHS[task]]
            everything += runs
        floats, seconds = (spread([run[key] for run in everything], 0) for key in ("state_floats", "cpu_seconds"))
        yield f"| {name} | {floats} | {' | '.join(cells)} | {seconds} |"
    yield "| `--model`, `--update` | floats | 8 pairs | 16 | 32 | 64 | pairs held of 64 | CPU s |"
    yield "|---" * 8 + "|"
    for name in ASSOCIATIVE:
        runs = associative("remember", name)
        cells = [spread([run[str(n)]["teacher_forced"] for run in runs]) for n in LENGTHS["remember"]]
        cells += [spread([held(run["65"]["teacher_forced"], 64) for run in runs], 0),
                  spread([run["cpu_seconds"] for run in runs], 0)]
        floats = spread([run["state_floats"] for run in runs], 0)
        yield f"| {name} | {floats} | {' | '.join(cells)} |"


LANGUAGE = {  # what the language table calls a run: the flags in which it differs from RECIPE
    "`transformer`": {"model": "transformer"},
    "`transformer`, 1.5 times the steps": {"model": "transformer", "steps": 2250},
    "`transformer_xl`, C 4": {"model": "transformer_xl", "cache_len": 4},
    "`transformer_xl`, C 32": {"model": "transformer_xl"},
    "`rmt`, M 8": {},
    "`rmt_xl`, M 8, C 8": {"model": "rmt_xl", "cache_len": 8},
    "`rmt_xl`, M 8, C 32": {"model": "rmt_xl"}}
TRIES = {
    "`--memory-form norm`": {"memory_form": "norm"},
    "`--write-slot both`": {"write_slot": "both"},
    "`--write-slot memory`": {"write_slot": "memory"},
    "`--memory-form norm --write-slot both`": {"memory_form": "norm", "write_slot": "both"},
    "`--memory-form norm --write-slot memory`, the paper's": {"memory_form": "norm", "write_slot": "memory"},
    "`--n-mem 4`": {"n_mem": 4}, "`--n-mem 16`": {"n_mem": 16},
    "`--reset-every 8`": {"reset_every": 8}, "`--reset-every 0`, never": {"reset_every": 0},
    "`--memory-noise 0.3`": {"memory_noise": 0.3},
    "`--segments-per-step 1 --steps 3000`": {"segments_per_step": 1, "steps": 3000},
    "`--segments-per-step 4 --steps 750`": {"segments_per_step": 4, "steps": 750, "bptt_depth": 3},  # which is all
    "`--model mem_transformer`": {"model": "mem_transformer"}}
OTHERS = {
    "default": {}, "`--data shakespeare`": {"data": ["shakespeare"]},
    "`--segment-len 64 --batch 16`": {"segment_len": 64, "batch": 16}, "`--steps 6000`": {"steps": 6000}}
RECIPE = {"data": ["python"], "model": "rmt", "segment_len": 32, "cache_len": 32, "n_mem": 8, "memory_form": "raw",
          "write_slot": "embedding", "memory_noise": 0.0, "steps": 1500, "batch": 32, "segments_per_step": 2,
          "reset_every": 64, "bptt_depth": -1}


def language(**flags):
    """The result of each seed of train_lm.py's recipe with some flags changed."""
    runs = record("language", **RECIPE | flags)
    return [run["results"][run["flags"]["model"]] | {"seed": run["seed"]} for run in runs]


def bits(results, state="carried", places=None):
    """Bits per character of each seed, over all or at some places in the segment."""
    scores = [result[state] for result in results if state in result]
    pieces = [score["by_position"][places] if places else [score["bpc"]] for score in scores]
    return [sum(piece) / len(piece) for piece in pieces]


def by_position(results, state="carried"):
    """Bits per character at each position in the segment, mean of the seeds."""
    places = zip(*(result[state]["by_position"] for result in results), strict=True)
    return [sum(place) / len(place) for place in places]


def language_cells(results):
    """The cells of bits per character that the tables of language models share."""
    return [spread(bits(results, *how)) for how in (
        (), ("carried", slice(8)), ("carried", slice(8, None)), ("reset",), ("of another stream",))]


def language_tables():
    """The README's tables of train_lm.py, line by line."""
    yield "| model | floats | all | first 8 | the rest | reset | another's | CPU s |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, flags in LANGUAGE.items():
        runs = language(**flags)
        cells, seconds = language_cells(runs), spread([run["seconds"] for run in runs], 0)
        yield f"| {name} | {runs[0]['carried']['state_floats']} | {' | '.join(cells)} | {seconds} |"
    names = ("`transformer`", "`transformer_xl`, C 4", "`rmt`, M 8", "`rmt_xl`, M 8, C 8")
    yield f"| setting | {' | '.join(names)} |"
    yield "|---|---|---|---|---|"
    for setting, flags in OTHERS.items():
        cells = [spread(bits(language(**LANGUAGE[name] | flags))) for name in names]
        yield f"| {setting} | {' | '.join(cells)} |"
    yield "| `--bptt-depth` | all | first 8 | the rest |"
    yield "|---|---|---|---|"
    for depth in range(4):
        runs = language(segments_per_step=4, steps=750, bptt_depth=depth)
        cells = [spread(bits(runs, "carried", places)) for places in (None, slice(8), slice(8, None))]
        yield f"| {depth} | {' | '.join(cells)} |"
    yield "| changed, seed 0 | all | worse by |"
    yield "|---|---|---|"
    (base,) = (bits([run])[0] for run in language() if run["seed"] == 0)
    for name, flags in TRIES.items():
        (tried,) = (bits([run])[0] for run in language(**flags) if run["seed"] == 0)
        yield f"| {name} | {tried:.3f} | {tried - base:+.3f} |"


def draw_language():
    """Left, bits per character by position in the segment; right, over bptt_depth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=(3, 2))
    for name, line, color in (("`transformer`", "-", "0.6"), ("`transformer_xl`, C 4", "--", "0.4"),
                              ("`rmt`, M 8", "-o", "0"), ("`rmt_xl`, M 8, C 8", ":s", "0.3")):
        mean = by_position(language(**LANGUAGE[name]))
        left.plot(range(1, 33), mean, line, color=color, markersize=3, linewidth=1, label=name.replace("`", ""))
        above = ", ".join(f"{bit:.2f}" for bit in mean if bit > 2.9)
        if above:
            left.text(3.2, 2.84, f"{name.replace('`', '')} begins with {above}", fontsize=8, color=color)
    left.set(xlabel="position in the segment, characters", ylabel="bits per character", title="mean of three seeds",
             ylim=(2.1, 2.9))
    for depth in range(4):
        scores = bits(language(segments_per_step=4, steps=750, bptt_depth=depth))
        right.plot([depth] * len(scores), scores, "o", color="0", markersize=4)
    right.set(xlabel="bptt_depth, boundaries", xticks=range(4), title="rmt, 4 segments per step, three seeds")
    left.legend(fontsize=8, loc="center right")
    save(figure, "language")


FAMILY = {  # what the table of the Memory Transformer's forms calls a model: its flags, its line
    "`rmt`": ({"model": "rmt"}, "-o", "0"),
    "`mem_controller`": ({"model": "mem_controller"}, "--", "0.4"),
    "`mem_bottleneck`, window 8": ({"model": "mem_bottleneck", "window": 8}, "-s", "0.55"),
    "`mem_bottleneck`, window 2": ({"model": "mem_bottleneck", "window": 2}, ":v", "0.7"),
    "`mem_bottleneck`, window 0": ({"model": "mem_bottleneck", "window": 0}, ":^", "0.4")}


def family(name, script):
    """The result of each seed of one model of FAMILY, by train_copy.py or train_lm.py."""
    flags, _, _ = FAMILY[name]
    runs = [run for run in record("family", **flags) if script in run["command"]]
    return [run["results"][flags["model"]] for run in runs]


def family_tables():
    """The README's table of the Memory Transformer's forms, line by line."""
    yield ("| `--model` | copy, 9 segments | free-running | CPU s | language, all | first 8 | the rest | reset "
           "| another's | CPU s |")
    yield "|---" * 10 + "|"
    for name in FAMILY:
        copy, text = family(name, "train_copy.py"), family(name, "train_lm.py")
        cells = [spread([run["9"][how] for run in copy]) for how in ("teacher_forced", "free_running")]
        cells += [spread([run["cpu_seconds"] for run in copy], 0), *language_cells(text)]
        yield f"| {name} | {' | '.join(cells)} | {spread([run['seconds'] for run in text], 0)} |"


def draw_family():
    """Left, bits per character by position in the segment; right, what a reset of the memory costs there."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, (_, line, color) in FAMILY.items():
        runs = family(name, "train_lm.py")
        carried, reset = by_position(runs), by_position(runs, "reset")
        style = {"color": color, "markersize": 3, "linewidth": 1, "label": name.replace("`", "")}
        left.plot(range(1, 33), carried, line, **style)
        right.plot(range(1, 33), [b - a for a, b in zip(carried, reset, strict=True)], line, **style)
    left.set(xlabel="position in the segment, characters", ylabel="bits per character", title="mean of three seeds")
    right.set(xlabel="position in the segment, characters", ylabel="more bits with the memory reset", yscale="log",
              title="what memory is worth")
    right.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    left.legend(fontsize=8)
    save(figure, "family")


def save(figure, name):
    """Write assets/NAME.png."""
    figure.savefig(ASSETS / f"{name}.png", dpi=100)
    plt.close(figure)


def draw_training(args, runs):
    """The losses, and the accuracy for each number of segments while it is trained."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for line, (name, run) in zip(("-", "--"), runs.items(), strict=False):
        left.plot([row[1] for row in run["rows"]], [row[3] for row in run["rows"]], line, color="black", label=name)
        for i, n in enumerate(run["accuracy"]):
            rows = [row for row in run["rows"] if args.curriculum == "random" or row[2] == n]  # while n is trained
            if rows:
                shade = str(0.7 - 0.7 * (i + 1) / len(run["accuracy"]))
                right.plot([row[1] for row in rows], [row[4 + i] for row in rows], line, color=shade,
                           label=f"{name}, {n} segments")
    right.axhline(1 / args.symbols, color="0.6", linestyle=":", label="chance")
    left.set(xlabel="training step", ylabel="loss, nats per answer symbol", title=f"{args.task}, seed {args.seed}")
    right.set(xlabel="training step", ylabel="answer symbols right", ylim=(0, 1.03), title="by number of segments")
    left.legend(fontsize=8)
    right.legend(fontsize=7)
    return figure


def draw_attention(model, tokens, n_answer, text):
    """The weights, the largest of all heads, of the first segment (a write) and the one where the answer begins.

    tokens (1, length), whose last n_answer outputs are the answer; text is a function that writes tokens as characters.
    """
    from rmt import attention_maps
    T, n_layer, state = model.config.segment_len, model.config.n_layer, model.initial_state(1)
    answer = (tokens.size(1) - n_answer) // T
    figure, axes = plt.subplots(2, n_layer, squeeze=False, figsize=(4 * n_layer, 7.6), layout="constrained")
    for s, segment in enumerate(tokens.split(T, dim=1)[:answer + 1]):
        if s in (0, answer):
            weights, widths = attention_maps(model, segment, state)
            for layer, axis in enumerate(axes[int(s > 0)]):
                written = text(segment[0])
                name = written if len(written) <= 20 else "tokens"
                draw_map(axis, weights[layer, 0].amax(0), widths, ("read", "cache", name, "write"))
                axis.set_title(f"{'write' if s == 0 else 'read'}: segment {s + 1}, layer {layer + 1}")
        _, state = model(segment, state)
        state = state.detach()
    return figure


def draw_loss(runs):
    """Bits per character over the characters read, in training and on the validation part."""
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for shade, (name, run) in zip(("0", "0.6"), runs.items(), strict=False):
        rows = [row for row in run["rows"] if row[2] > 0.05 * run["rows"][-1][2]]
        axis.plot([row[2] for row in rows], [row[4] for row in rows], color=shade, lw=1, label=f"{name}, training")
        rows = [row for row in rows if row[5] != ""]
        axis.plot([row[2] for row in rows], [row[5] for row in rows], "o--", color=shade, label=f"{name}, validation")
    axis.set(xlabel="characters read", ylabel="bits per character")
    axis.legend(fontsize=8)
    return figure


def draw_position(results):
    """Bits per character of the test part by position in the segment, with the state carried and with it reset."""
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for shade, (name, result) in zip(("0", "0.6"), results.items(), strict=False):
        for state, line in (("carried", "-o"), ("reset", ":")):
            if state in result:
                bits = result[state]["by_position"]
                label = f"{name}, state {state}" if "reset" in result else name
                axis.plot(range(1, len(bits) + 1), bits, line, color=shade, markersize=3, linewidth=1, label=label)
    axis.set(xlabel="position in the segment, characters", ylabel="bits per character")
    axis.legend(fontsize=8)
    return figure


def draw_map(axis, weights, widths, names):
    """One attention matrix or mask, with borders and names of its blocks of columns and of rows (no cache there)."""
    axis.imshow(weights.cpu().numpy(), cmap="Greys", vmin=0, vmax=1)
    axis.set(xlabel="seen", ylabel="looks")
    for sizes, line, ticks in ((widths, axis.axvline, axis.set_xticks),
                               ([widths[0], 0, *widths[2:]], axis.axhline, axis.set_yticks)):
        starts = [sum(sizes[:i]) - 0.5 for i in range(4)]
        for start in starts[1:]:
            line(start, color="black", linewidth=0.8)
        ticks([start + size / 2 for start, size in zip(starts, sizes, strict=True) if size],
              [name for name, size in zip(names, sizes, strict=True) if size])


def draw_masks():
    """The mask of every variant, with a full cache, as segment_mask makes it; and a bottleneck with a window."""
    from rmt import RMT, VARIANTS, Config
    shown, n_tokens = dict.fromkeys(VARIANTS, 0) | {"mem_bottleneck, window 2": 2}, 5
    n_rows = -(-len(shown) // 7)
    figure, axes = plt.subplots(n_rows, 7, figsize=(15, 2.5 * n_rows), layout="constrained")
    for axis in axes.flat[len(shown):]:
        axis.axis("off")
    for axis, (name, window) in zip(axes.flat, shown.items(), strict=False):
        model = RMT(Config(name.split(",")[0], segment_len=n_tokens, n_mem=2, cache_len=3, window=window))
        sizes = [model.n_read, model.n_cache, n_tokens, model.n_write]
        mask = model.mask(n_tokens, model.n_cache)
        draw_map(axis, 0.65 * mask, sizes, ("read", "cache", "tokens", "write"))
        axis.xaxis.remove_overlapping_locs = axis.yaxis.remove_overlapping_locs = False
        axis.set_xticks([i + 0.5 for i in range(mask.size(1))], minor=True)
        axis.set_yticks([i + 0.5 for i in range(mask.size(0))], minor=True)
        axis.grid(which="minor", color="1", linewidth=0.6)
        axis.tick_params(which="both", length=0, labelsize=8)
        axis.set_title(name, fontsize=8)
    return figure


def draw_method():
    """Three segments, the memory handed over the top, the carry handed on inside each layer."""
    figure, axis = plt.subplots(figsize=(10, 3.5), layout="constrained")
    for s in range(3):
        x = 4.2 * s
        for layer in range(2):
            axis.add_patch(plt.Rectangle((x, 1 + layer), 3, 0.8, facecolor="0.93", edgecolor="black"))
            axis.text(x + 1.5, 1.4 + layer, f"layer {layer + 1}", ha="center", va="center", fontsize=9)
            if s < 2:
                axis.annotate("", (x + 4.2, 1.4 + layer), (x + 3, 1.4 + layer),
                              arrowprops={"arrowstyle": "->", "linestyle": ":"})
        for i, (name, shade) in enumerate([("read", "0.6"), ("tokens", "1"), ("write", "0.6")]):
            axis.add_patch(plt.Rectangle((x + i, 0.2), 1, 0.5, facecolor=shade, edgecolor="black"))
            axis.text(x + i + 0.5, 0.45, name, ha="center", va="center", fontsize=9)
            axis.annotate("", (x + i + 0.5, 1), (x + i + 0.5, 0.7), arrowprops={"arrowstyle": "-", "color": "0.5"})
        axis.text(x + 1.5, 3.2, "logits", ha="center", va="center", fontsize=9)
        axis.annotate("", (x + 1.5, 3.05), (x + 1.5, 2.8), arrowprops={"arrowstyle": "->", "color": "0.5"})
        axis.text(x + 1.5, -0.15, f"segment {s + 1}", ha="center", va="center", fontsize=10)
        if s < 2:
            axis.plot([x + 2.5, x + 2.5, x + 3.6, x + 3.6, x + 4.7], [2.8, 3.0, 3.0, -0.5, -0.5], color="black", lw=2)
            for end in (4.7, 6.7):
                axis.plot([x + 4.7, x + end, x + end], [-0.5, -0.5, -0.1], color="black", lw=2)
                axis.annotate("", (x + end, 0.2), (x + end, -0.2), arrowprops={"arrowstyle": "-|>", "lw": 2})
    axis.text(3.6, 3.25, "memory: the output of the write\nrows, over the top (RMT)", ha="center", fontsize=8.5)
    axis.text(7.8, 3.25, "carry: inside each layer, dotted\n(Transformer-XL, ARMT)", ha="center", fontsize=8.5)
    axis.set(xlim=(-0.2, 11.6), ylim=(-0.7, 3.9))
    axis.axis("off")
    save(figure, "method")


def draw_length():
    """Accuracy of memorize and detect over the number of segments, with and without noise on the memory."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, (task, (most, published)) in zip(axes, LENGTH.items(), strict=True):
        for noise, line, color in ((most, "-o", "black"), (0.0, "--s", "0.55")):
            runs = record("length", task=task, memory_noise=noise)
            for i, run in enumerate(runs):
                scores = {int(n): score["teacher_forced"] for n, score in run["results"]["rmt"].items() if n.isdigit()}
                label = f"noise {noise} in training, {len(runs)} seeds" if i == 0 else None
                axis.plot(scores.keys(), scores.values(), line, color=color, markersize=3, linewidth=1, label=label)
        axis.plot(4096, published, "k*", markersize=11, label="published, trained on 7 segments")
        axis.axvspan(2, 8, color="0.9", label="lengths seen in training")
        axis.axhline(0.1, color="0.6", linestyle=":", label="chance")
        axis.set(xlabel="segments of the sample", title=task, ylim=(0, 1.03))
        axis.set_xscale("log", base=2)
        axis.set_xticks([2, 8, 64, 512, 4096], ["2", "8", "64", "512", "4,096"])
    axes[0].set_ylabel("fact symbols right")
    for axis in axes:
        axis.legend(fontsize=8, loc="lower left")
    save(figure, "length")


def draw_associative():
    """Accuracy over length, with what was seen in training shaded, and pairs held over pairs shown."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, (task, lengths) in zip(axes, LENGTHS.items(), strict=True):
        for name, (_, line, color) in ASSOCIATIVE.items():
            for i, run in enumerate(associative(task, name)):
                points = {int(n): score["teacher_forced"] for n, score in run.items() if n.isdigit()}
                if task == "remember":
                    points = {n - 1: held(score, n - 1) for n, score in points.items()}
                axis.plot(points.keys(), points.values(), line, color=color, markersize=3, linewidth=1,
                          label=name.replace("`", "") if i == 0 else None)
        axis.set_xscale("log")
        if task == "remember":
            axis.axvspan(1, lengths[0] - 1, color="0.9")
            axis.plot([1, 64], [1, 64], color="0.6", linewidth=0.8, linestyle=":")
            axis.set(xlabel="pairs shown", title="remember: pairs held")
        else:
            axis.axvspan(2, lengths[0], color="0.9")
            axis.axhline(1 / 6 if task == "facts" else 0.1, color="0.6", linewidth=0.8, linestyle=":")
            axis.set(xlabel="segments of the sample", title=task, ylim=(0, 1.03))
    axes[0].set_ylabel("right answers")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    save(figure, "associative")


def draw_diagonal():
    """In which step each segment meets each layer: one after another, and along diagonals."""
    n_layer, n_segments = 4, 8
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for axis, name, wait in zip(axes, ("unroll", "unroll_diagonal"), (n_layer, 1), strict=True):
        steps = [[wait * s + layer for s in range(n_segments)] for layer in range(n_layer)]
        axis.imshow(steps, cmap="Greys", vmin=0, vmax=1.6 * steps[-1][-1], origin="lower")
        for layer, row in enumerate(steps):
            for s, step in enumerate(row):
                axis.text(s, layer, step, ha="center", va="center", fontsize=9)
        axis.set(xlabel="segment", ylabel="layer", xticks=range(n_segments), yticks=range(n_layer),
                 title=f"{name}: {steps[-1][-1] + 1} steps for {n_layer * n_segments} cells")
    save(figure, "diagonal")


def draw_staircase():
    """A fact D segments back is learned where bptt_depth reaches it; mixed distances need a depth of 1 only."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained",
                                         width_ratios=(2, 1))
    shades = {"1": "0", "2": "0.4", "3": "0.7"}
    for axis, curriculum in ((left, "fixed"), (right, "random")):
        runs = record("staircase", curriculum=curriculum)
        for i, distance in enumerate(sorted({run["flags"]["segments"] - 1 for run in runs})):
            here = [run for run in runs if run["flags"]["segments"] - 1 == distance]
            depths = [run["flags"]["bptt_depth"] for run in here]
            scores = [run["results"]["rmt"][str(distance + 1)]["teacher_forced"] for run in here]
            offset = 0.08 * (i - 1) if curriculum == "fixed" else 0
            name = f"D = {distance}" if curriculum == "fixed" else f"D = 1 .. {distance}, mixed; read at {distance}"
            axis.plot([d + offset for d in depths], scores, "os^"[i], label=name, alpha=0.8,
                      color=shades.get(str(distance), "0") if curriculum == "fixed" else "0")
        axis.axhline(0.1, color="0.6", linestyle=":")
        axis.set(xlabel="bptt_depth, boundaries", xticks=sorted({run["flags"]["bptt_depth"] for run in runs}))
        axis.legend(fontsize=8, loc="center right")
    left.set(ylabel="fact symbols right", title="the fact is always D segments back", ylim=(0, 1.05))
    right.set(title="distances mixed")
    save(figure, "staircase")


if __name__ == "__main__":
    if sys.argv[1:2] == ["gather"]:
        gather(sys.argv[2], sys.argv[3:])
    else:
        draw_method()
        draw_length()
        draw_staircase()
        draw_language()
        draw_associative()
        draw_diagonal()
        draw_family()
        save(draw_masks(), "masks")
        print("\n".join([*tables(), *language_tables(), *associative_tables(), *family_tables()]))
