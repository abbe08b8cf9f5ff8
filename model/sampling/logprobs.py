"""Log-probabilities of the raw distribution: of one token a row, and of the likeliest ones.

Called by choose.py for emitted tokens and by model/score.py for tokens of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ..plan import MAX_LOGPROBS, LogprobArrays

LOGPROB_WORDS = 2 + 2 * MAX_LOGPROBS
"""int32 words of one row's log-probabilities, packed."""

_TOP_K_KERNEL = 16
"""Up to so many `lax.top_k` finds with a kernel on GPU; for more it sorts the whole vocabulary."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Of one token in each of R rows; rank 1 is the likeliest, ties share one.

    In a vocabulary smaller than MAX_LOGPROBS, ids beyond it are -1.
    """

    chosen: jax.Array  # float32 [R]
    rank: jax.Array  # int32 [R]
    top_ids: jax.Array  # int32 [R, MAX_LOGPROBS] likeliest first, ties by id
    top: jax.Array  # float32 [R, MAX_LOGPROBS]

    def packed(self) -> jax.Array:
        """int32 [R, LOGPROB_WORDS], floats as their bits."""
        words = [_bits(self.chosen)[:, None], self.rank[:, None], self.top_ids, _bits(self.top)]
        return jnp.concatenate(words, axis=1)


def logprobs_of(logits: jax.Array, tokens: jax.Array) -> tuple[Logprobs, jax.Array]:
    """Log-probabilities under logits float32 [R, V] of `tokens` int32 [R], and the logits, of which
    some are overwritten: in place where they are nobody else's."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    norm = jnp.log(jnp.sum(jnp.exp(logits - peak), axis=-1, keepdims=True))
    mine = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > mine, axis=-1, dtype=jnp.int32)
    # In this order, or what is overwritten would have to be a copy.
    logits, peak, norm, mine, rank = jax.lax.optimization_barrier((logits, peak, norm, mine, rank))
    top, ids, spent = top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    missing = ((0, 0), (0, MAX_LOGPROBS - top.shape[1]))
    logprobs = Logprobs(
        chosen=(mine - peak - norm)[:, 0],
        rank=rank,
        top_ids=jnp.pad(ids, missing, constant_values=-1),
        top=jnp.pad(top - peak - norm, missing, constant_values=-jnp.inf),
    )
    return logprobs, spent


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`lax.top_k` of finite x [R, V], in parts small enough for its kernel: values, int32 ids, and
    x without those of all parts but the last."""
    first, ids = jax.lax.top_k(x, min(k, _TOP_K_KERNEL))
    if k <= _TOP_K_KERNEL:
        return first, ids.astype(jnp.int32), x
    rest = x.at[jnp.arange(x.shape[0])[:, None], ids].set(-jnp.inf, unique_indices=True)
    second, more, rest = top_k(rest, k - _TOP_K_KERNEL)
    ids = jnp.concatenate([ids.astype(jnp.int32), more], 1)
    return jnp.concatenate([first, second], 1), ids, rest


def unpack_logprobs(words: NDArray[np.int32]) -> LogprobArrays:
    """What `Logprobs.packed` packed, on the host: [R, LOGPROB_WORDS], one token a row."""
    ids, top = words[:, 2 : 2 + MAX_LOGPROBS], words[:, 2 + MAX_LOGPROBS :]
    return LogprobArrays(
        chosen=words[:, :1].copy().view(np.float32),
        rank=words[:, 1:2],
        top_ids=ids[:, None],
        top=top.copy().view(np.float32)[:, None],
    )


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)
