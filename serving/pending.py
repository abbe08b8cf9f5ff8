"""What an engine gave one request and its handler has not read yet, gathered.

Made by an EngineLink, read by the request's handler, both on the event loop. A handler that is slow
finds one output for each answer, however many steps it missed; what grows meanwhile is a list of
token ids, which the answer's length bounds.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from ..sched.request import RequestOutput, TokenLogprobs


class Pending:
    """The unread outputs of one request. One handler reads it."""

    def __init__(self) -> None:
        self._answers: dict[int, RequestOutput | _Sum] = {}  # by choice
        self._error: RequestOutput | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        """Adds what a step gave."""
        if output.error is not None:
            self._error = output
        else:
            held = self._answers.get(output.choice)
            if held is None:
                self._answers[output.choice] = output
            elif isinstance(held, _Sum):
                held.add(output)
            else:
                self._answers[output.choice] = _Sum(held, output)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[RequestOutput]:
        """Waits until there is something; one output for each answer that got on, and then the
        error that ended the request, if one did."""
        while not self._answers and self._error is None:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        outputs = [
            held.output() if isinstance(held, _Sum) else held for held in self._answers.values()
        ]
        self._answers = {}
        if self._error is not None:
            outputs.append(self._error)
            self._error = None
        return outputs


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
        return replace(
            self._last,
            tokens=tuple(self._tokens),
            logprobs=None if self._first.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=self._first.prompt_logprobs,
        )
