"""The oracle: ragged paged attention stated token by token, with nothing clever in it.

Every other backend is tested against this file, and this file against a NumPy float64 statement.
Its cost is tokens × the whole page-table row, so it serves no one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .contract import Extras, Options, RaggedBatch


def attend(
    q: jax.Array, slab: jax.Array, batch: RaggedBatch, extras: Extras, options: Options
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale · q Kᵀ) V per token, over the positions that token sees. See api.py."""
    num_tokens, num_heads, head_dim = q.shape
    num_rows, max_pages = batch.page_table.shape
    page_size, num_kv_heads = slab.shape[1], slab.shape[2] // 2
    group = num_heads // num_kv_heads
    starts, ends = batch.cu_q_lens[:-1], batch.cu_q_lens[1:]
    row_exists = jnp.arange(num_rows) < batch.num_seqs
    kv_positions = jnp.arange(max_pages * page_size)

    def one_token(token: jax.Array) -> tuple[jax.Array, jax.Array]:
        owners = row_exists & (starts <= token) & (token < ends)  # [S], at most one is true
        row = jnp.argmax(owners)
        q_len = ends[row] - starts[row]
        position = batch.kv_lens[row] - q_len + (token - starts[row])

        sees = jnp.any(owners) & (kv_positions <= position)  # [M·page]
        if options.window is not None:
            sees &= kv_positions > position - options.window

        kv = slab[options.first_page + batch.page_table[row]]  # [M, page, 2·KH, D]
        kv = kv.reshape(-1, num_kv_heads, 2, head_dim).astype(jnp.float32)
        # Unseen positions may hold NaN, and 0 · NaN is NaN: they must go before the product.
        kv = jnp.where(sees[:, None, None, None], kv, 0.0)
        k, v = kv[:, :, 0], kv[:, :, 1]  # [M·page, KH, D]
        if extras.k_scale is not None:
            k = k * extras.k_scale[:, None]
        if extras.v_scale is not None:
            v = v * extras.v_scale[:, None]

        highest = jax.lax.Precision.HIGHEST
        queries = q[token].astype(jnp.float32).reshape(num_kv_heads, group, head_dim)
        logits = jnp.einsum("kgd,tkd->kgt", queries, k, precision=highest) * options.scale
        if options.soft_cap is not None:
            logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
        logits = jnp.where(sees, logits, -jnp.inf)  # [KH, G, M·page]
        if extras.sinks is not None:
            sink = jnp.where(jnp.any(owners), extras.sinks, -jnp.inf)
            sink = sink.reshape(num_kv_heads, group, 1)
            logits = jnp.concatenate([logits, sink], axis=2)
            v = jnp.concatenate([v, jnp.zeros_like(v[:1])])

        top = jnp.max(logits, axis=2, keepdims=True)
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0))
        total = jnp.sum(weights, axis=2, keepdims=True)  # 0 where a token sees nothing
        probs = weights / jnp.where(total > 0, total, 1.0)
        out = jnp.einsum("kgt,tkd->kgd", probs, v, precision=highest).astype(q.dtype)
        lse = top + jnp.log(total)
        return out.reshape(num_heads, head_dim), lse.reshape(num_heads)

    return jax.lax.map(one_token, jnp.arange(num_tokens))
