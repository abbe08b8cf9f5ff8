"""`LLM`: the engine inside a Python program, without a server.

    llm = LLM("path/to/checkpoint")
    for result in llm.generate(["Hello", "Once upon a time"], SamplingParams(max_tokens=32)):
        print(result.outputs[0].text)

Answers come back in the order of the prompts; names follow vLLM's where both have a thing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

from ..config import EngineConfig
from ..errors import InvalidRequest, Unavailable
from ..sched.request import Request, RequestOutput, SamplingParams
from ..sched.stats import EngineStats
from .answer import Answer, Chunk, Completion, Logprob, PositionLogprobs
from .assemble import assemble
from .intake import Intake, Messages, Prompt
from .progress import Reporter, Silent

__all__ = ["LLM", "Chunk", "Completion", "Generation", "Logprob", "PositionLogprobs"]


@dataclass(slots=True)
class Generation:
    """The answer to one prompt.

    Attributes:
      prompt: the prompt's text, where it was given as text.
      prompt_token_ids: what the model saw.
      outputs: one Completion.
      cached_tokens: prompt tokens whose KV was found in the prefix index.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion] = field(default_factory=list)
    cached_tokens: int = 0


class _Call:
    """Requests submitted together, and the queue that their outputs come back on."""

    def __init__(self) -> None:
        self.outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self.answers: dict[str, Answer] = {}


class LLM:
    """An engine in this process. Safe to use from several threads; close it, or use `with`.

    Args:
      model: a checkpoint folder in Hugging Face form, or a shipped model's name ("demo").
      dtype: "auto", "bfloat16", "float16" or "float32".
      reporter: hears of progress while the model loads; None is silent.
      settings: any other field of EngineConfig.

    Raises:
      CheckpointError, InvalidConfig: the model cannot be served as asked.
    """

    def __init__(
        self, model: str, *, dtype: str = "auto", reporter: Reporter | None = None, **settings: Any
    ):
        # Who calls in process waits for results anyway; the bound is for servers.
        settings.setdefault("max_queue", 2**31)
        config = EngineConfig(model=str(model), dtype=dtype, **settings)
        self._lock = threading.Lock()
        self._calls: dict[str, _Call] = {}
        parts = assemble(config, self._deliver, reporter)
        self._engine, self._intake = parts.engine, parts.intake
        self._parts = parts
        self._closed = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Reporter | None = None,
    ) -> list[Generation]:
        """Answers prompts, all in one batch.

        Args:
          prompts: one prompt or several; each is text, token ids or {"prompt_token_ids": [...]}.
          sampling_params: one for all, or one each; None takes the model's own defaults.
          progress: shown while the answers come.

        Raises:
          InvalidRequest: a prompt or parameter cannot be served; then none of them runs.
        """
        prompts = _as_list(prompts)
        tokens = [self._intake.tokens_of(p) for p in prompts]
        results = [
            Generation(_text_of(p), list(t), [Completion(index=0)])
            for p, t in zip(prompts, tokens, strict=True)
        ]
        with (progress or Silent()).phase("generating") as update:
            done = 0
            for i, chunk in self.stream_many([list(t) for t in tokens], sampling_params):
                _add(results[i], chunk)
                if chunk.finish_reason is not None:
                    done += 1
                    update(done, len(results))
        return results

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_args: Any,
    ) -> list[Generation]:
        """Answers chats: one list of {"role", "content"} messages, or several such lists."""
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self.chat_prompt(cast(Messages, chat), **template_args) for chat in chats]
        return self.generate(prompts, sampling_params)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[Chunk]:
        """Answers one prompt piece by piece. Closing the iterator early ends the request."""
        return (chunk for _, chunk in self.stream_many([prompt], sampling_params))

    def stream_chat(
        self, messages: Messages, sampling_params: SamplingParams | None = None, **args: Any
    ) -> Iterator[Chunk]:
        """`stream` for chat messages."""
        return self.stream(self.chat_prompt(messages, **args), sampling_params)

    def stream_many(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, Chunk]]:
        """Answers several prompts at once, as pieces come: (index of the prompt, chunk).

        The requests are submitted by this call, not by the first `next`.
        """
        tokens = [self._intake.tokens_of(p) for p in prompts]
        requests = self._requests(tokens, sampling_params)
        call = self._submit(requests)
        index = {r.id: i for i, r in enumerate(requests)}

        def chunks() -> Iterator[tuple[int, Chunk]]:
            try:
                for request_id, chunk in self._follow(call):
                    yield index[request_id], chunk
            finally:
                self._leave(call)

        return chunks()

    def chat_prompt(self, messages: Messages, **template_args: Any) -> list[int]:
        """Token ids of chat messages, by the model's chat template."""
        return list(self._intake.chat_tokens(messages, **template_args))

    def default_sampling_params(self, **chosen: Any) -> SamplingParams:
        """The model's own sampling defaults, with `chosen` over them."""
        return self._intake.default_sampling(**chosen)

    def stats(self) -> EngineStats:
        """What the engine has done since it started."""
        return self._engine.stats()

    @property
    def compiles_after_ready(self) -> int:
        """Programs compiled since the engine was ready; anything but 0 is an error."""
        return self._parts.runner.compiles_after_ready

    @property
    def parts(self) -> Any:
        """The engine's parts (serving/assemble.py), for tools that look inside."""
        return self._parts

    def close(self) -> None:
        """Stops the engine; unfinished requests end with Unavailable. Idempotent."""
        if not self._closed:
            self._closed = True
            self._engine.stop(drain=False)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Between callers' threads and the engine's

    def _requests(
        self,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        if sampling is None:
            sampling = self._intake.default_sampling()
        if isinstance(sampling, SamplingParams):
            sampling = [sampling] * len(prompts)
        if len(sampling) != len(prompts):
            raise InvalidRequest(
                f"sampling_params: got {len(sampling)}, must be one or as many as prompts "
                f"({len(prompts)})"
            )
        return [self._intake.request(p, s) for p, s in zip(prompts, sampling, strict=True)]

    def _submit(self, requests: Sequence[Request]) -> _Call:
        """Submits all or none."""
        if self._closed:
            raise Unavailable("this LLM is closed")
        call = _Call()
        for request in requests:
            call.answers[request.id] = self._intake.answer(request.sampling)
        with self._lock:
            self._calls.update((r.id, call) for r in requests)
        try:
            for request in requests:
                self._engine.submit(request)
        except BaseException:
            self._leave(call)
            raise
        return call

    def _follow(self, call: _Call) -> Iterator[tuple[str, Chunk]]:
        """Chunks of a call's answers as they come, until all have ended."""
        open_answers = len(call.answers)
        while open_answers:
            output = call.outputs.get()
            answer = call.answers[output.request_id]
            chunk = answer.push(output)
            if chunk is None:
                continue
            if answer.ended_by_text and output.finish_reason is None:
                self._engine.finish(output.request_id)
            open_answers -= answer.finished
            yield output.request_id, chunk

    def _leave(self, call: _Call) -> None:
        """Ends what is unfinished of a call and forgets it."""
        for request_id, answer in call.answers.items():
            if not answer.finished:
                self._engine.finish(request_id)
        with self._lock:
            for request_id in call.answers:
                self._calls.pop(request_id, None)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """On the engine's thread: hands each output to the call that waits for it."""
        with self._lock:
            for output in outputs:
                call = self._calls.get(output.request_id)
                if call is not None:
                    call.outputs.put(output)


def _add(generation: Generation, chunk: Chunk) -> None:
    generation.outputs[0].add(chunk)
    generation.cached_tokens = max(generation.cached_tokens, chunk.cached_tokens)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a list of whole numbers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(p, int) for p in prompts):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _text_of(prompt: Prompt) -> str | None:
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt", "")
        return prompt or None
    return prompt if isinstance(prompt, str) else None
