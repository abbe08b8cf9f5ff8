"""A fixed number of requests under way on an engine, for a given time: each that ends is followed
by the next of a trace, again and again. Used by pages.py.

The main thread submits and looks at the engine's counters; the engine's own only says which
requests have ended.
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import Internal, Unavailable
from ...sched.request import FinishReason

if TYPE_CHECKING:
    import numpy as np

    from ...sched.request import RequestOutput
    from ...sched.stats import EngineStats
    from ...serving.progress import Update
    from .engine_run import TokenEngine
    from .trace import Trace

LOOK_EVERY = 0.1
"""Seconds between looks at the counters, at least."""

_REST = 120.0
"""Seconds within which requests that were told to end must have ended."""


@dataclass(frozen=True, slots=True)
class Look:
    """The engine's counters, so many seconds after the first request."""

    at: float
    stats: EngineStats


class ClosedLoop:
    """Keeps an engine busy.

    Args:
      engine: idle.
      trace: lengths of the requests.
      streams: requests under way at any time.
      draw: of token ids.
    """

    def __init__(self, engine: TokenEngine, trace: Trace, streams: int, draw: np.random.Generator):
        self._engine, self._trace, self._streams, self._draw = engine, trace, streams, draw
        self._made = 0
        self._asked: dict[str, int] = {}  # output tokens of each that has not ended
        self._got: dict[str, int] = {}
        self._ends: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self.answered = 0
        """Requests that ended with all their tokens."""

    def run(self, seconds: float, update: Update) -> list[Look]:
        """Runs for so long, then ends what is under way, and waits until nothing is.

        Raises:
          QuireError: a request failed, or got more or fewer tokens than it asked for.
        """
        self._engine.hear(self._count)
        begin = time.perf_counter()
        looks = [Look(0.0, self._engine.stats())]
        try:
            for _ in range(self._streams):
                self._submit()
            while (now := time.perf_counter() - begin) < seconds:
                self._take_end(LOOK_EVERY)
                if now - looks[-1].at >= LOOK_EVERY:
                    looks.append(Look(now, self._engine.stats()))
                    update(int(now), int(seconds))
            looks.append(Look(time.perf_counter() - begin, self._engine.stats()))
            self._end_all()
        finally:
            self._engine.hear(None)
        return looks

    def _submit(self) -> None:
        trace = self._trace
        at = self._made % len(trace)
        self._made += 1
        prompt = tuple(self._draw.integers(0, self._engine.vocab, trace.prompts[at]).tolist())
        request = self._engine.request(prompt, trace.outputs[at])
        self._asked[request.id] = trace.outputs[at]
        self._got[request.id] = 0
        self._engine.parts.engine.submit(request)

    def _take_end(self, timeout: float) -> None:
        """Waits for an end; another request takes its place."""
        try:
            output = self._ends.get(timeout=timeout)
        except queue.Empty:
            if not self._engine.parts.engine.healthy:
                raise Unavailable("the engine closed; its log says why") from None
            return
        self._check(output)
        self.answered += 1
        self._submit()

    def _check(self, output: RequestOutput) -> None:
        asked, got = self._asked.pop(output.request_id), self._got.pop(output.request_id)
        if output.error is not None:
            raise output.error
        if output.finish_reason is not FinishReason.ABORT and got != asked:
            raise Internal(f"request {output.request_id!r}: {got} tokens came, {asked} were asked")

    def _end_all(self) -> None:
        for name in tuple(self._asked):
            self._engine.parts.engine.finish(name)
        end = time.perf_counter() + _REST
        while self._asked:
            left = end - time.perf_counter()
            try:
                self._check(self._ends.get(timeout=max(left, 0.0)))
            except queue.Empty:
                raise Internal(f"{len(self._asked)} requests did not end when told to") from None

    def _count(self, outputs: list[RequestOutput]) -> None:
        """On the engine's thread."""
        for output in outputs:
            self._got[output.request_id] += len(output.tokens)
            if output.ended:
                self._ends.put(output)
