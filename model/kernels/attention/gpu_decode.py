"""GPU attention of decode rows: one query a row, its KV cut into items of about equal work.

The grid is flat: (KV head, item). An item is a range of one row's KV; rows are cut by their actual
length, planned on the device once a step (`plan`), so that a long row among short ones does not
leave the machine waiting. A row of one item writes its result; the parts of others are merged by
whoever finishes last, or by a second small kernel. Each KV byte is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import switches
from .contract import Extras, RaggedBatch
from .gpu_pallas import (
    LOWEST,
    Heads,
    Launch,
    Pages,
    add_one,
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
    softmax_step,
    store,
    when,
)

_UNUSED, _WHOLE, _PART, _EMPTY = range(4)
_VALUES_ALONE, _VALUES_INSIDE = 8192, 4096
"""Float32 values of partial sums that a merge holds at once: as a kernel of its own, and inside the
other, which has fewer threads."""


@dataclass(frozen=True)
class DecodeShape:
    """How the work is cut.

    Attributes:
      block: KV tokens per turn of the loop.
      num_warps, num_stages: see Launch.
      programs: how many (item, KV head) pairs fill the device.
      least_blocks: an item of a row that is cut has at least about this many blocks.
      merge_inside: parts are merged by the program that finishes last, else by a second kernel.
    """

    block: int = 32
    num_warps: int = 2
    num_stages: int = 4
    programs: int = 4 * 132  # four on each multiprocessor of an H200
    least_blocks: int = 4
    merge_inside: bool = switches.MERGE_INSIDE


class DecodePlan(NamedTuple):
    """What runs where; the same for all layers of one window, so XLA computes it once a step."""

    items: jax.Array  # [N, 4] row, first and end position, kind
    parts: jax.Array  # [R, 2] first item, number of items


def plan(
    batch: RaggedBatch, heads: Heads, shape: DecodeShape, rows: int, alone: bool
) -> DecodePlan:
    """Cuts rows 0 to num_decode into items.

    Cutting B blocks in all into shares of at least B / budget gives at most rows + budget items:
    that is the static size of the list.

    Args:
      rows: rows that may be decode rows.
      alone: the other rows are nobody else's: they get zeros here.
    """
    row = jnp.arange(rows)
    exists = row < batch.num_decode
    kv_len = jnp.where(exists, batch.kv_lens[:rows], 0)
    first = jnp.zeros_like(kv_len)
    if heads.window is not None:
        first = jnp.maximum(kv_len - heads.window, 0)
    first_block = first // shape.block
    blocks = cdiv(kv_len, shape.block) - first_block
    budget = split_budget(heads, shape)
    share = jnp.maximum(cdiv(jnp.sum(blocks), budget), shape.least_blocks)
    # A quarter more than a share is not worth a part of its own.
    count = jnp.maximum(cdiv(4 * blocks - share, 4 * share), 1)
    each = jnp.maximum(cdiv(blocks, count), 1)
    count = jnp.maximum(cdiv(blocks, each), 1)
    ends = jnp.cumsum(count)

    item = jnp.arange(rows + (budget if can_split(heads, shape) else 0))
    owner = jnp.sum(ends <= item[:, None], axis=1)
    used, owner = owner < rows, jnp.minimum(owner, rows - 1)
    begin = first_block[owner] + (item - (ends - count)[owner]) * each[owner]
    low = jnp.maximum(begin * shape.block, first[owner])
    high = jnp.minimum((begin + each[owner]) * shape.block, kv_len[owner])
    kind = jnp.where(count[owner] > 1, _PART, _WHOLE)
    kind = jnp.where(exists[owner], kind, _EMPTY if alone else _UNUSED)
    kind = jnp.where(used, kind, _UNUSED)
    return DecodePlan(
        jnp.stack([owner, low, high, kind], axis=1), jnp.stack([ends - count, count], axis=1)
    )


def split_budget(heads: Heads, shape: DecodeShape) -> int:
    """How many items there may be besides one a row."""
    return max(1, shape.programs // heads.num_kv_heads)


def can_split(heads: Heads, shape: DecodeShape) -> bool:
    """Whether the longest row that the page table holds is worth cutting."""
    longest = cdiv(heads.max_pages * heads.page_size, shape.block)
    return longest * 4 > 5 * shape.least_blocks


def decode(
    q: jax.Array,
    slab: jax.Array,
    first_page: jax.Array,
    batch: RaggedBatch,
    extras: Extras,
    heads: Heads,
    shape: DecodeShape,
    *,
    alone: bool,
) -> tuple[jax.Array, jax.Array]:
    """Rows 0 to num_decode, one query each.

    Args:
      q: [T, KH, G, D].
      slab: [layers × pages × page, 2·KH, D].
      first_page: [1].
      alone: T rows, and those from num_decode on give zeros; otherwise tokens from num_decode on
        are left unwritten, for others to fill.

    Returns:
      o [T, KH, G, D] in q.dtype, lse [T, KH, G] float32.
    """
    tokens, kv_heads, group, head_dim = q.shape
    rows = min(tokens, batch.page_table.shape[0])
    work = plan(batch, heads, shape, rows, alone)
    num_items = work.items.shape[0]
    splits = can_split(heads, shape)
    extra = [x for x in extras if x is not None]
    out = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    ]
    partial_sums = [
        jax.ShapeDtypeStruct((num_items, kv_heads, group, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((num_items, kv_heads, group), jnp.float32),
        jax.ShapeDtypeStruct((num_items, kv_heads, group), jnp.float32),
    ]

    # Whoever finishes last leaves its counter at zero again: to XLA, the kernel only reads them.
    counters = jnp.zeros(rows * kv_heads, jnp.int32)
    inside = [work.parts, counters] if splits and shape.merge_inside else []

    def attend_item(*refs: Any) -> None:
        items, table, page, q_ref, slab_ref, *rest = refs
        shared, rest = rest[: len(inside)], rest[len(inside) :]
        sinks, k_scale, v_scale = optional_refs(rest, extras)
        o_ref, lse_ref, *parts = rest[len(extra) :]
        head, item = program_id(0), program_id(1)
        row, low, high, kind = (items[item, c] for c in range(4))

        @when(kind != _UNUSED)
        def work_off() -> None:
            g, d = jnp.arange(power_of_2(group, 16)), jnp.arange(heads.dims)
            real = (g < group)[:, None] & (d < head_dim)[None, :]
            at = (head, g[:, None], d[None, :])
            queries = load(q_ref, (row, *at), real).astype(heads.compute)
            scale = 1.0 if k_scale is None else k_scale[head]
            first = page[0]

            def pages(block: jax.Array) -> Pages:
                return page_ids(table, first, row, block, shape.block, high, heads)

            def turn(block: jax.Array, carry: Any) -> Any:
                here, *state = carry
                k, v = load_kv(slab_ref, here, head, block, shape.block, heads, (low, high))
                x, c = heads.logits(dot(queries, k, b_transposed=True), scale)
                position = block * shape.block + jnp.arange(shape.block)
                seen = (position >= low) & (position < high)
                x = jnp.where(seen[None, :], x, -jnp.inf)
                state = softmax_step(x, c, v, tuple(state), interpret=heads.interpret)
                return pages(block + 1), *state

            block = div(low, shape.block)
            start = (
                pages(block),
                jnp.full(g.shape, LOWEST, jnp.float32),
                jnp.zeros(g.shape, jnp.float32),
                jnp.zeros((*g.shape, heads.dims), jnp.float32),
            )
            _, m, l, acc = lax.fori_loop(  # noqa: E741
                block, cdiv(high, shape.block), turn, start
            )

            if splits:

                @when(kind == _PART)
                def write_part() -> None:
                    acc_ref, m_ref, l_ref = parts
                    store(acc_ref, (item, *at), acc, real)
                    store(m_ref, (item, head, g), m, g < group)
                    store(l_ref, (item, head, g), l, g < group)
                    if not shared:
                        return
                    parts_ref, counter_ref = shared
                    mine, count = row * kv_heads + head, parts_ref[row, 1]

                    @when(add_one(counter_ref, mine, interpret=heads.interpret) == count - 1)
                    def merge() -> None:
                        merge_row(
                            row, head, parts_ref[row, 0], count, parts, (sinks, v_scale),
                            (o_ref, lse_ref), values=_VALUES_INSIDE,
                        )  # fmt: skip
                        counter_ref[mine] = jnp.int32(0)

            @when(kind != _PART)
            def write_result() -> None:
                sink = None
                if sinks is not None:
                    sink = load(sinks, (head * group + g,), g < group)
                    sink = jnp.where(kind == _WHOLE, sink, -jnp.inf)
                o, lse = finish(m, l, acc, sink, 1.0 if v_scale is None else v_scale[head])
                store(o_ref, (row, *at), o, real)
                store(lse_ref, (row, head, g), lse, g < group)

    results = call(
        attend_item,
        Launch(heads.interpret, shape.num_warps, shape.num_stages),
        name="attention_decode",
        grid=(kv_heads, num_items),
        out=out + (partial_sums if splits else []),
        args=[work.items, batch.page_table, first_page, q, slab, *inside, *extra],
        any_rows=True,
    )
    o, lse, *sums = results
    if not splits or inside:
        return o, lse
    return _merge(o, lse, sums, work.parts, extras, Launch(heads.interpret, 4, 1))


def merge_row(
    row: jax.Array,
    head: jax.Array,
    first: jax.Array,
    count: jax.Array,
    sums: Any,
    extras: tuple[Any, Any],
    out: tuple[Any, Any],
    *,
    values: int,
) -> None:
    """Within a kernel: one row's result for one KV head, from the sums of its items.

    Args:
      row, head: whose.
      first, count: its items.
      sums: refs of acc [N, KH, G, D], m and l [N, KH, G].
      extras: refs of sinks and of V's scale, or None.
      out: refs of o and lse.
      values: of acc that are held at once.
    """
    acc_ref, m_ref, l_ref = sums
    sinks, v_scale = extras
    o_ref, lse_ref = out
    _, _, group, head_dim = o_ref.shape
    g, d = jnp.arange(power_of_2(group)), jnp.arange(power_of_2(head_dim, 16))
    lane = jnp.arange(max(1, values // (g.size * d.size)))  # items in one go

    def turn(i: jax.Array, state: Any) -> Any:
        m, l, acc = state  # noqa: E741
        nth = i * lane.size + lane
        item = first + nth
        there = (nth < count)[:, None] & (g < group)[None, :]
        of_item = (item[:, None], head, g[None, :])
        part_m = jnp.where(there, load(m_ref, of_item, there), LOWEST)
        part_l = load(l_ref, of_item, there)
        wide = there[:, :, None] & (d < head_dim)[None, None, :]
        part = load(acc_ref, (item[:, None, None], head, g[None, :, None], d[None, None, :]), wide)
        top = jnp.maximum(m, jnp.max(part_m, axis=0))
        weight = jnp.exp2(part_m - top[None, :])
        decay = jnp.exp2(m - top)
        acc = acc * decay[:, None] + jnp.sum(part * weight[:, :, None], axis=0)
        return top, l * decay + jnp.sum(part_l * weight, axis=0), acc

    start = (
        jnp.full(g.shape, LOWEST, jnp.float32),
        jnp.zeros(g.shape, jnp.float32),
        jnp.zeros((g.size, d.size), jnp.float32),
    )
    m, l, acc = lax.fori_loop(0, cdiv(count, lane.size), turn, start)  # noqa: E741
    sink = None if sinks is None else load(sinks, (head * group + g,), g < group)
    o, log = finish(m, l, acc, sink, 1.0 if v_scale is None else v_scale[head])
    here = (g < group)[:, None] & (d < head_dim)[None, :]
    store(o_ref, (row, head, g[:, None], d[None, :]), o, here)
    store(lse_ref, (row, head, g), log, g < group)


def _merge(
    o: jax.Array,
    lse: jax.Array,
    sums: list[jax.Array],
    parts: jax.Array,
    extras: Extras,
    launch: Launch,
) -> tuple[jax.Array, jax.Array]:
    """Fills o and lse of the rows that have several items, in place."""
    used = [x for x in (extras.sinks, extras.v_scale) if x is not None]

    def merge(*refs: Any) -> None:
        parts_ref, acc_ref, m_ref, l_ref, *rest = refs
        sinks, _, v_scale = optional_refs(rest, extras._replace(k_scale=None))
        head, row = program_id(0), program_id(1)
        first, count = parts_ref[row, 0], parts_ref[row, 1]

        @when(count > 1)
        def merge_parts() -> None:
            merge_row(
                row, head, first, count, (acc_ref, m_ref, l_ref), (sinks, v_scale), refs[-2:],
                values=_VALUES_ALONE,
            )  # fmt: skip

    args = [parts, *sums, *used, o, lse]
    return tuple(
        call(
            merge,
            launch,
            name="attention_merge",
            grid=(o.shape[1], parts.shape[0]),
            out=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (o, lse)],
            args=args,
            aliases={len(args) - 2: 0, len(args) - 1: 1},
            any_rows=True,
        )
    )
