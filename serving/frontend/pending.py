"""What an engine gave one request and its handler has not read yet, gathered.

Made by an EngineLink, read by the request's handler, both on the event loop. A handler that is slow
finds one output for each answer, however many steps it missed; what grows meanwhile is a list of
token ids, which the answer's length bounds.

A message to a caller costs a frontend the same whether it holds one token or ten. So with many
requests open, a `Pace` lets each reader wait for more, a little.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from ...sched.request import RequestOutput, TokenLogprobs


class Pace:
    """How often the readers of one event loop are woken for tokens that end nothing.

    A reader that was woken less than `interval` ago waits for the first tokens that come after
    that, but with tokens in hand no longer than `patience`. Both are seconds, and follow the number
    of readers: alone, none waits.
    """

    PER_READER = 60e-6
    """Of `interval`: what a message costs, so that a core sends as many as it can."""

    LONGEST = 0.05

    PATIENCE = 0.8
    """Of `interval`."""

    def __init__(self) -> None:
        self.interval = self.patience = 0.0

    def set(self, readers: int) -> None:
        self.interval = min(readers * self.PER_READER, self.LONGEST)
        self.patience = self.interval * self.PATIENCE


class Pending:
    """The unread outputs of one request. One handler reads it.

    Args:
      request_id: of the request.
      pace: of all readers.
    """

    __slots__ = (
        "_answers",
        "_cached",
        "_error",
        "_id",
        "_pace",
        "_reader",
        "_taken",
        "_timer",
        "_tokens",
    )

    def __init__(self, request_id: str, pace: Pace | None = None) -> None:
        self._id = request_id
        self._pace = pace or Pace()
        self._tokens: list[int] = []  # of choice 0, where nothing else is known of it
        self._cached = 0  # prompt tokens found in the prefix index, as last heard
        self._answers: dict[int, RequestOutput | _Sum] = {}  # by choice
        self._error: RequestOutput | None = None
        self._reader: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._taken = 0.0  # when it was last read, loop.time()

    def put(self, output: RequestOutput) -> None:
        """Adds what a step gave."""
        if output.error is not None:
            self._error = output
        else:
            self._gather(output)
        if output.finish_reason is None:
            self._wake_soon()
        else:
            self._wake()

    def put_tokens(self, tokens: Iterable[int]) -> None:
        """Adds tokens of choice 0 that came with nothing else that is new."""
        if 0 in self._answers:
            self._gather(self._plain(tokens))
        else:
            self._tokens += tokens
        self._wake_soon()

    async def take(self) -> list[RequestOutput]:
        """Waits until there is something; one output for each answer that got on, and then the
        error that ended the request, if one did."""
        while not self._tokens and not self._answers and self._error is None:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
        self._taken = asyncio.get_running_loop().time()
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

    def _wake_soon(self) -> None:
        reader = self._reader
        if reader is None or reader.done():
            return
        loop, pace = reader.get_loop(), self._pace
        if loop.time() - self._taken >= pace.interval:
            reader.set_result(None)
        elif self._timer is None:
            self._timer = loop.call_later(pace.patience, self._wake)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


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
