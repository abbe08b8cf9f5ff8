"""Every error a caller can see, with its gRPC and HTTP status.

Each message names the field, the value and the limit, so that a caller can mend the request without
reading this code. `InvalidRequest` is also a `ValueError`, so offline users may catch either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class QuireError(Exception):
    """Base of all errors Quire raises on purpose.

    Attributes:
      grpc_code: name of the gRPC status code this maps to.
      http_status: HTTP status this maps to.
      results: all results of the call, where `LLM.generate` raises it; others' are whole.
      accounted: a service's metrics and log have it already.
    """

    grpc_code = "INTERNAL"
    http_status = 500
    results: Sequence[Any] = ()
    accounted = False


class InvalidRequest(QuireError, ValueError):
    """The caller asked for something that cannot be done; retrying unchanged will not help."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400


class TooLarge(InvalidRequest):
    """A request or an answer has more bytes than who was to receive it takes.

    Attributes:
      size, limit: bytes; None where they are not known.
    """

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 413

    def __init__(self, message: str, size: int | None = None, limit: int | None = None):
        super().__init__(message)
        self.size, self.limit = size, limit


class Overloaded(QuireError):
    """A bounded queue is full; the caller may retry after `retry_after` seconds."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class Unauthenticated(QuireError):
    """The caller gave no API key, or one that is not known."""

    grpc_code = "UNAUTHENTICATED"
    http_status = 401


class PermissionDenied(QuireError):
    """The caller is known, and may not do this."""

    grpc_code = "PERMISSION_DENIED"
    http_status = 403


class DeadlineExceeded(QuireError):
    """The request's deadline passed before it finished."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504


class Unavailable(QuireError):
    """The engine is starting, stopping or gone; the request may succeed elsewhere or later."""

    grpc_code = "UNAVAILABLE"
    http_status = 503


class Internal(QuireError):
    """A fault on Quire's side, such as not-finite logits in this request's row."""


class InvalidConfig(QuireError, ValueError):
    """A setting is out of range, or settings contradict each other. Raised before serving."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 500


class CheckpointError(QuireError):
    """A checkpoint cannot be read: names the file, the tensor or field, and what was expected."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 500


_SHOWN = 500
"""Characters of a refused value: over gRPC a message must fit a few KiB of trailers."""


def invalid(field: str, value: object, limit: str) -> InvalidRequest:
    """An `InvalidRequest` in the one shape callers see: field, value, limit."""
    if isinstance(value, str) and len(value) > _SHOWN:  # not all of what may be megabytes
        shown = f"{value[:_SHOWN]!r}... ({len(value)} characters)"
    else:
        try:
            shown = repr(value)
        except ValueError:  # Python does not print whole numbers of thousands of digits
            shown = "a number of too many digits"
    if len(shown) > 2 * _SHOWN:
        shown = f"{shown[:_SHOWN]}... ({len(shown)} characters)"
    return InvalidRequest(f"{field}: got {shown}, must be {limit}")
