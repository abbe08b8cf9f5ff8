"""The offline face, on a tiny random model."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint
from engines import SETTINGS, at_rest, eventually, held

from quire import LLM, SamplingParams
from quire.errors import InvalidConfig, InvalidRequest, Overloaded, Unavailable
from quire.sched.request import FinishReason
from quire.serving.llm import Chunk, Completion, Logprob
from quire.serving.progress import Silent

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
PROMPTS = ["hello world", "the quick brown fox", "what is a page?"]


def greedy(**more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **more})


def ids(text: str) -> list[int]:
    return list(tiny_checkpoint.make_tokenizer().encode(text).ids)


def answer(llm: LLM, prompt: Any, sampling: SamplingParams | None = GREEDY) -> Completion:
    (result,) = llm.generate(prompt, sampling)
    (completion,) = result.outputs
    return completion


def summed(chunks: Any) -> Completion:
    completion = Completion(index=0)
    for chunk in chunks:
        completion.add(chunk)
    return completion


# Prompts and results


def test_every_form_of_a_prompt_gives_the_same_answer(llm: LLM) -> None:
    tokens = ids(PROMPTS[0])
    forms = [PROMPTS[0], tokens, {"prompt": PROMPTS[0]}, {"prompt_token_ids": tokens}]
    together = llm.generate(forms, GREEDY)
    assert len({tuple(r.outputs[0].token_ids) for r in together}) == 1
    assert [r.prompt for r in together] == [PROMPTS[0], None, PROMPTS[0], None]
    assert all(r.prompt_token_ids == tokens for r in together)
    for form in (*forms, tuple(tokens)):
        assert answer(llm, form) == together[0].outputs[0]


def test_answers_come_in_the_order_of_the_prompts_each_with_its_own_sampling(llm: LLM) -> None:
    lengths = [3, 17, 1, 9, 24, 5]  # more requests than slots, ending in another order
    prompts = [PROMPTS[i % 3] for i in range(6)]
    results = llm.generate(prompts, [greedy(max_tokens=n) for n in lengths])
    assert [r.prompt for r in results] == prompts
    assert [len(r.outputs[0].token_ids) for r in results] == lengths
    alone = {p: answer(llm, p).token_ids for p in PROMPTS}
    assert all(
        r.outputs[0].token_ids == alone[p][:n]
        for r, p, n in zip(results, prompts, lengths, strict=True)
    )


def test_no_prompts_no_answers(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_text_is_what_the_tokens_say(llm: LLM) -> None:
    result = answer(llm, PROMPTS[0])
    assert result.text == tiny_checkpoint.make_tokenizer().decode(result.token_ids)
    assert (result.finish_reason, result.stop_reason, result.index) == ("length", None, 0)
    assert result.logprobs is None and result.cumulative_logprob is None


@pytest.mark.parametrize(
    ("prompts", "sampling", "says"),
    [
        ("", None, "prompt: got no tokens"),
        ([PROMPTS[0], ""], None, r"prompt 1 of 2 \(from 0\): prompt: got no tokens"),
        ([[1], []], None, "prompt 1 of 2"),
        (5, None, "prompts: got 'int'"),
        ((p for p in PROMPTS), None, "prompts: got 'generator'"),
        (b"abc", None, "prompt: got 'bytes'"),
        ([[1], 2.5], None, "prompt 1 of 2 .*got 'float'"),
        ([1, 300], None, r"prompt\[1\]: got 300, must be whole numbers from 0 to 299"),
        ([[1], [-1]], None, r"prompt 1 of 2 .*prompt\[0\]: got -1"),
        ([[1], [1] * 5000], None, "prompt 1 of 2 .*got 5000 tokens, must be at most 4095"),
        ([[1], [1]], [GREEDY, greedy(max_tokens=4096)], "prompt 1 of 2 .*max_tokens: got 4096"),
        ([[1], [1]], [GREEDY], "sampling_params: got 1, must be one or as many as prompts"),
        ([1], [GREEDY, GREEDY], "sampling_params: got 2"),
        (
            [1],
            [{"max_tokens": 3}],
            r"sampling_params\[0\]: got {'max_tokens': 3}, must be Sampling",
        ),
        ([1], {"n": 1}, "sampling_params: got {'n': 1}, must be SamplingParams, or a list of them"),
        ([1], 5, "sampling_params: got 5, must be SamplingParams"),
    ],
)
def test_if_one_is_refused_none_runs(llm: LLM, prompts: Any, sampling: Any, says: str) -> None:
    steps = llm.stats().steps
    for call in (llm.generate, llm.stream_many):
        with pytest.raises(InvalidRequest, match=says):
            call(prompts, sampling)
    at_rest(llm.parts.engine)
    assert llm.stats().steps == steps
    assert answer(llm, PROMPTS[0]).finish_reason == "length"


# What ends an answer


def test_a_stop_string_cuts_text_and_tokens(llm: LLM) -> None:
    whole = answer(llm, PROMPTS[0], greedy(max_tokens=60))
    stop = whole.text[20:23]  # spans tokens or lies within one
    begin = whole.text.index(stop)
    result = answer(llm, PROMPTS[0], greedy(max_tokens=60, stop=["never so", stop]))
    assert (result.text, result.finish_reason) == (whole.text[:begin], "stop")
    assert result.stop_reason == stop
    # Tokens up to the one that completes it, and none that was made before anybody noticed.
    count = len(result.token_ids)
    decode = tiny_checkpoint.make_tokenizer().decode
    assert result.token_ids == whole.token_ids[:count]
    assert stop in decode(result.token_ids) and stop not in decode(result.token_ids[:-1])
    at_rest(llm.parts.engine)


def test_the_engine_hears_why_an_answer_ended(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(llm, PROMPTS[0])
    heard: list[str] = []
    finish = llm.parts.engine.finish

    def spy(request_id: str, reason: FinishReason, choice: int | None) -> None:
        heard.append(reason.value)
        finish(request_id, reason, choice)

    monkeypatch.setattr(llm.parts.engine, "finish", spy)
    answer(llm, PROMPTS[0])
    assert heard == []  # it ended the answer itself
    answer(llm, PROMPTS[0], greedy(stop=whole.text[2]))
    assert heard == ["stop"]
    llm.stream(PROMPTS[0], LONG).close()
    assert heard == ["stop", "abort"]
    at_rest(llm.parts.engine)


def test_stop_token_ids(llm: LLM) -> None:
    whole = answer(llm, PROMPTS[0])
    token = whole.token_ids[10]
    first = whole.token_ids.index(token)
    result = answer(llm, PROMPTS[0], greedy(stop_token_ids=[token]))
    assert result.token_ids == whole.token_ids[: first + 1]
    assert (result.finish_reason, result.stop_reason) == ("stop", token)
    assert result.text == tiny_checkpoint.make_tokenizer().decode(whole.token_ids[:first])


def test_min_tokens_holds_all_of_them_off(llm: LLM) -> None:
    whole = answer(llm, PROMPTS[0])
    token = whole.token_ids[2]
    late = answer(llm, PROMPTS[0], greedy(stop_token_ids=[token], min_tokens=10))
    assert len(late.token_ids) >= 10 and token not in late.token_ids[:9]
    letter = whole.text[3]
    result = answer(llm, PROMPTS[0], greedy(stop=[letter], min_tokens=10))
    assert len(result.token_ids) >= 10
    assert letter in result.text


def test_the_models_end_of_sequence_and_how_to_ignore_it(llm: LLM) -> None:
    sampling = {"temperature": 1.5, "max_tokens": 1000, "seed": 3}
    ended = answer(llm, PROMPTS[0], SamplingParams(**sampling))
    assert ended.finish_reason == "stop" and ended.stop_reason is None
    assert ended.token_ids[-1] == tiny_checkpoint.EOS
    assert tiny_checkpoint.EOS_TEXT not in ended.text
    on = answer(llm, PROMPTS[0], SamplingParams(**sampling, ignore_eos=True))
    assert on.finish_reason == "length" and len(on.token_ids) == 1000
    assert on.token_ids[: len(ended.token_ids)] == ended.token_ids
    assert tiny_checkpoint.EOS_TEXT not in on.text
    shown = answer(
        llm,
        PROMPTS[0],
        SamplingParams(**sampling, ignore_eos=True, skip_special_tokens=False),
    )
    assert tiny_checkpoint.EOS_TEXT in shown.text
    asked_for = answer(
        llm, PROMPTS[0], SamplingParams(**sampling, stop_token_ids=[tiny_checkpoint.EOS])
    )
    assert asked_for.stop_reason == tiny_checkpoint.EOS


def test_without_max_tokens_the_context_is_the_limit(llm: LLM) -> None:
    prompt = [1] * (tiny_checkpoint.CONTEXT - 40)
    result = answer(llm, prompt, LONG)
    assert (len(result.token_ids), result.finish_reason) == (40, "length")


def test_a_seed_repeats_an_answer_and_none_draws_one(llm: LLM) -> None:
    def drawn(seed: int | None) -> tuple[int, ...]:
        sampling = SamplingParams(temperature=2.0, max_tokens=24, seed=seed)
        return tuple(answer(llm, PROMPTS[0], sampling).token_ids)

    assert drawn(7) == drawn(7)
    assert len({drawn(7), drawn(8), drawn(None), drawn(None)}) == 4


# Log-probabilities


def test_logprobs_have_the_names_and_shape_of_vllms(llm: LLM) -> None:
    sampling = SamplingParams(temperature=2.0, seed=1, max_tokens=12, logprobs=3, ignore_eos=True)
    result = answer(llm, PROMPTS[0], sampling)
    assert result.logprobs is not None and len(result.logprobs) == 12
    alone = 0
    for token, at in zip(result.token_ids, result.logprobs, strict=True):
        assert isinstance(at[token], Logprob)
        others = [entry for t, entry in at.items() if t != token]
        alone += len(others) == 3  # a chosen token beyond the three likeliest
        assert len(at) == 3 + (len(others) == 3)
        ranked = sorted(at.values(), key=lambda entry: entry.rank)
        assert [e.rank for e in ranked[:3]] == [1, 2, 3]
        assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(ranked))
        assert at[token].decoded_token == tiny_checkpoint.make_tokenizer().decode(
            [token], skip_special_tokens=False
        )
    assert alone > 0
    expected = sum(at[t].logprob for t, at in zip(result.token_ids, result.logprobs, strict=True))
    assert result.cumulative_logprob == pytest.approx(expected)
    none = answer(llm, PROMPTS[0], greedy(logprobs=0))
    assert none.logprobs is not None
    assert [list(at) for at in none.logprobs] == [[t] for t in none.token_ids]


# Streams


def test_a_stream_sums_up_to_the_answer(llm: LLM) -> None:
    sampling = greedy(logprobs=2, stop=["~~~"])
    chunks = list(llm.stream(PROMPTS[0], sampling))
    assert all(isinstance(c, Chunk) for c in chunks)
    assert summed(chunks) == answer(llm, PROMPTS[0], sampling)
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_many_streams_at_once(llm: LLM) -> None:
    pieces: dict[int, list[Chunk]] = {}
    for i, chunk in llm.stream_many(PROMPTS, GREEDY):
        pieces.setdefault(i, []).append(chunk)
    whole = llm.generate(PROMPTS, GREEDY)
    assert [summed(pieces[i]) for i in range(3)] == [r.outputs[0] for r in whole]


def close_by_name(stream: Any) -> None:
    stream.close()
    stream.close()
    assert list(stream) == []


def close_by_with(stream: Any) -> None:
    with stream as same:
        next(same)


@pytest.mark.parametrize("end", [close_by_name, close_by_with, lambda stream: None])
@pytest.mark.parametrize("chunks_read", [0, 3])
def test_a_stream_left_early_frees_its_pages(
    llm: LLM, end: Callable[[Any], None], chunks_read: int
) -> None:
    with held(llm.parts) as go:
        stream = llm.stream_many(PROMPTS, LONG)
        eventually(lambda: llm.stats().pages_used > 0)
        if chunks_read:
            go.set()
        for _ in range(chunks_read):
            next(stream)
        go.set()
        end(stream)
        del stream  # where nothing else ended it, this does
        gc.collect()
    at_rest(llm.parts.engine)
    assert not llm._routes._queues


def test_closing_a_stream_wakes_who_waits_for_it(llm: LLM) -> None:
    with held(llm.parts):
        stream = llm.stream(PROMPTS[0], LONG)
        got: list[Chunk] = []
        reader = threading.Thread(target=lambda: got.extend(stream))
        reader.start()
        stream.close()
        reader.join(10)
        assert not reader.is_alive() and got == []
    at_rest(llm.parts.engine)


def test_a_full_queue_refuses_the_call_and_takes_back_what_it_submitted(folder: Path) -> None:
    with LLM(folder, **SETTINGS, max_queue=2) as llm, held(llm.parts) as go:
        with pytest.raises(Overloaded, match="queue"):
            llm.generate(PROMPTS * 4, GREEDY)
        go.set()
        at_rest(llm.parts.engine)
        assert answer(llm, PROMPTS[0]).finish_reason == "length"


# Chat


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    prompt = ids("<user>hello\n<assistant>")
    assert llm.chat_prompt(messages) == prompt
    (one,) = llm.chat(messages, GREEDY)
    assert one.prompt_token_ids == prompt
    assert one.outputs[0] == answer(llm, prompt)
    two = llm.chat([messages, [{"role": "user", "content": "bye"}]], GREEDY)
    assert two[0].outputs == one.outputs and len(two) == 2
    assert summed(llm.stream_chat(messages, GREEDY)) == one.outputs[0]
    for wrong in ("hello", [], [[]], ["hello"], {"role": "user", "content": "hello"}):
        with pytest.raises(InvalidRequest, match="messages"):
            llm.chat(wrong, GREEDY)  # type: ignore[arg-type]


# The engine's life


def test_several_threads_at_once(llm: LLM) -> None:
    alone = {p: answer(llm, p) for p in PROMPTS}
    failures: list[Any] = []

    def work(which: int) -> None:
        for turn in range(5):
            prompt = PROMPTS[(which + turn) % 3]
            if answer(llm, prompt) != alone[prompt]:
                failures.append((which, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(t.is_alive() for t in threads) and not failures
    at_rest(llm.parts.engine)


def test_close_ends_those_who_wait(folder: Path) -> None:
    llm = LLM(folder, **SETTINGS)
    ended: list[Exception] = []

    def wait() -> None:
        try:
            llm.generate(PROMPTS, LONG)
        except Exception as error:
            ended.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: llm.stats().running > 0)
    begin = time.monotonic()
    llm.close()
    llm.close()
    for thread in threads:
        thread.join(20)
    assert not any(t.is_alive() for t in threads)
    assert [type(e) for e in ended] == [Unavailable] * 3
    assert time.monotonic() - begin < 30
    with pytest.raises(Unavailable):
        llm.generate(PROMPTS[0], GREEDY)


def test_it_ends_with_the_last_reference(folder: Path) -> None:
    llm = LLM(folder, **SETTINGS)
    engine = llm.parts.engine
    stream = llm.stream(PROMPTS[0], GREEDY)
    del llm
    gc.collect()
    assert len(summed(stream).token_ids) == 24  # a stream keeps it alive
    assert engine.healthy
    del stream
    gc.collect()
    eventually(lambda: not engine.healthy)


def test_a_script_that_never_closes_it_ends_cleanly(folder: Path) -> None:
    script = (
        "import sys; from quire import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], max_num_seqs=4, max_batched_tokens=32, warmup=False)\n"
        "stream = llm.stream('hello', SamplingParams(temperature=0, max_tokens=None))\n"
        "print(len(next(stream).token_ids) > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# Defaults and settings


def test_without_sampling_params_the_models_defaults_count(
    llm: LLM, tmp_path: Path, folder: Path
) -> None:
    assert llm.default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=None)
    generation = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.8,
                  "max_new_tokens": 6, "repetition_penalty": 1.1, "typical_p": 0.5}  # fmt: skip
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    tiny_checkpoint.write(tmp_path, generation=generation)
    with LLM(tmp_path, reporter=Notes(), **SETTINGS) as own:
        expected = SamplingParams(
            temperature=0.7, top_k=5, top_p=0.8, max_tokens=6, repetition_penalty=1.1
        )
        assert own.default_sampling_params() == expected
        assert own.default_sampling_params(top_k=0, max_tokens=9).max_tokens == 9
        nearly_full = [1] * (tiny_checkpoint.CONTEXT - 4)
        assert own.default_sampling_params(nearly_full).max_tokens == 4
        results = own.generate([PROMPTS[0], nearly_full])
        assert [len(r.outputs[0].token_ids) <= n for r, n in zip(results, (6, 4), strict=True)]
    assert any("not honoured: typical_p=0.5" in note for note in notes)


def test_a_checkpoint_without_a_tokenizer_takes_token_ids(tmp_path: Path, llm: LLM) -> None:
    with LLM(tiny_checkpoint.write(tmp_path, tokenizer=False), **SETTINGS) as bare:
        tokens = ids(PROMPTS[0])
        result = answer(bare, tokens, greedy(logprobs=1))
        assert result.text == ""
        assert result.token_ids == answer(llm, tokens).token_ids
        for prompt in (PROMPTS[0], [PROMPTS[0]], {"prompt": PROMPTS[0]}):
            with pytest.raises(InvalidRequest, match=r"must be token ids.*no tokenizer\.json"):
                bare.generate(prompt)
        with pytest.raises(InvalidRequest, match=r"stop: .*no tokenizer\.json"):
            bare.generate(tokens, greedy(stop="x"))
        with pytest.raises(InvalidRequest, match="messages"):
            bare.chat([{"role": "user", "content": "x"}])
        assert answer(bare, tokens).finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs: got 0, must be at least 1"),
        ({"kv_memory": "lots"}, "kv_memory: .*'lots'"),
        ({"kv_memory": "1KiB"}, "kv_memory"),
        ({"max_model_len": 5000}, "max_model_len: got 5000, must be at most 4096"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"gpu_memory_utilization": 0.9}, "gpu_memory_utilization: no such setting.*kv_memory"),
    ],
)
def test_bad_settings_name_the_field(folder: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfig, match=says):
        LLM(folder, **settings)


def test_an_empty_name_is_not_the_current_folder() -> None:
    with pytest.raises(InvalidConfig, match="model: got '', must be a folder or a shipped name"):
        LLM("")


def test_token_ids_of_numpys_are_one_prompt(llm: LLM) -> None:
    tokens = ids(PROMPTS[0])
    assert answer(llm, list(np.array(tokens))) == answer(llm, tokens)


def test_the_collector_is_left_as_the_program_has_it(folder: Path) -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    with LLM(folder, **SETTINGS) as own:
        answer(own, PROMPTS[0])
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_cached_tokens_count_whatever_ended_the_answer(llm: LLM) -> None:
    prompt = ids("what is a page? " * 10)
    llm.generate(prompt, GREEDY)
    (by_length,) = llm.generate(prompt, GREEDY)
    first = by_length.outputs[0].text[0]
    (by_text,) = llm.generate(prompt, greedy(stop=first))
    assert by_length.cached_tokens == by_text.cached_tokens > 0
    assert by_text.outputs[0].finish_reason == "stop"


# Embeddings


def test_embeddings_come_in_order_and_leave_nothing_behind(llm: LLM) -> None:
    prompts = ["the quick brown fox", [1, 2, 3], "jumps"]
    vectors = llm.embed(prompts)
    for prompt, vector in zip(prompts, vectors, strict=True):
        assert vector.shape == (tiny_checkpoint.CONFIG["hidden_size"],)
        assert vector.dtype == np.float32 and np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(llm.embed(prompt), [vector], atol=1e-5)
    assert len({tuple(v) for v in vectors}) == 3
    assert llm.embed([]) == []
    at_rest(llm.parts.engine)


def test_an_embedding_that_cannot_be_made_is_refused_by_place(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt 1 of 2 .*prompt\[0\]: got 99999"):
        llm.embed([[1], [99999]])
