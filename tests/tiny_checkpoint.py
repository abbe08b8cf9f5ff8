"""A tiny random Llama with a tokenizer, written without torch: what tests of the faces serve.

It nearly always emits printable ASCII, so that a test can pick stop strings out of its answers, and
now and then the end-of-sequence token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 300
CONTEXT = 4096
EOS = 0
EOS_TEXT = "<eos>"
TEXT = "hello world, the quick brown fox jumps over the lazy dog and says: what is a page? "

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": EOS,
}


def make_tokenizer() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 5, trainer)
    return backend


def write(
    folder: Path, *, tokenizer: bool = True, generation: dict[str, Any] | None = None
) -> Path:
    """Writes the checkpoint; the same numbers every time."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = make_tokenizer()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        backend.save(str(folder / "tokenizer.json"))
        fields = {"eos_token": EOS_TEXT, "chat_template": CHAT_TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    save_file(_weights(backend), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights(backend: Tokenizer) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    hidden, middle, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (draw.standard_normal((rows, columns)) * 1.5 / columns**0.5).astype(np.float32)

    head = 3 * matrix(VOCAB, hidden)
    for token in range(VOCAB):
        text = backend.decode([token], skip_special_tokens=False)
        if not (text.isascii() and text.isprintable()):
            head[token] *= 0.01
    weights = {
        "model.embed_tokens.weight": matrix(VOCAB, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": head,
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        weights |= {
            at + "self_attn.q_proj.weight": matrix(hidden, hidden),
            at + "self_attn.k_proj.weight": matrix(kv, hidden),
            at + "self_attn.v_proj.weight": matrix(kv, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, hidden),
            at + "mlp.gate_proj.weight": matrix(middle, hidden),
            at + "mlp.up_proj.weight": matrix(middle, hidden),
            at + "mlp.down_proj.weight": matrix(hidden, middle),
            at + "input_layernorm.weight": np.ones(hidden, np.float32),
            at + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
        }
    return weights
