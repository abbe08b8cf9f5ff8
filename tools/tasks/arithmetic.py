"""Sums, differences and products of two numbers; expressions of several operations."""

from __future__ import annotations

import random

from .example import Example, asked, wordings

MULTIPLY_LEVELS: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {
    1: ((10, 99), (2, 9)),
    2: ((100, 999), (2, 9)),
    3: ((1000, 9999), (2, 9)),
    4: ((10, 99), (10, 99)),
    5: ((100, 999), (11, 39)),
    6: ((100, 999), (40, 99)),
    7: ((1000, 9999), (10, 99)),
    8: ((100, 999), (100, 999)),
}
"""The ranges of both factors, by level."""
MULTIPLY_TRAINED = (1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8)
MULTIPLY_HELD_OUT = (5, 6)

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
    "How much is {a} - {b}?",
    "Calculate {a} - {b}.",
    "Take {b} away from {a}.",
)
_MULTIPLY = wordings(
    "What is {a} * {b}?",
    "What is {a} x {b}?",
    "{a} * {b} = ?",
    "{a} * {b}",
    "{a}*{b}",
    "{a} * {b} =",
    "Multiply {a} by {b}.",
    "What is {a} times {b}?",
    "Calculate {a} * {b}.",
    "What is the product of {a} and {b}?",
)


def number(rng: random.Random, most_digits: int) -> int:
    """Short and long numbers alike: evenly over all, nine in ten would be long."""
    digits = rng.randint(1, most_digits)
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def add(rng: random.Random) -> Example:
    a, b = number(rng, 4), number(rng, 4)
    key = f"add {min(a, b)} {max(a, b)}"  # 27 + 48 gives 48 + 27 away
    return asked(rng, "add", key, rng.choice(_ADD).format(a=a, b=b), str(a + b))


def subtract(rng: random.Random) -> Example:
    a, b = number(rng, 4), number(rng, 4)
    if a < b and rng.random() < 0.8:
        a, b = b, a
    key = f"subtract {min(a, b)} {max(a, b)}"
    return asked(rng, "subtract", key, rng.choice(_SUBTRACT).format(a=a, b=b), str(a - b))


def multiply(rng: random.Random) -> Example:
    level = rng.choice(MULTIPLY_TRAINED)
    left, right = MULTIPLY_LEVELS[level]
    a, b = rng.randint(*left), rng.randint(*right)
    key = f"multiply {min(a, b)} {max(a, b)}"
    if rng.random() < 0.3:
        a, b = b, a
    question = rng.choice(_MULTIPLY).format(a=a, b=b)
    return asked(rng, "multiply", key, question, str(a * b), difficulty=level)
