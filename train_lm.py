r"""Train a character-level language model with memory, beside the same model without memory.

    python train_lm.py
        Python's standard library, no download; three minutes on a laptop. The last lines say that
        rmt ends at least 0.05 bits per character below transformer.
    python train_lm.py --data book.txt notes/
        The same on your own text, files and folders. --data enwik8 downloads the text of the paper.
    python train_lm.py --sample out/python-1 --prompt "def "
        The model in a folder writes text.
    torchrun --nproc-per-node 4 train_lm.py --data enwik8 --bf16 --segment-len 128 --n-layer 12 \
        --d-model 512 --n-head 8 --n-mem 10 --batch 24 --lr 2.5e-4 --steps 400000 \
        --baseline none --config dropout=0.1 memory_form=norm write_slot=memory
        A model of the size of the paper's for enwik8, on four GPUs; not measured yet.

A folder out/TEXT-1 (-2, -3, ...) gets config.json, metrics.csv, checkpoint.pt, result.json,
loss.png, position.png and sample.txt. Ctrl-C saves the run; `--resume FOLDER` goes on with it.

This file needs rmt.py beside it and nothing else of this project. It reads from top to bottom:
ranks, texts, flags, model and evaluation, writing, training, files, report, main.
"""
import argparse
import ast
import csv
import dataclasses
import gzip
import hashlib
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import sys
import sysconfig
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from rmt import RMT, VARIANTS, Config, State, stream, tree_map, unroll

# ==================================================================================================
# Ranks
#
# torchrun starts this script several times, as ranks 0, 1, ... All have the same weights, and each
# reads its share of the streams. The mean of their gradients is the gradient of one process that
# reads all streams. The first rank speaks and writes for all.

RANK = 0
RANKS = 1
LAUNCH = "python train_lm.py"  # how this process was started
if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun alone
    RANK = int(os.environ["RANK"])
    RANKS = int(os.environ["WORLD_SIZE"])
if RANKS > 1:
    LAUNCH = f"torchrun --nproc-per-node {RANKS} train_lm.py"


def join_ranks(args):
    """Meet the other ranks."""
    # The optimizer would import this later; its default arguments would then hold the group, whose
    # threads would outlive destroy_process_group, and could abort the process as it ends.
    import torch.distributed.nn

    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")


def average_gradients(model):
    """Replace the gradients of this rank by their mean over all ranks."""
    for weight in model.parameters():
        if weight.grad is not None:  # the initial memory has one, on all ranks, after a reset only
            dist.all_reduce(weight.grad)
            weight.grad /= RANKS


# ==================================================================================================
# Texts
#
# Bytes are the characters. A text has three parts: train, valid and test, 90, 5 and 5 % of it.

DOWNLOADS = {  # name: address, sha256
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/"
        "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": (
        "http://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
    "text8": (
        "http://mattmahoney.net/dc/text8.zip",
        "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"),
}


def read(names):
    """The bytes of --data, every file once. Raises ValueError or OSError."""
    seen = set()
    contents = []
    for name in names:
        for path in files_of(name):
            place = path.resolve()
            if place not in seen:  # else its end, the test part, may have been trained on
                seen.add(place)
                contents.append(read_file(path))
    return b"".join(contents)


def files_of(name):
    """The files that a name of --data stands for, in a fixed order."""
    if name == "python":
        root = Path(sysconfig.get_path("stdlib"))
        others = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        files = root.rglob("*.py")
        files = [path for path in files if not others & set(path.relative_to(root).parts)]
        return sorted(files, key=Path.as_posix)
    if name in DOWNLOADS:
        return [download(name)]
    root = Path(name)
    if name == "" or not (root.is_file() or root.is_dir()):
        known = ", ".join(["python", *DOWNLOADS])
        raise ValueError(f"--data {name!r}: no such file or folder, and no name of {known}")
    if root.is_file():
        return [root]
    files = []
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.is_file() and not hidden:
            files.append(path)
    return files


def read_file(path):
    """The bytes of one text, out of its archive if it is packed."""
    content = path.read_bytes()
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                content = b"".join(archive.read(member) for member in archive.namelist())
        except Exception as reason:  # whatever is wrong with a file, it is one line for the user
            raise ValueError(f"--data {path} cannot be unpacked: {reason!r}") from reason
    if b"\0" in content:
        raise ValueError(f"--data {path} holds zero bytes and is no text: name the files that are")
    return content


def download(name):
    """The path of a text of DOWNLOADS, which comes to out/data once. Raises ValueError."""
    url, sha256 = DOWNLOADS[name]
    path = Path("out/data") / url.split("/")[-1]
    if path.exists():
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(f"{path} has sha256 {found} and should have {sha256}: delete it, and "
                             "it will be downloaded anew")
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)
        torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
    except Exception as reason:  # a download can fail in many ways
        raise ValueError(f"no {name} from {url} (sha256 {sha256}): {reason}; it can be fetched by "
                         "other means, and given as --data FILE") from reason
    return path


class Text:
    """Three parts of some bytes, as indices into vocabulary: the bytes of the first part."""

    def __init__(self, raw):
        first_cut = len(raw) * 90 // 100
        second_cut = len(raw) * 95 // 100
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.vocabulary = bytes(sorted(set(raw[:first_cut])))
        self.train = self.encode(raw[:first_cut])
        self.valid = self.encode(raw[first_cut:second_cut])
        self.test = self.encode(raw[second_cut:])
        self.n_unseen = len(raw) - len(self.train) - len(self.valid) - len(self.test)

    def encode(self, raw):
        """Bytes -> tokens (length,) uint8, without bytes that are not in the vocabulary."""
        unseen = bytes(set(range(256)) - set(self.vocabulary))
        table = bytes.maketrans(self.vocabulary, bytes(range(len(self.vocabulary))))
        tokens = np.frombuffer(raw.translate(table, unseen), np.uint8)
        return torch.from_numpy(tokens.copy())

    def decode(self, tokens):
        """Tokens (length,) -> bytes."""
        return bytes(self.vocabulary[i] for i in tokens.tolist())


def check_sizes(args, text):
    """Raise ValueError where a part of the text is too short."""
    T = args.segment_len
    needed = {"train": args.batch * args.segments_per_step * T + 1, "valid": T + 1, "test": T + 1}
    for name, least in needed.items():
        length = len(getattr(text, name))
        if length < least:
            raise ValueError(f"--data {' '.join(args.data)}: its {name} part has {length} "
                             f"characters and must have {least}: give more text, or a smaller "
                             "--batch or --segment-len")
    check_memory(args, len(text.vocabulary))


def check_memory(args, vocab_size):
    """Raise ValueError where even a low estimate of what a step needs is more than there is."""
    L, D = args.n_layer, args.d_model
    weights = 12 * L * D**2 + 2 * vocab_size * D
    rows = args.batch // RANKS * args.segments_per_step * (args.segment_len + 2 * args.n_mem)
    needed = 4 * (4 * weights + 16 * L * D * rows)  # bytes: AdamW's four, what backward keeps
    if args.device == "cpu" and hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            raise ValueError(f"a step needs {needed / 2**30:.1f} GiB or more, and there are "
                             f"{memory / 2**30:.1f}: take a smaller --batch, --d-model or --n-mem")


def streams(tokens, n):
    """Cut tokens into n streams of equal length: (n, length + 1).

    Each ends with the first token of the next, which is the last target.
    """
    length = (len(tokens) - 1) // n
    return torch.stack([tokens[i * length:(i + 1) * length + 1] for i in range(n)])


def references(text):
    """Bits per character of the test part by counts of the training part, and by gzip."""
    V = len(text.vocabulary)
    counts = torch.ones(V * V, dtype=torch.long)  # from 1, so that no pair is impossible
    for piece in text.train.split(10**7):         # pairs across two pieces are left out
        counts += torch.bincount(piece[:-1].long() * V + piece[1:], minlength=V * V)
    pairs = counts.view(V, V).double()
    first = text.test[:-1].long()
    second = text.test[1:].long()
    unigram = pairs.sum(0) / pairs.sum()
    bigram = pairs / pairs.sum(1, keepdim=True)
    packed = gzip.compress(text.decode(text.test), 9)
    return {
        "uniform": math.log2(V),
        "unigram": -unigram[second].log2().mean().item(),
        "bigram": -bigram[first, second].log2().mean().item(),
        "gzip -9": 8 * len(packed) / len(text.test),
    }


# ==================================================================================================
# Flags

RECIPE = {"memory_form": "raw", "write_slot": "embedding"}  # fields of Config that --config changes


WITH_RESUME = ["--resume", "--device", "--threads", "--steps"]
WITH_SAMPLE = ["--sample", "--model", "--prompt", "--length", "--temperature", "--seed", "--device",
               "--threads"]


def parse(argv):
    """The settings of a run: the flags given, else the defaults or those of the run in a folder."""
    parser = argparse.ArgumentParser(usage="python train_lm.py [flags]", description=__doc__,
                                     formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = fail

    flag = parser.add_argument_group("data").add_argument
    flag("--data", nargs="+", default=["python"], metavar="NAME",
         help=f"python: its standard library; {', '.join(DOWNLOADS)}; files, folders")

    flag = parser.add_argument_group("model").add_argument
    flag("--model", choices=VARIANTS, default="rmt", help="a row of VARIANTS in rmt.py")
    flag("--baseline", choices=[*VARIANTS, "none"], default="transformer", help="trained beside it")
    flag("--segment-len", type=number(int, 1), default=32, help="T, characters per segment")
    flag("--n-layer", type=number(int, 1), default=2, help="L, layers")
    flag("--n-head", type=number(int, 1), default=4, help="H, heads")
    flag("--d-model", type=number(int, 1), default=64, help="D, width")
    flag("--n-mem", type=number(int, 0), default=8, help="M, memory tokens")
    flag("--cache-len", type=number(int, 0), default=32, help="C, cached positions of an _xl model")
    flag("--config", type=config_field, nargs="+", metavar="NAME=VALUE", default=RECIPE,
         help="other fields of Config in rmt.py, such as dropout=0.1 tie_weights=True")

    flag = parser.add_argument_group("training").add_argument
    flag("--steps", type=number(int, 1), default=1500, help="optimizer steps")
    flag("--batch", type=number(int, 1), default=32,
         help="streams through the text, read side by side; ranks of torchrun share them")
    flag("--segments-per-step", type=number(int, 1), default=2,
         help="segments that a step reads of each stream; the next step goes on from their state")
    flag("--bptt-depth", type=number(int, 0), help="boundaries that gradient crosses; None: all")
    flag("--reset-every", type=number(int, 0), default=64,
         help="steps after which all streams start from the initial state; 0: when the text ends")
    flag("--lr", type=number(float, 0), default=0.012, help="learning rate, at its highest")
    flag("--bf16", action="store_true", help="train in bfloat16 where autocast does")
    flag("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of all random numbers")

    flag = parser.add_argument_group("sample").add_argument
    flag("--sample", metavar="FOLDER", help="write text with --model of this run; train nothing")
    flag("--prompt", default="", help="text to go on from")
    flag("--length", type=number(int, 1), default=1000, help="characters to write")
    flag("--temperature", type=number(float, 0), default=0.8, help="0: the most likely character")

    flag = parser.add_argument_group("run").add_argument
    flag("--device", type=device, default="auto", help="cpu, cuda, mps; auto: cuda, or else cpu")
    flag("--threads", type=number(int, 1, 1024), default=1, help="of the CPU; 1 is fastest here")
    flag("--eval-every", type=number(int, 1), default=500,
         help="steps between evaluations on the validation part, and between checkpoints")
    flag("--out", metavar="FOLDER", help="where to write; None: the first free out/TEXT-N")
    flag("--resume", metavar="FOLDER", help="go on with a run, to the same numbers")

    args = parser.parse_args(argv)
    names = [word.split("=")[0] for word in argv if " " not in word]  # a prompt may have "--"
    for name in ("--config", "--data"):
        if names.count(name) > 1:
            fail(f"{name} is given twice: put all after the first one")
    recipe = RECIPE
    for folder, allowed in [(args.resume, WITH_RESUME), (args.sample, WITH_SAMPLE)]:
        if folder is not None:
            for name in names:
                if name.startswith("--") and name not in allowed:
                    fail(f"{name} cannot be given with {allowed[0]}: the run in {folder} stays as "
                         "it began")
            settings = load(Path(folder))["settings"]
            recipe = settings["config"]
            parser.set_defaults(**settings)
            args = parser.parse_args(argv)
    args.config = recipe | dict(args.config)
    if args.resume is None:
        args.command = f"{LAUNCH} {shlex.join(argv)}"
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
    if text.startswith("cuda") and RANKS > 1:
        text = f"cuda:{os.environ['LOCAL_RANK']}"  # each rank has a GPU of its own
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError) as reason:
        first_line = str(reason).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {first_line}") from reason
    return text


def config_field(text):
    """An argparse type: NAME=VALUE, for a field of Config that has no flag of its own."""
    name, _, value = text.partition("=")
    flags = {"variant", "vocab_size", "segment_len", "n_layer", "n_head", "d_model", "n_mem",
             "cache_len"}
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
    if RANK == 0:
        print(f"train_lm.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        time.sleep(3)  # torchrun ends all ranks when one has ended: the first one shall speak
    sys.exit(2)


# ==================================================================================================
# Model and evaluation


def build(args, variant, vocab_size):
    """A model of one row of VARIANTS, at its initial weights."""
    torch.manual_seed(args.seed)
    config = Config(
        variant, vocab_size, args.segment_len, n_layer=args.n_layer, n_head=args.n_head,
        d_model=args.d_model, n_mem=args.n_mem, cache_len=args.cache_len, **args.config)
    model = RMT(config)
    if model.variant.mask == "full":
        raise ValueError(f"{variant!r} sees whole segments, the next character too: take 'rmt'")
    return model.to(args.device)


N_VALID = 200_000  # characters of the validation part that are read while a model is trained


@torch.no_grad()
def evaluate(args, model, part, between=lambda state: state):
    """Bits per character of a part of the text, over all and by position in the segment.

    One pass over up to 64 streams, from segment to segment with the state carried.
    between  a function that may tamper with the state at each boundary
    """
    model.eval()
    T = args.segment_len
    n = n_streams(part, T)
    rows = streams(part, n).to(args.device)
    inputs = rows[:, :-1].split(T, dim=1)
    targets = rows[:, 1:].split(T, dim=1)

    state = model.initial_state(n)
    nats = torch.zeros(T, device=args.device)
    counts = torch.zeros(T)
    for segment, target in zip(inputs, targets, strict=True):
        logits, state = model(segment, between(state))
        losses = F.cross_entropy(logits.transpose(1, 2), target.long(), reduction="none")
        length = segment.size(1)  # the last segment may be short
        nats[:length] += losses.sum(0)
        counts[:length] += n
    bits = nats.cpu() / math.log(2)
    return {
        "bpc": (bits.sum() / counts.sum()).item(),
        "by_position": (bits / counts).tolist(),
        "state_floats": model.state_floats(),
    }


def n_streams(part, T):
    """How many streams a part is cut into: at most 64, and of 32 segments or more where it can."""
    return max(1, min(64, (len(part) - 1) // (32 * T)))


def boundaries(model):
    """What the state can be at a boundary: functions that evaluate takes as between."""
    return {
        "carried": lambda state: state,
        "reset": lambda state: model.initial_state(len(state.memory)),
        "of another stream": lambda state: tree_map(lambda t: t.roll(1, 0), state),
    }


# ==================================================================================================
# Writing


def write_on(args, model, vocabulary, prompt):
    """Yield a prompt, or else a first character, and then what the model writes after it: bytes."""
    prompt = prompt or vocabulary[:1]
    unknown = bytes(set(prompt) - set(vocabulary))
    if unknown:
        fail(f"--prompt has bytes that do not occur in the training part: {unknown!r}")
    tokens = torch.tensor([[vocabulary.index(byte) for byte in prompt]], device=args.device)
    model.eval()
    with torch.no_grad():
        logits, _ = model(tokens[:, :args.segment_len])
    if not logits.isfinite().all():
        fail("the outputs of the model are nan or infinite: train anew, with a smaller --lr")

    generator = torch.Generator(args.device).manual_seed(args.seed)
    yield prompt
    new = stream(model, tokens, temperature=args.temperature, generator=generator)
    for token in islice(new, args.length):
        yield bytes([vocabulary[token.item()]])


def write_text(args):
    """What --sample does: print text while a model writes it."""
    saved = load(Path(args.sample))
    if args.model not in saved["runs"]:
        fail(f"--model {args.model}: the run in {args.sample} has {', '.join(saved['runs'])}")
    vocabulary = bytes(saved["vocabulary"])
    model = build(args, args.model, len(vocabulary))
    model.load_state_dict(saved["runs"][args.model]["model"])
    for piece in write_on(args, model, vocabulary, os.fsencode(args.prompt)):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    print()


# ==================================================================================================
# Training


@dataclass
class Run:
    """All that training changes: a model on its way."""
    model: RMT
    optimizer: torch.optim.Optimizer
    state: State | None = None  # of this rank's streams; None: the initial one
    step: int = 0
    bpc: float = 0.0            # the running mean, bits per character
    seconds: float = 0.0
    rows: list = dataclasses.field(default_factory=list)  # of metrics.csv


def new_run(args, variant, vocab_size):
    """A run at step 0."""
    model = build(args, variant, vocab_size)
    fused = not args.device.startswith("mps")
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), fused=fused)
    return Run(model, optimizer)


def train(args, run, name, text, save):
    """Train a run to args.steps. A request to stop ends it after a whole step, which is saved."""
    model = run.model.train()
    if run.step == 0:
        torch.manual_seed(args.seed + RANK)  # dropout differs from rank to rank
    rows = streams(text.train, args.batch).chunk(RANKS)[RANK].to(args.device)
    width = args.segments_per_step * args.segment_len
    steps_per_pass = (rows.size(1) - 1) // width
    device_type = torch.device(args.device).type
    clock = time.process_time if device_type == "cpu" else time.time
    steps = range(run.step, args.steps)
    silent = True if RANK > 0 else None  # None: silent where stderr is no terminal
    with stop_requests() as stop:
        for step in tqdm(steps, name, initial=run.step, total=args.steps, disable=silent):
            began = clock()

            # The next characters of each stream, from the start again after the last ones.
            start = step % steps_per_pass * width
            inputs = rows[:, start:start + width]
            targets = rows[:, start + 1:start + width + 1]

            # The state goes from step to step. Resets teach the initial memory.
            reset = args.reset_every > 0 and step % args.reset_every == 0
            if start == 0 or reset:
                run.state = None

            # The learning rate rises over 50 steps, and falls to 0 along a cosine.
            rise = (step + 1) / 50
            fall = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
            for group in run.optimizer.param_groups:
                group["lr"] = args.lr * min(rise, fall)

            # The update.
            run.optimizer.zero_grad()
            with torch.autocast(device_type, torch.bfloat16, enabled=args.bf16):
                logits, state = unroll(model, inputs, run.state, args.bptt_depth)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())
            loss.backward()
            if RANKS > 1:
                average_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.optimizer.step()
            run.state = state.detach()

            # All ranks know the mean loss, and stop after the same step.
            shared = torch.tensor([loss.item() / RANKS, len(stop)], device=args.device)
            if RANKS > 1:
                dist.all_reduce(shared)
            mean_loss, n_requests = shared.tolist()
            if not (math.isfinite(mean_loss) and math.isfinite(norm)):
                fail(f"the loss is {mean_loss}, and the norm of its gradient {norm}, at step "
                     f"{step + 1}: take an --lr below {args.lr}")
            bits = mean_loss / math.log(2)
            run.bpc += (0.05 if step > 0 else 1.0) * (bits - run.bpc)
            run.step = step + 1
            run.seconds += clock() - began

            # Now and then: bits per character of the validation part, a row, a checkpoint.
            valid = ""
            due = run.step % args.eval_every == 0
            if due and RANK == 0:
                part = text.valid[:max(N_VALID, args.segment_len + 1)]
                valid = evaluate(args, model, part)["bpc"]
                model.train()
                tqdm.write(f"{name:16} step {run.step:6}   bits per character: "
                           f"train {run.bpc:.3f}   valid {valid:.3f}")
            last = run.step == args.steps
            if run.step % 20 == 0 or due or last:
                characters = run.step * args.batch * width
                run.rows.append([name, run.step, characters, run.seconds, run.bpc, valid])
            if due or last or n_requests > 0:
                save()
            if n_requests > 0:
                raise KeyboardInterrupt
        if stop:  # asked after the last step, which is saved
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
        if RANKS == 1:  # torchrun may send both
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


def save_runs(args, runs, text):
    """checkpoint.pt, with all that an exact resume needs, and metrics.csv. All ranks call it."""
    random_state = [torch.get_rng_state()]
    if args.device.startswith("cuda"):
        random_state.append(torch.cuda.get_rng_state(args.device))
    states = {}
    for name, run in runs.items():
        if run.state is not None:
            states[name] = tuple(tree_map(torch.Tensor.cpu, run.state))  # plain, for weights_only
    ranks = [{"random_state": random_state, "states": states}] * RANKS
    if RANKS > 1:
        dist.all_gather_object(ranks, ranks[RANK])
    if RANK > 0:
        return

    saved = {}
    for name, run in runs.items():
        saved[name] = vars(run) | {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "state": None,  # every rank has its own
        }
    checkpoint = {
        "settings": settings_of(args),
        "runs": saved,
        "ranks": ranks,
        "vocabulary": list(text.vocabulary),
        "sha256": text.sha256,
    }
    write(args.out / "checkpoint.pt", partial(torch.save, checkpoint))

    def write_rows(path):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "step", "characters", "seconds", "train_bpc", "valid_bpc"])
            for run in runs.values():
                writer.writerows(run.rows)
    write(args.out / "metrics.csv", write_rows)


def settings_of(args):
    """The flags as plain values."""
    others = ("out", "resume", "sample")
    return {name: value for name, value in vars(args).items() if name not in others}


def load(folder):
    """What save_runs put into a folder. One line where there is nothing of use."""
    path = folder / "checkpoint.pt"
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch does not look at checksums
        if damaged:
            fail(f"{path} is damaged: {damaged} no longer has the checksum it was written with")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("settings", "runs", "ranks", "vocabulary", "sha256")}
    except Exception as reason:  # whatever is wrong with a file, it is one line for the user
        fail(f"{path} is no run of train_lm.py to go on with: {reason!r}")


def load_runs(args, runs, text):
    """Bring new runs to where those of the checkpoint stand."""
    saved = load(Path(args.resume))
    if text.sha256 != saved["sha256"]:
        fail(f"the run in {args.resume} began with another text, of sha256 {saved['sha256']}")
    n_ranks = len(saved["ranks"])
    if n_ranks != RANKS:
        fail(f"the run in {args.resume} began on {n_ranks} ranks, not {RANKS}: resume it with "
             f"torchrun --nproc-per-node {n_ranks}")
    mine = saved["ranks"][RANK]
    for name, run in runs.items():
        values = saved["runs"][name]
        run.model.load_state_dict(values.pop("model"))
        run.optimizer.load_state_dict(values.pop("optimizer"))
        vars(run).update(values)
        if name in mine["states"]:
            run.state = tree_map(lambda t: t.to(args.device), State(*mine["states"][name]))
    torch.set_rng_state(mine["random_state"][0])
    if args.device.startswith("cuda") and len(mine["random_state"]) > 1:
        torch.cuda.set_rng_state(mine["random_state"][1], args.device)


def open_folder(args):
    """The folder of this run. Until this process ends, no other run gets into it."""
    if args.resume is not None:
        folder = Path(args.resume)
    elif args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = new_folder(Path(args.data[0]).stem or "text")
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


def report(args, runs, text):
    """Evaluate on the test part, print, draw, and write a sample."""
    results = {}
    quarter = max(1, args.segment_len // 4)
    print(f"\nbits per character of the test part, {len(text.test)} characters; 'first' are the "
          f"first {quarter} of a segment")
    print("model            state at a boundary                all  first   rest")
    for name, bits in references(text).items():
        results[name] = {"bpc": bits}
        print(f"{name:48}{bits:7.3f}", flush=True)
    for name, run in runs.items():
        characters = run.step * args.batch * args.segments_per_step * args.segment_len
        per_second = round(characters / RANKS / run.seconds)
        results[name] = {"seconds": round(run.seconds, 1), "per_second": per_second}
        for state, between in boundaries(run.model).items():
            if state == "of another stream" and n_streams(text.test, args.segment_len) == 1:
                break  # there is no other
            scores = evaluate(args, run.model, text.test, between)
            results[name][state] = scores
            by_position = torch.tensor(scores["by_position"])
            first = by_position[:quarter].mean()
            rest = by_position[quarter:].mean()
            print(f"{name:17}{state:31}{scores['bpc']:7.3f}{first:7.3f}{rest:7.3f}", flush=True)
            if scores["state_floats"] == 0:
                break  # there is nothing to tamper with

    # What the model writes, after the prompt or else the first characters of the test part.
    prompt = os.fsencode(args.prompt) or text.decode(text.test[:2 * args.segment_len])
    sample = b"".join(write_on(args, runs[args.model].model, text.vocabulary, prompt))
    write(args.out / "sample.txt", lambda temporary: temporary.write_bytes(sample))

    pictures = {"loss.png": draw_loss(runs), "position.png": draw_position(runs, results)}
    for name, picture in pictures.items():
        write(args.out / name, partial(picture.savefig, format="png"))
        plt.close(picture)
    write_json(args.out / "result.json", {
        "command": args.command,
        "seed": args.seed,
        "date": time.strftime("%Y-%m-%d"),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "hardware": hardware(args),
        "flags": settings_of(args),
        "results": results | {"text_sha256": text.sha256, "ranks": RANKS},
    })

    print()
    unit = "CPU seconds" if args.device == "cpu" else "seconds"
    for name, run in runs.items():
        print(f"{name}: {results[name]['carried']['bpc']:.3f} bits per character, after "
              f"{run.seconds:.0f} {unit} of training")
    files = ", ".join([*pictures, "result.json", "metrics.csv", "sample.txt"])
    print(f"pictures and numbers are in {args.out}: {files}")
    print(f"to let it write on: python train_lm.py --sample {shlex.quote(str(args.out))}")


def hardware(args):
    """What the run was computed on."""
    if args.device.startswith("cuda"):
        return torch.cuda.get_device_name(args.device)
    return f"{args.device} on {platform.machine()}, threads: {args.threads}"


def write_json(path, content):
    """A dict as a JSON file."""
    text = json.dumps(content, indent=1)
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


STYLES = [("#0072B2", "o"), ("#D55E00", "s")]  # colours and markers, of --model and --baseline


def draw_loss(runs):
    """Bits per character over the characters read, without the first 5 %, which are far higher."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for (color, marker), (name, run) in zip(STYLES, runs.items(), strict=False):
        rows = [row for row in run.rows if row[2] > 0.05 * run.rows[-1][2]]
        read = [row[2] for row in rows]
        bits = [row[4] for row in rows]
        axis.plot(read, bits, color=color, label=f"{name}, training")
        evaluated = [row for row in rows if row[5] != ""]
        read = [row[2] for row in evaluated]
        bits = [row[5] for row in evaluated]
        axis.plot(read, bits, "--", marker=marker, color=color, label=f"{name}, validation")
    ends = ", ".join(f"{name} {run.bpc:.2f}" for name, run in runs.items())
    axis.set(xlabel="characters read", ylabel="bits per character (training: running mean)",
             title=f"lower is better; training ends at: {ends}")
    axis.legend()
    return figure


def draw_position(runs, results):
    """Bits per character of the test part over the position in the segment."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for (color, marker), name in zip(STYLES, runs, strict=False):
        for state, line in {"carried": "-", "reset": ":"}.items():
            if state in results[name]:
                bits = results[name][state]["by_position"]
                label = f"{name}, state {state}" if "reset" in results[name] else name
                positions = range(1, len(bits) + 1)
                axis.plot(positions, bits, line, marker=marker, ms=4, color=color, label=label)
    axis.set(xlabel="position in the segment, characters", ylabel="bits per character",
             title="the gap between carried and reset is what memory is worth")
    axis.legend()
    return figure


# ==================================================================================================
# Main


def main(args):
    """Check all there is to check before anything is written; train; report. Or write text."""
    plt.switch_backend("Agg")  # pictures go to files
    plt.rcParams["font.size"] = 12
    torch.set_num_threads(args.threads)
    try:
        if args.sample is not None:
            if RANK == 0:
                write_text(args)
            return
        text, runs = prepare(args)
    except ValueError as reason:
        fail(reason)

    if RANK == 0:
        args.out = open_folder(args)
    if args.resume is not None:
        load_runs(args, runs, text)
    save_runs(args, runs, text)
    if RANK == 0:
        write_json(args.out / "config.json", settings_of(args))
        print_settings(args, text, runs)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    try:
        for name, run in runs.items():
            train(args, run, name, text, lambda: save_runs(args, runs, text))
        if RANK == 0:
            report(args, runs, text)
    except KeyboardInterrupt:
        if RANK == 0:
            folder = shlex.quote(str(args.out))
            print(f"\nstopped; to go on: {LAUNCH} --resume {folder}")
        sys.exit(130)
    finally:
        if RANKS > 1:
            dist.destroy_process_group()


def prepare(args):
    """The text, and the runs at step 0. Raises ValueError where something does not fit."""
    if args.batch % RANKS != 0:
        raise ValueError(f"--batch {args.batch} must be divisible by the {RANKS} ranks")
    if RANKS > 1:
        join_ranks(args)
    if RANK > 0:
        dist.barrier()  # until the first rank has read the text, which it may download
    text = Text(read(args.data))
    if RANK == 0 and RANKS > 1:
        dist.barrier()
    check_sizes(args, text)
    names = [args.model]
    if args.baseline not in ("none", args.model):
        names.append(args.baseline)
    runs = {name: new_run(args, name, len(text.vocabulary)) for name in names}
    model = runs[args.model].model
    trial = write_on(args, model, text.vocabulary, os.fsencode(args.prompt))
    list(islice(trial, 2))  # the prompt and a character: a wrong flag is known before training
    return text, runs


def print_settings(args, text, runs):
    """What is going to be trained, on what."""
    print(f"{' '.join(args.data)}: {len(text.train)} characters to train on, {len(text.valid)} "
          f"to validate, {len(text.test)} to test; {len(text.vocabulary)} different ones")
    if text.n_unseen > 0:
        print(f"left out: {text.n_unseen} characters that the training part does not have")
    n_characters = args.batch * args.segments_per_step * args.segment_len
    print(f"device {args.device}, ranks {RANKS}, seed {args.seed}, {n_characters} characters a "
          f"step, files in {args.out}")
    for name, run in runs.items():
        n_parameters = sum(p.numel() for p in run.model.parameters())
        print(f"{name}: {n_parameters} parameters, state of {run.model.state_floats()} floats",
              flush=True)


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
