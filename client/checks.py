"""What callers give, held against what it must be, so that errors name the field, the value and the
limit. Used by both clients, by channel.py and by messages.py.

What a value means is the server's to judge; here it is whether it can be sent at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from ..errors import InvalidRequest, invalid

Metadata = Iterable[tuple[str, str | bytes]]
"""Of a call: names in lower case, with text; bytes where a name ends in -bin."""

LONGEST = 365 * 86_400.0
"""Seconds that a timeout may have; grpc takes far longer ones for none at all."""

TEXT = "a text, without lone surrogates"

_NAME = re.compile(r"[0-9a-z_.-]+")
_TEXT = re.compile(r"[\x20-\x7e]*")
_KEY = re.compile(r"[\x21-\x7e]+")

_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_NUMBERS = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


def timeout(field: str, value: Any, *, least: float = 0.0) -> float | None:
    """Seconds above 0 and at least so many, or None for any time."""
    if value is None or (is_number(value) and 0 < value <= LONGEST and value >= least):
        return value
    low = f"from {least:g}" if least else "above 0"
    raise invalid(
        field, value, f"a number of seconds {low}, at most {LONGEST:.0f}, or None for any time"
    )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def metadata(given: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    """As grpc takes it. Values are not in the errors: they may be secret."""
    pairs = items("metadata", given, 'pairs, such as (("traceparent", "00-..."),)')
    for at, pair in enumerate(pairs):
        where = f"metadata[{at}]"
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidRequest(
                f"{where}: got {type(pair).__name__}, must be a pair of a name and its value"
            )
        name, value = pair
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise invalid(where, name, "a name of digits, lower-case letters and _ . -")
        if name.endswith("-bin"):
            if not isinstance(value, bytes):
                raise InvalidRequest(
                    f"{where}: got {type(value).__name__} for {name}, must be bytes"
                )
        elif not isinstance(value, str) or not _TEXT.fullmatch(value):
            said = _misfit(value, _TEXT)
            raise InvalidRequest(f"{where}: got {said} for {name}, must be printable ASCII")
    return tuple((name, value) for name, value in pairs)


def key(field: str, value: Any) -> None:
    """Of the API. It is not in the error."""
    if not isinstance(value, str) or not _KEY.fullmatch(value):
        said = "an empty text" if value == "" else _misfit(value, _KEY)
        raise InvalidRequest(f"{field}: got {said}, must be printable ASCII without spaces")


def _misfit(value: Any, allowed: re.Pattern[str]) -> str:
    """Says why something does not fit, and not what it is."""
    if not isinstance(value, str):
        return type(value).__name__
    at, letter = next((i, c) for i, c in enumerate(value) if not allowed.fullmatch(c))
    return f"a text of {len(value)} characters with {letter!r} at {at}"


def items(field: str, given: Any, limit: str) -> list[Any]:
    """What is in a list, or in whatever else has an order; not the letters of a text."""
    if not isinstance(given, (str, bytes, bytearray, Mapping, Set)):
        try:
            return list(given)
        except TypeError:
            pass
    raise invalid(field, given, limit)


def set_field(message: Any, name: str, value: Any, field: str = "") -> None:
    """Sets a field of a message.

    Args:
      field: what to call it in the error, if not by its name.
    """
    declared = message.DESCRIPTOR.fields_by_name[name]
    try:
        if _is_kind(declared, value):
            setattr(message, name, value)
            return
    except (TypeError, ValueError):
        pass
    raise invalid(field or name, value, limit_of(declared))


def limit_of(declared: FieldDescriptor) -> str:
    """What a field, or each item of it, must be."""
    kind = declared.cpp_type
    if kind in _WHOLE:
        low, high = _WHOLE[kind]
        return f"a whole number from {low} to {high}"
    if kind in _NUMBERS:
        return "a number"
    return "true or false" if kind == FieldDescriptor.CPPTYPE_BOOL else TEXT


def _is_kind(declared: FieldDescriptor, value: Any) -> bool:
    """Whether it is of the kind, where protobuf itself would take others, too."""
    kind = declared.cpp_type
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return isinstance(value, bool)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return isinstance(value, str)
    return not isinstance(value, (bool, str))
