"""A batch on the device: what the words of packing.py say about each token, and the logits.

Training and the exam run the very decoder that serves, flat as it wants its tokens; only `attend`
is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ...model.decoder import Cached, Decoder, Heads
from .attention import Mix
from .packing import LEARNED, STARTS, Layout


class Batch(NamedTuple):
    """T tokens of rows laid end to end."""

    tokens: jax.Array  # int32 [T]
    positions: jax.Array  # int32 [T], place within the conversation
    targets: jax.Array  # int32 [T], the token that follows
    learned: jax.Array  # bool [T], whether the target is the model's to write
    answers: jax.Array  # int32 [T], where learned: how many tokens its answer has
    segments: tuple[jax.Array, ...]  # per part int32 [R, L], which conversation of its row


def unpack(words: jax.Array, layout: Layout) -> Batch:
    """uint16 [T] as packing.py wrote them."""
    pieces, all_segments, start = [], [], 0
    for rows, length in layout.parts:
        part = words[start : start + rows * length].reshape(rows, length).astype(jnp.int32)
        start += rows * length
        tokens, starts = part & (LEARNED - 1), part >= STARTS
        place = jnp.arange(length)
        begun = jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
        following = jnp.roll(part, -1, axis=1)
        # What the model has to write is never the first of a conversation.
        learned = ((following & LEARNED) != 0) & (place < length - 1)
        before = jax.lax.cummax(jnp.where(learned, -1, place), axis=1)
        after = jax.lax.cummin(jnp.where(learned, length, place), axis=1, reverse=True)
        answers = after - before - 1
        segments = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
        targets = following & (LEARNED - 1)
        pieces.append((tokens, place - begun, targets, learned, answers))
        all_segments.append(segments)
    tokens, positions, targets, learned, answers = (
        jnp.concatenate([x.reshape(-1) for x in each]) for each in zip(*pieces, strict=True)
    )
    return Batch(tokens, positions, targets, learned, answers, tuple(all_segments))


def batch_logits(decoder: Decoder, batch: Batch, mix: Mix) -> jax.Array:
    """float32 logits [T, V] of every token of the batch."""
    hidden, _ = decoder(batch.tokens, batch.positions, DenseAttend(batch.segments, mix))
    return decoder.logits(hidden)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseAttend:
    """Causal attention within each conversation of each row, part by part; nothing is cached."""

    segments: tuple[jax.Array, ...]  # see Batch
    mix: Mix = field(metadata={"static": True})

    def of_layer(self, layer: int) -> DenseAttend:
        return self

    def __call__(self, heads: Heads, cached: Cached) -> tuple[jax.Array, Cached]:
        q, k, v = heads.rotated()
        mixed, start = [], 0
        for part in self.segments:
            rows = slice(start, start + part.size)
            start += part.size
            q_part, k_part, v_part = (x[rows].reshape(*part.shape, *x.shape[1:]) for x in (q, k, v))
            mixed.append(self.mix(q_part, k_part, v_part, part).reshape(part.size, *q.shape[1:]))
        return jnp.concatenate(mixed), cached
