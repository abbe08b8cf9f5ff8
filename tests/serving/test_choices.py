"""Choices: several answers to one request."""

from __future__ import annotations

import pytest
from test_answer import Letters

from quire.errors import Internal, InvalidRequest
from quire.sched.request import FinishReason, RequestOutput, SamplingParams
from quire.serving.answer import Answer, Chunk, Completion
from quire.serving.choices import Choices, best, check_streamable


def make(**sampling: object) -> Choices:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return Choices(params, lambda: Answer(params, Letters(), str))


def out(*tokens: int, choice: int = 0, **more: object) -> RequestOutput:
    return RequestOutput("r", tokens, choice=choice, **more)  # type: ignore[arg-type]


def test_each_output_goes_to_its_answer_until_all_have_ended() -> None:
    choices = make(n=2)
    assert choices.push(out(0)) == Chunk("a", [0])
    assert choices.push(out(1, choice=1)) == Chunk("b", [1], index=1)
    last = choices.push(out(2, choice=1, finish_reason=FinishReason.LENGTH))
    assert last == Chunk("c!", [2], finish_reason="length", index=1)
    assert not choices.finished
    choices.push(out(finish_reason=FinishReason.LENGTH))
    assert choices.finished and choices.push(out(3)) is None


def test_the_engine_is_told_only_what_it_cannot_know_and_once() -> None:
    by_text = make(n=3, stop="b")
    by_text.push(out(1, choice=1))
    assert list(by_text.news()) == [(FinishReason.STOP, 1)]
    by_text.push(out(1, choice=2, finish_reason=FinishReason.LENGTH))  # it knows
    assert list(by_text.news()) == []
    assert list(by_text.news(leaving=True)) == [(FinishReason.ABORT, None)]
    assert list(by_text.news(leaving=True)) == []

    ended = make()
    ended.push(out(0, finish_reason=FinishReason.LENGTH))
    assert list(ended.news(leaving=True)) == []
    by_text = make(stop="b")
    by_text.push(out(1))
    assert list(by_text.news(leaving=True)) == [(FinishReason.STOP, 0)]


def test_an_error_is_raised_once_and_ends_all_whichever_has_ended() -> None:
    choices = make(n=2)
    choices.push(out(0, finish_reason=FinishReason.LENGTH))
    with pytest.raises(Internal, match="broken"):
        choices.push(out(finish_reason=FinishReason.ERROR, error=Internal("broken")))
    assert choices.finished and choices.push(out(1, choice=1)) is None
    assert list(choices.news(leaving=True)) == []


def completions(*sums: float) -> list[Completion]:
    return [
        Completion(i, token_ids=[0] * (9 - i), cumulative_logprob=s) for i, s in enumerate(sums)
    ]


def test_the_best_have_the_highest_sums_whatever_their_length() -> None:
    made = completions(-3.0, -1.0, -2.0, -1.0)
    chosen = best(made, SamplingParams(n=3, best_of=4))
    assert [(c.index, c.cumulative_logprob, len(c.token_ids)) for c in chosen] == [
        (0, -1.0, 8),
        (1, -1.0, 6),
        (2, -2.0, 7),
    ]
    made = completions(-3.0, -1.0)
    assert best(made, SamplingParams(n=2, best_of=2)) == completions(-3.0, -1.0)


def test_what_is_ranked_cannot_be_streamed() -> None:
    check_streamable(SamplingParams(n=2, best_of=2))
    with pytest.raises(InvalidRequest, match=r"best_of: got 3, must be n \(2\), or none"):
        check_streamable(SamplingParams(n=2, best_of=3))
