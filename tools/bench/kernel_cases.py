"""The grid of `quire bench kernels`: shapes, random inputs for them, and a float64 statement.

A case is a step's worth of rows that all look alike: `rows` sequences with `context` cached tokens
each, of which the last `queries` are this step's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidConfig
from ...model.memory import PLATFORMS

SAMPLED = 24
"""Query tokens checked against the float64 statement."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape. A grid file is a JSON list of objects with these keys."""

    rows: int
    context: int
    queries: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = PLATFORMS["gpu"].page_size  # `quire bench kernels` gives its platform's
    ragged: bool = False  # contexts spread evenly from `queries` to `context`

    @property
    def name(self) -> str:
        kind = "decode" if self.queries == 1 else f"chunk of {self.queries}"
        context = f"1..{self.context}" if self.ragged else str(self.context)
        group = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        return f"{kind}, {self.rows} x {context}, {group}, page {self.page_size}"

    @property
    def tokens(self) -> int:
        return self.rows * self.queries

    @property
    def pages_per_row(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[rows] cached tokens of each row."""
        if self.ragged:
            return np.linspace(self.queries, self.context, self.rows).astype(np.int32)
        return np.full(self.rows, self.context, np.int32)

    def slab_bytes(self, itemsize: int) -> int:
        pages = self.rows * self.pages_per_row
        return pages * self.page_size * 2 * self.kv_heads * self.head_dim * itemsize

    def kv_bytes(self, itemsize: int) -> int:
        """What must be read: K and V of every cached token, once."""
        return int(self.lengths.sum()) * 2 * self.kv_heads * self.head_dim * itemsize

    def moved_bytes(self, itemsize: int) -> int:
        """K and V, the queries, and the result."""
        return self.kv_bytes(itemsize) + 2 * self.tokens * self.heads * self.head_dim * itemsize

    def flops(self) -> int:
        """Both products, over the positions that each query sees."""
        lengths = self.lengths.astype(np.int64)
        seen = (lengths * self.queries - self.queries * (self.queries - 1) // 2).sum()
        return int(4 * seen * self.heads * self.head_dim)


def _small(page_size: int) -> list[Case]:
    """A CPU gets through these in a minute."""
    case = partial(Case, heads=4, kv_heads=2, head_dim=32, page_size=page_size)
    other, *_ = _other_sizes(page_size)
    return [
        case(rows=1, context=256),
        case(rows=8, context=128),
        case(rows=8, context=128, page_size=other),
        case(rows=8, context=128, kv_heads=1, head_dim=64),
        case(rows=8, context=256, ragged=True),
        case(rows=1, context=256, queries=64),
    ]


def _full(page_size: int) -> list[Case]:
    """Llama-3.1-8B's heads, mostly, and Qwen2.5-1.5B's."""
    case = partial(Case, page_size=page_size)
    qwen = partial(case, heads=12, kv_heads=2)
    others = _other_sizes(page_size)
    return [
        case(rows=1, context=8192),
        case(rows=8, context=272),
        case(rows=64, context=272),
        case(rows=64, context=2048),
        case(rows=256, context=272),
        case(rows=256, context=1024, ragged=True),
        case(rows=8, context=32768),
        *(case(rows=64, context=272, page_size=size) for size in others),
        *(case(rows=256, context=1024, ragged=True, page_size=size) for size in others),
        qwen(rows=64, context=272),
        qwen(rows=256, context=1024, ragged=True),
        case(rows=64, context=272, heads=8, kv_heads=8),
        case(rows=64, context=272, heads=32, kv_heads=8, head_dim=64),
        case(rows=1, context=512, queries=512),
        case(rows=1, context=2048, queries=2048),
        *(case(rows=1, context=8192, queries=2048, page_size=size) for size in (16, 32)),
        case(rows=1, context=8192, queries=8192),
        case(rows=1, context=10_000, queries=64),
        case(rows=8, context=256, queries=256),
    ]


def _other_sizes(page_size: int) -> list[int]:
    """Page sizes to hold against the platform's own."""
    return [size for size in (16, 32, 64) if size != page_size]


GRIDS: dict[str, Callable[[int], list[Case]]] = {"small": _small, "full": _full}
"""By name: the cases, given the page size of those that do not vary it."""


def read_grid(name: str, page_size: int) -> list[Case]:
    """A grid by name or file.

    Args:
      page_size: of the cases that do not say theirs.

    Raises:
      InvalidConfig: no such file, or a case in it is wrong.
    """
    if name in GRIDS:
        return GRIDS[name](page_size)
    try:
        entries = json.loads(Path(name).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            f"grid: got {name!r}, must be a JSON file or one of {', '.join(GRIDS)}: {error}"
        ) from error
    if not isinstance(entries, list) or not entries:
        raise InvalidConfig(f"grid: {name}: must be a list of cases")
    return [
        _read_case(f"grid: {name}: case {at}", entry, page_size) for at, entry in enumerate(entries)
    ]


def _read_case(where: str, entry: Any, page_size: int) -> Case:
    kinds = {f.name: bool if f.name == "ragged" else int for f in fields(Case)}
    if not isinstance(entry, dict) or not {"rows", "context"} <= set(entry) <= set(kinds):
        raise InvalidConfig(
            f"{where}: got {entry!r}, must have rows, context, and no more than {', '.join(kinds)}"
        )
    for key, value in entry.items():
        if type(value) is not kinds[key] or (kinds[key] is int and value < 1):
            raise InvalidConfig(f"{where}: {key}: got {value!r}, must be a whole number from 1 on")
    case = Case(**{"page_size": page_size, **entry})
    if case.queries > case.context:
        raise InvalidConfig(f"{where}: queries: got {case.queries}, must be at most its context")
    if case.heads % case.kv_heads:
        raise InvalidConfig(f"{where}: heads: got {case.heads}, must be a multiple of kv_heads")
    return case


@dataclass(frozen=True, slots=True)
class Inputs:
    """Device arrays of one case, as ragged_paged_attention takes them.

    The slab holds the K and V of the rows several times over, each copy under a page table of its
    own: calls that take turns read memory, not a cache.
    """

    q: jax.Array  # [T, H, D]
    slab: jax.Array  # [pages, page, 2·KH, D]
    page_tables: tuple[jax.Array, ...]  # [S, M] each
    lengths: tuple[jax.Array, ...]  # kv_lens [S], cu_q_lens [S+1], num_seqs [], num_decode []


def make_inputs(case: Case, dtype: Any, *, copies: int, seed: int = 0) -> Inputs:
    """Random K, V and queries, with the pages of all rows shuffled."""
    draw = np.random.default_rng(seed)
    pages = case.rows * case.pages_per_row
    keys = jax.random.split(jax.random.key(seed), 2)
    shape = (1 + copies * pages, case.page_size, 2 * case.kv_heads, case.head_dim)
    tables = tuple(
        jnp.asarray(
            1 + at * pages + draw.permutation(pages).reshape(case.rows, -1), dtype=jnp.int32
        )
        for at in range(copies)
    )
    return Inputs(
        q=jax.random.normal(keys[0], (case.tokens, case.heads, case.head_dim), dtype),
        slab=jax.random.normal(keys[1], shape, dtype),
        page_tables=tables,
        lengths=(
            jnp.asarray(case.lengths),
            jnp.arange(case.rows + 1, dtype=jnp.int32) * case.queries,
            jnp.int32(case.rows),
            jnp.int32(case.rows if case.queries == 1 else 0),
        ),
    )


def float64_error(case: Case, inputs: Inputs, out: jax.Array) -> float:
    """‖out - exact‖ / ‖exact‖ over sampled query tokens; exact is float64 NumPy.

    Args:
      out: [T, H, D], of the first page table.
    """
    draw = np.random.default_rng(1)
    sampled = draw.choice(case.tokens, min(SAMPLED, case.tokens), replace=False)
    table = np.asarray(inputs.page_tables[0])
    exact = []
    for token in sampled:
        row, query = divmod(int(token), case.queries)
        seen = int(case.lengths[row]) - case.queries + query + 1
        pages = table[row, : -(-seen // case.page_size)]
        kv = np.asarray(inputs.slab[jnp.asarray(pages)], np.float64)
        kv = kv.reshape(-1, case.kv_heads, 2, case.head_dim)[:seen]
        q = np.asarray(inputs.q[token], np.float64).reshape(case.kv_heads, -1, case.head_dim)
        logits = np.einsum("kgd,tkd->kgt", q, kv[:, :, 0]) / case.head_dim**0.5
        weights = np.exp(logits - logits.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        exact.append(np.einsum("kgt,tkd->kgd", weights, kv[:, :, 1]).reshape(case.heads, -1))
    wanted, got = np.stack(exact), np.asarray(out, np.float64)[sampled]
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def as_json(case: Case) -> dict[str, Any]:
    return {"name": case.name, **asdict(case)}
