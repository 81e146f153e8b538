"""What both training scripts need and no reader of the model does: flags, and files that are written whole."""
import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

DOWNLOADS = {  # texts: address, sha256
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/"
                    "tinyshakespeare/input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip",
               "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
    "text8": ("http://mattmahoney.net/dc/text8.zip",
              "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232")}


def fail(message):
    """End with one line and exit status 2; under torchrun the first process speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def parse(description, flags, limits, recipes=None):
    """Flags from the command line, else of the run in --out that is resumed or sampled from, else the defaults.

    flags    {group: {flag: (default, help)}}; a default None stands in recipes, {task: {flag: default}}
    limits   {flag: (smallest, largest)} where they are not 1, for integers, or 0, for other numbers, and 1e9
    """
    parser = argparse.ArgumentParser(usage=f"python {Path(sys.argv[0]).name} [flags]", allow_abbrev=False,
                                     description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for title, group in flags.items():
        group_parser = parser.add_argument_group(title)
        for name, (default, text) in group.items():
            example = default if default is not None else next(iter(recipes.values()))[name]
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
    config = Path(args.out) / "config.json"
    if args.resume or getattr(args, "sample", False):
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
            if args.resume and title not in ("sample", "run") and value != saved.get(name):
                fail(f"{flag} {value}: the run in {args.out} has {saved.get(name)}; leave it out, or start anew")
            for number in value if type(value) is list else [value]:
                if type(number) in (int, float):
                    least, most = limits.get(name, (int(type(number) is int), 10**9))
                    if not least <= number <= most:
                        fail(f"{flag} {number} must be at least {least} and at most {most}")
    args.command = saved.get("command", " ".join(["python", *sys.argv]))  # a resumed run keeps the one it began with
    return args


def folder(args, stem):
    """The folder to write to: --out, or out/STEM-N with the first N that is free."""
    fresh = (Path("out") / f"{stem}-{i}" for i in range(1, 10**6))
    return Path(args.out) if args.out else next(path for path in fresh if not path.exists())


def write(path, writer):
    """Write to a temporary name and move it into place. Raises OSError, the old file still whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as reason:  # a full disk makes torch.save raise the second
        if temporary.exists():
            temporary.unlink()
        raise OSError(f"{path} cannot be written, and what stood there before is whole: {reason}") from reason


def fetch(name):
    """The path of one of DOWNLOADS, brought to out/data if it is not there yet. Raises OSError."""
    import hashlib
    import shutil
    from urllib.request import urlopen

    from tqdm import tqdm
    url, sha256 = DOWNLOADS[name]
    path = Path("out/data") / url.split("/")[-1]

    def download(temporary):
        with urlopen(url, timeout=30) as source, temporary.open("wb") as file, tqdm.wrapattr(
                file, "write", total=source.length, desc=path.name, disable=None) as counted:
            shutil.copyfileobj(source, counted)
        found = hashlib.sha256(temporary.read_bytes()).hexdigest()
        if found != sha256:
            raise OSError(f"what came has sha256 {found}")
    try:
        if not path.exists():
            write(path, download)
    except OSError as reason:
        raise OSError(f"{reason}; fetch {url} (sha256 {sha256}) by other means, give its text to --data") from reason
    return path


def write_config(args):
    """config.json, for the next parse."""
    config = json.dumps(vars(args) | {"out": str(args.out), "resume": False}, indent=1)
    write(args.out / "config.json", lambda path: path.write_text(config))


def write_rows(path, rows):
    """A table of comma-separated values."""
    lines = [",".join(f"{x:.5f}" if type(x) is float else str(x) for x in row) for row in rows]
    write(path, lambda path: path.write_text("\n".join(lines) + "\n"))


def write_report(args, results, figures):
    """The figures, and result.json with all that it takes to get the results again."""
    import torch
    for name, figure in figures.items():
        write(args.out / f"{name}.png", lambda path, figure=figure: figure.savefig(path, format="png", dpi=100))
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else ""
    result = {"command": args.command, "seed": args.seed, "date": time.strftime("%Y-%m-%d"),
              "versions": f"python {platform.python_version()}, torch {torch.__version__}",
              "hardware": gpu or f"{args.device} on {platform.machine()}, threads: {args.threads}",
              "flags": vars(args) | {"out": str(args.out)}, "results": results}
    write(args.out / "result.json", lambda path: path.write_text(json.dumps(result, indent=1)))
