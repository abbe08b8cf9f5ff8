"""Compiling: ahead of time, in a pool, stored, and counted. Experimental JAX APIs live here.

After ready nothing may compile: each compilation stalls every running request. `CompileCounter`
counts them, those of eager operations included, by JAX's own event. Before ready, what an earlier
start compiled is loaded from the program store (model/program_store.py) without being traced.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
from jax._src import xla_bridge
from jax.experimental import serialize_executable, topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Lowered

from .program_store import Facts, ProgramStore

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""Recorded once for every executable XLA builds or reads from the cache, eager ones too."""

_MAX_THREADS = 16
_POOL_SHARE = 0.25
"""Of the host's memory, which compilations may take together."""

_COMPILE_BYTES, _COMPILE_BYTES_PER_LAYER = 192 * 2**20, 12 * 2**20
"""Host memory of one compilation; 0.55 GB at 32 layers, measured for a GPU."""

_GIVING_WAY = 5
"""How much less urgent compiling is than the thread that lowers, without which nothing follows, and
which with a share of the processors like any other's takes two to three times as long. That is a
third of a share: much less, and other processes of a busy host would leave it next to none."""

VENDOR_TOKENS = 64
"""Tokens of a step from which on a GPU's matrix products are the vendor's. Below, XLA's own win
(4.15 ms against 4.62 for those of Llama-8B at one token); here they lose (4.76 against 4.64 at 64,
7.35 against 7.10 at 256), and to find that out some forty of each product's are compiled."""

LOOPS_IN_GRAPHS = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    )
}
"""What XLA is told for a GPU program whose loops the device is to run: what it takes into a CUDA
graph unasked, and loops."""

_VENDOR_TUNING = 2
"""How much XLA does to choose among the vendor's kernels for a matrix product: it times them. By
default (4) it also holds their results against each other's, one kernel after the other on the
device; that is for kernels of its own, of which wrong ones are so found and left out."""

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


def jax_has_started() -> bool:
    """Whether JAX holds its devices already; how much memory it takes is then settled."""
    return xla_bridge.backends_are_initialized()


def set_pool(share: float, *, at_once: bool) -> None:
    """Tells JAX, which must not have started, what share of each GPU its pool may take.

    Args:
      share: of the device's memory.
      at_once: the pool takes all of it at its start, and so cannot be cut up; else as it needs.
    """
    given = jax.config.jax_pjrt_client_create_options  # type: ignore[attr-defined]
    options = {"memory_fraction": share, "preallocate": at_once, **(given or {})}
    jax.config.update("jax_pjrt_client_create_options", options)


def use_cache(folder: Path | None) -> None:
    """Keeps compiled programs in `folder` between processes, however small or quick they are.

    This is JAX's own cache, which a program must be traced for; XLA's autotuning results are kept
    with it. None keeps none. Of the whole process: what the last caller said holds.
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


@contextmanager
def _no_jax_cache(off: bool) -> Iterator[None]:
    """Has XLA compile what JAX's own cache may hold, for what is to be written down: an executable
    that was read from there cannot be (on CPU it loses its code on the way, without a word).

    Of the whole process.
    """
    if not off:
        yield
        return
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else what was decided at the first compilation holds
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def compile_threads(layers: int, host_bytes: int, tuned_at_once: int | None = None) -> int:
    """Programs to compile at once: by the cores, by the host's memory and by the device's.

    Args:
      layers: of each program.
      host_bytes: memory of this machine.
      tuned_at_once: how many of the largest products fit the device beside what is there by then;
        each compilation tries kernels on it. None where nothing is tried.
    """
    each = _COMPILE_BYTES + layers * _COMPILE_BYTES_PER_LAYER
    bounds = [os.cpu_count() or 1, _MAX_THREADS, int(host_bytes * _POOL_SHARE) // each]
    return max(1, min(bounds if tuned_at_once is None else [*bounds, tuned_at_once]))


def _give_way() -> None:
    """What this thread does, and threads and processes that it starts do, waits for others."""
    if sys.platform == "linux":  # where this is a thread's own
        with suppress(OSError):  # a sandbox that forbids it
            os.nice(_GIVING_WAY)


def compiler_options(platform: str, tokens: int = 0) -> dict[str, Any]:
    """What XLA is told for a program, on "cpu", "gpu" (JAX also says "cuda") or "tpu".

    Args:
      platform: for which it is compiled.
      tokens: rows of its matrix products; 0 where there are none, or not known.
    """
    if platform not in ("gpu", "cuda"):
        return {}
    # It counts a donated slab once for every layer that writes it, finds far too little memory,
    # and spends a third of the compilation on looking for what to compute twice.
    options: dict[str, Any] = {"xla_disable_hlo_passes": "rematerialization"}
    if tokens >= VENDOR_TOKENS:
        options["xla_gpu_enable_triton_gemm"] = False
        options["xla_gpu_autotune_level"] = _VENDOR_TUNING
    return options


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Python's collector walks all that tracing has made again and again, and frees little: a sixth
    of the time that lowering takes.

    Of the whole process. Where somebody else has it off, it stays as they want it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass(frozen=True, slots=True)
class Compilation(Generic[Key]):
    """Programs ready to run.

    Attributes:
      programs: by their names.
      figures: of each; see `figures_of`.
      loaded: how many came from the store.
      lowering_seconds: this thread's, for the others.
    """

    programs: dict[Key, Compiled]
    figures: dict[Key, dict[str, int]]
    loaded: int
    lowering_seconds: float


def compile_all(
    programs: Mapping[Key, Callable[[], Lowered]],
    *,
    threads: int,
    options: Callable[[Key], dict[str, Any]] | None = None,
    store: ProgramStore | None = None,
    facts: Callable[[Key], Facts] | None = None,
    kernels: Callable[[], Sequence[Lowered]] = tuple,
    devices: tuple[jax.Device, ...],
    before_compiling: Callable[[], object] | None = None,
    progress: Progress | None = None,
) -> Compilation[Key]:
    """Loads or compiles every program, in the order given (largest first keeps the pool full).

    Lowering traces Python and holds the interpreter, so it stays on this thread; XLA releases it.

    Args:
      programs: name to a function that traces and lowers it.
      threads: programs compiled at once.
      options: what XLA is told for each; None is `compiler_options` of the platform.
      store: where programs are found and kept; none without it.
      facts: what a program is found by; needed with `store`.
      kernels: programs that came up while lowering, to be compiled, and forgotten, before all
        others that are not in the pool yet.
      devices: where programs run.
      before_compiling: called on another thread unless all programs are stored; while it has not
        returned, programs are lowered and none compiled, kernels neither (what it compiles itself
        would have to wait for them).
      progress: called with (done, total) as programs finish.
    """
    done: dict[Key, Compiled] = {}
    figures: dict[Key, dict[str, int]] = {}
    lowering = 0.0

    def finish(futures: Mapping[Future[Any], Key], *, keep: bool) -> None:
        for future in as_completed(futures):
            if (result := future.result()) is not None:
                key = futures[future]
                done[key], figures[key] = program, found = result
                if progress is not None:
                    progress(len(done), len(programs))
                if keep and store is not None and facts is not None:
                    # Not where it was compiled: XLA holds the interpreter while it writes one
                    # down, 0.14 s where it is large, and would keep this thread from lowering.
                    _keep(store, facts(key), program, found)

    def compiled(lowered: Lowered, key: Key) -> tuple[Compiled, dict[str, int]]:
        told = compiler_options(platform) if options is None else options(key)
        program = lowered.compile(compiler_options=told | tuning)
        return program, figures_of(program)

    def build(kernel: Lowered) -> None:
        with suppress(jax.errors.JaxRuntimeError):  # a program that has it will say so
            kernel.compile(compiler_options=compiler_options(platform))

    platform = devices[0].platform
    tuning: dict[str, Any] = {}
    if store is not None and platform == "gpu":
        # Kernels that XLA timed for one program are known to the next, and to the next start.
        tuning["xla_gpu_per_fusion_autotune_cache_dir"] = str(store.tuning)
    pool = ThreadPoolExecutor(threads, "compile", _give_way)
    try:
        if store is not None and facts is not None:
            if platform == "gpu":
                _ready_for_mosaic()
            finish(
                {pool.submit(_load, store, facts(key), devices): key for key in programs},
                keep=False,
            )
        loaded = len(done)
        missing = [key for key in programs if key not in done]
        with ExitStack() as while_compiling:
            waiting: Future[object] | None = None
            if missing and before_compiling is not None:
                loader = ThreadPoolExecutor(1, "loading")  # which does not give way
                waiting = loader.submit(before_compiling)
                loader.shutdown(wait=False)
            found: list[Lowered] = []
            building: list[Future[None]] = []
            lowered: dict[Key, Lowered] = {}
            futures: dict[Future[Any], Key] = {}
            for key in missing:
                begin = time.monotonic()
                with _collector_at_rest():
                    lowered[key] = programs[key]()
                lowering += time.monotonic() - begin
                found += kernels()
                if waiting is not None and (key == missing[-1] or waiting.done()):
                    waiting.result()  # or what went wrong there
                ready = waiting is None or waiting.done()
                if ready:
                    building += [pool.submit(build, kernel) for kernel in found]
                    found = []
                ready = ready and all(kernel.done() for kernel in building)
                if not futures and key != missing[-1] and not ready:
                    continue
                if not futures:
                    while_compiling.enter_context(_no_jax_cache(store is not None))
                for name in list(lowered):
                    futures[pool.submit(compiled, lowered.pop(name), name)] = name
            finish(futures, keep=True)
    finally:
        # After an error or an interrupt, those still queued are not worth waiting for.
        pool.shutdown(wait=False, cancel_futures=True)
    ordered = {key: done[key] for key in programs}
    return Compilation(ordered, figures, loaded, lowering)


def figures_of(program: Compiled) -> dict[str, int]:
    """Bytes that a program takes on each device beside its arguments: its temporaries, results that
    take no donated argument's place, and code."""
    stats = program.memory_analysis()
    if stats is None:  # a backend that does not say
        return {"temp": 0, "outputs": 0, "code": 0}
    return {
        "temp": stats.temp_size_in_bytes,
        "outputs": max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes),
        "code": stats.generated_code_size_in_bytes,
    }


def _keep(store: ProgramStore, facts: Facts, program: Compiled, figures: dict[str, int]) -> None:
    """Stores a program, where its backend can write programs down."""
    try:
        code, in_tree, out_tree = serialize_executable.serialize(program)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        store.problems.append(f"a compiled program was not stored: {error}")
        return
    # Tree definitions do not pickle; trees of Quire's own classes do.
    trees = [jax.tree.unflatten(t, range(t.num_leaves)) for t in (in_tree, out_tree)]
    store.put(facts, pickle.dumps((code, *trees)), figures)


def _ready_for_mosaic() -> None:
    """What kernels by Mosaic call is found where this import says; a program that is stored with
    one cannot be loaded before."""
    with suppress(ImportError):  # a JAX without it has stored none
        importlib.import_module("jax.experimental.mosaic.gpu")


def _load(
    store: ProgramStore, facts: Facts, devices: tuple[jax.Device, ...]
) -> tuple[Compiled, dict[str, int]] | None:
    """A stored program, or None: there is none, or it cannot be used."""
    entry = store.get(facts)
    if entry is None:
        return None
    try:
        code, *trees = pickle.loads(entry.body)
        in_tree, out_tree = (jax.tree.structure(tree) for tree in trees)
        program = serialize_executable.deserialize_and_load(
            code, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
        )
    except Exception as error:  # whatever it is, compiling anew is the cure
        store.discard(facts, f"it cannot be loaded: {error}")
        return None
    return program, entry.figures


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
    with _no_jax_cache(True):
        return lowered.compile(compiler_options=options)
