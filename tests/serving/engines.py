"""Small engines for tests of the faces, and ways to wait for them and to make them wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from quire.sched.engine import Engine
from quire.serving.assemble import Assembled

SETTINGS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_batched_tokens": 32,
    "page_size": 16,
    "warmup": False,
}


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits until something holds, at most so long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)


def at_rest(engine: Engine) -> None:
    """Waits until nothing runs or waits, and checks that no page is lost."""
    eventually(lambda: not engine.has_work and engine.stats().running == 0)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    engine._scheduler.check_integrity()  # nothing runs, so nobody else touches it


@contextmanager
def held(parts: Assembled) -> Iterator[threading.Event]:
    """Lets results of steps in only while the event is set, until the block ends. What earlier
    calls left running ends first, or it would be held, too."""
    eventually(lambda: not parts.engine.has_work)
    go = threading.Event()
    runner, collect = parts.runner, parts.runner.collect

    def wait_and_collect(handle: Any) -> Any:
        assert go.wait(120)
        return collect(handle)

    runner.collect = wait_and_collect  # type: ignore[method-assign]
    try:
        yield go
    finally:
        runner.collect = collect  # type: ignore[method-assign]
        go.set()


class Stepping:
    """Lets results of steps in one at a time, while the block runs."""

    def __init__(self, parts: Assembled) -> None:
        self._engine = parts.engine
        self._runner, self._collect = parts.runner, parts.runner.collect
        self._may = threading.Semaphore(0)
        self._open = False
        self._given = self._asked = 0  # results that may be read, and those that were asked for

    def __enter__(self) -> Stepping:
        eventually(lambda: not self._engine.has_work)
        self._runner.collect = self._wait_and_collect  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.collect = self._collect  # type: ignore[method-assign]
        self._open = True
        self._may.release()

    def _wait_and_collect(self, handle: Any) -> Any:
        self._asked += 1
        if not self._open:
            assert self._may.acquire(timeout=120)
        return self._collect(handle)

    def at_wait(self) -> bool:
        """Whether the engine waits for results, and does nothing else."""
        return self._asked > self._given

    def step(self) -> None:
        """The results that the engine waits for come; returns when it waits for the next."""
        eventually(self.at_wait)
        self._given += 1
        self._may.release()
        eventually(self.at_wait)
