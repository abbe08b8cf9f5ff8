"""What callers send, made plain or refused: numbers of any kind become Python's own.

Used by sampling_params.py. Every refusal is an InvalidRequest with field, value and limit.
"""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any, SupportsIndex, cast

from ..errors import invalid


def number(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> float:
    """A number within [low, high], or (low, high] with `above_low`."""
    if not isinstance(value, bool) and isinstance(value, Real):
        real = cast(float, value)
        if low <= real <= high and not (above_low and real == low):  # not-a-number is never within
            return float(real)
    raise invalid(name, value, f"a number in {'(' if above_low else '['}{low:g}, {high:g}]")


def whole(name: str, value: object, low: int, high: int) -> int:
    """A whole number within [low, high]."""
    found = index(value)
    if found is None or not low <= found <= high:
        raise invalid(name, value, f"a whole number from {low} to {high}")
    return found


def index(value: object) -> int | None:
    """A whole number of any kind as Python's own; None if it is none, or true or false."""
    try:
        return None if isinstance(value, bool) else operator.index(cast(SupportsIndex, value))
    except TypeError:
        return None


def items(name: str, value: Any, of_what: str) -> tuple[Any, ...]:
    """The items of a list, or of any other iterable; None has none."""
    try:
        return () if value is None else tuple(value)
    except TypeError:
        raise invalid(name, value, f"a list of {of_what}") from None
