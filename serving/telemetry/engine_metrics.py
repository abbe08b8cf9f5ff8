"""Metrics of the engine, read when somebody scrapes; they cost its thread nothing.

docs/metrics.md lists them. Those of requests are in request_metrics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from ... import __version__
from ...sched.stats import STEP_BOUNDS, EngineStats, StepTimes
from .source import Source

_Read = Callable[[EngineStats], float]

_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("quire_requests_running", "Answers being made, each with a slot.", lambda s: s.running),
    ("quire_requests_waiting", "Requests without a slot.", lambda s: s.waiting),
    ("quire_kv_pages_used", "KV pages held by running requests.", lambda s: s.pages_used),
    (
        "quire_kv_pages_cached",
        "KV pages nobody holds, whose prefixes can still be found.",
        lambda s: s.pages_cached,
    ),
    (
        "quire_kv_utilization_ratio",
        "Share of the KV pages held by running requests, 0 to 1.",
        lambda s: s.pages_used / s.pages_total if s.pages_total else 0.0,
    ),
    (
        "quire_kv_waste_ratio",
        "Share of the token slots in held KV pages that hold no token, over time since start.",
        lambda s: s.waste,
    ),
    (
        "quire_recompute_ratio",
        "Tokens computed again after preemptions per token computed first, lately.",
        lambda s: s.recompute_ratio,
    ),
)

_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("quire_prompt_tokens", "Prompt tokens of admitted requests.", lambda s: s.prompt_tokens),
    ("quire_output_tokens", "Tokens generated.", lambda s: s.output_tokens),
    (
        "quire_prefix_queried_tokens",
        "Prompt tokens looked up in the prefix index.",
        lambda s: s.prefix_queried_tokens,
    ),
    (
        "quire_prefix_hit_tokens",
        "Prompt tokens found in the prefix index.",
        lambda s: s.prefix_hit_tokens,
    ),
    ("quire_step_tokens", "Tokens that steps computed.", lambda s: s.real_tokens),
    (
        "quire_step_padding_tokens",
        "Tokens that steps computed for nothing, to fill up their programs.",
        lambda s: s.padded_tokens - s.real_tokens,
    ),
    (
        "quire_recomputed_tokens",
        "Tokens computed again because of preemptions.",
        lambda s: s.recomputed_tokens,
    ),
    ("quire_preemptions", "Times an answer gave way for want of pages.", lambda s: s.preemptions),
    (
        "quire_failed_steps",
        "Steps that failed, on the device or while planned; running requests start over.",
        lambda s: s.failed_steps,
    ),
)


class EngineCollector(Collector):
    """The engine's figures for a registry; until `source` is set, that there is none.

    Args:
      dropped: how many requests metrics, log and traces have missed.
    """

    def __init__(self, dropped: Callable[[], int]):
        self._dropped = dropped
        self.source: Source | None = None

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not look for clashes with what only we name."""
        return ()

    def collect(self) -> Iterator[Metric]:
        source = self.source
        yield GaugeMetricFamily(
            "quire_engine_ready",
            "1 while the engine takes requests.",
            value=source is not None and source.healthy(),
        )
        yield CounterMetricFamily(
            "quire_telemetry_dropped_requests",
            "Requests missing from metrics, log and traces, because those could not keep up.",
            self._dropped(),
        )
        if source is None:
            return
        info = GaugeMetricFamily(
            "quire_model_info", "Always 1; what is served.", labels=["model", "version"]
        )
        info.add_metric([source.model, __version__], 1)
        yield info
        yield GaugeMetricFamily(
            "quire_frontends",
            "Frontend processes that are attached to the engine.",
            source.frontends(),
        )
        restarts = CounterMetricFamily(
            "quire_process_restarts",
            "Times that a process of the server died or hung, and was started again.",
            labels=["process"],
        )
        for kind, count in source.restarts().items():
            restarts.add_metric([kind], count)
        yield restarts
        spec, stats = source.spec, source.stats()
        yield GaugeMetricFamily("quire_slots", "Answers that can run at once.", spec.num_slots)
        yield GaugeMetricFamily(
            "quire_kv_pages", "KV pages that can be handed out.", stats.pages_total
        )
        yield GaugeMetricFamily(
            "quire_kv_page_tokens", "Token positions in a KV page.", spec.page_size
        )
        for name, text, read in _GAUGES:
            yield GaugeMetricFamily(name, text, read(stats))
        for name, text, read in _COUNTERS:
            yield CounterMetricFamily(name, text, read(stats))
        yield CounterMetricFamily(
            "quire_compiles_after_ready",
            "Programs compiled while serving, each of which held up every request.",
            source.compiles(),
        )
        yield _step_seconds(source.step_times())


def _step_seconds(times: StepTimes) -> Metric:
    family = HistogramMetricFamily(
        "quire_step_seconds",
        "From when the device could begin with a step until its results were read.",
        labels=["kind"],
    )
    names = [*(str(bound) for bound in STEP_BOUNDS), "+Inf"]
    for kind, counts in times.counts.items():
        total, buckets = 0, []
        for name, count in zip(names, counts, strict=True):
            total += count
            buckets.append((name, total))
        family.add_metric([kind], buckets, times.seconds[kind])
    return family
