"""Stand-ins for tests of `quire eval`: tasks of a few lines, and an engine that answers as told."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tiny_checkpoint

from quire.errors import Internal
from quire.sched.sampling_params import SamplingParams
from quire.serving.answer import Completion, Logprob
from quire.serving.llm import Generation
from quire.serving.progress import Reporter
from quire.tools.eval.prompts import Question
from quire.tools.tasks.example import Example, exactly
from quire.tools.tasks.registry import Task

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<eos>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
"""Hears of tools and of thinking, and ends turns with the model's end of sequence."""

TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


def double(rng: random.Random, **more: Any) -> Example:
    number = rng.randrange(10_000)
    asked = {"role": "user", "content": f"twice {number}"}
    answer = {"role": "assistant", "content": str(2 * number)}
    if more.get("thinking"):
        answer["reasoning_content"] = "hm"
    check = partial(exactly, str(2 * number))
    level = 1 + number % 2
    return Example("double", f"double {number}", (asked, answer), check, difficulty=level, **more)


def task(name: str = "double", generate: Callable[..., Example] = double, **more: Any) -> Task:
    return Task(name, generate, 1.0, "doubles", 10_000, **more)


def question(answer: str = "4", prompt: Sequence[int] = (5, 6), **more: Any) -> Question:
    """One whose right answer's tokens are its characters."""
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": answer})
    example = Example("t", answer, messages, partial(exactly, answer), **more)
    return Question(example, tuple(prompt), tuple(map(ord, answer)), len(answer))


def write(folder: Path, template: str = TEMPLATE) -> Path:
    """The tiny checkpoint with a chat template."""
    tiny_checkpoint.write(folder)
    fields = {"eos_token": tiny_checkpoint.EOS_TEXT, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


class FakeEngine:
    """Answers each prompt as `said` tells; None makes the request fail. The log-probability of
    token t after position p of a prompt is -(t + p / 1000), and its rank t % 3 + 1."""

    def __init__(self, said: Callable[[tuple[int, ...]], str | None] = lambda prompt: "4"):
        self.said = said
        self.sampling: list[SamplingParams] = []
        self.calls: list[int] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Sequence[SamplingParams],
        *,
        progress: Reporter,
        return_errors: bool,
    ) -> list[Generation]:
        assert return_errors
        self.calls.append(len(prompts))
        self.sampling += sampling_params
        results = []
        with progress.phase("generating") as update:
            pairs = zip(prompts, sampling_params, strict=True)
            for at, (prompt, sampling) in enumerate(pairs, 1):
                results.append(self._one(list(prompt), sampling))
                update(at, len(prompts))
        return results

    def _one(self, prompt: list[int], sampling: SamplingParams) -> Generation:
        text = self.said(tuple(prompt))
        if text is None:
            return Generation(None, prompt, error=Internal("not finite"))
        ids = list(map(ord, text))
        assert sampling.max_tokens is not None
        cut = len(ids) > sampling.max_tokens
        reason = "length" if cut else "stop"
        kept = ids[: sampling.max_tokens]
        answer = Completion(0, "".join(map(chr, kept)), kept, finish_reason=reason)
        result = Generation(None, prompt, [answer])
        if sampling.prompt_logprobs is not None:
            result.prompt_logprobs = [
                {token: Logprob(-(token + at / 1000), token % 3 + 1, "")} if at else None
                for at, token in enumerate(prompt)
            ]
        return result
