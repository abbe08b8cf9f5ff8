"""A product of few tokens with what surrounds it in one kernel, against float64: as it is on a GPU,
else interpreted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import ALL, EPS, operands, wide

from quire.model.compile import VENDOR_TOKENS
from quire.model.kernels import switches
from quire.model.kernels.gemv_gpu import MAX_TOKENS, MEASURED, MEASURED_TOKENS, GemvShape, gemv
from quire.model.projection import (
    IN_PARTS,
    PROJECTIONS,
    Products,
    default_projection,
    in_one_kernel,
    in_parts,
    projection,
)

INTERPRET = jax.default_backend() != "gpu"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("among", [(), ("scale",), ALL], ids=["bare", "norm", "all"])
@pytest.mark.parametrize(
    ("tokens", "size", "out"),
    [
        (1, 2048, 8),  # one round of loads
        (1, 4352, 6),  # two, and one load more; rows that no program fills
        (MAX_TOKENS, 700, 13),  # the last load reaches beyond the row
        (2, 24, 5),  # less than one load
    ],
)
def test_equals_the_definition(
    tokens: int, size: int, out: int, among: tuple[str, ...], gated: bool
) -> None:
    given = operands(tokens, size, out, jnp.bfloat16, gated)
    extras = {name: given[name] for name in among}
    got = gemv(
        given["x"], given["weight"], eps=EPS, gated=gated, out_dtype=jnp.float32,
        interpret=INTERPRET, **extras,
    )  # fmt: skip
    expected = wide(given, gated, among)
    assert got.shape == expected.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    rounded = gemv(given["x"], given["weight"], eps=EPS, gated=gated, interpret=INTERPRET, **extras)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))  # rounded once


@pytest.mark.parametrize(
    "shape",
    [GemvShape(rows=2, block=512, unroll=3), GemvShape(rows=8, block=128, unroll=16)],
)
def test_however_it_is_cut(shape: GemvShape) -> None:
    given = operands(2, 1700, 11, jnp.float16, gated=True)
    got = gemv(
        given["x"], given["weight"], scale=given["scale"], eps=EPS, gated=True,
        out_dtype=jnp.float32, shape=shape, interpret=INTERPRET,
    )  # fmt: skip
    np.testing.assert_allclose(got, wide(given, True, ("scale",)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("matrix", MEASURED, ids=lambda matrix: "x".join(map(str, matrix)))
def test_as_engines_run_it(matrix: tuple[int, int]) -> None:
    (rows, size), gated = matrix, matrix[0] > 2 * matrix[1]
    given = operands(MEASURED_TOKENS, size, rows // (1 + gated), jnp.bfloat16, gated)
    among = ("residual",) if size > rows else ("scale",) if gated else ("scale", "bias")
    got = gemv(
        given["x"], given["weight"], eps=EPS, gated=gated, out_dtype=jnp.float32,
        shape=MEASURED[matrix], interpret=INTERPRET, **{name: given[name] for name in among},
    )  # fmt: skip
    np.testing.assert_allclose(got, wide(given, gated, among), rtol=1e-4, atol=1e-4)


def test_both_ways_of_projecting_agree() -> None:
    given = operands(1, 512, 16, jnp.bfloat16, gated=True)

    def norm(x: jax.Array) -> jax.Array:
        power = jnp.mean(x.astype(jnp.float32) ** 2, axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(power + EPS)).astype(x.dtype) * given["scale"]

    norm.scale, norm.eps = given["scale"], EPS  # type: ignore[attr-defined]
    bound: Any = norm
    for bias, residual in ((given["bias"], given["residual"]), (None, None)):
        matrix: Any = SimpleNamespace(weight=given["weight"], bias=bias, summed=False)
        some: dict[str, Any] = {"norm": bound, "gated": True, "residual": residual}
        one = in_one_kernel(interpret=INTERPRET)(given["x"], matrix, **some)
        parts = in_parts(given["x"], matrix, **some)
        np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (one, parts)), atol=0.06)


def test_which_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MEASURED_TOKENS <= MAX_TOKENS and switches.NORM_TOKENS < VENDOR_TOKENS
    assert dict(projection("gemv", MEASURED_TOKENS).alone) == MEASURED
    assert projection("gemv", MEASURED_TOKENS + 1) == projection("norms", 1) == Products(norms=True)
    assert projection("norms", switches.NORM_TOKENS) == Products(norms=True)
    for name in PROJECTIONS:
        assert projection(name, switches.NORM_TOKENS + 1) is IN_PARTS
    assert projection("xla", 1) is IN_PARTS == Products()
    assert default_projection("gpu", "bfloat16", 1) == switches.PROJECTION
    monkeypatch.setattr(switches, "PROJECTION", "gemv")
    assert default_projection("gpu", "bfloat16", 1) == "gemv"
    # float32: the same tokens in every batch; a share of the matrix; other devices
    for platform, dtype, shards in (
        ("gpu", "float32", 1),
        ("gpu", "float16", 2),
        ("tpu", "bfloat16", 1),
    ):
        assert default_projection(platform, dtype, shards) == "xla"
