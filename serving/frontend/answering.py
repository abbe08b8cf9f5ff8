"""The answers to one request, as a call gives them: submitted, followed, ended. Used by the
service's methods.

    EngineLink.open -> Pending -> Choices -> Piece
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from ...errors import QuireError
from ...sched.request import Request, RequestOutput
from ..answer import Chunk
from ..choices import Choices
from .engine_link import EngineLink
from .pending import Pending

TIMING_WAIT = 1.0
"""Seconds that the end of an answer may wait for the engine to say how long it took."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What became known of one answer, and whether that is the last of the request."""

    chunk: Chunk
    is_last: bool


async def answers(
    link: EngineLink, choices: Choices, request: Request
) -> AsyncGenerator[Piece, None]:
    """Submits a request and yields its pieces; what is pending together for one answer comes as
    one. Closing it early ends the request, and frees its pages.

    Raises:
      QuireError: the request was refused or failed. What came before has been yielded.
    """
    with link.open(request) as pending:
        last = None
        try:
            while True:
                outputs = await pending.take()
                for output in outputs:
                    if output.ended:
                        last = output
                chunks, error = pushed(choices, outputs)
                # Of stop strings the engine does not know.
                for reason, choice in choices.news():
                    link.finish(request.id, reason, choice)
                is_over = choices.finished and error is None
                for chunk in chunks[:-1] if is_over else chunks:
                    yield Piece(chunk, False)
                if error is not None:
                    raise error
                if is_over:
                    end = chunks[-1]
                    if last is None:
                        # The engine may be in the middle of a long step, for which text need not
                        # wait.
                        yield Piece(replace(end, finish_reason=None, stop_reason=None), False)
                        end = _only_the_end(end)
                        last = await _last_of(pending)
                    yield Piece(replace(end, timing=last.timing if last else None), True)
                    return
        finally:
            # Nor of callers who went away.
            for reason, choice in choices.news(leaving=True):
                link.finish(request.id, reason, choice)


def pushed(choices: Choices, outputs: list[RequestOutput]) -> tuple[list[Chunk], QuireError | None]:
    """The chunks that outputs make; and the error that ended the request, to be raised when the
    caller has what came before it."""
    chunks: list[Chunk] = []
    for output in outputs:
        try:
            chunk = choices.push(output)
        except QuireError as error:
            return chunks, error
        if chunk is not None:
            chunks.append(chunk)
    return chunks, None


def _only_the_end(chunk: Chunk) -> Chunk:
    return Chunk(
        "",
        [],
        None if chunk.logprobs is None else [],
        finish_reason=chunk.finish_reason,
        stop_reason=chunk.stop_reason,
        cached_tokens=chunk.cached_tokens,
        index=chunk.index,
    )


async def _last_of(pending: Pending) -> RequestOutput | None:
    """The last output of a request whose text ended it, which says where its time went: it comes
    with the step in which the engine hears of that."""
    try:
        async with asyncio.timeout(TIMING_WAIT):
            while True:
                for output in await pending.take():
                    if output.ended:
                        return output
    except TimeoutError:
        return None
