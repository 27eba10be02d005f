"""
The tasks of experiments/recall.py: sequences of letters, drawn anew each time, and filler (^ start,
. filler, | separator). The answers are underlined:

    copy       ^ c a f b . . . . . . . . . | c a f b    repeat the letters
                                             = = = =
    binding    ^ c a f b e d . . . . . . . | f b        look up the second letter of a pair
                                               =

All letters of a sequence differ. A network learns both together. Training asks for all pairs, in
random order, a test for one. There are 4 to 8 letters, or 3 to 6 pairs, at any length: only the
distance to them grows.

In a harder look-up (--hard) a letter is found by two others, which both have to match:

    match      ^ . c b z . . c a x . . d b y . d a w . | c a x
                                                             =
    crowd      ^ . c g v h a u c a x f a e c s k c r t | c a x
                                                             =

Match has three first and three second letters (two in the picture) in all combinations, each with a
third letter of its own: two others share the first letter of the question and two the second. In
training there are one to three first and second letters. A test asks for one triple, which stands
anywhere, training for up to three. In a crowd, which occurs only in tests, the whole sequence is
filled with triples that share one of the two letters of the question: their number grows with the
length.

Shapes: B sequences of T tokens.
"""
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch

LETTERS = 32
FILLER, SEPARATOR, START = range(LETTERS, LETTERS + 3)
VOCAB_SIZE = START + 1
COPIED, BOUND = range(4, 9), range(3, 7)  # how many letters are copied, how many pairs there are
SIDE, ASKED = 3, 3  # match: up to SIDE first and second letters; triples asked for in training


def generator_for(*numbers):
    """-> a random generator that depends on these numbers alone: the same for every encoding."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(seed)


def choose(options, generator):
    return options[torch.randint(len(options), (), generator=generator)]


def distinct(size, count, generator):
    """-> `count` different letters in random order, for each of `size` sequences (B, count)."""
    return torch.rand(size, LETTERS, generator=generator).argsort(dim=1)[:, :count]


def pick(rows, index):
    """rows (B, n, ...), index (B, m) -> the chosen ones of each row (B, m, ...)."""
    return rows[torch.arange(len(rows))[:, None], index]


def with_targets(tokens, answers):
    """Tokens (B, length + 1) and the positions of the answers -> inputs, targets (B, length)."""
    targets = torch.full_like(tokens, -1)
    targets[:, answers] = tokens[:, answers]
    return tokens[:, :-1], targets[:, 1:]


def copy_task(size, length, generator):
    """-> tokens, targets (B, length); the answers are the last 4 to 8 tokens."""
    count = choose(COPIED, generator)
    letters = distinct(size, count, generator)
    tokens = torch.full((size, length + 1), FILLER)
    tokens[:, 0], tokens[:, length - count] = START, SEPARATOR
    tokens[:, 1:count + 1] = tokens[:, length - count + 1:] = letters
    return with_targets(tokens, range(length - count + 1, length + 1))


def binding_task(size, length, generator, testing=False):
    """-> tokens, targets (B, length); all pairs, in tests one, are asked for in random order."""
    count = choose(BOUND, generator)
    pairs = distinct(size, 2 * count, generator).view(size, count, 2)
    order = torch.rand(size, count, generator=generator).argsort(dim=1)
    asked = pick(pairs, order[:, :1] if testing else order).flatten(1)  # (B, 2 n_asked)
    tokens = torch.full((size, length + 1), FILLER)
    question = length + 1 - asked.size(1)  # position of the first one
    tokens[:, 0], tokens[:, question - 1] = START, SEPARATOR
    tokens[:, 1:2 * count + 1] = pairs.flatten(1)
    tokens[:, question:] = asked
    return with_targets(tokens, range(question + 1, length + 1, 2))


def grid(size, n_first, n_second, generator):
    """-> a triple for each first and second letter, in random order (B, n, 3), and the letters that
    are left over (B, m)."""
    n, letters = n_first * n_second, distinct(size, LETTERS, generator)
    first, second, third, others = letters.tensor_split(
        [n_first, n_first + n_second, n_first + n_second + n], dim=1)
    triples = torch.stack([first.repeat_interleave(n_second, 1), second.repeat(1, n_first), third],
                          dim=2)
    return pick(triples, torch.rand(size, n, generator=generator).argsort(dim=1)), others


def scattered(n, room, generator):
    """-> where n triples start if they stand at random places in `room` tokens (n,)."""
    places = torch.randperm(room - 2 * n, generator=generator)[:n]  # as if each were one token long
    return places.sort().values + 2 * torch.arange(n)


def half_matches(asked, others, count, generator):
    """asked (B, 3), letters (B, m) -> triples that share its first letter or its second, in turns
    (B, count, 3)."""
    choice = torch.randint(others.size(1), (len(asked), 3 * count), generator=generator)
    triples = pick(others, choice).unflatten(1, (count, 3))
    triples[:, ::2, 0], triples[:, 1::2, 1] = asked[:, :1], asked[:, 1:2]
    return triples


def match_task(size, length, generator, testing=False, crowd=False):
    """-> tokens, targets (B, length); up to ASKED triples, in tests one, are asked for in random
    order."""
    n_first = n_second = SIDE
    if not testing:
        n_first, n_second = torch.randint(1, SIDE + 1, (2,), generator=generator).tolist()
    triples, others = grid(size, n_first, n_second, generator)
    order = torch.rand(triples.shape[:2], generator=generator).argsort(dim=1)
    asked = pick(triples, order[:, :1 if testing else ASKED])  # (B, n_asked, 3)
    question = length + 1 - 3 * asked.size(1)  # position of the first one
    if crowd:
        count = (question - 2) // 3  # all that there is room for
        distractors = half_matches(asked[:, 0], others, count - 1, generator)
        triples = torch.cat([asked, distractors], dim=1)
        triples = triples[:, torch.randperm(count, generator=generator)]
        starts = torch.arange(question - 1 - 3 * count, question - 1, 3)
    else:
        starts = 1 + scattered(triples.size(1), question - 2, generator)
    tokens = torch.full((size, length + 1), FILLER)
    tokens[:, 0], tokens[:, question - 1] = START, SEPARATOR
    tokens[:, question:] = asked.flatten(1)
    for i in range(3):
        tokens[:, starts + i] = triples[:, :, i]
    return with_targets(tokens, range(question + 2, length + 1, 3))


# --- What a network learns and how it is tested ---------------------------------------------------


@dataclass
class Tasks:
    trained: tuple  # together, each with an equal share of the batch
    tested: dict  # name -> the task as tested, and the accuracy of the best guess, None if unknown
    shortest: int  # an even length with room for all of them


# The best guess knows which letters can be the answer, but not which one is: for copy those not
# given yet, for binding the second letters of all pairs, for match the third ones of the SIDE
# triples that share a letter with the question.
EASY = Tasks((copy_task, binding_task), {
    "copy": (copy_task, fmean(sum(1 / i for i in range(1, n + 1)) / n for n in COPIED)),
    "binding": (partial(binding_task, testing=True), fmean(1 / n for n in BOUND)),
}, shortest=2 + 4 * max(BOUND))
HARD = Tasks((match_task,), {
    "match": (partial(match_task, testing=True), 1 / SIDE),
    "crowd": (partial(match_task, testing=True, crowd=True), None),
}, shortest=2 + 3 * (SIDE * SIDE + ASKED))
