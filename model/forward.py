"""Through the layers: from a step's inputs to hidden states, with K/V written on the way.

The first half of every step program (model/step.py): finds each token's place, runs the decoder,
and writes and attends to the slab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from .abstract import AbstractDecoder
from .cache import CacheGroup, Slabs, fit, unfit
from .decoder import Heads
from .inputs import InputLayout, StepInputs
from .kernels.attention.api import ragged_paged_attention
from .kernels.kv_write import ROTATING, write_kv
from .kernels.rotate_write_gpu import rotate_write, serves
from .projection import projection as choose_projection
from .slots import SlotRows, Slots
from .weights import Params

_NO_PAGE = -1  # a write to it is dropped


def _static() -> Any:
    """A field that is part of a pytree's structure."""
    return field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Placed:
    """Where each token and row of a step lies."""

    rows: SlotRows  # [R] the slots' state before this step
    live: jax.Array  # bool [R] a real row of a slot that is not frozen
    cu: jax.Array  # int32 [R + 1] running sum of counts
    tokens: jax.Array  # int32 [T]
    positions: jax.Array  # int32 [T]
    pages: jax.Array  # int32 [T] page to write; _NO_PAGE for padding and frozen rows
    offsets: jax.Array  # int32 [T] place in the page
    page_table: jax.Array  # int32 [R, M]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Passed:
    """What a pass through the layers gave."""

    hidden: jax.Array  # [T, E] before the final norm
    logits: jax.Array  # float32 [L, V] at each row's last token; rows past R mean nothing
    pooled: jax.Array | None  # float32 [L, E] there; of forwards apart with prompt rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedAttend:
    """A decoder's `Attend` over the slab, which it also writes. R rows, T tokens."""

    kv_lens: jax.Array  # int32 [R] cached tokens, this step's included; 0: the row is not live
    page_table: jax.Array  # int32 [R, M]
    cu: jax.Array  # int32 [R + 1], see Placed
    num_rows: jax.Array  # int32 []
    num_decode: jax.Array  # int32 []
    pages: jax.Array  # int32 [T], see Placed
    offsets: jax.Array  # int32 [T]
    first_page: jax.Array  # int32 [1] of the layer
    _: KW_ONLY
    windows: tuple[int | None, ...] = _static()  # of each layer; of one, its own
    num_pages: int = _static()  # of one layer
    decode_only: bool = _static()
    backend: str = _static()  # of kernels/attention
    writer: str = _static()  # of kernels/kv_write

    def of_layer(self, layer: int) -> PagedAttend:
        # An array, and one window: what differs from layer to layer must not make it another.
        first_page = jnp.full((1,), layer * self.num_pages, jnp.int32)
        return replace(self, first_page=first_page, windows=(self.windows[layer],))

    def __call__(self, heads: Heads, slab: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, slab = self._write(heads, slab)
        local = heads.config
        (window,) = self.windows
        out = ragged_paged_attention(
            q,
            slab,
            self.kv_lens,
            self.page_table,
            self.cu,
            self.num_rows,
            self.num_decode,
            scale=local.head_dim**-0.5,
            first_page=self.first_page,
            window=window,
            decode_only=self.decode_only,
            backend=self.backend,
        )
        shape = q.shape[0], local.num_heads, local.head_dim
        return unfit(out, local.num_kv_heads, shape), slab

    def _write(self, heads: Heads, slab: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries as the slab's heads are, and the slab with the step's K and V."""
        local = heads.config
        if self.writer in ROTATING and serves(slab, local.num_kv_heads, local.head_dim):
            return rotate_write(
                heads.product, slab, heads.rotation, self.first_page, self.pages, self.offsets,
                num_kv_heads=local.num_kv_heads, dtype=heads.dtype, bias=heads.bias,
                norms=heads.norms, eps=local.norm_eps, interpret=ROTATING[self.writer],
            )  # fmt: skip
        # As a constant it would give each layer a kernel of its own that writes K and V.
        offset = jax.lax.optimization_barrier(self.first_page)
        page = jnp.where(self.pages >= 0, self.pages + offset, _NO_PAGE)
        q, k, v = (fit(x, local.num_kv_heads, slab) for x in heads.rotated())
        return q, write_kv(slab, k, v, page, self.offsets, writer=self.writer)


Forward = Callable[[Params, Slabs, Slots, StepInputs], tuple[Slabs, Placed, Passed]]


def make_forward(
    decoder: AbstractDecoder,
    groups: tuple[CacheGroup, ...],
    layout: InputLayout,
    logit_rows: int,
    attention: str,
    writer: str,
    projection: str,
) -> Forward:
    """The pass of one bucket, to be called while tracing.

    It leaves `logit_rows` rows of logits, the bucket's or more. `attention` is a backend of
    kernels/attention, `writer` one of kernels/kv_write, `projection` one of model/projection.py.
    """
    config = decoder.config
    bucket = layout.bucket
    # Every model has one cache group so far; a second one needs page tables of its own in the plan.
    (group,) = groups

    def forward(
        params: Params, slabs: Slabs, slots: Slots, inputs: StepInputs
    ) -> tuple[Slabs, Placed, Passed]:
        num_pages = slabs[group.name].shape[0] // len(group.layers)
        placed = _once_a_step(_place(inputs, slots, layout))
        kv_lens = _once_a_step(jnp.where(placed.live, placed.rows.position + inputs.counts, 0))
        slab = slabs[group.name]

        attend = PagedAttend(
            kv_lens, placed.page_table, placed.cu, inputs.num_rows, inputs.num_decode,
            placed.pages, placed.offsets, jnp.zeros((1,), jnp.int32),
            windows=config.windows, num_pages=num_pages, decode_only=bucket.decode_only,
            backend=attention, writer=writer,
        )  # fmt: skip
        model = decoder.bind(params)
        products = choose_projection(projection, bucket.tokens)
        stream, slab = model(placed.tokens, placed.positions, attend, slab, products)
        last = jnp.pad(jnp.maximum(placed.cu[1:] - 1, 0), (0, logit_rows - bucket.rows))
        as_it_is = bucket.decode_only and logit_rows == bucket.rows
        at_last = stream if as_it_is else stream.rows(last)
        logits = model.logits(at_last, choose_projection(projection, logit_rows))
        pools = bucket.apart and not bucket.decode_only
        pooled = model.pooled(at_last.settled()) if pools else None
        passed = Passed(stream.settled(), logits, pooled)
        return {group.name: slab}, placed, passed

    return forward


T = TypeVar("T")


def _once_a_step(values: T) -> T:
    """Keeps XLA from computing these anew inside the kernels of every layer that reads them."""
    fixed: T = jax.lax.optimization_barrier(values)
    return fixed


def _place(inputs: StepInputs, slots: Slots, layout: InputLayout) -> Placed:
    """Finds each row's tokens, positions and pages."""
    bucket = layout.bucket
    rows = slots.rows(inputs.slots)
    live = (inputs.slots < slots.num_slots) & (rows.remaining > 0)
    cu = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(inputs.counts, dtype=jnp.int32)])
    at = jnp.arange(bucket.tokens)
    if inputs.prompt_tokens is None:
        row, tokens, positions = at, rows.last_token, rows.position
    else:
        row = jnp.sum(at[:, None] >= cu[None, 1:], axis=1)  # rows that end at or before this token
        row = jnp.minimum(row, bucket.rows - 1)
        decodes = at < inputs.num_decode
        tokens = jnp.where(decodes, rows.last_token[row], inputs.prompt_tokens)
        positions = rows.position[row] + at - cu[row]
    written = live[row] & (at < cu[-1])
    page_table = slots.page_table[inputs.slots]
    index = jnp.minimum(positions // layout.page_size, page_table.shape[1] - 1)
    pages = jnp.where(written, page_table[row, index], _NO_PAGE)
    offsets = positions % layout.page_size
    return Placed(rows, live, cu, tokens, positions, pages, offsets, page_table)
