"""A product of some dozen tokens with what surrounds it in one kernel, interpreted, against
float64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from products import ALL, EPS, operands, wide

from quire.model.kernels.gemm_gpu import MAX_TOKENS, GemmShape, gemm

SMALL = GemmShape(rows=16, block=64, programs=8, least_turns=2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("among", [(), ("scale",), ALL], ids=["bare", "norm", "all"])
@pytest.mark.parametrize(
    ("tokens", "size", "out", "parts"),
    [
        (5, 130, 40, 1),  # the last turn and the last program reach beyond the matrix
        (33, 512, 48, 2),  # two programs share rows
        (16, 1000, 24, 4),  # the last of four has less to do
    ],
)
def test_equals_the_definition(
    tokens: int, size: int, out: int, parts: int, among: tuple[str, ...], gated: bool
) -> None:
    given = operands(tokens, size, out, jnp.float32, gated)
    assert SMALL.parts(out, size) == parts
    got = gemm(
        given["x"], given["weight"], eps=EPS, gated=gated, shape=SMALL, interpret=True,
        **{name: given[name] for name in among},
    )  # fmt: skip
    expected = wide(given, gated, among)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_small_types(dtype: Any) -> None:
    given = operands(MAX_TOKENS, 300, 40, dtype, gated=True)
    extras = {name: given[name] for name in ALL}
    got = gemm(
        given["x"], given["weight"], eps=EPS, gated=True, shape=SMALL, interpret=True,
        **extras,
    )  # fmt: skip
    expected = wide(given, True, ALL)
    bound = float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=bound)


def test_parts_fill_the_device_and_are_not_too_short() -> None:
    assert GemmShape().parts(4096, 14336) == 2  # 64 tiles of 132
    assert GemmShape().parts(6144, 4096) == 1
    assert GemmShape(programs=10_000).parts(4096, 4096) == 8  # of four turns each
