"""A request that is over, as those who keep account of it see it: metrics, log and traces."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ...errors import QuireError
from ...sched.request import Ended, FinishReason, RequestOutput, Timing


@dataclass(frozen=True, slots=True)
class Report:
    """One request, accepted or refused.

    Attributes:
      tenant: who asked; empty where it is not known.
      reason: why it ended; a refused one is an ERROR.
      code: name of the gRPC status, where it ended with an error.
      error: the same in words. They may quote what the caller sent.
      timing: None where it was refused, or the engine stopped under it.
      account: likewise.
      cached_tokens: prompt tokens that came from the prefix index.
      ended_at: when, in seconds since the epoch.
    """

    request_id: str
    tenant: str
    reason: FinishReason
    code: str | None
    error: QuireError | None
    timing: Timing | None
    account: Ended | None
    cached_tokens: int
    ended_at: float

    @property
    def prompt_tokens(self) -> int:
        return len(self.account.request.prompt) if self.account else 0

    @property
    def output_tokens(self) -> int:
        return self.account.output_tokens if self.account else 0

    @property
    def traceparent(self) -> str:
        return self.account.request.traceparent if self.account else ""

    @property
    def tracestate(self) -> str:
        return self.account.request.tracestate if self.account else ""


def report_of(output: RequestOutput) -> Report:
    """Of the last output of a request."""
    account, ended_at = output.account, time.time()
    if account is not None:
        ended_at -= time.monotonic() - account.ended_at
    error = output.error
    return Report(
        request_id=output.request_id,
        tenant=account.request.tenant if account else "",
        reason=output.finish_reason or FinishReason.ERROR,
        code=error.grpc_code if error else None,
        error=error,
        timing=output.timing,
        account=account,
        cached_tokens=output.cached_tokens,
        ended_at=ended_at,
    )


def report_of_refused(error: QuireError, request_id: str, tenant: str) -> Report:
    """Of a request that the engine never had, or that failed behind its back."""
    return Report(
        request_id=request_id,
        tenant=tenant,
        reason=FinishReason.ERROR,
        code=error.grpc_code,
        error=error,
        timing=None,
        account=None,
        cached_tokens=0,
        ended_at=time.time(),
    )
