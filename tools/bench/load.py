"""Requests that arrive when they arrive, an open loop; and what their callers saw. For serve.py
and load_process.py.

In an open loop a slow server does not slow down who comes next, as with real callers; times count
from when a request was due, so that a late sender hides nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ...errors import QuireError
from .targets import Target


@dataclass(slots=True)
class Served:
    """One request as its caller saw it. Seconds after the run began.

    Attributes:
      due: when it was to be sent.
      sent: when it was.
      messages: (when it came, tokens in all by then).
      ended: when the stream did.
      error: why it failed.
    """

    due: float
    output: int
    sent: float = math.nan
    messages: list[tuple[float, int]] = field(default_factory=list)
    ended: float = math.nan
    error: str = ""

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
      begin: by the loop's clock, which is time.monotonic; None is now.
    """
    clock = asyncio.get_running_loop().time
    served = [Served(at, output) for at, output in zip(due, outputs, strict=True)]
    begin, done = clock() if begin is None else begin, 0

    async def ask(request: Served, prompt: Sequence[int]) -> None:
        nonlocal done
        request.sent = clock() - begin
        try:
            async for count in target.stream(prompt, request.output):
                request.messages.append((clock() - begin, count))
        except QuireError as error:
            request.error = f"{type(error).__name__}: {error}"
        request.ended = clock() - begin
        done += 1
        progress(done, len(served))

    async with asyncio.TaskGroup() as group:
        for request, prompt in zip(served, prompts, strict=True):
            await asyncio.sleep(begin + request.due - clock())
            group.create_task(ask(request, prompt))
    return served
