"""What a server serves, as `GetModelInfo` tells it. Called by serving/frontend/service.py, once."""

from __future__ import annotations

from collections.abc import Iterator

from ... import __version__
from ...errors import CheckpointError
from ...model.plan import RunnerSpec
from ...protos.v1 import generation_pb2 as pb
from ...sched.limits import context_limit, longest_prompt
from ...sched.sampling_params import LIMITS, SamplingParams
from ..intake import Intake
from .wire import sampling_message

_IDS = ("stop_token_ids", "allowed_token_ids", "bad_words")
"""Parameters whose numbers are token ids, which the vocabulary limits."""

_UNLIMITED = ("seed",)
"""The wire's type allows no other values than those that are allowed."""


def model_info(intake: Intake) -> pb.ModelInfo:
    """The whole message."""
    checkpoint, spec = intake.checkpoint, intake.spec
    templates = _template_names(intake)
    able = [pb.CAPABILITY_GENERATE, pb.CAPABILITY_EMBED]
    if checkpoint.has_tokenizer:
        able.append(pb.CAPABILITY_TEXT)
        if templates:
            able.append(pb.CAPABILITY_CHAT)
    return pb.ModelInfo(
        name=intake.served.name,
        architecture=checkpoint.config.family,
        dtype=intake.served.dtype,
        version=__version__,
        context_limit=context_limit(spec)[0],
        vocab_size=spec.vocab_size,
        eos_token_ids=intake.eos_ids,
        capabilities=able,
        has_tokenizer=checkpoint.has_tokenizer,
        has_chat_template=bool(templates),
        chat_templates=templates,
        embedding_size=checkpoint.config.hidden_size,
        max_embed_tokens=longest_prompt(spec, pooled=True),
        page_size=spec.page_size,
        kv_pages=spec.num_pages - 1,
        max_running=spec.num_slots,
        default_sampling=_defaults(intake.default_sampling()),
        limits=_limits(spec),
    )


def _template_names(intake: Intake) -> list[str]:
    try:
        return list(intake.checkpoint.chat_template.sources)
    except CheckpointError:  # who sends a chat is told
        return []


def _defaults(sampling: SamplingParams) -> pb.SamplingParams:
    """The model's own, without what is drawn anew for each request."""
    message = sampling_message(sampling)
    message.ClearField("seed")
    return message


def _limits(spec: RunnerSpec) -> Iterator[pb.ParameterLimit]:
    for name, limit in LIMITS.items():
        if name not in _UNLIMITED:
            yield pb.ParameterLimit(
                field=name,
                minimum=limit.low,
                minimum_excluded=limit.above_low,
                maximum=spec.vocab_size - 1 if name in _IDS else limit.high,
                max_entries=limit.entries,
                max_characters=limit.characters,
            )
