"""Tiny checkpoints, written by transformers, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}

Edit = Callable[..., Path]


def make_config(case: str, **changes: Any) -> Any:
    name, fields = CASES[case]
    return getattr(transformers, f"{name}Config")(**{**SIZES, **fields, **changes})


def make_model(case: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model whose every parameter is random (biases and scales too) and exact in bfloat16."""
    torch.manual_seed(0)
    name, _ = CASES[case]
    model = getattr(transformers, f"{name}ForCausalLM")(make_config(case, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).to(torch.bfloat16))
    return model.to(dtype)


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Saves a tiny model; gives its folder and its state dict."""

    def write(case: str = "llama", dtype: Any = torch.float32, **kwargs: Any) -> tuple[Path, Any]:
        save = {key: kwargs.pop(key) for key in ("max_shard_size",) if key in kwargs}
        model = make_model(case, dtype, **kwargs)
        folder = tmp_path / case
        model.save_pretrained(folder, **save)
        return folder, model.state_dict()

    return write


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Saves a config.json by transformers, then changes fields (... deletes one)."""

    def write(case: str = "llama", /, **changes: Any) -> Path:
        config = make_config(case)
        config.dtype = "float32"
        config.architectures = [f"{CASES[case][0]}ForCausalLM"]
        config.save_pretrained(tmp_path)
        return edit_json(tmp_path / "config.json", **changes).parent

    return write


def edit_json(file: Path, **changes: Any) -> Path:
    fields = json.loads(file.read_text()) if file.exists() else {}
    fields |= changes
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    return file


@pytest.fixture(name="edit_json")
def edit_json_fixture() -> Edit:
    return edit_json


TEXTS = (
    "Hello world, how are you?",
    "  leading and trailing blanks  ",
    "naïve café — “quotes” … ½ ÷ 你好、世界 😀👩‍👩‍👧 हिन्दी",
    "line\n\nbreaks\tand\r\ntabs",
    "<s>special</s> in <|im_start|>text<|im_end|>",
    "�",
    "",
)


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    return TEXTS


def byte_level(with_bos: bool = False) -> Tokenizer:
    """As Llama 3 and Qwen have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if with_bos:
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        backend.post_processor = processors.Sequence([backend.post_processor, template])
    return backend


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral have it."""
    words = ["▁", "▁Hello", "▁world", "a", "b", "▁a", "o", "w", "é", "你", ",", "?", "�"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{i:02X}>": 3 + i for i in range(256)}
    vocab |= {word: 259 + i for i, word in enumerate(words)}
    merges = [("▁", "a")]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.fixture(scope="session")
def backends() -> dict[str, Tokenizer]:
    return {"byte_level": byte_level(), "bos": byte_level(True), "byte_fallback": byte_fallback()}


@pytest.fixture
def write_tokenizer(tmp_path: Path, backends: dict[str, Tokenizer]) -> Callable[..., Path]:
    """Saves a tokenizer.json and a tokenizer_config.json with the given fields."""

    def write(kind: str = "byte_level", **config: Any) -> Path:
        backends[kind].save(str(tmp_path / "tokenizer.json"))
        fields = {"tokenizer_class": "TokenizersBackend", "eos_token": "</s>", **config}
        edit_json(tmp_path / "tokenizer_config.json", **fields)
        return tmp_path

    return write
