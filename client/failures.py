"""gRPC's errors as Quire's own, so that callers over the wire catch what callers in process do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from ..errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    QuireError,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

_PLAIN: dict[grpc.StatusCode, type[QuireError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}

_MESSAGE = re.compile(
    r"(?:.*\b(CLIENT|SERVER): (Received|Sent) |Decompressed )message larger than max"
    r"(?: \((\d+) vs\. (\d+)\)\)?)?"
)
_METADATA = re.compile(
    r"received (?:\w+ )?metadata size exceeds \w+ limit \([^)]*?(\d+) vs\. (\d+)\).*"
)
"""What grpc itself says, by the status that Quire's servers have for a full queue."""


@contextmanager
def translated() -> Iterator[None]:
    """Raises what a call's failure stands for. The gRPC error is its cause."""
    try:
        yield
    except grpc.RpcError as error:  # grpc.aio's are such, too
        raise _error_of(error) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # grpc.aio's word for a call that was closed under its reader, whom nobody cancelled.
        raise QuireError("CANCELLED: the stream or its client was closed") from error


def _error_of(error: grpc.RpcError) -> QuireError:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if found := _MESSAGE.fullmatch(details):
            return _too_large(*found.groups())
        if found := _METADATA.fullmatch(details):
            size, limit = map(int, found.groups())
            said = f"metadata: got {size} bytes, must be at most {limit}, what the server takes"
            return TooLarge(said, size, limit)
        after = _retry_after(error)
        return Overloaded(details) if after is None else Overloaded(details, after)
    kind = _PLAIN.get(code)
    return kind(details) if kind is not None else QuireError(f"{code.name}: {details}")


def _too_large(who: str | None, did: str | None, size: str | None, limit: str | None) -> TooLarge:
    """As grpc says it: who could not do what, with how many bytes, of how many at most."""
    is_answer = (who, did) in (("CLIENT", "Received"), ("SERVER", "Sent"))
    what = "answer" if is_answer else "request" if who else "request or answer, unpacked"
    hint = "; a stream's messages are smaller" if is_answer else ""
    whose = "this client" if who == "CLIENT" else "the server" if who else "its receiver"
    if size is None or limit is None:
        return TooLarge(f"{what}: got more bytes than {whose} takes{hint}")
    said = f"{what}: got {size} bytes, must be at most {limit}, what {whose} takes{hint}"
    return TooLarge(said, int(size), int(limit))


def _retry_after(error: grpc.RpcError) -> float | None:
    trailing: Any = error.trailing_metadata()  # pairs, whatever the stubs say
    for name, value in trailing or ():
        if name == "retry-after":
            try:
                return float(value)
            except ValueError:
                return None
    return None
