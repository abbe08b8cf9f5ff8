"""Work off the event loop: a few at a time, and no more than so much of it waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from quire.errors import Overloaded
from quire.serving.frontend.workers import LARGE, THREADS, Workers


class Gate:
    """Work that waits until it may end.

    Attributes:
      running, most: of it now, and at any time.
    """

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.running = self.most = self.done = 0
        self._lock = threading.Lock()

    def work(self) -> str:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        assert self.may_end.wait(20)
        with self._lock:
            self.running -= 1
            self.done += 1
        return threading.current_thread().name


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.001)


def test_what_is_small_is_done_at_once() -> None:
    workers = Workers()
    call = workers.run(lambda: threading.current_thread(), LARGE - 1)
    assert asyncio.run(call) is threading.main_thread()


def test_few_run_while_the_event_loop_goes_on() -> None:
    async def run() -> None:
        workers, gate = Workers(), Gate()
        calls = [asyncio.ensure_future(workers.run(gate.work, LARGE)) for _ in range(20)]
        await until(lambda: gate.running == THREADS)
        gate.may_end.set()
        names = await asyncio.gather(*calls)
        assert gate.most == THREADS and all(name.startswith("quire-work") for name in names)
        workers.close()

    asyncio.run(run())


def test_a_fault_is_the_callers() -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    for size in (1, LARGE):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(Workers().run(fail, size))


def test_too_much_that_waits_is_refused_until_some_is_done() -> None:
    async def run() -> None:
        workers, gate = Workers(most=3 * LARGE), Gate()
        calls = [asyncio.ensure_future(workers.run(gate.work, LARGE)) for _ in range(3)]
        await until(lambda: gate.running == 3)
        with pytest.raises(Overloaded, match=f"^queue: {3 * LARGE} bytes .* at most {3 * LARGE}"):
            await workers.run(gate.work, LARGE)
        assert await workers.run(lambda: 7, 1) == 7  # what is small needs no place
        gate.may_end.set()
        await asyncio.gather(*calls)
        assert await workers.run(lambda: 7, 3 * LARGE) == 7
        assert await workers.run(lambda: 7, 9 * LARGE) == 7  # alone, it may have any size
        workers.close()

    asyncio.run(run())


def test_who_leaves_gives_the_place_back_but_not_before_the_thread_is_free() -> None:
    async def run() -> None:
        workers, gate = Workers(most=(THREADS + 1) * LARGE), Gate()
        calls = [asyncio.ensure_future(workers.run(gate.work, LARGE)) for _ in range(THREADS + 1)]
        await until(lambda: gate.running == THREADS)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert workers._taken == THREADS * LARGE  # the last had not begun
        gate.may_end.set()
        await until(lambda: workers._taken == 0)
        assert gate.done == THREADS
        workers.close()

    asyncio.run(run())
