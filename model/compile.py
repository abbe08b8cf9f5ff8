"""Compiling: ahead of time, in a pool, cached, and counted. Every experimental JAX API lives here.

After ready nothing may compile: each compilation stalls every running request. `CompileCounter`
counts them, those of eager operations included, by JAX's own event.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Lowered

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""Recorded once for every executable XLA builds or reads from the cache, eager ones too."""

Key = TypeVar("Key", bound=Hashable)
Progress = Callable[[int, int], None]


class CompileCounter:
    """Counts compilations in this process from its construction on.

    JAX offers no way to remove a single listener, so one is registered for the process and counters
    read differences of its total.
    """

    _total = 0
    _lock = threading.Lock()
    _listening = False

    def __init__(self) -> None:
        with CompileCounter._lock:
            if not CompileCounter._listening:
                jax.monitoring.register_event_duration_secs_listener(CompileCounter._on_event)
                CompileCounter._listening = True
        self._start = CompileCounter._total

    @staticmethod
    def _on_event(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            with CompileCounter._lock:
                CompileCounter._total += 1

    @property
    def count(self) -> int:
        return CompileCounter._total - self._start


def use_cache(folder: Path | None) -> None:
    """Keeps compiled programs in `folder` between processes, however small or quick they are.

    None keeps none. Of the whole process: what the last caller said holds.
    """
    chosen = None if folder is None else str(folder)
    if chosen != cache_folder():
        jax.config.update("jax_compilation_cache_dir", chosen)
        compilation_cache.reset_cache()  # else the folder of the first compilation stays
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_folder() -> str | None:
    """Where this process keeps compiled programs; JAX itself may have been told a folder."""
    folder: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return folder


def compile_all(
    programs: Mapping[Key, Callable[[], Lowered]], *, threads: int, progress: Progress | None = None
) -> dict[Key, Compiled]:
    """Compiles every program, in the order given (largest first keeps the pool full).

    Lowering traces Python and holds the interpreter, so it stays on this thread; XLA releases it.

    Args:
      programs: name to a function that traces and lowers it.
      threads: programs compiled at once.
      progress: called with (done, total) as programs finish.
    """
    done: dict[Key, Compiled] = {}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
    try:
        futures = {pool.submit(lower().compile): key for key, lower in programs.items()}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            if progress is not None:
                progress(len(done), len(programs))
    finally:
        # After an error or an interrupt, those still queued are not worth waiting for.
        pool.shutdown(wait=False, cancel_futures=True)
    return done


def described_devices(platform: str, name: str, **options: Any) -> list[jax.Device]:
    """Devices that are not there, to lower and compile for.

    Args:
      platform: "cuda" or "tpu".
      name: of the topology; of a GPU any name.
      options: for "cuda" `topology` ("1x1xN") and `target_config` (XLA's text of the device).
    """
    return list(topologies.get_topology_desc(name, platform, **options).devices)


def compile_uncached(lowered: Lowered, options: dict[str, Any]) -> Compiled:
    """Compiles with XLA options, past the cache: it would not see those that dump."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether it is used is decided once otherwise
    try:
        return lowered.compile(compiler_options=options)
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
