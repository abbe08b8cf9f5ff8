"""Rotary position embedding: frequencies once on the host, rotation on the device.

Halves convention (as in Hugging Face checkpoints): dimension i pairs with i + D/2.

Sources: RoFormer (arXiv:2104.09864); position interpolation, "linear" (arXiv:2306.15595); YaRN
(arXiv:2309.00071, section 3.2, temperature section 3.4); "llama3" is the piecewise scaling Meta
published with Llama 3.1. "dynamic" (NTK) equals the plain frequencies up to the original length,
which is as far as Quire serves it: beyond, the result would depend on the longest request in the
batch, and a cached prefix would be wrong.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from .config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
    """Angle per position of each dimension pair.

    Returns:
      float32 [head_dim / 2], radians per position.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.power(np.float32(rope.theta), exponents)).astype(np.float32)
    match rope.kind:
        case "default" | "dynamic":
            return plain
        case "linear":
            return plain / np.float32(rope.factor)
        case "llama3":
            return _llama3(plain, rope)
        case "yarn":
            return _yarn(plain, rope, head_dim)


def _llama3(plain: NDArray[np.float32], rope: RopeConfig) -> NDArray[np.float32]:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    turns = rope.original_max_positions * plain / (2 * math.pi)  # full turns over the old context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)  # 0: slowed, 1: kept
    return (blend * plain + (1 - blend) * plain / rope.factor).astype(np.float32)


def _yarn(plain: NDArray[np.float32], rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
    """Dimensions turning more than beta_fast times over the old context are kept, those turning
    less than beta_slow times are slowed by `factor`, with a linear ramp between."""

    def dimension(turns: float) -> float:
        """The (fractional) pair index that turns this often over the old context."""
        length = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    slowed = np.clip(ramp, 0.0, 1.0)
    return (plain / rope.factor * slowed + plain * (1 - slowed)).astype(np.float32)


def cos_sin(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotation of each token, shared by all layers of a step.

    Args:
      positions: int32 [T].

    Returns:
      cos, sin: float32 [T, 1, head_dim / 2] (the 1 broadcasts over heads), YaRN's attention factor
      included.
    """
    angles = positions.astype(jnp.float32)[:, None, None] * inverse_frequencies(rope, head_dim)
    scale = rope.attention_factor
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads `x` [T, heads, D] by `cos`, `sin` [T, 1, D / 2]; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
