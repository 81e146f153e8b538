"""Measure speed and memory: print tables, and write assets/results/speed.json.

    python assets/benchmark.py                           all sections on one CPU thread: 15 minutes
    python assets/benchmark.py --only peers diagonal     these sections; the record keeps the others
    python assets/benchmark.py --device cuda             on a GPU
    python assets/benchmark.py --quick                   seconds: does it run? Writes nothing

    peers        time of other implementations over ours
    ceiling      share of the rate of the bare matrix products
    grid         tokens per second and peak memory: size, batch, torch.compile, bfloat16
    diagonal     time of unroll over unroll_diagonal
    memory       peak megabytes of streaming, and of checkpointing with its price in time

Contestants take turns, so that a busy machine slows them alike. A time is the median over turns, a
ratio is the median of the turns' ratios. On a CPU a time is the CPU time of one thread. Training is
forward, loss and backward without an optimizer step; inference is forward without gradient. Where
contestants must compute the same, that is asserted; nothing is asserted on time.

Two rivals take part where they can be imported: transformers, and
recurrent-memory-transformer-pytorch.
"""
import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from inspect import getdoc
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rmt import RMT, Config, unroll, unroll_diagonal  # noqa: E402


class Size(NamedTuple):
    """A model, and the batch and number of segments that it reads."""
    config: Config
    batch: int
    n_segments: int


SIZES = {
    #                           V    T   L   H    D   M   batch, segments
    "copy":  Size(Config("rmt", 13,  8,   2,  4,  64,  8), 16, 9),   # train_copy.py's defaults
    "lm":    Size(Config("rmt", 100, 32,  2,  4,  64,  8), 32, 2),   # train_lm.py's defaults
    "small": Size(Config("rmt", 256, 16,  4,  4,  64,  4), 8, 32),
    "deep":  Size(Config("rmt", 256, 16,  12, 4,  64,  4), 8, 32),
    "tiny":  Size(Config("rmt", 256, 32,  4,  1,  64,  4), 8, 4),
    "S":     Size(Config("rmt", 256, 128, 4,  4,  256, 8), 8, 4),    # 3 M parameters
    "M":     Size(Config("rmt", 256, 256, 6,  6,  384, 16), 4, 4),   # 11 M parameters
    "L":     Size(Config("rmt", 256, 512, 14, 12, 768, 16), 8, 4),   # 100 M parameters
    "160M":  Size(Config("armt", 50_000, 1024, 12, 12, 768, 16), 1, 128),  # 131,072 tokens, as [DB]
}


# -------------------------------------------------------------------------------- measuring


def prepare(seed):
    """What every process does first: one thread, one seed, and no warnings among the tables."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(seed)


def build(args, size, batch=None, n_segments=None, **changes):
    """A model of that size with changes in its config, and tokens (B, n_segments T)."""
    config, default_batch, default_segments = SIZES[size]
    config = replace(config, **changes)
    torch.manual_seed(args.seed)
    model = RMT(config).to(args.device)
    shape = batch or default_batch, (n_segments or default_segments) * config.segment_len
    return model, torch.randint(config.vocab_size, shape).to(args.device)


def now(device):
    """Seconds: of this process's CPU time, or on the clock once the GPU has finished."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def race(args, contestants):
    """Call contestants {name: run} in turns, after one call to warm up.

    Returns {name: seconds of each turn} and {name: what the first call returned}.
    """
    results = {name: run() for name, run in contestants.items()}
    times = {name: [] for name in contestants}
    turns = 0
    stop = time.perf_counter() + args.seconds
    while turns < args.turns or time.perf_counter() < stop:
        turns += 1
        for name, run in contestants.items():
            start = now(args.device)
            run()
            times[name].append(now(args.device) - start)
    return times, results


def milliseconds(times):
    """The median of some seconds."""
    return rounded(1000 * statistics.median(times))


def ratio(times, others):
    """The median over turns of times / others."""
    turns = [mine / other for mine, other in zip(times, others, strict=True)]
    return rounded(statistics.median(turns))


def rounded(number):
    """Three significant digits."""
    return float(f"{number:.3g}")


def training(model, run, tokens):
    """A function for one training step of run(tokens) -> (logits, ...); it returns the loss."""
    def step():
        model.zero_grad()
        logits = run(tokens)[0]
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss.detach()
    return step


def inference(model, run, tokens):
    """A function for one forward pass of run(tokens) -> (logits, ...); it returns the logits."""
    model.eval()

    @torch.no_grad()
    def forward():
        return run(tokens)[0]
    return forward


WORKS = {"training": training, "inference": inference}


class Peak:
    """The megabytes by which the peak of memory rises from now on, where CUDA or Linux tell it."""

    def __init__(self, device):
        self.device = device
        self.known = device == "cuda" or os.path.exists("/proc/self/clear_refs")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif self.known:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is in use now
        self.before = self.read()

    def read(self):
        """The peak so far, in MB."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        if not self.known:
            return 0
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024

    def growth(self):
        """How far it has risen, or None."""
        return rounded(self.read() - self.before) if self.known else None


def load_code(args):
    """Take one small step, so that what a first call loads does not count as its memory."""
    model, tokens = build(args, "copy", 1, 1)
    training(model, partial(unroll, model, checkpoint=True), tokens)()


def in_fresh_process(function, *values, **environment):
    """function(*values) in a new process, in which nothing is compiled or allocated yet."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *values).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


# ---------------------------------------------------------------------------------- peers


class Authors(nn.Module):
    """The authors' design: GPT-2 of transformers, with memory rows around each segment's rows."""

    def __init__(self, config: Config):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel
        self.config = config
        self.memory = nn.Parameter(0.02 * torch.randn(config.n_mem, config.d_model))
        n_positions = config.segment_len + 2 * config.n_mem
        self.gpt2 = GPT2LMHeadModel(GPT2Config(
            vocab_size=config.vocab_size, n_positions=n_positions, n_embd=config.d_model,
            n_layer=config.n_layer, n_head=config.n_head,
            activation_function="gelu", use_cache=False, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    def forward(self, tokens):
        """tokens (B, length) -> logits (B, length, V), the last memory."""
        M = self.config.n_mem
        memory = self.memory.expand(len(tokens), -1, -1)
        outputs = []
        for segment in tokens.split(self.config.segment_len, dim=1):
            x = torch.cat([memory, self.gpt2.transformer.wte(segment), memory], dim=1)
            x = self.gpt2.transformer(inputs_embeds=x).last_hidden_state
            memory = x[:, -M:]
            outputs.append(self.gpt2.lm_head(x[:, M:-M]))
        return torch.cat(outputs, dim=1), memory


def package(config: Config):
    """recurrent-memory-transformer-pytorch with its fastest flags and its own segment loop."""
    import recurrent_memory_transformer_pytorch as peer
    model = peer.RecurrentMemoryTransformer(
        config.d_model, num_tokens=config.vocab_size, depth=config.n_layer, heads=config.n_head,
        dim_head=config.d_model // config.n_head, num_memory_tokens=config.n_mem,
        seq_len=config.segment_len, use_flash_attn=True, memory_not_causal=False,
        use_xl_memories=False, num_residual_streams=1)
    return peer.RecurrentMemoryTransformerWrapper(model)


PEERS = {  # name of the module to import, name in the tables, what builds it
    "transformers": ("GPT-2", Authors),
    "recurrent_memory_transformer_pytorch": ("package", package),
}


def n_parameters(model):
    """How many numbers a model learns."""
    return sum(weight.numel() for weight in model.parameters())


def rivals(args, size):
    """Those that can be imported, {name: model}: as large as ours, within 15 %."""
    config = SIZES[size].config
    models = {}
    for module, (name, make) in PEERS.items():
        if find_spec(module):
            models[name] = make(config).to(args.device)
            larger = n_parameters(models[name]) / n_parameters(RMT(config))
            assert abs(larger - 1) < 0.15, f"{name} at {size} has {larger:.2f} times our parameters"
    return models


def peers(args):
    """Time of the others over ours; below 1 they are faster. Our transformer has no memory rows."""
    for module in PEERS:
        if not find_spec(module):
            print(f"{module} cannot be imported and does not take part.")
    for size in ["copy", "tiny"] if args.quick else ["copy", "lm", "tiny", "S", "M"]:
        model, tokens = build(args, size)
        plain, _ = build(args, size, variant="transformer")
        others = rivals(args, size)
        for work, start in WORKS.items():
            contestants = {"ours": start(model, partial(unroll, model), tokens)}
            contestants["transformer"] = start(plain, partial(unroll, plain), tokens)
            for name, other in others.items():
                contestants[name] = start(other, other, tokens)
            times, results = race(args, contestants)
            row = {"size": size, "work": work, "ours, ms": milliseconds(times["ours"])}
            for name, result in results.items():
                assert result.shape == results["ours"].shape and result.isfinite().all()
                if name != "ours":
                    row[f"{name} / ours"] = ratio(times[name], times["ours"])
            yield row


# -------------------------------------------------------------------------------- ceiling


def matrix_products(args, size, backward):
    """A function for a model's matrix products and nothing else, on operands of the same shapes."""
    config, B, n_segments = SIZES[size]
    N = config.segment_len + 2 * config.n_mem
    D, H, V = config.d_model, config.n_head, config.vocab_size
    layer = [                      # batch, rows, summed, columns
        (1, B * N, D, 3 * D),      # query, key and value
        (B * H, N, D // H, N),     # scores
        (B * H, N, N, D // H),     # their sums of values
        (1, B * N, D, D),          # out
        (1, B * N, D, 4 * D),      # the feed-forward layer
        (1, B * N, 4 * D, D),
    ]
    shapes = n_segments * (config.n_layer * layer + [(1, B * config.segment_len, D, V)])
    operands = {}
    for n, i, j, k in shapes:
        of_shape = [(n, i, j), (n, k, j), (n, i, k)]
        operands[n, i, j, k] = [torch.randn(s, device=args.device).squeeze(0) for s in of_shape]

    def run():
        for shape in shapes:
            x, weight, y = operands[shape]
            x @ weight.mT
            if backward:
                y @ weight    # the gradient of x
                y.mT @ x      # the gradient of the weight
    return run


def ceiling(args):
    """The share of the machine's rate of matrix products that a model reaches."""
    for size in ["tiny"] if args.quick else ["tiny", "S", "M"]:
        model, tokens = build(args, size)
        for work, start in WORKS.items():
            products = matrix_products(args, size, backward=work == "training")
            with FlopCounterMode(display=False) as counter:
                products()
            ours = start(model, partial(unroll, model), tokens)
            times, _ = race(args, {"ours": ours, "products": products})
            rate = counter.get_total_flops() / statistics.median(times["ours"])
            yield {
                "size": size,
                "work": work,
                "ours, ms": milliseconds(times["ours"]),
                "products, ms": milliseconds(times["products"]),
                "ours, GFLOP/s": rounded(rate / 1e9),
                "share": ratio(times["products"], times["ours"]),
            }


# ----------------------------------------------------------------------------------- grid


def compile_step(model, how):
    """Let torch.compile make the model's step, in place."""
    if how == "compiled":
        model.forward = torch.compile(model.forward)
    if how == "reduce-overhead":
        step = torch.compile(model.forward, mode=how)

        def forward(tokens, state):
            logits, state = step(tokens, state)
            return logits.clone(), state.map(torch.clone)  # the next call overwrites them
        model.forward = forward


def reason(error):
    """Why a cell has no number, in a few words."""
    text = " ".join(str(error).split()).replace("|", "/")
    if isinstance(error, BrokenProcessPool) or "of memory" in text or "allocate memory" in text:
        return "out of memory"
    return f"failed: {type(error).__name__} {text}"[:80]


def grid_cell(args, size, batch, how, dtype):
    """The numbers of one cell, from a process of its own: tokens per second, MB, and the loss."""
    prepare(args.seed)
    load_code(args)
    peak = Peak(args.device)
    model, tokens = build(args, size, batch)
    compile_step(model, how)

    def run(tokens):
        with torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return unroll(model, tokens)

    cell = {"loss": None}
    for work in "inference", "training":  # training comes second, because it takes more memory
        cell[f"{work}, tokens/s"] = cell[f"{work}, MB"] = None
        model.train(work == "training")
        try:
            times, results = race(args, {how: WORKS[work](model, run, tokens)})
        except Exception as error:
            cell[f"{work}, tokens/s"] = reason(error)
            continue
        cell[f"{work}, tokens/s"] = rounded(tokens.numel() / statistics.median(times[how]))
        if how == "eager" or args.device == "cuda":  # else it would count the compiler too
            cell[f"{work}, MB"] = peak.growth()
        if work == "training":
            cell["loss"] = results[how].item()
    return cell


def grid(args):
    """Tokens per second, and peak MB of weights, gradients and activations, without optimizer."""
    dtypes = ["float32", "bfloat16"]
    ways = {"tiny": ["eager", "compiled"], "S": ["eager", "compiled"]}
    if args.device == "cuda":
        ways = {"L": ["eager"], "S": ["eager", "compiled", "reduce-overhead"]}
    if args.quick:
        ways, dtypes = {"copy": list(ways["S"])}, ["float32"]
    for size in ways:
        batch = 1 if args.quick else 8
        losses = {}
        for dtype, how in product(dtypes, ways[size]):
            try:
                cell = in_fresh_process(grid_cell, args, size, batch, how, dtype)
            except BrokenProcessPool as error:
                cell = {"loss": None}
                for work in "inference", "training":
                    cell |= {f"{work}, tokens/s": reason(error), f"{work}, MB": None}
            loss = cell.pop("loss")
            if loss is not None:
                losses.setdefault("first", loss)
                assert abs(loss / losses["first"] - 1) < 0.02, f"{how} in {dtype} has loss {loss}"
            yield {"size": size, "batch": batch, "dtype": dtype, "step": how} | cell


# ------------------------------------------------------------------------------- diagonal


def diagonal(args):
    """Time of unroll over unroll_diagonal; above 1 the diagonals are faster.

    On a GPU also the setting of [DB], with all of the model in float32 and in bfloat16.
    """
    sizes = ["small"] if args.quick else ["small", "deep", "tiny", "S"]
    for variant, size, batch in product(["armt", "transformer_xl"], sizes, [1, 8]):
        n_segments = 8 if size == "S" or args.quick else 32
        model, tokens = build(args, size, batch, n_segments, variant=variant)
        row = {"variant": variant, "size": size, "batch": batch, "segments": n_segments}
        for work in WORKS:
            row |= loop_beside_diagonals(args, model, tokens, work)
        yield row
    if args.device == "cuda" and not args.quick:
        for dtype in torch.float32, torch.bfloat16:
            model, tokens = build(args, "160M")
            row = {"variant": "armt", "size": "160M", "dtype": str(dtype).removeprefix("torch."),
                   "tokens": tokens.size(1)}
            yield row | loop_beside_diagonals(
                args, model.to(dtype), tokens, "inference", last_only=True)


def loop_beside_diagonals(args, model, tokens, work, **options):
    """Their milliseconds and ratio, once they have been compared.

    On a GPU, over up to 128 segments, logits may differ by 0.001 of their size, in bfloat16 by 0.1.
    """
    loop = WORKS[work](model, partial(unroll, model, **options), tokens)
    diagonals = WORKS[work](model, partial(unroll_diagonal, model, **options), tokens)
    times, results = race(args, {"loop": loop, "diagonals": diagonals})
    found, expected = results["diagonals"], results["loop"]
    if args.device == "cpu":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    difference = (found - expected).norm() / expected.norm()
    allowed = 1e-3 if expected.dtype == torch.float32 else 0.1
    assert difference < allowed, f"loop and diagonals differ by {difference:.2g} of their size"
    return {
        f"{work}, ms": milliseconds(times["loop"]),
        f"{work}, diagonals, ms": milliseconds(times["diagonals"]),
        f"{work}, ratio": ratio(times["loop"], times["diagonals"]),
    }


# --------------------------------------------------------------------------------- memory


def streaming(args, length, last_only):
    """Megabytes and seconds for reading so many tokens; everything of the call is counted."""
    prepare(args.seed)
    model, _ = build(args, "tiny")
    tokens = torch.randint(256, (1, length), dtype=torch.uint8, device=args.device)
    peak = Peak(args.device)
    start = now(args.device)
    with torch.no_grad():
        unroll(model.eval(), tokens, last_only=last_only)
    return {"MB": peak.growth(), "seconds": rounded(now(args.device) - start)}


def backpropagation(args, size, n_segments, checkpoint):
    """Megabytes by which a training step raises the peak: gradients and activations."""
    prepare(args.seed)
    load_code(args)
    model, tokens = build(args, size, n_segments=n_segments)
    peak = Peak(args.device)
    training(model, partial(unroll, model, checkpoint=checkpoint), tokens)()
    return peak.growth()


def memory(args):
    """Peak megabytes above what there was before the call, each in a fresh process.

    The control keeps the logits of all tokens. Backpropagation is measured twice on a CPU: with the
    default malloc, whose heap keeps holes, and without holes.
    """
    lengths = [1_000, 10_000] if args.quick else [1_000, 10_000, 100_000, 1_000_000]
    if args.device == "cuda":
        del lengths[3:]  # the last one would be minutes
    for length in lengths:
        row = {"streaming": "last_only", "tokens": length}
        yield row | in_fresh_process(streaming, args, length, True)
    row = {"streaming": "all logits", "tokens": lengths[-1] // 10}
    yield row | in_fresh_process(streaming, args, lengths[-1] // 10, False)

    size, n_segments = ("tiny", 4) if args.quick else ("S", 32)
    row = {"size": size, "segments": n_segments}
    for name, environment in ("MB", {}), ("MB, no holes", {"MALLOC_MMAP_THRESHOLD_": "65536"}):
        if environment and args.device == "cuda":
            continue
        task = backpropagation, args, size, n_segments
        row[f"plain, {name}"] = in_fresh_process(*task, False, **environment)
        row[f"checkpoint, {name}"] = in_fresh_process(*task, True, **environment)
    model, tokens = build(args, size, n_segments=n_segments)
    plain = training(model, partial(unroll, model), tokens)
    less = training(model, partial(unroll, model, checkpoint=True), tokens)
    times, losses = race(args, {"plain": plain, "checkpoint": less})
    torch.testing.assert_close(losses["checkpoint"], losses["plain"])
    row["plain, ms"] = milliseconds(times["plain"])
    row["checkpoint / plain, time"] = ratio(times["checkpoint"], times["plain"])
    yield row


SECTIONS = {
    "peers": peers,
    "ceiling": ceiling,
    "grid": grid,
    "diagonal": diagonal,
    "memory": memory,
}


# ------------------------------------------------------------------------ tables and record


def print_row(row, last):
    """One line of a markdown table, with a head where the columns are not those of the last row."""
    if last is None or list(row) != list(last):
        print("\n| " + " | ".join(row) + " |")
        print("|" + "|".join(["---"] * len(row)) + "|")
    cells = [shown(value).rjust(len(column)) for column, value in row.items()]
    print("| " + " | ".join(cells) + " |", flush=True)


def shown(value):
    """A cell of a table."""
    if value is None:
        return "-"
    if isinstance(value, (int, float)):
        return f"{value:,.10g}"
    return str(value)


def hardware(device):
    """The GPU, or the processor as Linux names it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.findall(r"model name\s*:\s*(.+)", lines + f"model name: {name}")[0]
    return f"{platform.machine()} {name}, 1 thread"


def about(args):
    """How these numbers came about."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for module in PEERS:
        if find_spec(module):
            versions[module] = version(module.replace("_", "-"))
    return {
        "command": shlex.join(["python", "assets/benchmark.py", *sys.argv[1:]]),
        "seed": args.seed,
        "versions": versions,
        "hardware": hardware(args.device),
        "date": date.today().isoformat(),
        "quick": args.quick,
    }


def kept(path, mine):
    """The sections of an earlier record, if hardware and versions were the same."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = all(record["about"][key] == mine[key] for key in ("versions", "hardware", "quick"))
        return record["sections"] if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(path, record):
    """Write the record whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class Parser(argparse.ArgumentParser):
    """Bad input ends with one line and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def arguments():
    """The flags, checked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS),
                        metavar="NAME", help="sections to run, default all of them")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="everything tiny, a smoke test")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--out", type=Path, help="file to write; default: speed.json, on "
                        "a GPU speed-cuda.json, in assets/results; with --quick none")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed {args.seed} must be from 0 to {2**31 - 1}")
    if args.out is None and not args.quick:
        name = "speed.json" if args.device == "cpu" else f"speed-{args.device}.json"
        args.out = ROOT / "assets" / "results" / name
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        parser.error(f"--out {args.out} must be a file in a folder that exists")
    # A race takes so long, and at least so many turns.
    args.seconds = 0 if args.quick else 3 if args.device == "cpu" else 1
    args.turns = 1 if args.quick else 3
    return args


def main():
    """Run the sections one by one; the record is written after each."""
    args = arguments()
    prepare(args.seed)
    record = {"about": about(args), "sections": {}}
    if args.out is not None:
        record["sections"] = kept(args.out, record["about"])
    for name in dict.fromkeys(args.only):
        print(f"\n## {name}\n\n{getdoc(SECTIONS[name])}", flush=True)
        rows = []
        for row in SECTIONS[name](args):
            print_row(row, rows[-1] if rows else None)
            rows.append(row)
        run = {key: record["about"][key] for key in ("command", "seed", "date")}
        record["sections"][name] = run | {"rows": rows}
        if args.out is not None:
            write(args.out, record)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
