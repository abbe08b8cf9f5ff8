"""What a scrape shows, against an engine whose every second is scripted."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest
from scripted import Samples, Scripted, samples_in, scrape

from quire.config import ServerConfig
from quire.errors import InvalidRequest, Overloaded, Unavailable
from quire.sched.request import FinishReason, RequestOutput
from quire.sched.stats import STEP_BOUNDS
from quire.serving.telemetry.request_metrics import MOST_TENANTS, Tenants
from quire.serving.telemetry.telemetry import Telemetry, open_telemetry


class Measured(Telemetry):
    """Without a port."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = self.keep_metrics()


@pytest.fixture
def telemetry() -> Iterator[Measured]:
    telemetry = Measured()
    yield telemetry
    telemetry.close()


def seen(telemetry: Measured) -> Samples:
    telemetry.flush(20)
    return samples_in(generate_latest(telemetry.registry).decode())


def one(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def each(samples: Samples, name: str, **labels: str) -> list[float]:
    """The values of all series of a name that have these labels."""
    wanted = set(labels.items())
    series = ((found, set(has), value) for (found, has), value in samples.items())
    return [value for found, has, value in series if found == name and wanted <= has]


def test_there_is_something_to_scrape_before_there_is_an_engine(telemetry: Measured) -> None:
    samples = seen(telemetry)
    assert one(samples, "quire_engine_ready") == 0
    assert one(samples, "process_resident_memory_bytes") > 1e6
    assert not any(name == "quire_requests_running" for name, _ in samples)
    # A rate over errors sees the first of them only if there was a series before.
    assert one(samples, "quire_request_errors_total", tenant="default", code="INTERNAL") == 0


def test_gauges_are_those_of_the_moment(telemetry: Measured) -> None:
    s = Scripted(telemetry)
    telemetry.watch(s.source)
    for n in range(6):  # on four slots
        s.submit(f"r{n}", prompt=(n + 1,) * 5, max_tokens=3)
    s.step()
    samples = seen(telemetry)
    expected = {
        "quire_engine_ready": 1,
        "quire_requests_running": 4,
        "quire_requests_waiting": 2,
        "quire_slots": 4,
        "quire_kv_pages": 32,
        "quire_kv_pages_used": 8,
        "quire_kv_page_tokens": 4,
        "quire_frontends": 2,
        "quire_kv_utilization_ratio": 0.25,
        "quire_compiles_after_ready_total": 0,
    }
    assert {name: one(samples, name) for name in expected} == expected
    assert one(samples, "quire_model_info", model="org/model", version="0.1.0.dev0") == 1
    assert one(samples, "quire_process_restarts_total", process="engine") == 1
    assert one(samples, "quire_process_restarts_total", process="frontend") == 3
    s.compiles = 2
    s.run(0)
    samples = seen(telemetry)
    assert one(samples, "quire_requests_running") == one(samples, "quire_kv_pages_used") == 0
    assert one(samples, "quire_kv_pages_cached") > 0
    assert one(samples, "quire_compiles_after_ready_total") == 2
    s.engine.stop()
    assert one(seen(telemetry), "quire_engine_ready") == 0


def test_counters_and_steps(telemetry: Measured) -> None:
    s = Scripted(telemetry)
    telemetry.watch(s.source)
    s.submit("a", prompt=(1, 2, 3, 4, 5), max_tokens=3)
    s.run(0)
    s.submit("b", prompt=(1, 2, 3, 4, 5, 6), max_tokens=1)
    s.run(0)
    samples, stats = seen(telemetry), s.engine.stats()
    expected = {
        "quire_prompt_tokens_total": 11,
        "quire_output_tokens_total": 4,
        "quire_prefix_queried_tokens_total": 11,
        "quire_prefix_hit_tokens_total": 4,
        "quire_step_tokens_total": 5 + 2 + 2,
        "quire_step_padding_tokens_total": stats.padded_tokens - stats.real_tokens,
        "quire_preemptions_total": 0,
        "quire_failed_steps_total": 0,
        "quire_recomputed_tokens_total": 0,
    }
    assert {name: one(samples, name) for name in expected} == expected
    counts = {
        k: one(samples, "quire_step_seconds_count", kind=k) for k in s.engine.step_times.counts
    }
    assert counts == {"prefill": 2, "decode": 2, "mixed": 0}
    buckets = [
        one(samples, "quire_step_seconds_bucket", kind="prefill", le=le)
        for le in [*map(str, STEP_BOUNDS), "+Inf"]
    ]
    assert buckets == [2] * len(buckets)  # the clock stood still


def test_preemptions_and_failed_steps(telemetry: Measured) -> None:
    s = Scripted(telemetry, pages=9, prefix_caching=False)
    s.runner.fail_collect = (40,)
    telemetry.watch(s.source)
    for n in range(3):
        s.submit(f"r{n}", prompt=(n + 1,) * 4, max_tokens=20)
    s.run(0)
    samples, stats = seen(telemetry), s.engine.stats()
    assert one(samples, "quire_preemptions_total") == stats.preemptions > 0
    assert one(samples, "quire_recomputed_tokens_total") == stats.recomputed_tokens > 0
    assert one(samples, "quire_failed_steps_total") == 1


def test_requests_are_observed_when_they_end(telemetry: Measured) -> None:
    s = Scripted(telemetry)
    s.submit("a", prompt=(1, 2, 3), max_tokens=4, tenant="x")
    s.now += 2  # waits
    s.step()  # the prompt and the first token, in no time
    assert not each(seen(telemetry), "quire_requests_finished_total", tenant="x")
    s.run(0.03)  # three more tokens
    samples = seen(telemetry)

    def total(name: str, **labels: str) -> float:
        assert one(samples, f"{name}_count", **labels) == 1
        return one(samples, f"{name}_sum", **labels)

    assert total("quire_request_queue_seconds", tenant="x") == pytest.approx(2)
    assert total("quire_time_to_first_token_seconds", tenant="x") == pytest.approx(2)
    assert total("quire_request_prefill_seconds") == pytest.approx(0)
    assert total("quire_request_decode_seconds") == pytest.approx(0.09)
    assert total("quire_time_per_output_token_seconds", tenant="x") == pytest.approx(0.03)
    assert total("quire_request_duration_seconds", tenant="x") == pytest.approx(2.09)
    bucket = "quire_time_to_first_token_seconds_bucket"
    assert one(samples, bucket, tenant="x", le="1.0") == 0
    assert one(samples, bucket, tenant="x", le="2.5") == 1
    assert one(samples, "quire_requests_finished_total", tenant="x", reason="length") == 1
    assert one(samples, "quire_tenant_prompt_tokens_total", tenant="x") == 3
    assert one(samples, "quire_tenant_output_tokens_total", tenant="x") == 4
    assert one(samples, "quire_request_prompt_tokens_sum") == 3
    assert one(samples, "quire_request_output_tokens_sum") == 4


def test_cached_tokens_are_the_tenants_own(telemetry: Measured) -> None:
    s = Scripted(telemetry)
    for n, tenant in enumerate(("x", "x", "y")):
        s.submit(f"r{n}", prompt=(1, 2, 3, 4, 5), max_tokens=1, tenant=tenant)
        s.run(0)
    samples = seen(telemetry)
    assert one(samples, "quire_tenant_cached_tokens_total", tenant="x") == 4
    assert one(samples, "quire_tenant_cached_tokens_total", tenant="y") == 0


def test_errors_by_code_and_tenant(telemetry: Measured) -> None:
    s = Scripted(telemetry)
    s.submit("late", tenant="x", deadline=s.now + 1)
    s.submit("bad", prompt=(9,), tenant="x")
    s.step(0.5)
    s.runner.poisoned_slots = {0, 1}
    s.step(0)
    s.submit("gone")
    s.engine.finish("gone")
    s.run(2)
    telemetry.refused(Overloaded("full"), tenant="y")
    telemetry.refused(InvalidRequest("temperature: got -1"), tenant="y")
    telemetry.refused(InvalidRequest("top_p: got 7"), tenant="y")
    samples = seen(telemetry)

    def errors(code: str, tenant: str) -> float:
        return one(samples, "quire_request_errors_total", code=code, tenant=tenant)

    assert errors("INTERNAL", "x") == 2
    assert errors("RESOURCE_EXHAUSTED", "y") == 1 and errors("INVALID_ARGUMENT", "y") == 2
    assert one(samples, "quire_requests_finished_total", tenant="x", reason="error") == 2
    assert one(samples, "quire_requests_finished_total", tenant="default", reason="abort") == 1
    # None of them was answered; those refused are not counted as finished.
    for name in ("quire_request_duration_seconds_count", "quire_requests_finished_total"):
        assert not sum(each(samples, name, tenant="y"))
    assert not sum(each(samples, "quire_request_duration_seconds_count"))


def test_requests_that_the_engine_left_behind_are_errors(telemetry: Measured) -> None:
    s = Scripted(telemetry)
    s.submit("a")
    s.engine.stop(drain=False)
    samples = seen(telemetry)
    assert one(samples, "quire_request_errors_total", code="UNAVAILABLE", tenant="default") == 1


def test_a_tenants_label_is_bounded() -> None:
    tenants = Tenants(most=2)
    assert [tenants.label(t) for t in ("", "a", "b", "c", "a", "", "d")] == [
        *("default", "a", "b", "other", "a", "default", "other")
    ]


def test_made_up_tenants_cannot_grow_what_is_exported(telemetry: Measured) -> None:
    for n in range(3 * MOST_TENANTS):
        telemetry.refused(Overloaded("full"), tenant=f"t{n}")
    samples = seen(telemetry)
    tenants = {dict(labels).get("tenant") for _, labels in samples} - {None}
    assert len(tenants) == MOST_TENANTS + 2
    assert (
        one(samples, "quire_request_errors_total", code="RESOURCE_EXHAUSTED", tenant="other")
        == 2 * MOST_TENANTS
    )


def test_what_cannot_be_told_in_time_is_dropped_and_counted(
    telemetry: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.serving.telemetry.telemetry.MOST_PENDING", 3)
    held = threading.Event()

    class Slow:
        def ended(self, report: object) -> None:
            assert held.wait(20)

    telemetry.add(Slow())
    for _ in range(20):
        telemetry.refused(Overloaded("full"), tenant="x")
    held.set()
    samples = seen(telemetry)
    told = one(samples, "quire_request_errors_total", code="RESOURCE_EXHAUSTED", tenant="x")
    assert told in (3, 4)  # and perhaps the one that is being told
    assert one(samples, "quire_telemetry_dropped_requests_total") == 20 - told


def test_an_account_that_fails_does_not_silence_the_others(
    telemetry: Measured, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def ended(self, report: object) -> None:
            raise RuntimeError("boom")

    telemetry._accounts.insert(0, Broken())
    telemetry.refused(Overloaded("full"), "a-request", "y")
    samples = seen(telemetry)
    assert one(samples, "quire_request_errors_total", code="RESOURCE_EXHAUSTED", tenant="y") == 1
    assert "a-request" in caplog.text and "boom" in caplog.text


def test_outputs_that_end_nothing_are_not_looked_into(telemetry: Measured) -> None:
    telemetry.on_outputs([RequestOutput("a", (1,)), RequestOutput("b", (2,), choice=1)])
    telemetry.on_outputs([RequestOutput("a", finish_reason=FinishReason.STOP)])  # n > 1
    telemetry.flush(20)
    samples = seen(telemetry)
    assert not sum(each(samples, "quire_requests_finished_total"))


def test_metrics_are_scraped_over_http() -> None:
    telemetry = open_telemetry(ServerConfig(metrics_port=0), "org/model")
    s = Scripted(telemetry)
    telemetry.watch(s.source)
    s.submit("a", tenant='a "b"\n')
    s.run(0)
    telemetry.flush(20)
    assert telemetry.address is not None and telemetry.address.startswith("127.0.0.1:")
    samples = scrape(telemetry.address)
    assert one(samples, "quire_output_tokens_total") == 4
    assert one(samples, "quire_tenant_output_tokens_total", tenant='a "b"\n') == 4
    telemetry.close()
    with pytest.raises(OSError, match="refused"):
        scrape(telemetry.address)


def test_a_port_that_cannot_be_bound_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"metrics_port: cannot bind 127.0.0.1:{port}"):
            open_telemetry(ServerConfig(metrics_port=port), "m")
    with pytest.raises(Unavailable, match="metrics_host"):
        open_telemetry(ServerConfig(metrics_port=0, metrics_host="no.such.host.invalid"), "m")


def test_no_port_is_opened_unasked() -> None:
    telemetry = open_telemetry(ServerConfig(), "m")
    assert telemetry.address is None
    telemetry.close()


def test_names_follow_prometheus_conventions(telemetry: Measured) -> None:
    s = Scripted(telemetry)
    telemetry.watch(s.source)
    for name, _ in seen(telemetry):
        assert re.fullmatch(r"(quire|process|python)_[a-z_]+", name), name
        assert not re.search(r"_(ms|millis|percent|kb|mb)\b|_created$", name), name
