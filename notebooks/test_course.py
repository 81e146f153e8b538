"""Tests of the course. Run them before you teach, and after you have changed a lesson.

    python -m pytest notebooks/test_course.py            seconds
    python -m pytest notebooks/test_course.py -m slow    minutes: every notebook runs twice

Notebooks    they were committed as they ran, start anywhere, and have what a student needs
Runs (slow)  claims hold, wrong answers are refused, the solutions are right
course.py    checks, guesses, claims, messages, training, pictures, the copy for a class
Set-up       the first cell of all notebooks

Tests of notebooks do not know how many there are: one that you add is tested, too.
"""
import ast
import copy
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
from rmt import RMT, Config, segment_mask, unroll  # noqa: E402

NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def load_module(path):
    """A fresh module of the course. The settings of figures stay as they were."""
    pytest.importorskip("IPython")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with matplotlib.rc_context():
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def course():
    return load_module(HERE / "course.py")


@pytest.fixture
def solutions():
    return load_module(HERE / "solutions.py")


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
        """It is the alternative text, too, and stands below the picture on every page."""
        notebook = read_notebook(path)
        pictures = []
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    pictures.append(output["metadata"]["image/png"]["alt"])
        assert pictures
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
        for part in ("\n**", "After this notebook you will be able to\n\n- ", "You need: "):
            assert part in texts[0]
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
            assert solutions.SAYS[name].startswith("not yet. ")


class TestPages:
    """solutions.py and the page for teachers go with the notebooks."""

    def test_no_solution_is_left_without_its_exercise(self, solutions):
        names = [name for path in NOTEBOOKS for name in stubs(code_of(path))]
        assert list(solutions.SAYS) == names

    def test_the_page_for_teachers_names_every_notebook(self):
        page = (HERE / "README.md").read_text(encoding="utf-8")
        front = (ROOT / "README.md").read_text(encoding="utf-8")
        for path in NOTEBOOKS:
            row = re.escape(f"]({path.name})") + r" \| (.+?) \| (\d+) \| (\d+) \|\n"
            question, minutes, seconds = re.search(row, page).groups()
            notebook = read_notebook(path)
            assert f"Time: {minutes} minutes" in notebook["cells"][0]["source"]
            assert int(seconds) <= promised_seconds(notebook)
            assert f"| {question} |" in front
        assert missing_files(page) == []

    def test_every_question_of_the_exam_has_an_answer(self, solutions):
        page = (HERE / "README.md").read_text(encoding="utf-8")
        exam = page.split("## Exam questions")[1].split("\n## ")[0]
        numbers = [int(number) for number in re.findall(r"^(\d+)\. ", exam, re.MULTILINE)]
        assert len(numbers) > 0
        assert numbers == list(solutions.EXAM)


# ==================================================================================================
# Notebooks, run


def with_answer(cell, name, function):
    """A copy of a cell, with a function of solutions.py where the stub of that name is."""
    source = inspect.getsource(function).replace(f"def {function.__name__}(", f"def {name}(")
    (stub,) = [node for node in ast.parse(cell["source"]).body if getattr(node, "name", "") == name]
    lines = cell["source"].split("\n")
    lines[stub.lineno - 1:stub.end_lineno] = source.rstrip().split("\n")
    return cell | {"source": "\n".join(lines), "id": f"{cell['id']}-{function.__name__}"}


def run_notebook(path, *attempts):
    """What a notebook prints; attempts {exercise: function} take the place of stubs, in turns."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = read_notebook(path)
    cells = []
    for cell in notebook["cells"]:
        tries = [cell]
        if stubs(cell["source"]) and attempts:
            (name,) = stubs(cell["source"])
            tries = [with_answer(cell, name, answers[name]) for answers in attempts]
        cells.extend(tries)
    notebook["cells"] = cells
    for cell in cells:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    client = nbclient.NotebookClient(
        nbformat.from_dict(notebook), timeout=900,
        resources={"metadata": {"path": str(path.parent)}})
    return printed_by(client.execute())


@pytest.mark.slow
@every_notebook
class TestRuns:

    def test_all_that_it_claims_holds(self, path, monkeypatch):
        for name in ("RMT_FAST", "RMT_SEED"):
            monkeypatch.delenv(name, raising=False)
        printed = run_notebook(path)
        assert "holds: " in printed
        assert "does not hold" not in printed
        assert re.findall(r"^(\w+): TODO$", printed, re.MULTILINE) == stubs(code_of(path))

    def test_wrong_answers_are_refused_and_the_solutions_are_right(
            self, path, solutions, monkeypatch):
        """One run tries both. Verdicts are compared whole: nothing in them tells what is right."""
        monkeypatch.setenv("RMT_FAST", "1")
        names = stubs(code_of(path))
        wrong = {name: getattr(solutions, f"{name}_wrong") for name in names}
        right = {name: getattr(solutions, name) for name in names}
        printed = run_notebook(path, wrong, right)
        for name in names:
            assert f"{name}: {solutions.SAYS[name]}\n" in printed
        assert re.findall(r"^(\w+): OK\. \w", printed, re.MULTILINE) == names


@pytest.mark.slow
def test_a_copy_for_a_class_runs_alone(folder, course, solutions, monkeypatch):
    monkeypatch.setenv("RMT_FAST", "1")
    course.main(["--student", "class"])
    path = folder / "class" / "notebooks" / "2_build_it.ipynb"  # it needs its exercises to go on
    with pytest.raises(Exception, match="The cells from here on need wrap"):
        run_notebook(path)
    names = stubs(code_of(path))
    printed = run_notebook(path, {name: getattr(solutions, name) for name in names})
    assert re.findall(r"^(\w+): OK\. \w", printed, re.MULTILINE) == names


# ==================================================================================================
# course.py


class TestCheck:
    """What the check of an exercise says."""

    def test_a_check_says_todo_ok_or_the_first_input_that_fails(self, course, capsys):
        def double(n):
            return 2 * n

        def verdict(function):
            course.check("twice", function, [(1,), (2,), (5,)], double, meaning="So be it.")
            return capsys.readouterr().out

        assert verdict(lambda n: None) == "twice: TODO\n"
        assert verdict(double) == "twice: OK. So be it.\n"
        assert verdict(lambda n: n + 1) == "twice: not yet. twice(2) is not 3\n"
        assert verdict(lambda n: n / 0) == (
            "twice: not yet. twice(1) ends with ZeroDivisionError: division by zero\n")
        assert verdict(lambda n: "two") == "twice: not yet. twice(1) is not 'two'\n"
        assert verdict(lambda n: 2 if n == 1 else None) == "twice: not yet. twice(2) is None\n"
        assert verdict(lambda n: torch.tensor([2 * n])) == "twice: OK. So be it.\n"
        assert verdict(lambda n: torch.zeros(2)) == "twice: not yet. twice(1) is not [0.0, 0.0]\n"

    def test_a_check_compares_tensors_without_telling_what_is_right(self, course, capsys):
        def verdict(function, dtype=torch.float64):
            expected = torch.tensor([[0, 1], [0, 1]], dtype=dtype)
            course.check("f", function, [(torch.zeros(2, 2),)], lambda x: expected)
            return capsys.readouterr().out.strip()

        start = "f: not yet. f([[0.0, 0.0], [0.0, 0.0]]) "
        assert verdict(lambda x: torch.tensor([[0, 1], [0, 1]])) == "f: OK."
        assert verdict(lambda x: torch.eye(2)) == start + "is wrong at [0, 0]; 2 of 4 entries are"
        assert verdict(lambda x: torch.eye(2).bool(), torch.bool) == (
            start + "is wrong at [0, 0]; 2 of 4 entries are")
        assert verdict(lambda x: torch.eye(2), torch.bool) == (
            start + "must hold True and False (torch.bool), and holds torch.float32")
        assert verdict(lambda x: torch.eye(2).bool()) == (
            start + "must hold numbers, and holds torch.bool")
        assert verdict(lambda x: torch.eye(2), torch.int64) == (
            start + "must hold whole numbers (torch.int64), and holds torch.float32")
        assert verdict(lambda x: x[0]) == start + "must have the shape (2, 2), and has (2,)"
        assert verdict(lambda x: [[0, 1], [0, 1]]) == (
            start + "must be a tensor, and is of type list")
        assert verdict(lambda x: x / 0).endswith("4 of 4 entries are")
        assert verdict(lambda x: x.add_(1)) == start + "changes what it was given: work on a copy"

    def test_a_check_wants_a_list_where_one_is_right(self, course, capsys):
        verdicts = [
            ([0], "OK."),
            (torch.tensor([0]), "OK."),
            ([], "is not []"),
            ((0,), "must be a list, and is of type tuple"),
            (0, "must be a list, and is of type int"),
        ]
        for answer, verdict in verdicts:
            course.check("f", lambda n, answer=answer: answer, [(1,)], lambda n: [0])
            assert capsys.readouterr().out.strip().endswith(verdict)

    def test_a_judge_complains_in_its_own_words(self, course, capsys):
        for complaint, verdict in [(None, "OK."), ("is odd", "not yet. f(3) is odd")]:
            course.check("f", lambda n: n, [(3,)], judge=lambda found, n, says=complaint: says)
            assert capsys.readouterr().out.strip() == f"f: {verdict}"

    def test_a_judge_that_fails_is_no_traceback(self, course, capsys):
        course.check("f", lambda n: "x" * 99, [(3,)], judge=lambda found, n: found.shape)
        assert capsys.readouterr().out.strip() == (
            f"f: not yet. f(3) is '{'x' * 75} ..., and trying that ends with AttributeError: 'str' "
            "object has no attribute 'shape'")

    def test_the_solution_steps_in_until_the_answer_of_the_student_is_right(
            self, course, solutions, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "solutions", solutions)
        assert course.use("wrap", None) is solutions.wrap
        assert capsys.readouterr().out == "wrap comes from solutions.py until yours is OK\n"
        course.check("wrap", len, [([1],)], len)
        assert course.use("wrap", len) is len

    def test_without_solutions_a_class_copy_stops_with_advice(self, course, monkeypatch):
        monkeypatch.setitem(sys.modules, "solutions", None)  # as where that file is not there
        with pytest.raises(course.NotYet) as stopped:
            course.use("wrap", None)
        assert stopped.value._render_traceback_() == [
            "The cells from here on need wrap: solve that exercise first."]

    def test_lines_of_code_are_counted_without_words(self, course):
        def three(x):
            """A docstring."""
            # A comment.

            y = (x +
                 1)
            return y

        assert course.count_lines(three) == 3


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
            "share: measured 0.1, you said 0.5",
            "letters: measured 250, you said 100",
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


class TestCopyForAClass:

    def test_it_has_no_outputs_and_no_solutions(self, folder, course):
        arguments = ["--student", "class", "--repo", "we/ours"]
        course.main(arguments)
        copies = sorted(Path("class/notebooks").glob("*.ipynb"))
        assert [path.name for path in copies] == [path.name for path in NOTEBOOKS]
        assert not list(Path("class").rglob("solutions.py"))
        for path in copies:
            assert not any(cell.get("outputs") for cell in read_notebook(path)["cells"])
            raw = path.read_text(encoding="utf-8")
            for word in ("olution: ", "solutions.py", "OWNER"):
                assert word not in raw
            assert raw.count("we/ours") == 3  # two badges and the set-up cell
            assert stubs(code_of(path)) == stubs(code_of(HERE / path.name))
        before = contents()
        course.main(arguments)
        assert contents() == before

    def test_it_is_not_written_where_it_cannot_be(self, folder, course, capsys):
        Path("file").write_text("")
        before = contents()
        for flags in (f"--student {ROOT}", "--student file", "--student new --repo http://a/b"):
            words = flags.split()
            with pytest.raises(SystemExit, match="2"):
                course.main(words)
            assert contents() == before
            assert f"error: {words[-2]} " in capsys.readouterr().err


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
        for path in ("rmt.py", "notebooks/course.py"):
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
            "There is a folder rmt-course without the course in it: delete or rename it\n")
