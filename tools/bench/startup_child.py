"""The process that `quire bench startup` starts and times; not for people.

    python -P -m quire.tools.bench.startup_child '{"spawned": ..., "settings": ..., ...}'

Prints one JSON object as the last line of stdout. Times are of time.monotonic, which is one clock
for all processes of a machine.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

_ENTERED = time.monotonic()  # Python is up, nothing of weight is imported yet


class _Programs:
    """Counts what XLA compiled and what came from the persistent cache."""

    def __init__(self) -> None:
        import jax

        self.asked = self.hits = 0
        jax.monitoring.register_event_duration_secs_listener(self._timed)
        jax.monitoring.register_event_listener(self._event)

    def _timed(self, event: str, duration_secs: float, **_: Any) -> None:
        # Recorded for every executable, whether XLA builds it or the cache has it.
        self.asked += event == "/jax/core/compile/backend_compile_duration"

    def _event(self, event: str, **_: Any) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"


def main() -> int:
    """Starts an engine, gets one token, says how long each part took."""
    from ...config import EngineConfig
    from ...errors import QuireError

    request = json.loads(sys.argv[1])
    settings = request["settings"]
    from ...serving.progress import Silent
    from .engine_run import TokenEngine

    programs = _Programs()
    reporter = Silent()
    reporter.began = request["spawned"]
    try:
        with TokenEngine(EngineConfig(**settings), reporter) as engine:
            ready = time.monotonic()
            engine.run([tuple(i % engine.vocab for i in range(request["prompt_tokens"]))], [1])
            ended = time.monotonic()
            compiles = engine.parts.runner.compiles_after_ready
            parts = engine.parts
    except QuireError as error:
        sys.stderr.write(f"quire: {error}\n")
        return 1
    said = {
        "seconds": ended - request["spawned"],
        "ready": ready - request["spawned"],
        "phases": {
            "interpreter": _ENTERED - request["spawned"],
            **{name: seconds for name, seconds in parts.phases.items() if name != "ready"},
            "first token": ended - ready,
        },
        "programs": {
            "compiled_by_XLA": programs.asked - programs.hits,
            "read_from_the_cache": programs.hits,
            "found_in_the_store": parts.programs_stored,
            "after_ready": compiles,
        },
    }
    from .report import surroundings

    said |= {name: surroundings()[name] for name in ("device", "versions", "host_peak_bytes")}
    sys.stdout.write(json.dumps(said) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
