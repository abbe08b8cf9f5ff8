"""The rotary embedding that a Hugging Face config.json describes, resolved as transformers does.

Called by hf_config.py. Two spellings: transformers 5 has one object `rope_parameters`;
transformers 4 had `rope_theta` beside an object `rope_scaling`, whose kind was `rope_type` or,
older still, `type`. Formulas that use the result: model/rope.py.
"""

from __future__ import annotations

import math
from typing import Any, get_args

from ..errors import CheckpointError
from ..model.config import RopeConfig, RopeKind
from .json_fields import Fields

DEFAULT_THETA = 10000.0
KINDS: tuple[str, ...] = get_args(RopeKind)

_NO_EFFECT = {
    # Left over from how YaRN checkpoints were trained; no code reads it.
    "yarn": ("finetuned",),
    # transformers measures a dynamic rope against max_position_embeddings, whatever this says.
    "dynamic": ("original_max_position_embeddings",),
}


def read_rope(top: Fields, max_positions: int) -> tuple[RopeConfig, int, dict[str, Any]]:
    """The rope; the longest sequence it is meant for (above `max_positions` for some YaRN); and
    fields of the rope that Quire does not know, spelled `object.field`, with their values."""
    scaling = _scaling_object(top)
    top_theta = top.optional_number("rope_theta", above_low=True)
    original = top.optional_integer("original_max_position_embeddings")
    _refuse_partial(top)
    if scaling is None:
        return RopeConfig(theta=top_theta or DEFAULT_THETA), max_positions, {}

    _refuse_partial(scaling)
    theta = scaling.optional_number("rope_theta", above_low=True)
    if theta and top_theta and theta != top_theta:
        raise scaling.error("rope_theta", f"equal to the field rope_theta beside it ({top_theta})")
    theta = theta or top_theta or DEFAULT_THETA
    kind = _kind(scaling)
    rope, longest = _READERS[kind](scaling, theta, max_positions, original)
    return rope, longest, _unknown(scaling, kind)


def _scaling_object(top: Fields) -> Fields | None:
    old, new = top.below("rope_scaling"), top.below("rope_parameters")
    if old and new and old.values != new.values:
        raise top.error("rope_scaling", "absent or equal where rope_parameters is given too")
    return old or new


def _refuse_partial(fields: Fields) -> None:
    share = fields.raw("partial_rotary_factor")
    if share is not None and share != 1:
        raise fields.error("partial_rotary_factor", "1 (a partly rotated head is not supported)")


def _kind(scaling: Fields) -> RopeKind:
    new, old = scaling.raw("rope_type"), scaling.raw("type")
    name = "rope_type" if new is not None else "type"
    kind = new if new is not None else old if old is not None else "default"
    for known in KINDS:
        if kind == known:
            return known  # type: ignore[return-value]  # KINDS are the members of RopeKind
    raise scaling.error(name, f"one of {', '.join(KINDS)} (no other rope is supported)")


def _unknown(scaling: Fields, kind: str) -> dict[str, Any]:
    harmless = _NO_EFFECT.get(kind, ())
    return {
        f"{scaling.path}{name}": scaling.values[name]
        for name in scaling.unasked()
        if name not in harmless and scaling.values[name] not in (None, False)
    }


def _factor(scaling: Fields) -> float:
    return scaling.number("factor", low=1.0)


def _original(scaling: Fields, beside: int | None, max_positions: int) -> tuple[int, bool]:
    """The length before scaling and whether it was named; the field at the top level wins."""
    inside = scaling.optional_integer("original_max_position_embeddings")
    named = beside or inside
    return named or max_positions, named is not None


def _default(s: Fields, theta: float, longest: int, original: int | None) -> tuple[RopeConfig, int]:
    return RopeConfig(theta=theta), longest


def _linear(s: Fields, theta: float, longest: int, original: int | None) -> tuple[RopeConfig, int]:
    return RopeConfig(kind="linear", theta=theta, factor=_factor(s)), longest


def _dynamic(s: Fields, theta: float, longest: int, original: int | None) -> tuple[RopeConfig, int]:
    factor = _factor(s)
    return RopeConfig("dynamic", theta, factor, original_max_positions=longest), longest


def _llama3(s: Fields, theta: float, longest: int, original: int | None) -> tuple[RopeConfig, int]:
    low = s.number("low_freq_factor", above_low=True)
    high = s.number("high_freq_factor", above_low=True)
    if high <= low:
        raise s.error("high_freq_factor", f"above low_freq_factor ({low:g})")
    before, _ = _original(s, original, longest)
    rope = RopeConfig(
        kind="llama3",
        theta=theta,
        factor=_factor(s),
        original_max_positions=before,
        low_freq_factor=low,
        high_freq_factor=high,
    )
    return rope, longest


def _yarn(s: Fields, theta: float, longest: int, original: int | None) -> tuple[RopeConfig, int]:
    before, named = _original(s, original, longest)
    if "factor" not in s:
        raise CheckpointError(f"{s.file}: {s.path}factor: missing, must be a number or null")
    factor = s.optional_number("factor", low=1.0)
    if factor is None:
        # DeepSeek's way: the ratio of the two lengths stands for the factor.
        factor = longest / before
    fast = s.optional_number("beta_fast") or 32.0
    slow = s.optional_number("beta_slow") or 1.0
    if fast < slow:
        raise s.error("beta_fast", f"at least beta_slow ({slow:g})")
    rope = RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_positions=before,
        beta_fast=fast,
        beta_slow=slow,
        truncate=s.boolean("truncate", True),
        attention_factor=_attention_factor(s, factor),
    )
    # The documented way to lengthen a Qwen is to add a YaRN object and leave
    # max_position_embeddings alone, so a named original length times the factor is the claim.
    return rope, max(longest, int(before * factor)) if named else longest


def _attention_factor(s: Fields, factor: float) -> float:
    given = s.optional_number("attention_factor", above_low=True)
    mscale, all_dim = s.optional_number("mscale"), s.optional_number("mscale_all_dim")
    if given is not None:
        return given
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    """YaRN's temperature: 0.1 ln(s) + 1, with DeepSeek's weight on the logarithm."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


_READERS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
