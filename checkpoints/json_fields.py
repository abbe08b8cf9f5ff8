"""Reading a checkpoint's JSON files, field by field, with errors that name file, field and value.

Used by every reader in this folder. A `Fields` remembers which names were asked for, so that
whoever reads a config can refuse the ones nobody asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MAX_INT = 2**31 - 1


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, which must exist."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a {type(value).__name__}, must be a JSON object")
    return value


def read_json_if_there(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, or an empty one where there is no such file."""
    return read_json(file) if file.is_file() else {}


class Fields:
    """Typed access to one JSON object. null counts as absent unless `raw` is used."""

    def __init__(self, file: Path, values: Mapping[str, Any], path: str = "") -> None:
        self.file = file
        self.values = values
        self.path = path
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def error(self, name: str, must_be: str) -> CheckpointError:
        """The one shape of error: file, field, value, expectation."""
        got = json.dumps(self.values.get(name), ensure_ascii=False, default=str)
        return CheckpointError(
            f"{self.file}: {self.path}{name}: got {got[:200]}, must be {must_be}"
        )

    def raw(self, name: str) -> Any:
        """The value as it stands; None where absent."""
        self._asked.add(name)
        return self.values.get(name)

    def unasked(self) -> list[str]:
        """Names in the file that nobody asked for, in the file's order."""
        return [name for name in self.values if name not in self._asked]

    def optional_integer(self, name: str, *, low: int = 1, high: int = MAX_INT) -> int | None:
        value = self.raw(name)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            raise self.error(name, f"a whole number from {low} to {high}")
        return value

    def integer(
        self, name: str, default: int | None = None, *, low: int = 1, high: int = MAX_INT
    ) -> int:
        value = self.optional_integer(name, low=low, high=high)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(
                f"{self.file}: {self.path}{name}: missing, must be a whole number of at least {low}"
            )
        return value

    def optional_number(
        self, name: str, *, low: float = 0.0, above_low: bool = False, high: float = math.inf
    ) -> float | None:
        value = self.raw(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            not is_number
            or not math.isfinite(value)
            or not low <= value <= high
            or (above_low and value == low)
        ):
            limit = f"a number {'above' if above_low else 'of at least'} {low:g}"
            raise self.error(name, limit if math.isinf(high) else f"{limit} and at most {high:g}")
        return float(value)

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        low: float = 0.0,
        above_low: bool = False,
        high: float = math.inf,
    ) -> float:
        value = self.optional_number(name, low=low, above_low=above_low, high=high)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.file}: {self.path}{name}: missing, must be a number")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def below(self, name: str) -> Fields | None:
        """The object in field `name`; None where absent, null or empty."""
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "an object")
        return Fields(self.file, value, f"{self.path}{name}.") if value else None
