"""Which requests can be served at all. Pure: safe to ask from any thread.

Called for every request before it is queued. What is refused here names the field, the value and
the limit; what passes can always run to its end, if need be alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import InvalidRequest, invalid
from ..model.plan import MAX_STOP_IDS, RunnerSpec
from .request import POOLED_SAMPLING, FinishReason, Request
from .sampling_params import SamplingParams
from .sequence import stop_ids

CALLER_REASONS = (FinishReason.ABORT, FinishReason.STOP, FinishReason.LENGTH)
"""Why a caller may end a request; the engine alone says ERROR, because that carries one."""


def check_reason(reason: FinishReason) -> None:
    """Raises InvalidRequest for a reason that callers may not give."""
    if reason not in CALLER_REASONS:
        raise invalid("reason", reason, f"one of {', '.join(CALLER_REASONS)}")


def context_limit(spec: RunnerSpec) -> tuple[int, str]:
    """The most tokens prompt and output may have together, and what sets that limit."""
    pages = min(spec.num_pages - 1, spec.max_pages_per_seq)
    fits = pages * spec.page_size + 1  # the last token's KV is never stored
    if fits < spec.max_model_len:
        return fits, f"{pages} KV pages of {spec.page_size} tokens"
    return spec.max_model_len, "max_model_len"


def longest_prompt(spec: RunnerSpec, *, pooled: bool) -> int:
    """Most tokens of a prompt that is to be answered, or of one whose embedding is wanted."""
    most = context_limit(spec)[0] - 1
    pages = min(spec.num_pages - 1, spec.max_pages_per_seq)
    return min(spec.max_model_len, pages * spec.page_size) if pooled else most


def check_prompt_length(length: int, spec: RunnerSpec, *, pooled: bool) -> None:
    """Raises InvalidRequest if a prompt of so many tokens is too long."""
    limit, source = context_limit(spec)
    most = longest_prompt(spec, pooled=pooled)
    if length > most:
        room = "" if pooled else f", to leave room for one output token within {limit}"
        raise InvalidRequest(
            f"prompt: got {length} tokens, must be at most {most}{room} ({source})"
        )


def resolve_max_tokens(request: Request, spec: RunnerSpec) -> int:
    """max_tokens, where None becomes as many as the context allows."""
    asked = request.sampling.max_tokens
    return context_limit(spec)[0] - len(request.prompt) if asked is None else asked


def check_request(request: Request, spec: RunnerSpec) -> None:
    """Raises InvalidRequest if this request can never be served as asked."""
    _check_prompt(request, spec)
    _check_length(request, spec)
    sampling = request.sampling
    if request.pooled and sampling != POOLED_SAMPLING:
        raise invalid("sampling", "parameters", "POOLED_SAMPLING for a pooled request")
    if sampling.seed is None:
        raise invalid("seed", None, "a number by the time the request is submitted")
    if request.adapter != 0:
        raise invalid("adapter", request.adapter, "0 (the base model); adapters are not served yet")
    _check_ids(sampling, spec)
    stops = len(stop_ids(request))
    if stops > MAX_STOP_IDS:
        raise invalid(
            "stop_token_ids",
            f"{stops} ids, end-of-sequence ids included",
            f"at most {MAX_STOP_IDS}",
        )


def _check_ids(sampling: SamplingParams, spec: RunnerSpec) -> None:
    """Raises InvalidRequest for token ids that the model does not have."""
    ids: list[tuple[str, Iterable[int]]] = [
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
    ]
    for word in sampling.bad_words:
        if isinstance(word, str):
            raise invalid("bad_words", word, "token ids by the time the request is submitted")
        ids.append(("bad_words", word))
    for name, tokens in ids:
        for token in tokens:
            if token >= spec.vocab_size:
                limit = f"whole numbers from 0 to {spec.vocab_size - 1} (the vocabulary)"
                raise invalid(name, token, limit)
    alone = {word[0] for word in sampling.bad_words if len(word) == 1}
    if sampling.allowed_token_ids and alone.issuperset(sampling.allowed_token_ids):
        limit = "at least one token id that is not in bad_words"
        raise invalid("allowed_token_ids", list(sampling.allowed_token_ids)[:8], limit)


def _check_prompt(request: Request, spec: RunnerSpec) -> None:
    prompt = request.prompt
    if not prompt:
        raise InvalidRequest("prompt: got 0 tokens, must be at least 1")
    if request.ids is None or request.highest >= spec.vocab_size:
        limit = f"whole numbers from 0 to {spec.vocab_size - 1} (the vocabulary)"
        for at, token in enumerate(prompt):
            if not isinstance(token, int) or not 0 <= token < spec.vocab_size:
                raise invalid(f"prompt[{at}]", token, limit)


def _check_length(request: Request, spec: RunnerSpec) -> None:
    length, (limit, source) = len(request.prompt), context_limit(spec)
    check_prompt_length(length, spec, pooled=request.pooled)
    if request.pooled:
        return
    sampling = request.sampling
    room = limit - length
    for name in ("max_tokens", "min_tokens"):
        value = getattr(sampling, name)
        if value is not None and value > room:
            raise InvalidRequest(
                f"{name}: got {value}, must be at most {room}: the prompt has {length} tokens and "
                f"the limit for both together is {limit} ({source})"
            )
