"""tools/train_demo: the data is right, training learns, and what is exported opens everywhere."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from quire.checkpoints.folder import Checkpoint
from quire.checkpoints.params import load_params
from quire.checkpoints.shipped import resolve
from quire.model.abstract import AbstractDecoder
from quire.model.config import ModelConfig
from quire.serving.progress import Silent
from quire.tools.train_demo import chat, data, tasks
from quire.tools.train_demo.evaluate import Examiner, Score, small_talk
from quire.tools.train_demo.export import export, rounded
from quire.tools.train_demo.model import batch_logits, demo_config
from quire.tools.train_demo.smalltalk import SYSTEM_PROMPTS, TOPICS
from quire.tools.train_demo.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, build
from quire.tools.train_demo.train import Recipe, train

DEMO = resolve("demo")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build()


def drawn(name: str, split: tasks.Split, count: int = 500) -> list[tasks.Example]:
    rng = random.Random(7)
    return [tasks.draw(tasks.TASKS[name], rng, split) for _ in range(count)]


# The data.


def test_sums_are_right() -> None:
    for example in drawn("add", "train") + drawn("add", "held_out"):
        a, b = (int(number) for number in re.findall(r"\d+", example.question))
        assert 0 <= a <= tasks.MAX_ADDEND and 0 <= b <= tasks.MAX_ADDEND
        assert int(example.answer) - a == b
        assert example.answer == str(int(example.answer))


def test_texts_are_repeated_as_they_are() -> None:
    for example in drawn("repeat", "train"):
        assert 1 <= len(example.answer) <= tasks.MAX_REPEAT_CHARS
        asked = re.fullmatch(
            r'(?:Repeat|Repeat after me|Say): (.+)|Repeat "(.+)"\.', example.question
        )
        assert asked is not None and example.answer in asked.groups()


def test_words_are_reversed() -> None:
    for example in drawn("reverse", "train"):
        asked = re.fullmatch(
            r'(?:Reverse|Spell backwards): (\w+)|Reverse "(\w+)"\.', example.question
        )
        assert asked is not None
        word = asked[1] or asked[2]
        assert tasks.MIN_REVERSE_LETTERS <= len(word) <= tasks.MAX_REVERSE_LETTERS
        assert word.islower() and word.isascii() and word.isalpha()
        assert list(example.answer) == list(reversed(word))


def test_each_question_of_small_talk_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for example in small_talk() + small_talk(hurried=True) + small_talk(unseen=True):
        known = answers.setdefault(example.question.rstrip("?!.").lower(), example.answer)
        assert known == example.answer, example.question


def test_unseen_phrasings_are_not_among_those_trained_on() -> None:
    trained = {example.question for example in small_talk()}
    assert not trained & {example.question for example in small_talk(unseen=True)}


@pytest.mark.parametrize("name", [name for name, t in tasks.TASKS.items() if not t.memorised])
def test_training_and_held_out_instances_are_disjoint(name: str) -> None:
    train, held_out = ({e.key for e in drawn(name, split)} for split in ("train", "held_out"))
    assert train and held_out and not train & held_out


def test_a_sum_is_held_out_in_both_orders_and_all_wordings() -> None:
    keys = {}
    for example in drawn("add", "held_out"):
        numbers = tuple(sorted(int(n) for n in re.findall(r"\d+", example.question)))
        assert keys.setdefault(numbers, example.key) == example.key
        assert tasks.is_held_out(example.key)


def test_the_same_seed_gives_the_same_batches(tokenizer: Tokenizer) -> None:
    one, two, other = (data.Stream(tokenizer, seed).batch(4, 64) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one.tokens, other.tokens)


# The tokenizer and the text of a chat.


def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [e.question + e.answer for name in tasks.TASKS for e in drawn(name, "train", 100)]
    texts += [
        "",
        " ",
        "\n\n  two\tspaces ",
        "naïve 日本語 🙂\u200d",
        "a\r\nb",
        "user\nuser",
        "\x00\x7f",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_letters_to_spell_and_digits_are_single_tokens(tokenizer: Tokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer.encode(text).ids]

    assert pieces("Reverse: pages")[-5:] == list("pages")
    assert pieces('Reverse "pages".')[-7:-2] == list("pages")
    assert pieces("2048")[-4:] == list("2048")
    assert " pages" in pieces("all pages")
    assert pieces("<|im_start|>user\n") == ["", "user\n"]


def test_the_vocabulary_is_whole(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(VOCAB_SIZE))
    assert [vocab[token] for token in SPECIAL_TOKENS] == list(range(VOCAB_SIZE - 3, VOCAB_SIZE))


def test_encoding_by_pieces_is_encoding_the_text(tokenizer: Tokenizer) -> None:
    turns = [e for name in tasks.TASKS for e in drawn(name, "train", 20)]
    text = chat.system_turn(SYSTEM_PROMPTS[0])
    for turn in turns:
        text += chat.user_turn(turn.question) + chat.answer(turn.answer) + "\n"
    encoded = data.encode(tokenizer, turns, SYSTEM_PROMPTS[0])
    assert encoded.ids == tokenizer.encode(text).ids
    learned = [i for i, is_answer in zip(*encoded, strict=True) if is_answer]
    answers = "".join(chat.answer(turn.answer) for turn in turns)
    assert learned == tokenizer.encode(answers).ids


def test_packed_rows_are_cut_not_padded(tokenizer: Tokenizer) -> None:
    def conversations() -> Iterator[data.Conversation]:
        while True:
            yield data.encode(tokenizer, drawn("add", "train", 2))

    one = next(conversations()).ids
    batch = data.pack(conversations(), rows=2, length=100)
    tokens, targets = np.asarray(batch.tokens), np.asarray(batch.targets)
    assert tokens[0].tolist() == (one * 9)[:100] and targets[0].tolist() == (one * 9)[1:101]
    assert np.asarray(batch.positions)[0].tolist() == [i % len(one) for i in range(100)]
    assert np.asarray(batch.segments)[0].tolist() == [1 + i // len(one) for i in range(100)]


# Training and what comes out.


def tiny(config: ModelConfig) -> ModelConfig:
    return replace(
        config,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        windows=(None, None),
        head_dim=8,
        max_positions=64,
        dtype="float32",
    )


def dense_logits(
    model: AbstractDecoder, params: dict[str, jax.Array], ids: list[int]
) -> np.ndarray:
    row = data.one_per_row([data.Conversation([*ids, 0], [False] * (len(ids) + 1))], len(ids))
    return np.asarray(batch_logits(model.bind(params), row))


def test_training_lowers_the_loss_and_transformers_agrees(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = tiny(demo_config(VOCAB_SIZE))
    model = AbstractDecoder(config, "float32")
    recipe = Recipe(steps=20, tokens=512, length=32, long_share=0.2)
    runs = [train(model, data.Stream(tokenizer, 1), recipe, 1, Silent()) for _ in range(2)]
    assert runs[0].losses == runs[1].losses, "training must depend on the seed alone"
    untrained = float(np.log(VOCAB_SIZE))
    assert runs[0].steps == 20 and runs[0].losses[-1][1] < untrained - 0.3

    params = runs[0].params
    export(tmp_path, config, tokenizer, rounded(config, params), "# card\n")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    example = drawn("add", "train", 1)[0]
    ids = tokenizer.encode(chat.user_turn(example.question)).ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(dense_logits(model, params, ids), expected, atol=1e-4)
    assert Checkpoint.open(tmp_path).config == config


def test_a_time_limit_stops_training(tokenizer: Tokenizer) -> None:
    model = AbstractDecoder(tiny(demo_config(VOCAB_SIZE)), "float32")
    recipe = Recipe(steps=20, tokens=512, length=32, long_share=0.2)
    run = train(model, data.Stream(tokenizer, 1), recipe, 1, Silent(), time_limit=0)
    assert run.steps == 1 and len(run.losses) == 1


# The model that ships.


@pytest.fixture(scope="module")
def demo() -> tuple[AbstractDecoder, dict[str, jax.Array]]:
    params: dict[str, jax.Array] = {}
    config = Checkpoint.open(DEMO).config
    load_params(DEMO, config, "float32", lambda name, a: params.update({name: jnp.asarray(a)}))
    return AbstractDecoder(config, "float32"), params


def test_the_shipped_folder_is_small_and_consistent(
    demo: tuple[AbstractDecoder, dict[str, jax.Array]], tokenizer: Tokenizer
) -> None:
    model, params = demo
    assert model.config == demo_config(VOCAB_SIZE)
    assert sum(array.size for array in params.values()) < 2_000_000
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 5_000_000
    assert {file.name for file in DEMO.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    shipped = json.loads((DEMO / "tokenizer.json").read_text("utf-8"))
    assert shipped == json.loads(tokenizer.to_str()), "train again: the tokenizer has changed"
    settings = json.loads((DEMO / "tokenizer_config.json").read_text("utf-8"))
    assert settings["chat_template"] == chat.CHAT_TEMPLATE
    checkpoint = Checkpoint.open(DEMO)
    assert checkpoint.eos_ids[0] == tokenizer.get_vocab()[settings["eos_token"]]
    assert checkpoint.generation.do_sample is False


def test_the_template_writes_what_was_trained_on() -> None:
    messages = [
        {"role": "system", "content": SYSTEM_PROMPTS[0]},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": " Hello\n"},
    ]
    expected = (
        chat.system_turn(SYSTEM_PROMPTS[0])
        + chat.user_turn("What is 1 + 1?")
        + chat.answer("2")
        + "\n"
        + chat.user_turn(" Hello\n")
    )
    template = Checkpoint.open(DEMO).chat_template
    assert template.render(messages) == expected
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO)
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == expected


def test_the_shipped_model_is_right(
    demo: tuple[AbstractDecoder, dict[str, jax.Array]], tokenizer: Tokenizer
) -> None:
    examiner = Examiner(*demo, tokenizer)
    for name, task in tasks.TASKS.items():
        if not task.memorised:
            score = examiner.alone(name, drawn(name, "held_out", 64))
            assert score.share >= 0.95, score
    talk = small_talk()
    assert examiner.alone("small talk", talk) == Score("small talk", len(talk), len(talk))
    assert {topic.answer for topic in TOPICS} == {example.answer for example in talk}
