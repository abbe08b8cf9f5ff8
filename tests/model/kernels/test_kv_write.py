"""write_kv: where tokens land, what is dropped, and that nothing is copied."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.model.kernels import switches
from quire.model.kernels.kv_write import ROTATING, WRITERS, default_writer, write_kv

# Each says in its own words what runs where: "tpu" itself runs on a TPU alone.
RUN_HERE = [name for name in WRITERS if name != "tpu"]
PAGES, PAGE, HEADS, DIM = 6, 4, 2, 8


def tokens(n: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, n, HEADS, DIM)).astype(np.float32)
    return jnp.asarray(k), jnp.asarray(v)


def ints(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def test_every_platform_has_a_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches, "WRITER", "gpu")
    assert [default_writer(p, 1) for p in ("cpu", "tpu")] == ["scatter", "tpu"]
    assert default_writer("gpu", 1) == switches.WRITER
    assert default_writer("gpu", 2) == "scatter"
    assert not WRITERS.keys() & ROTATING.keys()


@pytest.mark.parametrize("writer", RUN_HERE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_interleave_and_tokens_out_of_range_are_dropped(dtype: Any, writer: str) -> None:
    slab = jnp.full((PAGES, PAGE, 2 * HEADS, DIM), 7, dtype)
    k, v = tokens(8)
    # Kept: 0, 1 and 7. Every other token is out of range on one side of one index.
    pages = ints(5, 0, PAGES, PAGES, PAGES + 99, -1, 2, 2)
    offsets = ints(3, 0, 0, 0, 1, 0, PAGE, 1)
    got = jax.jit(partial(write_kv, writer=writer))(slab, k, v, pages, offsets)
    want = np.full(slab.shape, 7, np.float32)
    for t in (0, 1, 7):
        for head in range(HEADS):
            want[pages[t], offsets[t], 2 * head] = k[t, head]
            want[pages[t], offsets[t], 2 * head + 1] = v[t, head]
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, jnp.asarray(want).astype(dtype))


@pytest.mark.parametrize("writer", RUN_HERE)
def test_a_negative_offset_is_dropped(writer: str) -> None:
    slab = jnp.zeros((PAGES, PAGE, 2 * HEADS, DIM))
    k, v = tokens(1)
    assert not np.any(write_kv(slab, k, v, ints(1), ints(-1), writer=writer))


@pytest.mark.parametrize("writer", RUN_HERE)
def test_prompt_tokens_in_runs_of_every_kind(writer: str) -> None:
    """Runs within a page, over its end, over the end of the tokens, with padding among them."""
    n, page = 150, 32
    where = np.full((n, 2), -1, np.int32)
    for begin, first, length in ((0, 0, 64), (64, 5, 40), (112, 64, 38)):
        positions = first + np.arange(length)
        table = np.array([7, 3, 9, 1]) if begin != 64 else np.array([2, 8])
        where[begin : begin + length] = np.stack([table[positions // page], positions % page], 1)
    where[30] = (-1, 0)  # a hole in a run
    where[104:107] = [(4, 30), (4, 31), (5, 0)]  # what follows is padding
    k, v = tokens(n)
    slab = jnp.full((10, page, 2 * HEADS, DIM), 7.0)
    got = jax.jit(partial(write_kv, writer=writer))(slab, k, v, *(jnp.asarray(x) for x in where.T))
    want = np.full(slab.shape, 7, np.float32)
    for t, (p, o) in enumerate(where):
        if p >= 0:
            want[p, o, 0::2], want[p, o, 1::2] = k[t], v[t]
    np.testing.assert_array_equal(got, want)


def test_a_donated_slab_is_updated_in_place() -> None:
    step = jax.jit(write_kv, donate_argnums=0)
    slab = jnp.zeros((512, PAGE, 2 * HEADS, DIM))
    args = (*tokens(3), ints(1, 2, 512), ints(0, 1, 2))
    compiled = step.lower(slab, *args).compile()
    shape = "f32[" + ",".join(map(str, slab.shape)) + "]"
    copies = [line for line in compiled.as_text().splitlines() if f"= {shape}" in line]
    assert copies and not any(" copy(" in line for line in copies)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == slab.nbytes
    assert memory.temp_size_in_bytes < slab.nbytes / 8
    before = slab.unsafe_buffer_pointer()
    slab = step(slab, *args)
    assert slab.unsafe_buffer_pointer() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": jnp.zeros((3, HEADS + 1, DIM))}, "v: got shape"),
        ({"slab": jnp.zeros((PAGES, PAGE, HEADS, DIM))}, "slab: got shape"),
        ({"slab": jnp.zeros((PAGES, PAGE, 2 * HEADS, DIM), jnp.int8)}, "slab: got int8"),
        ({"pages": ints(0)}, "pages: got"),
        ({"offsets": jnp.zeros(3)}, "offsets: got float32"),
        ({"writer": "magic"}, "writer: got 'magic'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    k, v = tokens(3)
    given = {
        "slab": jnp.zeros((PAGES, PAGE, 2 * HEADS, DIM)),
        "k": k,
        "v": v,
        "pages": ints(0, 1, 2),
        "offsets": ints(0, 0, 0),
    }
    with pytest.raises(ValueError, match=message):
        write_kv(**(given | changes))
