"""Requests that arrive when they arrive, an open loop, or as others end, a closed one; and what
their callers saw. For serve.py, fairness.py and load_process.py.

In an open loop a slow server does not slow down who comes next, as with real callers; times count
from when a request was due, so that a late sender hides nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ...errors import QuireError
from .targets import Target

_TURNS = 2e-3
"""Seconds before something is due in which an event loop is turned instead of waiting."""


@dataclass(slots=True)
class Served:
    """One request as its caller saw it. Seconds after the run began.

    Attributes:
      due: when it was to be sent.
      sent: when it was.
      messages: (when it came, tokens in all by then).
      ended: when the stream did.
      error: why it failed.
      hit: prompt tokens that the server found in its prefix index; None if it does not say.
      engine: seconds of the time to first token that passed in the server's engine, likewise.
    """

    due: float
    output: int
    sent: float = math.nan
    messages: list[tuple[float, int]] = field(default_factory=list)
    ended: float = math.nan
    error: str = ""
    hit: int | None = None
    engine: float | None = None

    @property
    def tokens(self) -> int:
        return self.messages[-1][1] if self.messages else 0

    @property
    def whole(self) -> bool:
        """Whether all the tokens came that were asked for."""
        return not self.error and self.tokens == self.output

    @property
    def first(self) -> float:
        """Time to first token."""
        return self.messages[0][0] - self.due

    @property
    def each(self) -> float:
        """Time per output token after those of the first message; nan if there are none."""
        (begin, before), (end, after) = self.messages[0], self.messages[-1]
        return (end - begin) / (after - before) if after > before else math.nan

    @property
    def gaps(self) -> list[float]:
        """Time between messages."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.messages)]


def poisson(count: int, rate: float, draw: np.random.Generator) -> list[float]:
    """When `count` requests are due at `rate` a second: exponential gaps, the first at 0."""
    if math.isinf(rate):
        return [0.0] * count
    gaps = draw.exponential(1 / rate, count)
    gaps[0] = 0.0
    return [float(at) for at in np.cumsum(gaps)]


def scattered(count: int, seconds: float, draw: np.random.Generator) -> list[float]:
    """When `count` requests are due at random within so many seconds: Poisson arrivals whose number
    is given, so that chance says when they come, and not how many."""
    return np.sort(draw.uniform(0.0, seconds, count)).tolist()


async def run_load(
    target: Target,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[int],
    due: Sequence[float],
    progress: Callable[[int, int], None],
    begin: float | None = None,
) -> list[Served]:
    """Sends every request when it is due; returns when the last has ended.

    Args:
      due: seconds after the begin, in order.
      begin: by time.monotonic(); None is now.
    """
    clock = time.monotonic
    served = [Served(at, output) for at, output in zip(due, outputs, strict=True)]
    begin, done = clock() if begin is None else begin, 0

    async def ask(request: Served, prompt: Sequence[int]) -> None:
        nonlocal done
        await _ask(target, request, prompt, begin)
        done += 1
        progress(done, len(served))

    async with asyncio.TaskGroup() as group:
        for request, prompt in zip(served, prompts, strict=True):
            await _until(begin + request.due, clock)
            group.create_task(ask(request, prompt))
    return served


async def _until(when: float, clock: Callable[[], float]) -> None:
    """Returns then, and not before; event loops' timers are a millisecond early or late."""
    await asyncio.sleep(max(0.0, when - clock() - _TURNS))
    while clock() < when:
        await asyncio.sleep(0)


async def run_closed(
    target: Target,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[int],
    streams: int,
    progress: Callable[[int, int], None],
    begin: float | None = None,
    take: Iterable[int] | None = None,
) -> list[Served]:
    """Sends requests in their order, `streams` at a time: each that ends is followed by the next,
    which is due when it is sent. Returns when the last has ended.

    Args:
      begin: by time.monotonic(); None is now.
      take: which to send next, by its place, as often as it is asked; None sends them all.
    """
    clock = time.monotonic
    begin = clock() if begin is None else begin
    left = iter(range(len(prompts)) if take is None else take)
    served: list[Served] = []

    async def caller() -> None:
        for at in left:
            request = Served(clock() - begin, outputs[at])
            await _ask(target, request, prompts[at], begin)
            served.append(request)
            progress(len(served), len(prompts))

    await _until(begin, clock)
    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(caller())
    return sorted(served, key=lambda request: request.due)


async def _ask(target: Target, request: Served, prompt: Sequence[int], begin: float) -> None:
    """Sends one, and writes down what comes."""
    clock = time.monotonic

    def told(hit: int, first: float | None) -> None:
        request.hit, request.engine = hit, first

    request.sent = clock() - begin
    try:
        async for count in target.stream(prompt, request.output, told):
            request.messages.append((clock() - begin, count))
    except QuireError as error:
        request.error = f"{type(error).__name__}: {error}"
    request.ended = clock() - begin
