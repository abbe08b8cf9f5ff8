"""The demo models' text: one chat template in three places, and the tokenizer."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from quire.checkpoints.chat_template import ChatTemplate
from quire.checkpoints.tokenizer import load_tokenizer
from quire.errors import InvalidRequest
from quire.tools.tasks.example import Example
from quire.tools.tasks.lookup import shared_table
from quire.tools.tasks.registry import TASKS, draw
from quire.tools.tasks.words import CITIES, NAMES, NOUNS
from quire.tools.train_demo.chat import CHAT_TEMPLATE, TURN_END, pieces
from quire.tools.train_demo.tokenizer import MARKS, SPECIAL_TOKENS, VOCAB_SIZE, build

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of <a> city & more, é.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASKED = {"role": "user", "content": "How is Rome?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome é"}}}
RESULT = {"role": "tool", "content": '{"sky": "clear"}'}
ANSWER = {"role": "assistant", "content": "It is clear."}
THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2 = 4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def calling(*calls: dict[str, Any], content: str | None = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": [ASKED, ANSWER],
    "system": [SYSTEM, ASKED, ANSWER, ASKED],
    "system later": [ASKED, ANSWER, SYSTEM, ASKED],
    "call": [ASKED, calling(CALL)],
    "calls": [SYSTEM, ASKED, calling(CALL, CALL), RESULT, RESULT, ANSWER, ASKED],
    "call after words": [ASKED, calling(CALL, content="I look."), RESULT],
    "thoughts": [ASKED, THOUGHT],
    "earlier thoughts": [ASKED, THOUGHT, ASKED, THOUGHT],
    "thoughts before a call": [ASKED, {**THOUGHT, **calling(CALL)}, RESULT, THOUGHT],
    "spaces": [{"role": "user", "content": " a\n\n"}, {"role": "assistant", "content": "b "}],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build()


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE
    )


@cache
def examples(count: int = 15) -> tuple[Example, ...]:
    rng = random.Random(11)
    return tuple(draw(task, rng, "train") for task in TASKS.values() for _ in range(count))


def text(example: Example) -> str:
    return "".join(piece.text for piece in pieces(example.messages, example.tools))


OURS = ChatTemplate({"default": CHAT_TEMPLATE}, {})


# The template.


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tools", [[], [WEATHER], [WEATHER, WEATHER]], ids=len)
@pytest.mark.parametrize("name", CHATS)
def test_three_writers_agree(name: str, tools: list[Any], thinking: bool, theirs: Any) -> None:
    messages = CHATS[name]
    whole = OURS.render(messages, tools=tools or None, add_generation_prompt=False)
    assert whole == "".join(piece.text for piece in pieces(messages, tools))
    for prompt in (False, True):
        asked = {"add_generation_prompt": prompt, "enable_thinking": thinking}
        expected = theirs.apply_chat_template(
            messages, tools=tools or None, tokenize=False, **asked
        )
        assert OURS.render(messages, tools=tools or None, **asked) == expected
        end = "<|im_start|>assistant\n" + ("<think>\n" if thinking else "")
        assert expected == whole + (end if prompt else "")


def test_a_chat_with_everything() -> None:
    messages = [SYSTEM, ASKED, THOUGHT, ASKED, calling(CALL), RESULT]
    rendered = OURS.render(messages, tools=[WEATHER], enable_thinking=True)
    function = json.dumps(WEATHER["function"], ensure_ascii=False)
    assert rendered == (
        "<|im_start|>system\nBe brief.\n\nYou may call these tools.\n"
        f"<tools>\n{function}\n</tools><|im_end|>\n"
        "<|im_start|>user\nHow is Rome?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nHow is Rome?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": '
        '{"city": "Rome é"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n{"sky": "clear"}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n<think>\n"
    )


def test_calls_as_clients_send_them() -> None:
    """Arguments as a JSON text, content left out, functions without their wrapper."""
    function = CALL["function"]
    as_text = {"function": {"name": "get_weather", "arguments": json.dumps({"city": "Rome"})}}
    message = {"role": "assistant", "tool_calls": [as_text]}
    assert '"arguments": {"city": "Rome"}}\n</tool_call>' in OURS.render([ASKED, message])
    bare, wrapped = (OURS.render([ASKED, calling(call)]) for call in (function, CALL))
    assert bare == wrapped
    assert OURS.render([ASKED], tools=[WEATHER["function"]]) == OURS.render(
        [ASKED], tools=[WEATHER]
    )


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "developer", "content": "x"}, "role must be"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "content must be text"),
        ({"role": "user"}, "content must be text"),
        ({"role": "assistant", "content": None}, "content must be text"),
    ],
)
def test_what_the_template_refuses(message: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        OURS.render([message])


def test_examples_are_written_alike_and_answers_pass_their_check(theirs: Any) -> None:
    for example in examples():
        messages, tools = list(example.messages), list(example.tools)
        asked = {"tools": tools or None, "enable_thinking": example.thinking}
        whole = OURS.render(messages, add_generation_prompt=False, **asked)
        assert whole == text(example)
        assert whole == theirs.apply_chat_template(messages, tokenize=False, **asked)
        *prompt, answer, end = pieces(messages, tools)
        assert "".join(piece.text for piece in prompt) == OURS.render(messages[:-1], **asked)
        assert answer.is_answer and not end.is_answer and end.text == "\n"
        assert example.check(answer.text.removesuffix(TURN_END))
        written = sum(piece.is_answer for piece in (*prompt, answer))
        assert written == sum(message["role"] == "assistant" for message in messages)


# The tokenizer.


def shown(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.encode(text).ids]


def test_any_text_survives(tokenizer: Tokenizer) -> None:
    texts = [message["content"] for e in examples() for message in e.messages]
    texts += [
        "",
        " ",
        "\n\n  two\tspaces ",
        "naïve 日本語 🙂\u200d",
        "a\r\nb",
        "user\nuser",
        "\x00\x7f",
    ]
    for written in texts:
        assert tokenizer.decode(tokenizer.encode(written).ids) == written


def test_letters_to_work_on_and_digits_are_single(tokenizer: Tokenizer) -> None:
    for prompt in ("Reverse: {}", 'Reverse "{}".', 'How many "p" are in "{}"?', "{}", "a\n{}"):
        found = shown(tokenizer, prompt.format("pages"))
        assert "pages" in "".join(found) and all(letter in found for letter in "pages"), found
    assert shown(tokenizer, "s-t-r") == ["s", "-", "t", "-", "r"]
    assert shown(tokenizer, "2048")[-4:] == list("2048")
    assert shown(tokenizer, "12 + 7") == ["1", "2", " + ", "7"]
    assert shown(tokenizer, "all pages")[-1] == " pages"


def test_words_and_json_take_few_tokens(tokenizer: Tokenizer) -> None:
    for words in (NAMES, CITIES, NOUNS):
        single = [word for word in words if len(tokenizer.encode(f" {word}").ids) == 1]
        assert len(single) > 0.9 * len(words)
    written = shown(tokenizer, '{"name": "string", "arguments": {"city": 4}')
    assert "|".join(written) == '{"|name|": "|string|", "|arguments|": {"|city|": |4|}'


def test_the_vocabulary_is_whole(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab()
    assert len(vocab) == VOCAB_SIZE and VOCAB_SIZE % 64 == 0
    assert sorted(vocab.values()) == list(range(VOCAB_SIZE))
    added = tokenizer.get_added_tokens_decoder()
    assert {t.content for t in added.values() if t.special} == set(SPECIAL_TOKENS)
    assert {t.content for t in added.values() if not t.special} == set(MARKS)
    for token in (*SPECIAL_TOKENS, *MARKS):
        assert tokenizer.encode(f"a{token}b").ids[1] == vocab[token]


def test_the_same_seed_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert build().to_str() == tokenizer.to_str()
    assert build(seed=1).to_str() != tokenizer.to_str()


def test_pieces_can_be_encoded_one_by_one(tokenizer: Tokenizer) -> None:
    for example in examples():
        parts = [piece.text for piece in pieces(example.messages, example.tools)]
        ids = [i for encoding in tokenizer.encode_batch(parts) for i in encoding.ids]
        assert ids == tokenizer.encode("".join(parts)).ids, example.task


def test_a_prompt_and_its_answer_meet_between_tokens(tokenizer: Tokenizer) -> None:
    """What the engine continues has the tokens that training saw."""
    for example in examples():
        whole = tokenizer.encode(text(example)).ids
        prompt = OURS.render(
            example.messages[:-1],
            tools=example.tools or None,
            enable_thinking=example.thinking,
        )
        ids = tokenizer.encode(prompt).ids
        assert whole[: len(ids)] == ids, example.task


def test_conversations_fit_the_context(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    longest = max(
        len(tokenizer.encode(text(TASKS["long_table"].generate(rng))).ids) for _ in range(40)
    )
    assert longest < 2000
    for _ in range(4):
        (first, *_), *_ = (example.messages for example in shared_table(rng))
        assert 1350 < len(tokenizer.encode(first["content"]).ids) < 1650


def test_marks_stay_in_the_text_that_serving_returns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    written = "1 + 1 = 2\n</think>\n\n2<tool_call>\n{}\n</tool_call>"
    ids = ours.encode(written + TURN_END)
    assert ours.decode(ids) == written
    stream = ours.stream_decoder()
    assert stream.push(ids) + stream.flush() == written
