"""Ragged paged attention in plain JAX that does only the work there is. The CPU serving path.

Every loop bound is traced, so neither the context length nor the number of pages is a shape: one
program serves any of them.

Decode rows: the KV of all rows is cut into blocks, and the (row, block) pairs form one flat list
that is worked off `width` pairs at a time; a long row among short ones costs its own blocks and no
more. Prompt rows: a loop over rows, tiles of queries, and the blocks a tile can see, so that the
products are large. Both keep a running softmax in float32 (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018): the maximum m, the sum l of exp(logit - m), and the sum
acc of exp(logit - m) · v.

This code is traced once per layer of an unrolled program, so its HLO is kept small.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .contract import Extras, Options, RaggedBatch

_BLOCK = 128  # KV positions in a block, or one page where pages are larger
_QUERY_TILE = 64  # queries in a tile of a prompt row
_DECODE_BYTES = 4 << 20  # KV gathered per turn of the decode loop: about what a core's cache holds

_NEG_INF = float("-inf")


class _State(NamedTuple):
    """A running softmax. Leading dimensions `...` are queries and heads."""

    m: jax.Array  # [...] largest logit so far
    l: jax.Array  # [...] sum of exp(logit - m)  # noqa: E741
    acc: jax.Array  # [..., D] sum of exp(logit - m) · v


class _Layout(NamedTuple):
    """Sizes read off the slab."""

    page_size: int
    num_kv_heads: int
    group: int
    head_dim: int
    block: int


def attend(
    q: jax.Array, slab: jax.Array, batch: RaggedBatch, extras: Extras, options: Options
) -> tuple[jax.Array, jax.Array]:
    """See api.py."""
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_kv_heads = slab.shape[1], slab.shape[2] // 2
    group = num_heads // num_kv_heads
    block = page_size * max(1, _BLOCK // page_size)
    lay = _Layout(page_size, num_kv_heads, group, head_dim, block)
    # Added once, outside the loops.
    batch = batch._replace(page_table=batch.page_table + options.first_page)

    rows = min(num_tokens, batch.page_table.shape[0])
    state = _decode(q[:rows], slab, batch, extras, options, lay)
    out, lse = _finish(state, extras)  # [rows, KH, G, D], [rows, KH, G]
    decoding = jnp.arange(rows) < batch.num_decode
    out = jnp.where(decoding[:, None, None, None], out, 0.0).astype(q.dtype)
    lse = jnp.where(decoding[:, None, None], lse, _NEG_INF)
    out, lse = out.reshape(rows, num_heads, head_dim), lse.reshape(rows, num_heads)
    if options.decode_only:
        return out, lse
    pad = num_tokens - rows
    out = jnp.pad(out, ((0, pad), (0, 0), (0, 0)))
    lse = jnp.pad(lse, ((0, pad), (0, 0)), constant_values=_NEG_INF)
    return _prompt(q, slab, batch, extras, options, lay, out, lse)


def _start(sinks: jax.Array | None, shape: tuple[int, ...], lay: _Layout, axis: int) -> _State:
    """The state before any key: nothing, or the sink as a logit whose value is zero.

    `shape` is that of m; KV heads are its dimension `axis`, the heads of a group the next one.
    """
    acc = jnp.zeros((*shape, lay.head_dim), jnp.float32)
    if sinks is None:
        return _State(jnp.full(shape, _NEG_INF), jnp.zeros(shape), acc)
    per_head = sinks.reshape(lay.num_kv_heads, lay.group)
    m = lax.broadcast_in_dim(per_head, shape, (axis, axis + 1))
    return _State(m, jnp.ones(shape), acc)


def _finish(state: _State, extras: Extras) -> tuple[jax.Array, jax.Array]:
    """(output with KV heads at dimension 1 of [Q, KH, G, D], log of the softmax denominator)."""
    some = state.l > 0
    out = state.acc / jnp.where(some, state.l, 1.0)[..., None]
    if extras.v_scale is not None:
        out *= extras.v_scale[:, None, None]
    return out, state.m + jnp.log(state.l)


def _finite(m: jax.Array) -> jax.Array:
    """A maximum that exp(x - m) can take: where nothing was seen, 0 instead of -inf."""
    return jnp.where(m == _NEG_INF, 0.0, m)


def _load(
    slab: jax.Array, pages: jax.Array, usable: jax.Array, lay: _Layout
) -> tuple[jax.Array, jax.Array]:
    """K and V of blocks of pages, float32.

    Values that may not be used are zeroed, since 0 · NaN is NaN; their keys are left to the mask
    on the logits.

    Args:
      pages: [N, pages in a block] page ids.
      usable: [N, block] positions whose V is real.

    Returns:
      k, v: [N, KH, block, D].
    """
    kv = slab.at[pages].get(mode="promise_in_bounds")  # [N, pages, page, 2·KH, D]
    kv = kv.reshape(pages.shape[0], lay.block, lay.num_kv_heads, 2, lay.head_dim)
    kv = kv.astype(jnp.float32)
    k, v = kv[:, :, :, 0], kv[:, :, :, 1]
    v = jnp.where(usable[:, :, None, None], v, 0.0)
    return k.swapaxes(1, 2), v.swapaxes(1, 2)


def _logits(q: jax.Array, k: jax.Array, options: Options) -> jax.Array:
    """q [N, KH, Q, D] · k [N, KH, block, D] -> [N, KH, Q, block], capped. q is scaled already."""
    s = jnp.einsum("nkqd,nkbd->nkqb", q, k, precision=lax.Precision.HIGHEST)
    if options.soft_cap is not None:
        s = options.soft_cap * jnp.tanh(s / options.soft_cap)
    return s


def _weigh(p: jax.Array, v: jax.Array) -> jax.Array:
    """p [N, KH, Q, block] · v [N, KH, block, D] -> [N, KH, Q, D]."""
    return jnp.einsum("nkqb,nkbd->nkqd", p, v, precision=lax.Precision.HIGHEST)


def _scaled(q: jax.Array, extras: Extras, options: Options, lay: _Layout) -> jax.Array:
    """Queries [N, H, D] as float32 [N, KH, G, D], times the scale and the keys' own scale."""
    out = q.reshape(q.shape[0], lay.num_kv_heads, lay.group, lay.head_dim).astype(jnp.float32)
    out *= options.scale
    if extras.k_scale is not None:
        out *= extras.k_scale[:, None, None]
    return out


def _decode(
    q: jax.Array,
    slab: jax.Array,
    batch: RaggedBatch,
    extras: Extras,
    options: Options,
    lay: _Layout,
) -> _State:
    """Rows below num_decode, one query each: q [R, H, D] -> state over [R, KH, G]."""
    num_rows = q.shape[0]
    row_bytes = lay.block * 2 * lay.num_kv_heads * lay.head_dim * 4
    # Every turn rescales all rows' sums, so many rows want few turns.
    width = min(num_rows, max(_DECODE_BYTES // row_bytes, -(-num_rows // 8)))

    row = jnp.arange(num_rows)
    kv_len = jnp.where(row < batch.num_decode, batch.kv_lens[:num_rows], 0)
    first = jnp.zeros_like(kv_len)  # first position a row sees
    if options.window is not None:
        first = jnp.maximum(kv_len - options.window, 0)
    first_block = first // lay.block
    blocks = -(-kv_len // lay.block) - first_block  # [R] how many blocks each row reads
    ends = jnp.cumsum(blocks)  # row r has items ends[r] - blocks[r] up to ends[r]
    # All that a turn needs of a row, behind one gather. A last row that sees nothing stands for
    # the items past the end of the list.
    facts = jnp.stack([first_block - (ends - blocks), kv_len, first], axis=1)
    facts = jnp.pad(facts, ((0, 1), (0, 0)))
    q = _scaled(q, extras, options, lay)
    block_pages = jnp.arange(lay.block // lay.page_size)
    block_positions = jnp.arange(lay.block)

    def turn(i: jax.Array, state: _State) -> _State:
        item = i * width + jnp.arange(width)
        owner = jnp.sum(ends <= item[:, None], axis=1)  # [W]; num_rows past the end of the list
        fact = facts[owner]
        at = item + fact[:, 0]  # [W] block index within the row
        columns = at[:, None] * (lay.block // lay.page_size) + block_pages
        pages = batch.page_table.at[owner[:, None], columns].get(mode="clip")
        positions = at[:, None] * lay.block + block_positions
        seen = (positions < fact[:, 1:2]) & (positions >= fact[:, 2:3])  # [W, block]

        k, v = _load(slab, pages, seen, lay)
        s = jnp.where(
            seen[:, None, None], _logits(q.at[owner].get(mode="clip"), k, options), _NEG_INF
        )
        mine = owner[:, None] == row  # [W, R]
        tops = jnp.where(mine[:, :, None, None], s.max(axis=-1)[:, None], _NEG_INF)
        m = jnp.maximum(state.m, tops.max(axis=0))
        safe = _finite(m)
        p = jnp.exp(s - safe.at[owner].get(mode="clip")[..., None])
        decay = jnp.exp(state.m - safe)

        def per_row(x: jax.Array) -> jax.Array:
            """Sums over each row's items; a product with 0 and 1 would spread one row's NaN."""
            own = mine.reshape(width, num_rows, *(1 for _ in x.shape[1:]))
            return jnp.sum(jnp.where(own, x[:, None], 0.0), axis=0)

        return _State(
            m,
            state.l * decay + per_row(p.sum(axis=-1)),
            state.acc * decay[..., None] + per_row(_weigh(p, v)),
        )

    start = _start(extras.sinks, (num_rows, lay.num_kv_heads, lay.group), lay, axis=1)
    return lax.fori_loop(0, -(-ends[-1] // width), turn, start)


def _prompt(
    q: jax.Array,
    slab: jax.Array,
    batch: RaggedBatch,
    extras: Extras,
    options: Options,
    lay: _Layout,
    out: jax.Array,
    lse: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Rows from num_decode on: fills their tokens in out [T, H, D] and lse [T, H]."""
    num_tokens, num_heads, _ = q.shape
    tile = min(_QUERY_TILE, num_tokens)
    plan, num_tiles = _tiles(batch, options, num_tokens, tile)
    block_pages = jnp.arange(lay.block // lay.page_size)
    block_positions = jnp.arange(lay.block)

    def one_tile(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, low, high, offset, kv_len, first = plan[i]
        # The last tile of the array may hang over its end: move it back, and let it own less.
        at = jnp.minimum(low, num_tokens - tile)
        index = at + jnp.arange(tile)
        own = (index >= low) & (index < high)
        q_positions = jnp.where(own, index + offset, -1)[:, None]  # -1 sees nothing

        q_tile = _scaled(lax.dynamic_slice_in_dim(q, at, tile), extras, options, lay)
        q_tile = q_tile.transpose(1, 2, 0, 3)  # [KH, G, tile, D]
        q_rows = q_tile.reshape(1, lay.num_kv_heads, lay.group * tile, lay.head_dim)

        def one_block(b: jax.Array, state: _State) -> _State:
            columns = b * (lay.block // lay.page_size) + block_pages
            pages = batch.page_table.at[row, columns].get(mode="clip")
            positions = b * lay.block + block_positions
            usable = (positions < kv_len) & (positions >= first)
            k, v = _load(slab, pages[None], usable[None], lay)
            seen = positions <= q_positions  # [tile, block]
            if options.window is not None:
                seen &= positions > q_positions - options.window
            s = _logits(q_rows, k, options).reshape(*state.m.shape, lay.block)
            s = jnp.where(seen, s, _NEG_INF)  # [KH, G, tile, block]
            m = jnp.maximum(state.m, s.max(axis=-1))
            safe = _finite(m)
            p = jnp.exp(s - safe[..., None])
            decay = jnp.exp(state.m - safe)
            pv = _weigh(p.reshape(*q_rows.shape[:3], lay.block), v).reshape(state.acc.shape)
            return _State(m, state.l * decay + p.sum(axis=-1), state.acc * decay[..., None] + pv)

        start = _start(extras.sinks, (lay.num_kv_heads, lay.group, tile), lay, axis=0)
        last_block = (high - 1 + offset) // lay.block
        m, l, acc = lax.fori_loop(first // lay.block, last_block + 1, one_block, start)  # noqa: E741
        state = _State(m.transpose(2, 0, 1), l.transpose(2, 0, 1), acc.transpose(2, 0, 1, 3))
        new_out, new_lse = _finish(state, extras)
        new_out = new_out.reshape(tile, num_heads, lay.head_dim).astype(q.dtype)
        new_lse = new_lse.reshape(tile, num_heads)
        out, lse = carry
        new_out = jnp.where(own[:, None, None], new_out, lax.dynamic_slice_in_dim(out, at, tile))
        new_lse = jnp.where(own[:, None], new_lse, lax.dynamic_slice_in_dim(lse, at, tile))
        out = lax.dynamic_update_slice_in_dim(out, new_out, at, 0)
        return out, lax.dynamic_update_slice_in_dim(lse, new_lse, at, 0)

    return lax.fori_loop(0, num_tiles, one_tile, (out, lse))


def _tiles(
    batch: RaggedBatch, options: Options, num_tokens: int, tile: int
) -> tuple[jax.Array, jax.Array]:
    """The tiles of all prompt rows, computed once a step: the same for every layer of one window.

    Returns:
      plan: [tiles at most, 6] int32: row, first and end query index, what turns a query index into
        a position, kv_len, first position the tile sees.
      num_tiles: [] how many of them there are.
    """
    rows = jnp.arange(batch.kv_lens.shape[0])
    mine = (rows >= batch.num_decode) & (rows < batch.num_seqs)
    q_begins, q_ends = batch.cu_q_lens[:-1], batch.cu_q_lens[1:]
    counts = jnp.where(mine, -(-(q_ends - q_begins) // tile), 0)
    ends = jnp.cumsum(counts)
    item = jnp.arange(
        num_tokens // tile + rows.size
    )  # a row adds at most one tile that is not full
    row = jnp.sum(ends <= item[:, None], axis=1)
    row = jnp.minimum(row, rows.size - 1)
    low = q_begins[row] + (item - (ends - counts)[row]) * tile
    high = jnp.minimum(low + tile, q_ends[row])
    kv_len = batch.kv_lens[row]
    offset = kv_len - q_ends[row]
    first = jnp.zeros_like(low)
    if options.window is not None:
        first = jnp.maximum(low + offset - options.window + 1, 0)
    return jnp.stack([row, low, high, offset, kv_len, first], axis=1), ends[-1]
