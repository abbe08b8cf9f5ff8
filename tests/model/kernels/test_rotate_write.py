"""Bias, norms, rotation and the write of K and V in one kernel, against the definition in float64.
Interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.model.kernels.rotate_write_gpu import RotateShape, rotate_write, serves

INTERPRET = jax.default_backend() != "gpu"
LAYER, PAGES, PAGE, EPS = 8, 24, 4, 1e-5  # three layers of 8 pages; the second is written
ROUNDING = {"float32": 2**-20, "bfloat16": 2**-6, "float16": 2**-9}
# Dropped: padding, and whatever is outside of the slab on either side of one index.
PLACES = ((0, 0), (-1, 0), (7, 3), (3, 1), (16, 0), (2, 4), (2, -1), (3, 2))
KEPT = (0, 2, 3, 7)
NONE = -100.0  # what no token has written


@dataclass(frozen=True)
class Case:
    """Sizes of a model; `bias` and `norms` are those it has."""

    heads: int
    kv_heads: int
    dim: int
    bias: bool = False
    norms: bool = False
    parts: int = 0  # of the product; 0: whole

    def arrays(self, dtype: Any) -> dict[str, Any]:
        rng = np.random.default_rng(self.dim)

        def draw(*shape: int, of: Any = dtype) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), of)

        width = (self.heads + 2 * self.kv_heads) * self.dim
        tokens = len(PLACES)
        product = (
            draw(self.parts, tokens, width, of=jnp.float32) if self.parts else draw(tokens, width)
        )
        angles = draw(tokens, 1, self.dim // 2, of=jnp.float32)
        pages, offsets = (jnp.asarray(x, jnp.int32) for x in zip(*PLACES, strict=True))
        return {
            "product": product / max(1, self.parts) ** 0.5,
            "slab": jnp.full((PAGES, PAGE, 2 * self.kv_heads, self.dim), NONE, dtype),
            "rotation": (1.5 * jnp.cos(angles), 1.5 * jnp.sin(angles)),  # YaRN scales them
            "first_page": jnp.full((1,), LAYER, jnp.int32),
            "pages": pages,
            "offsets": offsets,
            "bias": draw(width) if self.bias else None,
            "norms": (draw(self.dim), draw(self.dim)) if self.norms else None,
        }

    def definition(self, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """q and the slab, in float64."""
        product = np.asarray(given["product"], np.float64)
        product = product.sum(0) if self.parts else product
        if self.bias:
            product = product + np.asarray(given["bias"], np.float64)
        heads = product.reshape(len(PLACES), -1, self.dim)
        q, k, v = np.split(heads, [self.heads, self.heads + self.kv_heads], axis=1)
        if self.norms:
            q, k = (
                x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPS) * np.asarray(scale, np.float64)
                for x, scale in zip((q, k), given["norms"], strict=True)
            )
        cos, sin = (np.asarray(x, np.float64) for x in given["rotation"])

        def turn(x: np.ndarray) -> np.ndarray:
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        slab = np.asarray(given["slab"], np.float64)
        for t in KEPT:
            page, offset = PLACES[t]
            slab[LAYER + page, offset, 0::2] = turn(k)[t]
            slab[LAYER + page, offset, 1::2] = v[t]
        return turn(q), slab

    def run(self, given: dict[str, Any], dtype: Any, **how: Any) -> tuple[jax.Array, jax.Array]:
        write = partial(
            rotate_write, num_kv_heads=self.kv_heads, dtype=dtype, eps=EPS, interpret=INTERPRET,
            **how,
        )  # fmt: skip
        return jax.jit(write)(**given)


LLAMA = Case(heads=8, kv_heads=2, dim=16)
CASES = {
    "plain": LLAMA,
    "bias": Case(heads=6, kv_heads=1, dim=16, bias=True),
    "norms": Case(heads=4, kv_heads=2, dim=8, norms=True),
    "everything, and heads of no power of two": Case(7, 3, 20, bias=True, norms=True),
    "in parts": Case(heads=2, kv_heads=1, dim=16, bias=True, parts=4),
}


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_equals_the_definition(case: Case, dtype: str) -> None:
    given = case.arrays(dtype)
    got = case.run(given, dtype)
    assert [x.dtype for x in got] == [dtype, dtype]
    for value, expected in zip(got, case.definition(given), strict=True):
        assert value.shape == expected.shape
        np.testing.assert_allclose(
            np.asarray(value, np.float64), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype]
        )


@pytest.mark.parametrize("shape", [RotateShape(heads=1, num_warps=1), RotateShape(heads=32)])
def test_however_it_is_cut(shape: RotateShape) -> None:
    given = LLAMA.arrays("float32")
    got = LLAMA.run(given, "float32", shape=shape)
    for value, expected in zip(got, LLAMA.definition(given), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)


def test_nobody_elses_values_are_taken() -> None:
    """The products of dropped tokens are NaN, and so is all of the slab: what is written is finite
    all the same, and what is not stays."""
    case = CASES["everything, and heads of no power of two"]
    given = case.arrays("bfloat16")
    dropped = jnp.asarray([t for t in range(len(PLACES)) if t not in KEPT])
    given["product"] = given["product"].at[dropped].set(jnp.nan)
    given["slab"] = jnp.full_like(given["slab"], jnp.nan)
    q, slab = case.run(given, "bfloat16")
    assert np.isfinite(np.asarray(q, np.float32)[list(KEPT)]).all()
    written = np.zeros((PAGES, PAGE), bool)
    for t in KEPT:
        written[LAYER + PLACES[t][0], PLACES[t][1]] = True
    finite = np.isfinite(np.asarray(slab, np.float32))
    assert finite[written].all() and not finite[~written].any()


def test_a_wider_cache_keeps_what_was_computed() -> None:
    given = LLAMA.arrays("bfloat16")
    given["slab"] = given["slab"].astype(jnp.float32)
    _, slab = LLAMA.run(given, "bfloat16")
    expected = LLAMA.definition(given)[1]
    np.testing.assert_allclose(slab, expected, rtol=1e-5, atol=1e-5)


def test_what_it_serves() -> None:
    slab = jnp.zeros((1, 4, 8, 128))
    assert serves(slab, 4, 128)
    assert not serves(slab, 3, 128)  # the slab is padded as a TPU needs it
    assert not serves(slab, 4, 80)
    assert not serves(jnp.zeros((1, 4, 2, 5)), 1, 5)
