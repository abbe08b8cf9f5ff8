"""GPU attention of decode rows: one query a row, the KV of all as one stream, in equal shares.

As many programs as the device runs at once each take a share of the stream, as long as any other's,
wherever rows begin and end in it: what a program loads ahead it loads across rows, none waits at
the end for longer ones, and where there are no decode rows the launch costs next to nothing. A row
that lies within one share is written by its program; the parts of others are merged by the program
that finishes last. Each KV byte is read once.

It stands beside gpu_decode.py (see kernels/switches.py), whose signature it has.
"""

from __future__ import annotations

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
    scalar_pages,
    softmax_step,
    store,
    when,
)


@dataclass(frozen=True)
class StreamShape:
    """How the work is cut.

    Attributes:
      block: KV tokens per turn of the loop.
      num_warps, num_stages: see Launch.
      programs: how many (share, KV head) pairs the device runs at once.
      least_blocks: a share has at least so many blocks.
      merged: float32 values of partial sums that a merge holds at once.
    """

    block: int = 32
    num_warps: int = 2
    num_stages: int = 4
    programs: int = 3 * 132  # three on each multiprocessor of an H200
    least_blocks: int = 4
    merged: int = 8192

    def shares(self, heads: Heads) -> int:
        """The static length of the list of shares."""
        return max(1, self.programs // heads.num_kv_heads)


class StreamPlan(NamedTuple):
    """What runs where; the same for all layers of one window, so XLA computes it once a step. (Two
    arrays, since each would be a kernel of its own.)"""

    # [P, 6 + scalar_pages + KH] of each share: first row, its block, blocks in all, does the row
    # begin earlier?, cached tokens of this row and the next; page ids of the first block; counters
    shares: jax.Array
    rows: jax.Array  # [R, 3] first share it lies in, how many, cached tokens (0: no decode row)


def plan(batch: RaggedBatch, heads: Heads, shape: StreamShape, rows: int) -> StreamPlan:
    """Cuts rows 0 to num_decode into shares. A row that has nothing cached has a block, too.

    A counter is for the row that begins in the share and does not end there: how many of its parts
    are written. Whoever writes the last leaves it at zero again; to XLA, kernels only read them.

    Args:
      rows: rows that may be decode rows.
    """
    exists = jnp.arange(rows) < batch.num_decode
    lens = jnp.where(exists, batch.kv_lens[:rows], 0)
    first = first_block(lens, heads, shape.block)
    blocks = jnp.where(exists, jnp.maximum(cdiv(lens, shape.block) - first, 1), 0)
    ends = jnp.cumsum(blocks)
    begins, total = ends - blocks, ends[-1]
    count = shape.shares(heads)
    # No more shares than have least_blocks, and those alike.
    share = jnp.maximum(cdiv(total, jnp.clip(cdiv(total, shape.least_blocks), 1, count)), 1)
    begin = jnp.arange(count) * share
    row = jnp.minimum(jnp.sum(ends <= begin[:, None], axis=1), rows - 1)
    lead = begin - begins[row]
    turns = jnp.clip(total - begin, 0, share)
    following = jnp.append(lens, 0)[row + 1]
    starts = [row, first[row] + lead, turns, (lead > 0).astype(jnp.int32), lens[row], following]
    pages = [
        batch.page_table[row, div(starts[1] * shape.block, heads.page_size) + at]
        for at in range(scalar_pages(shape.block, heads))
    ]
    counters = [jnp.zeros_like(row)] * heads.num_kv_heads
    low, high = div(begins, share), div(jnp.maximum(ends - 1, 0), share)
    return StreamPlan(
        jnp.stack([*starts, *pages, *counters], axis=1),
        jnp.stack([low, high - low + 1, lens], axis=1),
    )


def first_block(kv_len: jax.Array, heads: Heads, block: int) -> jax.Array:
    """Of those that a row's query sees."""
    return div(first_position(kv_len, heads), block)


def first_position(kv_len: jax.Array, heads: Heads) -> jax.Array:
    if heads.window is None:
        return jnp.zeros_like(kv_len)
    return jnp.maximum(kv_len - heads.window, 0)


def decode(
    q: jax.Array,
    slab: jax.Array,
    first_page: jax.Array,
    batch: RaggedBatch,
    extras: Extras,
    heads: Heads,
    shape: StreamShape,
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
    shares, block = shape.shares(heads), shape.block
    known = scalar_pages(block, heads)  # page ids that come with a share
    extra = [x for x in extras if x is not None]
    out = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    ]
    # Of each share, the part that continues a row of earlier shares, and the one that later
    # shares continue.
    partial_sums = [
        jax.ShapeDtypeStruct((2 * shares, kv_heads, group, *last), jnp.float32)
        for last in ((head_dim,), (), ())
    ]

    def attend_share(*refs: Any) -> None:
        share_ref, row_ref, table, page, present, q_ref, slab_ref, *rest = refs
        sinks, k_scale, v_scale = optional_refs(rest, extras)
        o_ref, lse_ref, *parts = rest[len(extra) :]
        acc_ref, m_ref, l_ref = parts
        head, share = program_id(0), program_id(1)
        first_row, begin, turns, continued = (share_ref[share, c] for c in range(4))
        g, d = jnp.arange(power_of_2(group, 16)), jnp.arange(heads.dims)
        real = (g < group)[:, None] & (d < head_dim)[None, :]
        at = (head, g[:, None], d[None, :])
        scale_k = 1.0 if k_scale is None else k_scale[head]
        scale_v = 1.0 if v_scale is None else v_scale[head]

        def write_result(row: jax.Array, g: jax.Array, state: Any) -> None:
            sink = None if sinks is None else load(sinks, (head * group + g,), g < group)
            m, l, acc = state  # noqa: E741
            o, lse = finish(m, l, acc, sink, scale_v)
            real = (g < group)[:, None] & (d < head_dim)[None, :]
            store(o_ref, (row, head, g[:, None], d[None, :]), o, real)
            store(lse_ref, (row, head, g), lse, g < group)

        def write_part(which: Any, state: Any) -> None:
            m, l, acc = state  # noqa: E741
            part = 2 * share + which
            store(acc_ref, (part, *at), acc, real)
            store(m_ref, (part, head, g), m, g < group)
            store(l_ref, (part, head, g), l, g < group)

        def length(row: jax.Array) -> jax.Array:
            return load(row_ref, (row, jnp.int32(2)), row < rows)

        def work_off() -> None:
            first = page[0]

            def pages(row: jax.Array, i: jax.Array, kv_len: jax.Array) -> Pages:
                return page_ids(table, first, row, i, block, kv_len, heads)

            def turn(_: jax.Array, carry: Any) -> Any:
                # What the next turn loads by is known a turn ahead, as page_ids says.
                row, i, kv_len, next_len, own, here, *state = carry
                queries = load(q_ref, (row, *at), real).astype(heads.compute)
                low = first_position(kv_len, heads)
                k, v = load_kv(slab_ref, here, head, i, block, heads, (low, kv_len))
                x, c = heads.logits(dot(queries, k, b_transposed=True), scale_k)
                position = i * block + jnp.arange(block)
                seen = (position >= low) & (position < kv_len)
                x = jnp.where(seen[None, :], x, -jnp.inf)
                m, l, acc = softmax_step(x, c, v, tuple(state), interpret=heads.interpret)  # noqa: E741

                ends = (i + 1) * block >= kv_len

                @when(ends & (own != 0))
                def write_whole() -> None:
                    write_result(row, g, (m, l, acc))

                @when(ends & (own == 0))
                def write_last_part() -> None:
                    write_part(0, (m, l, acc))

                row = row + ends.astype(jnp.int32)
                kv_len = jnp.where(ends, next_len, kv_len)
                i = jnp.where(ends, first_block(kv_len, heads, block), i + 1)
                return (
                    row, i, kv_len, length(row + 1),
                    jnp.where(ends, 1, own), pages(row, i, kv_len),
                    # Chosen, not multiplied by 0: a row that is not finite keeps it to itself.
                    jnp.where(ends, LOWEST, m), jnp.where(ends, 0.0, l), jnp.where(ends, 0.0, acc),
                )  # fmt: skip

            kv_len, next_len = share_ref[share, 4], share_ref[share, 5]
            ids: Pages = tuple(share_ref[share, 6 + at] + first for at in range(known))
            start = (
                first_row, begin, kv_len, next_len, 1 - continued,
                ids if known else pages(first_row, begin, kv_len),
                jnp.full(g.shape, LOWEST, jnp.float32), jnp.zeros(g.shape, jnp.float32),
                jnp.zeros((*g.shape, heads.dims), jnp.float32),
            )  # fmt: skip
            row, i, kv_len, _, own, _, *state = lax.fori_loop(0, turns, turn, start)
            # Is the last row seen cut off here?
            opened = i != first_block(kv_len, heads, block)
            when(opened)(lambda: write_part(own, state))

            def merge_one(nth: jax.Array, _: None) -> None:
                """First the row that came from before, then the one that goes on."""
                mine = jnp.where(nth == 0, continued != 0, opened & (own != 0))
                merged = jnp.where(nth == 0, first_row, row)

                @when(mine)
                def count() -> None:
                    begun, of_it = row_ref[merged, 0], row_ref[merged, 1]
                    counter = begun, 6 + known + head

                    @when(add_one(share_ref, counter, interpret=heads.interpret) == of_it - 1)
                    def merge() -> None:
                        few = jnp.arange(power_of_2(group))  # no matrix unit wants 16 here
                        state = _merged(begun, of_it, head, parts, few, shape.merged)
                        write_result(merged, few, state)
                        share_ref[counter] = jnp.int32(0)

            lax.fori_loop(0, 2, merge_one, None)

        when(turns > 0)(work_off)

        if alone:

            def write_none(nth: jax.Array, _: None) -> None:
                row = present[0] + share + nth * shares
                store(o_ref, (row, *at), jnp.zeros(real.shape, jnp.float32), real)
                store(lse_ref, (row, head, g), jnp.full(g.shape, -jnp.inf), g < group)

            absent = cdiv(jnp.maximum(rows - present[0] - share, 0), shares)
            lax.fori_loop(0, absent, write_none, None)

    work = plan(batch, heads, shape, rows)
    o, lse, *_ = call(
        attend_share,
        Launch(heads.interpret, shape.num_warps, shape.num_stages),
        name="attention_decode",
        grid=(kv_heads, shares),
        out=out + partial_sums,
        args=[*work, batch.page_table, first_page, batch.num_decode[None], q, slab, *extra],
        any_rows=True,
    )
    return o, lse


def _merged(
    first: jax.Array, count: jax.Array, head: jax.Array, parts: Any, g: jax.Array, values: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Within a kernel: the running softmax (m, l, acc) of a row that lies in several shares.

    Args:
      first, count: the shares.
      parts: refs of acc [2P, KH, G, D], m and l [2P, KH, G].
      g: [Q] query heads, padded.
      values: of acc that are held at once.
    """
    acc_ref, m_ref, l_ref = parts
    _, _, group, head_dim = acc_ref.shape
    d = jnp.arange(power_of_2(head_dim, 16))
    lane = jnp.arange(max(1, values // (g.size * d.size)))  # parts in one go

    def turn(i: jax.Array, state: Any) -> Any:
        m, l, acc = state  # noqa: E741
        nth = i * lane.size + lane
        part = 2 * (first + nth) + (nth == 0).astype(jnp.int32)
        there = (nth < count)[:, None] & (g < group)[None, :]
        of_part = (part[:, None], head, g[None, :])
        part_m = jnp.where(there, load(m_ref, of_part, there), LOWEST)
        part_l = load(l_ref, of_part, there)
        wide = there[:, :, None] & (d < head_dim)[None, None, :]
        values = load(
            acc_ref, (part[:, None, None], head, g[None, :, None], d[None, None, :]), wide
        )
        top = jnp.maximum(m, jnp.max(part_m, axis=0))
        weight = jnp.exp2(part_m - top[None, :])
        decay = jnp.exp2(m - top)
        acc = acc * decay[:, None] + jnp.sum(values * weight[:, :, None], axis=0)
        return top, l * decay + jnp.sum(part_l * weight, axis=0), acc

    start = (
        jnp.full(g.shape, LOWEST, jnp.float32),
        jnp.zeros(g.shape, jnp.float32),
        jnp.zeros((g.size, d.size), jnp.float32),
    )
    return lax.fori_loop(0, cdiv(count, lane.size), turn, start)
