"""Prompt rows on Hopper GPUs: tiles of queries by wgmma and TMA, through Pallas' Mosaic backend.

Called by gpu.py where it is chosen and can serve (`why_not`); gpu_prefill.py serves the rest, and
owns the plan of items and the merge of those that are cut.

One block of three warpgroups stays on each multiprocessor and works off items (a tile or a part of
one, of one KV head), the longest first. Warpgroup 2 copies: a tile's queries, then its K and V,
page by page as the page table says, `num_stages` blocks ahead, also into the next item. Warpgroups
0 and 1 compute, 64 rows each, and take turns at the tensor cores: while one multiplies, the other
does its softmax (Shah et al., "FlashAttention-3", 2024). A turn is weights · V of one block and
Q · Kᵀ of the next. On an H200, 2,048 tokens of 32 heads over 8 make 603 TFLOP/s over 6,144 cached.
(Of 8,192 tokens this made 591, 541 where the second product was issued before the first was done,
500 with blocks of 64. To give the turn before Q · Kᵀ is issued, not after, changed nothing.)

The 128 rows of a tile are (query head, token), so that one head's tokens are one copy; tiles begin
at multiples of 8 tokens, as copies into wgmma's layout must. The heads of a tile are a power of two
that divides the group: a group of 6 is worked off as three of 2, and no row is empty.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .contract import Extras, Options, RaggedBatch
from .gpu_lowered import Unknown, in_use
from .gpu_pallas import LOG2_E, LOWEST, Heads, Launch, cdiv, div, rem, when
from .gpu_prefill import PART, UNUSED, Tiling, longest_first, merge, plan, tiles

ROWS = 64  # of a warpgroup: what one wgmma instruction takes
COMPUTING = 2  # warpgroups
ALIGN = 8  # tokens; rows of a tile of shared memory
_COPYING = COMPUTING  # its index
_NAME = "attention_prefill_mosaic"
_HOPPER = ("H100", "H200", "H800", "H20")  # in the names of devices of capability 9.0


@dataclass(frozen=True, kw_only=True)
class MosaicShape(Tiling):
    """How the work is cut; `queries` is fixed.

    Attributes:
      num_stages: blocks of K and V in shared memory.
    """

    queries: int = COMPUTING * ROWS
    block: int = 128
    least_blocks: int = 8
    num_stages: int = 2


def why_not(
    q: jax.Array, slab: jax.Array, extras: Extras, options: Options, shape: MosaicShape
) -> str | None:
    """Why this kernel cannot serve, None if it can; the device is why_not_here's matter."""
    num_tokens, num_heads, head_dim = q.shape
    page_size, kv_heads = slab.shape[1], slab.shape[2] // 2
    group = _heads_of_a_tile(num_heads // kv_heads, shape)
    if jax.__version_info__ < (0, 11):
        return f"JAX {jax.__version__}: before 0.11, kernels cannot write in place"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or slab.dtype != q.dtype:
        return f"queries of {q.dtype} over {slab.dtype}"
    if head_dim not in (64, 128):
        return f"head dim {head_dim}"
    if page_size % ALIGN or shape.block % page_size:
        return f"pages of {page_size}"
    if num_tokens % ALIGN or num_tokens < shape.tile(group):
        return f"{num_tokens} tokens"
    if options.soft_cap is not None or options.return_lse:
        return "soft_cap or return_lse"
    if any(x is not None for x in extras):
        return "sinks or kv_scales"
    return None


def why_not_here() -> str | None:
    """Why the device that is traced for cannot run this kernel, None if it can."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        return f"{mesh.size} devices"
    if mesh.abstract_device is not None:  # perhaps not here: only its name is known
        kind = mesh.abstract_device.device_kind
        return None if any(name in kind for name in _HOPPER) else kind
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    return None if capability.startswith("9.") else f"{device.device_kind} {capability}"


def prefill(
    q: jax.Array,
    slab: jax.Array,
    first_page: jax.Array,
    batch: RaggedBatch,
    heads: Heads,
    shape: MosaicShape,
    out: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Fills in the tokens of rows from num_decode on, and zeros for those of no row, in place.

    Args:
      q: [T, KH, G, D].
      slab: [layers × pages, page, 2·KH, D].
      first_page: [1].
      out: o [T, KH, G, D] in q.dtype, in which decode rows are done, and lse, which is left.
    """
    num_tokens, _, _, head_dim = q.shape
    wholes = q.shape, out[1].shape
    each = _heads_of_a_tile(heads.group, shape)
    sets = heads.num_kv_heads * heads.group // each  # of query heads, tiles of which are items
    q, o, lse = (x.reshape(num_tokens, sets, each, *x.shape[3:]) for x in (q, *out))
    heads = replace(heads, num_kv_heads=sets, group=each)
    budget = shape.budget(heads, num_tokens)
    work = tiles(batch, heads, num_tokens, shape.tile(heads.group), align=ALIGN)
    planned = plan(work, shape, budget)
    items, used = longest_first(planned.items, shape.block)
    partial_sums = [
        jax.ShapeDtypeStruct((2 * budget, sets, shape.queries, *last), jnp.float32)
        for last in ((head_dim,), (), ())
        if budget
    ]
    *sums, o = _filled(
        q, slab, batch.page_table, first_page, items, used, o, heads, shape, partial_sums
    )
    if budget:
        launch = Launch(heads.interpret, 4, 2)
        o, lse = merge(
            o, lse, sums, planned.splits, Extras(None, None, None), launch, align=ALIGN,
            head_major=True,
        )  # fmt: skip
    return o.reshape(wholes[0]), lse.reshape(wholes[1])


def _heads_of_a_tile(group: int, shape: MosaicShape) -> int:
    """The largest power of two that divides a group: all its heads, or one of several sets."""
    return min(group & -group, shape.queries // ALIGN)


def _filled(
    q: jax.Array,
    slab: jax.Array,
    page_table: jax.Array,
    first_page: jax.Array,
    items: jax.Array,
    used: jax.Array,
    o: jax.Array,
    heads: Heads,
    shape: MosaicShape,
    partial_sums: list[jax.ShapeDtypeStruct],
) -> Any:
    """The sums of parts, and o with tiles filled in, in place.

    To lower this kernel takes half a second, and it is the same for steps of as many tokens,
    however many rows they have: of lists of rows and of items it sees no length.
    """

    def run(*args: jax.Array) -> Any:
        q, slab, page_table, first_page, items, used, o = args
        filled = jax.new_ref(o)
        sums = _call(
            q, slab, page_table, first_page, items, used, filled, heads, shape, partial_sums
        )
        return *sums, jax.freeze(filled)

    args = q, slab, page_table, first_page, items, used, o
    if not heads.interpret and (kernels := in_use()) is not None:
        out = [*partial_sums, jax.ShapeDtypeStruct(o.shape, o.dtype)]
        copied = (0, 1, 6)  # by TMA, which is told all sizes
        with suppress(Unknown), jax.named_scope(_NAME):
            return kernels.run_built_alone(
                (_NAME, heads, shape), run, args, copied, out, {6: len(partial_sums)}
            )
    return run(*args)


def _call(
    q: jax.Array,
    slab: jax.Array,
    page_table: jax.Array,
    first_page: jax.Array,
    items: jax.Array,
    used: jax.Array,
    filled: Any,
    heads: Heads,
    shape: MosaicShape,
    partial_sums: list[jax.ShapeDtypeStruct],
) -> Any:
    """The kernel: writes into `filled`, and gives the sums of parts."""
    # Here, since it takes a quarter of a second that who runs none of this should not pay. Untyped:
    # its names move between JAX versions.
    mosaic: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")

    _, sets, group, dim = q.shape
    share = 2 * sets // slab.shape[2]  # sets of query heads that share a KV head
    dtype, block, stages = q.dtype, shape.block, shape.num_stages
    pages = block // heads.page_size
    programs = 1 if heads.interpret else shape.programs
    tile = shape.tile(group)
    span = min(tile, ROWS)  # tokens of one query head in one warpgroup
    chunks = [(g * tile + at) for g in range(group) for at in range(0, tile, span)]
    f32 = jnp.float32

    def kernel(*refs: Any) -> None:
        q_ref, slab_ref, table_ref, page_ref, items_ref, used_ref, o_ref, *rest = refs
        sums = rest[: len(partial_sums)]
        q_smem, k_smem, v_smem, o_smem, ml_smem, *barriers = rest[len(partial_sums) :]
        q_there, q_used, k_there, k_used, v_there, v_used, turns = barriers
        mine, wg = lax.axis_index("block"), lax.axis_index("warpgroup")
        pairs = used_ref[0] * sets

        def slot_of(step: Any) -> Any:
            return rem(step, stages)

        def each_item(body: Callable[..., Any], state: Any) -> Any:
            """Calls body(head, fields, begin, end, state) for this block's share of the items:
            every programs-th, in turn from the front and from the back."""

            def item(nth: Any) -> Any:
                at = jnp.where(rem(nth, 2) == 0, mine, programs - 1 - mine) + nth * programs
                there = at < pairs
                at = jnp.where(there, at, 0)
                row_of_items, head = div(at, sets), rem(at, sets)
                kind, *fields = (items_ref[row_of_items, c] for c in range(8))
                begin = div(fields[4], block)
                stop = jnp.where(there, jnp.maximum(cdiv(fields[5], block), begin), begin)
                return head, (jnp.where(there, kind, UNUSED), *fields), begin, stop

            def body_at(nth: Any, carry: Any) -> Any:
                this, state = carry
                return item(nth + 1), body(*this, state)  # read one turn ahead

            start = item(jnp.int32(0)), state
            return lax.fori_loop(0, cdiv(pairs, programs), body_at, start)[1]

        @when(wg == _COPYING)
        def copy() -> None:
            mosaic.set_max_registers(40, action="decrease")
            first_id = page_ref[0]

            def copy_item(head: Any, fields: Any, begin: Any, stop: Any, state: Any) -> Any:
                step0, loaded = state
                _, row, low, *_ = fields
                some = stop > begin
                base = div(low, ALIGN) * ALIGN

                def copy_block(i: Any, between: Callable[[], None] | None = None) -> None:
                    step = step0 + i - begin
                    slot = slot_of(step)
                    ids = [
                        table_ref[row, jnp.minimum(i * pages + at, heads.max_pages - 1)] + first_id
                        for at in range(pages)
                    ]
                    for which, smem, there, free in (
                        (0, k_smem, k_there, k_used), (1, v_smem, v_there, v_used)
                    ):  # fmt: skip

                        @when(step >= stages)
                        def wait(free: Any = free) -> None:
                            mosaic.barrier_wait(free.at[slot])

                        for at, page in enumerate(ids):
                            mosaic.copy_gmem_to_smem(
                                slab_ref.at[page, :, 2 * div(head, share) + which],
                                smem.at[slot, pl.ds(at * heads.page_size, heads.page_size)],
                                there.at[slot],
                            )
                        if between is not None and which == 0:
                            between()

                def copy_queries() -> None:
                    @when(loaded > 0)
                    def free() -> None:
                        mosaic.barrier_wait(q_used)

                    for at in chunks:
                        g, t = divmod(at, tile)
                        wg_of, lane = divmod(at, ROWS)
                        mosaic.copy_gmem_to_smem(
                            q_ref.at[pl.ds(base + t, span), head, g],
                            q_smem.at[wg_of, pl.ds(lane, span)],
                            q_there,
                        )

                # The last item's queries are in use for longer than its last block but one.
                when(some)(lambda: copy_block(begin, copy_queries))
                lax.fori_loop(begin + 1, stop, copy_block, None)
                return step0 + stop - begin, loaded + some.astype(jnp.int32)

            steps, loaded = each_item(copy_item, (jnp.int32(0), jnp.int32(0)))

            # Every arrival is awaited: the interpreter checks that they match.
            @when(loaded > 0)
            def last_queries() -> None:
                mosaic.barrier_wait(q_used)

            for slot in range(stages):

                @when(steps > slot)
                def last_blocks(slot: int = slot) -> None:
                    mosaic.barrier_wait(k_used.at[slot])
                    mosaic.barrier_wait(v_used.at[slot])

        def swap() -> None:
            """One warpgroup has its products issued, the other its softmax done: now vice versa."""
            mosaic.barrier_arrive(turns)
            mosaic.barrier_wait(turns)

        @when(wg < _COPYING)
        def compute() -> None:
            mosaic.set_max_registers(232, action="increase")
            by_row = mosaic.Layout.WGMMA.reduce(1)

            def full(value: float, *size: int) -> jax.Array:
                layout = mosaic.Layout.WGMMA if len(size) > 1 else by_row
                return mosaic.layout_cast(jnp.full(size, value, f32), layout)

            def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
                layout = mosaic.Layout.WGMMA if len(shape) > 1 else by_row
                return mosaic.broadcasted_iota(jnp.int32, shape, axis, layout=layout)

            def attend_item(head: Any, fields: Any, begin: Any, stop: Any, step0: Any) -> Any:
                kind, _, low, high, offset, kv_first, kv_end, part = fields
                base = div(low, ALIGN) * ALIGN
                position = rem(iota((ROWS,), 0) + wg * ROWS, tile) + (base + offset)

                def mask(i: Any, s: jax.Array) -> jax.Array:
                    key = iota(s.shape, 1) + i * block
                    at = lax.broadcast_in_dim(position, s.shape, (0,))
                    sees = key <= at
                    if heads.window is not None:
                        sees &= key > at - heads.window
                    return jnp.where(sees, s, -jnp.inf)

                def clear_unseen(i: Any, slot: Any) -> None:
                    """Zeros where a block's V has positions that the tile does not see: a weight
                    of 0 does not drop what is not finite. Each warpgroup clears its share before
                    it gives the turn that both need before either multiplies by V."""
                    unseen = (i + 1) * block > kv_end
                    if heads.window is not None:
                        unseen |= i * block < kv_first

                    def clear_rows(here: Any) -> None:
                        rows = v_smem.at[slot, pl.ds(here, ROWS)]
                        v = mosaic.load(rows, layout=mosaic.Layout.WGMMA)
                        key = iota(v.shape, 0) + (i * block + here)
                        keep = key < kv_end
                        if heads.window is not None:
                            keep &= key >= kv_first
                        rows[...] = jnp.where(keep, v, jnp.zeros_like(v))

                    @when(unseen)
                    def clear() -> None:
                        for at in range(0, block, COMPUTING * ROWS):
                            here = at + wg * ROWS
                            when(here < block)(partial(clear_rows, here))
                        mosaic.commit_smem()

                def turn(*, masked: bool) -> Callable[[Any, Any], Any]:
                    def body(i: Any, state: Any) -> Any:
                        m, l, acc = state  # noqa: E741
                        step = step0 + i - begin
                        slot = slot_of(step)
                        if masked:
                            mosaic.barrier_wait(v_there.at[slot])
                            clear_unseen(i, slot)
                        s = product(q_smem.at[wg], k_smem.at[slot], swap)
                        mosaic.barrier_arrive(k_used.at[slot])

                        @when(i + 1 == stop)
                        def free_queries() -> None:
                            mosaic.barrier_arrive(q_used)

                        if masked:
                            s = mask(i, s)
                        c = heads.scale * LOG2_E
                        top = jnp.maximum(m, jnp.max(s, axis=1) * c)
                        decay = jnp.exp2(m - top)
                        p = jnp.exp2(s * c - lax.broadcast_in_dim(top, s.shape, (0,)))
                        acc *= lax.broadcast_in_dim(decay, acc.shape, (0,))
                        l = l * decay + jnp.sum(p, axis=1)  # noqa: E741
                        # What is above does not move below, into the other's time. (Nor does ptxas
                        # move it there: past one wait before the turn's it would, not past two.)
                        acc, l, top, p = lax.optimization_barrier((acc, l, top, p.astype(dtype)))  # noqa: E741
                        mosaic.barrier_arrive(turns)
                        if not masked:
                            mosaic.barrier_wait(v_there.at[slot])

                        @when(i + 1 < stop)
                        def next_k() -> None:
                            mosaic.barrier_wait(k_there.at[slot_of(step + 1)])

                        mosaic.barrier_wait(turns)
                        acc = add_product(acc, p, v_smem.at[slot])
                        mosaic.barrier_arrive(v_used.at[slot])
                        return top, l, acc

                    return body

                def write(o: jax.Array) -> None:
                    """Stores the tile's tokens among o's rows; in powers of two where the tile is
                    not full."""
                    mosaic.wait_smem_to_gmem(0, wait_read_only=True)
                    o_smem[wg] = o.astype(dtype)
                    mosaic.commit_smem()
                    t = base + rem(wg * ROWS, tile)
                    at = jnp.clip(low - t, 0, span)
                    tokens = jnp.clip(high - t, 0, span) - at
                    size = span
                    while size:

                        @when((tokens & size) != 0)
                        def store(size: int = size, at: Any = at) -> None:
                            for lane in range(0, ROWS, span):
                                mosaic.copy_smem_to_gmem(
                                    o_smem.at[wg, pl.ds(lane + at, size)],
                                    o_ref.at[
                                        pl.ds(t + at, size), head, div(wg * ROWS + lane, tile)
                                    ],
                                )

                        at += tokens & size
                        size //= 2

                def write_part(m: jax.Array, l: jax.Array, acc: jax.Array) -> None:  # noqa: E741
                    acc_ref, *ml_refs = sums
                    lanes = pl.ds(wg * ROWS, ROWS)
                    acc_ref[part, head, lanes] = acc
                    mosaic.wait_smem_to_gmem(0, wait_read_only=True)
                    for at, value in enumerate((m, l)):
                        ml_smem[wg, at] = value
                    mosaic.commit_smem()
                    for at, ref in enumerate(ml_refs):
                        mosaic.copy_smem_to_gmem(ml_smem.at[wg, at], ref.at[part, head, lanes])

                # Blocks in [whole, cut) are seen whole by the first token and by the last.
                cut = div(jnp.maximum(low + offset + 1, 0), block)
                cut = jnp.minimum(jnp.maximum(cut, begin), stop)
                whole = begin
                if heads.window is not None:
                    most = jnp.maximum(high + offset - heads.window, 0)
                    whole = jnp.minimum(jnp.maximum(cdiv(most, block), begin), cut)

                some = stop > begin  # or it sees nothing, and gives zeros

                @when(some)
                def start() -> None:
                    mosaic.barrier_wait(q_there)
                    mosaic.barrier_wait(k_there.at[slot_of(step0)])
                    when(wg == 1)(swap)  # which is half a turn behind

                state: Any = full(LOWEST, ROWS), full(0, ROWS), full(0, ROWS, dim)
                if heads.window is not None:
                    state = lax.fori_loop(begin, whole, turn(masked=True), state)
                state = lax.fori_loop(whole, cut, turn(masked=False), state)
                state = lax.fori_loop(cut, stop, turn(masked=True), state)
                _, l, acc = state  # noqa: E741
                when(some & (wg == 0))(swap)
                if sums:
                    when(kind == PART)(lambda: write_part(*state))

                @when((kind != PART) & (kind != UNUSED))
                def write_result() -> None:
                    nonzero = jnp.where(l != 0.0, l, 1.0)  # NaN stays
                    write(acc * lax.broadcast_in_dim(1.0 / nonzero, acc.shape, (0,)))

                return step0 + stop - begin

            each_item(attend_item, jnp.int32(0))
            mosaic.wait_smem_to_gmem(0)

    def product(a: Any, b: Any, issued: Callable[[], None]) -> jax.Array:
        """a · bᵀ in float32, of arrays in shared memory."""

        def into(ref: Any) -> jax.Array:
            mosaic.wgmma(ref, a, b.transpose((1, 0)))
            issued()
            return ref[...]

        return pl.run_scoped(into, mosaic.ACC((a.shape[0], b.shape[0]), f32))

    def add_product(acc: jax.Array, a: jax.Array, b: Any) -> jax.Array:
        """acc + a · b, where a is in registers and b in shared memory."""
        if heads.interpret:  # knows neither such an a nor pl.run_state
            return acc + jnp.dot(a, b[...], preferred_element_type=f32)
        result: jax.Array = pl.run_state(lambda ref: mosaic.wgmma(ref, a, b))(mosaic.ACC.init(acc))
        return result

    tiled = (mosaic.TilingTransform((8, 64)), mosaic.SwizzleTransform(128))
    barrier = mosaic.Barrier
    return mosaic.kernel(
        kernel,
        out_type=partial_sums,
        grid=(programs,),
        grid_names=("block",),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        kernel_name=_NAME,
        compiler_params=mosaic.CompilerParams(approx_math=True),
        interpret=mosaic.InterpretGPUParams(out_of_bounds_reads="uninitialized")
        if heads.interpret
        else None,
        scratch_types=[
            mosaic.SMEM((COMPUTING, ROWS, dim), dtype, transforms=tiled),
            mosaic.SMEM((stages, block, dim), dtype, transforms=tiled),
            mosaic.SMEM((stages, block, dim), dtype, transforms=tiled),
            mosaic.SMEM((COMPUTING, ROWS, dim), dtype),
            mosaic.SMEM((COMPUTING, 2, ROWS), f32),
            barrier(num_arrivals=len(chunks)),
            barrier(num_arrivals=COMPUTING),
            barrier(num_arrivals=pages, num_barriers=stages),
            barrier(num_arrivals=COMPUTING, num_barriers=stages),
            barrier(num_arrivals=pages, num_barriers=stages),
            barrier(num_arrivals=COMPUTING, num_barriers=stages),
            barrier(num_arrivals=COMPUTING),
        ],
    )(q, slab, page_table, first_page, items, used, filled)
