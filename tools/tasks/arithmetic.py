"""Sums, differences and products of two numbers; expressions of several operations."""

from __future__ import annotations

import random

from . import expressions
from .example import Example, asked, assistant, is_held_out, system, user, wordings
from .words import NAMES, THINGS, plural

MULTIPLY_LEVELS: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {
    1: ((10, 99), (2, 9)),
    2: ((100, 999), (2, 9)),
    3: ((1000, 9999), (2, 9)),
    4: ((10, 99), (10, 99)),
    5: ((100, 999), (11, 19)),
    6: ((100, 999), (20, 49)),
    7: ((100, 999), (50, 99)),
    8: ((1000, 9999), (10, 99)),
    9: ((100, 999), (100, 999)),
}
"""The ranges of both factors, by level."""
ROUND_PRODUCT = 10
"""The level of the harder ones with a factor that ends in 0: the thoughts of think_multiply write
them down as steps, so they are trained and never asked."""
MULTIPLY_TRAINED = (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9)
MULTIPLY_HELD_OUT = (7, 8, 9)

EXPRESSION_TRAINED = (1, 2, 2, 3, 3, 3, 4, 4, 5)
"""Operations, which are the levels."""
EXPRESSION_HELD_OUT = (4, 5)

EXPRESSIONS = wordings(
    "What is {text}?",
    "{text} = ?",
    "{text}",
    "{text} =",
    "Calculate {text}.",
    "How much is {text}?",
    "What's {text}?",
    "What is the value of {text}?",
)

_SENTENCE_SHARE = 0.04
_SENTENCE_PROMPTS = (
    "Answer in a full sentence.",
    "Always answer in full sentences.",
    "Write whole sentences.",
)
_ADD = wordings(
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "{a} + {b} = ?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "Add {a} and {b}.",
    "Add {b} to {a}.",
    "What is the sum of {a} and {b}?",
    "How much is {a} + {b}?",
    "Calculate {a} + {b}.",
    "Can you add {a} and {b} for me?",
    "What is {a} plus {b}?",
    "What's {a} + {b}?",
    "{a} plus {b}",
    "{name} has {a} {things} and gets {b} more. How many are there now?",
    "There are {a} {things} in one box and {b} in another. How many are there in all?",
)
_SUBTRACT = wordings(
    "What is {a} - {b}?",
    "What is {a}-{b}?",
    "{a} - {b} = ?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} =",
    "Subtract {b} from {a}.",
    "What is {a} minus {b}?",
    "What's {a} - {b}?",
    "{a} minus {b}",
    "How much is {a} - {b}?",
    "Calculate {a} - {b}.",
    "Take {b} away from {a}.",
)
_SUBTRACT_STORIES = wordings(
    "{name} has {a} {things} and gives away {b}. How many are left?",
    "There are {a} {things} in a box. {name} takes {b} of them. How many remain?",
)
MULTIPLICATIONS = wordings(
    "What is {a} * {b}?",
    "What is {a} x {b}?",
    "{a} * {b} = ?",
    "{a} * {b}",
    "{a}*{b}",
    "{a} * {b} =",
    "Multiply {a} by {b}.",
    "What is {a} times {b}?",
    "What's {a} * {b}?",
    "{a} times {b}",
    "Calculate {a} * {b}.",
    "What is the product of {a} and {b}?",
)

_MORE = wordings(
    "Add {n} to that.",
    "Plus {n}?",
    "And {n} more?",
    "Now add {n}.",
    "And plus {n}?",
    "What if you add {n}?",
)
_LESS = wordings(
    "Subtract {n} from that.",
    "Minus {n}?",
    "And {n} less?",
    "Now subtract {n}.",
    "And minus {n}?",
    "Now take away {n}.",
)


def number(rng: random.Random, most_digits: int) -> int:
    """Short and long numbers alike: evenly over all, nine in ten would be long."""
    digits = rng.randint(1, most_digits)
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def add(rng: random.Random) -> Example:
    a, b = number(rng, 4), number(rng, 4)
    key = _sum_key(a, b)
    question = _worded(rng, _ADD, a, b)
    return _in_words_or_not(rng, "add", key, question, f"{a} + {b}", a + b)


def _sum_key(a: int, b: int) -> str:
    return f"add {min(a, b)} {max(a, b)}"  # 27 + 48 gives 48 + 27 away


def subtract(rng: random.Random) -> Example:
    a, b = number(rng, 4), number(rng, 4)
    if a < b and rng.random() < 0.8:
        a, b = b, a
    key = f"subtract {min(a, b)} {max(a, b)}"
    is_story = a >= b and rng.random() < 0.1
    question = _worded(rng, _SUBTRACT_STORIES if is_story else _SUBTRACT, a, b)
    return _in_words_or_not(rng, "subtract", key, question, f"{a} - {b}", a - b)


def _worded(rng: random.Random, templates: tuple[str, ...], a: int, b: int) -> str:
    template = rng.choice(templates)
    if "{things}" not in template:
        return template.format(a=a, b=b)
    things = plural(rng.choice(THINGS))
    return template.format(a=a, b=b, things=things, name=rng.choice(NAMES))


def _in_words_or_not(
    rng: random.Random, task: str, key: str, question: str, terms: str, result: int
) -> Example:
    """The bare number, or a sentence where the system prompt wants one."""
    if rng.random() < _SENTENCE_SHARE:
        before = (system(rng.choice(_SENTENCE_PROMPTS)),)
        return asked(rng, task, key, question, f"{terms} is {result}.", before=before)
    return asked(rng, task, key, question, str(result))


def multiply(rng: random.Random) -> Example:
    level = rng.choice(MULTIPLY_TRAINED)
    left, right = MULTIPLY_LEVELS[level]
    a, b = rng.randint(*left), rng.randint(*right)
    key = f"multiply {min(a, b)} {max(a, b)}"
    if b > 9 and (a % 10 == 0 or b % 10 == 0):
        level = ROUND_PRODUCT
    if rng.random() < 0.3:
        a, b = b, a
    question = rng.choice(MULTIPLICATIONS).format(a=a, b=b)
    return asked(rng, "multiply", key, question, str(a * b), difficulty=level)


def expression(rng: random.Random) -> Example:
    level = rng.choice(EXPRESSION_TRAINED)
    node = expressions.draw(rng, level)
    key = f"expression {expressions.canonical(node)}"
    question = rng.choice(EXPRESSIONS).format(text=expressions.text(node))
    answer = str(expressions.value(node))
    return asked(rng, "expression", key, question, answer, difficulty=level)


def follow_up(rng: random.Random) -> Example:
    """A sum or difference that is changed in the following turns."""
    total, other = number(rng, 3), number(rng, 3)
    while is_held_out(_sum_key(total, other)):  # which `add` asks
        total, other = number(rng, 3), number(rng, 3)
    messages = [user(_worded(rng, _ADD, total, other)), assistant(str(total + other))]
    numbers = [min(total, other), max(total, other)]
    total += other
    for _ in range(rng.randint(1, 3)):
        change = rng.randint(1, rng.choice((9, 99, 999)))
        if rng.random() < 0.5 and change <= total:
            change = -change
        total += change
        numbers.append(change)
        question = rng.choice(_MORE if change > 0 else _LESS).format(n=abs(change))
        messages += [user(question), assistant(str(total))]
    before, question = messages[:-2], messages[-2]["content"]
    return asked(rng, "follow_up", f"follow {numbers}", question, str(total), before=before)
