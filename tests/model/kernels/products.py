"""What test_gemv.py and test_gemm.py multiply, and what must come of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EPS = 1e-5
ALL = ("scale", "bias", "residual")


def operands(tokens: int, size: int, out: int, dtype: Any, gated: bool) -> dict[str, jax.Array]:
    rng = np.random.default_rng(size)
    rows = 2 * out if gated else out
    shapes = {
        "x": (tokens, size), "weight": (rows, size), "scale": (size,), "bias": (rows,),
        "residual": (tokens, out),
    }  # fmt: skip
    made = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    made["weight"] /= size**0.5
    return {name: jnp.asarray(value, dtype) for name, value in made.items()}


def wide(given: dict[str, jax.Array], gated: bool, among: tuple[str, ...]) -> np.ndarray:
    """The definition, in float64."""
    a = {name: np.asarray(value, np.float64) for name, value in given.items()}
    x = a["x"]
    if "scale" in among:
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * a["scale"]
    y = x @ a["weight"].T
    if "bias" in among:
        y = y + a["bias"]
    if gated:
        gate, value = np.split(y, 2, axis=-1)
        y = gate / (1 + np.exp(-gate)) * value
    return y + a["residual"] if "residual" in among else y
