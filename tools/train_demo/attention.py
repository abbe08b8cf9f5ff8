"""Attention over dense rows that hold several conversations: who computes it, and which is fastest.

train.py asks `fastest` once at its start. XLA writes the scores to memory, which costs more than
all else in a small model; on a GPU a fused kernel does not, in blocks of one size or another. One
that fails or disagrees is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from ...model.config import ModelConfig
from ...model.kernels.dense_attention import fused
from ...serving.progress import Reporter
from .packing import Layout

Mix = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [R, L, H, D], k [R, L, KH, D], v [R, L, KH, D], segments int32 [R, L]) -> [R, L, H, D]."""

EVERYWHERE: Literal["xla"] = "xla"

_TOLERANCE = 0.03  # of the largest entry; bfloat16 rounds at 0.004
_TIMED_RUNS = 5


def library(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """XLA's."""
    same = segments[:, None, :, None] == segments[:, None, None, :]  # [R, 1, L, L]
    return jax.nn.dot_product_attention(
        q, k, v, mask=same, is_causal=True, implementation=EVERYWHERE
    )


MIXES: dict[str, Mix] = {
    EVERYWHERE: library,
    "fused-64-32": partial(fused, forward=64, backward=32),
    "fused-64-64": partial(fused, forward=64, backward=64),
    "fused-128-64": partial(fused, forward=128, backward=64),
}


def fastest(config: ModelConfig, layout: Layout, reporter: Reporter) -> str:
    """The name of the fastest way that agrees with XLA's, forward and backward, in bfloat16."""
    if jax.default_backend() != "gpu":
        return EVERYWHERE
    inputs = [_random(config, *part) for part in layout.parts]
    times: dict[str, float] = {}
    wanted: list[jax.Array] = []
    with reporter.phase("attention"), ThreadPoolExecutor() as pool:
        compiling = {
            name: [pool.submit(_compiled, mix, arrays) for arrays in inputs]
            for name, mix in MIXES.items()
        }
        for name, programs in compiling.items():
            try:
                ready = [program.result() for program in programs]
                found, times[name] = _run(ready, inputs)
            except Exception as error:  # whatever it is, another one does it
                reporter.note(f"attention: {name} left out: {type(error).__name__}: {error}"[:200])
                continue
            wanted = wanted or found  # XLA's, which are the first
            off = max(_difference(*pair) for pair in zip(found, wanted, strict=True))
            reporter.note(f"attention: {name:<14} {times[name] * 1e3:.2f} ms, off by {off:.4f}")
            if not off <= _TOLERANCE:
                del times[name]
    return min(times, key=lambda name: times[name])


def _random(config: ModelConfig, rows: int, length: int) -> list[jax.Array]:
    """q, k, v, a gradient and segments of so many rows."""
    heads = config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads
    keys = jax.random.split(jax.random.key(0), len(heads))
    shapes = [(rows, length, n, config.head_dim) for n in heads]
    arrays = [jax.random.normal(*pair, jnp.bfloat16) for pair in zip(keys, shapes, strict=True)]
    return [*arrays, jnp.broadcast_to(jnp.arange(length) // 200, (rows, length))]


def _compiled(mix: Mix, arrays: list[jax.Array]) -> Callable[..., list[jax.Array]]:
    """A program for the result and the gradients of q, k, v."""

    def both(
        q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array, segments: jax.Array
    ) -> list[jax.Array]:
        mixed, pull = jax.vjp(lambda q, k, v: mix(q, k, v, segments), q, k, v)
        return [mixed, *pull(gradient)]

    return jax.jit(both).lower(*arrays).compile()


def _run(
    programs: Sequence[Callable[..., list[jax.Array]]], inputs: Sequence[list[jax.Array]]
) -> tuple[list[jax.Array], float]:
    """All results, and the seconds that the programs take together."""
    found: list[jax.Array] = []
    for program, arrays in zip(programs, inputs, strict=True):
        found += jax.block_until_ready(program(*arrays))
    begin = time.perf_counter()
    for program, arrays in zip(programs, inputs, strict=True):
        for _ in range(_TIMED_RUNS):
            out = program(*arrays)
        jax.block_until_ready(out)
    return found, (time.perf_counter() - begin) / _TIMED_RUNS


def _difference(found: jax.Array, wanted: jax.Array) -> float:
    wide = wanted.astype(jnp.float32)
    return float(jnp.max(jnp.abs(found.astype(jnp.float32) - wide)) / jnp.max(jnp.abs(wide)))
