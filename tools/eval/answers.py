"""What the model makes of the questions: its answers, and how likely it found the right ones.

Called by eval_command.py with an engine that is ready; everything goes through `LLM.generate`, in
batch, as any caller's prompts would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ...sched.sampling_params import SamplingParams
from ...serving.progress import Reporter, Update

if TYPE_CHECKING:
    from ...serving.llm import Generation
    from .prompts import Question

SLICE = 1 << 17
"""Prompt tokens scored in one call: their log-probabilities are Python objects until summed up."""


class Engine(Protocol):
    """The part of `LLM` that is used here."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Sequence[SamplingParams],
        *,
        progress: Reporter,
        return_errors: bool,
    ) -> list[Generation]: ...


@dataclass(slots=True)
class Outcome:
    """What became of one question.

    Attributes:
      right: whether the answer passed the example's check.
      tokens: the answer's ids, its end included.
      cut_off: it was as long as it might get, which no right answer of a task needs.
      error: why there is no answer, if the engine failed; counts as wrong.
      nll: minus the log-likelihood of the right answer, in nats; None where it was not scored.
    """

    right: bool
    tokens: list[int] = field(default_factory=list)
    cut_off: bool = False
    error: str = ""
    nll: float | None = None


def most_tokens(question: Question) -> int:
    """What an answer may have by default: twice what the right one has, and some more."""
    return 2 * question.room + 64


def answer(
    engine: Engine,
    questions: Sequence[Question],
    *,
    context: int,
    reporter: Reporter,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Outcome]:
    """Asks all questions at once.

    Args:
      context: the most tokens that prompt and answer may have together.
      max_tokens: of an answer; None for `most_tokens`. Both give way where the context has less
        room.
      seed: of sampled answers; question i draws from seed + i.
    """
    sampling = [
        SamplingParams(
            temperature=temperature,
            seed=seed + at,
            max_tokens=min(max_tokens or most_tokens(q), context - len(q.prompt)),
            skip_special_tokens=False,  # they may frame thoughts and tool calls
        )
        for at, q in enumerate(questions)
    ]
    prompts = [q.prompt for q in questions]
    results = engine.generate(prompts, sampling, progress=reporter, return_errors=True)
    return [_outcome(q, result) for q, result in zip(questions, results, strict=True)]


def _outcome(question: Question, result: Generation) -> Outcome:
    if result.error is not None:
        return Outcome(False, error=str(result.error))
    said = result.outputs[0]
    right = question.example.check(said.text)
    return Outcome(right, said.token_ids, cut_off=said.finish_reason == "length")


def score(
    engine: Engine, questions: Sequence[Question], outcomes: Sequence[Outcome], reporter: Reporter
) -> None:
    """Notes in the outcomes how likely the model finds the right answers."""
    texts = [(q.prompt, q.right) for q in questions]
    for outcome, entries in zip(outcomes, logprobs_after(engine, texts, reporter), strict=True):
        if entries:
            outcome.nll = -sum(entry[0] for entry in entries)


def logprobs_after(
    engine: Engine, texts: Sequence[tuple[Sequence[int], Sequence[int]]], reporter: Reporter
) -> Iterator[list[tuple[float, int]]]:
    """For each (prompt, text after it): (log-probability, rank) of each token of the text.

    Empty for an empty text, and where the engine failed.
    """
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    with reporter.phase("scoring") as update:
        done, total = 0, sum(bool(text) for _, text in texts)
        for part in _slices(texts):
            prompts = [[*prompt, *text] for prompt, text in part if text]
            results = iter(
                engine.generate(
                    prompts,
                    [sampling] * len(prompts),
                    progress=_Within(update, done, total),
                    return_errors=True,
                )
            )
            done += len(prompts)
            for _, text in part:
                yield _tail(next(results), text) if text else []


def _tail(result: Generation, text: Sequence[int]) -> list[tuple[float, int]]:
    if result.error is not None or result.prompt_logprobs is None:
        return []
    found = []
    for token, at in zip(text, result.prompt_logprobs[-len(text) :], strict=True):
        assert at is not None  # only a prompt's first token has none
        found.append((at[token].logprob, at[token].rank))
    return found


def _slices(
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> Iterator[list[tuple[Sequence[int], Sequence[int]]]]:
    part: list[tuple[Sequence[int], Sequence[int]]] = []
    size = 0
    for prompt, text in texts:
        part.append((prompt, text))
        size += len(prompt) + len(text)
        if size >= SLICE:
            yield part
            part, size = [], 0
    if part:
        yield part


class _Within:
    """Shows the progress of a part as that of the whole."""

    began: float | None = None

    def __init__(self, update: Update, done: int, total: int):
        self._update, self._done, self._total = update, done, total

    @contextmanager
    def phase(self, name: str) -> Iterator[Update]:
        yield lambda done, total: self._update(self._done + done, self._total)

    def note(self, text: str) -> None:
        pass
