"""What is seen while something long runs: bars on a terminal, lines in a pipe, records in a log.

Always on stderr: stdout belongs to results.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..checkpoints.reporting import Reporter, Update
from .phases import process_began
from .telemetry.logs import fields

__all__ = ["LINE_EVERY", "LogReporter", "Reporter", "Silent", "Terminal", "Update"]

log = logging.getLogger(__name__)

LINE_EVERY = 10.0
"""Seconds between lines about one phase where there is no terminal to draw on."""


class Silent:
    """Says nothing."""

    began: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[Update]:
        yield lambda done, total: None

    def note(self, text: str) -> None:
        pass


class LogReporter:
    """As log records, for those who want nothing else on stderr (`--log-format json`)."""

    began: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[Update]:
        begin = time.monotonic()
        yield lambda done, total: None
        log.info("%s done", name, extra=fields(seconds=round(time.monotonic() - begin, 3)))

    def note(self, text: str) -> None:
        log.info("%s", text.strip())


class Terminal:
    """A bar per phase on a terminal; in a pipe or file, a line when a phase ends, and every
    `LINE_EVERY` seconds while it lasts. Of a command: its user waits from the process's first line.
    """

    def __init__(self) -> None:
        self.began = process_began()
        self._bars: Progress | None = None
        self._open = 0
        self._lock = threading.Lock()
        # Where the shell closed stderr the file is None; then rich must not take stdout for it.
        self._console = Console(file=sys.stderr, stderr=True, highlight=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[Update]:
        begin = time.monotonic()
        with self._bar(name) if self._console.is_terminal else self._lines(name) as update:
            yield update
        self.note(f"{name:<12} {time.monotonic() - begin:.1f} s")

    def note(self, text: str) -> None:
        # As it is: rich would read [brackets] as styles and :words: as emoji.
        self._console.print(text, soft_wrap=True, markup=False, emoji=False)

    def close(self) -> None:
        """Leaves the terminal as it was, for a process that is about to end in mid-phase."""
        self._console.show_cursor(True)

    @contextmanager
    def _bar(self, name: str) -> Iterator[Update]:
        bars = self._enter()
        task = bars.add_task(name, total=None)
        try:
            yield lambda done, total: bars.update(task, completed=done, total=total)
        finally:
            bars.remove_task(task)
            self._leave()

    def _enter(self) -> Progress:
        """The bars on the screen, of which there is one set at a time."""
        with self._lock:
            if self._bars is None:
                self._bars = Progress(
                    TextColumn("{task.description:<12}"),
                    BarColumn(),
                    TaskProgressColumn(),
                    TimeElapsedColumn(),
                    console=self._console,
                    transient=True,
                )
                self._bars.start()
            self._open += 1
            return self._bars

    def _leave(self) -> None:
        with self._lock:
            self._open -= 1
            if not self._open and self._bars is not None:
                self._bars.stop()
                self._bars = None

    @contextmanager
    def _lines(self, name: str) -> Iterator[Update]:
        last = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= LINE_EVERY and done < total:
                last = now
                self.note(f"{name:<12} {done} of {total}")

        yield update
