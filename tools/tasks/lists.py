"""Lists of numbers and words: sorting, turning round, the largest, the one at a place."""

from __future__ import annotations

import random

from .example import Example, asked, wordings
from .strings import ORDINALS
from .words import NOUNS

SORTED_NUMBERS = (3, 7)
SORTED_WORDS = (3, 6)

SORT_LONG_LENGTHS = {1: 8, 2: 12, 3: 16, 4: 24, 5: 32, 6: 48, 7: 64}
"""Numbers to sort, by level."""
SORT_LONG_TRAINED = (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7)
SORT_LONGER = 62, 74
"""Numbers to sort, around the end of what is trained."""

_SORT_UP = wordings(
    "Sort: {items}",
    "Sort {items}.",
    "Sort these numbers: {items}",
    "Sort from small to large: {items}",
    "Put in order: {items}",
    "Sort {items} in ascending order.",
    "Put these numbers in order: {items}",
)
_SORT_DOWN = wordings(
    "Sort from large to small: {items}",
    "Sort {items} in descending order.",
    "Sort these numbers, largest first: {items}",
    "Put in descending order: {items}",
)
_SORT_WORDS = wordings(
    "Sort the words {items}.",
    "Sort the words {items} alphabetically.",
    "Sort alphabetically the words {items}.",
    "Put the words {items} in alphabetical order.",
    "What is the alphabetical order of {items}?",
)
_SORT_WORDS_DOWN = wordings(
    "Sort the words {items} from z to a.",
    "Sort the words {items} in reverse alphabetical order.",
)
_TURN = wordings(
    "Reverse the list {items}.",
    "Reverse the order of {items}.",
    "Turn round the list {items}.",
    "Write {items} in reverse order.",
)
_EXTREMES = {
    "largest": wordings(
        "Which is the largest of {items}?",
        "What is the largest number in {items}?",
        "Find the largest: {items}",
        "What is the maximum of {items}?",
        "Which number is the biggest: {items}?",
    ),
    "smallest": wordings(
        "Which is the smallest of {items}?",
        "What is the smallest number in {items}?",
        "Find the smallest: {items}",
        "What is the minimum of {items}?",
    ),
    "second largest": wordings(
        "Which is the second largest of {items}?", "What is the second largest number in {items}?"
    ),
}
_PLACE = wordings(
    "What is the {which} item of {items}?",
    "Which is the {which} in the list {items}?",
    "What comes {which} in {items}?",
    "Tell me the {which} item of the list {items}.",
)


def _numbers(rng: random.Random, count: int) -> list[int]:
    most = rng.choice((20, 99, 99, 999, 999))
    return [rng.randint(0, most) for _ in range(count)]


def _joined(rng: random.Random, items: list[int]) -> tuple[str, str]:
    """The items as someone writes them, and what stands between them."""
    between = " " if rng.random() < 0.25 else ", "
    return between.join(map(str, items)), between


def sort_numbers(rng: random.Random) -> Example:
    return _sort_numbers(rng, "sort_numbers", rng.randint(*SORTED_NUMBERS), 0)


def sort_long(rng: random.Random) -> Example:
    level = rng.choice(SORT_LONG_TRAINED)
    return _sort_numbers(rng, "sort_long", SORT_LONG_LENGTHS[level], level)


def sort_longer(rng: random.Random) -> Example:
    return _sort_numbers(rng, "sort_longer", rng.randint(*SORT_LONGER), 1)


def _sort_numbers(rng: random.Random, task: str, count: int, level: int) -> Example:
    numbers = _numbers(rng, count) if level == 0 else [rng.randint(0, 999) for _ in range(count)]
    ordered = sorted(numbers)
    key = f"sort {ordered}"  # in whatever order they were given, and up or down
    down = rng.random() < 0.3
    items, between = _joined(rng, numbers)
    question = rng.choice(_SORT_DOWN if down else _SORT_UP).format(items=items)
    answer = between.join(map(str, reversed(ordered) if down else ordered))
    return asked(rng, task, key, question, answer, difficulty=level)


def sort_words(rng: random.Random) -> Example:
    words = rng.sample(NOUNS, rng.randint(*SORTED_WORDS))
    ordered = sorted(words)
    down = rng.random() < 0.2
    question = rng.choice(_SORT_WORDS_DOWN if down else _SORT_WORDS).format(items=", ".join(words))
    answer = ", ".join(reversed(ordered) if down else ordered)
    return asked(rng, "sort_words", f"sort {ordered}", question, answer)


def turn_list(rng: random.Random) -> Example:
    """A list from its end to its start."""
    count = rng.randint(3, 8)
    items = rng.sample(NOUNS, count) if rng.random() < 0.5 else _numbers(rng, count)
    text, turned = (", ".join(map(str, x)) for x in (items, reversed(items)))
    return asked(rng, "turn_list", f"turn {text}", rng.choice(_TURN).format(items=text), turned)


def extreme(rng: random.Random) -> Example:
    """The largest, smallest or second largest of different numbers."""
    most = rng.choice((99, 999, 9999))
    numbers = rng.sample(range(most + 1), rng.randint(3, 10))
    ordered = sorted(numbers)
    which = rng.choice(("largest", "largest", "smallest", "smallest", "second largest"))
    answer = {"largest": ordered[-1], "smallest": ordered[0], "second largest": ordered[-2]}[which]
    items, _ = _joined(rng, numbers)
    question = rng.choice(_EXTREMES[which]).format(items=items)
    return asked(rng, "extreme", f"extreme {which} {ordered}", question, str(answer))


def place(rng: random.Random) -> Example:
    """The item at a place of a list."""
    count = rng.randint(4, 10)
    items = [str(x) for x in _numbers(rng, count)] if rng.random() < 0.5 else []
    items = items or rng.sample(NOUNS, count)
    if rng.random() < 0.25:
        at, which = -1, "last"
    else:
        at = rng.randrange(min(count, len(ORDINALS)))
        which = ORDINALS[at]
    text = ", ".join(items)
    question = rng.choice(_PLACE).format(which=which, items=text)
    return asked(rng, "place", f"place {which} {text}", question, items[at])
