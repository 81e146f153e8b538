"""The tasks of train_copy.py.

A task is a function of (args, segments, batch, generator) that returns tokens (B, length + 1), and n, the length of the
answer at their end. The model reads tokens[:, :-1], and its last n outputs are scored. In the examples --segment-len is
4 unless they say otherwise; a dot is an output that is not scored.

Most tasks share one vocabulary: symbols 0 .. symbols - 1, then | a mark, ? a question, _ a blank, and what the task
adds to it: 16 noise tokens, written as small letters, or --keys keys. Samples that can be long take two bytes a token.
"""
import math
import random
from collections.abc import Callable
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F


def special(args, token):
    """The id of | ? _ or of a, the first token that a task adds."""
    return args.symbols + "|?_a".index(token)


def copy(args, segments, batch, generator):
    """A source, and then the source twice [RMT].

        input    3 1 4 1   | 3 1 4   1 3 1 4
        target   . . . .   3 1 4 1   3 1 4 1
    """
    source = torch.randint(args.symbols, (batch, segments // 3 * args.segment_len), generator=generator)
    return torch.cat([source, torch.full((batch, 1), special(args, "|")), source, source], dim=1), 2 * source.size(1)


def reverse(args, segments, batch, generator):
    """A source, and then the source backwards [RMT].

        input    3 1 4 1   | 1 4 1
        target   . . . .   1 4 1 3
    """
    source = torch.randint(args.symbols, (batch, segments // 2 * args.segment_len), generator=generator)
    return torch.cat([source, torch.full((batch, 1), special(args, "|")), source.flip(1)], dim=1), source.size(1)


def retrieval(args, segments, batch, generator):
    """A key and its value in each segment, no key twice, and one key asked for; keys are symbols too [RMT].

        input    7 | 2 |   5 | 9 |   7 ?
        target   . . . .   . . . .   . 2
    """
    return pairs(args, distinct(args.symbols, segments - 1, batch, generator), generator, marked=True)


def remember(args, segments, batch, generator):
    """A key and its value in each segment, no key twice, and one key that comes again [ARMT], without marks.

        input    k7 2   k1 9   k7        (--segment-len 2)
        target    . .    . .    2
    """
    return pairs(args, special(args, "a") + distinct(args.keys, segments - 1, batch, generator), generator)


def rewrite(args, segments, batch, generator):
    """As remember, but keys get new values, and the last value counts [ARMT].

        input    k7 2   k1 9   k7 5   k7        (--segment-len 2)
        target    . .    . .    . .    5
    """
    keys = torch.randint(args.keys, (batch, segments - 1), generator=generator, dtype=torch.int16)
    return pairs(args, special(args, "a") + keys, generator)


def distinct(n_keys, n, batch, generator):
    """n of the keys 0 .. n_keys - 1, none twice: (B, n)."""
    return torch.rand(batch, n_keys, generator=generator).argsort(dim=1)[:, :n].short()


def pairs(args, keys, generator, marked=False):
    """One of keys (B, pairs) and its value in each segment, then a key that was there; | and ? between, if marked."""
    (batch, n_pairs), n, some = keys.shape, args.segment_len - 1 - 2 * marked, torch.arange(len(keys))
    values = torch.randint(args.symbols, (batch, n_pairs, n), generator=generator, dtype=torch.int16)
    asked = keys[some, torch.randint(n_pairs, (batch,), generator=generator)][:, None]
    last = n_pairs - 1 - (keys == asked).flip(1).byte().argmax(dim=1)
    mark = torch.full((batch, n_pairs, int(marked)), special(args, "|"), dtype=torch.int16)
    question = torch.full((batch, int(marked)), special(args, "?"), dtype=torch.int16)
    body = torch.cat([keys[..., None], mark, values, mark], dim=2).flatten(1)
    return torch.cat([body, asked, question, values[some, last]], dim=1), n


def memorize(args, segments, batch, generator, where=0):
    """A fact in the first segment, noise, and a question at the end [RMT-1M].

        input    | 3 1 a   b c d e   ? 3
        target   . . . .   . . . .   3 1
    """
    T, n, noise = args.segment_len, args.segment_len // 2, special(args, "a")
    tokens = torch.randint(noise, noise + 16, (batch, (segments - 1) * T + 1 + n), generator=generator,
                           dtype=torch.int16)
    fact = torch.randint(args.symbols, (batch, n), generator=generator, dtype=torch.int16)
    place = (where * T + torch.arange(1 + n)).expand(batch, -1)
    tokens.scatter_(1, place, F.pad(fact, (1, 0), value=special(args, "|")))
    tokens[:, -n - 1:] = F.pad(fact, (1, 0), value=special(args, "?"))
    return tokens, n


def detect(args, segments, batch, generator):
    """As memorize, with the fact in a random segment [RMT-1M].

        input    a b c d   | 3 1 e   ? 3
        target   . . . .   . . . .   3 1
    """
    where = torch.randint(segments - 1, (batch, 1), generator=generator)
    return memorize(args, segments, batch, generator, where)


# ------------------------------------------------------------------------------------------------ facts hidden in noise

PEOPLE, OBJECTS = "mary john sandra daniel".split(), "apple football milk book".split()
PLACES = "kitchen garden office bathroom hallway bedroom".split()
SIDES = "north south east west".split()
NOISE = ["the".split(), "old quiet green narrow".split(), "river road wind stone".split(),
         "follows crosses meets leaves".split(), "hills fields clouds trees".split(), ".".split()]  # one of each
WORDS = list(dict.fromkeys([*PEOPLE, *OBJECTS, *PLACES, *SIDES, *chain(*NOISE),
                            *"went to took dropped there is where what of _".split()]))


def one_fact(rng, n):
    """People move. Where somebody is depends on one fact, the last move."""
    at, facts = {}, []
    for _ in range(n):
        person, place = rng.choice(PEOPLE), rng.choice(PLACES)
        at[person] = place
        facts.append(f"{person} went to the {place} .")
    person = rng.choice(list(at))
    return facts, f"where is {person}", at[person]


def two_facts(rng, n):
    """People move, take objects and drop them. Where an object is depends on a move, and on who took or dropped it."""
    at, holder, lies, facts = {}, {}, {}, []
    for i in range(n):
        person = rng.choice(list(at) if i % 2 else PEOPLE)
        held = [thing for thing in OBJECTS if holder.get(thing) == person]
        free = [thing for thing in OBJECTS if thing not in holder and lies.get(thing, at.get(person)) == at.get(person)]
        if i % 2 and held and rng.random() < 0.3:
            del holder[held[0]]
            lies[held[0]] = at[person]
            facts.append(f"{person} dropped the {held[0]} there .")
        elif i % 2 and free:
            thing = rng.choice(free)
            holder[thing] = person
            lies.pop(thing, None)
            facts.append(f"{person} took the {thing} there .")
        else:
            at[person] = rng.choice(PLACES)
            facts.append(f"{person} went to the {at[person]} .")
    thing = rng.choice([*holder, *lies])
    return facts, f"where is the {thing}", at[holder[thing]] if thing in holder else lies[thing]


def relations(rng, n):
    """Places lie in a chain around each other. A question gives the relation and one of its two places."""
    places = rng.sample(PLACES, min(n + 1, len(PLACES)))
    links = [(a, rng.choice(SIDES), b) for a, b in pairwise(places)]
    (a, side, b), told = rng.choice(links), rng.sample(links, len(links))
    question, answer = rng.choice([(f"what is {side} of {b}", a), (f"{a} is {side} of what", b)])
    return [f"{a} is {side} of {b} ." for a, side, b in told], question, answer


KINDS = {"one": one_fact, "two": two_facts, "relations": relations}


def facts(args, segments, batch, generator):
    """Sentences of a small world scattered in noise, six tokens each, and a question, in the manner of bAbI [BABI].

        input    mary went to the office .   the old river meets trees .   where is mary     (--segment-len 6)
        target   .    .    .  .   .      .   .   .   .     .     .     .   .     .  office
    """
    rng = random.Random(torch.randint(2**62, (), generator=generator).item())
    n_sentences, ends = (segments - 1) * args.segment_len // 6, []
    noise = [ids(words)[torch.randint(len(words), (batch, n_sentences), generator=generator)] for words in NOISE]
    body = torch.stack(noise, dim=2)
    for sample in body:
        told, question, answer = KINDS[args.facts](rng, rng.randint(min(2, n_sentences), min(6, n_sentences)))
        for place, sentence in zip(sorted(rng.sample(range(n_sentences), len(told))), told, strict=True):
            sample[place] = ids(sentence.split())
        ends.append(ids([*question.split(), answer]))
    return torch.cat([body.flatten(1), torch.stack(ends)], dim=1), 1


def ids(words):
    """Words of facts as tokens."""
    return torch.tensor([WORDS.index(word) for word in words], dtype=torch.int16)


# -------------------------------------------------------------------------------------------------- quadratic equations

CHARACTERS = "0123456789+-*/^=,()xDnoe_"


def quadratic(args, segments, batch, generator):
    """An equation, its monic form, its discriminant, both roots and the answer [RMT], six fields of 30 characters.

        input    -4*x^2+392*x-2208=0__  x^2-98*x+552=0_______ ... (the other fields)         (--segment-len 30)
        target   ....................x  ^2-98*x+552=0_______D ... D=7396 x=(98-86)/2=6 x=(98+86)/2=92 6,92
    """
    rng, rows = random.Random(torch.randint(2**62, (), generator=generator).item()), []
    for _ in range(batch):
        a, (r, s) = rng.choice([n for n in range(-10, 11) if n]), sorted(rng.choices(range(-100, 101), k=2))
        p, q = -(r + s), r * s
        if rng.random() < 0.2:  # no real roots
            q = rng.randint(p * p // 4 + 1, p * p // 4 + 10000)
        D = p * p - 4 * q
        root = math.isqrt(max(D, 0))
        ends = [f"x=({-p}-{root})/2={r}", f"x=({-p}+{root})/2={s}", f"{r},{s}"] if D >= 0 else ["none"] * 3
        fields = [f"{a}*x^2{a * p:+}*x{a * q:+}=0", f"x^2{p:+}*x{q:+}=0", f"D={D}", *ends]
        rows.append([CHARACTERS.index(c) for field in fields for c in field.ljust(30, "_")])
    return torch.tensor(rows, dtype=torch.int16), 150


# ------------------------------------------------------------------------------------------------------------ the table

class Task(NamedTuple):
    """What train_copy.py knows of a task."""

    sample: Callable                                    # the function above
    chance: Callable = lambda args: 1 / args.symbols    # the share that a guess gets right
    adds: str = ""                                      # to the symbols: "noise" or "keys"
    multiple: int = 1                                   # its number of segments is a multiple of this
    least: int = 2                                      # the shortest segment
    keys: str = ""                                      # the flag with the number of its keys, where none comes twice


TASKS = {
    "copy": Task(copy, multiple=3), "reverse": Task(reverse, multiple=2),
    "retrieval": Task(retrieval, least=4, keys="symbols"),
    "remember": Task(remember, adds="keys", keys="keys"), "rewrite": Task(rewrite, adds="keys"),
    "memorize": Task(memorize, adds="noise"), "detect": Task(detect, adds="noise"),
    "facts": Task(facts, lambda args: 1 / (len(PLACES) - (args.facts == "relations")), least=6),
    "quadratic": Task(quadratic, lambda args: 0.65, multiple=6, least=30)}  # which is the share of padding


def vocabulary(args):
    """The tokens of a task as strings."""
    if args.task == "facts":
        return WORDS
    if args.task == "quadratic":
        return list(CHARACTERS)
    symbols = [*"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"] * (1 + args.symbols // 36)
    adds = {"": [], "noise": [*"abcdefghijklmnop"], "keys": [f"k{i}" for i in range(args.keys)]}
    return [*symbols[:args.symbols], *"|?_", *adds[TASKS[args.task].adds]]


def text(args, row, wrong=None):
    """Tokens (length,) as a line of text, or the carets that go below it, for those that are wrong."""
    words = vocabulary(args)
    line = [words[token] for token in row.tolist()]
    if wrong is not None:
        line = [" ^"[int(is_wrong)] * len(word) for word, is_wrong in zip(line, wrong, strict=True)]
    return ("" if max(map(len, words)) == 1 else " ").join(line)


def longest(args):
    """The most segments that a sample can have."""
    keys = TASKS[args.task].keys
    return 6 if args.task == "quadratic" else getattr(args, keys) + 1 if keys else 10**9


def check(args):
    """Raise ValueError with one line that says which size does not fit the task."""
    task = TASKS[args.task]
    if args.curriculum not in ("grow", "random", "fixed"):
        raise ValueError(f"--curriculum {args.curriculum} must be grow, random or fixed")
    if args.facts not in KINDS:
        raise ValueError(f"--facts {args.facts} must be {', '.join(KINDS)}")
    if len(vocabulary(args)) > 2**15:
        raise ValueError(f"--symbols {args.symbols} and --keys {args.keys} must be at most {2**15 - 3} together")
    if args.segment_len < task.least:
        raise ValueError(f"--segment-len {args.segment_len} must be at least {task.least} for --task {args.task}")
    if args.task == "facts" and (args.segment_len % 6 or (args.facts == "two" and args.segment_len == 6)):
        raise ValueError(f"--segment-len {args.segment_len} must be a multiple of 6, a sentence, and at least 12 for "
                         "--facts two")
    for n in (args.segments, *args.eval_segments):
        if n % task.multiple or n < 2:
            raise ValueError(f"{n} segments must be at least 2 and a multiple of {task.multiple} for --task "
                             f"{args.task}")
        if args.task == "quadratic" and (n, args.segment_len) != (6, 30):
            raise ValueError(f"{n} segments of {args.segment_len} must be 6 of 30 for --task quadratic")
        if n > longest(args):
            raise ValueError(f"--{task.keys} {getattr(args, task.keys)} must be at least {n - 1}, a key for each pair "
                             f"of {n} segments")
