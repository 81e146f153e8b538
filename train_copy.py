"""Train the Recurrent Memory Transformer on tasks that need memory, beside the same model without memory.

    python train_copy.py --target 0.99                          laptop, 3 minutes: copy 24 symbols over 9 segments;
                                                                rmt ends above 0.99, transformer at chance, 0.10
    python train_copy.py --task memorize --eval-segments 4096   laptop, 5 minutes: a fact read 4,096 segments later;
                                                                rmt ends above 0.99, transformer at chance
    python train_copy.py --task rewrite                         laptop, 3 minutes: four keys whose values change; armt
                                                                ends at 1.0, transformer near chance, 0.10
    python train_copy.py --task detect --model armt --segments 4 --weight-decay 1 --baseline none --eval-segments 131072
        --eval-samples 16                                       laptop, 12 minutes: a fact among a million tokens
    python train_copy.py --segment-len 40 --n-mem 40 --n-layer 4 --d-model 128 --batch 64 --steps 20000 --lr 1e-3
                                                                GPU: the paper's 120 symbols; not measured yet

Writes config.json, metrics.csv, checkpoint.pt, result.json, training.png and attention.png to --out.
"""
import math
import signal
import sys
import time

from assets.run import fail, fill, load, parse, save, setup, start, write_flags, write_report

# -------------------------------------------------------------------------------------------------------------- flags

COPYING = {"model": "rmt", "segment_len": 8, "n_mem": 8, "batch": 16, "steps": 900, "lr": 4e-3, "weight_decay": 0.01,
           "curriculum": "grow", "write_slot": "both", "memory_noise": 0.0}    # with the embedding all seeds learn
FACTS = {"model": "rmt", "segment_len": 8, "n_mem": 4, "batch": 32, "steps": 1000, "lr": 3e-3, "weight_decay": 0.01,
         "curriculum": "random", "write_slot": "memory", "memory_noise": 1.0}  # noise makes a fact last
PAIRS = {"model": "armt", "segment_len": 2, "n_mem": 4, "batch": 64, "steps": 1200, "lr": 3e-3, "weight_decay": 1.0,
         "curriculum": "grow", "write_slot": "memory", "memory_noise": 0.0}    # weight decay makes values last
RECIPES = {"copy": COPYING | {"segments": 9}, "reverse": COPYING | {"segments": 6},
           "memorize": FACTS | {"segments": 8}, "detect": FACTS | {"segments": 8, "steps": 2000, "memory_noise": 0.6},
           "retrieval": FACTS | {"segments": 3, "segment_len": 4, "batch": 64, "memory_noise": 0.0},
           "remember": PAIRS | {"segments": 9},
           "rewrite": PAIRS | {"segments": 13, "keys": 4, "n_mem": 2, "batch": 32, "steps": 600, "lr": 2e-3,
                               "curriculum": "random", "write_slot": "both"},
           "facts": PAIRS | {"segments": 8, "segment_len": 6, "steps": 800},
           "quadratic": COPYING | {"segments": 6, "segment_len": 30, "batch": 64, "curriculum": "fixed"}}
FLAGS = {  # group, flag, default (None: in the task's recipe), help
    "task": {
        "task": ("copy", "copy, reverse, retrieval, remember, rewrite, memorize, detect, facts or quadratic"),
        "symbols": (10, "different symbols"),
        "keys": (64, "different keys of remember; of rewrite, where the default is 4"),
        "facts": ("one", "what an answer of facts depends on: one fact, two, or relations between places"),
        "segments": (None, "segments of the longest training sample"),
        "segment_len": (None, "T, tokens per segment"),
        "curriculum": (None, "segments of a sample: grow (more when accuracy passes 0.75), random, or fixed")},
    "model": {
        "model": (None, "a row of VARIANTS in rmt.py"),
        "baseline": ("transformer", "a second row, trained in the same way, or none"),
        "n_layer": (2, "layers"),
        "n_head": (4, "heads"),
        "d_model": (64, "width"),
        "n_mem": (None, "M, memory tokens"),
        "cache_len": (8, "C, positions cached per layer, for transformer_xl and rmt_xl"),
        "window": (0, "tokens next to it that a token of a bottleneck sees beside memory"),
        "d_assoc": (16, "width of associative keys, of which dpfp makes 2 * nu * d_assoc features, for armt"),
        "nu": (3, "products that dpfp makes of every channel, for armt"),
        "update": ("delta", "of the associative memory: delta, armt or hebbian, see Config in rmt.py"),
        "memory_form": ("norm", "what is handed on: norm or raw, see Config in rmt.py"),
        "write_slot": (None, "what the write rows are fed: memory, embedding or both, see Config in rmt.py"),
        "memory_noise": (None, "noise on the handed-on memory in training, up to this fraction of its RMS")},
    "training": {
        "steps": (None, "optimizer steps"),
        "batch": (None, "samples per step"),
        "lr": (None, "learning rate: 50 steps of warm-up, a linear fall over the second half"),
        "weight_decay": (None, "of AdamW"),
        "bptt_depth": (-1, "boundaries that gradient crosses, -1 for all"),
        "checkpoint": (False, "recompute the activations of each segment: less memory, more time"),
        "bf16": (False, "bfloat16 autocast"),
        "compile": (False, "torch.compile the model"),
        "seed": (0, "of the weights and the data")},
    "run": {
        "device": ("auto", "cpu, cuda, mps, or auto: cuda where there is one, else cpu"),
        "threads": (1, "CPU threads; models this small are fastest with one"),
        "target": (0.0, "exit with status 1 unless --model's accuracy over --segments reaches this"),
        "eval_segments": ([], "longer samples to try, default 2 and 4 times --segments; 131072 is a million tokens"),
        "eval_samples": (512, "fresh samples per evaluation, fewer where they are very long"),
        "save_every": (200, "steps between checkpoints"),
        "out": ("", "folder to write to, default out/TASK-N with the first N that is free"),
        "resume": (False, "go on with the run in --out, to the same numbers as if it had not stopped")}}

LIMITS = {"bptt_depth": (-1, 10**9), "window": (0, 10**9), "seed": (0, 2**31 - 1), "target": (0, 1)}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    ARGS = parse(__doc__, FLAGS, LIMITS, RECIPES)  # before torch is imported: --help and a wrong flag answer at once

import torch
import torch.nn.functional as F
from tqdm import tqdm

from assets.figures import draw_attention, draw_training
from assets.tasks import TASKS, check, longest, text, vocabulary
from rmt import RMT, Config, generate, tree_map, unroll

# ------------------------------------------------------------------------------------------------------------- model

def build(args, variant):
    """A model of one row of VARIANTS, at its initial weights."""
    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in FLAGS["model"].keys() - {"model", "baseline"}}
    return RMT(Config(variant, len(vocabulary(args)), args.segment_len, **sizes)).to(args.device)


def sample(args, model, segments, batch, generator):
    """Inputs (B, length) and targets (B, n_answer), which belong to the last n_answer inputs."""
    tokens, n = TASKS[args.task].sample(args, segments, batch, generator)
    inputs, targets = tokens[:, :-1].to(args.device, copy=True), tokens[:, -n:].long().to(args.device)
    if model.variant.mask == "full":  # an encoder would see the answer among its inputs, so it fills in blanks
        inputs[:, inputs.size(1) - n + 1:] = vocabulary(args).index("_")
    return inputs, targets


@torch.no_grad()
def evaluate(args, model, segments, between=lambda state: state, free=True):
    """Share of right answer symbols, teacher-forced and free-running, and of whole answers, on fresh samples.

    between may tamper with the state at each boundary. Returns the samples too: inputs, targets, free-running answers.
    """
    model.eval()
    T, generator = args.segment_len, torch.Generator().manual_seed(args.seed + 2**31)  # another stream than training's
    inputs, targets = sample(args, model, segments, min(args.eval_samples, max(32, 2**22 // (segments * T))), generator)
    state, logits, n = model.initial_state(len(inputs)), [], targets.size(1)
    first = (inputs.size(1) - n) // T  # the segment in which the answer begins
    pieces = tqdm(inputs.split(T, dim=1), f"{segments} segments", leave=False, delay=2, disable=None)
    for s, segment in enumerate(pieces):
        state = between(state)
        if s == first:
            start = state
        out, state = model(segment, state)
        logits += [out] if s >= first else []
    forced = answers = torch.cat(logits, dim=1)[:, -n:].argmax(-1)
    if free and model.variant.mask != "full":  # an encoder fills all blanks at once: it runs free already
        answers = generate(model, inputs[:, first * T:inputs.size(1) - n + 1], n, start, temperature=0)
    scores = {"teacher_forced": forced == targets, "free_running": answers == targets,
              "whole_answers": (answers == targets).all(dim=1)}
    return {name: right.float().mean().item() for name, right in scores.items()}, (inputs, targets, answers)


# ------------------------------------------------------------------------------------------------------------- train

def new_run(args, variant):
    """All that training changes, at step 0."""
    model = build(args, variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    return {"model": model, "optimizer": optimizer, "data": torch.Generator().manual_seed(args.seed), "step": 0,
            "unlocked": 1 if args.curriculum == "grow" else len(args.lengths), "loss": 0.0,
            "accuracy": dict.fromkeys(args.lengths, 0.0), "rows": [], "seconds": 0.0}


def train(args, run, name, save):
    """Train one run from where it stands to args.steps. Ctrl-C ends it after a whole step, saved."""
    model, optimizer, accuracy, stop = run["model"].train(), run["optimizer"], run["accuracy"], []
    fast, depth = torch.compile(model) if args.compile else model, None if args.bptt_depth < 0 else args.bptt_depth
    default = signal.signal(signal.SIGINT, lambda *_: stop.append(signal.signal(signal.SIGINT, default)))
    for step in tqdm(range(run["step"], args.steps), name, initial=run["step"], total=args.steps, disable=None):
        began, longest = time.process_time(), run["unlocked"] - 1
        i = torch.randint(longest + 1, (), generator=run["data"]) if args.curriculum == "random" else longest
        n = args.lengths[i]
        inputs, targets = sample(args, model, n, args.batch, run["data"])
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50, 2 * (1 - step / args.steps))

        optimizer.zero_grad()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=args.bf16):
            logits, _ = unroll(fast, inputs, bptt_depth=depth, checkpoint=args.checkpoint)
        logits = logits[:, -targets.size(1):].float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if not math.isfinite(loss.item()):
            fail(f"the loss is {loss} at step {step + 1}: start anew with an --lr smaller than {args.lr}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        accuracy[n] += 0.05 * ((logits.argmax(-1) == targets).float().mean().item() - accuracy[n])
        run["loss"] += (0.05 if step else 1) * (loss.item() - run["loss"])
        run["unlocked"] += accuracy[n] > 0.75 and run["unlocked"] < len(accuracy)
        run["step"], run["seconds"] = step + 1, run["seconds"] + time.process_time() - began
        if run["step"] % 20 == 0:
            run["rows"].append([name, run["step"], n, run["loss"], *accuracy.values()])
        if run["step"] % max(1, args.steps // 8) == 0:
            tqdm.write(f"{name:16} step {step + 1:5}   {n} segments   loss {run['loss']:.3f}   right {accuracy[n]:.3f}")
        if run["step"] % args.save_every == 0 or run["step"] == args.steps or stop:
            save()
        if stop:
            break
    signal.signal(signal.SIGINT, default)
    if stop:
        raise KeyboardInterrupt


def save_runs(args, runs):
    """checkpoint.pt, with all that an exact resume needs, and metrics.csv."""
    states = {name: {**run, "model": run["model"].state_dict(), "optimizer": run["optimizer"].state_dict(),
                     "data": run["data"].get_state()} for name, run in runs.items()}
    rng = [torch.get_rng_state(), *([torch.cuda.get_rng_state(args.device)] if args.device.startswith("cuda") else [])]
    rows = [["model", "step", "segments", "loss", *(f"accuracy_{n}" for n in args.lengths)]]
    save(args.out, {"runs": states, "rng": rng}, rows + [row for run in runs.values() for row in run["rows"]])


def load_runs(args):
    """The runs of checkpoint.pt, ready to go on."""
    saved, runs = load(args.out / "checkpoint.pt", "runs", "rng"), {}
    for name, state in saved["runs"].items():
        runs[name] = run = new_run(args, name)
        fill(run["model"], saved, name)
        run["optimizer"].load_state_dict(state.pop("optimizer"))
        run["data"].set_state(state.pop("data"))
        run.update(state)
    torch.set_rng_state(saved["rng"][0])
    if args.device.startswith("cuda") and len(saved["rng"]) > 1:
        torch.cuda.set_rng_state(saved["rng"][1], args.device)
    return runs


# ------------------------------------------------------------------------------------------------------------- report

def report(args, runs):
    """Evaluate, print, draw. Returns the accuracy of --model over --segments."""
    main, results = runs[args.model]["model"], {}
    print(f"\nanswer symbols right, on fresh samples (chance {TASKS[args.task].chance(args):.3f})\n"
          "model            segments  teacher-forced    free-running   whole answers")
    for name, run in runs.items():
        results[name] = {"cpu_seconds": round(run["seconds"], 1), "state_floats": run["model"].state_floats()}
        for n in sorted({*args.lengths, *args.eval_segments}):
            results[name][n], samples = evaluate(args, run["model"], n)
            scores = "".join(f"{score:16.3f}" for score in results[name][n].values())
            print(f"{name:16}{n:9}{scores}" + "   longer than in training" * (n > args.segments), flush=True)
            if n == args.segments and run["model"] is main:
                examples = samples
    longer = sorted({n for n in args.eval_segments if n > args.segments})
    low = [n for n in longer if results[args.model][n]["teacher_forced"] < 0.9]
    falls = f"falls below 0.9 at {low[0]} segments" if low else "holds 0.9 at every longer length tried"
    print(f"{args.model} {falls}\n" * bool(longer))
    print(f"controls: {args.model} over {args.segments} segments, teacher-forced, with")
    controls = {"its initial state at every boundary": lambda state: main.initial_state(len(state.memory)),
                "the state of another sample": lambda state: tree_map(lambda t: t.roll(1, 0), state)}
    for name, between in controls.items():
        results[name] = evaluate(args, main, args.segments, between, free=False)[0]["teacher_forced"]
        print(f"    {name:38}{results[name]:.3f}")
    print(f"\nthree answers of {args.model}, free-running; ^ is a mistake")
    for inputs, target, answer in zip(*(part[:3] for part in examples), strict=True):
        prompt = inputs[:len(inputs) - len(target) + 1]
        print(f"    input   {text(args, prompt)}\n    right   {text(args, target)}\n    model   {text(args, answer)}\n"
              f"            {text(args, answer, answer != target)}")
    figures = {"training": draw_training(args, runs),
               "attention": draw_attention(main, examples[0][:1], examples[1].size(1), lambda row: text(args, row))}
    write_report(args, results, figures)
    return results[args.model][args.segments]["teacher_forced"]


def main(args):
    """Check all there is to check before anything is written; train; report."""
    args.lengths = [n for n in range(2, args.segments + 1) if n % TASKS[args.task].multiple == 0]  # of training samples
    args.eval_segments = args.eval_segments or sorted({min(n * args.segments, longest(args)) for n in (2, 4)})
    names = [args.model] + [args.baseline] * (args.baseline not in ("none", args.model))
    try:
        check(args)
        setup(args, args.task)
        models = [build(args, name) for name in names]
    except ValueError as reason:
        fail(reason)
    try:
        runs = load_runs(args) if args.resume else {}
        save_runs(args, runs)
        write_flags(args)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there is something to go on with
    except Exception as reason:  # whatever is wrong with a file or folder, it is one line for the user
        what = "resumed, start anew with another --out" if args.resume else "written, name another folder"
        fail(f"--out {args.out} cannot be {what}: {' '.join(str(reason).split())[:160]}")
    print(f"{args.task} over {args.segments} segments of {args.segment_len}: device {args.device}, seed {args.seed}, "
          f"{sum(p.numel() for p in models[0].parameters())} parameters, "
          f"state of {models[0].state_floats()} floats, "
          f"at most {args.batch * args.segments * args.segment_len} tokens per step, files in {args.out}")
    for name in names:
        runs[name] = runs.get(name) or new_run(args, name)
        train(args, runs[name], name, lambda: save_runs(args, runs))
    reached = report(args, runs)
    verdict = f", target {args.target}: {'reached' if reached >= args.target else 'MISSED'}" * (args.target > 0)
    print(f"\n{args.model} gets {reached:.3f} of the answer symbols over {args.segments} segments right{verdict}; "
          f"files in {args.out}")
    sys.exit(int(reached < args.target))


if __name__ == "__main__":
    start(main, ARGS)
