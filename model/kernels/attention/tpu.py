"""Ragged paged attention on TPU: JAX's own kernel where it serves, else Quire's (tpu_kernel.py).

JAX's is proven on real chips, and only compiles there: it runs under no interpreter. So
`why_not_jax` and what is fed to the kernel are tested on their own, and Quire's kernel is tested
interpreted (`attend_interpreted`), race detection and all.

Slabs must suit how a TPU lays out memory (`tiled`; model/cache.py makes them so): a head dim of
whole 128-lane registers and KV heads that fill tiles. A slab that does not would be copied whole by
XLA in front of every kernel, so it is refused.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from . import tpu_kernel
from .contract import Extras, Options, RaggedBatch

LANES = 128

# Scalar memory holds 1 MiB; JAX's kernel wants the page table there, beside what it needs itself.
_TABLE_BYTES = 896 << 10

# JAX's kernel asks jax.devices() for a chip when it is not told its block sizes.
_KV_BLOCK = 256  # positions
_QUERIES = 32
_DECODE_QUERIES = 8  # every row's work is done for all queries of a block
_VMEM_BYTES = 48 << 20


def attend(
    q: jax.Array, slab: jax.Array, batch: RaggedBatch, extras: Extras, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """See api.py.

    Raises:
      ValueError: a type no TPU kernel loads, or a slab whose layout would be copied.
    """
    for name, dtype in (("q", q.dtype), ("slab", slab.dtype)):
        if dtype == jnp.float16:
            raise ValueError(f"{name}: got float16, must be bfloat16 or float32 on TPU")
    kv_heads, head_dim = slab.shape[2] // 2, slab.shape[3]
    if (fitting := tiled(kv_heads, head_dim)) != (kv_heads, head_dim):
        raise ValueError(
            f"slab: got {kv_heads} KV heads of {head_dim}, must on TPU be padded to {fitting[0]} "
            f"of {fitting[1]}"
        )
    if why_not_jax(q, slab, batch, extras, options) is None:
        return _jax_kernel(q, slab, batch, options), None
    return tpu_kernel.attend(q, slab, batch, extras, options)


def attend_interpreted(
    q: jax.Array, slab: jax.Array, batch: RaggedBatch, extras: Extras, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """Quire's kernel on CPU, for tests: what is uninitialised is NaN, what is out of bounds raises,
    and races are found."""
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return tpu_kernel.attend(q, slab, batch, extras, options, interpret=interpret)


def tiled(kv_heads: int, head_dim: int) -> tuple[int, int]:
    """(KV heads, head dim) that a slab must have for its pages to fill whole tiles of memory.

    XLA rounds up to tiles in memory anyway, so padding to them costs none.
    """
    heads = kv_heads if kv_heads <= 2 else -(-kv_heads // 4) * 4
    return heads, -(-head_dim // LANES) * LANES


def why_not_jax(
    q: jax.Array, slab: jax.Array, batch: RaggedBatch, extras: Extras, options: Options
) -> str | None:
    """Why JAX's kernel does not serve this, None where it does."""
    if slab.shape[3] != LANES:
        return f"head dim {slab.shape[3]}: it loads keys of {LANES} lanes"
    packing = 4 // slab.dtype.itemsize
    tiles, rest = divmod(slab.shape[2], packing)
    if rest or not (tiles in (1, 2, 4, 8) or tiles % 8 == 0):
        return f"{slab.shape[2] // 2} KV heads of {slab.dtype}: it wants tiles filled"
    rows, width = batch.page_table.shape
    table_bytes = -(-rows // 8) * 8 * -(-width // LANES) * LANES * 4
    if table_bytes > _TABLE_BYTES:
        return f"page table: {table_bytes:,} bytes of scalar memory, it has {_TABLE_BYTES:,}"
    if extras.sinks is not None:
        return "sinks: it has none"
    if extras.k_scale is not None or extras.v_scale is not None:
        return "kv_scales: it takes one static number for all heads"
    if options.window is not None:
        return "window: it reads what lies behind it, and works on it"
    if options.return_lse:
        return "return_lse: it keeps the sums to itself"
    return None


def _jax_kernel(q: jax.Array, slab: jax.Array, batch: RaggedBatch, options: Options) -> jax.Array:
    # Imported where it is used: it is experimental, and only a TPU (or a compile for one) needs it.
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    fed = for_jax_kernel(batch)
    num_tokens, page = q.shape[0], slab.shape[1]
    out = ragged_paged_attention(
        q,
        slab,
        fed.kv_lens,
        fed.page_table + options.first_page,
        fed.cu_q_lens,
        fed.num_seqs[None],
        sm_scale=options.scale,
        soft_cap=options.soft_cap,
        num_kv_pages_per_block=min(max(1, _KV_BLOCK // page), fed.page_table.shape[1]),
        num_queries_per_block=min(_DECODE_QUERIES if options.decode_only else _QUERIES, num_tokens),
        vmem_limit_bytes=_VMEM_BYTES,
    )
    exists, position = tpu_kernel.token_positions(batch, num_tokens)
    return tpu_kernel.blank_unseen(out, exists, position)


def for_jax_kernel(batch: RaggedBatch) -> RaggedBatch:
    """The batch as JAX's kernel can bear it.

    It fetches the first block of each row ahead and awaits it when it comes to the row's keys, so a
    row without keys, or a batch without rows or queries, would leave a copy unawaited. Here each
    row gets a key, an empty batch a row of one query; what those give is blanked afterwards. (Rows
    without queries among others are fine, save at the very end; the scheduler makes none.)
    """
    none = batch.cu_q_lens[jnp.minimum(batch.num_seqs, batch.kv_lens.size)] <= 0
    none |= batch.num_seqs <= 0
    one_query = jnp.minimum(jnp.arange(batch.cu_q_lens.size, dtype=jnp.int32), 1)
    return batch._replace(
        kv_lens=jnp.maximum(batch.kv_lens, 1),
        cu_q_lens=jnp.where(none, one_query, batch.cu_q_lens),
        num_seqs=jnp.where(none, 1, batch.num_seqs).astype(jnp.int32),
    )
