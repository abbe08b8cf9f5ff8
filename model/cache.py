"""What the KV slabs look like: cache groups, one slab a group, pages inside.

A layer says what it keeps per token (`CacheSpec`); layers that keep the same form a `CacheGroup`
and share one slab [layers x pages, page, 2·KH, D], K of head h at 2h and V at 2h + 1, page id plus
layer x pages. One array for all layers keeps the donated state small and the page table common.
Today every model has one group. Groups whose pages have another life (a sliding window's can be
freed, latent attention stores another shape, scales of quantized KV) get their own entry here.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .config import DTYPE_BYTES, ModelConfig
from .kernels.attention.tpu import tiled
from .mesh import Mesh
from .weights import Axes

Slabs = dict[str, jax.Array]
"""Group name to its slab; donated through every step."""

SLAB_AXES: Axes = (None, None, "kv_heads", None)


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What a layer keeps of one token: K and V of `kv_heads` heads, padding included."""

    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        return 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share a slab, and so a page table."""

    name: str
    spec: CacheSpec
    layers: tuple[int, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes over all layers of the group."""
        return self.spec.token_bytes * len(self.layers)

    def slab_shape(self, num_pages: int, page_size: int) -> tuple[int, int, int, int]:
        s = self.spec
        return (len(self.layers) * num_pages, page_size, 2 * s.kv_heads, s.head_dim)


def cache_groups(
    config: ModelConfig, dtype: str, shards: int = 1, platform: str = "cpu"
) -> tuple[CacheGroup, ...]:
    """The groups of a model. Windowed layers keep all their pages for now, so one group does.

    Over more devices than KV heads each device still has one, a copy of its neighbour's. On TPU
    heads are padded to what fills tiles (`fit` and `unfit` go there and back).
    """
    heads, head_dim = max(config.num_kv_heads, shards) // shards, config.head_dim
    if platform == "tpu":
        heads, head_dim = tiled(heads, head_dim)
    spec = CacheSpec(heads * shards, head_dim, dtype)
    return (CacheGroup("kv", spec, tuple(range(config.num_layers))),)


def fit(x: jax.Array, kv_heads: int, slab: jax.Array) -> jax.Array:
    """Queries, keys or values [T, n · KH, D] as the slab's heads are: zeros where it has more.

    Zeros add nothing to a product; heads that share a KV head stay together.
    """
    tokens, heads, dim = x.shape
    stored_heads, stored_dim = slab.shape[2] // 2, slab.shape[3]
    if (kv_heads, dim) == (stored_heads, stored_dim):
        return x
    x = x.reshape(tokens, kv_heads, heads // kv_heads, dim)
    x = jnp.pad(x, ((0, 0), (0, stored_heads - kv_heads), (0, 0), (0, stored_dim - dim)))
    return x.reshape(tokens, -1, stored_dim)


def unfit(x: jax.Array, kv_heads: int, shape: tuple[int, int, int]) -> jax.Array:
    """Takes from `fit` queries' output what belongs to the real heads, of this shape [T, H, D]."""
    if x.shape == shape:
        return x
    tokens, heads, dim = shape
    x = x.reshape(tokens, -1, heads // kv_heads, x.shape[2])
    return x[:, :kv_heads, :, :dim].reshape(shape)


def token_bytes(groups: tuple[CacheGroup, ...]) -> int:
    """KV bytes one token takes in the whole model."""
    return sum(group.token_bytes for group in groups)


def abstract_slabs(
    groups: tuple[CacheGroup, ...], num_pages: int, page_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and placement of the slabs, for compiling ahead."""
    return {
        g.name: jax.ShapeDtypeStruct(
            g.slab_shape(num_pages, page_size), jnp.dtype(g.spec.dtype), sharding=mesh.of(SLAB_AXES)
        )
        for g in groups
    }
