"""That the interpreter still sees what the kernels' tests rely on it to see."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

X = jnp.arange(8 * 128, dtype=jnp.float32).reshape(8, 128)


def copy_through_buffer(x: jax.Array, mode: Any, *, wait_first: bool) -> jax.Array:
    """x by way of a scratch buffer, whose copy is awaited before or after it is read."""

    def kernel(x: Any, out: Any, buffer: Any, arrived: Any) -> None:
        copy = pltpu.make_async_copy(x, buffer, arrived)
        copy.start()
        if wait_first:
            copy.wait()
        out[...] = buffer[...]
        if not wait_first:
            copy.wait()

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode),
    )(x)


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
def test_a_read_before_the_copy_has_arrived(mode: Any, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        got = np.asarray(copy_through_buffer(X, mode, wait_first=False))
    except jax.errors.JaxRuntimeError as error:  # from JAX 0.12 on
        assert "race" in str(error).lower()
        return
    assert "RACE DETECTED" in capsys.readouterr().out
    assert np.isnan(got).all() == (mode == "on_wait")  # what is uninitialised is NaN


def test_no_false_alarm() -> None:
    np.testing.assert_array_equal(copy_through_buffer(X, "on_wait", wait_first=True), X)
