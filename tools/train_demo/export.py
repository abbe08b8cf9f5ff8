"""Writes a trained model as a Hugging Face folder, which Quire, transformers and others open.

Called by `__main__.py`; the model card is card.py's. Weights are rounded to the config's dtype
here; what is measured later is what lies in the folder, not what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ...checkpoints.params import numpy_dtype, save_params
from ...model.config import ModelConfig
from ...model.weights import Params
from .chat import CHAT_TEMPLATE
from .tokenizer import END_OF_TEXT, TURN_END


def rounded(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """The weights as they will lie on disk."""
    dtype = numpy_dtype(config.dtype)
    return {name: np.asarray(array).astype(dtype) for name, array in params.items()}


def export(folder: Path, config: ModelConfig, tokenizer: Tokenizer, params: Params) -> None:
    """Writes every file of the folder but the card, over what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = tokenizer.get_vocab()
    end, padding = ids[TURN_END], ids[END_OF_TEXT]
    _write(folder / "config.json", _config(config, end, padding))
    _write(folder / "generation_config.json", _generation_config(end, padding))
    _write(folder / "tokenizer_config.json", _tokenizer_config(config, tokenizer))
    (folder / "tokenizer.json").write_text(_compact(tokenizer), "utf-8")
    save_params(folder, config, rounded(config, params))
    for file in folder.glob("*.safetensors"):  # which are written for their owner alone
        file.chmod(0o644)


def _config(config: ModelConfig, end: int, padding: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": config.dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        # transformers 4 and most other readers know this spelling; transformers 5 converts it.
        "rope_theta": config.rope.theta,
        "rope_scaling": None,
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": padding,
    }


def _generation_config(end: int, padding: int) -> dict[str, Any]:
    return {"do_sample": False, "eos_token_id": [end, padding], "pad_token_id": padding}


def _tokenizer_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    added = {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
    }


def _compact(tokenizer: Tokenizer) -> str:
    """tokenizer.json on few lines: indented, each merge alone would take four."""
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False) + "\n"


def _write(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
