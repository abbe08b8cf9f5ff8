"""Thinking before answering: the steps of what is hard at once, and problems told as a story."""

from __future__ import annotations

import random

from . import arithmetic, expressions
from .example import Example, asked, wordings
from .words import NAMES, THINGS, plural, pronoun

_ENDINGS = wordings(
    "How many {things} does {name} have now?",
    "How many {things} does {name} have in the end?",
    "How many {things} are there now?",
)


def think_multiply(rng: random.Random) -> Example:
    """Products of up to three by three or four by two digits, by the digits of the second."""
    digits = rng.choice((2, 3, 3, 4))
    a = rng.randint(10 ** (digits - 1), 10**digits - 1)
    b = rng.randint(*rng.choice(((2, 9), (11, 99), (11, 99), (11, 99 if digits == 4 else 999))))
    key = f"multiply {min(a, b)} {max(a, b)}"  # the same as without thinking
    question = rng.choice(arithmetic.MULTIPLICATIONS).format(a=a, b=b)
    thoughts = "\n".join(_products(a, b))
    return asked(rng, "think_multiply", key, question, str(a * b), thoughts=thoughts)


def _products(a: int, b: int) -> list[str]:
    shown = str(b)
    places = [10 ** (len(shown) - 1 - i) for i in range(len(shown))]
    parts = [int(d) * place for d, place in zip(shown, places, strict=True) if d != "0"]
    lines = [f"{b} = {' + '.join(map(str, parts))}"] if len(parts) > 1 else []
    lines += [f"{a} * {part} = {a * part}" for part in parts]
    total = a * parts[0]
    for part in parts[1:]:
        lines.append(f"{total} + {a * part} = {total + a * part}")
        total += a * part
    return lines


def think_expression(rng: random.Random) -> Example:
    """Expressions of two to six operations, one operation a line."""
    node = expressions.draw(rng, rng.randint(2, 6))
    key = f"expression {expressions.canonical(node)}"
    question = rng.choice(arithmetic.EXPRESSIONS).format(text=expressions.text(node))
    thoughts = "\n= ".join(expressions.steps(node))
    answer = str(expressions.value(node))
    return asked(rng, "think_expression", key, question, answer, thoughts=thoughts)


_STARTS = (
    "{name} buys {x} boxes of {y} {things}.",
    "{name} has {x} bags with {y} {things} each.",
    "There are {x} shelves with {y} {things} on each, all of them {name}'s.",
)
_PLAIN_STARTS = ("{name} has {x} {things}.", "{name} owns {x} {things}.")
_GAINS = (
    "Then {they} gets {n} more.",
    "A friend gives {them} {n}.",
    "Later {they} buys another {n}.",
    "In the evening {they} finds {n} more.",
)
_LOSSES = (
    "Then {they} gives away {n}.",
    "{n} of them break.",
    "On the way home {they} loses {n}.",
    "{They} sells {n} of them.",
)
_DOUBLES = ("Then their number doubles.", "Then {they} gets as many again.")


def think_problem(rng: random.Random) -> Example:
    """A story with two to four calculations."""
    name, things = rng.choice(NAMES), plural(rng.choice(THINGS))
    they = pronoun(name)
    slots = {"name": name, "things": things, "they": they, "They": they.capitalize()}
    slots["them"] = "her" if they == "she" else "him"
    sentences, lines = [], []
    if rng.random() < 0.7:
        x, y = rng.randint(2, 9), rng.randint(3, 99)
        total = x * y
        sentences.append(rng.choice(_STARTS).format(x=x, y=y, **slots))
        lines.append(f"{x} * {y} = {total}")
    else:
        total = rng.randint(10, 999)
        sentences.append(rng.choice(_PLAIN_STARTS).format(x=total, **slots))
        x, y = 1, total
    key = f"problem {x} {y}"
    for _ in range(rng.randint(1 if lines else 2, 3)):
        n = rng.randint(2, rng.choice((20, 99, 300)))
        kind = rng.randrange(5)
        if kind == 0:
            sentence, line, new = rng.choice(_DOUBLES), f"{total} * 2", total * 2
            n = total
        elif kind <= 2 and n < total:
            sentence, line, new = rng.choice(_LOSSES), f"{total} - {n}", total - n
        else:
            sentence, line, new = rng.choice(_GAINS), f"{total} + {n}", total + n
        total = new
        sentences.append(sentence.format(n=n, **slots))
        lines.append(f"{line} = {total}")
        key += f" {line}"
    sentences.append(rng.choice(_ENDINGS).format(**slots))
    question, thoughts = " ".join(sentences), "\n".join(lines)
    return asked(rng, "think_problem", key, question, str(total), thoughts=thoughts)
