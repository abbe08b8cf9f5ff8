"""Random checkpoints saved by transformers itself, one for every family and feature, and what
transformers answers with them.

Weights, biases and norm scales are all random (transformers starts biases at 0 and scales at 1,
which would hide a missing one), and large enough that answers vary. Seeds were picked so that every
reference answer has at least MIN_DISTINCT different tokens and no near tie; a test sees to it.

What was made is kept under .cache/zoo, so that it is made once, and so that an interpreter without
torch (there is not a build for each) can be tested against what another one's transformers said.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.model.config import ModelConfig, RopeConfig
from quire.model.weights import Params

VOCAB = 512
NEW_TOKENS = 64
PROMPT_LENGTHS = (1, 2, 15, 33, 64, 100, 190, 300)
MIN_DISTINCT = 16
MIN_GAP = 1e-3

WINDOW = 24  # below most prompts
ORIGINAL_LENGTH = 48  # likewise

Off = Callable[[ModelConfig, Params], tuple[ModelConfig, Params]]


@dataclass(frozen=True)
class Case:
    """A checkpoint: a transformers config class, its fields, and its features switched off."""

    name: str
    kind: str  # "Llama", "Qwen2", ...
    seed: int
    fields: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Off] = field(default_factory=dict)


def without(**changes: Any) -> Off:
    """Replaces fields of the config."""
    return lambda config, params: (dataclasses.replace(config, **changes), params)


def zeroed(*endings: str) -> Off:
    """Sets the parameters whose names end so to zero (a scale of zero is no feature of ours, but
    shows that the scale is used)."""

    def off(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
        return config, {k: v * 0 if k.endswith(endings) else v for k, v in params.items()}

    return off


def plain_rope(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    rope = RopeConfig(kind="default", theta=config.rope.theta)
    return dataclasses.replace(config, rope=rope), params


def usual_theta(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, theta=10000.0)), params


def no_windows(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    return dataclasses.replace(config, windows=(None,) * config.num_layers), params


def mixed_up_heads(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Exchanges the first two KV heads: only a right grouping of query heads tells them apart."""
    q, d = config.q_size, config.head_dim
    swapped = {}
    for name, value in params.items():
        if name.endswith("qkv.weight"):
            order = list(range(value.shape[0]))
            for start in (q, q + config.kv_size):
                order[start : start + 2 * d] = (
                    order[start + d : start + 2 * d] + order[start : start + d]
                )
            value = value[np.array(order)]
        swapped[name] = value
    return config, swapped


ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}
ROPE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}

CASES = [
    Case("llama2-mha", "Llama", 4, {"num_key_value_heads": 4}, {"eps": without(norm_eps=0.5)}),
    Case("llama3-gqa", "Llama", 2, {"rope_theta": 500.0},
         {"theta": usual_theta, "groups": mixed_up_heads}),
    Case("llama-mqa-tied", "Llama", 3, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    Case("llama31-rope-llama3", "Llama", 2, {"rope_parameters": ROPE_LLAMA3}, {"rope": plain_rope}),
    Case("llama-rope-linear", "Llama", 3,
         {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
         {"rope": plain_rope}),
    Case("llama-rope-yarn", "Llama", 1, {"rope_parameters": ROPE_YARN}, {"rope": plain_rope}),
    Case("llama-rope-dynamic", "Llama", 3,
         {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
    Case("llama-biases-head-dim", "Llama", 15,
         {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "rms_norm_eps": 0.1},
         {"qkv bias": zeroed("qkv.bias"), "output bias": zeroed("out.bias"),
          "mlp bias": zeroed("gate_up.bias"), "down bias": zeroed("down.bias"),
          "eps": without(norm_eps=1e-6)}),
    Case("mistral-window", "Mistral", 0, {"sliding_window": WINDOW}, {"window": no_windows}),
    Case("mistral-full", "Mistral", 0, {"sliding_window": None, "head_dim": 32}),
    Case("qwen2", "Qwen2", 0, {}, {"qkv bias": zeroed("qkv.bias")}),
    Case("qwen25-tied-some-windows", "Qwen2", 3,
         {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
          "tie_word_embeddings": True},
         {"window": no_windows, "layer order": without(windows=(WINDOW, None, None))}),
    Case("qwen3", "Qwen3", 0, {"head_dim": 32},
         {"QK norm": without(qk_norm=False), "q scale": zeroed("q_norm.scale")}),
    Case("qwen3-bias-yarn", "Qwen3", 6,
         {"attention_bias": True, "rope_parameters": {**ROPE_YARN, "attention_factor": 1.3,
                                                      "beta_fast": 16.0, "beta_slow": 2.0}},
         {"qkv bias": zeroed("qkv.bias"), "output bias": zeroed("out.bias"), "rope": plain_rope}),
]  # fmt: skip

BY_NAME = {case.name: case for case in CASES}

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def make_model(case: Case) -> Any:
    """The transformers model of a case, float32, every parameter random."""
    torch, transformers = _oracle()
    config = getattr(transformers, case.kind + "Config")(**{**_COMMON, **case.fields})
    torch.manual_seed(case.seed)
    model = getattr(transformers, case.kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.3 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.copy_(0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * 1.5 / p.shape[-1] ** 0.5)
    return model


@cache
def _oracle() -> tuple[Any, Any]:
    return pytest.importorskip("torch"), pytest.importorskip("transformers")


def prompts() -> list[list[int]]:
    """Eight prompts of 1 to 300 random tokens."""
    draw = np.random.default_rng(7)
    return [draw.integers(0, VOCAB, n).tolist() for n in PROMPT_LENGTHS]


@dataclass(frozen=True)
class Reference:
    """Transformers' greedy answer to one prompt, prompt by prompt."""

    prompt: list[int]
    tokens: list[int]
    gap: float  # smallest distance between the two largest logits, over the answer
    logprobs: list[float]  # of each token

    @property
    def distinct(self) -> int:
        return len(set(self.tokens))

    @property
    def bites(self) -> bool:
        return self.distinct >= MIN_DISTINCT and self.gap > MIN_GAP


def answer(model: Any, prompt: list[int], new_tokens: int = NEW_TOKENS) -> Reference:
    """What transformers generates, and how clear-cut each choice was."""
    torch, _ = _oracle()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0, len(prompt) :].tolist()
    logits = torch.cat(out.logits)
    top = logits.topk(2).values
    logprobs = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
    return Reference(prompt, tokens, float((top[:, 0] - top[:, 1]).min()), logprobs.tolist())


_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "zoo"
_VERSION = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=6).hexdigest()


def get(case: Case) -> tuple[Path, list[Reference]]:
    """The case's checkpoint folder and transformers' answers; made at the first call."""
    folder = _CACHE / f"{case.name}-{_VERSION}"
    if not folder.exists():
        _make(case, folder)
    kept = json.loads((folder / "references.json").read_text())
    return folder, [Reference(**entry) for entry in kept]


def _make(case: Case, folder: Path) -> None:
    model = make_model(case)
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        draft = Path(scratch) / "draft"
        model.save_pretrained(draft)
        references = [asdict(answer(model, prompt)) for prompt in prompts()]
        (draft / "references.json").write_text(json.dumps(references))
        try:
            os.rename(draft, folder)
        except OSError:  # another test process was faster
            assert folder.exists()
