"""What a checkpoint says about generating: end-of-sequence ids and default sampling values.

Called by folder.py. End-of-sequence ids come from generation_config.json, else config.json, else
(in folder.py) the tokenizer, as in transformers. Fields that would change the output and that Quire
does not honour are listed, so that whoever starts the server can say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_fields import Fields, read_json_if_there

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "guidance_scale": (1,),
    "top_h": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
}
"""Values at which a field changes nothing, beside null, false and empty."""

_NO_EFFECT_GROUPS = (
    # Names and ids; what generate() returns beside tokens; how it runs, not what it computes.
    "_from_model_config _commit_hash transformers_version pad_token_id bos_token_id "
    "decoder_start_token_id output_attentions output_hidden_states output_scores output_logits "
    "return_dict_in_generate use_cache cache_implementation cache_config max_cache_len "
    "return_legacy_cache compile_config disable_compile prefill_chunk_size low_memory "
    "continuous_batching_config",
    # Read only by beam search, which num_beams reports, or by assisted decoding, which is exact.
    "early_stopping length_penalty diversity_penalty num_beam_groups is_assistant "
    "num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold assistant_lookbehind target_lookbehind "
    "assistant_early_exit prompt_lookup_num_tokens max_matching_ngram_size use_mtp "
    "speculation_type",
    # generate()'s limit on prompt plus output: Quire has max_model_len and max_tokens for that.
    "max_length chat_format max_window_size",
)
_NO_EFFECT = frozenset(" ".join(_NO_EFFECT_GROUPS).split())


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults a checkpoint asks for; None where it says nothing.

    Attributes:
      eos_ids: token ids that end an answer, the first one being the usual.
      do_sample: false means greedy whatever the temperature (transformers' own default).
      temperature, top_k, top_p, min_p, max_new_tokens: default sampling values; top_k 0 is off.
      repetition_penalty: holds whether do_sample is set or not, as in transformers.
      not_honoured: "name=value" of fields that would change the output and that Quire leaves out.
    """

    eos_ids: tuple[int, ...] = ()
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None
    not_honoured: tuple[str, ...] = ()


def read_generation_config(folder: Path) -> GenerationConfig:
    """Reads generation_config.json, where there is one, and config.json for end-of-sequence ids."""
    file = folder / "generation_config.json"
    fields = Fields(file, read_json_if_there(file))
    config = folder / "config.json"
    eos_ids = _eos_ids(fields) or _eos_ids(Fields(config, read_json_if_there(config)))
    has_do_sample = fields.raw("do_sample") is not None
    return GenerationConfig(
        eos_ids=eos_ids,
        do_sample=fields.boolean("do_sample") if has_do_sample else None,
        temperature=fields.optional_number("temperature"),
        top_k=_top_k(fields),
        top_p=fields.optional_number("top_p", above_low=True, high=1.0),
        min_p=fields.optional_number("min_p", high=1.0),
        max_new_tokens=fields.optional_integer("max_new_tokens"),
        repetition_penalty=fields.optional_number(
            "repetition_penalty",
            above_low=True,
            high=10.0,  # as SamplingParams takes it
        ),
        not_honoured=_not_honoured(fields),
    )


def _eos_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.raw("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise _wrong_eos(fields)
    return tuple(dict.fromkeys(ids))


def _wrong_eos(fields: Fields) -> CheckpointError:
    return fields.error("eos_token_id", "a token id or a list of token ids")


def _not_honoured(fields: Fields) -> tuple[str, ...]:
    found = []
    for name in fields.unasked():
        value = fields.values[name]
        empty = value is None or value is False or value in ({}, [], "")
        if name not in _NO_EFFECT and not empty and value not in _NEUTRAL.get(name, ()):
            found.append(f"{name}={value}")
    return tuple(found)


def _top_k(fields: Fields) -> int | None:
    value = fields.optional_integer("top_k", low=-1)
    return 0 if value == -1 else value
