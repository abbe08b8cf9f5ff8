"""What the GPU kernels need of Pallas, in one place: its names move between JAX versions.

Callers: gpu_decode.py and gpu_prefill.py, gemv_gpu.py and gemm_gpu.py beside this folder, and for
its arithmetic gpu_mosaic.py. `call` lowers kernels through Triton. They take whole arrays and index
them by hand: Pallas' blocks cannot follow a page table.

A running softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) is
kept in base 2, since that is what the hardware has: m is a maximum of logit · log2(e).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from .gpu_lowered import Unknown, in_use

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
LOWEST = -1e30
"""A maximum of nothing. Finite, so that exp2(x - m) needs no guard: it is 0 for x = -inf."""

program_id = pl.program_id
when = pl.when


@dataclass(frozen=True)
class Launch:
    """How a kernel is run.

    Attributes:
      interpret: see Heads.
      num_warps: of 32 threads, for each program of the grid.
      num_stages: depth of the pipeline of loads.
    """

    interpret: bool
    num_warps: int
    num_stages: int


def call(
    kernel: Callable[..., None],
    launch: Launch,
    *,
    name: str,
    grid: tuple[int, ...],
    out: Sequence[jax.ShapeDtypeStruct],
    args: Sequence[jax.Array],
    aliases: Mapping[int, int] | None = None,
    any_rows: bool = False,
    but_of: Collection[int] = (),
) -> Any:
    """Runs `kernel(*args, *out)` on whole arrays in memory; `aliases` is {argument: output}.

    With `any_rows` the kernel looks at no array's first dimension, not even at those of arrays in
    its closure, but those of the arguments `but_of`: programs for steps of any size may share it
    (gpu_lowered.py).
    """

    def make(out: Sequence[jax.ShapeDtypeStruct]) -> Callable[..., Any]:
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=list(out),
            input_output_aliases=dict(aliases or {}),
            interpret=launch.interpret,
            compiler_params=triton.CompilerParams(
                num_warps=launch.num_warps, num_stages=launch.num_stages
            ),
            name=name,
        )

    if any_rows and not launch.interpret and (kernels := in_use()) is not None:
        try:
            with jax.named_scope(name):
                return kernels.run(kernel, launch, grid, make, args, but_of, out, aliases or {})
        except Unknown:
            pass
    return make(out)(*args)


def load(ref: Any, index: tuple[Any, ...], mask: jax.Array, dtype: Any = None) -> jax.Array:
    """ref[index] as `dtype`, 0 where the mask is false; nothing is read there."""
    dtype = ref.dtype if dtype is None else dtype
    if ref.dtype.itemsize == 1:  # Triton knows no constant of such a type
        return jnp.where(mask, triton.load(ref.at[index], mask=mask).astype(dtype), 0)
    return triton.load(ref.at[index], mask=mask, other=0).astype(dtype)


def store(ref: Any, index: tuple[Any, ...], value: jax.Array, mask: jax.Array) -> None:
    """ref[index] = value where the mask is true."""
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def add_one(ref: Any, at: Any, *, interpret: bool) -> jax.Array:
    """ref[at] += 1 for all programs to see; returns what it was.

    Whoever finds a later count sees what this program stored before.
    """
    if not interpret:
        triton.debug_barrier()  # of this program's threads, each of which stored a part
    return triton.atomic_add(ref, at if isinstance(at, tuple) else (at,), jnp.int32(1))


def dot(a: jax.Array, b: jax.Array, *, b_transposed: bool = False) -> jax.Array:
    """a · b (or a · bᵀ) in float32: float32 factors in full, not rounded to tf32."""
    dims = (((1,), (1 if b_transposed else 0,)), ((), ()))
    return lax.dot_general(
        a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return 1 << (max(n, least) - 1).bit_length()


def cdiv(a: Any, b: Any) -> Any:
    """a / b rounded up, for a >= 0."""
    return div(a + b - 1, b)


def div(a: Any, b: Any) -> Any:
    """a // b for a >= 0: Python's rule for negative numbers costs instructions."""
    return a // b if isinstance(a, int) else lax.div(a, jnp.asarray(b, a.dtype))


def rem(a: jax.Array, b: int) -> jax.Array:
    """a % b for a >= 0."""
    return lax.rem(a, jnp.asarray(b, a.dtype))


@dataclass(frozen=True)
class Heads:
    """Static sizes of the operation, and what a logit becomes."""

    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    max_pages: int
    scale: float
    soft_cap: float | None
    window: int | None
    compute: Any  # dtype of the factors of both products
    interpret: bool  # evaluate the kernels as plain JAX, on any device; for tests

    @property
    def dims(self) -> int:
        """head_dim as a power of two, which is what blocks must be; the rest is masked."""
        return power_of_2(self.head_dim, 16)

    def logits(self, s: jax.Array, k_scale: Any) -> tuple[jax.Array, Any]:
        """(x, c) such that the logit of the product s = q · k in base 2 is x · c, c > 0."""
        if self.soft_cap is None:
            return s, k_scale * (self.scale * LOG2_E)
        return jnp.tanh(s * (k_scale * (self.scale / self.soft_cap))), self.soft_cap * LOG2_E


def softmax_step(
    x: jax.Array,
    c: Any,
    v: jax.Array,
    state: tuple[jax.Array, jax.Array, jax.Array],
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes logits x · c [Q, B] (base 2, x is -inf where unseen) and values v [B, D] into a running
    softmax: m [Q], l [Q], acc [Q, D]."""
    m, l, acc = state  # noqa: E741
    top = jnp.maximum(m, jnp.max(x, axis=1) * c)
    p = _exp2_of(x, c, top, interpret)
    decay = jnp.exp2(m - top)
    acc = acc * decay[:, None] + dot(p.astype(v.dtype), v)
    return top, l * decay + jnp.sum(p, axis=1), acc


def _exp2_of(x: jax.Array, c: Any, top: jax.Array, interpret: bool) -> jax.Array:
    """exp2(x · c - top), x [Q, B], top [Q]: two instructions, where Triton makes six."""
    if interpret:
        return jnp.exp2(x * c - top[:, None])
    args = [x, jnp.full(x.shape, c, jnp.float32), jnp.broadcast_to(-top[:, None], x.shape)]
    [p] = triton.elementwise_inline_asm(
        "{ .reg .f32 t; fma.rn.ftz.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }",
        args=args,
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return p


def finish(
    m: jax.Array,
    l: jax.Array,  # noqa: E741
    acc: jax.Array,
    sink: jax.Array | None,
    v_scale: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """(output, log of the denominator): zeros and -inf where nothing was seen.

    `sink` [Q] is one more logit whose value is zero; -inf is none.
    """
    if sink is not None:
        sink = sink * LOG2_E
        top = jnp.maximum(m, sink)
        decay = jnp.exp2(m - top)
        m, l, acc = top, l * decay + jnp.exp2(sink - top), acc * decay[:, None]  # noqa: E741
    some = l != 0.0  # true for NaN: a row that is not finite says so
    out = acc * (v_scale / jnp.where(some, l, 1.0))[:, None]
    lse = jnp.where(some, m * LN_2 + jnp.log(jnp.where(some, l, 1.0)), -jnp.inf)
    return out, lse


Pages = tuple[jax.Array, ...] | jax.Array
"""Where a block's positions lie: the id of each page, or of the page of each position."""

_SCALAR_PAGES = 8
"""Pages of a block, up to which each has an id of its own. A step with pages of one token and 64
ids a block took three times as long to compile."""


def scalar_pages(size: int, heads: Heads) -> int:
    """Of a block of so many positions, the pages that have an id each; 0: it has too many."""
    if heads.page_size % size == 0:
        return 1
    few = size % heads.page_size == 0 and size <= _SCALAR_PAGES * heads.page_size
    return size // heads.page_size if few else 0


def page_ids(
    table: Any,
    first_page: jax.Array,
    row: jax.Array,
    block: jax.Array,
    size: int,
    end: jax.Array,
    heads: Heads,
) -> Pages:
    """Pages that hold positions block · size up to (block + 1) · size of a row, counted from the
    slab's first; those from `end` on are as good as any.

    Read one turn of a loop ahead and carried: a load whose address is loaded in the same turn would
    cost the pipeline half its depth. Few pages are so many scalars, which cost no registers.
    """
    start = block * size
    if scalar_pages(size, heads):
        starts = range(0, size, heads.page_size)
        return tuple(
            load(table, (row, div(start + at, heads.page_size)), start + at < end) + first_page
            for at in starts
        )
    position = start + jnp.arange(size)
    return load(table, (row, div(position, heads.page_size)), position < end) + first_page


def load_kv(
    slab: Any,
    pages: Pages,
    head: jax.Array,
    block: jax.Array,
    size: int,
    heads: Heads,
    seen: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """K and V [size, dims] of positions block · size and on, of one KV head.

    Args:
      slab: [layers × pages × page, 2·KH, D].
      pages: what page_ids gave.
      seen: (first, end) of the positions to read; others give zeros. None: all of them.
    """
    lane, d = jnp.arange(size), jnp.arange(heads.dims)
    position = block * size + lane
    if isinstance(pages, tuple):
        token = pages[0] * heads.page_size + rem(block * size, heads.page_size) + lane
        for at, page in enumerate(pages[1:], 1):
            past = lane - at * heads.page_size
            token = jnp.where(past >= 0, page * heads.page_size + past, token)
    else:
        token = pages * heads.page_size + rem(position, heads.page_size)
    mask = None
    if heads.dims != heads.head_dim:
        mask = jnp.broadcast_to((d < heads.head_dim)[None, :], (size, heads.dims))
    if seen is not None:
        usable = ((position >= seen[0]) & (position < seen[1]))[:, None]
        mask = jnp.broadcast_to(usable, (size, heads.dims)) if mask is None else mask & usable

    def read(index: jax.Array) -> jax.Array:
        at = (token[:, None], index, d[None, :])
        if mask is None:
            return slab[at].astype(heads.compute)
        return load(slab, at, mask, heads.compute)

    return read(2 * head), read(2 * head + 1)


def optional_refs(refs: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """The leading refs, one for each array that was given, None where there was none."""
    rest = iter(refs)
    return [None if x is None else next(rest) for x in given]
