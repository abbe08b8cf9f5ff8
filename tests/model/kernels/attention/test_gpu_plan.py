"""How the GPU kernels cut prompts into items, and decode rows into shares: all of it, once, and few
of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from quire.model.kernels.attention import gpu_stream
from quire.model.kernels.attention.contract import RaggedBatch
from quire.model.kernels.attention.gpu_mosaic import ALIGN, MosaicShape
from quire.model.kernels.attention.gpu_pallas import Heads, page_ids
from quire.model.kernels.attention.gpu_prefill import (
    EMPTY,
    PART,
    REAL,
    UNUSED,
    PrefillShape,
    Tiling,
    longest_first,
    plan,
    tiles,
)  # fmt: skip

SHAPES: dict[str, tuple[Tiling, int]] = {  # and what tiles are counted from a multiple of
    "triton": (PrefillShape(queries=128, block=64, num_warps=8, num_stages=3), 1),
    "mosaic": (MosaicShape(), ALIGN),
}


def heads(window: int | None = None) -> Heads:
    return Heads(
        num_kv_heads=8, group=4, head_dim=128, page_size=16, max_pages=8192, scale=1.0,
        soft_cap=None, window=window, compute=jnp.bfloat16, interpret=True,
    )  # fmt: skip


def planned(
    kernel: str, q_lens: list[int], cached: list[int], tokens: int, window: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(tiles, items, splits, budget) of prompt rows alone, with two rows that do not exist."""
    shape, align = SHAPES[kernel]
    q, rows = np.array(q_lens, np.int32), len(q_lens) + 2
    batch = RaggedBatch(
        kv_lens=jnp.asarray(np.pad(q + np.array(cached, np.int32), (0, 2), constant_values=9)),
        page_table=jnp.zeros((rows, 8192), jnp.int32),
        cu_q_lens=jnp.asarray(np.pad(np.cumsum([0, *q_lens]), (0, 2), constant_values=-3)),
        num_seqs=jnp.int32(len(q_lens)),
        num_decode=jnp.int32(0),
    )
    h = heads(window)
    budget = shape.budget(h, tokens)

    @jax.jit
    def both(batch: RaggedBatch) -> tuple[jax.Array, ...]:
        work = tiles(batch, h, tokens, shape.tile(h.group), align)
        return work, *plan(work, shape, budget)

    work, items, splits = (np.asarray(x) for x in both(batch))
    return work, items, splits, budget


CASES: dict[str, Any] = {
    "a hit": ([16], [9984], 64),
    "a chunk over a long cache": ([512], [100_000], 512),
    "ragged": ([64, 1, 200, 7], [10_000, 300, 0, 40_000], 512),
    "a window": ([64, 100], [10_000, 40_000], 256, 5000),
    "nothing": ([], [], 64),
    "short": ([100, 100, 56], [0, 0, 0], 256),
    "many": ([26] * 19, [300] * 19, 496),
    "a long chunk": ([2048], [6144], 2048),
}


@pytest.mark.parametrize("kernel", SHAPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_items_cover_each_tile_once(case: Any, kernel: str) -> None:
    work, items, splits, budget = planned(kernel, *case)
    block = SHAPES[kernel][0].block
    used = items[:, 0] != UNUSED
    assert used[: used.sum()].all()  # programs that share items count on that
    parts = []
    for kind, _, low, high, _, kv_first, kv_end in work:
        mine = items[(items[:, 2] == low) & (items[:, 0] != UNUSED)]
        if kind == UNUSED:
            continue
        assert (mine[:, 3] == high).all()
        if kind == EMPTY:
            assert [list(x[[0, 5, 6]]) for x in mine] == [[EMPTY, kv_first, kv_end]]
            continue
        # One after another, from the first position seen to the last, cut between blocks.
        assert mine[0, 5] == kv_first and mine[-1, 6] == kv_end
        assert (mine[1:, 5] == mine[:-1, 6]).all() and not (mine[1:, 5] % block).any()
        assert (mine[:, 0] == (PART if len(mine) > 1 else REAL)).all()
        if len(mine) > 1:
            [split] = splits[(splits[:, 2] == low) & (splits[:, 1] > 0)]
            assert list(split[:4]) == [mine[0, 7], len(mine), low, high]
            parts += list(mine[:, 7])
    assert sorted(parts) == list(range(len(parts)))
    assert splits[:, 1].sum() == len(parts) <= 2 * budget
    assert (splits[:, 4] == (splits[:, 1] > 0).sum()).all()  # which programs of the merge loop over


@pytest.mark.parametrize("kernel", SHAPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tiles_have_each_token_once(case: Any, kernel: str) -> None:
    """Also where a row begins within what tiles are counted from."""
    shape, align = SHAPES[kernel]
    tokens = []
    for kind, row, low, high, offset, _, kv_end in planned(kernel, *case)[0]:
        if kind == UNUSED:
            continue
        tokens += range(low, high)
        assert low < high <= low // align * align + shape.tile(4)
        if kind == REAL:
            q_lens, cached = case[:2]
            assert sum(q_lens[:row]) <= low and high <= sum(q_lens[: row + 1])
            assert offset == cached[row] - sum(q_lens[:row]) and kv_end == high + offset
    assert sorted(tokens) == list(range(case[2]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_items_that_see_most_come_first(case: Any) -> None:
    items = planned("mosaic", *case)[1]
    ordered, [used] = (np.asarray(x) for x in longest_first(jnp.asarray(items), 128))
    assert used == (items[:, 0] != UNUSED).sum()
    assert (ordered[used:, 0] == UNUSED).all()
    assert sorted(ordered.tolist()) == sorted(items.tolist())
    blocks = -(-ordered[:used, 6] // 128) - ordered[:used, 5] // 128
    assert (np.diff(blocks) <= 0).all()


@pytest.mark.parametrize("kernel", SHAPES)
def test_only_what_would_leave_the_device_idle_is_cut(kernel: str) -> None:
    counts = {
        name: int((planned(kernel, *case)[1][:, 0] == PART).sum()) for name, case in CASES.items()
    }
    # A chunk of 512 has 16 tiles: over 8 KV heads, as many pairs as the device takes at once.
    whole = ("short", "many", "nothing", "a long chunk", "a chunk over a long cache")
    assert [counts[name] for name in whole] == [0] * 5
    assert counts["a hit"] >= 8 and counts["ragged"] >= 8 and counts["a window"] >= 8


@pytest.mark.parametrize(("page", "scalars"), [(128, 1), (32, 2), (8, 8), (4, 0), (1, 0), (48, 0)])
def test_only_few_pages_of_a_block_have_an_id_each(page: int, scalars: int) -> None:
    """Others are read as one array: 64 scalars of pages of one token are 64 loads in each turn."""
    h = replace(heads(), page_size=page)
    found: list[Any] = []

    def kernel(table: Any, out: Any) -> None:
        found.append(page_ids(table, jnp.int32(0), jnp.int32(0), jnp.int32(0), 64, 64, h))
        out[...] = jnp.zeros(8, jnp.int32)

    shape = jax.ShapeDtypeStruct((8,), jnp.int32)
    jax.eval_shape(pl.pallas_call(kernel, out_shape=shape), jnp.zeros((1, 64), jnp.int32))
    assert (len(found[0]) if isinstance(found[0], tuple) else 0) == scalars


STREAMS: dict[str, Any] = {  # lengths of the decode rows, window
    "one": ([192], None),
    "long": ([100_000], None),
    "short": ([5, 0, 33, 1], None),
    "alike": ([272] * 60, None),
    "ragged": ([1, 40_000, 0, 300, 32, 64, 7000] * 9, None),
    "a window": ([40_000, 10, 0, 700, 512, 513], 500),
    "none": ([], None),
}


@pytest.mark.parametrize("case", STREAMS.values(), ids=STREAMS)
def test_shares_are_alike_and_cover_each_row_once(case: Any) -> None:
    lens, window = case
    rows, h, shape = len(lens) + 2, heads(window), gpu_stream.StreamShape()
    table = jnp.arange(rows)[:, None] * 8192 + jnp.arange(8192)
    batch = RaggedBatch(
        kv_lens=jnp.asarray([*lens, 99, -5], jnp.int32), page_table=table,
        cu_q_lens=jnp.arange(rows + 1), num_seqs=jnp.int32(rows - 1),
        num_decode=jnp.int32(len(lens)),
    )  # fmt: skip
    plan_of = jax.jit(lambda batch: gpu_stream.plan(batch, h, shape, rows))
    shares, of_row = (np.asarray(x) for x in plan_of(batch))
    block = shape.block
    oldest = [0 if window is None else max(0, n - window) // block for n in lens]
    want = [(r, b) for r, n in enumerate(lens) for b in range(oldest[r], max(1, -(-n // block)))]
    got, found = [], {r: [] for r in range(len(lens))}
    known = block // h.page_size  # pages of a block
    for at, (row, first, turns, continued, length, following, *rest) in enumerate(shares):
        pages, counters = rest[:known], rest[known:]
        assert len(counters) == h.num_kv_heads and not any(counters)
        assert not turns or continued == (first > oldest[row])
        if turns:
            assert [length, following] == [*lens, 0][row : row + 2]
            page = row * 8192 + first * known
            assert pages == [*range(page, page + known)]
        for pair in want[len(got) : len(got) + turns]:
            found[pair[0]].append(at)
        assert turns == 0 or want[len(got)] == (row, first)
        got += want[len(got) : len(got) + turns]
    assert got == want
    turns = [n for n in shares[:, 2] if n]
    assert all(n == max(turns) for n in turns[:-1])
    assert len(want) <= shape.least_blocks or min(turns[:-1]) >= min(2, shape.least_blocks)
    for r, mine in found.items():
        assert list(of_row[r]) == [min(mine), max(mine) - min(mine) + 1, lens[r]]
    assert not of_row[len(lens) :, 2].any()
