"""How a call ends with an error: the status, its message, and when to try again."""

from __future__ import annotations

import math
import traceback
from typing import NoReturn
from urllib.parse import quote

import grpc

from ...errors import Overloaded, QuireError

_MOST_DETAILS = 6_000
"""Bytes of an error's message; clients drop a call whose trailers take more than 8 KiB."""


async def end_with(context: grpc.aio.ServicerContext, error: QuireError) -> NoReturn:
    """Ends a call with the status that an error stands for."""
    if isinstance(error, Overloaded):
        context.set_trailing_metadata((("retry-after", in_seconds(error.retry_after)),))
    await context.abort(getattr(grpc.StatusCode, error.grpc_code), _details(error))
    raise AssertionError("abort raises")


def let_go(error: BaseException | None) -> None:
    """Empties the frames that an error came through.

    grpc keeps the error by which a call ended, and that keeps the call, until the garbage collector
    finds both. Messages of many megabytes would lie in those frames as long.
    """
    seen, left = set[int](), [error]
    while left:
        error = left.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            left += [error.__cause__, error.__context__]
            if isinstance(error, BaseExceptionGroup):  # of the inputs of an Embed
                left += error.exceptions


def in_seconds(wait: float) -> str:
    """Seconds to wait as metadata: decimal, and rounded up to milliseconds, never to less."""
    thousandths = math.ceil(wait * 1000)
    return f"{thousandths // 1000}.{thousandths % 1000:03}".rstrip("0").rstrip(".")


def _details(error: QuireError) -> str:
    """The message, cut where it would not fit into trailers: callers would get another error."""
    text = str(error)
    while len(quote(text)) > _MOST_DETAILS:  # that is how it travels
        text = text[: len(text) * 3 // 4] + "..."
    return text
