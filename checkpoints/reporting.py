"""How long work below the faces says what it is doing; serving/progress.py shows it to people."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class Update(Protocol):
    """Called with (done, total) as a phase proceeds."""

    def __call__(self, done: int, total: int) -> None: ...


class Reporter(Protocol):
    """Where long work says what it is doing. Phases may overlap, on threads of their own."""

    @property
    def began(self) -> float | None:
        """When the user began to wait, on the clock of time.monotonic; None: when asked."""
        ...

    def phase(self, name: str) -> AbstractContextManager[Update]:
        """A named stretch of work: `with reporter.phase("compiling") as update: update(3, 9)`."""
        ...

    def note(self, text: str) -> None:
        """One line of information."""
        ...
