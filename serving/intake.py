"""From what callers send to what the engine takes: tokenizing, defaults, limits, request ids.

Both faces (serving/llm.py, serving/grpc_server.py) make their requests here, so a prompt means the
same through each.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoints.folder import Checkpoint
from ..errors import InvalidRequest, invalid
from ..sched.request import Request, SamplingParams
from .answer import Answer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": [...]}."""

Messages = Sequence[Mapping[str, Any]]
"""Chat messages: [{"role": "user", "content": "..."}, ...]."""

MAX_NAME_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Labels:
    """What a caller may say of a request besides prompt and sampling."""

    request_id: str = ""
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline: float | None = None  # time.monotonic() seconds


class Intake:
    """Makes requests for one model.

    Args:
      checkpoint: gives the tokenizer, the chat template and the model's own defaults.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def default_sampling(self, **chosen: Any) -> SamplingParams:
        """The model's own defaults (generation_config.json; greedy if it says nothing), overridden
        by what the caller chose. `max_tokens` is unlimited unless either says otherwise."""
        model = self._checkpoint.generation
        own: dict[str, Any] = {"temperature": 0.0, "max_tokens": model.max_new_tokens}
        if model.do_sample:  # transformers, too, ignores the rest unless this is set
            names = ("temperature", "top_k", "top_p", "min_p")
            own |= {n: getattr(model, n) for n in names if getattr(model, n) is not None}
            own["temperature"] = 1.0 if model.temperature is None else model.temperature
        return SamplingParams(**{**own, **chosen})

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt in any form; text gets the tokenizer's special tokens.

        Raises:
          InvalidRequest: of another form, or empty.
        """
        if isinstance(prompt, Mapping):
            known = [k for k in ("prompt_token_ids", "prompt") if k in prompt]
            if len(known) != 1 or len(prompt) != 1:
                raise invalid("prompt", sorted(prompt), 'a dict of "prompt" or "prompt_token_ids"')
            prompt = prompt[known[0]]
            if (known[0] == "prompt") != isinstance(prompt, str):
                raise invalid(known[0], prompt, "text" if known[0] == "prompt" else "token ids")
        if isinstance(prompt, str):
            tokens = self._checkpoint.tokenizer.encode(prompt)
        else:
            tokens = _ids(prompt)
        if not tokens:
            raise InvalidRequest("prompt: got no tokens, must have at least 1")
        return tuple(tokens)

    def chat_tokens(self, messages: Messages, **template_args: Any) -> tuple[int, ...]:
        """Token ids of chat messages, by the model's chat template, ready for an answer."""
        text = self._checkpoint.chat_template.render(messages, **template_args)
        # The template writes its own special tokens.
        return tuple(self._checkpoint.tokenizer.encode(text, add_special_tokens=False))

    def request(
        self, prompt: tuple[int, ...], sampling: SamplingParams, labels: Labels = Labels()
    ) -> Request:
        """A request for the engine; draws what the caller left open (id, seed)."""
        for name in ("request_id", "tenant", "cache_salt"):
            value = getattr(labels, name)
            if len(value) > MAX_NAME_LENGTH:
                raise invalid(name, f"{len(value)} characters", f"at most {MAX_NAME_LENGTH}")
        return Request(
            id=labels.request_id or secrets.token_hex(8),
            prompt=prompt,
            sampling=_seeded(sampling),
            eos_ids=self._checkpoint.eos_ids,
            priority=labels.priority,
            tenant=labels.tenant,
            deadline=labels.deadline,
            cache_salt=labels.cache_salt,
        )

    def answer(self, sampling: SamplingParams) -> Answer:
        """What will follow the request's outputs. Without a tokenizer, it has no text."""
        if not self._checkpoint.has_tokenizer:
            if sampling.stop:
                raise invalid("stop", sampling.stop, "empty: this checkpoint has no tokenizer")
            return Answer(sampling, None, lambda token: "")
        tokenizer = self._checkpoint.tokenizer
        decoder = tokenizer.stream_decoder(skip_special_tokens=sampling.skip_special_tokens)
        return Answer(
            sampling, decoder, lambda token: tokenizer.decode([token], skip_special_tokens=False)
        )


def _ids(prompt: object) -> list[int]:
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise invalid("prompt", type(prompt).__name__, "text or a list of token ids")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int):
            raise invalid("prompt_token_ids", token, "whole numbers")
    return list(prompt)


def _seeded(sampling: SamplingParams) -> SamplingParams:
    if sampling.seed is not None:
        return sampling
    return replace(sampling, seed=secrets.randbits(63))
