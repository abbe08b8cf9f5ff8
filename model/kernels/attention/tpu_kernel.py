"""Quire's own ragged paged attention for TPU: whatever JAX's kernel does not do (see tpu.py).

The work is a list of items, made by XLA once a step: an item is a tile of queries and a row that
has queries in it. A decode row is an item of one query; prompt rows share tiles of `_tile` queries,
and each writes its own rows of the output block, which stays in VMEM between the items of a tile.
The kernel's grid is the list. Per item it streams the pages its queries can see from HBM through
two buffers; while it works on one block of pages the next is under way, the next item's first block
included. So short rows cost no latency each.

Queries come as [blocks, KH, group × tile, D] (XLA transposes; tiles are aligned, so nothing is
gathered): a KV head's queries are one matrix. The page-table row of an item reaches scalar memory
as a block of the grid's own pipeline: no table is too large, and its width is no bucket.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .contract import Extras, Options, RaggedBatch

LANES = 128

_BLOCK = 256  # KV positions in a block, or one page where pages are larger
_TILE_ELEMENTS = 256 << 10  # of a tile's queries; bounds VMEM
_MAX_TILE = 128  # queries of a prompt tile
_VMEM_BYTES = 48 << 20  # what the compiler may use; about 10 MB are
_LOWEST = -0.7 * 3.4e38  # a maximum of nothing: finite, so that differences are

# Fields of an item, rows of the int32 list. With them comes the first page of the layer, the same
# in all, so that layers share one kernel.
_BLOCK_ID, _ROW, _LOW, _HIGH, _OFFSET, _FIRST, _END, _FIRST_PAGE = range(8)


class _Shape(NamedTuple):
    """Static sizes of one call."""

    tile: int  # queries in a tile
    group: int  # query heads of a KV head
    kv_heads: int
    page: int
    pages: int  # pages in a KV block
    head_dim: int

    @property
    def block(self) -> int:
        return self.page * self.pages

    @property
    def queries(self) -> int:
        """Rows of a KV head's query matrix: head of the group, then query of the tile."""
        return self.group * self.tile


def attend(
    q: jax.Array,
    slab: jax.Array,
    batch: RaggedBatch,
    extras: Extras,
    options: Options,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
    """See api.py. `interpret` is what pl.pallas_call takes."""
    num_tokens, num_heads, head_dim = q.shape
    num_rows = batch.page_table.shape[0]
    page, kv_heads = slab.shape[1], slab.shape[2] // 2
    group = num_heads // kv_heads
    pages = max(1, _BLOCK // page)
    decode = _Shape(1, group, kv_heads, page, pages, head_dim)
    call = functools.partial(
        _call, slab=slab, batch=batch, extras=extras, options=options, interpret=interpret
    )

    rows = jnp.arange(num_rows)
    token = jnp.arange(num_tokens)
    decoding = rows < batch.num_decode
    width = min(num_tokens, num_rows)
    out, lse = call(q[:width], decode, begins=rows, ends=jnp.where(decoding, rows + 1, rows))
    position = batch.kv_lens[:width] - 1
    exists = decoding[:width]
    if not options.decode_only:
        pad = num_tokens - width
        tile = prompt_tile(num_tokens, num_heads, head_dim)
        prompting = (rows >= batch.num_decode) & (rows < batch.num_seqs)
        begins = jnp.where(prompting, batch.cu_q_lens[:-1], 0)
        ends = jnp.where(prompting, batch.cu_q_lens[1:], 0)
        prompt_out, prompt_lse = call(q, decode._replace(tile=tile), begins=begins, ends=ends)
        is_decode = (token < batch.num_decode)[:, None, None]
        out = jnp.where(is_decode, jnp.pad(out, ((0, pad), (0, 0), (0, 0))), prompt_out)
        if lse is not None and prompt_lse is not None:
            lse = jnp.where(is_decode[..., 0], jnp.pad(lse, ((0, pad), (0, 0))), prompt_lse)
        exists, position = token_positions(batch, num_tokens)
    if lse is not None:
        lse = _blank_lse(lse, exists, position, extras.sinks)
    return blank_unseen(out, exists, position), lse


def prompt_tile(num_tokens: int, num_heads: int, head_dim: int) -> int:
    """Queries in a tile of prompt rows: a power of two from 16 on."""
    tile = 16
    most = min(_MAX_TILE, _TILE_ELEMENTS // (num_heads * head_dim), num_tokens)
    while tile * 2 <= most:
        tile *= 2
    return tile


def token_positions(batch: RaggedBatch, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """([T] whether a row owns the token, [T] the token's position in that row)."""
    token = jnp.arange(num_tokens)
    real = jnp.arange(batch.kv_lens.size) < batch.num_seqs
    begins, ends = batch.cu_q_lens[:-1], batch.cu_q_lens[1:]
    owns = real & (begins <= token[:, None]) & (token[:, None] < ends)  # [T, S]
    # A sum picks the one owner; no gather.
    shift = jnp.sum(jnp.where(owns, batch.kv_lens - ends, 0), axis=1)
    return jnp.any(owns, axis=1), token + shift


def blank_unseen(out: jax.Array, exists: jax.Array, position: jax.Array) -> jax.Array:
    """Zeros where a token sees nothing; kernels leave those as memory was."""
    return jnp.where((exists & (position >= 0))[:, None, None], out, 0)


def _blank_lse(
    lse: jax.Array, exists: jax.Array, position: jax.Array, sinks: jax.Array | None
) -> jax.Array:
    """-inf, in a row that exists the sink alone, where a token sees nothing."""
    nothing = jnp.full_like(lse, -jnp.inf)
    if sinks is not None:
        nothing = jnp.where(exists[:, None], sinks, nothing)
    return jnp.where((exists & (position >= 0))[:, None], lse, nothing)


def _items(
    batch: RaggedBatch,
    options: Options,
    tile: int,
    begins: jax.Array,
    ends: jax.Array,
    most: int,
) -> tuple[jax.Array, jax.Array]:
    """The list of work: int32 [8, most] (fields above), and how many items it has, at least one.

    Row r has the queries begins[r] up to ends[r]. Items are in the order of their tiles. Past the
    end of the list (and for an empty one) stand items that see and own nothing.
    """
    first_tile = begins // tile
    counts = jnp.where(ends > begins, -(-ends // tile) - first_tile, 0)
    upto = jnp.cumsum(counts)
    item = jnp.arange(most)
    row = jnp.sum(upto <= item[:, None], axis=1)
    real = row < begins.size
    row = jnp.minimum(row, begins.size - 1)
    facts = jnp.stack([first_tile - (upto - counts), begins, ends, batch.kv_lens - ends])
    first, begin, end, offset = facts[:, row]
    block = jnp.where(real, first + item, 0)
    low = jnp.where(real, jnp.maximum(begin, block * tile), 0)
    high = jnp.where(real, jnp.minimum(end, (block + 1) * tile), 0)
    offset = jnp.where(real, offset, 0)
    seen_end = jnp.maximum(high + offset, 0)
    seen_first = jnp.zeros_like(low)
    if options.window is not None:
        seen_first = jnp.clip(low + offset - options.window + 1, 0, seen_end)
    first_page = jnp.broadcast_to(jnp.asarray(options.first_page), item.shape)
    fields = [block, row, low, high, offset, seen_first, seen_end, first_page]
    return jnp.stack(fields).astype(jnp.int32), jnp.maximum(upto[-1], 1).astype(jnp.int32)


def _call(
    q: jax.Array,
    shape: _Shape,
    *,
    slab: jax.Array,
    batch: RaggedBatch,
    extras: Extras,
    options: Options,
    begins: jax.Array,
    ends: jax.Array,
    interpret: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """One kernel over the queries that rows have between `begins` and `ends`.

    Returns o [T, H, D] and, if asked for, lse [T, H]; what no item owns is left as memory was.
    """
    s = shape
    num_tokens, num_heads, head_dim = q.shape
    num_rows, width = batch.page_table.shape
    blocks = -(-num_tokens // s.tile)
    q = jnp.pad(q, ((0, blocks * s.tile - num_tokens), (0, 0), (0, 0)))
    q = q.reshape(blocks, s.tile, s.kv_heads, s.group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(blocks, s.kv_heads, s.queries, head_dim)

    # One more than there can be: an item looks at the next one.
    most = (num_rows if s.tile == 1 else num_rows + blocks) + 1
    items, count = _items(batch, options, s.tile, begins, ends, most)
    ones = jnp.ones(s.kv_heads, jnp.float32)
    k_scale, v_scale = (ones if x is None else x for x in (extras.k_scale, extras.v_scale))
    factors = jnp.stack([k_scale * options.scale, v_scale])  # [2, KH]
    table = batch.page_table.reshape(num_rows, 1, width)

    def of_row(ahead: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, 1, width),
            lambda i, items: (items[_ROW, i + ahead], 0, 0),
            memory_space=pltpu.SMEM,
        )

    def of_tile(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, s.kv_heads, s.queries, lanes), lambda i, items: (items[_BLOCK_ID, i], 0, 0, 0)
        )

    inputs = [factors, table, table, q, slab]
    in_specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        of_row(0),
        of_row(1),
        of_tile(head_dim),
        pl.BlockSpec(memory_space=pltpu.HBM),
    ]
    if extras.sinks is not None:
        per_query = jnp.repeat(extras.sinks.reshape(s.kv_heads, s.group), s.tile, axis=1)
        inputs.append(jnp.broadcast_to(per_query[..., None], (s.kv_heads, s.queries, LANES)))
        in_specs.append(pl.BlockSpec((s.kv_heads, s.queries, LANES), lambda i, items: (0, 0, 0)))
    state = (s.kv_heads, s.queries)
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    out_specs = [of_tile(head_dim)]
    if options.return_lse:
        out_shape.append(jax.ShapeDtypeStruct((*q.shape[:3], LANES), jnp.float32))
        out_specs.append(of_tile(LANES))
    results = pl.pallas_call(
        functools.partial(_kernel, shape=s, options=options, has_sinks=extras.sinks is not None),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count,),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((2, s.pages, s.page, 2 * s.kv_heads, head_dim), slab.dtype),
                _flat_scratch(s, slab.dtype),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, head_dim), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )(items, *inputs)

    def back(x: jax.Array) -> jax.Array:
        x = x.reshape(blocks, s.kv_heads, s.group, s.tile, -1).transpose(0, 3, 1, 2, 4)
        return x.reshape(blocks * s.tile, num_heads, -1)[:num_tokens]

    lse = back(results[1][..., :1])[..., 0] if options.return_lse else None
    return back(results[0]), lse


def _kernel(
    items: Any,  # SMEM int32 [8, items]
    factors: Any,  # SMEM float32 [2, KH]: what logits and outputs are multiplied by
    table: Any,  # SMEM int32 [1, M]: pages of this item's row
    next_table: Any,  # the same of the next item's
    q_ref: Any,  # [KH, queries, D]
    slab: Any,  # HBM [layers × pages, page, 2·KH, D]
    *refs: Any,
    shape: _Shape,
    options: Options,
    has_sinks: bool,
) -> None:
    s = shape
    *outer, buffers, flat, m_ref, l_ref, acc_ref, turn, arrived = refs
    sinks = outer.pop(0) if has_sinks else None
    o_ref, lse_ref = outer if options.return_lse else (*outer, None)
    item = pl.program_id(0)
    low, high = items[_LOW, item], items[_HIGH, item]
    end = items[_END, item]
    first_block = items[_FIRST, item] // s.block
    num_blocks = jnp.maximum(pl.cdiv(end, s.block) - first_block, 1)

    def copies(at: Any, pages: Any, block: Any, slot: Any, act: str) -> None:
        """Starts or awaits the copies of a KV block: of the pages that hold what is seen."""
        first = jnp.maximum(block * s.pages, items[_FIRST, at] // s.page)
        last = jnp.minimum((block + 1) * s.pages, pl.cdiv(items[_END, at], s.page))

        def one(index: Any, _: None) -> None:
            copy = pltpu.make_async_copy(
                slab.at[items[_FIRST_PAGE, at] + pages[0, index]],
                buffers.at[slot, index - block * s.pages],
                arrived.at[slot],
            )
            getattr(copy, act)()

        lax.fori_loop(first, last, one, None)

    @pl.when(item == 0)
    def begin_list() -> None:
        turn[0] = 0
        copies(item, table, first_block, 0, "start")

    first_slot = turn[0]
    l_ref[...] = jnp.full_like(l_ref, 0.0 if sinks is None else 1.0)
    m_ref[...] = jnp.full_like(m_ref, _LOWEST) if sinks is None else sinks[...]
    acc_ref[...] = jnp.zeros_like(acc_ref)

    # Query matrices hold a group's heads one after the other, each the tile's queries in order.
    index = lax.broadcasted_iota(jnp.int32, (s.queries, 1), 0) % s.tile
    index += items[_BLOCK_ID, item] * s.tile
    own = (index >= low) & (index < high)  # [queries, 1]
    position = jnp.where(own, index + items[_OFFSET, item], -1)  # -1 sees nothing

    def one_block(i: Any, _: None) -> None:
        slot = (first_slot + i) % 2

        @pl.when(i + 1 < num_blocks)
        def next_block() -> None:
            copies(item, table, first_block + i + 1, 1 - slot, "start")

        @pl.when((i + 1 == num_blocks) & (item + 1 < pl.num_programs(0)))
        def next_item() -> None:
            block = items[_FIRST, item + 1] // s.block
            copies(item + 1, next_table, block, 1 - slot, "start")

        copies(item, table, first_block + i, slot, "wait")
        begin = (first_block + i) * s.block
        key = begin + lax.broadcasted_iota(jnp.int32, (1, s.block), 1)
        seen = key <= position  # [queries, block]
        if options.window is not None:
            seen &= key > position - options.window
        value = begin + lax.broadcasted_iota(jnp.int32, (s.block, 1), 0)
        usable = (value >= items[_FIRST, item]) & (value < end)  # 0 · NaN is NaN: others go
        _flatten(buffers[slot], flat)
        for head in range(s.kv_heads):
            k, v = _head(flat, head, s)
            v = jnp.where(usable, v, 0.0)
            _accumulate(
                q_ref[head], k, v, seen, factors[0, head], options.soft_cap,
                m_ref.at[head], l_ref.at[head], acc_ref.at[head],
            )  # fmt: skip

    lax.fori_loop(0, num_blocks, one_block, None)
    turn[0] = (first_slot + num_blocks) % 2

    for head in range(s.kv_heads):
        l = l_ref[head]  # noqa: E741
        out = acc_ref[head] / jnp.where(l == 0, 1.0, l)[:, :1] * factors[1, head]
        out = out.astype(o_ref.dtype)
        if s.tile > 1:  # the tile's other rows keep what they have
            out = jnp.where(own, out, o_ref[head])
        o_ref[head] = out
        if lse_ref is not None:
            lse_ref[head] = jnp.where(own, m_ref[head] + jnp.log(l), lse_ref[head])


# Heads lie side by side in a tile of vector memory, and only a load of 32-bit words can skip over
# others. So a block is laid out once more, as words: bfloat16 as pairs, which are a head's K and V,
# anything else as float32. A strided load is one register wide, hence the pieces of 128 lanes.


def _flat_scratch(s: _Shape, dtype: Any) -> Any:
    lanes = LANES if s.head_dim % LANES == 0 else s.head_dim  # only the interpreter has the latter
    paired = dtype == jnp.bfloat16
    rows = s.block * s.kv_heads * (1 if paired else 2)
    kind = jnp.uint32 if paired else jnp.float32
    return pltpu.VMEM((s.head_dim // lanes, rows, lanes), kind)


def _flatten(kv: jax.Array, flat: Any) -> None:
    """Lays out kv [pages, page, 2·KH, D] in flat [D / lanes, words, lanes]."""
    kv = kv.reshape(-1, kv.shape[-1])
    words = pltpu.bitcast(kv, jnp.uint32) if flat.dtype == jnp.uint32 else kv.astype(jnp.float32)
    lanes = flat.shape[-1]
    for piece in range(flat.shape[0]):
        flat[piece] = words[:, piece * lanes : (piece + 1) * lanes]


def _head(flat: Any, head: int, s: _Shape) -> tuple[jax.Array, jax.Array]:
    """K and V of a head, [block, D] float32."""

    def every(step: int, start: int) -> jax.Array:
        pieces = range(flat.shape[0])
        return jnp.concatenate([flat[p, pl.ds(start, s.block, step), :] for p in pieces], axis=1)

    if flat.dtype == jnp.float32:
        return every(2 * s.kv_heads, 2 * head), every(2 * s.kv_heads, 2 * head + 1)
    words = every(s.kv_heads, head)
    return (
        pltpu.bitcast(words << 16, jnp.float32),
        pltpu.bitcast(words & jnp.uint32(0xFFFF0000), jnp.float32),
    )


def _accumulate(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    factor: jax.Array,
    soft_cap: float | None,
    m_ref: Any,
    l_ref: Any,
    acc_ref: Any,
) -> None:
    """Adds a block of keys to a running softmax (Milakov and Gimelshein, 2018).

    q [queries, D]; k, v [block, D] float32; seen [queries, block]; m, l [queries, 128], the same in
    each lane; acc [queries, D].
    """
    # What came from bfloat16 (or less) goes to the matrix unit as that: the product is exact.
    exact = q.dtype == jnp.bfloat16
    dot = functools.partial(
        lax.dot_general,
        precision=None if exact else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    kind = q.dtype if exact else jnp.float32
    logits = dot(q.astype(kind), k.astype(kind), (((1,), (1,)), ((), ()))) * factor
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    m_before = m_ref[...][:, :1]
    top = jnp.max(jnp.where(seen, logits, _LOWEST), axis=1, keepdims=True)
    m = jnp.maximum(m_before, top)
    p = jnp.where(seen, jnp.exp(logits - m), 0.0)
    decay = jnp.exp(m_before - m)
    l_ref[...] = l_ref[...] * decay + jnp.sum(p, axis=1, keepdims=True)
    acc_ref[...] = acc_ref[...] * decay + dot(
        p.astype(kind), v.astype(kind), (((1,), (0,)), ((), ()))
    )
    m_ref[...] = jnp.broadcast_to(m, m_ref.shape)
