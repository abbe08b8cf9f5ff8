"""What api.py hands to every attention backend: the batch's metadata and the static options.

A backend is one function, `Attend`; api.py has already validated its arguments. To add one, write
a module beside this file with such a function and name it in api.py's registry: the tests in
tests/model/kernels/attention take it from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax


class RaggedBatch(NamedTuple):
    """Which queries belong to which row, and where each row's K and V lie. All int32, traced."""

    kv_lens: jax.Array  # [S] cached tokens of each row, this step's included
    page_table: jax.Array  # [S, M] page ids within the layer; 0 fills unused entries
    cu_q_lens: jax.Array  # [S+1] row s owns queries cu_q_lens[s] up to cu_q_lens[s+1]
    num_seqs: jax.Array  # [] rows at and after it are empty, whatever the arrays hold there
    num_decode: jax.Array  # [] rows below it have one query each, at q[0:num_decode]


class Extras(NamedTuple):
    """Optional traced inputs."""

    sinks: jax.Array | None  # [H] float32: one more logit per head, in the denominator only
    k_scale: jax.Array | None  # [KH] float32: a loaded key is multiplied by it
    v_scale: jax.Array | None  # [KH] float32: likewise for values


@dataclass(frozen=True)
class Options:
    """Static options, each distinct value of which is a program of its own; `first_page` need not
    be static."""

    scale: float
    first_page: jax.Array | int  # [1] where it is traced
    window: int | None
    soft_cap: float | None
    decode_only: bool
    return_lse: bool


class Attend(Protocol):
    """A backend. Returns o [T, H, D] in q.dtype and lse [T, H] float32; without
    `options.return_lse` nobody looks at the latter, and None does."""

    def __call__(
        self, q: jax.Array, slab: jax.Array, batch: RaggedBatch, extras: Extras, options: Options
    ) -> tuple[jax.Array, jax.Array | None]: ...
