"""For teachers: a copy of the course for a class, and the grading of what the class hands in.

    python notebooks/course.py --student FOLDER [--repo OWNER/NAME]
        Write the notebooks without outputs, what they import, and a README; no solutions. Put the
        folder on GitHub as OWNER/NAME, and its badges and set-up cells lead there.

    python notebooks/course.py --grade FOLDER [--seed N]
        FOLDER has one folder for each student, with the notebooks and, if you asked for it, the
        progress.json that were handed in. Every answer is checked anew, on other inputs than in the
        notebook, and FOLDER/grades.csv gets one row for each student.
"""
import argparse
import ast
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
import exercises  # noqa: E402
from course import write  # noqa: E402

# ==================================================================================================
# The copy for a class

COPIED = ("notebooks/course.py", "notebooks/exercises.py", "rmt.py", "train_copy.py",
          "train_lm.py", "LICENSE")
MANIFEST = ".course-copy.json"  # what was written, with a hash of each file

COPY_README = """# Memory-augmented transformers: notebooks

{colab}To work on your own machine, install Python 3.10 or newer and, in this folder:

```sh
pip install torch numpy matplotlib tqdm notebook
jupyter notebook notebooks
```

Begin with `notebooks/1_why_memory.ipynb`, and run its cells from top to bottom. In each notebook,
put your guesses in place of `None`, and replace the `return None` of each exercise. The last cell
writes `notebooks/progress.json`. If an exercise needs a function or an import of yours, define it
in the same notebook.

The notebooks are part of the rmt course on memory-augmented transformers (MIT licence).
"""
IN_COLAB = """To work in Colab, without installing anything, click on the badge at the top of a
notebook on GitHub: <https://github.com/{repo}/tree/main/notebooks>. (Colab can fetch a public
repository only.)

"""


def student_files(repo):
    """The files of a copy: {path: content}."""
    files = {name: (ROOT / name).read_text(encoding="utf-8") for name in COPIED}
    for path in sorted(HERE.glob("[0-9]*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            for name in re.findall(r'\bpicture\("(\w+)"', source):
                drawing = f"assets/{name}.svg"
                files[drawing] = (ROOT / drawing).read_text(encoding="utf-8")
            cell["source"] = source
        files[f"notebooks/{path.name}"] = notebook
    for name, notebook in files.items():
        if isinstance(notebook, dict):
            for cell in notebook["cells"]:
                to_student_cell(cell, name, files, repo)
            files[name] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    colab = "" if repo is None else IN_COLAB.format(repo=repo)
    files["README.md"] = COPY_README.format(colab=colab)
    return files


def to_student_cell(cell, name, files, repo):
    """A cell without outputs, solutions, and links to files that the copy does not have."""
    source = re.sub(r"\n+Solution: .*", "", cell["source"])
    source = source.replace("; their [solutions](solutions.py) are one link away", "")
    if repo is not None:
        source = source.replace("OWNER/rmt", repo)
    if cell["cell_type"] == "code":
        cell["outputs"], cell["execution_count"] = [], None
        if source == "table_of_guesses()\ntimer()":
            source += "\ncourse.report()  # writes progress.json, for you to hand in"
    else:
        def without_dead_link(link):
            target = os.path.normpath(Path(name).parent / link[2].split("#")[0])
            return link[0] if Path(target).as_posix() in files else link[1]

        source = re.sub(r"(?<!!)\[([^\[\]]+)\]\((?!http)([^)]+)\)", without_dead_link, source)
    cell["source"] = source.splitlines(keepends=True)


def write_student_copy(folder, repo=None):
    """Write a copy for a class. Raises ValueError if that would destroy what is in the folder."""
    manifest = folder / MANIFEST
    if folder.exists() and any(folder.iterdir()) and not manifest.exists():
        raise ValueError("is not empty, and no copy of this course: take a new folder")
    written = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    files = student_files(repo)
    for name in sorted(written | files):
        path = folder / name
        if path.exists() and hash_of(path.read_text(encoding="utf-8")) != written.get(name):
            raise ValueError(f"{name} was changed since it was written: take a new folder")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, content)
    for name in written.keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
    hashes = {name: hash_of(content) for name, content in files.items()}
    write(manifest, json.dumps(hashes, indent=1) + "\n")


def hash_of(content):
    return hashlib.sha256(content.encode()).hexdigest()


# ==================================================================================================
# Grading

SECONDS = 60     # for one answer, and for the imports before the first
READY = "ready"  # the line before the first verdict


def code_of(notebook):
    """The top-level statements of a notebook file; cells that are not Python are left out."""
    statements = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            try:
                statements += ast.parse("".join(cell["source"])).body
            except SyntaxError:
                continue
    return statements


def definitions_in(folder):
    """What a student has defined, and notebooks that cannot be read.

    Only imports, functions and classes are taken over, so nothing is trained, and a `check` or a
    verdict of the student's own has no effect.
    """
    definitions, unreadable = [], []
    for path in sorted(folder.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        try:
            statements = code_of(path)
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable.append(path.name)
            continue
        definitions += [ast.unparse(statement) for statement in statements if defines(statement)]
    return definitions, unreadable


def defines(statement):
    """Whether a statement is an import, a function, a class, or a lambda with a name."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    named_lambda = isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Lambda)
    return isinstance(statement, kinds) or named_lambda


def mentions(source):
    """All names in a piece of code."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        names.add(getattr(node, "id", None))      # a name
        names.add(getattr(node, "attr", None))    # .name
        names.add(getattr(node, "module", None))  # from name import ...
        names.update(alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name"))
    return names


def namespace_of(definitions):
    """Everything that a notebook imports, and then what the student has defined."""
    namespace = {"__name__": "answers"}
    for path in sorted(HERE.glob("[0-9]*.ipynb")):
        for statement in code_of(path):
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(statement), namespace)
    refused = {}  # name: why its latest definition is no answer
    for source in definitions:
        statement = ast.parse(source).body[0]
        names = [getattr(statement, "name", None)]
        if isinstance(statement, ast.Assign):
            names = [getattr(target, "id", None) for target in statement.targets]
        forbidden = sorted(mentions(source) & exercises.FORBIDDEN)
        if forbidden:
            refused |= dict.fromkeys(names, f"uses {forbidden[0]}, which no answer needs")
            continue
        try:
            exec(source, namespace)
        except Exception as reason:
            refused |= dict.fromkeys(names, exercises.in_one_line(reason))
        else:
            refused = {name: why for name, why in refused.items() if name not in names}
    return namespace, refused


def check_answers(job):
    """Check answers one after the other; the file of verdicts gets a line for each, at once."""
    with open(job, encoding="utf-8") as file:
        definitions, names, seed, verdicts = json.load(file)
    namespace, refused = namespace_of(definitions)
    with open(verdicts, "a", encoding="utf-8") as file:
        file.write(json.dumps([READY, ""]) + "\n")
    for name in names:
        if name in refused:
            verdict = f"not yet. {name} {refused[name]}"
        elif name in namespace:
            verdict = exercises.verdict_on(name, namespace[name], seed)
        else:
            verdict = "missing"
        with open(verdicts, "a", encoding="utf-8") as file:
            file.write(json.dumps([name, verdict]) + "\n")


def grade(folder, seed):
    """The verdicts on all exercises of one student, {exercise: verdict}.

    Answers run in a process of their own. If one of them ends it or does not finish, that is the
    verdict on it, and another process continues with the next.
    """
    definitions, unreadable = definitions_in(folder)
    left, verdicts = list(exercises.EXERCISES), {}
    while left:
        with tempfile.TemporaryDirectory() as scratch:
            job, results = Path(scratch, "job.json"), Path(scratch, "verdicts.jsonl")
            results.touch()
            content = json.dumps([definitions, left, seed, str(results)])
            job.write_text(content, encoding="utf-8")
            ending = run_until_it_stalls(job, results)
            lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
            verdicts |= dict(lines)
            if verdicts.pop(READY, None) is None:
                raise RuntimeError(f"{folder.name}: the process that checks answers {ending} "
                                   "before the first one")
        left = [name for name in left if name not in verdicts]
        if left:
            verdicts[left.pop(0)] = f"not yet. {ending}"
    return verdicts, unreadable


def run_until_it_stalls(job, results):
    """Run check_answers until it ends, or until no verdict has come for some time."""
    command = [sys.executable, "-c", "import sys, teacher; teacher.check_answers(sys.argv[1])", job]
    process = subprocess.Popen(command, cwd=HERE, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    size, since = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        if results.stat().st_size > size:
            size, since = results.stat().st_size, time.monotonic()
        if time.monotonic() - since > SECONDS:
            process.kill()
            process.wait()
            return f"does not end within {SECONDS} seconds"
    return f"ends the Python process (exit code {process.returncode})"


def report_of(folder):
    """What progress.json contains: exercises reported as OK, guesses, and late guesses."""
    for path in sorted(folder.rglob("progress.json")):
        try:
            progress = json.loads(path.read_text(encoding="utf-8"))
            exercise_rows, guesses = progress["exercises"], progress["guesses"].values()
            ok = {name for name, row in exercise_rows.items() if row["verdict"].startswith("OK")}
            made = [row for row in guesses if row["guess"] is not None]
            late = [row for row in made if row["measured_time"] and
                    row["time"] > row["measured_time"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return ok, len(made), len(late)
    return None


def grade_all(folder, seed):
    """Grade every student in a folder, and return the path of the table."""
    rows = []
    for student in sorted(path for path in folder.iterdir() if path.is_dir()):
        verdicts, unreadable = grade(student, seed)
        solved = {name for name, verdict in verdicts.items() if verdict.startswith("OK")}
        reported = report_of(student)
        ok, guesses, late = reported if reported is not None else (set(), "", "")
        rows.append({
            "student": student.name, "OK": len(solved), "of": len(verdicts),
            "guesses": guesses, "guesses after the result": late,
            "reported OK, but not here": " ".join(sorted(ok - solved)),
            "unreadable": " ".join(unreadable),
            **{name: verdict.split(". ")[0] if name in solved else verdict
               for name, verdict in verdicts.items()}})
        print(f"{student.name}: {len(solved)} of {len(verdicts)} exercises OK")
    table = folder / "grades.csv"
    temporary = table.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, table)
    return table


def main(argv):
    parser = argparse.ArgumentParser(
        prog="course.py", allow_abbrev=False,
        description="write a copy of the course for a class, or grade what a class handed in")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--student", type=Path, metavar="FOLDER",
                      help="write a copy without outputs and solutions")
    what.add_argument("--grade", type=Path, metavar="FOLDER",
                      help="check the submissions in it, one folder for each student")
    parser.add_argument("--repo", metavar="OWNER/NAME",
                        help="where on GitHub the copy will be, for badges and set-up cells")
    parser.add_argument("--seed", type=int, default=1,
                        help="of the random inputs for --grade (default: 1; notebooks have 0)")
    args = parser.parse_args(argv)
    if args.repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        parser.error(f"--repo {args.repo!r} must be OWNER/NAME, as on GitHub")
    if args.student is not None:
        try:
            write_student_copy(args.student, args.repo)
        except (OSError, ValueError) as reason:
            parser.error(f"--student {args.student}: {reason}")
        print(f"{args.student}: the notebooks, without outputs and solutions, and a README")
        if args.repo is not None:
            print(f"Colab can fetch {args.repo} only if that repository is public.")
        return
    if not args.grade.is_dir() or not any(path.is_dir() for path in args.grade.iterdir()):
        parser.error(f"--grade {args.grade} must be a folder with a folder for each student")
    try:
        print(f"written: {grade_all(args.grade, args.seed)}")
    except (OSError, RuntimeError) as reason:
        parser.error(f"--grade {args.grade}: {reason}")
