"""gRPC's errors as Quire's own, so that callers over the wire catch what callers in process do."""

from __future__ import annotations

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


@contextmanager
def translated() -> Iterator[None]:
    """Raises what a call's failure stands for. The gRPC error is its cause."""
    try:
        yield
    except grpc.RpcError as error:  # grpc.aio's are such, too
        raise _error_of(error) from error


def _error_of(error: grpc.RpcError) -> QuireError:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        after = _retry_after(error)
        return Overloaded(details) if after is None else Overloaded(details, after)
    kind = _PLAIN.get(code)
    return kind(details) if kind is not None else QuireError(f"{code.name}: {details}")


def _retry_after(error: grpc.RpcError) -> float | None:
    trailing: Any = error.trailing_metadata()  # pairs, whatever the stubs say
    for name, value in trailing or ():
        if name == "retry-after":
            try:
                return float(value)
            except ValueError:
                return None
    return None
