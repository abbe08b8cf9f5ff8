"""Where the figures of an engine come from. Given to Telemetry by whoever runs the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...model.plan import RunnerSpec
from ...sched.stats import EngineStats, StepTimes


@dataclass(frozen=True, slots=True)
class Source:
    """Where the figures of one engine come from; each is called at every scrape, from any thread.

    Attributes:
      compiles: programs compiled since ready.
      frontends: how many are attached.
      restarts: of the server's processes, by kind.
    """

    model: str
    spec: RunnerSpec
    healthy: Callable[[], bool]
    stats: Callable[[], EngineStats]
    step_times: Callable[[], StepTimes]
    compiles: Callable[[], int]
    frontends: Callable[[], int]
    restarts: Callable[[], Mapping[str, int]]
