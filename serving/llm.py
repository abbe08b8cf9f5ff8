"""`LLM`: the engine inside a Python program, without a server.

    llm = LLM("path/to/checkpoint")
    for result in llm.generate(["Hello", "Once upon a time"], SamplingParams(max_tokens=32)):
        print(result.outputs[0].text)

Answers come back in the order of the prompts; names follow vLLM's where both have a thing.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from types import TracebackType
from typing import Any, TypeVar, cast, overload

from ..config import EngineConfig, check_names
from ..errors import InvalidRequest, QuireError, invalid
from ..model.plan import FloatArray
from ..sched.request import Request, SamplingParams
from ..sched.stats import EngineStats
from . import beam
from .answer import Chunk, Completion, Logprob, PositionLogprobs
from .assemble import Assembled, assemble
from .beam import Beam, BeamSearchParams, BeamSearchResult
from .choices import Choices, best, check_streamable
from .intake import Messages, Prompt
from .progress import Reporter, Silent
from .streams import Routes, Stream
from .vectors import Embedding

__all__ = [
    "LLM",
    "Beam",
    "BeamSearchParams",
    "BeamSearchResult",
    "Chunk",
    "Completion",
    "Generation",
    "Logprob",
    "PositionLogprobs",
    "Stream",
]

Result = TypeVar("Result")

_Requests = Sequence[tuple[Request, Choices]]


@dataclass(slots=True)
class Generation:
    """The answer to one prompt.

    Attributes:
      prompt: the prompt's text, where it was given as text.
      prompt_token_ids: what the model saw.
      outputs: `n` Completions; with best_of the best first, unless there is an error.
      cached_tokens: prompt tokens whose KV was found in the prefix index.
      completion_tokens: tokens made for all answers, those that best_of left out included.
      prompt_logprobs: where asked for, one entry a prompt token, None for the first of them.
      error: why the request failed, if it did; `outputs` then hold what had come by then.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion] = field(default_factory=list)
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    error: QuireError | None = None

    def add(self, chunk: Chunk) -> None:
        """Appends a chunk to the answer that it belongs to."""
        self.outputs[chunk.index].add(chunk)
        self.cached_tokens = chunk.cached_tokens
        self.completion_tokens += len(chunk.token_ids)
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs = chunk.prompt_logprobs


class LLM:
    """An engine in this process. Safe to use from several threads.

    It ends with the last reference to it, with the process, or earlier by `close` or `with`.

    Args:
      model: a checkpoint folder, a hub name ("org/name@revision") or a shipped one ("demo").
      dtype: "auto", "bfloat16", "float16" or "float32".
      reporter: hears of progress while the model loads; None is silent.
      settings: any other field of EngineConfig.

    Raises:
      CheckpointError, InvalidConfig: the model cannot be served as asked.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        reporter: Reporter | None = None,
        **settings: Any,
    ):
        # Who calls in process waits for results anyway; the bound is for servers.
        settings.setdefault("max_queue", 2**31)
        check_names(EngineConfig, settings)
        config = EngineConfig(model=os.fspath(model), dtype=dtype, **settings)
        # The engine's thread must not keep this object alive, so it delivers to one beside it.
        self._routes = Routes()
        self._parts = assemble(config, self._routes.deliver, reporter)
        self._engine, self._intake = self._parts.engine, self._parts.intake
        self._stop = weakref.finalize(self, self._engine.stop, drain=False)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Reporter | None = None,
        return_errors: bool = False,
    ) -> list[Generation]:
        """Answers prompts, all in one batch; the answers come in the order of the prompts.

        Args:
          prompts: one prompt or several; each is text, token ids or {"prompt_token_ids": [...]}.
          sampling_params: one for all, or one each; None takes the model's own defaults.
          progress: shown while the answers come.
          return_errors: a request that fails on the way only says so in its `error`.

        Raises:
          InvalidRequest: a prompt or parameter cannot be served; then none of them runs.
          QuireError: a request failed on the way. Raised when the others have ended; their answers
            are in the error's `results`.
        """
        prompts = _as_list(prompts)
        tokens = self._tokens(prompts)
        requests = self._requests(tokens, sampling_params)
        results = [
            Generation(_text_of(p), list(t), [Completion(c) for c in range(r.sampling.choices)])
            for p, t, (r, _) in zip(prompts, tokens, requests, strict=True)
        ]
        left = {i: len(result.outputs) for i, result in enumerate(results)}  # unfinished answers
        with (
            self._stream(requests, failed=lambda i, error: (i, error)) as stream,
            (progress or Silent()).phase("generating") as update,
        ):
            for i, news in stream:
                if isinstance(news, QuireError):
                    results[i].error, left[i] = news, 0
                else:
                    results[i].add(news)
                    left[i] -= news.finish_reason is not None
                if not left[i]:
                    del left[i]
                    update(len(results) - len(left), len(results))
        for result, (request, _) in zip(results, requests, strict=True):
            if result.error is None:
                result.outputs = best(result.outputs, request.sampling)
        if not return_errors:
            _raise_first(results)
        return results

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> list[FloatArray]:
        """Embeddings of prompts, all in one batch; they come in the order of the prompts.

        Each is float32 [hidden size]: the hidden state after the final norm at the prompt's last
        token, scaled to length 1. Prompts are as for `generate`; a text gets the tokenizer's
        special tokens.

        Raises:
          InvalidRequest: a prompt cannot be served; then none of them runs.
          QuireError: a request failed on the way; then all of them end.
        """
        tokens = self._tokens(_as_list(prompts))
        requests = [
            (_naming(i, tokens, self._intake.embedding, ids), Embedding())
            for i, ids in enumerate(tokens)
        ]
        found = Stream(
            self._engine, self._routes, requests, lambda i, vector: (i, vector), keep=self
        )
        with found:
            return [vector for _, vector in sorted(found, key=lambda item: item[0])]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchResult]:
        """The likeliest answers that beam search finds, best first; results in order of prompts.

        Beams share their KV through the prefix index, so without `prefix_caching` each step
        computes all of each beam again.

        Raises:
          InvalidRequest: a prompt or parameter cannot be served; then none of them runs.
          QuireError: the engine failed on the way.
        """
        prompts = _as_list(prompts)
        tokens = self._tokens(prompts)
        for i, ids in enumerate(tokens):
            _naming(i, tokens, beam.check, self._intake, ids, params)
        found = beam.search(self._intake, self._stream, tokens, params)
        return [
            BeamSearchResult(_text_of(prompt), list(ids), beams)
            for prompt, ids, beams in zip(prompts, tokens, found, strict=True)
        ]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_args: Any,
    ) -> list[Generation]:
        """Answers chats: one list of {"role", "content"} messages, or several such lists."""
        several = bool(messages) and not isinstance(messages, str | Mapping)
        several = several and all(isinstance(m, list | tuple) for m in messages)
        chats = cast(Sequence[Messages], messages if several else [messages])
        prompts = [self.chat_prompt(chat, **template_args) for chat in chats]
        return self.generate(prompts, sampling_params)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Stream[Chunk]:
        """Answers one prompt piece by piece. Closing the stream early ends the request.

        With n above 1, `Chunk.index` says which answer a piece is of.
        """
        tokens = [self._intake.tokens_of(prompt)]
        requests = self._requests(tokens, sampling_params, streamed=True)
        return Stream(self._engine, self._routes, requests, lambda _, chunk: chunk, keep=self)

    def stream_chat(
        self, messages: Messages, sampling_params: SamplingParams | None = None, **args: Any
    ) -> Stream[Chunk]:
        """`stream` for chat messages."""
        return self.stream(self.chat_prompt(messages, **args), sampling_params)

    def stream_many(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Stream[tuple[int, Chunk]]:
        """Answers several prompts at once, as pieces come: (index of the prompt, chunk).

        The requests are submitted by this call, not by the first `next`.
        """
        tokens = self._tokens(_as_list(prompts))
        return self._stream(self._requests(tokens, sampling_params, streamed=True))

    def chat_prompt(self, messages: Messages, **template_args: Any) -> list[int]:
        """Token ids of chat messages, by the model's chat template."""
        return list(self._intake.chat_tokens(messages, **template_args))

    def default_sampling_params(
        self, prompt: Prompt | None = None, **chosen: Any
    ) -> SamplingParams:
        """The model's own sampling defaults, with `chosen` over them.

        Args:
          prompt: what they are for; a limit on output that the model suggests then gives way where
            the context has less room after it.
          chosen: any fields of SamplingParams.
        """
        length = 1 if prompt is None else len(self._intake.tokens_of(prompt))
        return self._intake.default_sampling(length, **chosen)

    def stats(self) -> EngineStats:
        """What the engine has done since it started."""
        return self._engine.stats()

    @property
    def compiles_after_ready(self) -> int:
        """Programs compiled since the engine was ready; 0 after a warm-up, or something is wrong.

        JAX counts for the whole process: what another LLM or the caller's own JAX code compiled
        since then is among them. With `warmup=False` each program that was compiled at its first
        use counts too.
        """
        return self._parts.runner.compiles_after_ready

    @property
    def parts(self) -> Assembled:
        """The engine's parts, for tools that look inside."""
        return self._parts

    def close(self) -> None:
        """Stops the engine; unfinished requests end with Unavailable. Idempotent."""
        self._stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tokens(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        return [_naming(i, prompts, self._intake.tokens_of, p) for i, p in enumerate(prompts)]

    @overload
    def _stream(self, requests: _Requests) -> Stream[tuple[int, Chunk]]: ...

    @overload
    def _stream(
        self, requests: _Requests, failed: Callable[[int, QuireError], tuple[int, QuireError]]
    ) -> Stream[tuple[int, Chunk | QuireError]]: ...

    def _stream(self, requests: _Requests, failed: Any = None) -> Any:
        make = lambda i, chunk: (i, chunk)  # noqa: E731
        return Stream(self._engine, self._routes, requests, make, failed, keep=self)

    def _requests(
        self,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        *,
        streamed: bool = False,
    ) -> list[tuple[Request, Choices]]:
        """All requests, checked, before the first is submitted."""
        if sampling is None:
            each = [self._intake.default_sampling(len(p)) for p in prompts]
        elif isinstance(sampling, SamplingParams):
            each = [sampling] * len(prompts)
        elif isinstance(sampling, str | bytes | Mapping) or not isinstance(sampling, Iterable):
            raise invalid("sampling_params", sampling, "SamplingParams, or a list of them")
        else:
            each = list(sampling)
        if len(each) != len(prompts):
            raise InvalidRequest(
                f"sampling_params: got {len(each)}, must be one or as many as prompts "
                f"({len(prompts)})"
            )
        requests = []
        for i, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
            if not isinstance(params, SamplingParams):
                raise invalid(f"sampling_params[{i}]", params, "SamplingParams")
            if streamed:
                _naming(i, prompts, check_streamable, params)
            request = _naming(i, prompts, self._intake.request, prompt, params)
            requests.append((request, self._intake.choices(params)))
        return requests


def _naming(index: int, prompts: Sequence[Any], make: Callable[..., Result], *args: Any) -> Result:
    """What `make` gives; where it refuses one of several prompts, the message says which."""
    try:
        return make(*args)
    except InvalidRequest as error:
        if len(prompts) == 1:
            raise
        raise InvalidRequest(f"prompt {index} of {len(prompts)} (from 0): {error}") from error


def _raise_first(results: list[Generation]) -> None:
    """Raises the error of the first request that failed, with all results."""
    failed = [(i, result.error) for i, result in enumerate(results) if result.error is not None]
    for i, error in failed[:1]:
        error, cause = (
            copy.copy(error),
            error.__cause__,
        )  # the one in the results shall not hold them
        error.results = results
        if len(results) > 1:
            error.add_note(
                f"prompt {i} of {len(results)} (from 0); {len(failed)} of them failed, and the "
                "answers to the others are in the error's `results`"
            )
        raise error from cause


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a list of whole numbers is one prompt of token ids."""
    if isinstance(prompts, str | bytes | Mapping):
        return [cast(Prompt, prompts)]
    if not isinstance(prompts, Sequence):
        raise invalid("prompts", type(prompts).__name__, "a prompt or a list of prompts")
    if prompts and all(isinstance(p, Integral) for p in prompts):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _text_of(prompt: Prompt) -> str | None:
    """The prompt as text, where it was given so."""
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt", ())
    return prompt if isinstance(prompt, str) else None
