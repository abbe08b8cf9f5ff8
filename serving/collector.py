"""Python's garbage collector, for processes that are Quire's alone: `serve` and `bench`."""

from __future__ import annotations

import gc


def quiet_collector() -> None:
    """Keeps the collector from stopping steps and streams for tens of milliseconds.

    Engine and frontends make thousands of short-lived objects a second and hardly a cycle; by
    default that would have the collector walk everything the process ever imported, again and
    again. It is settled here because it holds for the whole process, which is ours only when it is
    a server: an `LLM` lives in somebody else's program.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
