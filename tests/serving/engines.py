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


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> None:
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
    """Lets results of steps in only while the event is set, until the block ends."""
    go = threading.Event()
    runner, collect = parts.runner, parts.runner.collect

    def wait_and_collect(handle: Any) -> Any:
        assert go.wait(60)
        return collect(handle)

    runner.collect = wait_and_collect  # type: ignore[method-assign]
    try:
        yield go
    finally:
        runner.collect = collect  # type: ignore[method-assign]
        go.set()
