"""Solutions of the exercises, and for each a wrong answer that its check must refuse.

A solution has the name of its exercise. NAME_wrong is an answer that many give at first, with what
is wrong about it, and SAYS[NAME] is what the check says of it. A copy for a class is written
without this file: python notebooks/course.py --student FOLDER

Some functions use names of their notebooks, and run there only.
"""
import math

import torch

SAYS = {}

# ==================================================================================================
# 1 · Why memory?


def pairs_seen(n, T):
    """Full pages of T letters, and one page of what is left over."""
    full, rest = divmod(n, T)
    return full * (T * (T + 1) // 2) + rest * (rest + 1) // 2


def pairs_seen_wrong(n, T):
    """Every letter looks at a whole page: but it does not see the letters after it."""
    return n * T


def answerable(n, T):
    """A letter and the output that must say it have to stand on one page."""
    return [i for i in range(n) if i // T == (n + i) // T]


def answerable_wrong(n, T):
    """All of the first page: but the page may have burnt before the answer begins."""
    return [i for i in range(n) if i < T]


def window(n, n_layer):
    """The output is n letters away, and each layer reaches one window further back."""
    return -(-n // n_layer)


def window_wrong(n, n_layer):
    """One layer has to reach all the way: but layers add up."""
    return n


SAYS.update({
    "pairs_seen": "not yet. pairs_seen(3, 4) is not 12",
    "answerable": "not yet. answerable(3, 4) is not [0, 1, 2]",
    "window": "not yet. window(4, 2) is not 4",
})

# ==================================================================================================
# 2 · Build it


def wrap(memory, letters):
    """The cards, the page, and the cards once more."""
    return torch.cat([memory, letters, memory], dim=1)


def wrap_wrong(memory, letters):
    """The cards once: there is nothing to write on."""
    return torch.cat([memory, letters], dim=1)


def mask(M, n):
    """The lower triangle, and the two blocks in which rows look ahead: read and write."""
    allowed = torch.ones(M + n + M, M + n + M).tril().bool()
    allowed[:M, :M] = True
    allowed[M + n:] = True
    return allowed


def mask_wrong(M, n):
    """The plain triangle: but read rows see each other, and so do write rows."""
    return torch.ones(M + n + M, M + n + M).tril().bool()


def forward(model, tokens):
    """The cards that a page leaves are those that the next page starts with."""
    memory = model.memory.expand(len(tokens), -1, -1)
    outputs = []
    for page in tokens.split(model.T, dim=1):
        logits, memory = model.step(page, memory)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


def forward_wrong(model, tokens):
    """The cards are detached between pages, to save memory: nothing teaches what to write."""
    memory = model.memory.expand(len(tokens), -1, -1)
    outputs = []
    for page in tokens.split(model.T, dim=1):
        logits, memory = model.step(page, memory.detach())
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


def leaks(model):
    """Change letter t; the outputs before t must not change at all."""
    tokens = torch.randint(10, (2, 8), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    for t in range(1, 8):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 10
        if not torch.equal(model(changed)[:, :t], before[:, :t]):
            return True
    return False


def leaks_wrong(model):
    """An untrained model that is right more often than by chance: but scores do not show leaks."""
    tokens = torch.randint(10, (100, 8), generator=torch.Generator().manual_seed(0))
    return bool((model(tokens)[:, :-1].argmax(-1) == tokens[:, 1:]).double().mean() > 0.2)


SAYS.update({
    "wrap": "not yet. wrap([[[0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]) must have the shape "
            "(1, 4, 2), and has (1, 3, 2)",
    "mask": "not yet. mask(1, 2) is wrong at [0, 1]; 1 of 16 entries are",
    "forward": "not yet. forward(MyRMT, [[0, 1, 2, 3, 4, 5]]) lets no gradient through from the "
               "last page to the first",
    "leaks": "not yet. leaks(ReadRowsPeek) is not False",
})


# ==================================================================================================
# 3 · Training through time


def reach_by_hand():
    """Depth 2 makes groups of three pages, and gradient goes back inside of a group only."""
    return [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]


def reach_by_hand_wrong():
    """Each page has a window of its own, two pages back: but all losses share the same cuts."""
    return [[int(0 <= s - t <= 2) for t in range(6)] for s in range(6)]


def truncated(model, tokens, depth):
    """Cut where the pages that are left fill whole groups of depth + 1, but never before page 0."""
    pages = tokens.split(model.config.segment_len, dim=1)
    state, outputs = model.initial_state(len(tokens)), []
    for s, page in enumerate(pages):
        if s > 0 and (len(pages) - s) % (depth + 1) == 0:
            state = state.detach()
        logits, state = model(page, state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


def truncated_wrong(model, tokens, depth):
    """Cuts counted from the start: but then the last page may reach fewer than depth pages back."""
    pages = tokens.split(model.config.segment_len, dim=1)
    state, outputs = model.initial_state(len(tokens)), []
    for s, page in enumerate(pages):
        if s > 0 and s % (depth + 1) == 0:
            state = state.detach()
        logits, state = model(page, state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


def pages_kept(pages, depth, backward_at_cuts):
    """With backward at every cut, a group of depth + 1 pages or the whole text; else all."""
    return min(pages, depth + 1) if backward_at_cuts else pages


def pages_kept_wrong(pages, depth, backward_at_cuts):
    """A group of depth pages: but depth counts the borders, and a group has one page more."""
    return min(pages, depth) if backward_at_cuts else pages


SAYS.update({
    "reach_by_hand": "not yet. reach_by_hand() is wrong in list 3, [0, 1, 1, 1, 0, 0]",
    "truncated": "not yet. truncated(RMT, a tensor (2, 24), 3) has the right logits, but the loss "
                 "of page 2 reaches page 0",
    "pages_kept": "not yet. pages_kept(6, 2, True) is not 2",
})

# ==================================================================================================
# 4 · Looking inside


def decode(memory, W):
    """The best of the ten scores of each place, and -1 where it is not above one half."""
    # Targets are 0 or 1, so a score near 1 is a letter that the probe finds; all ten are near 0.1
    # where it finds none.
    X = torch.nn.functional.pad(memory, (0, 1), value=1.0)
    best = (X @ W).unflatten(-1, (-1, 10)).max(-1)
    return torch.where(best.values > 0.5, best.indices, -1)


def decode_wrong(memory, W):
    """The best score without a look at its size: but the best of ten small scores says nothing."""
    X = torch.nn.functional.pad(memory, (0, 1), value=1.0)
    return (X @ W).unflatten(-1, (-1, 10)).argmax(-1)


def needed_cards(left):
    """For each place the card, from 1, whose loss hurts most; 0 where none brings it below 0.9."""
    # A column of left is one place: its smallest entry is the worst lesion.
    return [int(column.argmin()) + 1 if column.min() < 0.9 else 0 for column in left.T]


def needed_cards_wrong(left):
    """The worst card of each place: but the worst of six that do no harm is not needed."""
    return [int(column.argmin()) + 1 for column in left.T]


def forge(memory, means, place, old, new):
    """A memory is a sum, so one summand goes and another one comes."""
    # (mean of new - mean of all) comes, (mean of old - mean of all) goes: the mean of all cancels.
    return memory + means[place, new] - means[place, old]


def forge_wrong(memory, means, place, old, new):
    """The card that the letter needs, from a message with the new one: but others share it."""
    cards = memory.view(-1, 6, 64).clone()
    card = left[:, place].argmin()  # noqa: F821
    donors = torch.stack([(old == letter).nonzero()[0, 0] for letter in new])
    cards[:, card] = memory.view(-1, 6, 64)[donors, card]
    return cards.flatten(1)


def erase(memory, place):
    """What goes is the part of memory - mean along which the letters of this place differ."""
    # Ten means that add up to ten times the mean of all, nearly: their differences span nine
    # directions. Without them, all ten letters lead to the same place.
    Q = torch.linalg.qr((means[place] - mean).T)[0][:, :9]  # noqa: F821
    return memory - (memory - mean) @ Q @ Q.T  # noqa: F821


def erase_wrong(memory, place):
    """The ten means taken as directions: but they hold what all memories share, too."""
    Q = torch.linalg.qr(means[place].T)[0]  # noqa: F821
    return memory - memory @ Q @ Q.T


SAYS.update({
    "decode": "not yet. decode(a tensor (4, 6), a tensor (7, 30)) is wrong at [0, 0]; 7 of 12 "
              "entries are",
    "needed_cards": "not yet. needed_cards([[0.5, 1.0], [1.0, 0.9375]]) is wrong at place 2",
    "forge": "not yet. forge(a tensor (200, 384), a tensor (12, 10, 384), 5, a tensor (200,), "
             "a tensor (200,)) makes her say other letters than before, at other places too",
    "erase": "not yet. erase(a tensor (200, 384), 5) makes her forget other letters too",
})


# ==================================================================================================
# 5 · Language


def bits_per_character(nats):
    """Another base of the same logarithm."""
    return nats / math.log(2)


def bits_per_character_wrong(nats):
    """The logarithm of the loss: but the loss is a logarithm already."""
    return math.log2(nats)


def late():
    """Remember all states, and hand on the last but one."""
    seen = []

    def change(state):
        seen.append(state)
        return seen[max(0, len(seen) - 2)]
    return change


def late_wrong():
    """Hand on the first state for ever: that is a frozen memory, not a late one."""
    seen = []

    def change(state):
        seen.append(state)
        return seen[0]
    return change


SAYS.update({
    "bits_per_character": "not yet. bits_per_character(0.6931471805599453) is not "
                          "-0.5287663729448977",
    "late": "not yet. late() hands on ['a', 'a', 'a', 'a'] for the states a, b, c, d",
})
