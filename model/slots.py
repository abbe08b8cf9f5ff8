"""Device state of running requests: one entry a slot, donated through every step.

The next step reads a slot's last token and position here, on the device, so launching step N+1
never waits for the tokens of step N. What the host knows of a position is an upper bound.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .mesh import Mesh
from .plan import MAX_STOP_IDS

NO_TOKEN = -1
"""Fills unused stop ids; equals no token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """S slots. A slot with remaining == 0 is frozen: its rows write, emit and change nothing."""

    last_token: jax.Array  # int32 [S] input of the next decode row
    position: jax.Array  # int32 [S] where that token goes = tokens with KV in the pages
    remaining: jax.Array  # int32 [S] output tokens still allowed
    min_remaining: jax.Array  # int32 [S] output tokens that may not be a stop id
    sample_index: jax.Array  # int32 [S] index of the next output token
    seed: jax.Array  # uint32 [S, 2] high and low word
    choice: jax.Array  # int32 [S]
    temperature: jax.Array  # float32 [S] 0 = greedy
    top_k: jax.Array  # int32 [S] 0 = off
    top_p: jax.Array  # float32 [S] 1 = off
    min_p: jax.Array  # float32 [S] 0 = off
    adapter: jax.Array  # int32 [S] 0 = the base model
    stop_ids: jax.Array  # int32 [S, MAX_STOP_IDS] NO_TOKEN where unused
    page_table: jax.Array  # int32 [S, M] page of each page-sized stretch; 0 where unused

    @property
    def num_slots(self) -> int:
        return self.last_token.shape[0]

    def replace(self, **changes: jax.Array) -> Slots:
        return dataclasses.replace(self, **changes)


def abstract_slots(num_slots: int, pages_per_seq: int, mesh: Mesh) -> Slots:
    """Shapes, dtypes and placement (a copy on every device), for compiling ahead."""

    def array(dtype: str, *tail: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (num_slots, *tail), jnp.dtype(dtype), sharding=mesh.of(("slots", *(None for _ in tail)))
        )

    ints, floats = array("int32"), array("float32")
    return Slots(
        last_token=ints,
        position=ints,
        remaining=ints,
        min_remaining=ints,
        sample_index=ints,
        seed=array("uint32", 2),
        choice=ints,
        temperature=floats,
        top_k=ints,
        top_p=floats,
        min_p=floats,
        adapter=ints,
        stop_ids=array("int32", MAX_STOP_IDS),
        page_table=array("int32", pages_per_seq),
    )
