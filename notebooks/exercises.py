"""The checks of the exercises: what an answer must do, on inputs that no notebook shows.

A check never tells the right answer. It prints TODO, OK, or the first input on which the answer
fails, with what came out. In a notebook:

    check("pairs_seen", pairs_seen)

Each specification below is a function of the answer and of a random generator for further inputs.
It finds the truth in a slow or roundabout way: it counts, or measures on a model of rmt.py. The
solutions, each in a line or two, are in solutions.py.
"""
import copy
import inspect
import math
import random
import sys
from dataclasses import is_dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from course import (  # noqa: E402
    backward_at_cuts,
    gradient_reach,
    message,
    peak_kept,
    segments_back,
    small_model,
)

from rmt import RMT, VARIANTS, Config, Variant, unroll  # noqa: E402

VERDICTS = {}   # exercise: the latest verdict of its check
SOURCES = {}    # exercise: the source of the answer that was checked
EXERCISES = {}  # exercise: its specification, and what it means that the exercise is solved

# An answer that reads the truth instead of finding it, or rewrites its verdict, is refused.
FORBIDDEN = {"course", "exercises", "solutions", "teacher", "check", "EXERCISES", "VERDICTS", "sys",
             "importlib", "__import__", "eval", "exec", "globals", "open", "gc", "inspect"}


class NotYet(Exception):
    """What is wrong with an answer; in a notebook it is shown without a traceback."""

    def _render_traceback_(self):
        return [str(self)]


class Answer:
    """An answer while it is checked: call it like the function that it is.

    The call raises NotYet if the function fails, returns None, or changes what it was given. What
    `refuse` raises begins with this latest call.
    """

    def __init__(self, name, function):
        self.name = name
        self.function = function
        self.call = f"{name}()"
        self.n_calls = 0
        self.found = None

    def __call__(self, *arguments):
        self.n_calls += 1
        self.call = f"{self.name}({', '.join(map(shown, arguments))})"
        self.found = None
        given = [copied(argument) for argument in arguments]
        before = [fingerprint(argument) for argument in given]
        try:
            self.found = self.function(*given)
        except Exception as reason:
            self.refuse(f"ends with {in_one_line(reason)}")
        if self.found is None:
            self.refuse("is None")
        for old, argument in zip(before, given, strict=True):
            if not equal(old, fingerprint(argument)):
                self.refuse("changes what it was given: work on a copy")
        return self.found

    def refuse(self, complaint):
        """Stop with a complaint about the latest call."""
        raise NotYet(f"{self.call} {complaint}")

    def must_be(self, expected, *arguments):
        """Call it, and compare what comes out with what must."""
        complaint = difference(self(*arguments), expected)
        if complaint is not None:
            self.refuse(complaint)

    def must_have_shape(self, shape):
        """What came out must be a tensor of this shape, without nan or infinity."""
        complaint = shape_difference(self.found, shape)
        if complaint is not None:
            self.refuse(complaint)
        if not self.found.isfinite().all():
            self.refuse("holds nan or infinity")

    def must_be_a(self, kind):
        """What came out must be of this type."""
        if not isinstance(self.found, kind):
            self.refuse(f"must be of type {kind.__name__}, and is of type "
                        f"{type(self.found).__name__}")


def exercise(meaning):
    """Enter a specification, a function (answer, draw), in the table of exercises."""
    def enter(specification):
        EXERCISES[specification.__name__] = specification, meaning
        return specification
    return enter


def check(name, function):
    """Check an answer, and print the verdict."""
    VERDICTS[name] = verdict_on(name, function)
    try:
        SOURCES[name] = inspect.getsource(function)
    except (OSError, TypeError):
        SOURCES[name] = repr(function)
    print(f"{name}: {VERDICTS[name]}")


def verdict_on(name, function, seed=0):
    """TODO, OK, or not yet, with a reason. A seed draws other random inputs."""
    specification, meaning = EXERCISES[name]
    if not callable(function):
        return f"not yet. {name} must be a function, and is of type {type(function).__name__}"
    forbidden = sorted(names_in(function) & FORBIDDEN)
    if forbidden:
        return f"not yet. {name} uses {forbidden[0]}, which no answer needs"
    answer = Answer(name, function)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            specification(answer, random.Random(seed))
        except NotYet as complaint:
            if answer.n_calls == 1 and str(complaint).endswith(" is None"):
                return "TODO"
            return f"not yet. {complaint}"
        except Exception as reason:  # what came out is of a kind that the specification cannot use
            return (f"not yet. {answer.call} is {shown(answer.found)}, and trying that ends with "
                    f"{in_one_line(reason)}")
    return f"OK. {meaning}"


def names_in(function):
    """All names that the code of a function mentions, with the functions inside it."""
    names, codes = set(), [getattr(function, "__code__", None)]
    while codes:
        code = codes.pop()
        if code is not None:
            names.update(code.co_names)
            codes.extend(c for c in code.co_consts if inspect.iscode(c))
    return names


def use(name, function):
    """Your function if its check printed OK; otherwise the solution, so that you can continue."""
    if VERDICTS.get(name, "").startswith("OK"):
        return function
    try:
        import solutions
    except ImportError:
        advice = f"The cells from here on need {name}: solve that exercise first."
        raise NotYet(advice) from None
    print(f"{name} comes from solutions.py until yours is OK")
    return getattr(solutions, name)


# ==================================================================================================
# What a check compares and prints


def in_one_line(reason):
    """An exception in one line."""
    first_line = str(reason).split("\n")[0]
    return f"{type(reason).__name__}: {first_line}".removesuffix(": ")


def copied(value):
    """A copy of anything but a model."""
    if isinstance(value, torch.nn.Module):
        return value
    return copy.deepcopy(value)


def fingerprint(value):
    """What must not change while an answer has it."""
    if isinstance(value, torch.nn.Module):
        return {name: tensor.detach().clone() for name, tensor in value.state_dict().items()}
    return copied(value)


def equal(old, new):
    """Whether two fingerprints are the same."""
    if isinstance(old, torch.Tensor):
        return isinstance(new, torch.Tensor) and torch.equal(old, new)
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(equal(old[key], new[key]) for key in old)
    return old == new


def shown(value):
    """A value as a verdict shows it, in at most 80 characters."""
    if isinstance(value, torch.Tensor):
        if value.numel() <= 16:
            return str(rounded(value.tolist()))
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    if is_dataclass(value):
        return f"{type(value).__name__}(...)"
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:76]} ..."


def rounded(numbers):
    """Numbers, or lists of them, with three decimals at most."""
    if isinstance(numbers, list):
        return [rounded(number) for number in numbers]
    return round(numbers, 3) if isinstance(numbers, float) else numbers


def difference(found, expected):
    """What is wrong with an answer, in words that do not tell the right one; None if nothing is."""
    if isinstance(expected, torch.Tensor):
        return tensor_difference(found, expected)
    if isinstance(expected, bool):
        if not isinstance(found, bool):
            return f"must be True or False, and is of type {type(found).__name__}"
        return None if found == expected else f"gives {found}, which is wrong"
    if hasattr(found, "tolist"):  # a tensor or an array: its numbers
        one_number = math.prod(found.shape) == 1 and not isinstance(expected, list)
        found = found.item() if one_number else found.tolist()
    if isinstance(expected, list) and not isinstance(found, list):
        return f"must be a list, and is of type {type(found).__name__}"
    right = found == expected
    if isinstance(expected, (int, float)):
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            return f"must be a number, and is of type {type(found).__name__}"
        right = math.isclose(found, expected, rel_tol=1e-6)
    return None if right else f"gives {shown(found)}, which is wrong"


def shape_difference(found, shape):
    """Whether it is a tensor at all, and of this shape."""
    if not isinstance(found, torch.Tensor):
        return f"must be a tensor, and is of type {type(found).__name__}"
    if found.shape != shape:
        return f"must have the shape {tuple(shape)}, and has {tuple(found.shape)}"
    return None


def tensor_difference(found, expected):
    """The same as difference, for tensors."""
    complaint = shape_difference(found, expected.shape)
    if complaint is not None:
        return complaint
    truth_values = expected.dtype == torch.bool
    if truth_values != (found.dtype == torch.bool):
        kind = "True and False (torch.bool)" if truth_values else "numbers"
        return f"must hold {kind}, and holds {found.dtype}"
    if not expected.is_floating_point() and found.is_floating_point():
        return f"must hold whole numbers ({expected.dtype}), and holds {found.dtype}"
    wrong = ~torch.isclose(found.double(), expected.double(), rtol=1e-5, atol=1e-8)
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        return f"is wrong at {where}; {wrong.sum()} of {wrong.numel()} entries are wrong"
    return None


# ==================================================================================================
# 1 · Why memory?


@exercise("On pages of T letters the work grows like n T / 2, and no longer like n² / 2.")
def pairs_seen(answer, draw):
    for n, T in [(3, 4), (4, 4), (8, 4), (10, 4), (draw.randint(50, 150), draw.randint(2, 20))]:
        pairs = [(i, j) for i in range(n) for j in range(i + 1) if i // T == j // T]
        answer.must_be(len(pairs), n, T)


@torch.no_grad()
def answer_changes(letter, n, T, n_layer=2, window=None):
    """Whether replacing a letter of a message of n changes the output that must name it."""
    torch.manual_seed(0)
    model = RMT(Config("transformer", vocab_size=11, segment_len=T, n_layer=n_layer)).double()
    if window is not None:
        model.variant = model.variant._replace(mask="paper")  # the mask as a matrix, to edit it
        too_far = torch.ones(T, T).tril(-window - 1).bool()
        model.full_mask[too_far] = -torch.inf                 # added to the attention scores
    tokens, _ = message(n, generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, letter] = (changed[0, letter] + 1) % 10
    outputs, changed_outputs = unroll(model, tokens)[0], unroll(model, changed)[0]
    return not torch.equal(outputs[0, n + letter], changed_outputs[0, n + letter])


@exercise("Without memory, what can be answered depends on where the page borders happen to be.")
def answerable(answer, draw):
    sizes = [(2, 8), (3, 4), (4, 4), (6, 8), (12, 16), (5, 12)]
    for n, T in [*sizes, (draw.randint(5, 9), draw.randint(6, 14))]:
        answer.must_be([i for i in range(n) if answer_changes(i, n, T)], n, T)


@exercise("A window moves the border but does not remove it: L layers see L windows back.")
def window(answer, draw):
    for n, n_layer in [(4, 1), (4, 2), (5, 2), (12, 3), (7, 3), (draw.randint(6, 11), 4)]:
        wide_enough = (w for w in range(1, n + 1) if answer_changes(0, n, 2 * n, n_layer, w))
        answer.must_be(next(wide_enough), n, n_layer)


# ==================================================================================================
# 2 · Build it


@exercise("The Transformer now reads M + n + M rows, and cannot tell cards from letters.")
def wrap(answer, draw):
    sizes = [(1, 1, 2, 2), (2, 3, 5, 4), (3, draw.randint(2, 5), draw.randint(6, 9), 3)]
    for batch, M, n, D in sizes:
        memory, letters = torch.randn(batch, M, D), torch.randn(batch, n, D)
        if M == 1:
            memory, letters = torch.zeros(batch, M, D), torch.ones(batch, n, D)
        rows = []
        for i in range(M + n + M):
            rows.append(letters[:, i - M] if M <= i < M + n else memory[:, i % (M + n)])
        answer.must_be(torch.stack(rows, dim=1), memory, letters)


@exercise("Information flows from read to page to write, and never back.")
def mask(answer, draw):
    for M, n in [(1, 2), (2, 3), (4, 4), (draw.randint(2, 5), draw.randint(5, 9))]:
        kinds = ["read"] * M + ["letter"] * n + ["write"] * M
        allowed = torch.zeros(len(kinds), len(kinds), dtype=torch.bool)
        for i, looks in enumerate(kinds):
            for j, seen in enumerate(kinds):
                earlier_letter = looks == seen == "letter" and j <= i
                allowed[i, j] = looks == "write" or seen == "read" or earlier_letter
        answer.must_be(allowed, M, n)


class StepByStep(torch.nn.Module):
    """An RMT with the parts that the model of notebook 2 has: memory, T and step."""

    def __init__(self, T, M):
        super().__init__()
        self.rmt = RMT(Config("rmt", 11, segment_len=T, n_mem=M, d_model=16, n_head=2))
        self.memory = self.rmt.memory
        self.embed = self.rmt.embed
        self.T = T

    def step(self, page, memory):
        """Logits of a page, and the next cards."""
        if memory.dim() != 3 or len(memory) != len(page):
            raise ValueError(f"step needs cards (batch, M, D) for a batch of {len(page)}, and was "
                             f"given {tuple(memory.shape)}")
        before = self.rmt.initial_state(len(page))._replace(memory=memory)
        logits, after = self.rmt(page, before)
        return logits, after.memory


@exercise("The same weights read every page, and gradient flows back through the cards.")
def forward(answer, draw):
    for T, M, batch, length in [(4, 2, 1, 6), (4, 4, 2, 12), (3, 2, 2, draw.randint(10, 14))]:
        model, tokens = StepByStep(T, M), torch.randint(10, (batch, length))
        logits = answer(model, tokens)
        answer.must_have_shape((batch, length, 11))
        if not torch.allclose(logits, unroll(model.rmt, tokens)[0], atol=1e-6):
            answer.refuse("differs from the logits that reading page after page gives")
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(logits[:, -1].sum(), model.embed.weight)
        if not (logits.requires_grad and gradient[tokens[:, :T]].any()):
            answer.refuse("lets no gradient through from the last page to the first")


class Leak(torch.nn.Module):
    """A model whose output at one position depends a little on the letter at a later one."""

    def __init__(self, position, later):
        super().__init__()
        self.rmt = RMT(Config("rmt", 10, segment_len=4, n_mem=2, d_model=16, n_head=2)).double()
        self.position, self.later = position, later

    def forward(self, tokens):
        logits = unroll(self.rmt, tokens)[0].clone()
        if self.later is not None and self.later < tokens.size(1):
            logits[:, self.position, 0] += 1e-6 * tokens[:, self.later]
        return logits


@exercise("A serious code base has such a test. It needs no training, and sees what scores do not.")
def leaks(answer, draw):
    no_leak, one_step, across_pages, second_page, far = (
        Leak(0, None), Leak(2, 3), Leak(3, 4), Leak(5, 7), Leak(0, 7))
    drawn = [Leak(*sorted(draw.sample(range(8), 2))) for _ in range(3)]
    for model in (no_leak, one_step, across_pages, second_page, far, *drawn):
        found = answer(model)
        answer.must_be_a(bool)
        if model.later is None and found:
            answer.refuse("gives True, but this model does not leak")
        if model.later is not None and not found:
            answer.refuse(f"gives False, but letter {model.later} changes output {model.position}")


# ==================================================================================================
# 3 · Training through time


@exercise("Truncation cuts the pages into groups. It does not give each page its own window.")
def reach_by_hand(answer, draw):
    model = RMT(Config("rmt", 11, segment_len=4, n_mem=2, d_model=16, n_head=2)).double()
    reach = gradient_reach(model, torch.randint(11, (2, 24)), depth=2) > 0
    found = answer()
    lists = found.tolist() if isinstance(found, torch.Tensor) else found
    if not isinstance(lists, (list, tuple)) or len(lists) != 6:
        answer.refuse("must be six lists of six numbers")
    for s, (row, right) in enumerate(zip(lists, reach.int().tolist(), strict=True)):
        if not isinstance(row, (list, tuple)) or list(row) != right:
            answer.refuse(f"is wrong in list {s}, {shown(row)}")


@exercise("Logits cannot tell whether gradient is cut. Only a gradient can.")
def truncated(answer, draw):
    model = RMT(Config("rmt", 11, segment_len=4, n_mem=2, d_model=16, n_head=2)).double()

    def no_unroll(model, arguments):
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code is unroll.__code__:
                raise NotYet("calls unroll: write the loop yourself")
            frame = frame.f_back

    def read(model, tokens, depth):
        hook = model.register_forward_pre_hook(no_unroll)
        try:
            return answer(model, tokens, depth)
        finally:
            hook.remove()

    for n_pages, depth in [(6, 0), (6, 1), (6, 2), (6, 3), (6, 4), (draw.randint(7, 9), 2)]:
        tokens = torch.randint(11, (2, 4 * n_pages))
        expected = unroll(model, tokens)[0]
        logits = read(model, tokens, depth)
        answer.must_have_shape(expected.shape)
        if not torch.allclose(logits, expected):
            answer.refuse("differs from the logits without cuts, which must stay as they are")
        if not logits.requires_grad:
            answer.refuse("has the right logits, but no gradient at all")
        reach = gradient_reach(model, tokens, depth, read) > 0
        right = gradient_reach(model, tokens, depth) > 0
        for s, t in (reach != right).nonzero().tolist():
            does = "reaches" if reach[s, t] else "does not reach"
            answer.refuse(f"has the right logits, but the loss of page {s} {does} page {t}")
        first_page = read(model, tokens, depth)[:, :4]
        (gradient,) = torch.autograd.grad(first_page.sum(), model.memory, allow_unused=True)
        if gradient is None:
            answer.refuse("has the right logits, but a cut before page 0: the initial memory "
                          "gets no gradient")


@exercise("The depth decides how much is kept, but only if you call backward at every cut.")
def pages_kept(answer, draw):
    model = RMT(Config("rmt", 11, segment_len=4, n_mem=6))
    drawn = (draw.randint(5, 9), draw.randint(0, 3), True)
    cases = [(6, 2, True), (6, 2, False), (3, 0, True), (5, 7, True), (9, 1, False), drawn]
    one_page = peak_kept(model, unroll, model, torch.randint(10, (16, 4)))
    for pages, depth, at_cuts in cases:
        tokens = torch.randint(10, (16, 4 * pages))
        if at_cuts:
            kept = peak_kept(model, backward_at_cuts, model, tokens, depth)
        else:
            kept = peak_kept(model, unroll, model, tokens, None, depth)
        answer.must_be(round(kept / one_page), pages, depth, at_cuts)


@exercise("At depth 0 nothing teaches b what the earlier pages needed: that is what is cut off.")
def gradient_by_hand(answer, draw):
    drawn = [draw.uniform(-1, 1) for _ in range(5)]
    for a, b, x in [(0.5, 1.0, [1.0]), (0.5, 1.0, [1.0, 1.0]), (0.5, 2.0, [1.0, 2.0, 3.0]),
                    (draw.uniform(0.2, 0.9), draw.uniform(1, 2), drawn)]:
        for depth in range(len(x)):
            weight = torch.tensor(b, dtype=torch.float64, requires_grad=True)
            m = torch.zeros((), dtype=torch.float64)
            for page, letter in enumerate(x):
                if page > 0 and (len(x) - page) % (depth + 1) == 0:
                    m = m.detach()
                m = a * m + weight * letter
            m.backward()
            answer.must_be(weight.grad.item(), a, b, x, depth)


# ==================================================================================================
# 4 · Looking inside


@exercise("You can read her mind, and you admit it where you cannot.")
def decode(answer, draw):
    for n, width, places in [(4, 6, 3), (50, 6, 3), (draw.randint(5, 20), 9, 5)]:
        memory, W = torch.rand(n, width), torch.rand(width + 1, 10 * places) - 0.6
        scores = (F.pad(memory, (0, 1), value=1.0) @ W).unflatten(-1, (places, 10))
        rows = []
        for message_scores in scores.tolist():
            row = []
            for place in message_scores:
                best = max(range(10), key=place.__getitem__)
                row.append(best if place[best] > 0.5 else -1)
            rows.append(row)
        answer.must_be(torch.tensor(rows), memory, W)


@exercise("She uses only a part of what can be read.")
def needed_cards(answer, draw):
    small = torch.tensor([[0.25, 1.0], [1.0, 0.125]])
    harmless = torch.tensor([[0.5, 1.0], [1.0, 0.9375]])
    drawn = torch.rand(draw.randint(3, 6), draw.randint(4, 12)) ** 0.2  # most are close to 1
    for left in (small, harmless, drawn, drawn.clamp(min=0.92)):
        found = answer(left)
        if isinstance(found, torch.Tensor):
            found = found.tolist()
        if not isinstance(found, (list, tuple)) or len(found) != left.size(1):
            answer.refuse("must have one entry for each place")
        for place, (card, shares) in enumerate(zip(found, left.T.tolist(), strict=True), start=1):
            worst = shares.index(min(shares)) + 1
            if isinstance(card, bool) or card != (worst if min(shares) < 0.9 else 0):
                answer.refuse(f"is wrong at place {place}")


class MadeUpMemories:
    """Memories (B, 60) of messages of six letters, made as a sum of one vector per letter, and
    noise: as hers nearly are, but without any training."""

    def __init__(self):
        self.codes = torch.randn(6, 10, 60)
        self.centre = 3 * torch.randn(60)
        self.letters, self.memories = self.messages(3000)
        self.mean = self.memories.mean(0)
        means = []
        for place in range(6):
            for letter in range(10):
                means.append(self.memories[self.letters[:, place] == letter].mean(0))
        self.means = torch.stack(means).view(6, 10, 60)
        self.probe = fit(self.memories, self.letters)

    def messages(self, n):
        letters = torch.randint(10, (n, 6))
        memories = self.centre + self.codes[torch.arange(6), letters].sum(1)
        return letters, memories + 0.3 * torch.randn(n, 60)

    def read(self, memory):
        """What is on the cards, by a probe that was fitted to other messages."""
        return (F.pad(memory, (0, 1), value=1.0) @ self.probe).unflatten(-1, (6, 10)).argmax(-1)


def fit(memories, letters):
    """A linear probe by ridge regression, as in notebook 4."""
    X = F.pad(memories, (0, 1), value=1.0)
    Y = F.one_hot(letters, 10).flatten(1).float()
    return torch.linalg.solve(X.T @ X + torch.eye(X.size(1)), X.T @ Y)


@exercise("One letter is a direction in the space of memories, and not a card.")
def forge(answer, draw):
    made_up = MadeUpMemories()
    for place in (2, 5, draw.randrange(6)):
        letters, memory = made_up.messages(300)
        old = letters[:, place]
        new = (old + torch.randint(1, 10, old.shape)) % 10
        forged = answer(memory, made_up.means, place, old, new)
        answer.must_have_shape(memory.shape)
        same = (made_up.read(forged) == letters).float().mean(0)
        if (same.sum() - same[place]) / 5 < 0.95:
            answer.refuse("changes other letters, too")
        if (made_up.read(forged)[:, place] == new).float().mean() < 0.9:
            answer.refuse("seldom puts the new letter there")
        step = made_up.means[place, new] - made_up.means[place, old]
        size = ((forged - memory) * step).sum() / step.square().sum()
        if not 0.8 < size < 1.2:
            answer.refuse("goes further than a message with the new letter would" if size > 1
                          else "leaves a part of the old letter")


@exercise("A linear probe cannot read that letter any more, and all others are still there.")
def erase(answer, draw):
    made_up = MadeUpMemories()
    spread = made_up.memories.var(0).sum()
    for place in (2, 5, draw.randrange(6)):
        letters, memory = made_up.messages(2000)
        erased = answer(memory, made_up.means, made_up.mean, place)
        answer.must_have_shape(memory.shape)
        same = (made_up.read(erased) == letters).float().mean(0)
        if (same.sum() - same[place]) / 5 < 0.95:
            answer.refuse("erases other letters, too")
        probe = fit(erased[:1000], letters[:1000])  # a new probe, fitted to erased memories
        scores = (F.pad(erased[1000:], (0, 1), value=1.0) @ probe).unflatten(-1, (6, 10))
        readable = (scores.argmax(-1) == letters[1000:]).float().mean(0)
        if readable[place] > 0.25:
            answer.refuse("leaves something from which a new probe can tell the letter")
        if (erased.mean(0) - memory.mean(0)).square().sum() > 0.02 * spread:
            answer.refuse("moves the mean of all memories, which holds no letter")


# ==================================================================================================
# 5 · Language


@exercise("A model that guesses blindly among 256 characters needs 8 bits per character.")
def bits_per_character(answer, draw):
    for nats in (math.log(2), math.log(256), 1.5, draw.uniform(0.5, 5)):
        probability = math.exp(-nats)  # that the model gave to the character that came
        answer.must_be(math.log2(1 / probability), nats)


@exercise("Late memory is a memory of the right text. Run the next cell to see what it is worth.")
def late(answer, draw):
    for n_states in (4, draw.randint(5, 9)):
        change, another = answer(), answer()
        if not callable(change):
            answer.refuse("must return a function")
        states = [f"state {i}" for i in range(n_states)]
        passed_on = []
        for state in states:
            passed_on.append(change(state))
            another("a state of another text")
        if passed_on != [states[0], *states[:-1]]:
            answer.refuse(f"passes on {shown(passed_on)} for the states {shown(states)}")


# ==================================================================================================
# 6 · Relatives


@exercise("With beta = 1 the drawer holds the last value; drawers at right angles stay shut.")
def write(answer, draw):
    for D, K, beta in [(3, 2, 1.0), (3, 2, 0.5), (4, 6, 1.0), (4, 6, draw.uniform(0.1, 0.9))]:
        k = F.normalize(torch.randn(K, dtype=torch.float64), dim=0)
        v = torch.randn(D, dtype=torch.float64)
        for A in (torch.zeros(D, K, dtype=torch.float64), torch.randn(D, K, dtype=torch.float64)):
            found = answer(A, k, v, beta)
            answer.must_have_shape(A.shape)
            if not torch.allclose(found @ k - A @ k, beta * (v - A @ k)):
                empty = "empty" if not A.any() else "full"
                answer.refuse(f"reads the wrong value under the key just written (the cabinet was "
                              f"{empty}, beta {beta:.2g})")
            others = torch.linalg.svd(k[None])[2][1:].T  # all directions at right angles to k
            if not torch.allclose(found @ others, A @ others):
                answer.refuse("changes what is read under other keys")


@exercise("The reach grows with the layers, and it ends: what lies before is gone for good.")
def xl_segments(answer, draw):
    drawn = (draw.randint(1, 3), draw.randint(1, 4), draw.randint(2, 4))
    for sizes in [(1, 4, 4), (2, 4, 4), (2, 8, 4), (3, 2, 4), (2, 6, 4), (2, 5, 4), drawn]:
        answer.must_be(segments_back("transformer_xl", *sizes), *sizes)


@exercise("A long text takes few more steps than it has segments.")
def diagonal(answer, draw):
    for S, L in [(1, 1), (3, 1), (1, 2), (4, 2), (8, 4), (draw.randint(5, 12), draw.randint(3, 6))]:
        steps = answer(S, L)
        done = set()
        for step in steps:
            for layer, segment in step:
                if not (0 <= layer < L and 0 <= segment < S):
                    answer.refuse(f"runs {(layer, segment)}, which does not exist")
                if (layer, segment) in done:
                    answer.refuse(f"runs {(layer, segment)} twice")
                for needed in ((layer - 1, segment), (layer, segment - 1)):
                    if min(needed) >= 0 and needed not in done:
                        answer.refuse(f"runs {(layer, segment)} when {needed} is not done")
            done.update(step)
        if len(done) != S * L:
            answer.refuse(f"leaves out {S * L - len(done)} of {S * L} pairs")
        if len(steps) > S + L - 1:
            answer.refuse("takes more steps than it needs")


@exercise("A relative that is not in the table. Is it any better?")
def my_variant(answer, draw):
    row = answer()
    answer.must_be_a(Variant)
    if row in VARIANTS.values():
        answer.refuse("is in the table already")
    VARIANTS["mine"] = row
    try:
        try_contract(answer, small_model("mine", vocab_size=14))
    finally:
        del VARIANTS["mine"]


def try_contract(answer, model):
    """What every row of VARIANTS promises."""
    tokens = torch.randint(12, (2, 12))
    logits, end = unroll(model, tokens)
    _, middle = unroll(model, tokens[:, :8])
    carried = [tensor for layer in end.carry for tensor in layer]
    if not (end.memory.requires_grad and any(tensor.requires_grad for tensor in carried)):
        answer.refuse("does not pass on both memory and a carry with gradient")
    for t in range(1, 12):
        changed = tokens.clone()
        changed[:, t] = 13
        if (unroll(model, changed)[0][:, :t] != logits[:, :t]).any():
            answer.refuse(f"lets an output before token {t} see it")
    if any(len(tensor) != 2 for tensor in end.tensors()):
        answer.refuse("has a state whose first dimension is not the batch")
    if not torch.allclose(model(tokens[:, 8:], middle)[0], logits[:, 8:]):
        answer.refuse("remembers something that is not in its state")
    changed = tokens.clone()
    changed[:, :4] = 13
    _, other_end = unroll(model, changed)
    others = [tensor for layer in other_end.carry for tensor in layer]
    if torch.equal(other_end.memory, end.memory):
        answer.refuse("keeps nothing of the first segment on its cards")
    if all(map(torch.equal, carried, others)):
        answer.refuse("keeps nothing of the first segment in what its layers carry")
    (gradient,) = torch.autograd.grad(logits[:, -1].sum(), model.embed.weight)
    if not gradient[tokens[:, :4]].any():
        answer.refuse("lets no gradient reach the first segment")


# ==================================================================================================
# 7 · Limits


@exercise("Twelve letters out of ten are about 40 bits. A single float has 32.")
def bits(answer, draw):
    drawn = (draw.randint(3, 9), draw.randint(3, 30))
    for letters, symbols in [(1, 2), (3, 2), (1, 4), (2, 10), (4, 7), drawn]:
        n_messages = symbols ** letters
        answer.must_be(math.log2(n_messages), letters, symbols)


@exercise("With equal chances all letters are lost equally often. In her case some never are.")
def survives(answer, draw):
    drawn = (draw.uniform(0.01, 0.3), draw.randint(3, 30))
    for loss, pages in [(0.1, 1), (0.1, 2), (0.5, 3), (0.02, 64), (0.01, 1024), drawn]:
        border = torch.full((10, 10), loss / 9, dtype=torch.float64).fill_diagonal_(1 - loss)
        right = torch.linalg.matrix_power(border, pages)[0, 0].item()
        answer.must_be(right, loss, pages)


@exercise("A claim that you reject need not be false. It has not been shown.")
def accept(answer, draw):
    good = {"new": [0.97, 0.99, 0.98], "control": [0.66, 0.71, 0.6],
            "floats": (64, 64), "steps": (700, 700)}
    best = max(draw.uniform(0.3, 0.6) for _ in range(3))
    drawn = {"new": [0.98, best + 0.05, 0.9], "control": [0.2, best, 0.1, 0.25],
             "floats": (draw.randint(10, 60), 64), "steps": (500, draw.randint(500, 900))}
    supported = [good, good | {"floats": (64, 512)}, good | {"steps": (500, 700)},
                 good | {"new": [0.97] * 5}, drawn]
    flawed = [good | {"new": [0.99, 0.98]}, good | {"control": []},
              good | {"control": [0.6, 0.71]}, good | {"floats": (512, 64)},
              good | {"steps": (900, 700)}, good | {"new": [0.7, 0.99, 0.98]},
              good | {"new": [0.71, 0.9, 0.9]}, drawn | {"new": [0.99, best, 0.9]},
              drawn | {"floats": (65, 64)}, drawn | {"control": [best]}]
    for result in supported:
        answer.must_be(True, result)
    for result in flawed:
        answer.must_be(False, result)


def golf_score(model):
    """Parameters, and floats that cross a page border."""
    return sum(weight.numel() for weight in model.parameters()) + model.state_floats()


def golf_par():
    """The score to beat: eight cards of width 32."""
    config = Config("rmt", 11, segment_len=8, d_model=32, n_mem=8, write_slot="both")
    return golf_score(RMT(config))


@exercise("Small enough. Whether it is valid, three rounds of golf will show.")
def my_config(answer, draw):
    config = answer()
    answer.must_be_a(Config)
    model = RMT(config)
    if (config.vocab_size, config.segment_len) != (11, 8):
        answer.refuse(f"has {config.vocab_size} tokens on pages of {config.segment_len}, and the "
                      "course is played with 11 on pages of 8")
    if not model.variant.recurrent or model.variant.cache or model.variant.mask == "full":
        answer.refuse(f"is {config.variant!r}, and must read with cards alone, left to right")
    if golf_score(model) >= golf_par():
        answer.refuse(f"scores {golf_score(model):,}, and par is {golf_par():,}")
    if 32 * model.state_floats() < math.log2(10 ** 24):
        answer.refuse(f"passes on {model.state_floats()} floats of 32 bits, too few for the "
                      "message")


# ==================================================================================================
# 8 · Transplant


@exercise("Two rows of numbers for each card, however large the model is.")
def new_numbers(answer, draw):
    for M, D in [(1, 4), (8, 64), (3, 10), (draw.randint(2, 9), 2 * draw.randint(3, 20))]:
        sizes = []
        for variant in ("transformer", "rmt"):
            config = Config(variant, 11, n_mem=M, d_model=D, n_head=1, write_slot="embedding")
            sizes.append(sum(weight.numel() for weight in RMT(config).parameters()))
        answer.must_be(sizes[1] - sizes[0], M, D)


def reader(variant, M, D):
    """A small model with random weights."""
    return RMT(Config(variant, 20, segment_len=8, n_mem=M, d_model=D, n_head=2,
                      write_slot="embedding"))


@exercise("All weights of the old model are in the new one, and the cards are new.")
def transplant(answer, draw):
    for M, D in [(2, 16), (draw.randint(3, 6), 24)]:
        old = reader("transformer", M, D)
        config = reader("rmt", M, D).config
        new = answer(old, config)
        if new is old:
            answer.refuse("is the old model itself")
        answer.must_be_a(RMT)
        if new.config != config:
            answer.refuse("has another config than the one that was given")
        weights = new.state_dict()
        for name, weight in old.state_dict().items():
            if name in weights and not torch.equal(weight, weights[name]):
                answer.refuse(f"lacks the old model's {name}")
        storages = {weight.data_ptr() for weight in old.parameters()}
        if any(weight.data_ptr() in storages for weight in new.parameters()):
            answer.refuse("shares weights with the old model: training one would change the other")
        if not (new.memory.any() and new.write_embedding.any()):
            answer.refuse("has cards of zeros, which would remain equal to each other: keep the "
                          "random values")


@exercise("The cards learn, and nothing else. Run the next cell.")
def only_cards(answer, draw):
    for M, D, all_learn in [(2, 16, True), (draw.randint(3, 6), 24, False)]:
        model = reader("rmt", M, D).requires_grad_(all_learn)
        found = answer(model)
        answer.must_be_a(RMT)
        learning = {name for name, weight in found.named_parameters() if weight.requires_grad}
        if learning != {"memory", "write_embedding"}:
            answer.refuse(f"lets these learn: {', '.join(sorted(learning)) or 'nothing'}")
