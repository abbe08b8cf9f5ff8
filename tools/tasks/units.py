"""Converting units. Powers of ten take decimals, other factors whole numbers."""

from __future__ import annotations

import random
from decimal import Decimal

from .example import Example, asked, wordings

_POWERS_OF_TEN = tuple(
    (big, small, power)
    for big, small, power in (
        ("km", "m", 3),
        ("m", "cm", 2),
        ("cm", "mm", 1),
        ("m", "mm", 3),
        ("kg", "g", 3),
        ("g", "mg", 3),
        ("t", "kg", 3),
        ("l", "ml", 3),
        ("s", "ms", 3),
        ("kHz", "Hz", 3),
        ("GHz", "MHz", 3),
        ("kW", "W", 3),
        ("euros", "cents", 2),
    )
)
_FACTORS = (
    ("hours", "minutes", 60, 240),
    ("minutes", "seconds", 60, 240),
    ("days", "hours", 24, 99),
    ("weeks", "days", 7, 999),
    ("years", "months", 12, 250),
    ("feet", "inches", 12, 250),
    ("dozens", "eggs", 12, 250),
    ("yards", "feet", 3, 999),
)
"""Big unit, small unit, factor, most of the big one."""

_PHRASINGS = wordings(
    "Convert {value} {have} to {want}.",
    "How many {want} are {value} {have}?",
    "What is {value} {have} in {want}?",
    "{value} {have} in {want}?",
    "{value} {have} to {want}",
    "Give me {value} {have} in {want}.",
)


def units(rng: random.Random) -> Example:
    if rng.random() < 0.7:
        big, small, power = rng.choice(_POWERS_OF_TEN)
        digits = rng.choice((1, 2, 3, 3, 4, 4, 4))
        value = Decimal(rng.randint(1 if digits == 1 else 10 ** (digits - 1), 10**digits - 1))
        value = value.scaleb(-rng.choice((0, 0, 1, 1, 2, 3)))
        if rng.random() < 0.5:
            have, want, result = big, small, value.scaleb(power)
        else:
            have, want, result = small, big, value.scaleb(-power)
    else:
        big, small, factor, most = rng.choice(_FACTORS)
        count = rng.randint(2, rng.choice((20, most)))
        if rng.random() < 0.6:
            have, want, value, result = big, small, Decimal(count), Decimal(count * factor)
        else:
            have, want, value, result = small, big, Decimal(count * factor), Decimal(count)
    shown = _plain(value)
    question = rng.choice(_PHRASINGS).format(value=shown, have=have, want=want)
    answer = f"{_plain(result)} {want}"
    return asked(rng, "units", f"units {shown} {have} {want}", question, answer)


def _plain(value: Decimal) -> str:
    """Without an exponent and without zeros at the end of a fraction."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
