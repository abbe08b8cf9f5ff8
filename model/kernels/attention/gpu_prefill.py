"""GPU attention of prompt rows: tiles of queries, each over the KV blocks that it sees.

A tile holds a few consecutive tokens of one row with all query heads of one KV head, so that the
products are large enough for the tensor cores. A program works off one tile, or where a step has
room for many rows several, one after the other. Blocks that every token of the tile sees whole are
worked off without masks; those at the diagonal and at the edge of a window with them.

Few tiles over a long cache would leave most of the device idle: their KV is cut into parts, as that
of decode rows is, and a second small kernel merges what they give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .contract import Extras, RaggedBatch
from .gpu_pallas import (
    LOWEST,
    Heads,
    Launch,
    Pages,
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

UNUSED, REAL, EMPTY, PART = range(4)  # kinds of items
_MERGED_QUERIES = 4  # of a tile, that are merged at once, so that one tile keeps many programs busy
_MERGED_VALUES = 8192  # float32, of partial sums, that a program of the merge holds at once
_MERGE_PROGRAMS = 4 * 132  # on an H200 at once


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut.

    Attributes:
      queries: (token, query head) pairs in a tile.
      block: KV tokens per turn of the loop.
      programs: how many (tile, KV head) pairs fill the device.
      least_blocks: a part of a tile that is cut has at least about this many blocks.
    """

    queries: int
    block: int
    programs: int = 132  # one on each multiprocessor of an H200
    least_blocks: int = 16

    def tile(self, group: int) -> int:
        """Tokens of a tile."""
        return max(1, self.queries // power_of_2(group))

    def budget(self, heads: Heads, num_tokens: int) -> int:
        """How many items there may be besides one a tile; 0: so many tokens, or so short a cache,
        that none is worth cutting."""
        longest = cdiv(heads.max_pages * heads.page_size, self.block)
        pairs = num_tokens // self.tile(heads.group) * heads.num_kv_heads
        if longest * 4 <= 5 * self.least_blocks or pairs >= 3 * self.programs:
            return 0
        return max(1, self.programs // heads.num_kv_heads)


@dataclass(frozen=True, kw_only=True)
class PrefillShape(Tiling):
    """How the work is cut and run.

    Attributes:
      num_warps, num_stages: see Launch.
      rows_at_once: prompt rows of a step, up to which each item has a program of its own. There
        may be hundreds of few tokens each, but programs without an item take time, too.
    """

    num_warps: int
    num_stages: int
    rows_at_once: int = 64


class PrefillPlan(NamedTuple):
    """What runs where; the same for all layers of one window, so XLA computes it once a step."""

    items: jax.Array  # [N, 8] as `tiles` gives them, and which part each is
    splits: (
        jax.Array
    )  # [S, 5] of each tile that is cut: first part, parts, first and end query; how
    # many are cut


def tiles(
    batch: RaggedBatch, heads: Heads, num_tokens: int, tile: int, align: int = 1
) -> jax.Array:
    """The tiles of all prompt rows, computed once a step: the same for every layer of one window.

    The tokens after the last row make one row more, which sees nothing. Tiles are counted from a
    multiple of `align`: the first of a row may begin within one, and is the shorter for it.

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
    lead = begins % align
    counts = jnp.where((prompt | rest) & (ends > begins), cdiv(ends - begins + lead, tile), 0)
    sums = jnp.cumsum(counts)
    total = sums[-1]

    most = (num_tokens + (align - 1) * (num_rows + 1)) // tile + num_rows + 1
    item = total - 1 - jnp.arange(most)
    row = jnp.minimum(jnp.sum(sums <= item[:, None], axis=1), num_rows)
    low = (begins - lead)[row] + (item - (sums - counts)[row]) * tile
    high = jnp.minimum(low + tile, ends[row])
    low = jnp.maximum(low, begins[row])
    kv_len = jnp.append(batch.kv_lens, 0)[row]
    offset = kv_len - ends[row]
    kind = jnp.where(rest[row], EMPTY, REAL)
    kind = jnp.where(item >= 0, kind, UNUSED)
    kv_end = jnp.where(kind == REAL, jnp.maximum(high + offset, 0), 0)
    kv_first = jnp.zeros_like(low)
    if heads.window is not None:
        kv_first = jnp.maximum(low + offset - heads.window + 1, 0)
    row = jnp.minimum(row, num_rows - 1)
    return jnp.stack([kind, row, low, high, offset, kv_first, kv_end], axis=1)


def plan(work: jax.Array, shape: Tiling, budget: int) -> PrefillPlan:
    """Cuts tiles into items.

    A tile of B blocks is cut if B > 5/4 · share, into less than B / share + 3/4 parts; the shares
    of all are `budget` at most. So there are at most `budget` items besides one a tile,
    2 · budget parts and `budget` tiles that are cut: the static sizes of the lists.

    Args:
      work: [tiles, 7].
      budget: what shape.budget gave.
    """
    if budget == 0:
        return PrefillPlan(jnp.pad(work, ((0, 0), (0, 1))), jnp.zeros((0, 5), jnp.int32))
    kind, row, low, high, offset, kv_first, kv_end = work.T
    first = kv_first // shape.block
    blocks = jnp.where(kind == REAL, jnp.maximum(cdiv(kv_end, shape.block) - first, 0), 0)
    share = jnp.maximum(cdiv(jnp.sum(blocks), budget), shape.least_blocks)
    count = jnp.maximum(cdiv(4 * blocks - share, 4 * share), 1)
    each = jnp.maximum(cdiv(blocks, count), 1)
    count = jnp.where(kind == UNUSED, 0, jnp.maximum(cdiv(blocks, each), 1))
    parts = jnp.where(count > 1, count, 0)
    ends, part_ends, cuts = (jnp.cumsum(x) for x in (count, parts, parts > 0))

    item = jnp.arange(len(work) + budget)
    owner = jnp.sum(ends <= item[:, None], axis=1)
    used, owner = owner < len(work), jnp.minimum(owner, len(work) - 1)
    nth = item - (ends - count)[owner]
    begin = first[owner] + nth * each[owner]
    kind = jnp.where(parts[owner] > 0, PART, kind[owner])
    items = [
        jnp.where(used, kind, UNUSED),
        *(x[owner] for x in (row, low, high, offset)),
        jnp.maximum(kv_first[owner], begin * shape.block),
        jnp.minimum(kv_end[owner], (begin + each[owner]) * shape.block),
        (part_ends - parts)[owner] + nth,
    ]
    cut = jnp.arange(budget)
    owner = jnp.minimum(jnp.sum(cuts <= cut[:, None], axis=1), len(work) - 1)
    there = jnp.where(cut < cuts[-1], parts[owner], 0)
    cuts_in_all = jnp.full(budget, cuts[-1])
    splits = [(part_ends - parts)[owner], there, low[owner], high[owner], cuts_in_all]
    return PrefillPlan(jnp.stack(items, axis=1), jnp.stack(splits, axis=1))


def longest_first(items: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Items [N, 8] in the order of how many KV blocks they have, and how many are used, [1]."""
    used = items[:, 0] != UNUSED
    blocks = cdiv(items[:, 6], block) - items[:, 5] // block
    order = jnp.argsort(jnp.where(used, -jnp.maximum(blocks, 0), 1))
    return items[order], jnp.sum(used, dtype=jnp.int32)[None]


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
    tile = shape.tile(group)
    size = max(16, tile * groups)  # of the product's side
    block = shape.block
    budget = shape.budget(heads, num_tokens)
    work = plan(tiles(batch, heads, num_tokens, tile), shape, budget)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out]
    partial_sums = [
        jax.ShapeDtypeStruct((2 * budget, kv_heads, size, *last), jnp.float32)
        for last in ((head_dim,), (), ())
        if budget
    ]
    extra = [x for x in extras if x is not None]

    def attend_tile(*refs: Any) -> None:
        items, counts, table, page, q_ref, slab_ref, *rest = refs
        sinks, k_scale, v_scale = optional_refs(rest, extras)
        o_ref, lse_ref, *parts = refs[num_args:]
        head, program = program_id(0), program_id(1)

        def work_off(item: jax.Array) -> None:
            fields = (items[item, c] for c in range(8))
            kind, row, low, high, offset, kv_first, kv_end, part = fields
            lane, d = jnp.arange(size), jnp.arange(heads.dims)
            token, g = low + div(lane, groups), rem(lane, groups)
            real = (token < high) & (g < group)
            here = real[:, None] & (d < head_dim)[None, :]
            at = (token[:, None], head, g[:, None], d[None, :])
            queries = load(q_ref, at, here).astype(heads.compute)
            position = jnp.where(real, token + offset, -1)[:, None]
            scale = 1.0 if k_scale is None else k_scale[head]
            first = page[0]

            def pages(i: jax.Array) -> Pages:
                return page_ids(table, first, row, i, block, kv_end, heads)

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

            _, m, l, acc = state  # noqa: E741
            if splits:

                @when(kind == PART)
                def write_part() -> None:
                    acc_ref, m_ref, l_ref = parts
                    store(acc_ref, (part, head, lane[:, None], d[None, :]), acc, here)
                    store(m_ref, (part, head, lane), m, real)
                    store(l_ref, (part, head, lane), l, real)

            @when(kind != PART)
            def write_result() -> None:
                sink = None
                if sinks is not None:
                    sink = load(sinks, (head * group + g,), g < group)
                    sink = jnp.where(kind == REAL, sink, -jnp.inf)
                o, lse = finish(m, l, acc, sink, 1.0 if v_scale is None else v_scale[head])
                store(o_ref, at, o, here)
                store(lse_ref, (token, head, g), lse, real)

        if one_each:
            when(items[program, 0] != UNUSED)(lambda: work_off(program))
        else:
            stride = counts[1]
            mine = div(jnp.maximum(counts[0] - program + stride - 1, 0), stride)
            lax.fori_loop(0, mine, lambda n, _: work_off(program + n * stride), None)

    # What depends on the step's size is data: its kernel is one for all sizes.
    splits = budget > 0
    programs = num_tokens // tile + budget + min(batch.kv_lens.shape[0], shape.rows_at_once) + 1
    one_each = programs == work.items.shape[0]
    counts = jnp.stack([jnp.sum(work.items[:, 0] != UNUSED, dtype=jnp.int32), programs])
    args = [work.items, counts, batch.page_table, first_page, q, slab, *extra, *out]
    num_args = len(args)
    o, lse, *sums = call(
        attend_tile,
        Launch(heads.interpret, shape.num_warps, shape.num_stages),
        name="attention_prefill",
        grid=(kv_heads, programs),
        out=results + partial_sums,
        args=args,
        aliases={len(args) - 2: 0, len(args) - 1: 1},
        any_rows=True,
    )
    if not budget:
        return o, lse
    return merge(o, lse, sums, work.splits, extras, Launch(heads.interpret, 4, 2))


def merge(
    o: jax.Array,
    lse: jax.Array,
    sums: list[jax.Array],
    splits: jax.Array,
    extras: Extras,
    launch: Launch,
    *,
    align: int = 1,
    head_major: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Fills in the tokens of tiles that were cut, in place.

    Args:
      sums: acc [parts, KH, queries, D], m and l [parts, KH, queries]: of (token, query head), or
        if `head_major` of (query head, token), from the last multiple of `align` tokens on.
    """
    _, kv_heads, group, head_dim = o.shape
    used = [x for x in (extras.sinks, extras.v_scale) if x is not None]
    groups, dims = power_of_2(group), power_of_2(head_dim, 16)
    size = sums[0].shape[2]
    width = min(size, _MERGED_QUERIES)
    stretches, tile = size // width, size // groups
    programs = min(splits.shape[0] * stretches, max(1, _MERGE_PROGRAMS // kv_heads))

    def merge_tiles(*refs: Any) -> None:
        splits_ref, acc_ref, m_ref, l_ref, *rest = refs
        sinks, _, v_scale = optional_refs(rest, extras._replace(k_scale=None))
        o_ref, lse_ref = refs[-2:]
        head, program = program_id(0), program_id(1)
        d = jnp.arange(dims)
        nth = jnp.arange(max(1, _MERGED_VALUES // (width * dims)))  # parts in one go

        def merge_stretch(unit: jax.Array) -> None:
            cut, stretch = div(unit, stretches), rem(unit, stretches)
            first, count, low, high = (splits_ref[cut, c] for c in range(4))
            lane = stretch * width + jnp.arange(width)
            t, g = (rem(lane, tile), div(lane, tile)) if head_major else (
                div(lane, groups), rem(lane, groups)
            )  # fmt: skip
            token = div(low, align) * align + t
            real = (token >= low) & (token < high) & (g < group)

            def turn(i: jax.Array, state: Any) -> Any:
                m, l, acc = state  # noqa: E741
                part = i * nth.size + nth
                # Of queries that are none, nothing was written.
                there = (part < count)[:, None] & real[None, :]
                at = (first + part)[:, None], head, lane[None, :]
                part_m = jnp.where(there, load(m_ref, at, there), LOWEST)
                part_l = load(l_ref, at, there)
                wide = there[:, :, None] & (d < head_dim)[None, None, :]
                values = (first + part)[:, None, None], head, lane[None, :, None], d[None, None, :]
                part_acc = load(acc_ref, values, wide)
                top = jnp.maximum(m, jnp.max(part_m, axis=0))
                decay, weight = jnp.exp2(m - top), jnp.exp2(part_m - top[None, :])
                acc = acc * decay[:, None] + jnp.sum(part_acc * weight[:, :, None], axis=0)
                return top, l * decay + jnp.sum(part_l * weight, axis=0), acc

            start = (
                jnp.full((width,), LOWEST, jnp.float32),
                jnp.zeros((width,), jnp.float32),
                jnp.zeros((width, dims), jnp.float32),
            )
            m, l, acc = lax.fori_loop(0, cdiv(count, nth.size), turn, start)  # noqa: E741
            sink = None if sinks is None else load(sinks, (head * group + g,), g < group)
            out, log = finish(m, l, acc, sink, 1.0 if v_scale is None else v_scale[head])
            here = real[:, None] & (d < head_dim)[None, :]
            store(o_ref, (token[:, None], head, g[:, None], d[None, :]), out, here)
            store(lse_ref, (token, head, g), log, real)

        # There may be none: programs of their own for each that there could be would take longer
        # to find that out than to merge one.
        mine = cdiv(jnp.maximum(splits_ref[0, 4] * stretches - program, 0), programs)
        lax.fori_loop(0, mine, lambda n, _: merge_stretch(program + n * programs), None)

    args = [splits, *sums, *used, o, lse]
    return tuple(
        call(
            merge_tiles,
            launch,
            name="attention_tile_merge",
            grid=(kv_heads, programs),
            out=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (o, lse)],
            args=args,
            aliases={len(args) - 2: 0, len(args) - 1: 1},
            any_rows=True,
        )
    )
