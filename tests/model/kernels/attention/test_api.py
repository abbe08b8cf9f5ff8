"""What api.py refuses, which backend it picks, and what the compiled serving path looks like."""

from __future__ import annotations

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from quire.model.kernels.attention import api, ragged_paged_attention
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
