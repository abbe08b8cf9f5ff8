"""What a device can do at best, measured on the spot: copy bandwidth and matrix products.

Used by kernels.py, which says what share of it a kernel reaches. Data is random: zeros run faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

BEST_OF = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """Attributes:
    copy_gb_s: bytes read plus bytes written, in 10^9 a second.
    matmul_tflop_s: of a large product in the serving dtype, in 10^12 a second.
    """

    copy_gb_s: float
    matmul_tflop_s: float

    def floor_seconds(self, num_bytes: float, flops: float) -> float:
        """No kernel that moves so much and computes so much is faster."""
        return max(num_bytes / (1e9 * self.copy_gb_s), flops / (1e12 * self.matmul_tflop_s))


def measure_limits(platform: str, dtype: Any) -> Limits:
    """Takes a second or two."""
    small = platform == "cpu"
    size = (1 << 24) if small else (1 << 29)  # float32 entries: 64 MiB, 2 GiB
    # One addend short of a plain copy, which a compiler would leave out.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.random.normal(jax.random.key(0), (size,))
    copied = best_seconds(add, x, calls=8)
    del x
    n = 1024 if small else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.float32) for i in (1, 2))
    # Scaled so that products of products keep their size.
    a, b = a.astype(dtype), (b / n**0.5).astype(dtype)
    multiplied = best_seconds(jax.jit(lambda a, b: a @ b), a, b, calls=8)
    return Limits(2 * 4 * size / copied / 1e9, 2 * n**3 / multiplied / 1e12)


def best_seconds(step: Callable[..., Any], first: Any, *rest: Any, calls: int) -> float:
    """Seconds of one call of `step`, each call fed the last one's result. The best of several rows
    of calls, after two that warm up (the second call captures the CUDA graph).

    Args:
      step: (first, *rest) -> the next first.
      calls: calls in a row between two looks at the clock.
    """
    for _ in range(2):
        first = jax.block_until_ready(step(first, *rest))
    best = float("inf")
    for _ in range(BEST_OF):
        begin = time.perf_counter()
        for _ in range(calls):
            first = step(first, *rest)
        jax.block_until_ready(first)
        best = min(best, (time.perf_counter() - begin) / calls)
    return best
