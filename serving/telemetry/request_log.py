"""One log line a request, accepted or refused: who asked, what it took, how it ended.

Never what was asked or answered, unless the operator wants that (`--log-prompts`): error messages,
which may quote the request, are left out too, but for those about Quire's own state. Calls without
a known API key share a line: whoever reaches the port can make as many as the network carries.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import DeadlineExceeded, Internal, Overloaded, Unauthenticated, Unavailable
from .logs import fields
from .report import Report
from .traceparent import trace_id_of

log = logging.getLogger(__name__)

_QUOTE_NOTHING = (Overloaded, DeadlineExceeded, Unavailable, Internal)
"""Errors whose messages hold no more of a request than its id."""

STRANGERS_EVERY = 60.0
"""Seconds between lines about calls without a known API key."""

TextOf = Callable[[Sequence[int]], str]


class RequestLog:
    """Writes the lines.

    Args:
      prompts: also log what was asked and answered.
      clock: seconds that only grow.
    """

    def __init__(self, *, prompts: bool = False, clock: Callable[[], float] = time.monotonic):
        self._prompts, self._clock = prompts, clock
        self._strangers = 0  # calls, since there was a line about them
        self._next_line = clock()  # about them, at the earliest
        self.text_of: TextOf | None = None
        """Text of token ids; without it prompts are logged as token ids."""

    def ended(self, report: Report) -> None:
        """A request is over."""
        if isinstance(report.error, Unauthenticated):
            self._strangers += 1
            if self._clock() >= self._next_line:
                self._next_line = self._clock() + STRANGERS_EVERY
                self._tell_strangers()
            return
        level = logging.ERROR if report.code == "INTERNAL" else logging.INFO
        if not log.isEnabledFor(level):
            return
        said: dict[str, Any] = {
            "request_id": report.request_id,
            "tenant": report.tenant,
            "finish_reason": str(report.reason),
            "code": report.code,
        }
        if isinstance(report.error, _QUOTE_NOTHING):
            said["error"] = str(report.error)
        if report.account is not None:
            said |= {
                "prompt_tokens": report.prompt_tokens,
                "cached_tokens": report.cached_tokens,
                "output_tokens": report.output_tokens,
            }
        if report.timing is not None:
            said |= {
                "queue_seconds": round(report.timing.queue_seconds, 6),
                "prefill_seconds": round(report.timing.prefill_seconds, 6),
                "decode_seconds": round(report.timing.decode_seconds, 6),
                "preemptions": report.timing.preemptions,
            }
        if report.traceparent:
            said["trace_id"] = trace_id_of(report.traceparent)
        if self._prompts:
            said |= self._contents(report)
        what = "refused" if report.account is None else "ended"
        log.log(level, "request %s", what, extra=fields(**said))

    def close(self) -> None:
        """Tells what is still to be told."""
        if self._strangers:
            self._tell_strangers()

    def _tell_strangers(self) -> None:
        said = fields(calls=self._strangers, code=Unauthenticated.grpc_code)
        log.warning("calls without a known API key were refused", extra=said)
        self._strangers = 0

    def _contents(self, report: Report) -> dict[str, Any]:
        account = report.account
        if account is None:
            return {}
        prompt = account.request.prompt
        outputs = [tokens[len(prompt) :].tolist() for tokens in account.answers]
        if self.text_of is None:
            return {"prompt_token_ids": list(prompt), "output_token_ids": outputs}
        return {
            "prompt": self.text_of(prompt),
            "outputs": [self.text_of(tokens) for tokens in outputs],
        }
