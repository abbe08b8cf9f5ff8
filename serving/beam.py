"""Beam search over the engine: `LLM.beam_search`.

Each step submits the live beams of all prompts as requests of one token, with log-probabilities of
the likeliest continuations. The prefix index finds the pages that beams share and those of their
own past, so a step computes less than a page a beam.

The search is transformers' (`generate(num_beams=...)`, no sampling): in each step the continuations
of all beams are ranked by the sum of their tokens' log-probabilities. Those among the first
`beam_width` that end (by an end-of-sequence id, or at max_tokens) become answers, scored by
sum / length ** length_penalty; the best `beam_width` others live on. It ends when the best live
beam, scored at its length, is no better than the worst of `beam_width` answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import InvalidRequest, invalid
from ..model.plan import MAX_LOGPROBS
from ..sched.checks import number, whole
from ..sched.request import Request, SamplingParams
from .answer import Chunk
from .choices import Choices
from .intake import Intake

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2

Submit = Callable[[Sequence[tuple[Request, Choices]]], Iterable[tuple[int, Chunk]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How beam search goes. Checked on construction.

    Attributes:
      beam_width: beams that live at once, and answers returned; 1 to 10.
      max_tokens: output tokens at most.
      length_penalty: answers are ranked by sum of log-probabilities / length ** length_penalty;
        above 0 favours long ones, 0 compares the sums. In [-10, 10].
      early_stopping: end as soon as there are `beam_width` answers.
      ignore_eos: no end-of-sequence id ends a beam.
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    early_stopping: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "beam_width", whole("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH))
        set_(self, "max_tokens", whole("max_tokens", self.max_tokens, 1, 2**31 - 1))
        set_(self, "length_penalty", number("length_penalty", self.length_penalty, -10.0, 10.0))
        for name in ("early_stopping", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise invalid(name, getattr(self, name), "true or false")


@dataclass(frozen=True, slots=True)
class Beam:
    """One answer.

    Attributes:
      text: of the tokens, without the end-of-sequence id.
      token_ids: output tokens, an end-of-sequence id included.
      cumulative_logprob: sum of the tokens' log-probabilities.
      score: what it was ranked by.
      finish_reason: "stop" or "length".
    """

    text: str
    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: str


@dataclass(slots=True)
class BeamSearchResult:
    """The answers to one prompt, best first."""

    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[Beam] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Path:
    """Output tokens and the sum of their log-probabilities."""

    tokens: tuple[int, ...] = ()
    total: float = 0.0


class BeamSearch:
    """The search for one prompt. Pure: told what may follow each live beam, it takes a step.

    Attributes:
      live: beams to go on with, best first; empty at the end.
      answers: (score, path, finish reason), best first.
    """

    def __init__(self, params: BeamSearchParams, eos_ids: Iterable[int]):
        self._params = params
        self._eos_ids = frozenset(() if params.ignore_eos else eos_ids)
        self.live = [_Path()]
        self.answers: list[tuple[float, _Path, str]] = []
        if params.beam_width + len(self._eos_ids) > MAX_LOGPROBS:
            ids = len(self._eos_ids)
            raise invalid(
                "beam_width",
                params.beam_width,
                f"at most {MAX_LOGPROBS - ids}, because the model has {ids} end-of-sequence ids",
            )

    @property
    def alternatives(self) -> int:
        """Continuations of a beam that can matter: its best `beam_width`, whichever of the likelier
        ones end it."""
        return self._params.beam_width + len(self._eos_ids)

    def step(self, continuations: Sequence[Iterable[tuple[int, float]]]) -> None:
        """Takes in (token, log-probability) pairs for each live beam."""
        width, length = self._params.beam_width, len(self.live[0].tokens) + 1
        paths = [
            _Path((*path.tokens, token), path.total + logprob)
            for path, nexts in zip(self.live, continuations, strict=True)
            for token, logprob in nexts
        ]
        paths.sort(key=lambda path: path.total, reverse=True)
        last = length == self._params.max_tokens
        self.live = []
        for rank, path in enumerate(paths):
            by_eos = path.tokens[-1] in self._eos_ids
            if not (by_eos or last):
                self.live.append(path)
            elif rank < width:
                reason = "stop" if by_eos else "length"
                self.answers.append((self._score(path), path, reason))
        self.answers.sort(key=lambda answer: answer[0], reverse=True)
        del self.answers[width:], self.live[width:]
        if self._is_over():
            self.live = []

    def _is_over(self) -> bool:
        if len(self.answers) < self._params.beam_width or not self.live:
            return False
        return self._params.early_stopping or self._score(self.live[0]) <= self.answers[-1][0]

    def _score(self, path: _Path) -> float:
        return float(path.total / len(path.tokens) ** self._params.length_penalty)


def search(
    intake: Intake,
    submit: Submit,
    prompts: Sequence[tuple[int, ...]],
    params: BeamSearchParams,
) -> list[list[Beam]]:
    """The answers to each prompt, best first.

    Args:
      intake: makes requests.
      submit: (index of the request, chunk) of requests submitted together.
      prompts: token ids.
      params: of all of them.
    """
    searches = [BeamSearch(params, intake.eos_ids) for _ in prompts]
    while any(each.live for each in searches):
        beams = [(i, path) for i, each in enumerate(searches) for path in each.live]
        found: list[list[tuple[int, float]]] = [[] for _ in beams]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=searches[0].alternatives
        )
        requests = [
            (intake.request((*prompts[i], *path.tokens), sampling), intake.choices(sampling))
            for i, path in beams
        ]
        for at, chunk in submit(requests):
            for position in chunk.logprobs or ():
                found[at] = [(token, entry.logprob) for token, entry in position.items()]
        for i, each in enumerate(searches):
            if each.live:
                each.step([nexts for (j, _), nexts in zip(beams, found, strict=True) if j == i])
    return [[_beam(intake, *answer) for answer in each.answers] for each in searches]


def check(intake: Intake, prompt: tuple[int, ...], params: BeamSearchParams) -> None:
    """Raises InvalidRequest if this search cannot run to its end."""
    if not isinstance(params, BeamSearchParams):
        raise InvalidRequest(f"params: got {type(params).__name__}, must be BeamSearchParams")
    BeamSearch(params, intake.eos_ids)
    intake.request(prompt, SamplingParams(temperature=0.0, max_tokens=params.max_tokens))


def _beam(intake: Intake, score: float, path: _Path, reason: str) -> Beam:
    tokens = list(path.tokens)
    shown = tokens[:-1] if reason == "stop" else tokens
    return Beam(intake.text_of(shown), tokens, path.total, score, reason)
