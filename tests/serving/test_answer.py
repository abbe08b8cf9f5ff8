"""Answer: engine outputs in, chunks out."""

from __future__ import annotations

import pytest

from quire.checkpoints.detokenize import StreamDecoder
from quire.sched.request import FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from quire.serving.answer import Answer, Chunk, Completion, Logprob


class Letters(StreamDecoder):
    """Token 0 is a, 1 is b, …"""

    def step(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def flush(self) -> str:
        return "!"


def make(**sampling: object) -> Answer:
    return Answer(SamplingParams(**sampling), Letters(), lambda token: f"<{token}>")  # type: ignore[arg-type]


def out(*tokens: int, **more: object) -> RequestOutput:
    return RequestOutput("r", tokens, **more)  # type: ignore[arg-type]


def entry(token: int, *top: int) -> TokenLogprobs:
    return TokenLogprobs(
        token=token, logprob=-1.5, rank=7, top=tuple((t, -0.1 * i) for i, t in enumerate(top))
    )


def test_chunks_until_the_last() -> None:
    answer = make()
    assert answer.push(out(0, 1)) == Chunk("ab", [0, 1])
    last = answer.push(out(2, finish_reason=FinishReason.LENGTH, cached_tokens=32))
    assert last == Chunk("c!", [2], finish_reason="length", cached_tokens=32)
    assert answer.finished and not answer.ended_by_text


def test_a_stop_string_cuts_text_and_tokens_and_the_rest_is_dropped() -> None:
    answer = make(stop=["cd"])
    assert answer.push(out(0, 1, 2)) == Chunk("ab", [0, 1, 2])
    last = answer.push(out(3, 4, 5, cached_tokens=16))
    assert last == Chunk("", [3], finish_reason="stop", stop_reason="cd", cached_tokens=16)
    assert answer.finished and answer.ended_by_text
    assert answer.push(out(6)) is None
    assert answer.push(out(finish_reason=FinishReason.ABORT)) is None


def test_a_stop_string_wins_over_the_engines_own_reason_at_the_same_token() -> None:
    answer = make(stop="b")
    last = answer.push(out(0, 1, finish_reason=FinishReason.LENGTH))
    assert last == Chunk("a", [0, 1], finish_reason="stop", stop_reason="b")


def test_held_text_comes_when_the_answer_ends_otherwise() -> None:
    answer = make(stop=["abc"])
    assert answer.push(out(0, 1)) == Chunk("", [0, 1])
    last = answer.push(out(finish_reason=FinishReason.LENGTH))
    assert last == Chunk("ab!", [], finish_reason="length")


@pytest.mark.parametrize(("asked", "reason"), [((), None), ((9,), None), ((2, 9), 2)])
def test_a_stop_id_has_no_text_and_is_the_reason_if_asked_for(
    asked: tuple[int, ...], reason: int | None
) -> None:
    answer = make(stop_token_ids=asked)
    last = answer.push(out(0, 2, finish_reason=FinishReason.STOP, stop_token=2))
    assert last == Chunk("a!", [0, 2], finish_reason="stop", stop_reason=reason)


def test_log_probabilities_have_the_chosen_token_and_the_alternatives() -> None:
    answer = make(logprobs=2, stop="b")
    chunk = answer.push(out(0, 1, 2, logprobs=(entry(0, 5, 0), entry(1, 5, 6), entry(2, 2, 3))))
    assert chunk is not None and chunk.logprobs is not None
    first, second = chunk.logprobs  # none for the token after the stop string
    assert first == {5: Logprob(0.0, 1, "<5>"), 0: Logprob(-1.5, 7, "<0>")}
    assert list(second) == [5, 6, 1]


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    answer = Answer(SamplingParams(), None, lambda token: "")
    last = answer.push(out(1, 2, finish_reason=FinishReason.LENGTH))
    assert last == Chunk("", [1, 2], finish_reason="length")


def test_best_of_alone_gets_sums_and_no_positions() -> None:
    chunk = make(best_of=2, stop="b").push(out(0, 1, 2, logprobs=(entry(0), entry(1), entry(2))))
    assert chunk is not None and (chunk.logprobs, chunk.sum_logprob) == (None, -3.0)


def test_prompt_log_probabilities_come_as_they_are() -> None:
    scores = (None, entry(3, 4))
    chunk = make(prompt_logprobs=1).push(out(0, choice=2, prompt_logprobs=scores))
    assert chunk is not None and chunk.index == 2 and chunk.logprobs is None
    assert chunk.prompt_logprobs == [
        None,
        {4: Logprob(0.0, 1, "<4>"), 3: Logprob(-1.5, 7, "<3>")},
    ]


def test_a_completion_sums_chunks_up() -> None:
    answer, completion = make(logprobs=0), Completion(index=0)
    for output in (
        out(0, logprobs=(entry(0),)),
        out(1, logprobs=(entry(1),)),
        out(2, logprobs=(entry(2),), finish_reason=FinishReason.STOP, stop_token=2),
    ):
        chunk = answer.push(output)
        assert chunk is not None
        completion.add(chunk)
    assert (completion.text, completion.token_ids) == ("ab!", [0, 1, 2])
    assert completion.logprobs is not None
    assert [list(at) for at in completion.logprobs] == [[0], [1], [2]]
    assert completion.cumulative_logprob == pytest.approx(-4.5)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
