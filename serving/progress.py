"""What a person sees while something long runs: bars on a terminal, lines in a log. Always stderr.

stdout belongs to results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Reporter(Protocol):
    """Where an engine says what it is doing."""

    def phase(self, name: str) -> AbstractContextManager[Update]:
        """A named stretch of work: `with reporter.phase("compiling") as update: update(3, 9)`."""
        ...

    def note(self, text: str) -> None:
        """One line of information."""
        ...


class Update(Protocol):
    """Called with (done, total) as a phase proceeds."""

    def __call__(self, done: int, total: int) -> None: ...


class Silent:
    """Says nothing; remembers how long each phase took, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Update]:
        begin = time.monotonic()
        yield lambda done, total: None
        self.seconds[name] = time.monotonic() - begin

    def note(self, text: str) -> None:
        pass


class Terminal(Silent):
    """A bar per phase on a terminal; one line per phase where stderr is a file."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(file=sys.stderr, highlight=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[Update]:
        begin = time.monotonic()
        bar = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        self.seconds[name] = time.monotonic() - begin
        self.console.print(f"{name:<12} {self.seconds[name]:.1f} s")

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)
