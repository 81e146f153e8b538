"""Tests of the course. Run them before you teach, and after you have changed a lesson.

    python -m pytest notebooks/test_course.py            seconds
    python -m pytest notebooks/test_course.py -m slow    minutes: every notebook runs

Notebooks     they were committed as they ran, start anywhere, and have what a student needs
Runs (slow)   all that the notebooks claim holds
exercises.py  solutions pass, wrong answers and cheats are refused, what a verdict says
course.py     guesses, claims, the report, messages, training, instruments, pictures
teacher.py    the copy for a class, grading
Set-up        the first cell of all notebooks

Tests of notebooks do not know how many there are: one that you add is tested, too.
"""
import ast
import copy
import csv
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from rmt import (  # noqa: E402
    RMT,
    VARIANTS,
    AssociativeBlock,
    Config,
    Variant,
    segment_mask,
    unroll,
)

NOTEBOOKS = sorted(HERE.glob("[0-9]*.ipynb"))
LECTURE = HERE / "lecture.ipynb"
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def load_module(name):
    """A fresh module of the course. The settings of figures stay as they were."""
    pytest.importorskip("IPython")
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with matplotlib.rc_context():
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def modules(monkeypatch):
    """Fresh modules of the course, which import each other."""
    monkeypatch.syspath_prepend(str(HERE))
    loaded = {}
    for name in ("solutions", "course", "exercises", "teacher"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        loaded[name] = load_module(name)
        monkeypatch.setitem(sys.modules, name, loaded[name])
    return loaded


@pytest.fixture
def course(modules):
    return modules["course"]


@pytest.fixture
def exercises(modules):
    return modules["exercises"]


@pytest.fixture
def solutions(modules):
    return modules["solutions"]


@pytest.fixture
def teacher(modules):
    return modules["teacher"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents():
    """All files and folders below the current folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


# ==================================================================================================
# Notebooks, as they were committed


def read_notebook(path):
    """A notebook as plain dictionaries, with every text in one piece."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        for output in cell.get("outputs", []):
            output["text"] = "".join(output.get("text", ""))
    return notebook


def cells_of(notebook, kind):
    """The sources of its cells, "code" or "markdown"."""
    return [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == kind]


def code_of(path):
    """All the code of a notebook."""
    return "\n".join(cells_of(read_notebook(path), "code"))


def stubs(code):
    """The exercises in the code of a notebook: functions that return None with a comment."""
    stub = r"^def (\w+)\(.*\):\n(?:    .*\n)*?    return None  # your \w+$"
    return re.findall(stub, code, re.MULTILINE)


def printed_by(notebook):
    """All that the cells of a notebook have printed."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def promised_seconds(notebook):
    """The CPU seconds that its first cell promises."""
    return int(re.search(r"at most (\d+) CPU seconds", notebook["cells"][0]["source"])[1])


def missing_files(text):
    """Where links of a page of the course lead nowhere."""
    targets = re.findall(r"\]\((?!http)([^)#]+)", text)
    return [target for target in targets if not (HERE / target).exists()]


@every_notebook
class TestNotebooks:

    def test_it_was_committed_as_it_ran(self, path):
        notebook = read_notebook(path)
        printed = printed_by(notebook)
        assert "holds: " in printed
        assert "does not hold" not in printed
        seconds = int(re.search(r"this notebook took (\d+) CPU seconds", printed)[1])
        assert seconds <= promised_seconds(notebook)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        for cell in cells:
            assert not any(output["output_type"] == "error" for output in cell["outputs"])

    def test_every_picture_has_a_caption_that_can_be_read_aloud(self, path):
        """It is the alternative text, too, and is printed below the picture."""
        notebook = read_notebook(path)
        pictures, kinds = [], set()
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                for kind in {"image/png", "image/svg+xml"} & output.get("data", {}).keys():
                    pictures.append(output["metadata"][kind]["alt"])
                    kinds.add(kind)
        assert kinds == {"image/png", "image/svg+xml"}  # what was measured, and a drawing
        shown = str(notebook["cells"]).replace("\\'", "'")
        for alternative in pictures:
            assert len(alternative) > 50
            assert f"**What to see:** {alternative}" in shown

    def test_it_starts_anywhere(self, path):
        """In Colab too, and nothing in it tells of the machine that it was written on."""
        raw = path.read_text(encoding="utf-8")
        assert len(raw) < 500_000  # a larger one opens slowly on GitHub, and widgets do not show
        assert "widget" not in raw
        assert not re.search(r"/(tmp|home|root|work|Users)/", raw)
        assert not re.search(r"^\s*[!%]", code_of(path), re.MULTILINE)
        set_up = cells_of(read_notebook(path), "code")[0]
        assert set_up == cells_of(read_notebook(NOTEBOOKS[0]), "code")[0]

    def test_no_line_of_code_is_cut_off_on_a_page(self, path):
        """GitHub and Colab show about 88 columns."""
        for line in code_of(path).split("\n"):
            assert len(line) <= 88

    def test_its_badges_and_links_lead_somewhere(self, path):
        texts = cells_of(read_notebook(path), "markdown")
        title = texts[0]
        for host in ("colab.research.google.com/github/OWNER/rmt/blob/main", "kaggle.com/kernels"):
            assert host in title
        assert title.count(f"notebooks/{path.name}") == 2
        assert missing_files("\n".join(texts)) == []

    def test_it_begins_with_its_aims_and_ends_with_the_guesses(self, path):
        notebook = read_notebook(path)
        texts = cells_of(notebook, "markdown")
        for part in ("\n**", "After this notebook you will be able to\n\n- ", "You need: ",
                     "clear them: in Colab *Edit → Clear all outputs*"):
            assert part in texts[0]
        assert any("**You know this as**" in text for text in texts)
        assert "## What you have seen" in texts[-1]
        assert "**Try.** " in texts[-1]
        assert cells_of(notebook, "code")[-1] == "table_of_guesses()\ntimer()"

    def test_a_guess_comes_before_every_measurement(self, path):
        code = code_of(path)
        measurements = list(re.finditer(r'measured\(f?"([^"{]+)', code))
        assert measurements
        for measurement in measurements:
            guess = code.find(f'guess("{measurement[1]}')
            assert 0 <= guess < measurement.start()

    def test_every_exercise_has_hints_a_solution_and_a_wrong_answer(self, path, solutions):
        names = stubs(code_of(path))
        texts = [text for text in cells_of(read_notebook(path), "markdown") if "**Exercise" in text]
        assert len(names) == len(texts) > 0
        assert "**Exercise 1 ● " in texts[0]  # the first one is easy
        for number, (name, text) in enumerate(zip(names, texts, strict=True), start=1):
            assert re.search(rf"\*\*Exercise {number} (●|●●|●●●) \(\d+ min\)\.\*\* `{name}", text)
            summaries = re.findall(r"<details><summary>(.*?)</summary>", text)
            assert summaries[:2] == ["Hint 1", "Hint 2"]
            assert summaries[2].startswith("Help: ")
            assert text.rstrip().endswith(f"Solution: [solutions.py](solutions.py), `{name}`.")
            assert getattr(solutions, name).__doc__
            assert getattr(solutions, f"{name}_wrong").__doc__
            assert solutions.VERDICTS[name].startswith("not yet. ")


class TestPages:
    """solutions.py, exercises.py and the page for teachers go with the notebooks."""

    def test_no_solution_or_check_is_left_without_its_exercise(self, solutions, exercises):
        names = [name for path in NOTEBOOKS for name in stubs(code_of(path))]
        assert sorted(solutions.VERDICTS) == sorted(names)
        assert sorted(exercises.EXERCISES) == sorted(names)

    def test_the_page_for_teachers_names_every_notebook(self):
        page = (HERE / "README.md").read_text(encoding="utf-8")
        front = (ROOT / "README.md").read_text(encoding="utf-8")
        for path in NOTEBOOKS:
            row = re.escape(f"]({path.name})") + r" \| (.+?) \| (\d+) \| \d+–(\d+) \|\n"
            question, minutes, seconds = re.search(row, page).groups()
            notebook = read_notebook(path)
            assert f"Time: {minutes} minutes" in notebook["cells"][0]["source"]
            assert int(seconds) == promised_seconds(notebook)
            assert f"| {question} |" in front


class TestLecture:
    """lecture.ipynb, which nbconvert turns into slides."""

    def test_every_slide_has_speaker_notes_and_every_picture_is_there(self):
        cells = read_notebook(LECTURE)["cells"]
        kinds = [cell["metadata"]["slideshow"]["slide_type"] for cell in cells]
        assert kinds[0] == "skip"
        slides = " ".join(kinds[1:]).replace(" -", "").split()  # - continues a slide
        assert slides == ["slide", "notes"] * (len(slides) // 2)
        assert 20 <= slides.count("slide") <= 30
        text = "\n".join(cell["source"] for cell in cells)
        pictures = re.findall(r'<img src="([^"]+)" alt="[^"]{30,}"', text)
        assert len(pictures) == text.count("<img ") >= 8
        assert all((HERE / picture).exists() for picture in pictures)

    def test_its_first_cell_is_that_of_the_notebooks(self):
        assert cells_of(read_notebook(LECTURE), "code")[0] == cells_of(
            read_notebook(NOTEBOOKS[0]), "code")[0]

    @pytest.mark.slow
    def test_its_live_cell_runs(self, monkeypatch):
        monkeypatch.delenv("RMT_FAST", raising=False)
        assert "holds: " in run_notebook(LECTURE)


# ==================================================================================================
# Notebooks, run


def with_answer(cell, name, function):
    """A copy of a cell, with a function of solutions.py where the stub of that name is."""
    source = inspect.getsource(function)
    (stub,) = [node for node in ast.parse(cell["source"]).body if getattr(node, "name", "") == name]
    lines = cell["source"].split("\n")
    lines[stub.lineno - 1:stub.end_lineno] = source.rstrip().split("\n")
    return cell | {"source": "\n".join(lines)}


def run_notebook(path, answers=None):
    """What a notebook prints; answers {exercise: function} take the place of stubs."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = read_notebook(path)
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            cell["outputs"] = []
            for name in stubs(cell["source"]) if answers else []:
                notebook["cells"][i] = with_answer(cell, name, answers[name])
    client = nbclient.NotebookClient(
        nbformat.from_dict(notebook), timeout=900,
        resources={"metadata": {"path": str(path.parent)}})
    return printed_by(client.execute())


@pytest.mark.slow
@every_notebook
def test_all_that_it_claims_holds(path, monkeypatch):
    for name in ("RMT_FAST", "RMT_SEED"):
        monkeypatch.delenv(name, raising=False)
    printed = run_notebook(path)
    assert "holds: " in printed
    assert "does not hold" not in printed
    assert re.findall(r"^(\w+): TODO$", printed, re.MULTILINE) == stubs(code_of(path))


@pytest.mark.slow
def test_a_copy_for_a_class_runs_alone(folder, teacher, solutions, monkeypatch):
    monkeypatch.setenv("RMT_FAST", "1")
    teacher.main(["--student", "class"])
    path = folder / "class" / "notebooks" / "2_build_it.ipynb"  # it needs its exercises to go on
    with pytest.raises(Exception, match="The cells from here on need wrap"):
        run_notebook(path)
    names = stubs(code_of(path))
    printed = run_notebook(path, {name: getattr(solutions, name) for name in names})
    assert re.findall(r"^(\w+): OK\. \w", printed, re.MULTILINE) == names
    progress = json.loads((path.parent / "progress.json").read_text(encoding="utf-8"))
    assert list(progress["exercises"]) == names
    assert "Share right with memory.detach()" in progress["guesses"]


# ==================================================================================================
# exercises.py


def wrap_by_index(memory, letters):
    """Another way to the same answer."""
    rows = torch.zeros(len(letters), 2 * memory.size(1) + letters.size(1), letters.size(2))
    rows[:, :memory.size(1)] = memory
    rows[:, memory.size(1):-memory.size(1)] = letters
    rows[:, -memory.size(1):] = memory
    return rows


def forward_as_list(model, tokens):
    memory, outputs = model.memory.expand(len(tokens), -1, -1), []
    for page in tokens.split(model.T, dim=1):
        logits, memory = model.step(page, memory)
        outputs.append(logits)
    return outputs


def forward_without_a_batch(model, tokens):
    memory, outputs = model.memory, []
    for page in tokens.split(model.T, dim=1):
        logits, memory = model.step(page, memory)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


def leaks_at_one_pair(model):
    tokens = torch.randint(10, (2, 8))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 10
    return not torch.equal(model(tokens)[:, 2], model(changed)[:, 2])


def leaks_on_the_first_page(model):
    tokens = torch.randint(10, (2, 8))
    for t in range(1, 4):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 10
        if not torch.equal(model(changed)[:, :t], model(tokens)[:, :t]):
            return True
    return False


def leaks_as_a_tensor(model):
    tokens = torch.randint(10, (2, 8))
    changes = []
    for t in range(1, 8):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 10
        changes.append((model(changed)[:, :t] != model(tokens)[:, :t]).any())
    return torch.stack(changes).any()


def truncated_by_unroll(model, tokens, depth):
    return unroll(model, tokens, bptt_depth=depth)[0]


def truncated_without_gradient(model, tokens, depth):
    return unroll(model, tokens)[0].detach()


def truncated_before_the_first_page(model, tokens, depth):
    pages = tokens.split(model.config.segment_len, dim=1)
    state, outputs = model.initial_state(len(tokens)), []
    for s, page in enumerate(pages):
        if (len(pages) - s) % (depth + 1) == 0:
            state = state.detach()
        logits, state = model(page, state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


def my_variant_that_writes_nothing():
    return Variant(True, False, True, "paper", AssociativeBlock)


def needed_cards_counted_from_the_end(left):
    best = left.min(0)
    return torch.where(best.values < 0.9, best.indices + 1 - len(left) - 1, 0).tolist()


def forge_twice_as_far(memory, means, place, old, new):
    return memory + 2 * (means[place, new] - means[place, old])


def erase_by_shouting_another_letter(memory, means, mean, place):
    return memory + 20 * (means[place, 0] - mean)


def erase_by_forging_the_next_letter(memory, means, mean, place):
    distance = (memory[:, None] - means[place]).square().sum(2)
    read = distance.argmin(1)
    return memory + means[place, (read + 1) % 10] - means[place, read]


def erase_without_the_mean(memory, means, mean, place):
    Q = torch.linalg.qr((means[place] - mean).T)[0][:, :9]
    return memory - memory @ Q @ Q.T


def write_into_what_was_given(A, k, v, beta):
    A += beta * torch.outer(v - A @ k, k)
    return A


def diagonal_as_one_list(S, L):
    return [(layer, segment) for segment in range(S) for layer in range(L)]


def my_variant_of_the_table():
    return VARIANTS["armt"]


def transplant_that_shares(old, config):
    new = RMT(config)
    for name, weight in old.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(new.get_submodule(owner), last, weight)
    return new


def by_the_solution(name):
    """An answer that calls the solution."""
    namespace = {}
    exec(f"def {name}(*args):\n    import solutions\n    return solutions.{name}(*args)", namespace)
    return namespace[name]


REFUSED = {
    forward_as_list: "must be a tensor, and is of type list",
    leaks_at_one_pair: "gives False, but letter",
    leaks_on_the_first_page: "gives False, but letter",
    leaks_as_a_tensor: "must be of type bool, and is of type Tensor",
    forward_without_a_batch: "step needs cards (batch, M, D)",
    truncated_before_the_first_page: "the initial memory gets no gradient",
    my_variant_that_writes_nothing: "keeps nothing of the first segment",
    truncated_by_unroll: "calls unroll: write the loop yourself",
    truncated_without_gradient: "calls unroll: write the loop yourself",
    needed_cards_counted_from_the_end: "is wrong at place 1",
    forge_twice_as_far: "goes further than a message with the new letter would",
    erase_by_shouting_another_letter: "erases other letters, too",
    erase_by_forging_the_next_letter: "from which a new probe can tell the letter",
    erase_without_the_mean: "moves the mean of all memories",
    write_into_what_was_given: "changes what it was given: work on a copy",
    diagonal_as_one_list: "and trying that ends with TypeError",
    my_variant_of_the_table: "is in the table already",
    transplant_that_shares: "shares weights with the old model",
}


def exercise_of(function, exercises):
    """The exercise that an answer above is for: its name begins so."""
    fitting = [name for name in exercises.EXERCISES if function.__name__.startswith(name)]
    return max(fitting, key=len)


class TestExercises:

    def test_the_solutions_are_right_whatever_is_drawn(self, solutions, exercises):
        for seed in (0, 1):  # in the notebooks, and in grading
            for name, (_, meaning) in exercises.EXERCISES.items():
                verdict = exercises.verdict_on(name, getattr(solutions, name), seed)
                assert verdict == f"OK. {meaning}", name
        assert exercises.verdict_on("wrap", wrap_by_index).startswith("OK. ")

    def test_common_wrong_answers_are_refused(self, solutions, exercises):
        """Verdicts are compared whole: nothing in them tells what is right."""
        for name, verdict in solutions.VERDICTS.items():
            wrong = getattr(solutions, f"{name}_wrong")
            assert exercises.verdict_on(name, wrong) == verdict, name

    def test_answers_that_are_right_by_half_are_refused(self, exercises):
        for function, complaint in REFUSED.items():
            for seed in range(2):
                verdict = exercises.verdict_on(exercise_of(function, exercises), function, seed)
                assert verdict.startswith("not yet. "), function.__name__
                assert complaint in verdict, function.__name__

    def test_an_answer_that_calls_the_solution_or_the_check_is_refused(self, exercises):
        for name in exercises.EXERCISES:
            verdict = exercises.verdict_on(name, by_the_solution(name))
            assert verdict == f"not yet. {name} uses solutions, which no answer needs"

    def test_a_stub_is_todo_and_what_is_no_function_is_named(self, exercises):
        for name in exercises.EXERCISES:
            assert exercises.verdict_on(name, lambda *arguments: None) == "TODO"
        assert exercises.verdict_on("bits", 3) == (
            "not yet. bits must be a function, and is of type int")

    def test_checks_of_every_kind_of_answer_never_end_in_an_error(self, exercises):
        for name in exercises.EXERCISES:
            for answer in ("text", -7, [torch.zeros(2)], torch.zeros(3)):
                verdict = exercises.verdict_on(name, lambda *arguments, answer=answer: answer)
                assert verdict.startswith("not yet. "), (name, answer)

    def test_a_check_leaves_random_numbers_alone(self, exercises, solutions):
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        exercises.verdict_on("forge", solutions.forge)
        assert torch.equal(torch.rand(1), expected)

    def test_the_table_of_variants_stays_as_it_is(self, exercises, solutions):
        before = dict(exercises.VARIANTS)
        exercises.verdict_on("my_variant", solutions.my_variant)
        exercises.verdict_on("my_variant", solutions.my_variant_wrong)
        assert before == exercises.VARIANTS


class TestVerdicts:
    """What a check prints, for an exercise that doubles a number."""

    @pytest.fixture
    def verdict(self, exercises, monkeypatch, capsys):
        def verdict_on(function, expected=lambda n: 2 * n, inputs=(1, 2, 5)):
            def specification(answer, draw):
                for n in inputs:
                    answer.must_be(expected(n), n)

            monkeypatch.setitem(exercises.EXERCISES, "twice", (specification, "So be it."))
            exercises.check("twice", function)
            return capsys.readouterr().out.strip()
        return verdict_on

    def test_a_check_says_todo_ok_or_the_first_input_that_fails(self, verdict):
        assert verdict(lambda n: None) == "twice: TODO"
        assert verdict(lambda n: 2 * n) == "twice: OK. So be it."
        assert verdict(lambda n: n + 1) == "twice: not yet. twice(2) gives 3, which is wrong"
        assert verdict(lambda n: n / 0) == (
            "twice: not yet. twice(1) ends with ZeroDivisionError: division by zero")
        assert verdict(lambda n: "two") == (
            "twice: not yet. twice(1) must be a number, and is of type str")
        assert verdict(lambda n: 2 if n == 1 else None) == "twice: not yet. twice(2) is None"
        assert verdict(lambda n: torch.tensor([2 * n])) == "twice: OK. So be it."
        assert verdict(lambda n: True) == (
            "twice: not yet. twice(1) must be a number, and is of type bool")

    def test_tensors_are_compared_without_telling_what_is_right(self, verdict):
        def compare(function, dtype=torch.float64):
            expected = torch.tensor([[0, 1], [0, 1]], dtype=dtype)
            return verdict(function, lambda x: expected, [torch.zeros(2, 2)])

        start = "twice: not yet. twice([[0.0, 0.0], [0.0, 0.0]]) "
        wrong = "is wrong at [0, 0]; 2 of 4 entries are wrong"
        assert compare(lambda x: torch.tensor([[0, 1], [0, 1]])) == "twice: OK. So be it."
        assert compare(lambda x: torch.eye(2)) == start + wrong
        assert compare(lambda x: torch.eye(2).bool(), torch.bool) == start + wrong
        assert compare(lambda x: torch.eye(2), torch.bool) == (
            start + "must hold True and False (torch.bool), and holds torch.float32")
        assert compare(lambda x: torch.eye(2).bool()) == (
            start + "must hold numbers, and holds torch.bool")
        assert compare(lambda x: torch.eye(2), torch.int64) == (
            start + "must hold whole numbers (torch.int64), and holds torch.float32")
        assert compare(lambda x: x[0]) == start + "must have the shape (2, 2), and has (2,)"
        assert compare(lambda x: [[0, 1], [0, 1]]) == (
            start + "must be a tensor, and is of type list")
        assert compare(lambda x: x / 0).endswith("4 of 4 entries are wrong")
        assert compare(lambda x: x.add_(1)) == (
            start + "changes what it was given: work on a copy")

    def test_a_list_is_wanted_where_one_is_right(self, verdict):
        verdicts = [
            ([0], "OK. So be it."),
            (torch.tensor([0]), "OK. So be it."),
            ([], "gives [], which is wrong"),
            ((0,), "must be a list, and is of type tuple"),
            (0, "must be a list, and is of type int"),
        ]
        for answer, ending in verdicts:
            assert verdict(lambda n, answer=answer: answer, lambda n: [0]).endswith(ending)

    def test_the_solution_steps_in_until_the_answer_of_the_student_is_right(
            self, exercises, solutions, capsys):
        assert exercises.use("bits", None) is solutions.bits
        assert capsys.readouterr().out == "bits comes from solutions.py until yours is OK\n"

        def mine(letters, symbols):
            return letters * math.log2(symbols)

        exercises.check("bits", mine)
        assert exercises.use("bits", mine) is mine

    def test_without_solutions_a_class_copy_stops_with_advice(self, exercises, monkeypatch):
        monkeypatch.setitem(sys.modules, "solutions", None)  # as where that file is missing
        with pytest.raises(exercises.NotYet) as stopped:
            exercises.use("wrap", None)
        assert stopped.value._render_traceback_() == [
            "The cells from here on need wrap: solve that exercise first."]


# ==================================================================================================
# course.py


class TestInstruments:

    def test_lines_of_code_are_counted_without_words(self, course):
        def three(x):
            """A docstring."""
            # A comment.

            y = (x +
                 1)
            return y

        assert course.count_lines(three) == 3

    def test_what_is_kept_for_the_backward_pass_is_counted_once(self, course):
        """Two squares keep their inputs, 4,000 bytes each; a weight is not counted."""
        model = torch.nn.Linear(1, 1)
        x = torch.zeros(1000, requires_grad=True)
        assert course.peak_kept(model, lambda: x.square()) == 0.004
        assert course.peak_kept(model, lambda: (x.square(), x.square())) == 0.004
        kept = course.peak_kept(model, lambda: [x.exp().square().sum().backward() for _ in "ab"])
        assert kept == 0.004  # exp and square keep the same numbers, and backward lets go of them

    def test_reach_and_influence_tell_gradient_from_information(self, course):
        model = course.small_model("rmt")
        tokens = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
        triangle = torch.ones(3, 3).tril().bool()
        assert torch.equal(course.influence(model, tokens) > 0, triangle)
        assert torch.equal(course.gradient_reach(model, tokens) > 0, triangle)
        assert torch.equal(course.gradient_reach(model, tokens, 0) > 0, torch.eye(3).bool())

    def test_reach_of_a_cache_ends_and_that_of_memory_does_not(self, course):
        assert course.segments_back("transformer_xl", n_layer=2, cache_len=4) == 2
        assert course.segments_back("transformer") == 0
        assert course.segments_back("rmt") == course.segments_back("armt") == 8


class TestGuessesAndClaims:

    def test_guesses_end_in_a_table(self, course, capsys, monkeypatch):
        shown = []
        monkeypatch.setattr(course, "display", lambda markdown: shown.append(markdown.data))
        course.table_of_guesses()
        assert "No guesses yet" in capsys.readouterr().out
        course.guess("share", np.float64(0.5))
        course.table_of_guesses()
        assert "None of your guesses has been measured" in capsys.readouterr().out
        course.guess("letters", 100)
        course.guess("nothing")
        capsys.readouterr()
        course.measured("share", 0.1, within=0.1)
        course.measured("letters", 250, factor=3)
        course.measured("nothing", 1)
        assert capsys.readouterr().out.splitlines() == [
            "share: measured 0.1, your guess 0.5",
            "letters: measured 250, your guess 100",
            "nothing: measured 1, no guess",
        ]
        course.table_of_guesses()
        assert capsys.readouterr().out.strip() == "1 of 2 within reach; the largest surprise: share"
        assert "| letters | 100 | 250 |" in shown[-1]
        assert "| nothing | - | 1 |" in shown[-1]

    def test_what_is_no_number_is_no_guess(self, course, capsys):
        for value in ("ten", math.inf, 10**400):
            course.guess("how many", value)
            refused, no_guess = capsys.readouterr().out.splitlines()
            assert refused.startswith("how many: your guess must be a number or None, and ")
            assert no_guess == "how many? no guess yet"
            assert course.GUESSES["how many"].value is None

    def test_a_claim_that_does_not_hold_stops_a_full_run_only(self, course, capsys, monkeypatch):
        course.claim(True, "this")
        with pytest.raises(AssertionError, match="that"):
            course.claim(False, "that")
        monkeypatch.setattr(course, "FAST", True)
        course.claim(False, "that")
        assert capsys.readouterr().out.splitlines() == [
            "holds: this", "does not hold: that", "does not hold: that"]


class TestReport:

    def test_it_keeps_the_first_guess_and_its_time(self, course, exercises, solutions, folder,
                                                   monkeypatch, capsys):
        monkeypatch.setattr(course, "HERE", folder)
        times = iter(["09:00", "09:01", "09:02", "09:03", "09:04", "09:05", "09:06"])
        monkeypatch.setattr(course, "now", lambda: next(times))
        course.guess("share")              # no number: no time
        course.guess("share", 0.3)         # 09:00
        course.measured("share", 0.5)      # 09:01
        course.guess("share", 0.5)         # too late: the first one counts
        course.measured("share", 0.5)
        exercises.check("bits", solutions.bits)
        course.report()
        course.GUESSES.clear()             # another notebook, which adds to the file
        course.guess("share", 0.9)
        course.guess("letters", 12)
        exercises.check("survives", solutions.survives_wrong)
        course.report()
        assert capsys.readouterr().out.endswith("progress.json: 1 exercises OK, 2 guesses\n")
        progress = json.loads(Path("progress.json").read_text(encoding="utf-8"))
        assert progress["guesses"]["share"] == {
            "guess": 0.3, "time": "09:00", "measured": 0.5, "measured_time": "09:01"}
        assert progress["guesses"]["letters"]["guess"] == 12
        assert progress["exercises"]["bits"]["verdict"].startswith("OK. ")
        assert progress["exercises"]["survives"]["verdict"].startswith("not yet. ")
        hashes = {row["answer"] for row in progress["exercises"].values()}
        assert len(hashes) == 2

    def test_a_file_of_something_else_is_not_overwritten(self, course, folder, monkeypatch, capsys):
        monkeypatch.setattr(course, "HERE", folder)
        Path("progress.json").write_text("mine")
        course.report()
        assert "rename it" in capsys.readouterr().out
        assert Path("progress.json").read_text() == "mine"


class TestMessages:

    def test_messages_end_with_what_must_be_said(self, course):
        tokens, letters = course.message(3, 5, torch.Generator().manual_seed(0))
        assert tokens.shape == (5, 6)
        assert (tokens[:, 3] == course.BAR).all()
        assert torch.equal(tokens[:, :3], letters)
        assert torch.equal(tokens[:, 4:], letters[:, :2])

    def test_letters_are_written_and_spelled(self, course):
        assert course.text(torch.tensor([0, 9, 10, 2]), T=2) == "AJ |C"
        assert course.spell("Cafe J").tolist() == [2, 0, 5, 4, 9]
        with pytest.raises(ValueError, match="'K' is not one of ABCDEFGHIJ"):
            course.spell("KEY")

    def test_reciting_starts_at_the_bar_from_a_state_or_after_reading(self, course):
        torch.manual_seed(0)  # some untrained models say the same whatever they have read
        model = RMT(Config(vocab_size=11, segment_len=4)).eval()
        letters = course.message(8, 3)[1]
        _, state = unroll(model, letters)
        assert torch.equal(course.recite(model, letters), course.recite(model, letters, state))
        assert course.recite(model, letters, n=5).shape == (3, 5)

    def test_right_letters_are_counted_place_by_place(self, course):
        tokens, letters = course.message(3, 10, torch.Generator().manual_seed(0))
        answer = F.one_hot(letters, 11).double()
        answer[:4, 1] = answer[:4, 1].roll(1, dims=-1)
        logits = torch.cat([torch.zeros(10, 3, 11), answer], dim=1)
        share = course.by_place(lambda _: logits, tokens, letters)
        assert share.tolist() == [1.0, 0.6, 1.0]


class TestTraining:
    """The answer is always the same letter, so that few steps are enough."""

    def train(self, course, model, *arguments, **options):
        """What training tells, and the levels that were drawn."""
        drawn = []

        def sample(level, batch, generator):
            drawn.append(level)
            return course.message(4, batch, generator)[0], torch.full((batch, 4), 3)

        return course.train(model, sample, *arguments, levels=3, **options), drawn

    def test_training_grows_when_enough_is_right(self, course):
        model = RMT(Config(vocab_size=11, segment_len=4, d_model=16))
        log, drawn = self.train(course, model, 120, grow_at=0.8)
        assert not model.training
        assert len(log.right) == 120
        assert log.level == drawn == sorted(drawn)
        assert set(drawn) == {1, 2, 3}
        for first in (drawn.index(2), drawn.index(3)):
            assert log.right[first - 1] > 0.8 > log.right[first]

    def test_without_growing_every_step_is_on_the_last_level(self, course):
        model = RMT(Config(vocab_size=11, segment_len=4, d_model=16))
        before = copy.deepcopy(model.state_dict())
        _, drawn = self.train(course, model, 5, grow=False)
        assert drawn == [3] * 5
        changed = [not torch.equal(before[name], weight)
                   for name, weight in model.state_dict().items()]
        assert any(changed)


class TestPictures:

    def test_a_picture_is_shown_and_kept_for_slides_with_its_caption(
            self, course, folder, monkeypatch):
        shown = []

        def display(data, **options):
            shown.append((data, options))

        monkeypatch.setattr(course, "display", display)
        monkeypatch.setenv("RMT_FIGURES", str(folder))
        for caption in ("one", "two"):
            course.show(course.draw_lines({"a": ([1, 2], [3, 4])}, "title", "x", "y"), caption)
        assert sorted(path.name for path in folder.iterdir()) == [
            "1.png", "1.svg", "1.txt", "2.png", "2.svg", "2.txt"]
        assert Path("2.txt").read_text(encoding="utf-8") == "two"
        data, options = shown[2]
        assert data["text/plain"] == "two"
        assert options["metadata"] == {"image/png": {"alt": "two"}}
        below, _ = shown[3]
        assert below.data == "**What to see:** two"

    def test_masks_are_drawn_as_the_models_have_them(self, course):
        """Filled cells, column by column, with the letters of the columns above them."""
        model = RMT(Config("rmt_xl", segment_len=4, n_mem=2, cache_len=3))
        axis = course.draw_masks({"rmt_xl": model}).axes[0]
        filled = [to_rgb(cell.get_facecolor()) != to_rgb("0.94") for cell in axis.patches]
        mask = segment_mask(n_read=2, n_cache=3, n_tokens=4, n_write=2)
        assert torch.equal(torch.tensor(filled).view(11, 8).T, mask)
        letters = [text.get_text() for text in axis.texts if text.get_position()[1] == -0.2]
        assert "".join(letters) == "cccrrttttww"
        matplotlib.pyplot.close(axis.figure)


# ==================================================================================================
# teacher.py


class TestCopyForAClass:

    def test_it_has_no_outputs_no_solutions_and_no_dead_links(self, folder, teacher):
        arguments = ["--student", "class", "--repo", "we/ours"]
        teacher.main(arguments)
        copies = sorted(Path("class/notebooks").glob("*.ipynb"))
        assert [path.name for path in copies] == [path.name for path in NOTEBOOKS]
        assert not list(Path("class").rglob("solutions.py"))
        for path in copies:
            notebook = read_notebook(path)
            assert not any(cell.get("outputs") for cell in notebook["cells"])
            raw = path.read_text(encoding="utf-8")
            for word in ("olution: ", "solutions.py", "OWNER"):
                assert word not in raw
            assert raw.count("we/ours") == 3  # two badges and the set-up cell
            assert stubs(code_of(path)) == stubs(code_of(HERE / path.name))
            assert cells_of(notebook, "code")[-1].endswith(
                "course.report()  # writes progress.json, for you to hand in")
            texts = "\n".join(cells_of(notebook, "markdown"))
            for link in re.findall(r"\]\((?!http)([^)#]+)", texts):
                assert (path.parent / link).exists()
            for name in re.findall(r'\bpicture\("(\w+)"', code_of(path)):
                assert Path(f"class/assets/{name}.svg").exists()
        assert "https://github.com/we/ours" in Path("class/README.md").read_text()
        before = contents()
        teacher.main(arguments)
        assert contents() == before

    def test_it_never_overwrites_what_it_did_not_write(self, folder, teacher, capsys):
        Path("mine").mkdir()
        Path("mine/notes.txt").write_text("mine")
        teacher.main(["--student", "class"])
        Path("class/README.md").write_text("edited")
        Path("class/notebooks/progress.json").write_text("{}")  # of a student: not in the way
        before = contents()
        for place, words in (("mine", "is not empty"), ("class", "README.md was changed")):
            with pytest.raises(SystemExit, match="2"):
                teacher.main(["--student", place])
            assert f"error: --student {place}: {words}" in capsys.readouterr().err
        assert contents() == before

    def test_it_is_not_written_where_it_cannot_be(self, folder, teacher, capsys):
        Path("file").write_text("")
        before = contents()
        for flags in (f"--student {ROOT}", "--student file", "--student new --repo http://a/b",
                      "--grade nowhere", "--grade .", "--student a --grade b"):
            words = flags.split()
            with pytest.raises(SystemExit, match="2"):
                teacher.main(words)
            assert contents() == before
            assert f"{words[-2]}" in capsys.readouterr().err


def hand_in(student, *cells, name="answers.ipynb"):
    """A submission: a folder with one notebook."""
    Path("class", student).mkdir(parents=True, exist_ok=True)
    notebook = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    for source in cells:
        notebook["cells"].append({"cell_type": "code", "source": source, "outputs": [],
                                  "execution_count": None, "metadata": {}})
    Path("class", student, name).write_text(json.dumps(notebook), encoding="utf-8")


@pytest.mark.slow
def test_a_class_is_graded(folder, teacher, exercises, solutions, monkeypatch):
    """Perfect, empty, crashing, hanging, cheating, edited: a row each, and no harm to others."""
    monkeypatch.setattr(teacher, "SECONDS", 20)
    names = ["wrap", "mask", "write", "bits", "survives", "only_cards"]  # a few quick ones
    few = {name: exercises.EXERCISES[name] for name in names}
    monkeypatch.setattr(exercises, "EXERCISES", few)
    perfect = [inspect.getsource(getattr(solutions, name)) for name in names]
    in_place = dict(zip(names, perfect, strict=True))
    crash = "def wrap(memory, letters):\n    import os\n    os._exit(3)"
    hang = "def bits(letters, symbols):\n    while True:\n        pass"
    hand_in("ada", *perfect)
    hand_in("bob")
    hand_in("cleo", *(in_place | {"wrap": crash}).values())
    hand_in("dan", *(in_place | {"bits": hang}).values())
    hand_in("eve", "import solutions",
            "def wrap(memory, letters):\n    return solutions.wrap(memory, letters)",
            "def mask(M, n):\n    import exercises\n    exercises.VERDICTS['mask'] = 'OK.'",
            "from solutions import survives",
            "exercises.VERDICTS['bits'] = 'OK.'\nVERDICTS = {'bits': 'OK.'}")
    Path("class/eve/progress.json").write_text(json.dumps({
        "exercises": {"wrap": {"verdict": "OK. "}, "bits": {"verdict": "OK. "}},
        "guesses": {"a": {"guess": 1, "time": "09:02", "measured_time": "09:01"},
                    "b": {"guess": 1, "time": "09:00", "measured_time": "09:01"}}}))
    hand_in("finn", "def check(name, function):\n    print(f'{name}: OK.')",
            "class Helper:\n    factor = 2", "import math",
            "def bits(letters, symbols):\n    return open('answers')",  # replaced below
            "bits = lambda letters, symbols: letters * math.log(symbols, Helper.factor)",
            "this is not Python", "%matplotlib inline")
    Path("class/finn/other.ipynb").write_text("not JSON")
    teacher.main(["--grade", "class"])
    with open("class/grades.csv", newline="", encoding="utf-8") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert {name: int(row["OK"]) for name, row in rows.items()} == {
        "ada": len(names), "bob": 0, "cleo": len(names) - 1, "dan": len(names) - 1, "eve": 0,
        "finn": 1}
    assert rows["cleo"]["wrap"] == "not yet. ends the Python process (exit code 3)"
    assert rows["dan"]["bits"] == "not yet. does not end within 20 seconds"
    assert rows["eve"]["wrap"] == "not yet. wrap uses solutions, which no answer needs"
    assert rows["eve"]["mask"] == "not yet. mask uses VERDICTS, which no answer needs"
    assert rows["eve"]["reported OK, but not here"] == "bits wrap"
    assert (rows["eve"]["guesses"], rows["eve"]["guesses after the result"]) == ("2", "1")
    assert rows["bob"]["mask"] == "missing"
    assert rows["finn"]["unreadable"] == "other.ipynb"


# ==================================================================================================
# The set-up cell


class TestSetUpCell:
    """The first cell of all notebooks, wherever it starts."""

    def start(self, *starts, **environment):
        """Run the cell in each (folder, repository), and print where it went, in one process."""
        pytest.importorskip("IPython")
        cell = cells_of(read_notebook(NOTEBOOKS[0]), "code")[0]
        lines = ["import os"]
        for place, repo in starts:
            lines.append(f"os.chdir({str(place)!r})")
            lines.append(cell.replace("https://github.com/OWNER/rmt", str(repo)))
            lines.append("print(os.getcwd(), course.__file__)")
        return subprocess.run(
            [sys.executable, "-c", "\n".join(lines)], cwd=starts[0][0], text=True, timeout=300,
            capture_output=True, env=os.environ | environment)

    def test_in_a_checkout_it_fetches_nothing(self):
        run = self.start((ROOT, "nowhere"), (HERE, "nowhere"))
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines() == [f"{HERE} {HERE / 'course.py'}"] * 2

    @pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
    def test_alone_it_clones_once(self, folder):
        source = folder / "source"
        (source / "notebooks").mkdir(parents=True)
        for path in ("rmt.py", "notebooks/course.py", "notebooks/exercises.py"):
            shutil.copy(ROOT / path, source / path)
        who = "-c user.name=a -c user.email=a@b.c".split()
        for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]):
            subprocess.run(["git", "-C", source, *command], check=True)
        empty = folder / "empty"
        (empty / "rmt").mkdir(parents=True)  # a folder that is something else does not matter
        run = self.start((empty, source.as_uri()), (empty, "nowhere"))  # then it is there
        assert run.returncode == 0, run.stderr
        here = (empty / "rmt-course" / "notebooks").resolve()
        assert run.stdout.splitlines() == [f"{here} {here / 'course.py'}"] * 2

    def test_where_it_cannot_fetch_it_says_so_in_one_line(self, folder):
        run = self.start((folder, folder / "nowhere"), GIT_TERMINAL_PROMPT="0")
        assert run.returncode == 1
        assert "Traceback" not in run.stderr
        assert run.stderr.strip().split("\n")[-1] == (
            f"Could not fetch {folder / 'nowhere'}. Is the Internet on (Kaggle: Settings), and is "
            "REPO the address of this course?")

    def test_a_folder_that_is_in_its_way_is_named(self, folder):
        Path("rmt-course").mkdir()
        run = self.start((folder, "nowhere"))
        assert run.stderr == (
            "The folder rmt-course has no course in it: delete or rename it\n")
