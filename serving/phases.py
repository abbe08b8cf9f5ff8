"""How long each part of a start takes, from the first line of the process on.

`assemble` fills one of these; the start's summary and `quire bench startup` read it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def process_began() -> float | None:
    """When this process began, on the clock of time.monotonic; None where the system hides it."""
    try:
        # Field 22 of the line; names in field 2 may hold spaces and brackets, so count from ")".
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.monotonic() - age


class Phases:
    """Seconds by phase. Phases may overlap, on threads of their own.

    Args:
      began: when the user began to wait, on the clock of time.monotonic; what passed until now is
        the phase "imports". None: now.
    """

    def __init__(self, began: float | None = None) -> None:
        now = time.monotonic()
        self.began = now if began is None else began
        self.seconds: dict[str, float] = {} if began is None else {"imports": now - began}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a phase; one entered twice adds up."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - begin)

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def done(self) -> dict[str, float]:
        """All phases and, last, "ready": the seconds from the beginning to now."""
        return {**self.seconds, "ready": time.monotonic() - self.began}
