"""Counting letters in words, words in texts, and one item among others.

Counts are drawn first and evenly, then what to count: of natural words one in three would have the
answer "1".
"""

from __future__ import annotations

import random
import string

from .example import Example, asked, wordings
from .words import NOUNS, any_word

MAX_LETTER_COUNT = 15
MAX_COUNTED_LETTERS = 26
MAX_ITEM_COUNT = 18
_NATURAL_SHARE = 0.05

_LETTERS = wordings(
    'How many times does the letter "{x}" appear in "{text}"?',
    'How often does "{x}" occur in "{text}"?',
    'Count the letter "{x}" in "{text}".',
    'How many "{x}" are in "{text}"?',
    'How many times is "{x}" in "{text}"?',
)
_LENGTH = wordings(
    'How many letters does "{text}" have?',
    'How many letters are in "{text}"?',
    'Count the letters of "{text}".',
    'How long is the word "{text}"?',
)
_WORDS = wordings(
    'How many words are in "{text}"?',
    'Count the words in "{text}".',
    "How many words are in this text: {text}",
    "Count the words: {text}",
)
_ITEM = wordings(
    "How many times does {x} appear in this list: {text}",
    "How often is {x} in the list {text}?",
    "Count {x} in the list {text}.",
    "How often does {x} appear in {text}?",
)


def count_letters(rng: random.Random) -> Example:
    """How often a letter occurs in a word, or how many letters there are."""
    if rng.random() < 0.2:
        text = any_word(rng, 2, 20)
        question = rng.choice(_LENGTH).format(text=text)
        return asked(rng, "count_letters", f"length {text}", question, str(len(text)))
    x = rng.choice(string.ascii_lowercase)
    if rng.random() < _NATURAL_SHARE:
        text = any_word(rng, 4, 12)
        x = rng.choice(text) if rng.random() < 0.7 else x
    else:
        count = rng.randint(0, MAX_LETTER_COUNT)
        others = rng.sample(string.ascii_lowercase, rng.randint(2, 8))
        length = rng.randint(max(count, 4), min(2 * count + 8, MAX_COUNTED_LETTERS))
        letters = [x] * count + rng.choices(others, k=length - count)
        rng.shuffle(letters)
        text = "".join(letters)
    question = rng.choice(_LETTERS).format(x=x, text=text)
    return asked(rng, "count_letters", f"count {x} {text}", question, str(text.count(x)))


def count_items(rng: random.Random) -> Example:
    """How many words a text has, or how often one of them is there."""
    if rng.random() < 0.4:
        text = " ".join(rng.choices(NOUNS, k=rng.randint(1, MAX_ITEM_COUNT)))
        question = rng.choice(_WORDS).format(text=text)
        return asked(rng, "count_items", f"words {text}", question, str(text.count(" ") + 1))
    x, *others = rng.sample(NOUNS, rng.randint(3, 6))
    count = rng.randint(0, MAX_ITEM_COUNT - 3)
    items = [x] * count + rng.choices(others, k=rng.randint(1 if count else 4, 10))
    rng.shuffle(items)
    text = ", ".join(items)
    question = rng.choice(_ITEM).format(x=x, text=text)
    return asked(rng, "count_items", f"item {x} {text}", question, str(count))
