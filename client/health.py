"""Whether a server is ready: what both clients ask, how they read it, how long they wait."""

from __future__ import annotations

import time

import grpc
from grpc_health.v1 import health_pb2

from ..errors import DeadlineExceeded, invalid
from . import checks
from .channel import SERVICE

LOOK_EVERY = 0.2
"""Seconds between two looks."""

QUESTION = health_pb2.HealthCheckRequest(service=SERVICE)

_LONGEST_LOOK = 5.0


def why_not(answer: health_pb2.HealthCheckResponse) -> str:
    """Why the server is not ready, by what it says; empty if it is."""
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"it says {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def why_no_answer(error: grpc.RpcError) -> str:
    """Likewise, where it did not say anything."""
    return f"{error.code().name}: {error.details()}"


class Wait:
    """A wait until a server serves, of `timeout` seconds at most; raises InvalidRequest."""

    def __init__(self, address: str, timeout: float):
        if checks.timeout("timeout", timeout) is None:
            raise invalid("timeout", timeout, "a number of seconds")
        self._address, self._timeout = address, timeout
        self._end = time.monotonic() + timeout
        self._why_not = ""

    def next_look(self) -> float:
        """Seconds that the next look may take; raises DeadlineExceeded when time is up."""
        left = self._end - time.monotonic()
        if left <= 0:
            why = f" ({self._why_not})" if self._why_not else ""
            raise DeadlineExceeded(f"{self._address}: not ready within {self._timeout:g} s{why}")
        return min(left, _LONGEST_LOOK)

    def saw(self, why_not: str) -> None:
        """What a look saw. That it was cut short says less than what one before it saw."""
        if not self._why_not or time.monotonic() < self._end:
            self._why_not = why_not
