"""The sizes of the two models that ship, and of two that only show that training works.

`demo` is the one to talk to; `demo-draft` guesses its next tokens (speculative decoding) and is
taught by it.
"""

from __future__ import annotations

from ...model.config import ModelConfig, RopeConfig

DEMO, DRAFT = "demo", "demo-draft"
NAMES = (DEMO, DRAFT)
CONTEXT = 2048
MOST_PARAMETERS = {DEMO: 8_000_000, DRAFT: 1_500_000}


def demo_config(vocab_size: int) -> ModelConfig:
    """7.7 million parameters: deep rather than wide, since most tasks take steps."""
    return _config(vocab_size, hidden=256, mlp=672, layers=10, heads=8)


def draft_config(vocab_size: int) -> ModelConfig:
    """1.25 million parameters."""
    return _config(vocab_size, hidden=128, mlp=384, layers=5, heads=4)


def shipped_configs(vocab_size: int) -> dict[str, ModelConfig]:
    return {DEMO: demo_config(vocab_size), DRAFT: draft_config(vocab_size)}


def trial_configs(vocab_size: int) -> dict[str, ModelConfig]:
    """Small enough for a few minutes on two cores."""
    return {
        DEMO: _config(vocab_size, hidden=96, mlp=256, layers=3, heads=4),
        DRAFT: _config(vocab_size, hidden=32, mlp=96, layers=2, heads=2),
    }


def _config(vocab_size: int, *, hidden: int, mlp: int, layers: int, heads: int) -> ModelConfig:
    """Qwen3 in miniature: grouped queries, normed queries and keys, tied embeddings."""
    return ModelConfig(
        family="qwen3",
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=32,
        norm_eps=1e-6,
        # As in Qwen3 itself. With 10,000 only 3 of the 16 pairs turn slowly enough to compare
        # contents a thousand tokens apart, and rows of a table are not found.
        rope=RopeConfig(theta=1e6),
        windows=(None,) * layers,
        max_positions=CONTEXT,
        qk_norm=True,
        tied_embeddings=True,
        dtype="bfloat16",
    )
