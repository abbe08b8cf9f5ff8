"""Metrics of requests, observed when they end. docs/metrics.md lists them.

Used on the telemetry thread alone. What the engine counts by itself is in engine_metrics.py.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from ...sched.request import FinishReason
from .report import Report

MOST_TENANTS = 20
"""Tenants with series of their own. Each has about ninety; who comes later shares one label, so
that callers cannot grow what is kept here, nor what Prometheus stores, by making names up. A scrape
takes the interpreter from the engine's thread for some 10 us a series."""

NO_TENANT, OTHER_TENANTS = "default", "other"

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_PER_TOKEN = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04),
    *(0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5),
)
_TOKENS = tuple(2**power for power in range(0, 21, 2))


class Tenants:
    """The names of tenants in labels: the first so many as they are, the rest together."""

    def __init__(self, most: int = MOST_TENANTS):
        self._most, self._known = most, {NO_TENANT}

    def label(self, tenant: str) -> str:
        tenant = tenant or NO_TENANT
        if tenant in self._known:
            return tenant
        if len(self._known) > self._most:  # NO_TENANT does not count
            return OTHER_TENANTS
        self._known.add(tenant)
        return tenant


class RequestMetrics:
    """Counters and histograms of requests in `registry`."""

    def __init__(self, registry: CollectorRegistry):
        self._tenants = Tenants()

        def seconds(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["tenant", *labels], registry=registry)

        def tokens(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=_TOKENS, registry=registry)

        self._queue = seconds(
            "quire_request_queue_seconds",
            "From a request's arrival to its first slot.",
            _SHORT,
            "tenant",
        )
        self._first = seconds(
            "quire_time_to_first_token_seconds",
            "From a request's arrival in the engine to its first token.",
            _SHORT,
            "tenant",
        )
        self._per_token = seconds(
            "quire_time_per_output_token_seconds",
            "Of a request, the time from its first token to its end per further token.",
            _PER_TOKEN,
            "tenant",
        )
        self._whole = seconds(
            "quire_request_duration_seconds",
            "From a request's arrival in the engine to its end, of requests that were answered.",
            _LONG,
            "tenant",
        )
        self._prefill = seconds(
            "quire_request_prefill_seconds",
            "From a request's first slot to its first token.",
            _SHORT,
        )
        self._decode = seconds(
            "quire_request_decode_seconds", "From a request's first token to its end.", _LONG
        )
        self._prompts = tokens("quire_request_prompt_tokens", "Prompt tokens of a request.")
        self._outputs = tokens(
            "quire_request_output_tokens", "Output tokens of a request, of all its answers."
        )
        self._finished = counter(
            "quire_requests_finished", "Requests that the engine had and that ended.", "reason"
        )
        self._errors = counter(
            "quire_request_errors", "Requests that were refused or ended with an error.", "code"
        )
        self._prompt_total = counter(
            "quire_tenant_prompt_tokens", "Prompt tokens of requests that ended."
        )
        self._cached_total = counter(
            "quire_tenant_cached_tokens", "Of those, tokens found in the prefix index."
        )
        self._output_total = counter(
            "quire_tenant_output_tokens", "Output tokens of requests that ended."
        )
        # Rates of counters that begin with their first error would miss it.
        for reason in FinishReason:
            self._finished.labels(NO_TENANT, reason)
        for code in _CODES:
            self._errors.labels(NO_TENANT, code)

    def ended(self, report: Report) -> None:
        """A request is over."""
        tenant = self._tenants.label(report.tenant)
        if report.code:
            self._errors.labels(tenant, report.code).inc()
        account, timing = report.account, report.timing
        if account is None or timing is None:
            return
        self._finished.labels(tenant, report.reason).inc()
        self._prompts.observe(report.prompt_tokens)
        self._outputs.observe(report.output_tokens)
        self._prompt_total.labels(tenant).inc(report.prompt_tokens)
        self._cached_total.labels(tenant).inc(report.cached_tokens)
        self._output_total.labels(tenant).inc(report.output_tokens)
        self._queue.labels(tenant).observe(timing.queue_seconds)
        if report.output_tokens:
            self._first.labels(tenant).observe(timing.first_token_seconds)
            self._prefill.observe(timing.prefill_seconds)
            self._decode.observe(timing.decode_seconds)
            further = report.output_tokens / len(account.answers) - 1
            if further > 0:
                self._per_token.labels(tenant).observe(timing.decode_seconds / further)
        if report.reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._whole.labels(tenant).observe(timing.seconds)


_CODES = (
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "DEADLINE_EXCEEDED",
    "UNAVAILABLE",
    "INTERNAL",
)
