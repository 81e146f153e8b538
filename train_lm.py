"""Train a character-level language model with memory, beside the same model without it, and write text with it.

    python train_lm.py                                   laptop, 4 minutes: Python's standard library, no download;
                                                         rmt ends at least 0.05 bits per character below transformer
    python train_lm.py --data book.txt notes/            the same on your own text, files and folders
    python train_lm.py --sample --out out/python-1 --prompt "def "                       a trained model writes on
    python train_lm.py --data enwik8 --bf16 --segment-len 128 --n-layer 6 --d-model 384 --n-head 6 --dropout 0.1
        --lr 1e-3 --steps 20000                          one GPU; not measured yet
    torchrun --nproc-per-node 4 train_lm.py --data enwik8 --bf16 --segment-len 128 --n-layer 12 --d-model 512 --n-head 8
        --n-mem 10 --memory-form norm --write-slot memory --dropout 0.1 --batch 24 --lr 2.5e-4 --steps 400000
        --baseline none                                  the paper's enwik8 model on four GPUs; not measured yet

Writes config.json, metrics.csv, checkpoint.pt, result.json, loss.png, position.png and sample.txt to --out.
"""
import gzip
import hashlib
import math
import os
import signal
import sys
import sysconfig
import time
import zipfile
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

from assets.run import (
    RANK,
    RANKS,
    fail,
    fetch,
    fill,
    load,
    parse,
    save,
    setup,
    start,
    write,
    write_flags,
    write_report,
)

# -------------------------------------------------------------------------------------------------------------- flags

FLAGS = {  # group, flag, default, help
    "data": {
        "data": (["python"], "python (its standard library), shakespeare, enwik8, text8, or files and folders")},
    "model": {
        "model": ("rmt", "a row of VARIANTS in rmt.py"),
        "baseline": ("transformer", "a second row, trained in the same way, or none"),
        "segment_len": (32, "T, characters per segment"),
        "n_layer": (2, "layers"),
        "n_head": (4, "heads"),
        "d_model": (64, "width"),
        "n_mem": (8, "M, memory tokens"),
        "cache_len": (32, "C, positions cached per layer, for transformer_xl and rmt_xl"),
        "window": (0, "tokens next to it that a token of a bottleneck sees beside memory"),
        "memory_form": ("raw", "what is handed on: norm or raw, see Config in rmt.py"),
        "write_slot": ("embedding", "what the write rows are fed: memory, embedding or both, see Config in rmt.py"),
        "memory_noise": (0.0, "noise on the handed-on memory in training, up to this fraction of its RMS"),
        "dropout": (0.0, "dropout on embeddings and sublayers")},
    "training": {
        "steps": (1500, "optimizer steps"),
        "batch": (32, "streams through the text, read side by side; the ranks of torchrun share them"),
        "segments_per_step": (2, "segments that a stream advances in a step; its state is carried to the next step"),
        "bptt_depth": (-1, "boundaries within a step that gradient crosses, -1 for all"),
        "reset_every": (64, "steps after which all streams start anew from the learned memory, 0 for never"),
        "lr": (0.012, "learning rate, falling to 0 along a cosine"),
        "warmup": (50, "steps in which the learning rate rises"),
        "accumulate": (1, "parts in which the streams are computed, one after the other: less memory"),
        "checkpoint": (False, "recompute the activations of each segment: less memory, more time"),
        "bf16": (False, "bfloat16 autocast"),
        "compile": (False, "torch.compile the model"),
        "seed": (0, "of the weights, of dropout and of samples")},
    "sample": {
        "sample": (False, "write text with the model in --out instead of training"),
        "prompt": ("", "text to go on from"),
        "length": (1000, "characters to write"),
        "temperature": (0.8, "0 takes the most likely character"),
        "top_k": (0, "sample among so many most likely characters, 0 for all")},
    "run": {
        "device": ("auto", "cpu, cuda, mps, or auto: cuda where there is one, else cpu"),
        "threads": (1, "CPU threads; models this small are fastest with one"),
        "eval_every": (500, "steps between evaluations on the validation part"),
        "eval_length": (200_000, "characters of the validation part that they read"),
        "save_every": (250, "steps between checkpoints"),
        "out": ("", "folder to write to, default out/TEXT-N with the first N that is free"),
        "resume": (False, "go on with the run in --out, to the same numbers as if it had not stopped")}}
LIMITS = {"bptt_depth": (-1, 10**9), "window": (0, 10**9), "reset_every": (0, 10**9), "top_k": (0, 10**9),
          "seed": (0, 2**31 - 1)}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    ARGS = parse(__doc__, FLAGS, LIMITS)  # before torch is imported, so that --help and a wrong flag answer at once

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from assets.figures import draw_loss, draw_position
from rmt import RMT, Config, State, stream, tree_leaves, tree_map, unroll

# --------------------------------------------------------------------------------------------------------------- data
# Bytes are the characters. A text has three parts of 90, 5 and 5 %; its vocabulary are the bytes of the first.

def read(data):
    """The bytes of --data. Raises ValueError or OSError."""
    if data == ["python"]:
        root, no = Path(sysconfig.get_path("stdlib")), {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        files = [path for path in root.rglob("*.py") if not no & set(path.relative_to(root).parts)]
        return b"".join(path.read_bytes() for path in sorted(files, key=Path.as_posix))
    path = fetch(data[0]) if len(data) == 1 else None
    if path:
        return zipfile.ZipFile(path).read(path.stem) if path.suffix == ".zip" else path.read_bytes()
    parts = [b""]
    for root in map(Path, data):
        if not root.exists():
            raise ValueError(f"--data {root}: no such file; give files, folders, python, shakespeare, enwik8, text8")
        inside = sorted(path for path in root.rglob("*") if path.is_file())
        for path in [root] if root.is_file() else inside:
            if not any(part.startswith(".") for part in path.relative_to(root).parts):
                parts.append(path.read_bytes())
            if b"\0" in parts[-1]:
                raise ValueError(f"--data {path} holds zero bytes and is no text: name the files that are")
    return b"".join(parts)


class Text:
    """The parts train, valid and test of some bytes, each a tensor of indices into vocabulary."""

    def __init__(self, raw):
        cuts = [len(raw) * percent // 100 for percent in (0, 90, 95, 100)]
        self.sha256, self.vocabulary = hashlib.sha256(raw).hexdigest(), bytes(sorted(set(raw[:cuts[1]])))
        unseen = bytes(set(range(256)) - set(self.vocabulary))
        indices = bytes.maketrans(self.vocabulary, bytes(range(len(self.vocabulary))))
        parts = [raw[start:end].translate(indices, unseen) for start, end in pairwise(cuts)]
        self.train, self.valid, self.test = (torch.from_numpy(np.frombuffer(part, np.uint8).copy()) for part in parts)
        self.n_unseen = len(raw) - sum(map(len, parts))

    def decode(self, tokens):
        """The bytes of tokens."""
        return bytes(self.vocabulary[i] for i in tokens.tolist())


def streams(tokens, n):
    """Cut tokens into n streams of equal length (n, length + 1); each ends with the first token of the next."""
    length = (len(tokens) - 1) // n
    return torch.stack([tokens[i * length:(i + 1) * length + 1] for i in range(n)])


def references(text):
    """Bits per character of the test part without a network: by counts of the training part, and by gzip."""
    V, pairs = len(text.vocabulary), 1
    for piece in text.train.split(10**7):  # pairs across two pieces are not counted
        pairs += torch.bincount(piece[:-1].long() * V + piece[1:], minlength=V * V)
    pairs, first, second = pairs.view(V, V).double(), text.test[:-1].long(), text.test[1:].long()
    return {"uniform": math.log2(V), "unigram": -(pairs.sum(0) / pairs.sum())[second].log2().mean().item(),
            "bigram": -(pairs / pairs.sum(1, keepdim=True))[first, second].log2().mean().item(),
            "gzip -9": 8 * len(gzip.compress(text.decode(text.test), 9)) / len(text.test)}


# ------------------------------------------------------------------------------------------------ model and evaluation

def build(args, variant, vocab_size):
    """A model of one row of VARIANTS, at its initial weights."""
    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in FLAGS["model"].keys() - {"model", "baseline"}}
    model = RMT(Config(variant, vocab_size, **sizes)).to(args.device)
    if model.variant.mask == "full":
        raise ValueError(f"{variant!r} sees whole segments, the next character too: use 'rmt'")
    return model


@torch.no_grad()
def evaluate(args, model, part, between=lambda state: state):
    """Bits per character, over all and by position in the segment, in one pass of up to 64 streams, the state carried.

    Returns the floats of a stream's state too. between may tamper with the state at each boundary.
    """
    T = args.segment_len
    rows = streams(part, max(1, min(64, (len(part) - 1) // (32 * T)))).to(args.device)
    state, bits, counts = model.eval().initial_state(len(rows)), torch.zeros(T, device=args.device), torch.zeros(T)
    for inputs, targets in zip(rows[:, :-1].split(T, dim=1), rows[:, 1:].split(T, dim=1), strict=True):
        n, (logits, state) = inputs.size(1), model(inputs, between(state))
        bits[:n] += F.cross_entropy(logits.transpose(1, 2), targets.long(), reduction="none").sum(0)
        counts[:n] += len(rows)
    bits = bits.cpu() / math.log(2)
    return {"bpc": (bits.sum() / counts.sum()).item(), "by_position": (bits / counts).tolist(),
            "state_floats": sum(t.numel() for t in tree_leaves(state)) // len(rows)}


def write_on(args, model, vocabulary, prompt):
    """Yield a prompt, or the first character, and then what the model writes after it, in bytes. Raises ValueError."""
    unknown, prompt = bytes(set(prompt) - set(vocabulary)), prompt or vocabulary[:1]
    if unknown:
        raise ValueError(f"--prompt {os.fsdecode(prompt)!r} has bytes that the training part has not: {unknown!r}")
    yield prompt
    tokens = torch.tensor([[vocabulary.index(byte) for byte in prompt]], device=args.device)
    new = stream(model.eval(), tokens, temperature=args.temperature, top_k=args.top_k or None,
                 generator=torch.Generator(args.device).manual_seed(args.seed))
    for token in islice(new, args.length):
        yield vocabulary[token.item():token.item() + 1]


# --------------------------------------------------------------------------------------------------------------- train

class Segments(torch.nn.Module):
    """The loss of some segments, and the state after them; a module, because DistributedDataParallel wraps modules."""

    def __init__(self, args, model):
        super().__init__()
        self.args, self.model, self.fast = args, model, [torch.compile(model) if args.compile else model]

    def forward(self, inputs, targets, state):
        depth = None if self.args.bptt_depth < 0 else self.args.bptt_depth
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.args.bf16):
            logits, state = unroll(self.fast[0], inputs, state, depth, self.args.checkpoint)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long()), state.detach()


def new_run(args, variant, vocab_size):
    """All that training changes, at step 0."""
    model = build(args, variant, vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.98), fused=not args.device.startswith("mps"))
    return {"model": model, "optimizer": optimizer, "states": [None] * args.accumulate, "step": 0, "bpc": 0.0,
            "rows": [], "seconds": 0.0}


def train(args, run, name, text, save):
    """Train one run from where it stands to args.steps. Ctrl-C ends it after a whole step, saved."""
    if run["step"] == 0:
        torch.manual_seed(args.seed + RANK)  # dropout differs from rank to rank
    model, optimizer, states, stop = run["model"].train(), run["optimizer"], run["states"], []
    segments = Segments(args, model)
    if RANKS > 1:  # where no stream starts anew, the initial memory is not used
        segments = DistributedDataParallel(segments, find_unused_parameters=True)
    rows = streams(text.train, args.batch).chunk(RANKS)[RANK].to(args.device)
    width, clock = args.segments_per_step * args.segment_len, time.process_time if args.device == "cpu" else time.time
    default = signal.signal(signal.SIGINT, lambda *_: stop.append(RANKS > 1 or signal.signal(signal.SIGINT, default)))
    steps = range(run["step"], args.steps)
    for step in tqdm(steps, name, initial=run["step"], total=args.steps, disable=RANK > 0 or None):
        began, start = clock(), step % ((rows.size(1) - 1) // width) * width
        if start == 0 or (args.reset_every and step % args.reset_every == 0):
            states[:] = [None] * args.accumulate
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / args.warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))

        optimizer.zero_grad()
        losses = []
        for i, part in enumerate(rows[:, start:start + width + 1].chunk(args.accumulate)):
            loss, states[i] = segments(part[:, :-1], part[:, 1:], states[i])  # unroll and cross entropy
            (loss / args.accumulate).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        shared = torch.stack([torch.stack(losses).mean() / RANKS, torch.tensor(float(len(stop)), device=args.device)])
        if RANKS > 1:
            dist.all_reduce(shared)  # so that all ranks log the mean, and stop at the same step
        loss, stopped = shared.tolist()
        if not math.isfinite(loss):
            fail(f"the loss is {loss} at step {step + 1}: start anew with an --lr smaller than {args.lr}")
        run["bpc"] += (0.05 if step else 1) * (loss / math.log(2) - run["bpc"])
        run["step"], run["seconds"] = step + 1, run["seconds"] + clock() - began
        valid = ""
        if run["step"] % args.eval_every == 0 and RANK == 0:
            valid = evaluate(args, model, text.valid[:max(args.eval_length, args.segment_len + 1)])["bpc"]
            model.train()
            tqdm.write(f"{name:16} step {step + 1:6}   bits per character: train {run['bpc']:.3f}   valid {valid:.3f}")
        if run["step"] % 20 == 0 or valid or run["step"] == args.steps:
            run["rows"].append([name, step + 1, (step + 1) * args.batch * width, run["seconds"], run["bpc"], valid])
        if run["step"] % args.save_every == 0 or run["step"] == args.steps or stopped:
            save()
        if stopped:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, default)


def save_runs(args, runs, text):
    """checkpoint.pt, with all that an exact resume needs, and metrics.csv. All ranks call it, the first one writes."""
    rng = [torch.get_rng_state(), *([torch.cuda.get_rng_state(args.device)] if args.device.startswith("cuda") else [])]
    states = {name: [state and tuple(tree_map(torch.Tensor.cpu, state)) for state in run["states"]]
              for name, run in runs.items()}
    ranks = [{"rng": rng, "states": states}] * RANKS
    if RANKS > 1:
        dist.all_gather_object(ranks, ranks[RANK])
    saved = {name: {key: value.state_dict() if key in ("model", "optimizer") else value for key, value in run.items()
                    if key != "states"} for name, run in runs.items()}
    checkpoint = {"runs": saved, "ranks": ranks, "vocabulary": list(text.vocabulary), "sha256": text.sha256}
    rows = [["model", "step", "characters", "seconds", "train_bpc", "valid_bpc"]]
    if RANK == 0:
        save(args.out, checkpoint, rows + [row for run in runs.values() for row in run["rows"]])


def load_runs(args, runs, text):
    """Bring new runs to where those of checkpoint.pt stand. Raises ValueError."""
    saved = load(args.out / "checkpoint.pt", "runs", "ranks", "vocabulary", "sha256")
    if text.sha256 != saved["sha256"]:
        raise ValueError(f"the text has {len(text.vocabulary)} different characters, sha256 {text.sha256}; the run in "
                         f"{args.out} began with {len(saved['vocabulary'])}, {saved['sha256']}")
    if len(saved["ranks"]) != RANKS:
        raise ValueError(f"the run in {args.out} began on {len(saved['ranks'])} ranks, not {RANKS}: --nproc-per-node")
    mine = saved["ranks"][RANK]
    for name, run in runs.items():
        fill(run["model"], saved, name)
        run["optimizer"].load_state_dict(saved["runs"][name].pop("optimizer"))
        states = [s and tree_map(lambda t: t.to(args.device), State(*s)) for s in mine["states"][name]]
        run.update(saved["runs"][name], states=states)
    torch.set_rng_state(mine["rng"][0])
    if args.device.startswith("cuda") and len(mine["rng"]) > 1:
        torch.cuda.set_rng_state(mine["rng"][1], args.device)


# -------------------------------------------------------------------------------------------------------------- report

def report(args, runs, text):
    """Evaluate on the test part, print, draw, and write a sample."""
    quarter, results = max(1, args.segment_len // 4), {name: {"bpc": bits} for name, bits in references(text).items()}
    print(f"\nbits per character of the test part, {len(text.test)} characters; 'first' are the first {quarter} of a "
          f"segment\n{'model':17}{'state at a boundary':31}    all  first   rest", flush=True)
    print("\n".join(f"{name:48}{result['bpc']:7.3f}" for name, result in results.items()))
    states = {"carried": lambda model, state: state, "reset": lambda model, state: model.initial_state(len(state[0])),
              "of another stream": lambda model, state: tree_map(lambda t: t.roll(1, 0), state)}
    for name, run in runs.items():
        speed = run["rows"][-1][2] / RANKS / run["seconds"]
        results[name] = {"seconds": round(run["seconds"], 1), "per_second": round(speed)}
        for state, between in states.items():
            scores = results[name][state] = evaluate(args, run["model"], text.test, partial(between, run["model"]))
            bits = torch.tensor(scores["by_position"])
            first, rest = bits[:quarter].mean(), bits[quarter - len(bits):].mean()
            print(f"{name:17}{state:31}{scores['bpc']:7.3f}{first:7.3f}{rest:7.3f}", flush=True)
            if not scores["state_floats"]:
                break
    prompt = os.fsencode(args.prompt) or text.decode(text.test[:2 * args.segment_len])
    pieces = write_on(args, runs[args.model]["model"], text.vocabulary, prompt)
    write(args.out / "sample.txt", lambda path: path.write_bytes(b"".join(pieces)))
    figures = {"loss": draw_loss(runs), "position": draw_position({name: results[name] for name in runs})}
    write_report(args, results | {"text_sha256": text.sha256, "ranks": RANKS}, figures)
    unit = "CPU second" if args.device == "cpu" else "second"
    for name, run in runs.items():
        print(f"{name}: {results[name]['carried']['bpc']:.3f} bits per character after {run['seconds']:.0f} {unit}s of "
              f"training, {results[name]['per_second']} characters per {unit}")
    print(f"files in {args.out}; python train_lm.py --sample --out {args.out} writes on")


def prepare(args):
    """The text and the runs so far. Raises ValueError or OSError if anything does not fit."""
    B, T, runs = args.batch, args.segment_len, {}
    if B % (RANKS * args.accumulate):
        raise ValueError(f"--batch {B} must be divisible by {RANKS} ranks * --accumulate {args.accumulate}")
    text = Text(read(args.data)) if RANK == 0 else None
    if RANKS > 1:
        dist.barrier()  # the first rank downloads
    text = text or Text(read(args.data))
    for part, least in (("train", B * args.segments_per_step * T + 1), ("valid", T + 1), ("test", T + 1)):
        if len(getattr(text, part)) < least:
            raise ValueError(f"--data {' '.join(args.data)}: its {part} part has {len(getattr(text, part))} characters "
                             f"and must have {least}: give more text, or a smaller --batch or --segment-len")
    for name in [args.model] + [args.baseline] * (args.baseline not in ("none", args.model)):
        runs[name] = new_run(args, name, len(text.vocabulary))
    list(islice(write_on(args, runs[args.model]["model"], text.vocabulary, os.fsencode(args.prompt)), 2))  # a trial
    if args.resume:
        load_runs(args, runs, text)
    return text, runs


def sample(args):
    """Print text while the model in --out writes it."""
    saved = load(args.out / "checkpoint.pt", "runs", "vocabulary")
    model = build(args, args.model, len(saved["vocabulary"]))
    fill(model, saved, args.model)
    for piece in write_on(args, model, bytes(saved["vocabulary"]), os.fsencode(args.prompt)):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    print()


def main(args):
    """Check all there is to check before anything is written; train; report. Or write text."""
    try:
        setup(args, Path(args.data[0]).stem or "text")
        if args.sample:
            return sample(args)
        text, runs = prepare(args)
    except (ValueError, RuntimeError) as reason:
        fail(reason)
    save_runs(args, runs, text)
    if RANK == 0:
        write_flags(args)
        width = args.segments_per_step * args.segment_len
        print(f"{' '.join(args.data)}: {len(text.train)} + {len(text.valid)} + {len(text.test)} characters, "
              f"{len(text.vocabulary)} different ones, sha256 {text.sha256[:16]}..."
              + f"; left out of the last two parts: {text.n_unseen} that the first has not" * (text.n_unseen > 0)
              + f"\ndevice {args.device}, ranks {RANKS}, seed {args.seed}; a step takes {args.batch} streams on by "
              f"{width} characters, {args.batch * width} in all; files in {args.out}")
        for name, run in runs.items():
            print(f"{name}: {sum(p.numel() for p in run['model'].parameters())} parameters, "
                  f"state of {run['model'].state_floats()} floats")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there is something to go on with
    for name, run in runs.items():
        train(args, run, name, text, lambda: save_runs(args, runs, text))
    if RANK == 0:
        report(args, runs, text)


if __name__ == "__main__":
    start(main, ARGS)
