"""Several answers to one prompt, what reshapes them, and log-probabilities of prompts, offline and
through gRPC, on a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import tiny_checkpoint
from engines import SETTINGS, at_rest
from running import Running

from quire import LLM, SamplingParams
from quire.errors import Internal, InvalidRequest
from quire.protos.v1 import generation_pb2 as pb
from quire.serving.llm import Completion, Generation, _raise_first

PROMPT = "the quick brown fox jumps over the lazy dog"


def sampled(**more: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 1.0, "seed": 5, "max_tokens": 12, "ignore_eos": True, **more}
    )


def greedy(**more: Any) -> SamplingParams:
    return sampled(**{"temperature": 0.0, **more})


def one(llm: LLM, sampling: SamplingParams, prompt: Any = PROMPT) -> Generation:
    (result,) = llm.generate(prompt, sampling)
    return result


def tokens_of(result: Generation) -> list[list[int]]:
    return [output.token_ids for output in result.outputs]


# Several answers


def test_n_answers_differ_and_the_first_is_the_only_one_of_n_1(llm: LLM) -> None:
    alone, several = one(llm, sampled()), one(llm, sampled(n=6))  # more than slots
    assert [output.index for output in several.outputs] == list(range(6))
    answers = tokens_of(several)
    assert answers[:1] == tokens_of(alone) and len(set(map(tuple, answers))) == 6
    assert (several.completion_tokens, alone.completion_tokens) == (72, 12)
    assert tokens_of(one(llm, sampled(n=6))) == answers  # the seed makes all of them repeatable
    at_rest(llm.parts.engine)


def test_greedy_answers_are_equal(llm: LLM) -> None:
    answers = one(llm, greedy(n=3)).outputs
    assert answers[0].text == answers[1].text == answers[2].text


def test_each_answer_ends_by_itself(llm: LLM) -> None:
    whole = one(llm, sampled(n=3, max_tokens=40))
    letter = next(
        c for c in whole.outputs[1].text if c.isalpha() and c not in whole.outputs[0].text
    )
    cut = one(llm, sampled(n=3, max_tokens=40, stop=letter))
    for before, after in zip(whole.outputs, cut.outputs, strict=True):
        assert after.text == before.text.split(letter)[0]
        assert after.finish_reason == ("stop" if letter in before.text else "length")
    assert cut.outputs[1].finish_reason == "stop" != cut.outputs[0].finish_reason
    at_rest(llm.parts.engine)


def test_best_of_returns_those_with_the_highest_sums(llm: LLM) -> None:
    made = one(llm, sampled(n=4, logprobs=0))
    ranked = sorted(made.outputs, key=lambda o: o.cumulative_logprob or 0, reverse=True)
    chosen = one(llm, sampled(n=2, best_of=4))
    assert [o.index for o in chosen.outputs] == [0, 1]
    assert tokens_of(chosen) == [o.token_ids for o in ranked[:2]]
    for got, expected in zip(chosen.outputs, ranked, strict=False):
        assert got.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-5)
        assert got.logprobs is None
    assert chosen.completion_tokens == 48


def test_a_stream_says_whose_each_piece_is(llm: LLM) -> None:
    expected = one(llm, sampled(n=3))
    answers = [Completion(index) for index in range(3)]
    with llm.stream(PROMPT, sampled(n=3)) as stream:
        for chunk in stream:
            answers[chunk.index].add(chunk)
    assert answers == expected.outputs
    for call in (llm.stream, lambda p, s: llm.stream_many([p], s)):
        with pytest.raises(InvalidRequest, match=r"best_of: got 2, must be n \(1\), or none, in a"):
            call(PROMPT, sampled(best_of=2))


# Failures


@pytest.fixture
def failing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """Rows of prompts of five tokens come back not finite."""
    launch, collect = llm.parts.runner.launch, llm.parts.runner.collect
    bad: dict[int, list[int]] = {}

    def spy(plan: Any) -> Any:
        handle = launch(plan)
        rows = [row for row, count in enumerate(plan.counts) if count == 5]
        bad[id(handle)] = rows
        return handle

    def spoil(handle: Any) -> Any:
        outputs = collect(handle)
        outputs.not_finite.flags.writeable = True
        outputs.not_finite[bad.pop(id(handle))] = True
        return outputs

    monkeypatch.setattr(llm.parts.runner, "launch", spy)
    monkeypatch.setattr(llm.parts.runner, "collect", spoil)
    return llm


def test_a_request_that_fails_does_not_cost_the_others_their_answers(failing: LLM) -> None:
    prompts = [[9, 8, 7], [1, 2, 3, 4, 5], [7, 8, 9]]
    with pytest.raises(Internal, match="inf or NaN") as caught:
        failing.generate(prompts, greedy(n=2))
    assert "prompt 1 of 3" in caught.value.__notes__[0]
    results = caught.value.results
    assert [r.error is None for r in results] == [True, False, True]
    again = failing.generate(prompts, greedy(n=2, best_of=2), return_errors=True)
    for before, after in zip(results, again, strict=True):
        assert before.outputs == after.outputs
        assert all(o.finish_reason == (None if after.error else "length") for o in after.outputs)
    (lost,) = failing.generate(prompts[1], sampled(best_of=3), return_errors=True)
    assert len(lost.outputs) == 3 and isinstance(lost.error, Internal)
    with pytest.raises(Internal), failing.stream_many(prompts, greedy()) as stream:
        list(stream)
    at_rest(failing.parts.engine)


def test_what_is_raised_says_what_caused_it() -> None:
    error = Internal("request 'a': the engine failed; its log says why")
    error.__cause__ = KeyError("a bug")
    with pytest.raises(Internal, match="the engine failed") as caught:
        _raise_first([Generation(None, [1], error=error)])
    assert isinstance(caught.value.__cause__, KeyError) and caught.value.results
    assert error.results == ()


# Controls


def test_allowed_token_ids(llm: LLM) -> None:
    result = one(llm, sampled(n=2, allowed_token_ids=[70, 71, 72], max_tokens=30))
    assert {token for tokens in tokens_of(result) for token in tokens} == {70, 71, 72}


def test_logit_bias(llm: LLM) -> None:
    assert tokens_of(one(llm, greedy(logit_bias={77: 100.0}, max_tokens=4))) == [[77] * 4]
    usual = tokens_of(one(llm, greedy()))[0]
    unlike = tokens_of(one(llm, greedy(logit_bias={usual[0]: -100.0})))[0]
    assert usual[0] not in unlike


def test_bad_words_are_texts_or_token_ids(llm: LLM) -> None:
    usual = one(llm, greedy(max_tokens=24)).outputs[0]
    word = usual.text.strip()[:3]
    assert word in usual.text
    without = one(llm, greedy(max_tokens=24, bad_words=[word])).outputs[0]
    assert without.token_ids != usual.token_ids
    token = usual.token_ids[3]
    ids = one(llm, greedy(max_tokens=24, bad_words=[[token]])).outputs[0].token_ids
    assert token not in ids


def test_penalties(llm: LLM) -> None:
    usual = tokens_of(one(llm, greedy(max_tokens=60)))[0]
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0},
                    {"repetition_penalty": 3.0}):  # fmt: skip
        varied = tokens_of(one(llm, greedy(max_tokens=60, **penalty)))[0]
        assert len(set(varied)) > len(set(usual)), penalty


# Log-probabilities of prompts


def test_a_prompt_is_scored_as_the_answer_it_was(llm: LLM) -> None:
    said = one(llm, greedy(max_tokens=40, logprobs=3))
    assert said.outputs[0].logprobs is not None
    whole = [*said.prompt_token_ids, *said.outputs[0].token_ids]
    result = one(llm, greedy(max_tokens=1, prompt_logprobs=3, n=2), whole)
    assert result.prompt_logprobs is not None and result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(whole)
    assert all(token in at for token, at in zip(whole[1:], result.prompt_logprobs[1:], strict=True))
    scored = result.prompt_logprobs[len(said.prompt_token_ids) :]
    for at, expected in zip(scored, said.outputs[0].logprobs, strict=True):
        assert at is not None and list(at) == list(expected)
        for token, entry in at.items():
            assert entry.logprob == pytest.approx(expected[token].logprob, abs=1e-4)
            assert entry.rank == expected[token].rank


# Through gRPC


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    with Running(folder) as running:
        yield running.open()


def ask(**sampling: Any) -> pb.GenerateRequest:
    given = {"temperature": 1.0, "seed": 5, "max_tokens": 12, "ignore_eos": True, **sampling}
    return pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(**given))


def test_generate_gives_all_answers_and_counts_the_prompt_once(served: Running, llm: LLM) -> None:
    response = served.stub.Generate(ask(n=3, prompt_logprobs=0), timeout=60)
    expected = one(llm, sampled(n=3))
    assert [c.text for c in response.choices] == [o.text for o in expected.outputs]
    assert [c.index for c in response.choices] == [0, 1, 2]
    assert (response.text, len(response.prompt_logprobs)) == (
        expected.outputs[0].text,
        len(expected.prompt_token_ids),
    )
    assert response.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert response.usage.completion_tokens == 36
    best = served.stub.Generate(ask(best_of=3), timeout=60)
    (chosen,) = one(llm, sampled(best_of=3)).outputs
    assert (best.text, len(best.choices)) == (chosen.text, 0)
    assert best.cumulative_logprob == pytest.approx(chosen.cumulative_logprob, abs=1e-4)
    assert best.usage.completion_tokens == 36


def test_a_stream_of_several_answers(served: Running, llm: LLM) -> None:
    texts, ends, usages = {}, {}, []
    for chunk in served.stub.StreamGenerate(ask(n=3), timeout=60):
        texts[chunk.index] = texts.get(chunk.index, "") + chunk.text
        if chunk.finish_reason:
            assert chunk.index not in ends
            ends[chunk.index] = chunk.finish_reason
        usages.append(chunk.HasField("usage"))
    assert texts == {o.index: o.text for o in one(llm, sampled(n=3)).outputs}
    assert set(ends.values()) == {pb.FINISH_REASON_LENGTH} and len(ends) == 3
    assert usages == [False] * (len(usages) - 1) + [True]
    with pytest.raises(grpc.RpcError) as caught:
        list(served.stub.StreamGenerate(ask(best_of=2), timeout=60))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    at_rest(served.engine)


def test_more_tokens_a_dispatch_give_the_same_answers(folder: Path, llm: LLM) -> None:
    with LLM(folder, decode_steps=4, **SETTINGS) as fast:
        for sampling in (greedy(), sampled(n=3), sampled(stop="e", max_tokens=40)):
            assert one(fast, sampling).outputs == one(llm, sampling).outputs
        assert fast.stats().steps < fast.stats().output_tokens / 2
        at_rest(fast.parts.engine)


def test_the_tiny_model_has_what_these_tests_need() -> None:
    assert len(tiny_checkpoint.make_tokenizer().encode(PROMPT).ids) > SETTINGS["page_size"] / 2
