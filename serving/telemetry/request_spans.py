"""Traces, by OpenTelemetry over OTLP (the extra `otel`): a span a request, made when it ends.

    generate ─┬─ queue     arrival to first slot
              ├─ prefill   to the first token
              └─ decode    to the end

One that embeds is called `embed`. Its parent is the caller's span, where the call's metadata had a
`traceparent`, and it has the caller's `tracestate`. Spans are made from times that the scheduler
took, so tracing costs a running request nothing. Imported only where traces are wanted.
"""

from __future__ import annotations

import threading

from opentelemetry import trace
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ... import __version__
from .report import Report

LAST_SPANS = 2.0
"""Seconds that a server which ends waits for the last spans to be taken."""


class RequestSpans:
    """Makes the spans, and hands them to an exporter from a thread of its own.

    Args:
      exporter: takes finished spans.
      model: what is served.
    """

    def __init__(self, exporter: SpanExporter, model: str):
        self._exporter = exporter
        ours = {"service.name": "quire", "service.version": __version__}
        # `create` alone would put ours before OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES.
        theirs = OTELResourceDetector().detect().attributes
        resource = Resource.create({**ours, **theirs})
        # Not shut down by the interpreter's exit: `close` does it, in order.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("quire", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def ended(self, report: Report) -> None:
        """A request is over. Of one that the engine never had there is nothing to show."""
        account, timing = report.account, report.timing
        if account is None or timing is None:
            return
        end = int(report.ended_at * 1e9)
        begin = end - int(timing.seconds * 1e9)
        context = {"traceparent": report.traceparent, "tracestate": report.tracestate}
        parent = self._propagator.extract(context)
        embeds = account.request.pooled
        span = self._tracer.start_span(
            "embed" if embeds else "generate",
            parent,
            kind=trace.SpanKind.SERVER,
            start_time=begin,
            attributes={
                # Names of OpenTelemetry's conventions for generative AI, where they have one.
                "gen_ai.operation.name": "embeddings" if embeds else "text_completion",
                "gen_ai.request.model": self._model,
                "gen_ai.response.id": report.request_id,
                "gen_ai.response.finish_reasons": [str(report.reason)],
                "gen_ai.usage.input_tokens": report.prompt_tokens,
                "gen_ai.usage.output_tokens": report.output_tokens,
                "quire.cached_tokens": report.cached_tokens,
                "quire.preemptions": timing.preemptions,
                "quire.tenant": report.tenant,
            },
        )
        if report.code:
            span.set_attribute("error.type", report.code)
            span.set_status(trace.StatusCode.ERROR)
        within = trace.set_span_in_context(span)
        at = begin
        parts = {
            "queue": timing.queue_seconds,
            "prefill": timing.prefill_seconds,
            "decode": timing.decode_seconds,
        }
        for name, seconds in parts.items():
            part = self._tracer.start_span(name, within, start_time=at)
            at = min(at + int(seconds * 1e9), end)
            part.end(at)
        span.end(end)

    def close(self) -> None:
        """Sends what was not sent yet, to a collector that takes it in time."""
        # The provider would wait for as long as the exporter tries again.
        giving_up = threading.Timer(LAST_SPANS, self._exporter.shutdown)
        giving_up.daemon = True
        giving_up.start()
        self._provider.shutdown()
        giving_up.cancel()
