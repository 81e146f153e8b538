"""What the training scripts need and no reader of the model does: flags, ranks, downloads, files written whole.

torch is imported inside functions, so that --help and a wrong flag answer at once.
"""
import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from urllib.request import urlopen

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
SCRIPT = Path(sys.argv[0]).name
LAUNCH = [*(["torchrun", "--nproc-per-node", str(RANKS)] if RANKS > 1 else ["python"]), SCRIPT]
DOWNLOADS = {  # texts: address, sha256
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/"
                    "tinyshakespeare/input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip",
               "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
    "text8": ("http://mattmahoney.net/dc/text8.zip",
              "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232")}


def fail(message):
    """End with one line and exit status 2; the first rank speaks for all."""
    if RANK == 0:
        print(f"{SCRIPT}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def start(main, args):
    """Run main(args); end with one line where it is stopped or a file cannot be written."""
    try:
        main(args)
        if RANKS > 1:  # an interpreter that shuts down can crash on what gloo's threads still hold
            import torch
            torch.distributed.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as reason:
        fail(reason)
    except KeyboardInterrupt:
        if RANK == 0 and not getattr(args, "sample", False):
            print(f"stopped; to go on: {shlex.join([*LAUNCH, '--resume', '--out', str(args.out)])}")
        sys.exit(130)


# -------------------------------------------------------------------------------------------------------------- flags

def parse(description, flags, limits, recipes=None):
    """Flags from the command line, else of the run in --out that is resumed or sampled from, else the defaults.

    flags    {group: {flag: (default, help)}}; a default None stands in recipes, {task: {flag: default}}
    limits   {flag: (smallest, largest)} where they are not 1, for integers, or 0, for other numbers, and 1e9
    """
    os.environ["MPLBACKEND"] = "Agg"  # pictures go to files
    parser = argparse.ArgumentParser(usage=f"python {SCRIPT} [flags]", description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for title, group in flags.items():
        group_parser = parser.add_argument_group(title)
        for name, (default, text) in group.items():
            example = default if default is not None else next(r[name] for r in recipes.values() if name in r)
            options = {"type": type(example)}
            if type(example) is bool:
                options = {"action": "store_true"}
            elif type(example) is list:
                options = {"nargs": "+", "type": type((example or [0])[0])}
            if default is None:
                text += " (default: by task)"
            elif type(default) is not bool and default not in ("", []):
                text += f" (default: {default[0] if type(default) is list else default})"
            group_parser.add_argument("--" + name.replace("_", "-"), default=default, help=text, **options)
    args, saved = parser.parse_args(), {}
    sample, config = getattr(args, "sample", False), Path(args.out) / "config.json"
    if args.resume or sample:
        try:
            saved = dict(json.loads(config.read_text()))
        except (OSError, ValueError, TypeError) as reason:
            fail(f"no run in --out '{args.out}' ({reason}): name the folder of an earlier run")
        parser.set_defaults(**saved)
        args = parser.parse_args()
    elif args.out and config.exists():
        fail(f"--out {args.out} already holds a run: add --resume to go on with it, or name another folder")
    if recipes:
        if args.task not in recipes:
            fail(f"--task {args.task} must be one of {', '.join(recipes)}")
        parser.set_defaults(**recipes[args.task] | saved)
        args = parser.parse_args()
    for title, group in flags.items():
        for name in group:
            value, flag = getattr(args, name), "--" + name.replace("_", "-")
            fixed = saved and title not in ("sample", "run") and not (sample and name in ("model", "seed"))
            if fixed and name in saved and value != saved[name]:  # a run from before there was this flag lacks it
                fail(f"{flag} {value}: the run in {args.out} has {saved[name]}; leave it out, or start anew")
            for number in value if type(value) is list else [value]:
                if type(number) in (int, float):
                    least, most = limits.get(name, (int(type(number) is int), 10**9))
                    if not least <= number <= most:
                        fail(f"{flag} {number} must be at least {least} and at most {most}")
    args.command = saved.get("command", shlex.join([*LAUNCH, *sys.argv[1:]]))  # a resumed run keeps its first one
    return args


def setup(args, stem):
    """The folder to write to, threads, device and ranks. Raises ValueError or RuntimeError for a device without use."""
    import torch
    fresh = (Path("out") / f"{stem}-{i}" for i in range(1, 10**6))
    args.out = Path(args.out) if args.out else next(path for path in fresh if not path.exists())
    torch.set_num_threads(args.threads)
    args.device_flag = args.device
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if RANKS > 1 and args.device.startswith("cuda"):
        here, n = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if args.device != "cuda" or here > n:
            raise ValueError(f"--device {args.device} for {here} ranks: use cuda, and at most a rank per GPU, here {n}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as reason:
        raise ValueError(f"{str(reason).splitlines()[0]} (--device {args.device}: try --device cpu)") from reason
    if RANKS > 1:
        torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")


# -------------------------------------------------------------------------------------------------------------- files

def write(path, writer):
    """Write to a temporary name and move it into place. Raises OSError, the old file still whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as reason:  # a full disk makes torch.save raise the second
        whole = ", and what stood there before is whole" * path.exists()
        raise OSError(f"{path} was not written{whole}: {reason}") from reason
    finally:
        if temporary.exists():
            temporary.unlink()


def save(out, checkpoint, rows):
    """checkpoint.pt, and metrics.csv with one line per row."""
    import torch
    lines = [",".join(f"{x:.5f}" if type(x) is float else str(x) for x in row) for row in rows]
    write(out / "checkpoint.pt", lambda path: torch.save(checkpoint, path))
    write(out / "metrics.csv", lambda path: path.write_text("\n".join(lines) + "\n"))


def load(path, *keys):
    """The dict with these keys that torch.save wrote. Raises ValueError."""
    import torch
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in keys}
    except Exception as reason:  # whatever is wrong with a file, it is one line for the user
        raise ValueError(f"{path} is no checkpoint to go on with: {reason!r}") from reason


def fill(model, saved, name):
    """Take the weights of one run out of a checkpoint. Raises ValueError with both shapes where they do not fit."""
    if name not in saved["runs"]:
        raise ValueError(f"--model {name}: the checkpoint has {', '.join(saved['runs']) or 'no run yet'}")
    weights = saved["runs"][name].pop("model")
    given, needed = ({key: tuple(t.shape) for key, t in some.items()} for some in (weights, model.state_dict()))
    for key in needed | given:
        if given.get(key) != needed.get(key):
            raise ValueError(f"the checkpoint does not fit {name!r}: {key} has shape {given.get(key, 'none')} there, "
                             f"{needed.get(key, 'none')} here")
    model.load_state_dict(weights)


def fetch(name):
    """The path of one of DOWNLOADS, brought to out/data if it is not there; None for others. Raises ValueError."""
    from tqdm import tqdm
    if name not in DOWNLOADS:
        return None
    url, sha256 = DOWNLOADS[name]
    path = Path("out/data") / url.split("/")[-1]

    def check(file, advice):
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != sha256:
            raise OSError(f"it has sha256 {found}{advice}")

    def download(temporary):
        with urlopen(url, timeout=30) as source, temporary.open("wb") as file, tqdm.wrapattr(
                file, "write", total=source.length, desc=path.name, disable=None) as counted:
            shutil.copyfileobj(source, counted)
        check(temporary, "")
    try:
        if path.exists():
            check(path, f": delete {path}")
        else:
            write(path, download)
    except OSError as reason:
        raise ValueError(f"no {name} from {url} (sha256 {sha256}): {reason}; it can be fetched by other means, and "
                         "given as --data FILE") from reason
    return path


def write_flags(args):
    """config.json, for the next parse."""
    config = json.dumps(vars(args) | {"out": str(args.out), "resume": False, "device": args.device_flag}, indent=1)
    write(args.out / "config.json", lambda path: path.write_text(config))


def write_report(args, results, figures):
    """The figures, and result.json with all that it takes to get the results again."""
    import torch
    for name, figure in figures.items():
        write(args.out / f"{name}.png", lambda path, figure=figure: figure.savefig(path, format="png", dpi=100))
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else ""
    result = {"command": args.command, "seed": args.seed, "date": time.strftime("%Y-%m-%d"),
              "versions": f"python {platform.python_version()}, torch {torch.__version__}",
              "hardware": gpu or f"{args.device} on {platform.machine()}, threads: {args.threads}",
              "flags": vars(args) | {"out": str(args.out)}, "results": results}
    write(args.out / "result.json", lambda path: path.write_text(json.dumps(result, indent=1)))
