"""Through the layers: from a step's inputs to hidden states, with K/V written on the way.

The first half of every step program (model/step.py): finds each token's place, runs the decoder,
and writes and attends to the slab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp

from .abstract import AbstractDecoder
from .cache import CacheGroup, Slabs, fit, unfit
from .inputs import InputLayout, StepInputs
from .kernels.attention.api import ragged_paged_attention
from .kernels.kv_write import write_kv
from .projection import projection as choose_projection
from .slots import SlotRows, Slots
from .weights import Params

_NO_PAGE = -1  # a write to it is dropped


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

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            nonlocal slab
            first_page = layer * num_pages
            # As a constant it would give each layer a kernel of its own that writes K and V.
            offset = jax.lax.optimization_barrier(jnp.full((1,), first_page, jnp.int32))
            page = jnp.where(placed.pages >= 0, placed.pages + offset, _NO_PAGE)
            heads = k.shape[1]
            q_fit, k, v = (fit(x, heads, slab) for x in (q, k, v))
            slab = write_kv(slab, k, v, page, placed.offsets, writer=writer)
            out = ragged_paged_attention(
                q_fit,
                slab,
                kv_lens,
                placed.page_table,
                placed.cu,
                inputs.num_rows,
                inputs.num_decode,
                scale=config.head_dim**-0.5,
                first_page=first_page,
                window=config.windows[layer],
                decode_only=bucket.decode_only,
                backend=attention,
            )
            return unfit(out, heads, q)

        model = decoder.bind(params)
        project = choose_projection(projection, bucket.tokens)
        hidden = model(placed.tokens, placed.positions, attend, project)
        last = jnp.pad(jnp.maximum(placed.cu[1:] - 1, 0), (0, logit_rows - bucket.rows))
        as_it_is = bucket.decode_only and logit_rows == bucket.rows
        at_last = hidden if as_it_is else hidden[last]
        pools = bucket.apart and not bucket.decode_only
        logits = model.logits(at_last, choose_projection(projection, logit_rows))
        passed = Passed(hidden, logits, model.pooled(at_last) if pools else None)
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
