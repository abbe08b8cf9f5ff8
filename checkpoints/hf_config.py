"""config.json of a Hugging Face folder -> `ModelConfig`. Called by folder.py.

Owns what the supported families are, what transformers assumes where a field is absent, and which
fields may be there without changing a number. A field that is none of these is refused by name,
because a field that is silently dropped gives a model that is silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, InvalidConfig
from ..model.config import DTYPES, Dtype, ModelConfig
from .hf_rope import read_rope
from .json_fields import Fields, read_json

MAX_LAYERS = 4096


@dataclass(frozen=True)
class _Family:
    """What transformers' config class of a family assumes, and which fields its model reads.

    Attributes:
      num_kv_heads: None is as many as num_attention_heads.
      head_dim: None is hidden_size / num_attention_heads.
      sliding_window: "none"; "all" layers (Mistral); "some" (Qwen's use_sliding_window).
      qkv_bias: "never", "always", or "field" for attention_bias, which biases the output as well.
    """

    name: str
    architecture: str
    vocab_size: int
    intermediate_size: int
    num_kv_heads: int | None
    head_dim: int | None
    max_positions: int
    sliding_window: Literal["none", "all", "some"]
    qkv_bias: Literal["never", "always", "field"]
    mlp_bias_field: bool = False
    qk_norm: bool = False


_FAMILIES = (
    _Family(
        "llama", "LlamaForCausalLM", 32000, 11008, None, None, 2048, "none", "field", True
    ),
    _Family("mistral", "MistralForCausalLM", 32000, 14336, 8, None, 131072, "all", "never"),
    _Family("qwen2", "Qwen2ForCausalLM", 151936, 22016, 32, None, 32768, "some", "always"),
    _Family(
        "qwen3", "Qwen3ForCausalLM", 151936, 22016, 32, 128, 32768, "some", "field", qk_norm=True
    ),
)  # fmt: skip

ARCHITECTURES = tuple(family.architecture for family in _FAMILIES)

_NO_EFFECT_GROUPS = (
    # Names, versions, ids.
    "_name_or_path name_or_path _commit_hash architectures model_type transformers_version "
    "unsloth_version unsloth_fixed tokenizer_class tokenizer_padding_side "
    "tokenizer_model_max_length max_sequence_length finetuning_task task_specific_params "
    "id2label label2id num_labels problem_type prefix bos_token_id eos_token_id pad_token_id "
    "unk_token_id sep_token_id decoder_start_token_id",
    # How a framework runs the model, not what it computes.
    "use_cache return_dict use_return_dict output_hidden_states output_attentions torchscript "
    "use_bfloat16 tf_legacy_loss is_decoder tie_encoder_decoder chunk_size_feed_forward "
    "attn_implementation _attn_implementation _attn_implementation_autoset "
    "experts_implementation _flash_attn_2_enabled use_flash_attention use_flash_attention_2",
    # Training only.
    "initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop "
    "neftune_noise_alpha",
    # Defaults of generate(), which transformers drops from config.json as well.
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff "
    "eta_cutoff encoder_repetition_penalty",
)
_NO_EFFECT = frozenset(" ".join(_NO_EFFECT_GROUPS).split())


def read_config(
    folder: Path,
    *,
    ignore_fields: Collection[str] = (),
    weights_dtype: Callable[[], Dtype] | None = None,
) -> ModelConfig:
    """The `ModelConfig` that `folder`/config.json describes.

    Args:
      folder: a checkpoint folder.
      ignore_fields: unknown fields to let pass; one inside an object is spelled `object.field`.
      weights_dtype: asked for the dtype when config.json names none; without it that is float32.

    Raises:
      CheckpointError: it cannot be read, or describes what Quire does not serve.
      InvalidConfig: `ignore_fields` names what is not there, or what is no obstacle.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: has no config.json, must be a model folder in Hugging Face form"
        )
    fields = Fields(file, read_json(file))
    family = _family(fields)
    _refuse_unsupported(fields)

    layers = fields.integer("num_hidden_layers", 32, high=MAX_LAYERS)
    heads, kv_heads, head_dim, hidden = _heads(fields, family)
    max_positions = fields.integer("max_position_embeddings", family.max_positions)
    rope, max_positions, unknown_of_rope = read_rope(fields, max_positions)
    attention_bias = family.qkv_bias == "field" and fields.boolean("attention_bias")
    config = ModelConfig(
        family=family.name,
        vocab_size=fields.integer("vocab_size", family.vocab_size),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", family.intermediate_size),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", 1e-6, above_low=True),
        rope=rope,
        windows=_windows(fields, family, layers),
        max_positions=max_positions,
        qkv_bias=attention_bias or family.qkv_bias == "always",
        out_bias=attention_bias,
        mlp_bias=family.mlp_bias_field and fields.boolean("mlp_bias"),
        qk_norm=family.qk_norm,
        tied_embeddings=fields.boolean("tie_word_embeddings"),
        dtype=_dtype(fields) or (weights_dtype() if weights_dtype else "float32"),
    )
    _check_unknown(file, _unknown(fields) | unknown_of_rope, ignore_fields)
    return config


def _family(fields: Fields) -> _Family:
    """By `architectures`; by `model_type` where that is absent; the two must agree."""
    architectures, model_type = fields.raw("architectures"), fields.raw("model_type")
    if not architectures and model_type is None:
        raise fields.error("architectures", f"one of {', '.join(ARCHITECTURES)}")
    for family in _FAMILIES:
        if architectures in ([family.architecture], None, []) and model_type in (family.name, None):
            return family
    if architectures and len(architectures) == 1 and architectures[0] in ARCHITECTURES:
        raise fields.error("model_type", f"the type of {architectures[0]}")
    name = "architectures" if architectures else "model_type"
    raise fields.error(name, f"one of the supported {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(fields: Fields) -> None:
    """Fields that Quire knows to change the numbers, and does not implement."""
    if fields.raw("hidden_act") not in (None, "silu", "swish"):
        raise fields.error("hidden_act", "silu (no other activation is supported)")
    if fields.raw("quantization_config") is not None:
        raise fields.error(
            "quantization_config", "absent (quantized checkpoints are not supported)"
        )
    if fields.raw("pretraining_tp") not in (None, 1):
        raise fields.error("pretraining_tp", "1 (matrix products in slices are not supported)")
    if fields.raw("is_encoder_decoder"):
        raise fields.error("is_encoder_decoder", "false (only decoders are supported)")


def _heads(fields: Fields, family: _Family) -> tuple[int, int, int, int]:
    """(query heads, key/value heads, head dim, hidden size)."""
    hidden = fields.integer("hidden_size", 4096)
    heads = fields.integer("num_attention_heads", 32)
    kv_heads = fields.optional_integer("num_key_value_heads")
    if kv_heads is None:
        # An explicit null is "as many as heads" in every family; absence is the class's default.
        absent = "num_key_value_heads" not in fields
        kv_heads = (family.num_kv_heads if absent else None) or heads
    if heads % kv_heads:
        raise fields.error(
            "num_key_value_heads", f"a divisor of num_attention_heads ({heads}); here {kv_heads}"
        )
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None and family.head_dim and "head_dim" not in fields:
        head_dim = family.head_dim
    if head_dim is None:
        if hidden % heads:
            raise fields.error("hidden_size", f"a multiple of num_attention_heads ({heads})")
        head_dim = hidden // heads
    if head_dim % 2:
        raise fields.error("head_dim", f"even, as rotary embedding needs; here {head_dim}")
    return heads, kv_heads, head_dim, hidden


def _windows(fields: Fields, family: _Family, layers: int) -> tuple[int | None, ...]:
    if family.sliding_window == "none":
        return (None,) * layers
    window = fields.optional_integer("sliding_window")
    if window is None and "sliding_window" not in fields:
        window = 4096
    if family.sliding_window == "all":
        return (window,) * layers
    first = fields.integer("max_window_layers", 28, low=0)
    if not fields.boolean("use_sliding_window"):
        window = None
    kinds = fields.raw("layer_types")
    if kinds is None:
        return tuple(window if i >= first else None for i in range(layers))
    return _windows_of_kinds(fields, kinds, window, layers)


def _windows_of_kinds(
    fields: Fields, kinds: Any, window: int | None, layers: int
) -> tuple[int | None, ...]:
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise fields.error("layer_types", f"a list of {' and '.join(known)}")
    if len(kinds) != layers:
        raise fields.error("layer_types", f"{layers} entries long, one for each layer")
    if "sliding_attention" in kinds and window is None:
        raise fields.error(
            "layer_types",
            "full_attention only, unless use_sliding_window and sliding_window are set",
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(fields: Fields) -> Dtype | None:
    new, old = fields.raw("dtype"), fields.raw("torch_dtype")
    name = "dtype" if new is not None else "torch_dtype"
    value = new if new is not None else old
    if value is None:
        return None
    for known in DTYPES:
        if isinstance(value, str) and value.removeprefix("torch.") == known:
            return known
    raise fields.error(name, f"one of {', '.join(DTYPES)}")


def _unknown(fields: Fields) -> dict[str, Any]:
    """Fields that may change what the model computes, as nobody asked for them."""
    unasked = {name: fields.values[name] for name in fields.unasked()}
    return {n: v for n, v in unasked.items() if n not in _NO_EFFECT and not _says_nothing(v)}


def _check_unknown(file: Path, unknown: dict[str, Any], ignore_fields: Collection[str]) -> None:
    """Refuses unknown fields, and names in `ignore_fields` that let none of them pass: who
    misspells a field must not believe it ignored."""
    for name in ignore_fields:
        if name not in unknown:
            raise InvalidConfig(
                f"ignore_config_fields: got {name!r}, must be among the fields of {file} that "
                f"Quire does not know: {', '.join(unknown) or 'it has none'}"
            )
    for name, value in unknown.items():
        if name not in ignore_fields:
            raise CheckpointError(
                f"{file}: {name}: Quire does not know this field (value {str(value)[:80]!r}), and "
                f"it may change what the model computes; --ignore-config-fields {name} lets it pass"
            )


def _says_nothing(value: Any) -> bool:
    """Not false or 0: those switch off what is on by default."""
    return value is None or (isinstance(value, dict | list | str) and not value)
