"""How the GPU kernels cut prompts into items: all of it, once, and few of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.model.kernels.attention.contract import RaggedBatch
from quire.model.kernels.attention.gpu_pallas import Heads
from quire.model.kernels.attention.gpu_prefill import (
    _EMPTY,
    _PART,
    _REAL,
    _UNUSED,
    PrefillShape,
    plan,
    tiles,
)  # fmt: skip

SHAPE = PrefillShape(queries=128, block=64, num_warps=8, num_stages=3)


def heads(window: int | None = None) -> Heads:
    return Heads(
        num_kv_heads=8, group=4, head_dim=128, page_size=32, max_pages=4096, scale=1.0,
        soft_cap=None, window=window, compute=jnp.bfloat16, interpret=True,
    )  # fmt: skip


def planned(
    q_lens: list[int], cached: list[int], tokens: int, window: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(tiles, items, splits, budget) of prompt rows alone, with two rows that do not exist."""
    q, rows = np.array(q_lens), len(q_lens) + 2
    batch = RaggedBatch(
        kv_lens=jnp.asarray(np.pad(q + cached, (0, 2), constant_values=9)),
        page_table=jnp.zeros((rows, 4096), jnp.int32),
        cu_q_lens=jnp.asarray(np.pad(np.cumsum([0, *q_lens]), (0, 2), constant_values=-3)),
        num_seqs=jnp.int32(len(q_lens)),
        num_decode=jnp.int32(0),
    )
    h = heads(window)
    budget = SHAPE.budget(h, tokens)

    @jax.jit
    def both(batch: RaggedBatch) -> tuple[jax.Array, ...]:
        work = tiles(batch, h, tokens, SHAPE.tile(h.group))
        return work, *plan(work, SHAPE, budget)

    work, items, splits = (np.asarray(x) for x in both(batch))
    return work, items, splits, budget


CASES: dict[str, Any] = {
    "a hit": ([16], [9984], 64),
    "a chunk over a long cache": ([512], [100_000], 512),
    "ragged": ([64, 1, 200, 7], [10_000, 300, 0, 40_000], 512),
    "a window": ([64, 100], [10_000, 40_000], 256, 5000),
    "nothing": ([], [], 64),
    "short": ([100, 100, 56], [0, 0, 0], 256),
    "a long chunk": ([2048], [6144], 2048),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_items_cover_each_tile_once(case: Any) -> None:
    work, items, splits, budget = planned(*case)
    parts = []
    for kind, _, low, high, _, kv_first, kv_end in work:
        mine = items[(items[:, 2] == low) & (items[:, 0] != _UNUSED)]
        if kind == _UNUSED:
            continue
        assert (mine[:, 3] == high).all()
        if kind == _EMPTY:
            assert [list(x[[0, 5, 6]]) for x in mine] == [[_EMPTY, kv_first, kv_end]]
            continue
        # One after another, from the first position seen to the last, cut between blocks.
        assert mine[0, 5] == kv_first and mine[-1, 6] == kv_end
        assert (mine[1:, 5] == mine[:-1, 6]).all() and not (mine[1:, 5] % SHAPE.block).any()
        assert (mine[:, 0] == (_PART if len(mine) > 1 else _REAL)).all()
        if len(mine) > 1:
            [split] = splits[(splits[:, 2] == low) & (splits[:, 1] > 0)]
            assert list(split) == [mine[0, 7], len(mine), low, high]
            parts += list(mine[:, 7])
    assert sorted(parts) == list(range(len(parts)))
    assert splits[:, 1].sum() == len(parts) <= 2 * budget


def test_only_what_would_leave_the_device_idle_is_cut() -> None:
    counts = {name: int((planned(*case)[1][:, 0] == _PART).sum()) for name, case in CASES.items()}
    # A chunk of 512 has 16 tiles: over 8 KV heads, as many pairs as the device takes at once.
    whole = ("short", "nothing", "a long chunk", "a chunk over a long cache")
    assert [counts[name] for name in whole] == [0] * 4
    assert counts["a hit"] >= 8 and counts["ragged"] >= 8 and counts["a window"] >= 8
