"""The decoder: one transformer for every family Quire serves, in Flax NNX.

Tokens of all requests in a step lie in one flat row [T]; there is no batch dimension. What they
attend to is not the decoder's business: it hands q, k, v of a layer to `attend` and gets the mixed
values back, so serving (paged slab, model/step.py) and training (one dense sequence,
tools/train_demo) share every line here. Families differ only in ModelConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .config import ModelConfig
from .mesh import TENSOR
from .projection import Project, in_parts
from .rope import cos_sin, rotate
from .weights import matrix, ones, take_rows, zeros

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""(layer, q [T, H, D], k [T, KH, D], v [T, KH, D]) -> [T, H, D]; q and k are rotated already."""


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

    def heads(
        self,
        x: jax.Array,
        norm: RMSNorm,
        rotation: tuple[jax.Array, jax.Array],
        project: Project,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [T, E] -> q [T, H, D], k and v [T, KH, D], q and k rotated."""
        c = self.config
        with jax.named_scope("qkv"):
            qkv = project(x, self.qkv, norm=norm)
            q, k, v = jnp.split(qkv, [c.q_size, c.q_size + c.kv_size], axis=-1)
            q = q.reshape(-1, c.num_heads, c.head_dim)
            k = k.reshape(-1, c.num_kv_heads, c.head_dim)
            v = v.reshape(-1, c.num_kv_heads, c.head_dim)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            return rotate(q, *rotation), rotate(k, *rotation), v

    def join(self, x: jax.Array, mixed: jax.Array, project: Project) -> jax.Array:
        """x [T, E] plus what comes of mixed [T, H, D]."""
        with jax.named_scope("out"):
            return project(mixed.reshape(-1, self.config.q_size), self.out, residual=x)


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

    def __call__(self, x: jax.Array, norm: RMSNorm, project: Project) -> jax.Array:
        """x [T, E] plus what the MLP makes of it."""
        inner = project(x, self.gate_up, norm=norm, gated=True)
        return project(inner, self.down, residual=x)


class Layer(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs, shared: bool):
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps, "embed", dtype)
        self.attn = Attention(config, dtype, rngs, shared)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, "embed", dtype)
        self.mlp = MLP(config, dtype, rngs, shared)

    def __call__(
        self,
        x: jax.Array,
        layer: int,
        rotation: tuple[jax.Array, jax.Array],
        attend: Attend,
        project: Project,
    ) -> jax.Array:
        q, k, v = _before_attending(self, x, rotation, project)
        with jax.named_scope("attend"):
            mixed = attend(layer, q, k, v)
        return _after_attending(self, x, mixed, project)


# Under a `jit` of their own these are traced and lowered once a program and not once a layer, which
# would take most of the time that lowering takes. XLA inlines the calls.
@partial(jax.jit, static_argnames="project")
def _before_attending(
    layer: Layer, x: jax.Array, rotation: tuple[jax.Array, jax.Array], project: Project
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return layer.attn.heads(x, layer.attn_norm, rotation, project)


@partial(jax.jit, static_argnames="project")
def _after_attending(layer: Layer, x: jax.Array, mixed: jax.Array, project: Project) -> jax.Array:
    x = layer.attn.join(x, mixed, project)
    with jax.named_scope("mlp"):
        return layer.mlp(x, layer.mlp_norm, project)


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
        project: Project = in_parts,
    ) -> jax.Array:
        """Runs all layers.

        Args:
          tokens: int32 [T].
          positions: int32 [T], each token's place in its own sequence.
          attend: mixes values within each sequence.
          project: multiplies by matrices.

        Returns:
          [T, E] hidden states before the final norm (so that it runs on emitted rows only).
        """
        with jax.named_scope("embed"):
            x = self.embed(tokens)
        rotation = cos_sin(self.config.rope, self.config.head_dim, positions)
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer{i}"):
                x = layer(x, i, rotation, attend, project)
        return x

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """hidden [R, E] -> float32 [R, E], each row after the final norm and of length 1."""
        with jax.named_scope("pooled"):
            normed = self.final_norm(hidden).astype(jnp.float32)
            length = jnp.linalg.norm(normed, axis=-1, keepdims=True)
            return normed / jnp.maximum(length, 1e-12)  # as torch.nn.functional.normalize

    def logits(self, hidden: jax.Array, project: Project = in_parts) -> jax.Array:
        """hidden [R, E] -> float32 logits [R, V] of the whole vocabulary."""
        with jax.named_scope("logits"):
            head = self.embed if self.lm_head is None else self.lm_head
            logits = project(hidden, head, norm=self.final_norm, out_dtype=jnp.float32)
            if self.shared:  # the last share may be padded
                logits = jax.lax.all_gather(logits, TENSOR, axis=1, tiled=True)
            return logits[:, : self.vocab_size]
