"""A sum and its RMSNorm in one kernel, and products in parts, against float64. Interpreted where
there is no GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.model.kernels.add_norm_gpu import add_norm
from quire.model.kernels.parts import num_parts, product_in_parts, whole

INTERPRET = jax.default_backend() != "gpu"
EPS = 1e-5
# Half a unit in the last place of values below 8 (16 bits), or some of float32's.
ROUNDING = {"float32": 2**-20, "bfloat16": 2**-6, "float16": 2**-9}


def draw(*shape: int, dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("parts", [None, 0, 1, 8], ids=["alone", "whole", "one", "eight"])
@pytest.mark.parametrize(("tokens", "size"), [(1, 48), (3, 512)])
def test_equals_the_definition(tokens: int, size: int, parts: int | None, dtype: str) -> None:
    residual, scale = draw(tokens, size, dtype=dtype), draw(size, dtype=dtype)
    update = None
    if parts is not None:
        shape = (parts, tokens, size) if parts else (tokens, size)
        update = draw(*shape, dtype=jnp.float32 if parts else dtype) / max(1, parts) ** 0.5
    total, normed = add_norm(residual, update, scale, eps=EPS, interpret=INTERPRET)
    assert total.dtype == normed.dtype == dtype and total.shape == normed.shape == (tokens, size)
    expected = wide(residual)
    if update is not None:
        expected = expected + (wide(update).sum(0) if parts else wide(update))
    np.testing.assert_allclose(wide(total), expected, rtol=0, atol=ROUNDING[dtype])
    x = wide(total)  # the norm is of what was rounded: what the next sum starts from
    expected = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * wide(scale)
    np.testing.assert_allclose(wide(normed), expected, rtol=2 * ROUNDING[dtype], atol=1e-5)


def test_a_row_that_is_not_finite_keeps_it_to_itself() -> None:
    residual = draw(3, 64, dtype=jnp.bfloat16).at[1, 7].set(jnp.nan)
    for x in add_norm(residual, residual, jnp.ones(64), eps=EPS, interpret=INTERPRET):
        assert list(np.isfinite(wide(x)).all(1)) == [True, False, True]


@pytest.mark.parametrize(
    ("out", "size", "parts"),
    [
        (6144, 4096, 4),  # as XLA cuts Llama-8B's
        (4096, 4096, 8),
        (4096, 14336, 8),
        (28672, 4096, 1),
        (1536, 1536, 8),
        (1536, 8960, 16),
        (8, 100, 1),  # too few columns
        (8, 3 * 256, 4),  # no half of three
    ],
)
def test_how_many_parts(out: int, size: int, parts: int) -> None:
    assert num_parts(out, size) == parts


def test_the_parts_add_up() -> None:
    x, weight = draw(3, 1024, dtype=jnp.bfloat16), draw(12, 1024, dtype=jnp.bfloat16)
    got = product_in_parts(x, weight)
    assert got.shape == (8, 3, 12) and got.dtype == jnp.float32
    expected = wide(x) @ wide(weight).T
    np.testing.assert_allclose(wide(whole(got, jnp.float32)), expected, atol=1e-3)
    assert whole(got, jnp.bfloat16).dtype == jnp.bfloat16
