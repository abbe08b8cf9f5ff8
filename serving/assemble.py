"""Puts an engine together: checkpoint, sizes, weights on the device, programs, scheduler, loop.

The one place where all floors meet; both faces start here. Each phase is reported and timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from ..checkpoints.folder import Checkpoint
from ..checkpoints.shipped import resolve
from ..config import EngineConfig, default_cache_dir
from ..errors import InvalidConfig
from ..model.abstract import AbstractDecoder
from ..model.cache import cache_groups, token_bytes
from ..model.compile import cache_folder, use_cache
from ..model.dummy_weights import dummy_params
from ..model.mesh import Mesh, default_mesh
from ..model.runner import ModelRunner
from ..model.sizing import Sizes, host_memory, serving_dtype, settle
from ..model.weights import Params
from ..sched.engine import Engine
from ..sched.request import RequestOutput
from ..sched.scheduler import Scheduler
from .intake import Intake
from .progress import Reporter, Silent

_MAX_COMPILE_THREADS = 8

Deliver = Callable[[list[RequestOutput]], None]


@dataclass(frozen=True, slots=True)
class Assembled:
    """A running engine and what was settled on the way."""

    engine: Engine
    intake: Intake
    runner: ModelRunner
    sizes: Sizes
    checkpoint: Checkpoint


def open_checkpoint(config: EngineConfig) -> Checkpoint:
    """Reads a checkpoint's small files, by path or shipped name."""
    if not config.model:  # as a path it would be the current folder
        raise InvalidConfig("model: got '', must be a folder or a shipped name")
    return Checkpoint.open(
        resolve(config.model),
        ignore_fields=config.ignore_config_fields,
        weights=not config.dummy_weights,
    )


def settle_sizes(config: EngineConfig, checkpoint: Checkpoint, mesh: Mesh) -> Sizes:
    """The engine's sizes on these devices; reads no weights."""
    dtype = serving_dtype(config, checkpoint.config, mesh.platform)
    groups = cache_groups(checkpoint.config, dtype, mesh.shards)
    return settle(
        config,
        checkpoint.config,
        platform=mesh.platform,
        capacity=_capacity(mesh),
        kv_token_bytes=token_bytes(groups) // mesh.shards,
        shards=mesh.shards,
    )


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
    checkpoint = open_checkpoint(config)
    mesh = default_mesh(config.tensor_parallel)
    sizes = settle_sizes(config, checkpoint, mesh)
    _announce(checkpoint, mesh, sizes, reporter)
    intake = Intake(checkpoint, sizes.spec)
    _use_cache(config)

    decoder = AbstractDecoder(checkpoint.config, sizes.dtype, mesh.shards)
    with reporter.phase("loading") as update:
        params = load(checkpoint, decoder, mesh, update)
    runner = ModelRunner(decoder, params, sizes.spec, mesh)
    if config.warmup:
        threads = config.compile_threads or min(os.cpu_count() or 1, _MAX_COMPILE_THREADS)
        with reporter.phase("compiling") as update:
            runner.warmup(threads=threads, progress=update)
    scheduler = Scheduler(
        sizes.spec,
        max_batched_tokens=sizes.spec.ladder.max_tokens,
        prefill_chunk=sizes.prefill_chunk,
        prefix_caching=config.prefix_caching,
        max_queue=config.max_queue,
    )
    engine = Engine(runner, scheduler, overlap=config.overlap, on_outputs=deliver)
    engine.start()
    return Assembled(engine, intake, runner, sizes, checkpoint)


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


def _capacity(mesh: Mesh) -> int:
    if mesh.platform == "cpu":
        return host_memory() // mesh.shards
    stats = mesh.devices[0].memory_stats()
    return int(stats["bytes_limit"])


def _use_cache(config: EngineConfig) -> None:
    """Compiled programs go where the user said, else where JAX was told, else to our own place."""
    if config.cache_dir is not None:
        use_cache(Path(config.cache_dir) / "xla" if config.cache_dir else None)
    elif (told := cache_folder()) is not None:
        use_cache(Path(told))
    else:
        use_cache(default_cache_dir() / "xla")


def _announce(checkpoint: Checkpoint, mesh: Mesh, sizes: Sizes, reporter: Reporter) -> None:
    device = mesh.devices[0]
    reporter.note(f"{checkpoint.folder.name} on {device.platform} ({device.device_kind})")
    for note in sizes.notes:
        reporter.note(note)
    if not checkpoint.weights:
        reporter.note("dummy weights: random numbers made on the device; answers mean nothing")
    left_out = checkpoint.generation.not_honoured
    if left_out:
        reporter.note(f"generation_config.json: not honoured: {', '.join(left_out)}")
    if not checkpoint.has_tokenizer:
        reporter.note("no tokenizer.json: serves token ids, not text")
