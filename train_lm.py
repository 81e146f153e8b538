"""Train a character-level language model with memory, beside the same model without memory.

    python train_lm.py
        Read Python's standard library, which you already have, in two to four minutes on a laptop
        CPU. At the end, rmt needs at least 0.05 bits per byte less than transformer.
    python train_lm.py --data book.txt notes/
        Your own text: files, and folders of files. --data enwik8 downloads the text of the paper.
    python train_lm.py --sample out/lm-1 --prompt "def "
        The trained model writes text.
    python train_lm.py --resume out/lm-1
        Continue an interrupted run. It gives the numbers of an uninterrupted one, on a CPU to the
        last bit.

Each run writes to a folder of its own, out/lm-1 (-2, -3, ...): metrics.csv, which grows during
training, a checkpoint of each model (rmt.pt, transformer.pt), config.json, result.json, loss.png,
position.png and sample.txt.

The model reads and writes bytes. In English text and in code nearly every character is one byte; in
other scripts it takes two to four. So bits per character are reported beside bits per byte.

To use a trained model in your own code:

    import torch
    from rmt import RMT, Config, generate

    saved = torch.load("out/lm-1/rmt.pt", map_location="cpu")
    model = RMT(Config(**saved["config"]))
    model.load_state_dict(saved["model"])
    vocabulary = bytes(saved["vocabulary"])  # token 3 is the byte vocabulary[3]
    prompt = torch.tensor([[vocabulary.index(byte) for byte in b"import "]])
    new = generate(model.eval(), prompt, n_new=100, temperature=0.8)
    print(bytes(vocabulary[token] for token in new[0]))

This file needs rmt.py beside it and nothing else from this project. It begins with the training
loop; the sections after it are evaluation, texts, writing, files, flags, report and main.
"""
import argparse
import codecs
import csv
import gzip
import hashlib
import json
import math
import os
import platform
import shlex
import socket
import sys
import sysconfig
import time
import zipfile
from dataclasses import asdict, fields
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from rmt import RMT, VARIANTS, Config, State, check_sampling, stream, unroll

# ==================================================================================================
# Training


def train(args, variant, text):
    """Train one model for args.steps steps, from its checkpoint if it has one -> model, run."""
    model = build(args, variant, len(text.vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), fused=True)
    run_segments = torch.compile(unroll) if args.compile else unroll
    torch.manual_seed(args.seed)  # draws noise and dropout
    run = SimpleNamespace(
        step=0,
        state=None,   # of all streams, at the end of the last step; None: the initial one
        bits=0.0,     # running mean, per byte
        seconds=0.0,  # of CPU time
        rows=[],      # of metrics.csv
    )
    path = Path(args.out, f"{variant}.pt")
    if path.exists():
        load(args, path, run, model, optimizer, text)

    rows = streams(text.train, args.batch).to(args.device)
    width = args.segments_per_step * args.segment_len
    steps_per_pass = (rows.size(1) - 1) // width
    device_type = torch.device(args.device).type
    steps = range(run.step, args.steps)
    for step in tqdm(steps, variant, initial=run.step, total=args.steps, disable=None):
        began = time.process_time()

        # The next bytes of each stream. After the last ones, it starts over.
        start = step % steps_per_pass * width
        inputs = rows[:, start:start + width]
        targets = rows[:, start + 1:start + width + 1].long()

        # The state is carried from step to step. Resets teach the initial memory.
        if start == 0 or (args.reset_every > 0 and step % args.reset_every == 0):
            run.state = None

        # The learning rate rises over 50 steps, and falls to 0 along a cosine.
        rise = (step + 1) / 50
        fall = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(rise, fall)

        # The update.
        optimizer.zero_grad()
        with torch.autocast(device_type, torch.bfloat16, enabled=args.bf16):
            logits, state = run_segments(model, inputs, run.state, bptt_depth=args.bptt_depth)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.state = state.detach()
        if not math.isfinite(loss.item() + grad_norm.item()):
            fail(f"the loss is {loss.item()} and the norm of its gradient {grad_norm.item()} in "
                 f"step {step + 1}: take an --lr below {args.lr}")

        # Running mean, and now and then the validation part.
        bits = loss.item() / math.log(2)
        run.bits += (0.05 if step > 0 else 1.0) * (bits - run.bits)
        run.seconds += time.process_time() - began
        run.step = step + 1
        is_last = run.step == args.steps
        valid = None
        if run.step % args.eval_every == 0 or is_last:
            valid = evaluate(args, model, text.valid[:200_000])["bits_per_byte"]
            model.train()
            tqdm.write(f"{variant:16} step {run.step:6}   bits per byte: "
                       f"training {run.bits:.3f}   validation {valid:.3f}")

        # Metrics, and a checkpoint.
        if run.step % 20 == 0 or valid is not None:
            row = {"model": variant, "step": run.step, "bytes": run.step * args.batch * width,
                   "train_bits": run.bits, "valid_bits": valid, "grad_norm": grad_norm.item()}
            run.rows.append(row)
            write_row(args.out, row)  # for Weights & Biases: wandb.log(row)
        if run.step % 100 == 0 or is_last:
            save(args, path, run, model, optimizer, text)
    return model, run


def build(args, variant, vocab_size):
    """A model of one row of VARIANTS, untrained. Raises ValueError where sizes do not fit."""
    if VARIANTS[variant].mask == "full":
        raise ValueError(f"{variant} sees whole segments, the next byte too: take rmt")
    torch.manual_seed(args.seed)
    settings = {name: getattr(args, name) for name in config_fields()}
    return RMT(Config(variant, vocab_size, **settings)).to(args.device)


def config_fields():
    """The fields of Config that are flags. (--model is the variant; the text has a vocabulary.)"""
    names = [field.name for field in fields(Config)]
    names.remove("variant")
    names.remove("vocab_size")
    return names


# ==================================================================================================
# Evaluation


@torch.no_grad()
def evaluate(args, model, part, between=lambda state: state):
    """Bits per byte of a part of the text, over all of it and by position in the segment.

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
        "bits_per_byte": (bits.sum() / counts.sum()).item(),
        "by_position": (bits / counts).tolist(),
    }


def streams(tokens, n):
    """Cut tokens into n streams of equal length: (n, length + 1).

    Each ends with the first token of the next, which is the last target.
    """
    length = (len(tokens) - 1) // n
    return torch.stack([tokens[i * length:(i + 1) * length + 1] for i in range(n)])


def n_streams(part, T):
    """How many streams a part is cut into: at most 64, and of 32 segments or more if possible."""
    return max(1, min(64, (len(part) - 1) // (32 * T)))


def boundaries(model):
    """What the state can be at a boundary: functions that evaluate takes as between."""
    return {
        "carried": lambda state: state,
        "reset": lambda state: model.initial_state(len(state.memory)),
        "of another stream": lambda state: state.map(lambda t: t.roll(1, 0)),
    }


def references(text):
    """Bits per byte of the test part by counts of the training part, and by gzip."""
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
# Texts


class Text:
    """The bytes of a text in three parts: train, valid and test, 90, 5 and 5 % of it.

    A part is a tensor (length,) of tokens: indices into vocabulary, the distinct bytes of the
    training part. Other bytes are left out.
    """

    def __init__(self, raw):
        first_cut = len(raw) * 90 // 100
        second_cut = len(raw) * 95 // 100
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.vocabulary = bytes(sorted(set(raw[:first_cut])))
        self.train = self.encode(raw[:first_cut])
        self.valid = self.encode(raw[first_cut:second_cut])
        self.test = self.encode(raw[second_cut:])
        self.n_unseen = len(raw) - len(self.train) - len(self.valid) - len(self.test)
        self.bytes_per_character = bytes_per_character(raw)

    def encode(self, raw):
        """Bytes -> tokens (length,) uint8."""
        unseen = bytes(set(range(256)) - set(self.vocabulary))
        table = bytes.maketrans(self.vocabulary, bytes(range(len(self.vocabulary))))
        tokens = np.frombuffer(raw.translate(table, unseen), np.uint8)
        return torch.from_numpy(tokens.copy())

    def decode(self, tokens):
        """Tokens (length,) -> bytes."""
        return bytes(self.vocabulary[i] for i in tokens.tolist())


def bytes_per_character(raw):
    """How many bytes a character of the test part has on average; None if it is not UTF-8."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    test = np.frombuffer(raw[len(raw) * 95 // 100:], np.uint8)
    begins = test & 0b11000000 != 0b10000000  # continuation bytes are 10xxxxxx
    return len(test) / max(1, begins.sum().item())


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
    """The bytes of --data. Each content is read once, or a copy of the test part, which is the end
    of the text, could be in the training part."""
    contents = {}  # content: the file that it was first found in
    for name in names:
        if name == "python":
            contents[standard_library()] = None
            continue
        for path in files_of(name):
            content = read_file(path)
            if content not in contents:
                contents[content] = path
            elif content and not path.samefile(contents[content]):
                print(f"{path} is left out: it has the same content as {contents[content]}")
    return b"".join(contents)


def standard_library():
    """The code of Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = root.rglob("*.py")
    files = [path for path in files if not others & set(path.relative_to(root).parts)]
    return b"".join(path.read_bytes() for path in sorted(files, key=Path.as_posix))


def files_of(name):
    """The files that a name of --data refers to, in a fixed order."""
    if name in DOWNLOADS:
        return [download(name)]
    root = Path(name)
    if root.is_file():
        return [root]
    if name == "" or not root.is_dir():
        fail(f"--data {name!r} is no file or folder, and not one of "
             f"{', '.join(['python', *DOWNLOADS])}: give the place of your text with --data")
    files = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        of_a_run = parts[0] == "out"  # where this script writes if it is started in this folder
        if path.is_file() and not hidden and not of_a_run:
            files.append(path)
    return files


def read_file(path):
    """The bytes of one file, out of its archive if it is packed."""
    content = path.read_bytes()
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                content = b"".join(archive.read(member) for member in archive.namelist())
        except Exception as reason:  # whatever is wrong with a file, the user gets one line
            fail(f"--data {path} cannot be unpacked: {reason!r}")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        fail(f"--data {path} is encoded in UTF-16 or UTF-32: save it in UTF-8 (in Notepad with "
             "Save As, in PowerShell with: Get-Content OLD | Set-Content -Encoding utf8 NEW)")
    if b"\0" in content:
        fail(f"--data {path} has zero bytes: it is not text, or it is text in UTF-16 or UTF-32, "
             "which must be saved in UTF-8")
    return content


def download(name):
    """The path of a text of DOWNLOADS, which is downloaded to out/data beside this file, once."""
    url, sha256 = DOWNLOADS[name]
    path = Path(__file__).resolve().parent / "out" / "data" / url.split("/")[-1]
    if path.exists():
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            fail(f"{path} has sha256 {found} and should have {sha256}: delete it, and it will be "
                 "downloaded again")
        return path
    timeout_before = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)
        torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
    except Exception as reason:  # a download can fail in many ways
        fail(f"{name} cannot be downloaded from {url}: {reason}. Download it yourself (sha256 "
             f"{sha256}) and give it as --data FILE")
    finally:
        socket.setdefaulttimeout(timeout_before)
    return path


def check_sizes(args, text):
    """End with one line where a part of the text is too short."""
    T = args.segment_len
    needed = {"train": args.batch * args.segments_per_step * T + 1, "valid": T + 1, "test": T + 1}
    for name, least in needed.items():
        length = len(getattr(text, name))
        if length < least:
            fail(f"--data {' '.join(args.data)}: its {name} part has {length} bytes and needs "
                 f"{least}: give more text, or a smaller --segment-len (for train, --batch)")


# ==================================================================================================
# Writing


def write_on(args, model, vocabulary, prompt):
    """Yield a prompt, and then what the model writes after it, byte by byte."""
    tokens = torch.tensor([encode_prompt(vocabulary, prompt)], device=args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    yield prompt
    new = stream(model.eval(), tokens, None, args.temperature, args.top_k, generator)
    for token in islice(new, args.length):
        yield bytes([vocabulary[token.item()]])


def encode_prompt(vocabulary, prompt):
    """The tokens of a prompt, or one line if it has bytes that the model does not know."""
    unknown = bytes(byte for byte in prompt if byte not in vocabulary)
    if unknown:
        characters = unknown.decode("utf-8", "backslashreplace")
        fail(f"--prompt has {characters!r}, which the training text does not: leave that out")
    return [vocabulary.index(byte) for byte in prompt]


def write_sample(args):
    """What --sample does: print text while a trained model writes it."""
    path = Path(args.sample, f"{args.model}.pt")
    if not path.exists():
        fail(f"--sample {args.sample} has no checkpoint of --model {args.model}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = RMT(Config(**saved["config"])).to(args.device)
        model.load_state_dict(saved["model"])
        vocabulary = bytes(saved["vocabulary"])
        check_sampling(model, args.temperature, args.top_k)
    except Exception as reason:  # whatever is wrong, the user gets one line
        fail(f"--sample {args.sample}, --model {args.model}: {reason!r}")
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")  # whole characters
    prompt = os.fsencode(args.prompt) or vocabulary[:1]
    for piece in write_on(args, model, vocabulary, prompt):
        print(decoder.decode(piece), end="", flush=True)
    print(decoder.decode(b"", final=True))


# ==================================================================================================
# Files
#
# A checkpoint has all that the next step depends on. However the process ends, the run resumes from
# its last checkpoint, and its numbers are those of a run that was never interrupted.


def save(args, path, run, model, optimizer, text):
    """Write a checkpoint. The file is complete at any moment, even if the process is killed."""
    checkpoint = vars(run) | {
        "state": None if run.state is None else tuple(run.state),
        "config": asdict(model.config),
        "vocabulary": list(text.vocabulary),
        "flags": vars(args),
        "text": text.sha256,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(args.device) if on_gpu(args) else None,
    }
    try:
        torch.save(checkpoint, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except RuntimeError as reason:  # what torch.save raises when the disk is full
        fail(f"{path} could not be written, the last checkpoint stays: {reason}")


def load(args, path, run, model, optimizer, text):
    """Restore a checkpoint that save has written."""
    saved = read_checkpoint(args, path, model, text)
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    if on_gpu(args) and saved["random_cuda"] is not None:
        torch.cuda.set_rng_state(saved["random_cuda"], args.device)
    for name in vars(run):
        setattr(run, name, saved[name])
    if run.state is not None:
        device = next(model.parameters()).device
        run.state = State(*run.state).map(lambda t: t.to(device))


# Flags that cannot change when a run is resumed, besides those of Config.
KEPT = ["seed", "batch", "segments_per_step"]


def read_checkpoint(args, path, model, text):
    """Load a checkpoint and give the model its weights. One line if the file does not fit."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load ignores checksums
        if damaged is not None:
            fail(f"{path} is damaged: the checksum of {damaged} is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["text"] != text.sha256:
            fail(f"--data {' '.join(args.data)} is not the text that {path} was trained on")
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
        fail(f"{path} is not a checkpoint of train_lm.py: {reason!r}")


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
    for name in ("out", "resume", "sample"):
        del settings[name]
    write_json(Path(args.out, "config.json"), settings)


def new_folder(args):
    """Make the folder of a new run: --out, or the first out/lm-N that does not exist."""
    if args.out is not None:
        folder = Path(args.out)
        if args.out == "" or (folder.exists() and any(folder.iterdir())):
            fail(f"--out {args.out!r} is not a new or empty folder: take another name (--resume "
                 "continues a run)")
        folder.mkdir(parents=True, exist_ok=True)
        return args.out
    n = 1
    while True:
        folder = Path(f"out/lm-{n}")
        try:
            folder.mkdir(parents=True)
            return folder.as_posix()
        except FileExistsError:  # perhaps of a run that began at the same moment
            n += 1


def fail(message):
    """End with one line and exit status 2."""
    print(f"train_lm.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


# ==================================================================================================
# Flags


RECIPE = {"memory_form": "raw", "write_slot": "embedding"}  # better for language than the paper's


def parse(argv):
    """The settings of a run: the flags given, else those of the run in --resume or --sample."""
    parser = argparse.ArgumentParser(
        usage="python train_lm.py [flags]", description=__doc__.splitlines()[0],
        formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=30),
        allow_abbrev=False)
    parser.error = fail

    flag = parser.add_argument_group("training").add_argument
    flag("--data", nargs="+", default=["python"], metavar="NAME",
         help=f"python (its library), {', '.join(DOWNLOADS)}, or files, folders")
    flag("--model", choices=VARIANTS, default="rmt", metavar="NAME", help=", ".join(VARIANTS))
    flag("--baseline", choices=[*VARIANTS, "none"], default="transformer", metavar="NAME",
         help="another model to train and compare, or none")
    flag("--steps", type=int, default=1500, metavar="N", help="optimizer steps")
    flag("--batch", type=int, default=32, metavar="N", help="streams of text, read side by side")
    flag("--segments-per-step", type=int, default=2, metavar="N",
         help="segments that a step reads of each stream")
    flag("--bptt-depth", type=int, metavar="N", help="boundaries that gradient crosses; None: all")
    flag("--reset-every", type=int, default=64, metavar="N",
         help="reset the states every N steps; 0: only where the text starts over")
    flag("--lr", type=float, default=0.012, metavar="X", help="learning rate at its peak")
    flag("--seed", type=int, default=0, metavar="N", help="random seed")
    flag("--bf16", action="store_true", help="compute in bfloat16")
    flag("--compile", action="store_true", help="use torch.compile; takes a minute to start")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    flag("--threads", type=int, default=1, metavar="N", help="CPU threads; 1 is fastest here")

    group = parser.add_argument_group("run")
    flag = group.add_argument
    flag("--eval-every", type=int, default=500, metavar="N", help="steps between evaluations")
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--out", metavar="FOLDER", help="where to write; None: out/lm-1, -2, ...")
    flag("--resume", metavar="FOLDER", help="continue the run in a folder")
    flag("--sample", metavar="FOLDER", help="write text with the --model of a run; no training")

    flag = parser.add_argument_group("sample").add_argument
    flag("--prompt", default="", metavar="TEXT", help="text to continue")
    flag("--length", type=int, default=1000, metavar="N", help="bytes to write")
    flag("--temperature", type=float, default=0.8, metavar="X", help="0: the most likely byte")
    flag("--top-k", type=int, metavar="N", help="sample from the N likeliest bytes; None: all")

    flag = parser.add_argument_group("model, the fields of Config in rmt.py").add_argument
    for name in config_fields():
        default = getattr(Config, name)
        kind = type(default)
        flag(f"--{name.replace('_', '-')}", type=kind, default=default, metavar=kind.__name__,
             help="(default: %(default)s)")
    parser.set_defaults(**RECIPE)

    args = parser.parse_args(argv)
    command = shlex.join(["python", Path(sys.argv[0]).name, *argv])
    folder = args.sample if args.resume is None else args.resume
    if folder is not None:
        settings = read_settings(folder, args)
        parser.set_defaults(**settings)
        command = f"{settings['command']} && {command}"
    parser.set_defaults(command=command)
    args = parser.parse_args(argv)

    at_least = {"steps": 1, "seed": 0, "batch": 1, "segments_per_step": 1, "bptt_depth": 0,
                "reset_every": 0, "lr": 0, "threads": 1, "eval_every": 1, "length": 1,
                "temperature": 0, "top_k": 1}
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:  # nan fails too
            fail(f"--{name.replace('_', '-')} {value} must be a number of at least {least}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as reason:
        fail(f"--device {args.device} cannot be used here, take --device cpu: "
             f"{str(reason).splitlines()[0]}")
    # Files get absolute names, so that the run can be resumed from any folder.
    no_files = ["", "python", *DOWNLOADS]
    for i, name in enumerate(args.data):
        if name not in no_files:
            args.data[i] = str(Path(name).absolute())
    return args


def read_settings(folder, args):
    """The settings of the run in a folder."""
    try:
        settings = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        differing = settings.keys() ^ ({*vars(args), "command"} - {"out", "resume", "sample"})
    except (OSError, ValueError, AttributeError) as reason:
        fail(f"{folder} holds no run: {reason}")
    if differing:
        fail(f"{folder} holds a run of another script or edition than this train_lm.py: they "
             f"differ in {', '.join(sorted(differing))}")
    return settings


# ==================================================================================================
# Report


def report(args, trained, text):
    """Evaluate on the test part, print, draw, and write a sample."""
    head = f"bits of the test part, {len(text.test)} bytes"
    print(f"\n{head:42}{'per byte':>8}{'per character':>16}")

    ratio = text.bytes_per_character

    def print_row(name, state, bits):
        per_character = "not UTF-8" if ratio is None else f"{bits * ratio:.3f}"
        print(f"{name:17}{state:25}{bits:8.3f}{per_character:>16}")

    results = {"bytes_per_character": ratio, "text_sha256": text.sha256}
    for name, bits in references(text).items():
        results[name] = {"bits_per_byte": bits}
        print_row(name, "", bits)
    for name, (model, run) in trained.items():
        results[name] = {"cpu_seconds": round(run.seconds, 1), "state_floats": model.state_floats()}
        for state, between in boundaries(model).items():
            if state == "of another stream" and n_streams(text.test, args.segment_len) == 1:
                break  # there is only one
            results[name][state] = evaluate(args, model, text.test, between)
            print_row(name, f"state {state}", results[name][state]["bits_per_byte"])
            if model.state_floats() == 0:
                break  # there is nothing to tamper with
    write_result(args, results)

    out = Path(args.out)
    with matplotlib.rc_context({"font.size": 12}):
        draw_loss(trained).savefig(out / "loss.png")
        draw_position(results, trained).savefig(out / "position.png")
    model, _ = trained[args.model]
    prompt = os.fsencode(args.prompt) or text.decode(text.test[:2 * args.segment_len])
    sample = b"".join(write_on(args, model, text.vocabulary, prompt))
    (out / "sample.txt").write_bytes(sample)

    print()
    for name, (_, run) in trained.items():
        print(f"{name}: {results[name]['carried']['bits_per_byte']:.3f} bits per byte, after "
              f"{run.seconds:.0f} CPU seconds of training")
    print(f"pictures, numbers and a sample are in {args.out}")
    print(f"to write more: python {sys.argv[0]} --sample {shlex.quote(args.out)}")


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

STYLES = [("#0072B2", "o"), ("#D55E00", "s")]  # colours and markers, of --model and --baseline


def draw_loss(trained):
    """Bits per byte over the bytes read, without the first 5 %, which are far higher."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for (color, marker), (name, (_, run)) in zip(STYLES, trained.items(), strict=False):
        rows = [row for row in run.rows if row["bytes"] > 0.05 * run.rows[-1]["bytes"]]
        axis.plot([row["bytes"] for row in rows], [row["train_bits"] for row in rows],
                  color=color, label=f"{name}, training")
        rows = [row for row in rows if row["valid_bits"] is not None]
        axis.plot([row["bytes"] for row in rows], [row["valid_bits"] for row in rows],
                  "--", marker=marker, color=color, label=f"{name}, validation")
    ends = ", ".join(f"{name} {run.bits:.2f}" for name, (_, run) in trained.items())
    axis.set(xlabel="bytes read", ylabel="bits per byte (training: running mean)",
             title=f"lower is better; training ends at: {ends}")
    axis.legend()
    return figure


def draw_position(results, names):
    """Bits per byte of the test part over the position in the segment."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for (color, marker), name in zip(STYLES, names, strict=False):
        for state, line in {"carried": "-", "reset": ":"}.items():
            if state in results[name]:
                bits = results[name][state]["by_position"]
                label = f"{name}, state {state}" if "reset" in results[name] else name
                positions = range(1, len(bits) + 1)
                axis.plot(positions, bits, line, marker=marker, ms=4, color=color, label=label)
    axis.set(xlabel="position in the segment, bytes", ylabel="bits per byte",
             title="the gap between reset and carried is what memory is worth")
    axis.legend()
    return figure


# ==================================================================================================
# Main


def main(argv):
    """Train --model and --baseline, and report; or let a trained model write."""
    args = parse(argv)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        if args.sample is not None:
            write_sample(args)
        else:
            run_all(args)
    except KeyboardInterrupt:
        if args.out is not None:
            print(f"\nstopped; to resume: python {sys.argv[0]} --resume {shlex.quote(args.out)}")
        sys.exit(130)
    except OSError as reason:  # a file that cannot be read, a folder that cannot be written
        fail(reason)
    finally:
        torch.set_num_threads(threads_before)  # in case a notebook runs this script


def run_all(args):
    """Check all settings before anything is written; train; report."""
    text = Text(read(args.data))
    encode_prompt(text.vocabulary, os.fsencode(args.prompt))
    names = [args.model]
    if args.baseline not in ("none", args.model):
        names.append(args.baseline)
    try:
        models = {name: build(args, name, len(text.vocabulary)) for name in names}
        check_sampling(models[args.model], args.temperature, args.top_k)
    except ValueError as reason:  # sizes that do not fit
        fail(reason)
    check_sizes(args, text)

    rows = []  # of metrics.csv, as far as the checkpoints are
    if args.resume is not None:
        for name, model in models.items():
            path = Path(args.resume, f"{name}.pt")
            if path.exists():
                rows += read_checkpoint(args, path, model, text)["rows"]

    args.out = args.resume or new_folder(args)
    write_settings(args)
    Path(args.out, "metrics.csv").unlink(missing_ok=True)
    for row in rows:
        write_row(args.out, row)
    print(f"{' '.join(args.data)}: {len(text.train)} bytes to train on, {len(text.valid)} to "
          f"validate, {len(text.test)} to test; {len(text.vocabulary)} distinct bytes")
    if text.n_unseen > 0:
        print(f"ignored: {text.n_unseen} bytes of values that the training part does not have")
    n_bytes = args.batch * args.segments_per_step * args.segment_len
    print(f"device {args.device}, seed {args.seed}, {n_bytes} bytes a step, files in {args.out}")
    for name, model in models.items():
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: {n_parameters} parameters, state of {model.state_floats()} floats")
    report(args, {name: train(args, name, text) for name in names}, text)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        # Lines are shown as they are printed. What the console cannot show is escaped.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    main(sys.argv[1:])
