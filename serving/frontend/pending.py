"""What an engine gave one request and its handler has not read yet, gathered; and whose turn it is.

Made by an EngineLink, read by the request's handler, both on the event loop. A handler that is slow
finds one output for each answer, however many steps it missed; what grows meanwhile is a list of
token ids, which the answer's length bounds.

A message to a caller costs a frontend the same whether it holds one token or ten, and an engine's
step brings tokens for all callers at once. So readers are woken one after the other, by a `Pace`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from ...sched.request import RequestOutput, TokenLogprobs


class Pace:
    """When the readers of one event loop are woken for tokens that end nothing: in the order in
    which they got them, no more in a second than a core can send messages. Whoever waits gets more
    tokens meanwhile. All times are seconds.

    Args:
      clock: seconds; no event loop's, because that of some stands still while they are busy.
      spent: seconds of CPU that the process took so far.
    """

    PER_MESSAGE = 60e-6
    """Between two readers, until it is known what a message costs here."""

    MEASURED = 2_000
    """Messages, over which that is measured anew: what the process computed meanwhile, for each."""

    SPARE = 1.12
    """Of what a message costs, between two readers: more than 1, so that a core keeps up."""

    COSTS = 25e-6, 150e-6
    """The least and the most that is believed of it, in seconds of CPU: a process that has other
    work too (prompts to tokenize) measures too much."""

    BURST = 10e-3
    """Of turns that may come at once after a lull, or after a look that came late."""

    LONGEST = 0.05
    """That a round over all who wait takes."""

    TICK = 1e-3
    """Between two looks, unless some are overdue; the timers of event loops are no finer."""

    AT_ONCE = 8
    """Readers woken by one look, which keep an event loop busy for 0.3 ms or so. Between looks it
    takes in a new call (which needs three turns of the loop until it is read), and an engine's
    step, whose first tokens wait for nobody and whose others go with the next messages."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[], float] = time.process_time,
    ) -> None:
        self._clock, self._cpu = clock, spent
        self._queue: deque[tuple[Pending, float]] = deque()  # and when its turn comes at the latest
        self._per_message = self.PER_MESSAGE
        self._woken, self._spent = 0, spent()  # since when it is measured
        self._due = 0.0  # when the next may be woken
        self._is_set = False  # a look is due
        self._way_until = 0.0  # when a call that comes in is in
        self._made_way = False  # the last look was put off for it

    def join(self, pending: Pending) -> None:
        """Queues one whose reader waits, and which has something for it."""
        self._queue.append((pending, self._clock() + self.LONGEST))
        if not self._is_set:
            self._is_set = True
            asyncio.get_running_loop().call_soon(self._look)  # when all of a step have joined

    def make_way(self) -> None:
        """A new call is on its way in, for which the event loop has to turn several times: with
        messages in each turn it would wait for some thirty of them. A look that is due within a
        tick is put off by one, but never two in a row."""
        self._way_until = self._clock() + self.TICK

    def _look(self) -> None:
        queue, now = self._queue, self._clock()
        may = now < self._way_until and now < queue[0][1]  # not where somebody is overdue
        self._made_way = may and not self._made_way
        if self._made_way:
            asyncio.get_running_loop().call_later(self.TICK, self._look)
            return
        due = max(self._due, now - self.BURST)
        for _ in range(min(len(queue), self.AT_ONCE)):
            if min(due, queue[0][1]) > now:
                break
            if due <= now:  # evenly, so that the last one's is not late
                due += min(self._per_message, max(0.0, queue[-1][1] - due) / len(queue))
            queue.popleft()[0].call()
            self._woken += 1
        if self._woken >= self.MEASURED:
            self._measure()
        self._due = due
        self._is_set = bool(queue)
        if queue:
            wait = min(due, queue[0][1]) - now
            wait = 0.0 if wait <= 0 else max(wait, self.TICK)
            asyncio.get_running_loop().call_later(wait, self._look)

    def _measure(self) -> None:
        """A shared machine is slower in one hour than in another, and a token with log-probs costs
        more than one without."""
        spent = self._cpu()
        least, most = self.COSTS
        cost = (spent - self._spent) / self._woken
        self._per_message = self.SPARE * min(max(cost, least), most)
        self._woken, self._spent = 0, spent


class Pending:
    """The unread outputs of one request. One handler reads it.

    Args:
      request_id: of the request.
      pace: of all readers.
    """

    __slots__ = (
        "_answers",
        "_at_once",
        "_cached",
        "_error",
        "_id",
        "_is_queued",
        "_pace",
        "_reader",
        "_tokens",
    )

    def __init__(self, request_id: str, pace: Pace | None = None) -> None:
        self._id = request_id
        self._pace = pace or Pace()
        self._is_queued = False  # by the pace
        self._tokens: list[int] = []  # of choice 0, where nothing else is known of it
        self._cached = 0  # prompt tokens found in the prefix index, as last heard
        self._answers: dict[int, RequestOutput | _Sum] = {}  # by choice
        self._error: RequestOutput | None = None
        self._reader: asyncio.Future[None] | None = None  # until it is woken
        self._at_once = True  # the first tokens of all, and what ends an answer, wait for no turn

    def put(self, output: RequestOutput) -> None:
        """Adds what a step gave."""
        if output.error is not None:
            self._error = output
        else:
            self._gather(output)
        if output.finish_reason is not None:
            self._at_once = True
        self._came()

    def put_tokens(self, tokens: Iterable[int]) -> None:
        """Adds tokens of choice 0 that came with nothing else that is new."""
        if self._answers and 0 in self._answers:
            self._gather(self._plain(tokens))
        else:
            self._tokens += tokens
        self._came()

    def call(self) -> None:
        """It is this one's turn."""
        self._is_queued = False
        if self._reader is not None and self._has_some:
            self._wake(self._reader)

    async def take(self) -> list[RequestOutput]:
        """Waits until there is something, and for its turn; one output for each answer that got on,
        and then the error that ended the request, if one did."""
        if not (self._at_once and self._has_some):
            self._reader = reader = asyncio.get_running_loop().create_future()
            if self._has_some:
                self._came()
            try:
                await reader
            finally:
                self._reader = None
        self._at_once = False
        outputs = []
        if self._tokens:
            outputs.append(self._plain(self._tokens))
            self._tokens = []
        if self._answers:
            outputs += [
                held.output() if isinstance(held, _Sum) else held for held in self._answers.values()
            ]
            self._answers = {}
        if self._error is not None:
            outputs.append(self._error)
            self._error = None
        return outputs

    @property
    def _has_some(self) -> bool:
        return bool(self._tokens or self._answers or self._error)

    def _came(self) -> None:
        """There is something, for a reader that may wait."""
        if self._reader is None:
            return
        if self._at_once:
            self._wake(self._reader)
        elif not self._is_queued:
            self._is_queued = True
            self._pace.join(self)

    def _wake(self, reader: asyncio.Future[None]) -> None:
        self._reader = None
        if not reader.done():  # or it leaves
            reader.set_result(None)

    def _gather(self, output: RequestOutput) -> None:
        self._cached = output.cached_tokens
        if self._tokens and not output.choice:
            before, self._tokens = self._plain(self._tokens), []
            self._answers[0] = before
        held = self._answers.get(output.choice)
        if held is None:
            self._answers[output.choice] = output
        elif isinstance(held, _Sum):
            held.add(output)
        else:
            self._answers[output.choice] = _Sum(held, output)

    def _plain(self, tokens: Iterable[int]) -> RequestOutput:
        return RequestOutput(self._id, tuple(tokens), cached_tokens=self._cached)


class _Sum:
    """Several outputs of one answer as one."""

    __slots__ = ("_first", "_last", "_logprobs", "_tokens")

    def __init__(self, first: RequestOutput, second: RequestOutput):
        self._first = self._last = first
        self._tokens = list(first.tokens)
        self._logprobs: list[TokenLogprobs] = list(first.logprobs or ())
        self.add(second)

    def add(self, output: RequestOutput) -> None:
        self._last = output
        self._tokens += output.tokens
        if output.logprobs is not None:
            self._logprobs += output.logprobs

    def output(self) -> RequestOutput:
        has_logprobs = self._first.logprobs is not None or self._last.logprobs is not None
        return replace(
            self._last,
            tokens=tuple(self._tokens),
            logprobs=tuple(self._logprobs) if has_logprobs else None,
            prompt_logprobs=self._first.prompt_logprobs,
        )
