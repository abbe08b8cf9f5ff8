"""The decoder: one transformer for every family Quire serves, in Flax NNX.

Tokens of all requests in a step lie in one flat row [T]; there is no batch dimension. What they
attend to is not the decoder's business: it hands a layer's heads to `attend` and gets the mixed
values back, so serving (paged slab, model/step.py) and training (one dense sequence,
tools/train_demo) share every line here. Families differ only in ModelConfig.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from .config import ModelConfig
from .kernels.parts import whole
from .mesh import TENSOR
from .projection import IN_PARTS, Products, Stream
from .rope import cos_sin, rotate
from .weights import matrix, ones, take_rows, zeros

Rotation = tuple[jax.Array, jax.Array]
"""cos and sin of each token, float32 [T, 1, D / 2] (rope.py)."""

Cached = Any
"""Where a layer keeps keys and values: a pytree of `Attend`'s own."""


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv:1910.07467), computed in float32 over the last dimension."""

    def __init__(self, size: int, eps: float, axis: str | None, dtype: Any):
        self.eps = eps
        self.scale = ones((size,), (axis,), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        power = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(power + self.eps)).astype(x.dtype) * self.scale[...]


class Linear(nnx.Module):
    """A matrix W [out, in] and, if there is one, a bias; `project` multiplies by it.

    With `summed` each device has a share of `in`.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        in_size: int,
        out_size: int,
        axes: tuple[str | None, str | None],
        dtype: Any,
        *,
        bias: bool = False,
        summed: bool = False,
    ):
        self.summed = summed
        self.weight = matrix(rngs, (out_size, in_size), axes, dtype)
        self.bias = zeros((out_size,), axes[:1], dtype) if bias else None


class Unbiased:
    """A matrix whose bias is somebody else's to add."""

    def __init__(self, matrix: Linear):
        self.weight, self.bias, self.summed = matrix.weight, None, matrix.summed


class Attention(nnx.Module):
    """Projections, optional norms of q and k, rotation; the mixing itself is `attend`'s."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs, shared: bool):
        c = config
        self.config = c
        # Rows q, then k, then v: one matrix product instead of three.
        self.qkv = Linear(
            rngs, c.hidden_size, c.q_size + 2 * c.kv_size, ("qkv", "embed"), dtype,
            bias=c.qkv_bias,
        )  # fmt: skip
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps, None, dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps, None, dtype) if c.qk_norm else None
        self.out = Linear(
            rngs, c.q_size, c.hidden_size, ("embed", "heads"), dtype, bias=c.out_bias, summed=shared
        )

    def product(
        self, stream: Stream, norm: RMSNorm, products: Products
    ) -> tuple[jax.Array, jax.Array]:
        """The stream [T, E] with all added up, and of its norm queries, keys and values, side by
        side [T, (H + 2·KH) · D], which lack bias, norms and rotation; may be in parts."""
        with jax.named_scope("qkv"):
            return products.of_normed(stream, norm, Unbiased(self.qkv), maybe_in_parts=True)

    def heads(
        self, product: jax.Array, rotation: Rotation
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What `product` gave -> q [T, H, D], k and v [T, KH, D], q and k rotated."""
        c = self.config
        with jax.named_scope("qkv"):
            qkv = whole(product, self.qkv.weight.dtype)
            if self.qkv.bias is not None:
                qkv = qkv + self.qkv.bias[...]
            q, k, v = jnp.split(qkv, [c.q_size, c.q_size + c.kv_size], axis=-1)
            q = q.reshape(-1, c.num_heads, c.head_dim)
            k = k.reshape(-1, c.num_kv_heads, c.head_dim)
            v = v.reshape(-1, c.num_kv_heads, c.head_dim)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            return rotate(q, *rotation), rotate(k, *rotation), v

    def join(self, x: jax.Array, mixed: jax.Array, products: Products) -> Stream:
        """x [T, E] plus what comes of mixed [T, H, D]."""
        with jax.named_scope("out"):
            return products.onto(x, mixed.reshape(-1, self.config.q_size), self.out)


@dataclass(frozen=True)
class Heads:
    """What a layer attends with, as far as it is computed: some do the rest in a kernel of theirs.

    Attributes:
      product: [T, (H + 2·KH) · D] queries, keys and values, without bias, norms and rotation; may
        be in parts (kernels/parts.py).
      attention: whose they are.
      rotation: of each token.
    """

    product: jax.Array
    attention: Attention
    rotation: Rotation

    @property
    def config(self) -> ModelConfig:
        """The numbers of this device's share."""
        return self.attention.config

    @property
    def dtype(self) -> Any:
        return self.attention.qkv.weight.dtype

    @property
    def bias(self) -> jax.Array | None:
        """[(H + 2·KH) · D]"""
        bias = self.attention.qkv.bias
        return None if bias is None else bias[...]

    @property
    def norms(self) -> tuple[jax.Array, jax.Array] | None:
        """Scales [D] of the norms of queries and of keys."""
        q, k = self.attention.q_norm, self.attention.k_norm
        return None if q is None or k is None else (q.scale[...], k.scale[...])

    def rotated(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [T, H, D], k and v [T, KH, D], all done."""
        return self.attention.heads(self.product, self.rotation)


class Attend(Protocol):
    """Mixes values within each sequence. A pytree, since it goes into the function of a layer."""

    def of_layer(self, layer: int) -> Attend:
        """As one layer needs it. Layers whose static parts are equal share one trace."""
        ...

    def __call__(self, heads: Heads, cached: Cached, /) -> tuple[jax.Array, Cached]:
        """(a layer's heads, what layers before it left) -> ([T, H, D], the same for the next)."""
        ...


class MLP(nnx.Module):
    """Gated MLP (SwiGLU, arXiv:2002.05202): down(silu(gate) · up)."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs, shared: bool):
        c = config
        self.gate_up = Linear(
            rngs, c.hidden_size, 2 * c.intermediate_size, ("gate_up", "embed"), dtype,
            bias=c.mlp_bias,
        )  # fmt: skip
        self.down = Linear(
            rngs, c.intermediate_size, c.hidden_size, ("embed", "mlp"), dtype, bias=c.mlp_bias,
            summed=shared,
        )  # fmt: skip

    def __call__(self, stream: Stream, norm: RMSNorm, products: Products) -> Stream:
        """The stream plus what the MLP makes of it."""
        x, inner = products.of_normed(stream, norm, self.gate_up, gated=True)
        return products.onto(x, inner, self.down)


class Layer(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs, shared: bool):
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps, "embed", dtype)
        self.attn = Attention(config, dtype, rngs, shared)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, "embed", dtype)
        self.mlp = MLP(config, dtype, rngs, shared)

    def __call__(
        self,
        stream: Stream,
        cached: Cached,
        rotation: Rotation,
        attend: Attend,
        products: Products,
    ) -> tuple[Stream, Cached]:
        x, product = self.attn.product(stream, self.attn_norm, products)
        with jax.named_scope("attend"):
            mixed, cached = attend(Heads(product, self.attn, rotation), cached)
        stream = self.attn.join(x, mixed, products)
        with jax.named_scope("mlp"):
            return self.mlp(stream, self.mlp_norm, products), cached


@partial(jax.jit, static_argnames="products")
def run_layer(
    layer: Layer,
    stream: Stream,
    cached: Cached,
    rotation: Rotation,
    attend: Attend,
    products: Products,
) -> tuple[Stream, Cached]:
    """A layer under a `jit` of its own: traced once for all that are alike, in all programs of as
    many tokens and rows, and lowered once a program, which calls it. XLA inlines the calls.

    Its traces live until `run_layer.clear_cache()`.
    """
    return layer(stream, cached, rotation, attend, products)


class Embedding(nnx.Module):
    """Token table [V, E]; also the output projection of models that tie the two."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs, shared: bool):
        self.shared = shared
        self.bias, self.summed = None, False
        self.weight = matrix(
            rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"), dtype
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        if not self.shared:
            return take_rows(self.weight, tokens)
        # Each device has a stretch of the vocabulary; all but one add zeros.
        rows = self.weight.shape[0]
        local = tokens - jax.lax.axis_index(TENSOR) * rows
        mine = (local >= 0) & (local < rows)
        found = take_rows(self.weight, jnp.where(mine, local, 0))
        return jax.lax.psum(jnp.where(mine[:, None], found, 0), TENSOR)


class Decoder(nnx.Module):
    """Embedding, layers, final norm, output projection.

    Args:
      config: the model's numbers.
      dtype: of weights and activations.
      rngs: streams for initial values (training and tests; serving loads over them).
      whole: of a model that is cut over the devices of the mesh axis TENSOR, the whole's numbers;
        `config` then has those of one device's share, and calls run inside a `shard_map`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
        whole: ModelConfig | None = None,
    ):
        self.config = config
        self.vocab_size = (whole or config).vocab_size
        self.shared = shared = whole is not None
        self.embed = Embedding(config, dtype, rngs, shared)
        # Unrolled, not scanned: a scan over layers copies the sliced weights every step.
        self.layers = nnx.List(
            [Layer(config, dtype, rngs, shared) for _ in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, "embed", dtype)
        self.lm_head = (
            None
            if config.tied_embeddings
            else Linear(rngs, config.hidden_size, config.vocab_size, ("vocab", "embed"), dtype)
        )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cached: Cached = None,
        products: Products = IN_PARTS,
    ) -> tuple[Stream, Cached]:
        """Runs all layers.

        Args:
          tokens: int32 [T].
          positions: int32 [T], each token's place in its own sequence.
          attend: mixes values within each sequence.
          cached: what it finds in the first layer.
          products: multiplies by matrices.

        Returns:
          The hidden states [T, E] before the final norm (so that it runs on emitted rows only), and
          what the last layer left cached.
        """
        with jax.named_scope("embed"):
            stream = Stream(self.embed(tokens))
        rotation = cos_sin(self.config.rope, self.config.head_dim, positions)
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer{i}"):
                here = attend.of_layer(i)
                stream, cached = run_layer(layer, stream, cached, rotation, here, products)
        return stream, cached

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """hidden [R, E] -> float32 [R, E], each row after the final norm and of length 1."""
        with jax.named_scope("pooled"):
            normed = self.final_norm(hidden).astype(jnp.float32)
            length = jnp.linalg.norm(normed, axis=-1, keepdims=True)
            return normed / jnp.maximum(length, 1e-12)  # as torch.nn.functional.normalize

    def logits(self, hidden: Stream, products: Products = IN_PARTS) -> jax.Array:
        """hidden [R, E] -> float32 logits [R, V] of the whole vocabulary."""
        with jax.named_scope("logits"):
            head = self.embed if self.lm_head is None else self.lm_head
            _, logits = products.of_normed(hidden, self.final_norm, head, out_dtype=jnp.float32)
            if self.shared:  # the last share may be padded
                logits = jax.lax.all_gather(logits, TENSOR, axis=1, tiled=True)
            return logits[:, : self.vocab_size]
