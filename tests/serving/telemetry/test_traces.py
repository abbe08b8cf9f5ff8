"""Spans of requests, and whose children they are."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from scripted import Scripted

from quire.config import ServerConfig
from quire.errors import InvalidConfig, Overloaded
from quire.serving.telemetry.request_spans import RequestSpans
from quire.serving.telemetry.telemetry import Telemetry, open_telemetry
from quire.serving.telemetry.traceparent import trace_context_of, trace_id_of, traceparent_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


class Traced:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.telemetry = Telemetry()
        spans = RequestSpans(self.exporter, "org/model")
        self.telemetry.add(spans, spans.close)
        self.engine = Scripted(self.telemetry)

    def spans(self) -> dict[str, ReadableSpan]:
        """By name."""
        self.telemetry.close()
        found: Sequence[ReadableSpan] = self.exporter.get_finished_spans()
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_is_a_span_with_its_parts_in_it() -> None:
    traced = Traced()
    s = traced.engine
    s.submit("a", (1, 2, 3), 4, traceparent=PARENT, tenant="acme")
    s.now += 2
    s.step()
    s.run(0.5)
    ended = time.time() + 3.5  # the script's clock runs ahead
    spans = traced.spans()
    whole = spans["generate"]
    assert whole.context is not None and whole.parent is not None and whole.end_time is not None
    assert format(whole.context.trace_id, "032x") == TRACE
    assert format(whole.parent.span_id, "016x") == SPAN and whole.parent.is_remote
    assert whole.kind is SpanKind.SERVER and whole.status.status_code is StatusCode.UNSET
    assert whole.end_time / 1e9 == pytest.approx(ended, abs=60)
    assert dict(whole.attributes or {}) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "org/model",
        "gen_ai.response.id": "a",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "quire.cached_tokens": 0,
        "quire.preemptions": 0,
        "quire.tenant": "acme",
    }
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert [seconds(part) for part in parts] == pytest.approx([2, 0, 1.5])
    at = whole.start_time
    for part in parts:
        assert part.parent == whole.context and part.start_time == at
        at = part.end_time
    assert at == pytest.approx(whole.end_time, abs=10)  # nanoseconds
    assert seconds(whole) == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("metadata", "taken"),
    [
        ([("traceparent", PARENT), ("tracestate", "a=1,b=2")], (PARENT, "a=1,b=2")),
        (
            [("tracestate", "a=1"), ("traceparent", PARENT), ("tracestate", "b=2")],
            (PARENT, "a=1,b=2"),
        ),
        ([("traceparent", "nonsense"), ("tracestate", "a=1")], ("", "")),
        ([("traceparent", PARENT), ("tracestate", f"a={'1' * 511}")], (PARENT, "")),
        ([], ("", "")),
    ],
)
def test_what_tracing_systems_add_counts_beside_a_parent(
    metadata: list[tuple[str, str | bytes]], taken: tuple[str, str]
) -> None:
    assert trace_context_of(metadata) == taken


def test_what_tracing_systems_add_is_in_the_span() -> None:
    for state, kept in (("vendor=1", {"vendor": "1"}), ("no list", {})):
        traced = Traced()
        traced.engine.submit("a", traceparent=PARENT, tracestate=state)
        traced.engine.run(0)
        whole = traced.spans()["generate"]
        assert whole.context is not None and dict(whole.context.trace_state) == kept


def test_what_embeds_is_called_so() -> None:
    traced = Traced()
    traced.engine.submit("a", pooled=True)
    traced.engine.run(0)
    spans = traced.spans()
    assert set(spans) == {"embed", "queue", "prefill", "decode"}
    assert (spans["embed"].attributes or {})["gen_ai.operation.name"] == "embeddings"


def test_without_a_caller_in_a_trace_one_begins() -> None:
    traced = Traced()
    traced.engine.submit("a")
    traced.engine.run(0)
    whole = traced.spans()["generate"]
    assert whole.parent is None and whole.context is not None and whole.context.trace_id


def test_who_does_not_trace_is_not_traced() -> None:
    traced = Traced()
    traced.engine.submit("a", traceparent=f"00-{TRACE}-{SPAN}-00")
    traced.engine.run(0)
    assert not traced.spans()


def test_an_error_marks_the_span() -> None:
    traced = Traced()
    traced.engine.submit("a", deadline=traced.engine.now + 1)
    traced.engine.step(2)
    traced.telemetry.refused(Overloaded("full"), "never-there")
    spans = traced.spans()
    whole = spans["generate"]
    assert whole.status.status_code is StatusCode.ERROR
    assert (whole.attributes or {})["error.type"] == "DEADLINE_EXCEEDED"
    assert seconds(spans["queue"]) == pytest.approx(2) and seconds(spans["decode"]) == 0


def test_who_runs_it_may_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By OpenTelemetry's own environment variables, which docs/metrics.md refers to."""
    for told, name in (({}, "quire"), ({"OTEL_SERVICE_NAME": "chat-eu"}, "chat-eu")):
        for variable, value in told.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=prod")
        traced = Traced()
        traced.engine.submit("a")
        traced.engine.run(0)
        found = traced.spans()["generate"].resource.attributes
        assert found["service.name"] == name and found["service.version"]
        assert found["deployment.environment"] == "prod" and found["telemetry.sdk.name"]


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        (PARENT, PARENT),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-says", f"cc-{TRACE}-{SPAN}-01"),
        (f"00-{TRACE}-{SPAN}-01-more", ""),
        (f"ff-{TRACE}-{SPAN}-01", ""),
        (f"00-{'0' * 32}-{SPAN}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (PARENT.upper(), ""),
        (f"{PARENT}\n", ""),
        ("nonsense", ""),
        ("", ""),
    ],
)
def test_a_header_that_is_none_begins_a_new_trace(header: str, taken: str) -> None:
    assert traceparent_of([("user-agent", "x"), ("traceparent", header)]) == taken
    assert not taken or trace_id_of(taken) == TRACE


def test_metadata_without_a_header() -> None:
    assert traceparent_of([]) == traceparent_of([("traceparent", b"binary")]) == ""


def test_traces_without_the_extra_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(InvalidConfig, match=r"otlp_endpoint: .*pip install 'quire\[otel\]'"):
        open_telemetry(ServerConfig(otlp_endpoint="http://localhost:4317"), "m")


@pytest.mark.parametrize("endpoint", ["localhost:4317", "http://", "ftp://x", "http://a b", ""])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidConfig, match="otlp_endpoint: got"):
        ServerConfig(otlp_endpoint=endpoint)


def test_a_collector_that_is_not_there_delays_nobody() -> None:
    """Nor does it keep a server from ending (the supervisor gives it eight seconds)."""
    telemetry = open_telemetry(ServerConfig(otlp_endpoint="http://127.0.0.1:9"), "m")
    s = Scripted(telemetry)
    s.submit("a")
    s.run(0)
    telemetry.flush(5)
    begin = time.monotonic()
    telemetry.close()
    assert time.monotonic() - begin < 8


def test_what_is_not_asked_for_is_not_imported() -> None:
    code = (
        "from quire.config import ServerConfig\n"
        "from quire.serving.telemetry.telemetry import open_telemetry\n"
        "open_telemetry(ServerConfig(), 'm').close()\n"
        "import sys\n"
        "print({'opentelemetry', 'prometheus_client', 'jax'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"
