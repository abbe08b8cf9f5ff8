"""Python's garbage collector, for processes that are Quire's alone: `serve` and `bench`."""

from __future__ import annotations

import gc

ENGINE = 50_000, 20, 50
"""Its requests form no cycles."""

FRONTEND = 2_000, 5, 10
"""grpc leaves some twenty objects a call in cycles, and a hundred where it ends with an error."""


def quiet_collector(thresholds: tuple[int, int, int] = ENGINE) -> None:
    """Keeps the collector from stopping steps and streams for tens of milliseconds.

    Engine and frontends make thousands of short-lived objects a second and few cycles; by default
    that would have the collector walk everything the process ever imported, again and again. It is
    settled here because it holds for the whole process, which is ours only when it is a server: an
    `LLM` lives in somebody else's program.

    Args:
      thresholds: of the collector's generations.
    """
    gc.unfreeze()  # a frontend comes here with each new engine, and has let go of the last
    gc.collect()
    gc.freeze()
    gc.set_threshold(*thresholds)
