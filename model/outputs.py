"""What a step gave, on its way to the host: one int32 array a step, so that a step is one transfer.

device:  pack_outputs(...) -> int32 [R, words]
host:    unpack_outputs(packed, ...) -> StepOutputs

On the way there may be more rows, which mean nothing (model/launch_buffers.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from .plan import StepOutputs
from .sampling.logprobs import LOGPROB_WORDS, Logprobs, unpack_logprobs

_FIRST = 2  # columns before the tokens: valid tokens, not-finite flag


def output_words(k: int) -> int:
    """Words of each row without log-probabilities, of steps that emit k tokens."""
    return _FIRST + k


def pack_outputs(
    emitted: jax.Array,
    not_finite: jax.Array,
    tokens: jax.Array,
    logprobs: Logprobs | None = None,
) -> jax.Array:
    """int32 [R, words] from `emitted`, `not_finite` bool and `tokens` int32, each [K, R].

    A row emits at its first so many of K times. Log-probabilities are of K = 1.
    """
    bad = jnp.any(not_finite & emitted, axis=0)
    counts = [jnp.sum(emitted, axis=0, dtype=jnp.int32), bad.astype(jnp.int32)]
    packed = jnp.stack([*counts, *tokens], axis=1)
    return packed if logprobs is None else jnp.concatenate([packed, logprobs.packed()], axis=1)


def unpack_outputs(packed: NDArray[np.int32], num_rows: int, k: int) -> StepOutputs:
    """What `pack_outputs` packed, on the host, for the plan's real rows."""
    rows = packed[:num_rows]
    words = rows[:, _FIRST + k :]
    assert words.shape[1] in (0, LOGPROB_WORDS)
    return StepOutputs(
        tokens=rows[:, _FIRST : _FIRST + k],
        n_valid=rows[:, 0],
        not_finite=rows[:, 1] != 0,
        logprobs=unpack_logprobs(words) if words.shape[1] else None,
    )
