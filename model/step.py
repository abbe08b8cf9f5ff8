"""The step programs: what runs on the device, from a packed plan to tokens.

    step(params, slabs, slots, buffer) -> (slabs, slots, outputs)

One program a GREEDY bucket, slabs and slots donated. Read `make_step` for the life of a step:
update slots, run the layers (model/forward.py), sample, advance slots, pack outputs; all but the
first k times over in a bucket of k tokens a dispatch.

    forward(params, slabs, slots, buffer)         -> (slabs, slots, logits, which, hidden, pooled)
    sample(slots, logits, which)                  -> (slots, spent, outputs)
    sample_fully(controls, slots, logits, which)  -> (controls, slots, spent, outputs)

SAMPLE and FULL buckets of one token a dispatch are two of these: they share the forward, which is
what takes long to compile, and a host can come between the two. To sample, nothing of the plan is
needed but the rows' slots and whether they emit (`which`), and that is on the device already.
Together they give what one program would. Logits are donated to sampling, which works in them and
hands back what is left: `spent` means nothing.

    admit(slabs, slots, buffer) -> (slabs, slots)

is the opening without the rest, for plans whose updates outgrow a step's buffer or that copy pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .cache import CacheGroup, Slabs
from .forward import Forward
from .inputs import ADMIT_ROOM, InputLayout, apply_updates, unpack, unpack_updates
from .launch_buffers import copied_with_room, filled
from .outputs import output_words, pack_outputs
from .plan import Emit, Sampler
from .sampling.choose import Sampled, rows_at_once, sample
from .sampling.controls import Controls
from .sampling.logprobs import LOGPROB_WORDS
from .slots import SlotRows, Slots
from .weights import Params

Step = Callable[[Params, Slabs, Slots, jax.Array], tuple[Slabs, Slots, jax.Array]]
Passed = tuple[Slabs, Slots, jax.Array, jax.Array, jax.Array | None, jax.Array | None]
Pass = Callable[[Params, Slabs, Slots, jax.Array], Passed]
Sample = Callable[[Slots, jax.Array, jax.Array], tuple[Slots, jax.Array, jax.Array]]
SampleFully = Callable[
    [Controls, Slots, jax.Array, jax.Array], tuple[Controls, Slots, jax.Array, jax.Array]
]
Admit = Callable[[Slabs, Slots, jax.Array], tuple[Slabs, Slots]]


def make_step(forward: Forward, layout: InputLayout) -> Step:
    """The whole step of a bucket that is one program, to be jitted with slabs and slots donated."""
    bucket = layout.bucket

    def step(
        params: Params, slabs: Slabs, slots: Slots, buffer: jax.Array
    ) -> tuple[Slabs, Slots, jax.Array]:
        buffer, room = copied_with_room(buffer, bucket.rows, output_words(bucket.k))
        inputs = unpack(buffer, layout)
        slots = apply_updates(slots, inputs.updates)

        def once(
            state: tuple[Slabs, Slots], _: None = None
        ) -> tuple[tuple[Slabs, Slots], tuple[jax.Array, ...]]:
            slabs, slots = state
            slabs, placed, passed = forward(params, slabs, slots, inputs)
            with jax.named_scope("sample"):
                sampled = sample(passed.logits, placed.rows, bucket.sampler)
                emitted = placed.live & (inputs.emits == Emit.TOKEN)
                slots = _advance(
                    slots, inputs.slots, placed.rows, placed.live,
                    ahead=inputs.counts, emitted=emitted, tokens=sampled.tokens,
                )  # fmt: skip
            return (slabs, slots), (emitted, sampled.not_finite, sampled.tokens)

        if bucket.k == 1:
            (slabs, slots), one = once((slabs, slots))
            emitted, not_finite, tokens = (a[None] for a in one)
        else:
            # Slots that stop freeze, and emit nothing in the rounds that are left.
            state, each = jax.lax.scan(once, (slabs, slots), length=bucket.k)
            (slabs, slots), (emitted, not_finite, tokens) = state, each
        return slabs, slots, filled(room, pack_outputs(emitted, not_finite, tokens))

    return step


def make_pass(forward: Forward, layout: InputLayout, logit_rows: int, hidden_rows: int) -> Pass:
    """The forward of a bucket whose sampling is apart, to be jitted with slabs and slots donated.

    It moves slots on by what they read; what they emit is `sample`'s to add, which finds the slot
    and the emit of each row of logits in `which`, int32 [3, L]; its last row means nothing. Hidden
    states of prompts are handed on for `score`, padded to `hidden_rows` so that it is one program
    for all, and pooled ones of each row for those who want them; a decode-only bucket has neither.
    """

    def run(params: Params, slabs: Slabs, slots: Slots, buffer: jax.Array) -> Passed:
        buffer, room = copied_with_room(buffer, 2, logit_rows)
        inputs = unpack(buffer, layout)
        slots = apply_updates(slots, inputs.updates)
        slabs, placed, passed = forward(params, slabs, slots, inputs)
        slots = _advance(slots, inputs.slots, placed.rows, placed.live, ahead=inputs.counts)
        hidden = None
        if not layout.bucket.decode_only:
            hidden = jnp.pad(passed.hidden, ((0, hidden_rows - layout.bucket.tokens), (0, 0)))
        padding = logit_rows - layout.bucket.rows
        slot = jnp.pad(inputs.slots, (0, padding), constant_values=slots.num_slots)
        which = filled(room, jnp.stack([slot, jnp.pad(inputs.emits, (0, padding))]))
        return slabs, slots, passed.logits, which, hidden, passed.pooled

    return run


def make_sample(*, in_place: bool) -> Sample:
    """What follows the forward of a SAMPLE bucket, to be jitted with slots and logits donated.

    Args:
      in_place: whether the platform's XLA works in the logits. Where it makes arrays as large
        beside them, rows are sampled some at a time.
    """

    def run(
        slots: Slots, logits: jax.Array, which: jax.Array
    ) -> tuple[Slots, jax.Array, jax.Array]:
        left = _Left.of(slots, which, output_words(1))
        with jax.named_scope("sample"):
            at_once = None if in_place else rows_at_once(slots.num_slots)
            sampled = sample(logits, left.rows, Sampler.SAMPLE, at_once=at_once)
        assert sampled.spent is not None
        slots, outputs = left.emit(slots, sampled)
        return slots, sampled.spent, outputs

    return run


def make_full_sample() -> SampleFully:
    """What follows the forward of a FULL bucket, to be jitted with controls, slots and logits
    donated."""

    def run(
        controls: Controls, slots: Slots, logits: jax.Array, which: jax.Array
    ) -> tuple[Controls, Slots, jax.Array, jax.Array]:
        left = _Left.of(slots, which, output_words(1) + LOGPROB_WORDS)
        with jax.named_scope("sample"):
            at_once = rows_at_once(slots.num_slots)
            sampled = sample(logits, left.rows, Sampler.FULL, controls, left.slot, at_once)
            # Also for rows without controls: their entry is emptied before it means something.
            recorded = jnp.where(left.emitted, left.slot, slots.num_slots)
            controls = controls.record(recorded, sampled.tokens)
        assert sampled.spent is not None
        slots, outputs = left.emit(slots, sampled)
        return controls, slots, sampled.spent, outputs

    return run


class _Left(NamedTuple):
    """The rows of a forward, as sampling finds them."""

    slot: jax.Array  # int32 [R] which slot each row is
    rows: SlotRows  # [R] their state, positions past what was read
    live: jax.Array  # bool [R]
    emitted: jax.Array  # bool [R]
    room: jax.Array  # int32 [R + 1, words] for the step's outputs

    @staticmethod
    def of(slots: Slots, which: jax.Array, words: int) -> _Left:
        which, room = copied_with_room(which.reshape(-1), which.shape[1], words)
        slot, emits, _ = which.reshape(3, -1)
        rows = slots.rows(slot)
        live = (slot < slots.num_slots) & (rows.remaining > 0)
        return _Left(slot, rows, live, live & (emits == Emit.TOKEN), room)

    def emit(self, slots: Slots, sampled: Sampled) -> tuple[Slots, jax.Array]:
        """The slots moved on by what was sampled, and the step's outputs."""
        slots = _advance(
            slots, self.slot, self.rows, self.live, emitted=self.emitted, tokens=sampled.tokens
        )
        bad, tokens = sampled.not_finite[None], sampled.tokens[None]
        packed = pack_outputs(self.emitted[None], bad, tokens, sampled.logprobs)
        return slots, filled(self.room, packed)


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


def _advance(
    slots: Slots,
    slot: jax.Array,
    rows: SlotRows,
    live: jax.Array,
    *,
    ahead: jax.Array | int = 0,
    emitted: jax.Array | None = None,
    tokens: jax.Array | None = None,
) -> Slots:
    """Moves the slots of live rows on; a stop id or the last allowed token freezes a slot.

    Args:
      slots: the state before.
      slot: int32 [R] which slot each row is.
      rows: their state before.
      live: bool [R]; other rows change nothing.
      ahead: int32 [R] tokens whose KV was written.
      emitted, tokens: bool [R] and int32 [R]; None emits nothing.
    """
    changed = {"position": rows.position + ahead}
    if emitted is not None and tokens is not None:
        one = emitted.astype(jnp.int32)
        # A stop id that min_tokens could not hold off, having no other token to choose, is no stop.
        due = emitted & (rows.min_remaining <= 0)
        stopped = due & jnp.any(tokens[:, None] == rows.stop_ids, axis=-1)
        changed |= {
            "last_token": jnp.where(emitted, tokens, rows.last_token),
            "remaining": jnp.where(stopped, 0, rows.remaining - one),
            "min_remaining": rows.min_remaining - one,
            "sample_index": rows.sample_index + one,
        }
    return slots.put(jnp.where(live, slot, slots.num_slots), rows.moved(**changed))
