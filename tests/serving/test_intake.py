"""Intake: prompts, defaults, limits, ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint
from engines import SETTINGS

from quire import EngineConfig, SamplingParams
from quire.checkpoints.folder import Checkpoint
from quire.checkpoints.generation_config import GenerationConfig
from quire.checkpoints.tokenizer import Tokenizer
from quire.errors import CheckpointError, InvalidRequest
from quire.model.mesh import default_mesh
from quire.serving.assemble import make_startup
from quire.serving.intake import Intake, Labels

CONTEXT = tiny_checkpoint.CONTEXT


def intake_of(folder: Path, **generation: Any) -> Intake:
    checkpoint = Checkpoint.open(folder)
    if generation:
        checkpoint = dataclasses.replace(checkpoint, generation=GenerationConfig(**generation))
    config = EngineConfig(model=str(folder), **SETTINGS)
    sizes = make_startup(config, checkpoint, default_mesh()).sizes()
    return Intake(checkpoint, sizes.spec)


@pytest.fixture(scope="session")
def intake(folder: Path) -> Intake:
    return intake_of(folder)


@pytest.fixture(scope="session")
def without_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Intake:
    return intake_of(tiny_checkpoint.write(tmp_path_factory.mktemp("bare"), tokenizer=False))


def test_a_prompt_in_every_form(intake: Intake) -> None:
    ids = tuple(tiny_checkpoint.make_tokenizer().encode("hello world").ids)
    for prompt in ("hello world", {"prompt": "hello world"}, list(ids), ids):
        assert intake.tokens_of(prompt) == ids
    assert intake.tokens_of({"prompt_token_ids": list(ids)}) == ids


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "prompt: got no tokens"),
        ([], "prompt: got no tokens"),
        ({"prompt_token_ids": []}, "prompt: got no tokens"),
        ({"prompt": [1]}, "prompt: got "),
        ({"prompt_token_ids": "1,2"}, "prompt: got "),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt: got "),
        ({"text": "a"}, "prompt: got {'text': 'str'}"),
        ({}, "prompt: got {}"),
        (b"abc", "prompt: got 'bytes'"),
        (7, "prompt: got 'int'"),
        (None, "prompt: got 'NoneType'"),
        ([1, "2"], r"prompt\[1\]: got '2'"),
        ([True], r"prompt\[0\]: got True"),
        ([1, 2.0], r"prompt\[1\]: got 2.0"),
        ("a\ud800", r"prompt: got 'a\\ud800', must be text without lone surrogates"),
    ],
)
def test_prompts_of_other_forms_are_refused(intake: Intake, prompt: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        intake.tokens_of(prompt)


class Uncounted(Sequence[int]):
    """Ids that nobody should look at: there are too many."""

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, _: Any) -> Any:
        raise AssertionError("looked at")


def test_too_many_ids_are_not_looked_at(intake: Intake) -> None:
    for pooled, most in ((False, CONTEXT - 1), (True, CONTEXT)):
        with pytest.raises(InvalidRequest, match=f"^prompt: got 10000000 tokens, .* {most}"):
            intake.tokens_of(Uncounted(), pooled=pooled)
    with pytest.raises(InvalidRequest, match=r"^token_ids: got 10000000 ids, .* at most 131072"):
        intake.decode(Uncounted())


def test_a_text_that_is_much_too_long_is_not_read_to_its_end(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, read = Tokenizer.encode, []

    def spy(tokenizer: Tokenizer, text: str, *args: Any, **how: Any) -> list[int]:
        read.append(len(text))
        return encode(tokenizer, text, *args, **how)

    monkeypatch.setattr(Tokenizer, "encode", spy)
    text = "a dog, " * 1_000_000
    for ask, says in (
        (lambda: intake.tokens_of(text), f"prompt: got more than {CONTEXT - 1} tokens"),
        (lambda: intake.tokens_of(text, pooled=True), f"prompt: got more than {CONTEXT} tokens"),
        (lambda: intake.chat_tokens([{"role": "user", "content": text}]), "messages: got more"),
        (lambda: intake.encode(text), "text: got more than 131072 tokens"),
    ):
        with pytest.raises(InvalidRequest, match=f"^{says}.*characters.*, must be at most"):
            ask()
    assert sum(read) < 2_000_000
    with pytest.raises(InvalidRequest, match=r"^text: got 1[0-9]{5} tokens, must be at most"):
        intake.encode("a d" * 50_000)  # not so many more that it shows


def test_chat_messages_go_through_the_template(intake: Intake) -> None:
    tokens = intake.chat_tokens([{"role": "user", "content": "hello"}])
    text = tiny_checkpoint.make_tokenizer().decode(list(tokens))
    assert text == "<user>hello\n<assistant>"
    again = intake.chat_tokens([{"role": "user", "content": "hello"}], add_generation_prompt=False)
    assert again == tokens[: len(again)] != tokens


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages: got none"),
        ("hello", "messages: got 'str'"),
        ({"role": "user"}, "messages: got 'dict'"),
        (5, "messages: got 'int'"),
        (["hello"], r"messages\[0\]: got 'hello'"),
        ([{"content": "hello"}], r"messages\[0\]: got "),
    ],
)
def test_messages_of_other_forms_are_refused(intake: Intake, messages: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        intake.chat_tokens(messages)


def test_a_request_gets_an_id_a_seed_and_the_models_end_of_sequence(intake: Intake) -> None:
    one, two = (intake.request((1,), SamplingParams()) for _ in range(2))
    assert one.id != two.id
    assert one.sampling.seed is not None and one.sampling.seed != two.sampling.seed
    assert one.eos_ids == (tiny_checkpoint.EOS,)
    assert intake.request((1,), SamplingParams(seed=5)).sampling.seed == 5


def test_the_same_name_twice_makes_different_ids(intake: Intake) -> None:
    labels = Labels("mine", priority=3, tenant="t", cache_salt="s", deadline=9.0)
    one, two = (intake.request((1,), SamplingParams(), labels) for _ in range(2))
    assert one.id != two.id and one.id.startswith("mine/")
    assert (one.priority, one.tenant, one.cache_salt, one.deadline) == (3, "t", "s", 9.0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda i: i.request((1,), SamplingParams(), Labels("x" * 257)), "request_id: got '257"),
        (lambda i: i.request((1,), SamplingParams(), Labels(tenant="x" * 257)), "tenant: got"),
        (lambda i: i.request((1,), SamplingParams(), Labels(cache_salt="x" * 257)), "cache_salt"),
        (lambda i: i.request((300,), SamplingParams()), r"prompt\[0\]: got 300.*299"),
        (lambda i: i.request((-1,), SamplingParams()), r"prompt\[0\]: got -1"),
        (lambda i: i.request((1,) * CONTEXT, SamplingParams()), f"got {CONTEXT} tokens"),
        (lambda i: i.request((1,), SamplingParams(max_tokens=CONTEXT)), f"s: got {CONTEXT}"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(
    intake: Intake, make: Callable[[Intake], Any], says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        make(intake)


def test_without_a_tokenizer_only_token_ids(without_tokenizer: Intake) -> None:
    assert without_tokenizer.tokens_of([1, 2]) == (1, 2)
    with pytest.raises(InvalidRequest, match=r"prompt: got text, must be token ids"):
        without_tokenizer.tokens_of("hello")
    with pytest.raises(InvalidRequest, match=r"stop: got \['x'\], must be empty"):
        without_tokenizer.request((1,), SamplingParams(stop="x"))
    with pytest.raises(InvalidRequest, match="messages"):
        without_tokenizer.chat_tokens([{"role": "user", "content": "hello"}])


def test_a_broken_tokenizer_is_found_at_the_start(tmp_path: Path) -> None:
    tiny_checkpoint.write(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        intake_of(tmp_path)


def test_defaults_are_greedy_and_unlimited_if_the_model_says_nothing(intake: Intake) -> None:
    assert intake.default_sampling() == SamplingParams(temperature=0.0, max_tokens=None)


def test_the_models_defaults_count_only_if_it_samples(folder: Path) -> None:
    own: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
    sampling = intake_of(folder, do_sample=True, **own).default_sampling(max_tokens=3, top_k=7)
    assert sampling == SamplingParams(temperature=0.6, top_k=7, top_p=0.9, min_p=0.1, max_tokens=3)
    for do_sample in (False, None):
        greedy = intake_of(folder, do_sample=do_sample, **own).default_sampling(max_tokens=3)
        assert greedy == SamplingParams(temperature=0.0, max_tokens=3)
    hot = intake_of(folder, do_sample=True).default_sampling()
    assert hot.temperature == 1.0


def test_the_models_own_limit_gives_way_to_the_context_and_to_the_caller(folder: Path) -> None:
    intake = intake_of(folder, max_new_tokens=100)
    assert intake.default_sampling().max_tokens == 100
    assert intake.default_sampling(max_tokens=None).max_tokens is None
    assert intake.default_sampling(max_tokens=500).max_tokens == 500
    assert intake.default_sampling(min_tokens=120).max_tokens == 120
    near_the_end = CONTEXT - 10
    sampling = intake.default_sampling(near_the_end)
    assert sampling.max_tokens == 10
    intake.request((1,) * near_the_end, sampling)
    with pytest.raises(InvalidRequest, match=r"min_tokens: got 11"):
        intake.default_sampling(near_the_end, min_tokens=11)
    with pytest.raises(InvalidRequest, match="min_tokens: got 'x'"):
        intake.default_sampling(min_tokens="x")


@pytest.mark.parametrize(
    ("eos_ids", "says"),
    [
        ((tiny_checkpoint.VOCAB,), "got 300, must be whole numbers from 0 to 299"),
        (tuple(range(17)), "got 17 ids, must be at most 16"),
    ],
)
def test_end_of_sequence_ids_that_cannot_be_served_are_the_checkpoints_fault(
    folder: Path, eos_ids: tuple[int, ...], says: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json.*eos_token_id: {says}"):
        intake_of(folder, eos_ids=eos_ids)
    intake_of(folder, eos_ids=tuple(range(16)))


def test_ids_of_other_kinds_are_made_plain(intake: Intake) -> None:
    tokens = intake.tokens_of(list(np.array([1, 2])))
    assert tokens == (1, 2) and set(map(type, tokens)) == {int}
    for wrong in ([1, np.float32(2)], [np.bool_(True)]):
        with pytest.raises(InvalidRequest, match="prompt"):
            intake.tokens_of(wrong)


def test_bad_words_become_tokens_with_and_without_a_space_before_them(intake: Intake) -> None:
    encode = tiny_checkpoint.make_tokenizer().encode
    plain, spaced = (tuple(encode(text).ids) for text in ("fox", " fox"))
    assert plain != spaced
    for words in (["fox"], [" fox"], ["fox", " fox", plain], "fox"):
        sampling = intake.request((1,), SamplingParams(bad_words=words)).sampling
        assert sampling.bad_words == (plain, spaced)
    given = SamplingParams(bad_words=[[5, 6], "fox"])
    assert intake.request((1,), given).sampling.bad_words == ((5, 6), plain, spaced)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["xyzxyzxyz"], r"bad_words: got 'xyzxyzxyz' \(9 tokens\), must be texts of 1 to 8 tokens"),
        ([chr(33 + n) for n in range(40)], "bad_words: got 80 token sequences, must be at most 64"),
        (["a\udfff"], r"bad_words: got 'a\\udfff', must be text without lone surrogates"),
        ([[300]], "bad_words: got 300, must be whole numbers from 0 to 299"),
    ],
)
def test_bad_words_beyond_the_bounds_are_refused(intake: Intake, words: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        intake.request((1,), SamplingParams(bad_words=words))


def test_bad_words_as_text_need_a_tokenizer(without_tokenizer: Intake) -> None:
    without_tokenizer.request((1,), SamplingParams(bad_words=[[1, 2]]))
    with pytest.raises(InvalidRequest, match=r"bad_words: got text.*no tokenizer\.json"):
        without_tokenizer.request((1,), SamplingParams(bad_words=["fox"]))


def test_the_models_repetition_penalty_counts_whether_it_samples_or_not(folder: Path) -> None:
    for do_sample in (False, True):
        own = intake_of(folder, do_sample=do_sample, repetition_penalty=1.1)
        assert own.default_sampling().repetition_penalty == 1.1
        assert own.default_sampling(repetition_penalty=1.0).repetition_penalty == 1.0
