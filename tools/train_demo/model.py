"""The demo model's size, and the decoder over a batch of dense rows.

Training and evaluation run the very decoder that serves, flat as it wants its tokens; only `attend`
is theirs. `train.py` and `evaluate.py` call `batch_logits`.
"""

from __future__ import annotations

import jax

from ...model.config import ModelConfig, RopeConfig
from ...model.decoder import Attend, Decoder
from .data import Batch

CONTEXT = 512


def demo_config(vocab_size: int) -> ModelConfig:
    """Qwen3 in miniature: grouped queries, normed queries and keys, tied embeddings."""
    layers = 4
    return ModelConfig(
        family="qwen3",
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        norm_eps=1e-6,
        rope=RopeConfig(theta=10000.0),
        windows=(None,) * layers,
        max_positions=CONTEXT,
        qk_norm=True,
        tied_embeddings=True,
        dtype="bfloat16",
    )


def batch_logits(decoder: Decoder, batch: Batch) -> jax.Array:
    """float32 logits [R * L, V] of every token of the batch."""
    hidden = decoder(
        batch.tokens.reshape(-1), batch.positions.reshape(-1), dense_attend(batch.segments)
    )
    return decoder.logits(hidden)


def dense_attend(segments: jax.Array) -> Attend:
    """Causal attention within each conversation of each row.

    Args:
      segments: int32 [R, L], which conversation of its row a token belongs to.
    """
    rows, length = segments.shape
    same = segments[:, None, :, None] == segments[:, None, None, :]  # [R, 1, L, L]

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.reshape(rows, length, *x.shape[1:]) for x in (q, k, v))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True)
        return mixed.reshape(rows * length, *mixed.shape[2:])

    return attend
