"""Faults injected before a given line of Quire's, for tests of what a fault leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import quire.kv
import quire.sched

FOLDERS = tuple(str(Path(package.__file__).parent) for package in (quire.kv, quire.sched))


class Injected(Exception):
    pass


class Injector:
    """Raises before the so-manieth line that is run of sched and kv, once.

    Lines run before a fault, those that clear up after it are left alone.

    Args:
      line: how many lines run before.
      sparing: names of functions that are spared.
    """

    def __init__(self, line: int, sparing: tuple[str, ...] = ()):
        self.left = line
        self._sparing = sparing

    def __call__(self, work: Callable[[], Any]) -> Any:
        """Does the work."""
        before = sys.gettrace()  # a debugger's, or that of who counts coverage
        sys.settrace(self._trace)
        try:
            return work()
        finally:
            sys.settrace(before)

    @property
    def was_due(self) -> bool:
        """Whether the work came that far."""
        return self.left < 0

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(FOLDERS) or code.co_name in self._sparing:
            return None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                raise Injected("secret")
        return self._trace
