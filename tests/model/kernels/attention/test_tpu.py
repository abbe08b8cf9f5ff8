"""Which TPU kernel is chosen, and what JAX's is fed: that one only runs on a TPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.model.cache import fit, unfit
from quire.model.kernels.attention import ragged_paged_attention
from quire.model.kernels.attention.contract import Extras, Options, RaggedBatch
from quire.model.kernels.attention.tpu import for_jax_kernel, tiled, why_not_jax
from quire.model.kernels.attention.tpu_kernel import prompt_tile

I32 = jnp.int32


def shapes(rows: int, width: int) -> RaggedBatch:
    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, I32)

    return RaggedBatch(array(rows), array(rows, width), array(rows + 1), array(), array())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"soft_cap": 30.0}, None),
        ({"dtype": jnp.float32, "kv_heads": 4}, None),
        ({"head_dim": 256}, "head dim 256"),
        ({"kv_heads": 12}, "12 KV heads"),
        ({"table": (256, 896)}, None),
        ({"table": (256, 897)}, "page table: 1,048,576 bytes"),
        ({"table": (257, 896)}, "page table: 946,176 bytes"),
        ({"window": 9}, "window"),
        ({"return_lse": True}, "return_lse"),
        ({"extras": Extras(jnp.zeros(8), None, None)}, "sinks"),
        ({"extras": Extras(None, jnp.ones(8), None)}, "kv_scales"),
    ],
)
def test_jax_serves_what_it_can(changes: dict[str, Any], reason: str | None) -> None:
    given: dict[str, Any] = {
        "dtype": jnp.bfloat16, "kv_heads": 8, "head_dim": 128, "table": (256, 128),
        "window": None, "soft_cap": None, "return_lse": False, "extras": Extras(None, None, None),
    } | changes  # fmt: skip
    kv_heads, dim = given["kv_heads"], given["head_dim"]
    q = jax.ShapeDtypeStruct((64, 4 * kv_heads, dim), given["dtype"])
    slab = jax.ShapeDtypeStruct((99, 32, 2 * kv_heads, dim), given["dtype"])
    options = Options(
        0.1, 0, given["window"], given["soft_cap"],
        decode_only=False, return_lse=given["return_lse"],
    )  # fmt: skip
    got = why_not_jax(q, slab, shapes(*given["table"]), given["extras"], options)
    assert (got is None) == (reason is None)
    assert reason is None or (got is not None and got.startswith(reason))


@pytest.mark.parametrize(
    ("cu", "num_seqs", "fed_cu", "fed_seqs"),
    [
        ([0, 1, 5, 5], 2, [0, 1, 5, 5], 2),
        ([0, 0, 0, 0], 0, [0, 1, 1, 1], 1),
        ([0, 0, 0, 0], 2, [0, 1, 1, 1], 1),
        ([0, 1, 2, 9], 3, [0, 1, 2, 9], 3),
    ],
)
def test_jax_gets_no_row_without_a_key_and_no_empty_batch(
    cu: list[int], num_seqs: int, fed_cu: list[int], fed_seqs: int
) -> None:
    batch = RaggedBatch(
        jnp.asarray([7, 0, 3], I32), jnp.zeros((3, 2), I32), jnp.asarray(cu, I32),
        I32(num_seqs), I32(0),
    )  # fmt: skip
    fed = jax.jit(for_jax_kernel)(batch)
    np.testing.assert_array_equal(fed.kv_lens, [7, 1, 3])
    np.testing.assert_array_equal(fed.cu_q_lens, fed_cu)
    assert fed.num_seqs == fed_seqs and fed.num_seqs.dtype == I32


@pytest.mark.parametrize(
    ("heads", "want"), [((1, 64), (1, 128)), ((2, 80), (2, 128)), ((3, 256), (4, 256)),
                        ((5, 129), (8, 256)), ((12, 128), (12, 128))],
)  # fmt: skip
def test_slabs_fill_tiles(heads: tuple[int, int], want: tuple[int, int]) -> None:
    assert tiled(*heads) == want


def test_prompt_tiles_are_bounded() -> None:
    assert prompt_tile(2048, 32, 128) == 64
    assert prompt_tile(2048, 8, 64) == 128
    assert prompt_tile(40, 8, 64) == 32
    assert prompt_tile(8, 128, 256) == 16


def test_what_no_tpu_loads_is_refused() -> None:
    q, slab = jnp.zeros((4, 6, 64)), jnp.zeros((8, 16, 6, 64))
    rest = (jnp.zeros(4, I32), jnp.zeros((4, 2), I32), jnp.zeros(5, I32), I32(0), I32(0))
    with pytest.raises(ValueError, match="slab: got 3 KV heads of 64, must on TPU be padded to 4"):
        ragged_paged_attention(q, slab, *rest, scale=0.1, backend="tpu")
    half = jnp.float16
    with pytest.raises(ValueError, match="q: got float16, must be bfloat16 or float32 on TPU"):
        ragged_paged_attention(q.astype(half), slab, *rest, scale=0.1, backend="tpu")


def test_padded_heads_change_nothing() -> None:
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((4, 6, 64)), jnp.float32)
    kv = jnp.asarray(rng.standard_normal((3, 16, 6, 64)), jnp.float32)
    heads, dim = tiled(3, 64)
    padded = jnp.pad(kv, ((0, 0), (0, 0), (0, 2 * heads - 6), (0, dim - 64)))
    rest = (
        jnp.asarray([5, 20, 0, 9], I32), jnp.asarray([[1, 0], [2, 0], [0, 0], [1, 0]], I32),
        jnp.arange(5, dtype=I32), I32(4), I32(4),
    )  # fmt: skip
    want = ragged_paged_attention(q, kv, *rest, scale=0.1)
    q_fit = fit(q, 3, padded)
    assert q_fit.shape == (4, 8, 128)
    got = unfit(ragged_paged_attention(q_fit, padded, *rest, scale=0.1), 3, q.shape)
    np.testing.assert_allclose(got, want, atol=1e-6)
    k = kv[0, :, 0::2]  # what a page of keys looks like
    np.testing.assert_array_equal(fit(k, 3, padded), padded[0, :, 0::2])
