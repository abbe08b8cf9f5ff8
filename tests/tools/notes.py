"""A reporter for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Notes:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.progress: list[tuple[str, int, int]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Any]:
        yield lambda done, total: self.progress.append((name, done, total))

    def note(self, text: str) -> None:
        self.said.append(text)
