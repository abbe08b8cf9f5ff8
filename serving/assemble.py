"""Puts an engine together: checkpoint, sizes, weights on the device, programs, scheduler, loop.

The one place where all floors meet; both faces start here. Each phase is reported and timed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from ..checkpoints.folder import Checkpoint
from ..checkpoints.locate import locate
from ..config import EngineConfig
from ..errors import InvalidConfig
from ..model.abstract import AbstractDecoder
from ..model.cache import cache_groups, token_bytes
from ..model.compile import CompileCounter, compile_threads
from ..model.devices import device_memory, gpu_memory, hold_gpu
from ..model.dummy_weights import dummy_params
from ..model.memory import MemoryTable, human_bytes
from ..model.mesh import Mesh
from ..model.runner import ModelRunner
from ..model.sizing import Sizes, host_memory, serving_dtype, settle
from ..model.startup import Startup
from ..model.weights import Params
from ..sched.engine import Engine
from ..sched.request import RequestOutput
from ..sched.scheduler import Scheduler
from .caches import open_caches
from .devices import open_mesh
from .intake import Intake, Served
from .phases import Phases
from .progress import Reporter, Silent

Deliver = Callable[[list[RequestOutput]], None]


@dataclass(frozen=True, slots=True)
class Assembled:
    """A running engine and what was settled on the way.

    Attributes:
      phases: seconds by phase of the start: "imports" (where it is a command's), "checkpoint",
        "devices", "loading" and "programs" (at the same time), "lowering" (a part of "programs"),
        "warmup", and "ready" for the whole.
      compiles: programs XLA compiled, or found in JAX's own cache, during all that.
      programs_stored: programs that came from the store.
    """

    engine: Engine
    intake: Intake
    runner: ModelRunner
    sizes: Sizes
    checkpoint: Checkpoint
    phases: dict[str, float]
    compiles: int
    programs_stored: int


def open_checkpoint(config: EngineConfig, reporter: Reporter | None = None) -> Checkpoint:
    """Reads a checkpoint's small files; first downloads the model where it must."""
    if not config.model:  # as a path it would be the current folder
        raise InvalidConfig("model: got '', must be a folder or a shipped name")
    folder = locate(
        config.model, reporter or Silent(), revision=config.revision, offline=config.offline
    )
    return Checkpoint.open(
        folder, ignore_fields=config.ignore_config_fields, weights=not config.dummy_weights
    )


def start_devices(
    config: EngineConfig, checkpoint: Checkpoint, reporter: Reporter | None = None
) -> Mesh:
    """Starts JAX, held to the memory it may take where it has not started yet."""
    wants_gpu = config.platform in ("auto", "gpu")
    if wants_gpu and (total := gpu_memory()) is not None:
        shards = config.tensor_parallel
        dtype = serving_dtype(config, checkpoint.config, "gpu")
        groups = cache_groups(checkpoint.config, dtype, shards, "gpu")
        sizes = settle(
            config,
            checkpoint.config,
            platform="gpu",
            capacity=total,
            kv_token_bytes=token_bytes(groups) // shards,
            shards=shards,
        )
        hold_gpu(config, total, sizes.memory.arrays)
    return open_mesh(config, reporter or Silent())


def make_startup(config: EngineConfig, checkpoint: Checkpoint, mesh: Mesh) -> Startup:
    """What settles the sizes on these devices, with the caches that the settings name."""
    store, problems = open_caches(config, mesh)
    return Startup(config, checkpoint.config, mesh, device_memory(mesh), store, problems)


def assemble(config: EngineConfig, deliver: Deliver, reporter: Reporter | None = None) -> Assembled:
    """Builds and starts an engine.

    Args:
      config: the user's settings.
      deliver: gets the outputs of each step, on the engine's thread.
      reporter: hears of progress.

    Raises:
      CheckpointError: the checkpoint cannot be read.
      InvalidConfig: settings contradict each other, the model or the device.
    """
    reporter = reporter or Silent()
    phases, counter = Phases(reporter.began), CompileCounter()
    with phases("checkpoint"):
        checkpoint = open_checkpoint(config, reporter)
    with phases("devices"):
        mesh = start_devices(config, checkpoint, reporter)
        starting = make_startup(config, checkpoint, mesh)
    decoder, sizes = starting.decoder, starting.sizes()
    _announce(config, checkpoint, mesh, reporter)

    with _Loading(checkpoint, decoder, mesh, reporter, phases) as loading:
        if config.warmup:
            runner, sizes, stored = _warm_runner(config, starting, loading, mesh, reporter, phases)
        else:
            runner, stored = ModelRunner(decoder, loading.params(), sizes.spec, mesh), 0
    starting.tidy()
    for note in (*starting.problems, *sizes.notes):
        reporter.note(note)
    _show_memory(sizes.memory, reporter)
    scheduler = Scheduler(
        sizes.spec,
        max_batched_tokens=sizes.spec.ladder.max_tokens,
        prefill_chunk=sizes.prefill_chunk,
        prefix_caching=config.prefix_caching,
        max_queue=config.max_queue,
    )
    intake = Intake(checkpoint, sizes.spec, Served(config.model, starting.dtype))
    engine = Engine(runner, scheduler, overlap=config.overlap, on_outputs=deliver)
    engine.start()
    done = phases.done()
    if config.warmup:
        reporter.note(_summary(done, stored, counter.count))
    return Assembled(engine, intake, runner, sizes, checkpoint, done, counter.count, stored)


def _warm_runner(
    config: EngineConfig,
    starting: Startup,
    loading: _Loading,
    mesh: Mesh,
    reporter: Reporter,
    phases: Phases,
) -> tuple[ModelRunner, Sizes, int]:
    """A runner whose programs have all run, its sizes, and how many programs were stored."""
    threads = config.compile_threads or compile_threads(
        starting.layers, host_memory(), starting.tuned_at_once
    )
    # XLA tries kernels on a GPU to choose among them, and must not be disturbed.
    before = loading.params if mesh.platform == "gpu" else None
    runner: ModelRunner | None = None
    while True:
        with phases("programs"), reporter.phase("programs") as update:
            sizes, got = starting.prepare(threads=threads, before_compiling=before, progress=update)
        phases.add("lowering", got.lowering_seconds)
        params = loading.params()
        try:
            with phases("warmup"), reporter.phase("warming up") as update:
                runner = ModelRunner(
                    starting.decoder, params, sizes.spec, mesh, compiled=got.programs
                )
                runner.warmup(update)
            return runner, sizes, got.loaded
        except jax.errors.JaxRuntimeError as error:
            runner = None  # its slabs would be in the way of tuning, and of the next ones
            if not got.loaded:
                raise
            # They were loaded and do not run: whatever the reason, programs made here may.
            starting.forget(sizes, f"it does not run: {error}")


class _Loading:
    """Weights on their way to the devices, on a thread of its own, until the block ends."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: AbstractDecoder,
        mesh: Mesh,
        reporter: Reporter,
        phases: Phases,
    ) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._given_up = threading.Event()

        def work() -> Params:
            with phases("loading"), reporter.phase("loading") as update:

                def progress(done: int, total: int) -> None:
                    if self._given_up.is_set():
                        raise CancelledError
                    update(done, total)

                return load(checkpoint, decoder, mesh, progress)

        self._future = self._pool.submit(work)

    def params(self) -> Params:
        """Waits for the weights; raises what went wrong."""
        return self._future.result()

    def __enter__(self) -> _Loading:
        return self

    def __exit__(self, *error: object) -> None:
        self._given_up.set()
        self._pool.shutdown(wait=False)


def load(
    checkpoint: Checkpoint,
    decoder: AbstractDecoder,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Streams the weights from disk to the devices, one parameter in flight at a time.

    For a checkpoint opened without its weights, random ones are made on the devices.
    """
    if not checkpoint.weights:
        return dummy_params(decoder, mesh, progress=progress)
    specs = decoder.specs
    params: Params = {}
    last: list[jax.Array] = []

    def put(name: str, array: np.ndarray) -> None:
        # Waiting for the one before bounds what the host holds to two parameters.
        for previous in last:
            previous.block_until_ready()
        arranged = decoder.arrange(name, array)
        params[name] = jax.device_put(arranged, mesh.of(specs[name].axes))
        last[:] = [params[name]]

    checkpoint.load_params(decoder.dtype, put, progress)
    return params


def _announce(config: EngineConfig, checkpoint: Checkpoint, mesh: Mesh, reporter: Reporter) -> None:
    device = mesh.devices[0]
    kind = "" if device.device_kind == device.platform else f" ({device.device_kind})"
    reporter.note(f"{config.model} on {device.platform}{kind}")
    if not checkpoint.weights:
        reporter.note("dummy weights: random numbers made on the device; answers mean nothing")
    left_out = checkpoint.generation.not_honoured
    if left_out:
        reporter.note(f"generation_config.json: not honoured: {', '.join(left_out)}")
    if not checkpoint.has_tokenizer:
        reporter.note("no tokenizer.json: serves token ids, not text")


def _show_memory(table: MemoryTable, reporter: Reporter) -> None:
    for name, size, remark in table.rows():
        reporter.note(f"  {name:<13}{human_bytes(size):>10}  {remark}".rstrip())


def _summary(phases: dict[str, float], stored: int, compiles: int) -> str:
    """The start in a line: `ready in 3.2 s: imports 1.1, …; 12 programs were stored, …`."""
    parts = ", ".join(f"{name} {s:.1f}" for name, s in phases.items() if name != "ready")
    return (
        f"ready in {phases['ready']:.1f} s: {parts}; {stored} programs were stored, "
        f"{compiles} compiled"
    )
