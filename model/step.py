"""The step programs: what runs on the device, from a packed plan to tokens.

    step(params, slabs, slots, buffer) -> (slabs, slots, outputs)

One program a bucket, slabs and slots donated. Read `step` top to bottom for the life of a step:
update slots, place tokens, run the layers (write K/V, attend), sample, advance slots, pack outputs.

    admit(slabs, slots, buffer) -> (slabs, slots)

is the same opening without the rest, for plans whose updates outgrow a step's buffer or that copy
pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from .abstract import AbstractDecoder
from .cache import CacheGroup, Slabs, fit, unfit
from .inputs import (
    ADMIT_ROOM,
    InputLayout,
    StepInputs,
    apply_updates,
    unpack,
    unpack_updates,
)
from .kernels.attention.api import ragged_paged_attention
from .kernels.kv_write import write_kv
from .plan import MAX_LOGPROBS, Emit, LogprobArrays, Sampler, StepOutputs
from .sampling import Sampled, sample
from .slots import SlotRows, Slots
from .weights import Params

Step = Callable[[Params, Slabs, Slots, jax.Array], tuple[Slabs, Slots, jax.Array]]
Admit = Callable[[Slabs, Slots, jax.Array], tuple[Slabs, Slots]]

_LOGPROB_WORDS = 2 + 2 * MAX_LOGPROBS
_NO_PAGE = -1  # a write to it is dropped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Placed:
    """Where each token and row of a step lies."""

    rows: SlotRows  # [R] the slots' state before this step
    live: jax.Array  # bool [R] a real row of a slot that is not frozen
    cu: jax.Array  # int32 [R + 1] running sum of counts
    tokens: jax.Array  # int32 [T]
    positions: jax.Array  # int32 [T]
    pages: jax.Array  # int32 [T] page to write; _NO_PAGE for padding and frozen rows
    offsets: jax.Array  # int32 [T] place in the page
    page_table: jax.Array  # int32 [R, M]


def make_step(
    decoder: AbstractDecoder,
    groups: tuple[CacheGroup, ...],
    layout: InputLayout,
    attention: str,
    writer: str = "scatter",
) -> Step:
    """The step program of one bucket, to be jitted with slabs and slots donated.

    `attention` is a backend of kernels/attention, `writer` one of kernels/kv_write.
    """
    config = decoder.config
    bucket = layout.bucket
    # Every model has one cache group so far; a second one needs page tables of its own in the plan.
    (group,) = groups

    def step(
        params: Params, slabs: Slabs, slots: Slots, buffer: jax.Array
    ) -> tuple[Slabs, Slots, jax.Array]:
        inputs = unpack(buffer, layout)
        slots = apply_updates(slots, inputs.updates)
        num_pages = slabs[group.name].shape[0] // len(group.layers)
        placed = _place(inputs, slots, layout)
        slab = slabs[group.name]

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            nonlocal slab
            first_page = layer * num_pages
            page = jnp.where(placed.pages >= 0, placed.pages + first_page, _NO_PAGE)
            heads = k.shape[1]
            q_fit, k, v = (fit(x, heads, slab) for x in (q, k, v))
            slab = write_kv(slab, k, v, page, placed.offsets, writer=writer)
            out = ragged_paged_attention(
                q_fit,
                slab,
                jnp.where(placed.live, placed.rows.position + inputs.counts, 0),
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
        hidden = model(placed.tokens, placed.positions, attend)
        last = jnp.maximum(placed.cu[1:] - 1, 0)
        logits = model.logits(hidden if bucket.decode_only else hidden[last])

        with jax.named_scope("sample"):
            sampled = sample(logits, placed.rows, bucket.sampler)
            emitted = placed.live & (inputs.emits == Emit.TOKEN)
            slots = _advance(slots, inputs, placed, emitted, sampled.tokens)
            outputs = _pack_outputs(sampled, emitted)
        return {group.name: slab}, slots, outputs

    return step


def make_admit(groups: tuple[CacheGroup, ...]) -> Admit:
    """The program that only copies pages and updates slots, ADMIT_ROOM at a time."""
    (group,) = groups

    def admit(slabs: Slabs, slots: Slots, buffer: jax.Array) -> tuple[Slabs, Slots]:
        updates = unpack_updates(buffer, ADMIT_ROOM)
        slab = slabs[group.name]
        layers = len(group.layers)
        first = jnp.arange(layers)[:, None] * (slab.shape[0] // layers)
        source, target = updates.page_copies.T
        target = jnp.where(target < 0, slab.shape[0], target + first)
        copied = slab.at[target].set(slab[source + first], mode="drop")
        return {group.name: copied}, apply_updates(slots, updates)

    return admit


def _place(inputs: StepInputs, slots: Slots, layout: InputLayout) -> _Placed:
    """Finds each row's tokens, positions and pages."""
    bucket = layout.bucket
    rows = slots.rows(inputs.slots)
    at_row = jnp.arange(bucket.rows)
    live = (at_row < inputs.num_rows) & (rows.remaining > 0)
    cu = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(inputs.counts, dtype=jnp.int32)])
    at = jnp.arange(bucket.tokens)
    if inputs.prompt_tokens is None:
        row, tokens, positions = at_row, rows.last_token, rows.position
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
    return _Placed(rows, live, cu, tokens, positions, pages, offsets, page_table)


def _advance(
    slots: Slots, inputs: StepInputs, placed: _Placed, emitted: jax.Array, tokens: jax.Array
) -> Slots:
    """Moves the slots of live rows on; a stop id or the last allowed token freezes a slot."""
    rows, one = placed.rows, emitted.astype(jnp.int32)
    stopped = emitted & jnp.any(tokens[:, None] == rows.stop_ids, axis=-1)
    words = rows.moved(
        last_token=tokens,
        position=rows.position + inputs.counts,
        remaining=jnp.where(stopped, 0, rows.remaining - one),
        min_remaining=rows.min_remaining - one,
        sample_index=rows.sample_index + one,
    )
    return slots.put(jnp.where(placed.live, inputs.slots, slots.num_slots), words)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _pack_outputs(sampled: Sampled, emitted: jax.Array) -> jax.Array:
    """int32 [R, words]: valid tokens, not-finite flag, token; log-probabilities' bits if any."""
    columns = [emitted, sampled.not_finite & emitted, sampled.tokens]
    packed = jnp.stack([c.astype(jnp.int32) for c in columns], axis=1)
    if sampled.logprob is None:
        return packed
    assert sampled.rank is not None
    assert sampled.top_ids is not None and sampled.top_logprobs is not None
    alone = jnp.stack([_bits(sampled.logprob), sampled.rank], axis=1)
    return jnp.concatenate([packed, alone, sampled.top_ids, _bits(sampled.top_logprobs)], axis=1)


def unpack_outputs(packed: NDArray[np.int32], num_rows: int, sampler: Sampler) -> StepOutputs:
    """What `_pack_outputs` packed, on the host, for the plan's real rows."""
    rows = packed[:num_rows]
    logprobs = None
    if sampler == Sampler.FULL:
        words = rows[:, 3:]
        assert words.shape[1] == _LOGPROB_WORDS
        ids, top = words[:, 2 : 2 + MAX_LOGPROBS], words[:, 2 + MAX_LOGPROBS :]
        logprobs = LogprobArrays(
            chosen=words[:, :1].copy().view(np.float32),
            rank=words[:, 1:2],
            top_ids=ids[:, None],
            top=top.copy().view(np.float32)[:, None],
        )
    return StepOutputs(
        tokens=rows[:, 2:3], n_valid=rows[:, 0], not_finite=rows[:, 1] != 0, logprobs=logprobs
    )
