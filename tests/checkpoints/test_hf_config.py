"""config.json -> ModelConfig: against transformers' own config classes, and every refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.checkpoints.hf_config import read_config
from quire.errors import CheckpointError, InvalidConfig
from quire.model.config import ModelConfig, RopeConfig

CASES = ["llama", "llama-bias", "mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-bias"]


def expected(folder: Path) -> ModelConfig:
    """What transformers makes of the same folder, read off its config and an empty model."""
    hf = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    window = getattr(hf, "sliding_window", None)
    return ModelConfig(
        family=hf.model_type,
        vocab_size=model.lm_head.out_features,
        hidden_size=model.lm_head.in_features,
        intermediate_size=mlp.gate_proj.out_features,
        num_layers=len(model.model.layers),
        num_heads=attention.q_proj.out_features // attention.head_dim,
        num_kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_dim=attention.head_dim,
        norm_eps=layer.input_layernorm.variance_epsilon,
        rope=RopeConfig(theta=hf.rope_parameters["rope_theta"]),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        max_positions=hf.max_position_embeddings,
        qkv_bias=attention.q_proj.bias is not None,
        out_bias=attention.o_proj.bias is not None,
        mlp_bias=mlp.gate_proj.bias is not None,
        qk_norm=hasattr(attention, "q_norm"),
        tied_embeddings=hf.tie_word_embeddings,
        dtype=str(hf.dtype or torch.float32).removeprefix("torch."),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("case", CASES)
def test_families_match_transformers(case: str, write_config: Any) -> None:
    folder = write_config(case, dtype="bfloat16", rms_norm_eps=3e-5)
    config = read_config(folder)
    assert config == expected(folder)
    assert config.dtype == "bfloat16" and config.norm_eps == 3e-5


@pytest.mark.parametrize("case", CASES)
def test_old_spelling_means_the_same(case: str, write_config: Any) -> None:
    new = read_config(
        write_config(
            case, dtype="float16", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
        )
    )
    old = read_config(
        write_config(
            case,
            dtype=...,
            torch_dtype="float16",
            rope_parameters=...,
            rope_theta=5e5,
            rope_scaling=None,
        )
    )
    assert old == new and old.rope.theta == 5e5 and old.dtype == "float16"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_fields_get_the_defaults_of_transformers(family: str, tmp_path: Path) -> None:
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    fields = {"architectures": [f"{names[family]}ForCausalLM"], "model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path)
    assert config == expected(tmp_path)
    assert config.dtype == "float32" and config.rope.theta == 10000.0


@pytest.mark.parametrize("case", ["mistral", "qwen2", "qwen3"])
def test_null_kv_heads_are_as_many_as_heads(case: str, write_config: Any) -> None:
    # As transformers 4 had it; transformers 5 refuses the null for Mistral.
    assert read_config(write_config(case, num_key_value_heads=None)).num_kv_heads == 4


def test_null_kv_heads_and_head_dim(write_config: Any) -> None:
    folder = write_config("llama", num_key_value_heads=None, head_dim=None)
    config = read_config(folder)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert config == expected(folder)


@pytest.mark.parametrize(
    ("case", "changes", "windows"),
    [
        ("llama", {}, (None, None, None)),
        ("mistral", {}, (64, 64, 64)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("mistral", {"sliding_window": ...}, (4096, 4096, 4096)),
        ("qwen2", {"layer_types": ..., "sliding_window": 16}, (None, None, None)),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "layer_types": ...,
                "sliding_window": 16,
                "max_window_layers": 2,
            },
            (None, None, 16),
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (16, None, 16),
        ),
    ],
)  # fmt: skip
def test_windows(case: str, changes: Any, windows: Any, write_config: Any) -> None:
    folder = write_config(case, **changes)
    config = read_config(folder)
    assert config.windows == windows
    assert config == expected(folder)


def test_model_type_alone_names_the_family(write_config: Any) -> None:
    assert read_config(write_config("qwen3", architectures=None)).family == "qwen3"
    assert read_config(write_config("qwen3", model_type=...)).family == "qwen3"


def test_dtype_absent_asks_the_weights(write_config: Any) -> None:
    folder = write_config(dtype=None)
    assert read_config(folder).dtype == "float32"
    assert read_config(folder, weights_dtype=lambda: "float16").dtype == "float16"


def test_fields_without_effect_pass(write_config: Any) -> None:
    folder = write_config()
    plain = read_config(folder)
    fields = {
        "temperature": 0.7,
        "attention_dropout": 0.1,
        "id2label": {"0": "LABEL_0"},
        "_name_or_path": "/somewhere",
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "partial_rotary_factor": 1.0,
        "made_up_thing": None,
        "pruned_heads": {},
    }
    assert read_config(write_config(**fields)) == plain


@pytest.mark.parametrize("value", [False, 0, True, "on", [1]], ids=repr)
def test_unknown_field_with_any_value_is_refused(write_config: Any, value: Any) -> None:
    """Also false and 0: they switch off what is on by default."""
    with pytest.raises(CheckpointError, match=r"made_up_switch: .*--ignore-config-fields made_up"):
        read_config(write_config(made_up_switch=value))


def test_unknown_field_is_refused_unless_ignored(write_config: Any) -> None:
    folder = write_config(logit_scale=0.5)
    with pytest.raises(
        CheckpointError, match=r"config\.json: logit_scale: .*0\.5.*--ignore-config"
    ):
        read_config(folder)
    assert read_config(folder, ignore_fields=("logit_scale",)) == read_config(write_config())


@pytest.mark.parametrize("name", ["logit_scal", "hidden_size", "use_cache", "rope_parameters.knob"])
def test_a_name_that_lets_nothing_pass_is_refused(write_config: Any, name: str) -> None:
    """Misspelled, read by Quire, or without effect: ignoring it would change nothing."""
    says = rf"ignore_config_fields: got '{name}', must be among .*config\.json .* know: "
    scaling = {"rope_type": "linear", "factor": 2.0, "curve": 1}
    folder = write_config(logit_scale=0.5, use_cache=True, rope_parameters=scaling)
    with pytest.raises(InvalidConfig, match=says + r"logit_scale, rope_parameters\.curve$"):
        read_config(folder, ignore_fields=("logit_scale", name))
    with pytest.raises(InvalidConfig, match=says + "it has none$"):
        read_config(write_config(), ignore_fields=(name,))


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"architectures": ["GemmaForCausalLM"]}, "architectures: .*GemmaFor.*LlamaForCausal"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClass"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures"),
    ("llama", {"architectures": None, "model_type": "gemma"}, 'model_type: got "gemma".*Qwen3'),
    ("llama", {"architectures": None, "model_type": None}, "architectures"),
    ("llama", {"model_type": "mistral"}, 'model_type: got "mistral", .*LlamaForCausalLM'),
    ("llama", {"hidden_size": "x"}, 'hidden_size: got "x", must be a whole number'),
    ("llama", {"hidden_size": 32.0}, "hidden_size: got 32.0"),
    ("llama", {"hidden_size": True}, "hidden_size: got true"),
    ("llama", {"vocab_size": 0}, "vocab_size: got 0, must be a whole number from 1"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000"),
    ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads: .*divisor of .* \(4\)"),
    ("llama", {"hidden_size": 34, "head_dim": None}, "hidden_size: got 34, must be a multiple"),
    ("llama", {"head_dim": 15}, "head_dim: got 15, must be even"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps: got 0, must be a number above 0"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ("llama", {"mlp_bias": 1}, "mlp_bias: got 1, must be true or false"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act: got "gelu", must be silu'),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: .*gptq"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp: got 2, must be 1"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, must be 1"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ("llama", {"dtype": "float64"}, 'dtype: got "float64", must be one of bfloat16'),
    ("llama", {"dtype": None, "torch_dtype": "int8"}, 'torch_dtype: got "int8"'),
    ("llama", {"sliding_window": 8}, "sliding_window: Quire does not know"),
    ("mistral", {"sliding_window": 0}, "sliding_window: got 0"),
    ("mistral", {"attention_bias": True}, "attention_bias: Quire does not know"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias: Quire does not know"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: .*3 entries"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types: .*chunked"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types: .*use_sliding_window"),
    ("qwen2", {"max_window_layers": -1}, "max_window_layers"),
]


@pytest.mark.parametrize(("case", "changes", "message"), REFUSALS)
def test_refusals(case: str, changes: Any, message: str, write_config: Any) -> None:
    folder = write_config(case, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100000])
def test_damaged_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)


# Rope.


def scaled(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e5, **fields}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("parameters", "rope", "longest"),
    [
        (scaled("linear", factor=4), RopeConfig("linear", 1e5, 4.0), 128),
        (scaled("dynamic", factor=2.0), RopeConfig("dynamic", 1e5, 2.0, 128), 128),
        (scaled("llama3", **LLAMA3), RopeConfig("llama3", 1e5, 8.0, 64, 1.0, 4.0), 128),
        (
            scaled("llama3", **{**LLAMA3, "original_max_position_embeddings": None}),
            RopeConfig("llama3", 1e5, 8.0, 128, 1.0, 4.0),
            128,
        ),
    ],
)
def test_rope_kinds_in_both_spellings(
    parameters: Any, rope: RopeConfig, longest: int, write_config: Any
) -> None:
    new = read_config(write_config(rope_parameters=parameters))
    assert (new.rope, new.max_positions) == (rope, longest)
    old = {
        key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type")
    }
    for name in ("type", "rope_type"):
        folder = write_config(
            rope_parameters=...,
            rope_theta=1e5,
            rope_scaling={name: parameters["rope_type"], **old},
        )
        assert read_config(folder) == new


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({"factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"factor": 2.0, "original_max_position_embeddings": 64}, 128),
        ({"factor": 4.0}, 128),
        ({"factor": None, "original_max_position_embeddings": 32}, 128),
        ({"factor": 4.0, "attention_factor": 0.75}, 128),
        ({"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.1}, 128),
        ({"factor": 8.0, "mscale": 0.7}, 128),
        ({"factor": 8.0, "beta_fast": 16, "beta_slow": 2, "truncate": False}, 128),
        ({"factor": 1.0}, 128),
        ({"factor": 4.0, "finetuned": True}, 128),
    ],
)
def test_yarn_matches_transformers(changes: Any, longest: int, write_config: Any) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = write_config(rope_parameters=scaled("yarn", **changes))
    config = read_config(folder)
    hf = transformers.AutoConfig.from_pretrained(folder)
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](hf)
    assert config.rope.attention_factor == attention_factor
    original = hf.rope_parameters["original_max_position_embeddings"]
    assert config.rope.original_max_positions == original
    assert config.rope.factor == hf.rope_parameters["factor"] or changes["factor"] is None
    assert config.rope.factor == 4.0 or changes["factor"] is not None
    assert config.rope.beta_fast == changes.get("beta_fast", 32)
    assert config.rope.beta_slow == changes.get("beta_slow", 1)
    assert config.rope.truncate is changes.get("truncate", True)
    assert config.max_positions == longest


def test_original_length_beside_the_rope_wins(write_config: Any) -> None:
    folder = write_config(
        rope_parameters=scaled("llama3", **LLAMA3), original_max_position_embeddings=32
    )
    hf = transformers.AutoConfig.from_pretrained(folder)
    assert read_config(folder).rope.original_max_positions == 32
    # transformers settles it where the model is built.
    transformers.LlamaForCausalLM(hf)
    assert hf.rope_parameters["original_max_position_embeddings"] == 32


def test_dynamic_is_measured_against_max_positions(write_config: Any) -> None:
    plain = scaled("dynamic", factor=2.0)
    with_length = plain | {"original_max_position_embeddings": 16}
    config = read_config(write_config(rope_parameters=with_length))
    assert config == read_config(write_config(rope_parameters=plain))
    beside = write_config(rope_parameters=plain, original_max_position_embeddings=16)
    assert config == read_config(beside)
    assert config.rope.original_max_positions == 128


ROPE_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"rope_parameters": scaled("longrope", factor=2.0)}, "rope_type: got .longrope., must be one"),
    ({"rope_scaling": {"type": "su"}, "rope_parameters": ...}, "rope_scaling.type: got .su."),
    ({"rope_parameters": scaled("linear")}, "rope_parameters.factor: missing"),
    ({"rope_parameters": scaled("linear", factor=0.5)}, "factor: got 0.5, must be .* at least 1"),
    ({"rope_parameters": scaled("linear", factor="2")}, "factor: got .2."),
    ({"rope_parameters": scaled("yarn")}, "factor: missing"),
    ({"rope_parameters": scaled("linear", factor=2, knob=3)}, "rope_parameters.knob: Quire does"),
    ({"rope_parameters": scaled("default", factor=2)}, "rope_parameters.factor: Quire does not"),
    (
        {"rope_parameters": scaled("llama3", **{**LLAMA3, "high_freq_factor": 1.0})},
        "high_freq_factor: got 1.0, must be above",
    ),
    ({"rope_parameters": scaled("yarn", factor=2, beta_fast=1, beta_slow=4)}, "beta_fast"),
    ({"rope_parameters": scaled("default", partial_rotary_factor=0.25)}, "partial_rotary_factor"),
    ({"rope_parameters": scaled("default"), "rope_theta": 7.0}, "rope_theta: got 100000.0"),
    ({"rope_parameters": scaled("default"), "rope_scaling": scaled("linear", factor=2)}, "equal"),
    ({"rope_parameters": {"full_attention": scaled("default")}}, "full_attention: Quire does not"),
    ({"rope_parameters": [1]}, "rope_parameters: got .1., must be an object"),
    ({"rope_parameters": scaled(3)}, "rope_type: got 3"),  # type: ignore[arg-type]
    ({"rope_parameters": ..., "rope_theta": 0}, "rope_theta: got 0, must be a number above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ROPE_REFUSALS)
def test_rope_refusals(changes: Any, message: str, write_config: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(write_config(**changes))


def test_unknown_rope_field_can_be_ignored(write_config: Any) -> None:
    folder = write_config(rope_parameters=scaled("default", knob=3))
    config = read_config(folder, ignore_fields=("rope_parameters.knob",))
    assert config == replace(read_config(write_config()), rope=RopeConfig(theta=1e5))
