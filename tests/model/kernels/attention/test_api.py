"""What api.py refuses, which backend it picks, and what the compiled serving path looks like."""

from __future__ import annotations

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from quire.model.kernels.attention import api, gpu, ragged_paged_attention
from quire.model.kernels.attention.contract import Extras, Options
from quire.model.kernels.attention.gpu_mosaic import MosaicShape, why_not, why_not_here
from quire.model.kernels.kv_write import write_kv

I32 = jnp.int32


def arguments(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "q": jnp.zeros((6, 4, 16)),
        "slab": jnp.zeros((8, 16, 4, 16)),
        "kv_lens": jnp.zeros(3, I32),
        "page_table": jnp.zeros((3, 2), I32),
        "cu_q_lens": jnp.zeros(4, I32),
        "num_seqs": I32(0),
        "num_decode": I32(0),
        "scale": 0.25,
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((6, 64))}, r"q: .*\[T, H, D\]"),
        ({"q": jnp.zeros((6, 4, 16), I32)}, "q: .*float32"),
        ({"q": jnp.zeros((6, 3, 16))}, "q: got 3 heads, must be a multiple of the slab's 2"),
        ({"q": jnp.zeros((0, 4, 16))}, "q: got no tokens"),
        ({"slab": jnp.zeros((8, 16, 3, 16))}, "slab: got shape"),
        ({"slab": jnp.zeros((8, 16, 64))}, "slab: got shape"),
        ({"slab": jnp.zeros((8, 16, 4, 32))}, "slab: got head dim 32, must be q's, 16"),
        ({"slab": jnp.zeros((8, 16, 4, 16), jnp.int8)}, "slab: got int8"),
        ({"kv_lens": jnp.zeros(3)}, "kv_lens: got float32, must be int32"),
        ({"kv_lens": jnp.zeros(0, I32)}, "kv_lens: got shape"),
        ({"page_table": jnp.zeros((2, 2), I32)}, "page_table: got shape"),
        ({"page_table": jnp.zeros((3, 0), I32)}, "page_table: got shape"),
        ({"cu_q_lens": jnp.zeros(3, I32)}, r"cu_q_lens: got shape \(3,\), must be \[4\]"),
        ({"num_seqs": jnp.zeros(1, I32)}, "num_seqs: got shape"),
        ({"num_decode": jnp.zeros(1, I32)}, "num_decode: got shape"),
        ({"decode_only": True}, "decode_only: got 6 tokens in 3 rows"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"first_page": 8}, "first_page: got 8, must be from 0 to below the slab's 8"),
        ({"first_page": -1}, "first_page: got -1"),
        ({"window": 0}, "window: got 0"),
        ({"soft_cap": 0.0}, "soft_cap: got 0.0"),
        ({"sinks": jnp.zeros(3)}, "sinks: got shape"),
        ({"sinks": jnp.zeros(())}, "sinks: got shape"),
        ({"kv_scales": (jnp.zeros(3), 1.0)}, r"kv_scales\[0\]: got shape"),
        ({"kv_scales": (1.0, jnp.zeros((2, 1)))}, r"kv_scales\[1\]: got shape"),
        ({"backend": "abacus"}, "backend: got 'abacus', must be one of reference, blockwise"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: ragged_paged_attention(**arguments(**changes)))


def test_says_once_when_a_platform_has_no_kernel(caplog: pytest.LogCaptureFixture) -> None:
    api.default_backend.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [api.default_backend(p) for p in ("cpu", "rocm", "rocm")] == ["blockwise"] * 3
    (said,) = [r.getMessage() for r in caplog.records if r.name == api.__name__]
    assert "rocm" in said


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"window": 9, "dtype": jnp.float16, "head_dim": 64}, None),
        ({"heads": 12, "kv_heads": 2, "page": 64}, None),
        ({"dtype": jnp.float32}, "queries of float32 over float32"),
        ({"cache": jnp.float8_e4m3fn}, "queries of bfloat16 over float8_e4m3fn"),
        ({"head_dim": 80}, "head dim 80"),
        ({"page": 256}, "pages of 256"),
        ({"heads": 34, "kv_heads": 2, "tokens": 128}, None),
        ({"heads": 34, "kv_heads": 2}, "96 tokens"),
        ({"heads": 64, "kv_heads": 2}, None),
        ({"tokens": 90}, "90 tokens"),
        ({"tokens": 24}, "24 tokens"),
        ({"soft_cap": 30.0}, "soft_cap or return_lse"),
        ({"return_lse": True}, "soft_cap or return_lse"),
        ({"extras": Extras(jnp.zeros(32), None, None)}, "sinks or kv_scales"),
    ],
)
def test_mosaic_serves_what_it_can(changes: dict[str, Any], reason: str | None) -> None:
    if jax.__version_info__ < (0, 11):
        reason = "JAX 0.10"
    given: dict[str, Any] = {
        "tokens": 96, "heads": 32, "kv_heads": 8, "head_dim": 128, "page": 32,
        "dtype": jnp.bfloat16, "window": None, "soft_cap": None, "return_lse": False,
        "extras": Extras(None, None, None),
    } | changes  # fmt: skip
    dim, dtype = given["head_dim"], given["dtype"]
    q = jax.ShapeDtypeStruct((given["tokens"], given["heads"], dim), dtype)
    slab = (99, given["page"], 2 * given["kv_heads"], dim)
    options = Options(
        0.1, 0, given["window"], given["soft_cap"],
        decode_only=False, return_lse=given["return_lse"],
    )  # fmt: skip
    slab = jax.ShapeDtypeStruct(slab, given.get("cache", dtype))
    got = why_not(q, slab, given["extras"], options, MosaicShape())
    assert (got is None) == (reason is None)
    assert reason is None or (got is not None and got.startswith(reason))


def test_mosaic_is_for_hopper_alone_and_says_what_it_cannot() -> None:
    assert jax.default_backend() != "cpu" or why_not_here() is not None
    q, slab = jnp.zeros((24, 4, 64), jnp.bfloat16), jnp.zeros((8, 16, 4, 64), jnp.bfloat16)
    rest = (jnp.zeros(3, I32), jnp.zeros((3, 2), I32), jnp.zeros(4, I32), I32(0), I32(0))
    batch, options = gpu.RaggedBatch(*rest), Options(0.1, 0, None, None, False, False)
    with pytest.raises(NotImplementedError, match="prefill by Mosaic: cannot serve"):
        gpu.attend(q, slab, batch, Extras(None, None, None), options, prefill_shape=MosaicShape())


@pytest.mark.parametrize("decode_only", [True, False])
def test_layers_that_write_and_attend_never_copy_the_slab(decode_only: bool) -> None:
    """Two unrolled layers over one donated slab: updated in place, and little temporary memory."""
    pages, page, kv_heads, dim, rows = 4096, 16, 2, 32, 8
    tokens = rows if decode_only else 40
    slab = jax.ShapeDtypeStruct((2 * pages, page, 2 * kv_heads, dim), jnp.float32)

    def step(slab: Any, q: Any, at: Any, lens: Any, table: Any, cu: Any, n: Any, nd: Any) -> Any:
        for layer in range(2):
            first = layer * pages
            k = q[:, :kv_heads] + layer
            slab = write_kv(slab, k, k * 2, at[0] + first, at[1])
            q = ragged_paged_attention(
                q, slab, lens, table, cu, n, nd,
                scale=0.1, first_page=first, window=100, decode_only=decode_only,
                backend="blockwise",
            )  # fmt: skip
        return slab, q

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, I32)

    q = jax.ShapeDtypeStruct((tokens, 8, dim), jnp.float32)
    args = (slab, q, ints(2, tokens), ints(rows), ints(rows, 64), ints(rows + 1), ints(), ints())
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    shape = re.escape("f32[" + ",".join(map(str, slab.shape)) + "]")
    text = compiled.as_text()
    assert re.search(shape, text)
    assert not re.findall(rf"= {shape}\S* copy(?:-start)?\(.*", text)
    memory = compiled.memory_analysis()
    slab_bytes = 2 * pages * page * 2 * kv_heads * dim * 4
    assert memory.alias_size_in_bytes >= slab_bytes
    assert memory.temp_size_in_bytes < slab_bytes / 4


@pytest.mark.parametrize(
    ("gib", "dtype", "served"),
    [(2, "float8_e4m3fn", True), (3, "float8_e4m3fn", False), (4, "float8_e4m3fn", False),
     (5, "float8_e4m3fn", True), (4, "bfloat16", True), (6, "bfloat16", True)],
)  # fmt: skip
def test_gpu_slabs_whose_offsets_do_not_fit_are_refused(gib: int, dtype: str, served: bool) -> None:
    """Pallas counts in signed 32 bits up to 4 GiB, that many included."""

    def shape(*size: int, of: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, of)

    pages = gib * 2**30 // (32 * 8 * 128) // jnp.dtype(dtype).itemsize
    args = (
        shape(8, 16, 128, of=jnp.bfloat16), shape(pages, 32, 8, 128, of=jnp.dtype(dtype)),
        shape(8), shape(8, 4), shape(9), shape(), shape(),
    )  # fmt: skip

    def attend() -> Any:
        return jax.eval_shape(
            lambda *a: ragged_paged_attention(*a, scale=1.0, backend="gpu", decode_only=True), *args
        )

    if served:
        assert attend().shape == (8, 16, 128)
    else:
        with pytest.raises(NotImplementedError, match="slab: float8"):
            attend()
