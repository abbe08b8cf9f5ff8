"""An engine on a fake runner and a clock that the script turns, heard by a Telemetry."""

from __future__ import annotations

import time
import urllib.request
from dataclasses import replace

from fake_runner import FakeRunner, make_request, make_spec
from prometheus_client.parser import text_string_to_metric_families

from quire.sched.engine import Engine
from quire.sched.request import Request
from quire.sched.scheduler import Scheduler
from quire.serving.telemetry.report import Report
from quire.serving.telemetry.source import Source
from quire.serving.telemetry.telemetry import Telemetry

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Kept:
    """An account that keeps reports."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def ended(self, report: Report) -> None:
        self.reports.append(report)


class Scripted:
    """Its clock begins at the real one's now, because reports tell the time of day from it."""

    def __init__(self, telemetry: Telemetry, *, pages: int = 33, **settings: int):
        self.began = self.now = time.monotonic()
        self.telemetry = telemetry
        spec = make_spec(pages=pages)
        self.runner = FakeRunner(spec)
        sizes = {"max_batched_tokens": 32, "prefill_chunk": 32, **settings}
        scheduler = Scheduler(spec, clock=lambda: self.now, **sizes)  # type: ignore[arg-type]
        self.engine = Engine(self.runner, scheduler, overlap=False, on_outputs=telemetry.on_outputs)
        self.compiles = 0
        self.source = Source(
            model="org/model",
            spec=spec,
            healthy=lambda: self.engine.healthy,
            stats=self.engine.stats,
            step_times=lambda: self.engine.step_times,
            compiles=lambda: self.compiles,
            frontends=lambda: 2,
            restarts=lambda: {"engine": 1, "frontend": 3},
        )

    def submit(
        self, *args: object, traceparent: str = "", tracestate: str = "", **more: object
    ) -> Request:
        request = make_request(*args, **more)  # type: ignore[arg-type]
        request = replace(request, traceparent=traceparent, tracestate=tracestate)
        self.engine.submit(request)
        return request

    def step(self, seconds: float = 0.0) -> None:
        """One step, after so long."""
        self.now += seconds
        self.engine.step()

    def run(self, seconds: float) -> None:
        """To the end of all requests, a step each so many seconds."""
        while self.engine.has_work:
            self.step(seconds)


def scrape(address: str) -> Samples:
    """Every sample at an address."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
        return samples_in(answer.read().decode())


def samples_in(text: str) -> Samples:
    """The samples of an exposition, by name and sorted labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
