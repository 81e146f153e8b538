"""Measure speed and memory: print tables, and write assets/results/speed.json.

    python assets/benchmark.py                    all sections on one CPU thread, about 10 minutes
    python assets/benchmark.py --only diagonal    this section; the record keeps the others
    python assets/benchmark.py --device cuda      on a GPU, into speed-cuda.json
    python assets/benchmark.py --compile          our model through torch.compile takes part too
    python assets/benchmark.py --quick            does it run? Writes nothing

    peers       time of other implementations over ours
    diagonal    time of unroll over unroll_diagonal
    memory      peak megabytes of streaming, and of checkpointing with its price in time

Contestants take turns, so that a busy machine slows them alike. A time is the median over turns, a
ratio is the median of the turns' ratios. On a CPU a time is the CPU time of one thread. Training is
forward, loss and backward without an optimizer step; inference is forward without gradient. Where
contestants must compute the same, that is asserted; nothing is asserted about time.

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
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

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
    "copy":  Size(Config("rmt", 13,  8,   2,  4,  64,  8), 16, 9),   # train_copy.py with M 8, H 4
    "lm":    Size(Config("rmt", 100, 32,  2,  4,  64,  8), 32, 2),   # train_lm.py's defaults
    "small": Size(Config("rmt", 256, 16,  4,  4,  64,  4), 8, 32),
    "deep":  Size(Config("rmt", 256, 16,  12, 4,  64,  4), 8, 32),
    "tiny":  Size(Config("rmt", 256, 32,  4,  1,  64,  4), 8, 4),
    "S":     Size(Config("rmt", 256, 128, 4,  4,  256, 8), 8, 4),    # 3 M parameters
    "M":     Size(Config("rmt", 256, 256, 6,  6,  384, 16), 4, 4),   # 11 M parameters
}


# ==================================================================================================
# Measuring


def build(args, size, batch=None, n_segments=None, **changes):
    """A model of that size, with changes in its config, and tokens (B, n_segments T)."""
    default = SIZES[size]
    config = replace(default.config, **changes)
    torch.manual_seed(0)
    model = RMT(config).to(args.device)
    shape = (batch or default.batch, (n_segments or default.n_segments) * config.segment_len)
    return model, torch.randint(config.vocab_size, shape).to(args.device)


def now(device):
    """Seconds: of this process's CPU time, or on the clock once the GPU has finished."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def race(args, contestants):
    """Call contestants {name: run} in turns, after two calls to warm up.

    Returns {name: seconds of each turn} and {name: what the last call to warm up returned}.
    """
    for _ in range(2):
        results = {name: run() for name, run in contestants.items()}
    times = {name: [] for name in contestants}
    turns = 0
    least = 1 if args.quick else 5
    stop = time.perf_counter() + (0 if args.quick else 4)
    while turns < least or time.perf_counter() < stop:
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
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss.detach().clone()
    return step


def inference(model, run, tokens):
    """A function for one forward pass of run(tokens) -> (logits, ...); it returns the logits."""
    model.eval()

    @torch.no_grad()
    def forward():
        return run(tokens)[0].clone()  # a CUDA graph overwrites what it has returned
    return forward


WORKS = {"training": training, "inference": inference}


# ==================================================================================================
# Peers


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


PEERS = {  # name of the module to import: name in the tables, what builds it
    "transformers": ("GPT-2", Authors),
    "recurrent_memory_transformer_pytorch": ("package", package),
}


def rivals():
    """{name: what builds it} of the peers that can be imported, and a line about the others."""
    found = {}
    for module, (name, make) in PEERS.items():
        try:
            import_module(module)
            found[name] = make
        except ImportError as error:
            print(f"{name} does not take part: {error}")
    return found


def peers(args):
    """Time of the others over ours; below 1 they are faster. Our transformer has no memory rows."""
    others = rivals()
    for size in ["copy", "tiny"] if args.quick else ["copy", "lm", "tiny", "S", "M"]:
        ours, tokens = build(args, size)
        plain, _ = build(args, size, variant="transformer")
        models = {"ours": (ours, partial(unroll, ours)),
                  "transformer": (plain, partial(unroll, plain))}
        if args.compile:
            mode = "reduce-overhead" if args.device == "cuda" else None  # which is CUDA graphs
            torch.compiler.reset()  # after eight compilations of unroll, torch would run it eagerly
            compiled = torch.compile(unroll, mode=mode, fullgraph=True)
            models["compiled"] = (ours, partial(compiled, ours))
        for name, make in others.items():
            other = make(SIZES[size].config).to(args.device)
            assert abs(n_parameters(other) / n_parameters(ours) - 1) < 0.15
            models[name] = (other, other)
        for work, start in WORKS.items():
            contestants = {name: start(*both, tokens) for name, both in models.items()}
            times, results = race(args, contestants)
            row = {"size": size, "work": work, "ours, ms": milliseconds(times["ours"])}
            for name, result in results.items():
                assert result.shape == results["ours"].shape and result.isfinite().all()
                if name != "ours":
                    row[f"{name} / ours"] = ratio(times[name], times["ours"])
            if args.compile:
                torch.testing.assert_close(
                    results["compiled"], results["ours"], rtol=1e-3, atol=1e-3)
            yield row


def n_parameters(model):
    """How many numbers a model learns."""
    return sum(weight.numel() for weight in model.parameters())


# ==================================================================================================
# Diagonals


def diagonal(args):
    """Time of unroll over unroll_diagonal; above 1 the diagonals are faster."""
    for variant in "armt", "transformer_xl":
        for size in ["small"] if args.quick else ["small", "deep", "tiny", "S"]:
            n_segments = 8 if size == "S" or args.quick else 32
            for batch in 1, 8:
                model, tokens = build(args, size, batch, n_segments, variant=variant)
                row = {"variant": variant, "size": size, "batch": batch, "segments": n_segments}
                for work, start in WORKS.items():
                    times, results = race(args, {
                        "loop": start(model, partial(unroll, model), tokens),
                        "diagonals": start(model, partial(unroll_diagonal, model), tokens)})
                    difference = (results["diagonals"] - results["loop"]).norm()
                    assert difference < 1e-3 * results["loop"].norm(), "they compute the same"
                    row[f"{work}, ms"] = milliseconds(times["loop"])
                    row[f"{work}, diagonals, ms"] = milliseconds(times["diagonals"])
                    row[f"{work}, ratio"] = ratio(times["loop"], times["diagonals"])
                yield row


# ==================================================================================================
# Memory


def memory(args):
    """Peak megabytes above what was in use before a call, each in a fresh process.

    Streaming keeps the logits of the last segment, as a control those of all tokens. On a CPU some
    of what plain backpropagation takes is holes in malloc's heap; MALLOC_MMAP_THRESHOLD_ avoids
    them.
    """
    if args.device == "cpu" and not os.path.exists("/proc/self/clear_refs"):
        print("On a CPU, peaks of memory can be read under Linux only.")
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # for the fresh processes
    longest = 10_000 if args.quick else 100_000 if args.device == "cuda" else 1_000_000
    for last_only, length in (True, 1_000), (True, longest), (False, longest // 10):
        grown, seconds = in_fresh_process(streaming, args, length, last_only)
        yield {"streaming": "last_only" if last_only else "all logits", "tokens": length,
               "MB": grown, "seconds": seconds}

    size, n_segments = ("tiny", 4) if args.quick else ("S", 32)
    plain = in_fresh_process(backpropagation, args, size, n_segments, False)
    less = in_fresh_process(backpropagation, args, size, n_segments, True)
    model, tokens = build(args, size, n_segments=n_segments)
    times, losses = race(args, {
        "plain": training(model, partial(unroll, model), tokens),
        "checkpoint": training(model, partial(unroll, model, checkpoint=True), tokens)})
    torch.testing.assert_close(losses["checkpoint"], losses["plain"])
    yield {"size": size, "segments": n_segments, "plain, MB": plain, "checkpoint, MB": less,
           "checkpoint / plain, time": ratio(times["checkpoint"], times["plain"])}


def in_fresh_process(function, *values):
    """function(*values) in a new process, in which nothing is compiled or allocated yet."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *values).result()


def streaming(args, length, last_only):
    """Megabytes and seconds for reading so many tokens; everything of the call is counted."""
    torch.set_num_threads(1)
    model, _ = build(args, "tiny")
    tokens = torch.randint(256, (1, length), dtype=torch.uint8, device=args.device)
    before = reset_peak(args.device)
    start = now(args.device)
    with torch.no_grad():
        unroll(model.eval(), tokens, last_only=last_only)
    return rounded(megabytes(args.device) - before), rounded(now(args.device) - start)


def backpropagation(args, size, n_segments, checkpoint):
    """Megabytes by which a training step raises the peak: gradients and activations."""
    torch.set_num_threads(1)
    model, tokens = build(args, "copy")  # so that what a first step loads does not count
    training(model, partial(unroll, model, checkpoint=checkpoint), tokens)()
    model, tokens = build(args, size, n_segments=n_segments)
    before = reset_peak(args.device)
    training(model, partial(unroll, model, checkpoint=checkpoint), tokens)()
    return rounded(megabytes(args.device) - before)


def megabytes(device):
    """The most memory that has been in use since reset_peak, in MB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def reset_peak(device):
    """From now on the most is what is in use now, in MB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return megabytes(device)


# ==================================================================================================
# Tables and record

SECTIONS = {"peers": peers, "diagonal": diagonal, "memory": memory}


def print_row(row, last):
    """One line of a table, with a head where the columns are not those of the last row."""
    if last is None or list(row) != list(last):
        print("\n| " + " | ".join(row) + " |")
        print("|" + "---|" * len(row))
    print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


def hardware(device):
    """The GPU, or the processor as Linux names it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8"))
        name = found[1] if found else name
    return f"{platform.machine()} {name}, 1 thread"


def about(args):
    """How these numbers came about."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for module in PEERS:
        with suppress(PackageNotFoundError):
            versions[module] = version(module.replace("_", "-"))
    return {"command": shlex.join(["python", "assets/benchmark.py", *sys.argv[1:]]), "seed": 0,
            "versions": versions, "hardware": hardware(args.device),
            "date": date.today().isoformat()}


def main():
    """Run the sections one by one; the record is written after each, unless --quick."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION",
                        help="sections to run, default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="peers: our compiled model too")
    parser.add_argument("--quick", action="store_true", help="small sizes, one turn, no record")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    path = ROOT / "assets" / "results" / ("speed-cuda.json" if args.device == "cuda"
                                          else "speed.json")
    record = {"about": about(args), "sections": {}}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in SECTIONS:
            if name in before["sections"]:  # with the versions and hardware that it was made with
                record["sections"][name] = before["about"] | before["sections"][name]
    for name in args.only:
        print(f"\n## {name}", flush=True)
        rows = []
        for row in SECTIONS[name](args):
            print_row(row, rows[-1] if rows else None)
            rows.append(row)
        if rows and not args.quick:
            record["sections"][name] = record["about"] | {"rows": rows}
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)


if __name__ == "__main__":
    main()
