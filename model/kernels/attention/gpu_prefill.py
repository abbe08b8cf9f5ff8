"""GPU attention of prompt rows: tiles of queries, each over the KV blocks that it sees.

A tile holds a few consecutive tokens of one row with all query heads of one KV head, so that the
products are large enough for the tensor cores. Blocks that every token of the tile sees whole are
worked off without masks; those at the diagonal and at the edge of a window with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .contract import Extras, RaggedBatch
from .gpu_pallas import (
    LOWEST,
    Heads,
    Launch,
    call,
    cdiv,
    div,
    dot,
    finish,
    load,
    load_kv,
    optional_refs,
    page_ids,
    power_of_2,
    program_id,
    rem,
    softmax_step,
    store,
    when,
)

_UNUSED, _REAL, _EMPTY = range(3)


@dataclass(frozen=True)
class PrefillShape:
    """How the work is cut.

    Attributes:
      queries: (token, query head) pairs in a tile.
      block: KV tokens per turn of the loop.
      num_warps, num_stages: see Launch.
    """

    queries: int
    block: int
    num_warps: int
    num_stages: int


def tiles(batch: RaggedBatch, heads: Heads, num_tokens: int, tile: int) -> jax.Array:
    """The tiles of all prompt rows, computed once a step: the same for every layer of one window.

    The tokens after the last row make one row more, which sees nothing.

    Returns:
      [tiles at most, 7] int32, the last of a row first (those see most): kind, row, first and end
      query index, what turns a query index into a position, first and end KV position seen.
    """
    num_rows = batch.kv_lens.shape[0]
    rows = jnp.arange(num_rows + 1)
    prompt = (rows >= batch.num_decode) & (rows < batch.num_seqs)
    cu = batch.cu_q_lens
    rest = rows == batch.num_seqs
    begins = cu
    ends = jnp.where(rest, num_tokens, jnp.append(cu[1:], num_tokens))
    counts = jnp.where(prompt | rest, cdiv(jnp.maximum(ends - begins, 0), tile), 0)
    sums = jnp.cumsum(counts)
    total = sums[-1]

    item = total - 1 - jnp.arange(num_tokens // tile + num_rows + 1)
    row = jnp.minimum(jnp.sum(sums <= item[:, None], axis=1), num_rows)
    low = begins[row] + (item - (sums - counts)[row]) * tile
    high = jnp.minimum(low + tile, ends[row])
    kv_len = jnp.append(batch.kv_lens, 0)[row]
    offset = kv_len - ends[row]
    kind = jnp.where(rest[row], _EMPTY, _REAL)
    kind = jnp.where(item >= 0, kind, _UNUSED)
    kv_end = jnp.where(kind == _REAL, jnp.maximum(high + offset, 0), 0)
    kv_first = jnp.zeros_like(low)
    if heads.window is not None:
        kv_first = jnp.maximum(low + offset - heads.window + 1, 0)
    row = jnp.minimum(row, num_rows - 1)
    return jnp.stack([kind, row, low, high, offset, kv_first, kv_end], axis=1)


def prefill(
    q: jax.Array,
    slab: jax.Array,
    first_page: jax.Array,
    batch: RaggedBatch,
    extras: Extras,
    heads: Heads,
    shape: PrefillShape,
    out: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Fills in the tokens of rows from num_decode on, and zeros for those of no row, in place.

    Args:
      q: [T, KH, G, D].
      slab: [layers × pages × page, 2·KH, D].
      first_page: [1].
      out: o [T, KH, G, D] in q.dtype and lse [T, KH, G] float32, in which decode rows are done.
    """
    num_tokens, kv_heads, group, head_dim = q.shape
    groups = power_of_2(group)
    tile = max(1, shape.queries // groups)
    size = max(16, tile * groups)  # of the product's side
    block = shape.block
    work = tiles(batch, heads, num_tokens, tile)
    extra = [x for x in extras if x is not None]

    def attend_tile(*refs: Any) -> None:
        items, table, page, q_ref, slab_ref, *rest = refs
        sinks, k_scale, v_scale = optional_refs(rest, extras)
        o_ref, lse_ref = refs[-2:]
        head, item = program_id(0), program_id(1)
        kind, row, low, high, offset, kv_first, kv_end = (items[item, c] for c in range(7))

        @when(kind != _UNUSED)
        def work_off() -> None:
            lane, d = jnp.arange(size), jnp.arange(heads.dims)
            token, g = low + div(lane, groups), rem(lane, groups)
            real = (token < high) & (g < group)
            here = real[:, None] & (d < head_dim)[None, :]
            at = (token[:, None], head, g[:, None], d[None, :])
            queries = load(q_ref, at, here).astype(heads.compute)
            position = jnp.where(real, token + offset, -1)[:, None]
            scale = 1.0 if k_scale is None else k_scale[head]
            first = page[0]

            def pages(i: jax.Array) -> jax.Array:
                return page_ids(table, row, i, block, kv_end, heads) + first

            def turn(masked: bool) -> Callable[[jax.Array, Any], Any]:
                def body(i: jax.Array, carry: Any) -> Any:
                    held, *state = carry
                    seen = (kv_first, kv_end) if masked else None
                    k, v = load_kv(slab_ref, held, head, i, block, heads, seen)
                    x, c = heads.logits(dot(queries, k, b_transposed=True), scale)
                    if masked:
                        key = (i * block + jnp.arange(block))[None, :]
                        sees = key <= position
                        if heads.window is not None:
                            sees &= key > position - heads.window
                        x = jnp.where(sees, x, -jnp.inf)
                    state = softmax_step(x, c, v, tuple(state), interpret=heads.interpret)
                    return pages(i + 1), *state

                return body

            begin, end = div(kv_first, block), cdiv(kv_end, block)
            state: Any = (
                pages(begin),
                jnp.full((size,), LOWEST, jnp.float32),
                jnp.zeros((size,), jnp.float32),
                jnp.zeros((size, heads.dims), jnp.float32),
            )
            # Blocks in [whole, cut) are seen whole by the first token and by the last.
            cut = div(jnp.maximum(low + offset + 1, 0), block)
            cut = jnp.minimum(jnp.maximum(cut, begin), jnp.maximum(begin, end))
            if heads.window is None:
                whole = begin
            else:
                last = jnp.maximum(high + offset - heads.window, 0)
                whole = jnp.minimum(jnp.maximum(cdiv(last, block), begin), cut)
                state = lax.fori_loop(begin, whole, turn(masked=True), state)
            state = lax.fori_loop(whole, cut, turn(masked=False), state)
            state = lax.fori_loop(cut, end, turn(masked=True), state)

            sink = None
            if sinks is not None:
                sink = load(sinks, (head * group + g,), g < group)
                sink = jnp.where(kind == _REAL, sink, -jnp.inf)
            _, m, l, acc = state  # noqa: E741
            o, lse = finish(m, l, acc, sink, 1.0 if v_scale is None else v_scale[head])
            store(o_ref, at, o, here)
            store(lse_ref, (token, head, g), lse, real)

    args = [work, batch.page_table, first_page, q, slab, *extra, *out]
    return tuple(
        call(
            attend_tile,
            Launch(heads.interpret, shape.num_warps, shape.num_stages),
            name="attention_prefill",
            grid=(kv_heads, work.shape[0]),
            out=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out],
            args=args,
            aliases={len(args) - 2: 0, len(args) - 1: 1},
        )
    )
