"""The tasks of the demo model: right answers pass, wrong ones do not, the split leaks nothing."""

from __future__ import annotations

import json
import pickle
import random
import re
from collections import Counter
from datetime import date
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from quire.tools.tasks import arithmetic, expressions, lists, lookup, stories
from quire.tools.tasks.example import SYSTEM_PROMPTS, Example, Split, is_held_out
from quire.tools.tasks.registry import TASKS, draw, example_weights
from quire.tools.tasks.schema import fits
from quire.tools.tasks.table_domains import DOMAINS
from quire.tools.tasks.tool_calls import says_calls

NAMES = list(TASKS)


@cache
def drawn(name: str, split: Split, count: int) -> tuple[Example, ...]:
    rng = random.Random(7)
    return tuple(draw(TASKS[name], rng, split) for _ in range(count))


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """A call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def raw(example: Example) -> str:
    """The last message as the model writes it."""
    message = example.messages[-1]
    calls = [call_text(**call["function"]) for call in message.get("tool_calls", ())]
    text = "\n".join([message["content"], *calls] if message["content"] else calls)
    if example.thinking:
        return f"{message['reasoning_content']}\n</think>\n\n{text}"
    return text


def question(example: Example) -> str:
    return str(example.messages[-2]["content"])


_SAMPLES = {"long_table": 60, "sort_long": 100, "facts": 120, "tool_call": 120, "table": 200}
_SAMPLES |= {"sort_longer": 60, "table_row": 100}
_SAMPLES |= {"count_letters": 1000, "count_items": 1000, "small_talk": 1000, "letter": 1000}
"""Held-out examples to look at: fewer where drawing them is slow, more where it is near."""


# Every task.


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_pass_and_wrong_ones_do_not(name: str) -> None:
    examples = drawn(name, "train", 100) + drawn(name, "held_out", 20)
    for example, other in zip(examples, examples[1:] + examples[:1], strict=True):
        right = raw(example)
        assert example.task == name and right and example.check(right), right
        assert example.check(f"{right}\n")
        wrong = [right + "0", "9" + right.rpartition("\n")[2], "", right[:-1]]
        if example.thinking:
            wrong = [right + "0", right.replace("</think>", ""), right[: right.index("</think>")]]
        if raw(other).rpartition("\n")[2] != right.rpartition("\n")[2] and name != "story":
            wrong.append(raw(other))
        for text in wrong:
            assert not example.check(text), (right, text)


@pytest.mark.parametrize("name", NAMES)
def test_messages_are_well_formed(name: str) -> None:
    for example in drawn(name, "train", 100):
        roles = [message["role"] for message in example.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        before = [None, *turns[:-1]]
        assert turns[-1] == "assistant"
        for role, last in zip(turns, before, strict=True):
            assert role in {None: ("user",), "user": ("assistant",), "tool": ("assistant",)}.get(
                last, ("user", "tool")
            )
        for message in example.messages:
            assert isinstance(message["content"], str)
            assert message["content"] == message["content"].strip()
        assert example.thinking == ("reasoning_content" in example.messages[-1])
        assert example.thinking or not any("reasoning_content" in m for m in example.messages)
        assert json.loads(json.dumps(example.tools)) == list(example.tools)
        assert pickle.loads(pickle.dumps(example)).check(raw(example))


@pytest.mark.parametrize("name", NAMES)
def test_the_two_sides_are_disjoint_and_seeded(name: str) -> None:
    train, held_out = drawn(name, "train", 100), drawn(name, "held_out", 20)
    assert all(is_held_out(e.key) for e in held_out)
    assert not any(is_held_out(e.key) for e in train)
    texts = [[(e.messages, e.tools) for e in drawn.__wrapped__(name, "train", 20)] for _ in "ab"]
    assert texts[0] == texts[1] == [(e.messages, e.tools) for e in train[:20]]


@pytest.mark.parametrize(
    ("name", "asked"),
    [("follow_up", "add"), ("tool_result", "tool_call"), ("small_talk", "small_talk")],
)
def test_no_earlier_turn_asks_what_is_held_out(name: str, asked: str) -> None:
    def said(example: Example) -> list[str]:
        return [m["content"] for m in example.messages if m["role"] == "user"]

    held_out = {said(e)[0] for e in drawn(asked, "held_out", 1000) if len(said(e)) == 1}
    earlier = {text for e in drawn(name, "train", 2000) for text in said(e)[:-1]}
    first = {said(e)[0] for e in drawn(name, "train", 2000)} if name != asked else set()
    assert len(earlier) > 200
    assert not held_out & (earlier | first)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_question_is_always_the_same_instance(name: str) -> None:
    """A question that leaks under another key would be trained on and asked."""
    keys: dict[str, str] = {}
    for example in drawn(name, "train", 100 if name == "long_table" else 500):
        texts = [message["content"] for message in example.messages[:-1]]
        shown = json.dumps([text for text in texts if text not in SYSTEM_PROMPTS])
        assert keys.setdefault(shown, example.key) == example.key, shown


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_is_right_often(name: str) -> None:
    examples = drawn(name, "held_out", _SAMPLES.get(name, 300))
    answers = Counter(raw(e).rpartition("</think>")[2].strip() for e in examples)
    best, _ = answers.most_common(1)[0]
    for thoughts in ("", "</think>\n\n"):
        assert sum(e.check(thoughts + best) for e in examples) < 0.1 * len(examples), best


@pytest.mark.parametrize("name", NAMES)
def test_there_are_a_hundred_thousand_instances(name: str) -> None:
    """Chao's lower bound on the number of kinds, from how often a kind was seen once and twice."""
    task, rng = TASKS[name], random.Random(3)
    assert task.instances >= 100_000
    seen: Counter[str] = Counter()
    bound = 0.0
    for count in (500, 2000, 6000, 12_000, 30_000, 90_000):
        while seen.total() < count:
            seen[task.generate(rng).key] += 1
        times = Counter(seen.values())
        bound = len(seen) + times[1] * (times[1] - 1) / (2 * (times[2] + 1))
        if bound >= 100_000:
            return
    pytest.fail(f"about {bound:.0f} instances")


def test_shares_and_levels() -> None:
    assert sum(task.share for task in TASKS.values()) == pytest.approx(1)
    assert sum(task.hard for task in TASKS.values()) >= 3
    for task in (task for task in TASKS.values() if task.held_out_levels):
        train = {e.difficulty for e in drawn(task.name, "train", 500)}
        held_out = {e.difficulty for e in drawn(task.name, "held_out", 60)}
        assert held_out == set(task.held_out_levels) < train
    for e in drawn("multiply", "held_out", 200):
        assert all(n % 10 for n in numbers(question(e))), "a step of think_multiply"
    asked_only = {name for name in NAMES if not TASKS[name].share}
    assert asked_only == {"table_row", "sort_longer"}
    assert not asked_only & set(example_weights(lambda example: 1, sample=1))


def test_weights_give_tasks_their_share_of_tokens() -> None:
    def length(example: Example) -> int:
        return sum(len(str(message["content"])) for message in example.messages)

    weights = example_weights(length, sample=60)
    rng = random.Random(0)
    tokens: Counter[str] = Counter()
    for name in rng.choices(list(weights), list(weights.values()), k=6000):
        tokens[name] += length(rng.choice(drawn(name, "train", 60)))
    for name in ("add", "small_talk", "think_multiply"):
        assert tokens[name] / tokens.total() == pytest.approx(TASKS[name].share, rel=0.4)


# Answers computed again, from the question.


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_arithmetic() -> None:
    for e in drawn("add", "train", 300):
        assert numbers(raw(e).rpartition("</think>")[2])[-1] == sum(numbers(question(e)))
    for e in drawn("multiply", "train", 300):
        a, b = numbers(question(e))
        assert raw(e) == str(a * b)
    for e in drawn("expression", "train", 300):
        (shown,) = re.findall(r"[\d(][\d+\-*() ]*[\d)]", question(e))
        assert raw(e) == str(eval(shown))


def test_a_sum_is_the_same_instance_in_both_orders() -> None:
    keys: dict[tuple[int, ...], str] = {}
    for e in drawn("add", "train", 1000):
        pair = tuple(sorted(numbers(question(e))))
        assert keys.setdefault(pair, e.key) == e.key


def test_a_product_is_held_out_with_and_without_thinking() -> None:
    for name in ("multiply", "think_multiply"):
        for e in drawn(name, "train", 200):
            assert e.key == f"multiply {' '.join(map(str, sorted(numbers(question(e)))))}"


def test_thoughts_are_right() -> None:
    for name in ("think_multiply", "think_expression", "think_problem"):
        for e in drawn(name, "train", 300):
            lines = e.messages[-1]["reasoning_content"].splitlines()
            for line in "\n".join(lines).replace("\n= ", " = ").splitlines():
                values = {eval(side) for side in line.split(" = ")}
                assert len(values) == 1, line
            assert lines[-1].split(" = ")[-1].removeprefix("= ") == e.messages[-1]["content"]


def test_an_expression_is_the_same_in_another_order() -> None:
    one = ("+", ("*", 3, ("-", 9, 4)), 7)
    other = ("+", 7, ("*", ("-", 9, 4), 3))
    assert expressions.canonical(one) == expressions.canonical(other)
    assert expressions.canonical(one) != expressions.canonical(("+", 7, ("*", ("-", 4, 9), 3)))
    assert expressions.text(("-", 9, ("-", 4, 1))) == "9 - (4 - 1)"
    assert expressions.text(("-", ("-", 9, 4), 1)) == "9 - 4 - 1"
    assert expressions.steps(one) == ["3 * (9 - 4) + 7", "3 * 5 + 7", "15 + 7", "22"]


def test_lists() -> None:
    for e in drawn("sort_numbers", "train", 200) + drawn("sort_long", "train", 50):
        answer = numbers(raw(e).rpartition("</think>")[2])
        assert sorted(answer) == sorted(numbers(question(e)))
        assert answer in (sorted(answer), sorted(answer, reverse=True))
    lengths = {e.difficulty: len(numbers(question(e))) for e in drawn("sort_long", "train", 200)}
    assert lengths == lists.SORT_LONG_LENGTHS


def test_counts() -> None:
    for e in drawn("count_letters", "train", 300):
        *letter, text = re.findall(r'"(\w+)"', question(e))
        expected = text.count(letter[0]) if letter else len(text)
        assert int(raw(e).rpartition("</think>")[2]) == expected


def test_days() -> None:
    for e in drawn("days_between", "train", 300):
        one, other = (date.fromisoformat(d) for d in re.findall(r"\d+-\d+-\d+", question(e)))
        assert int(raw(e)) == (other - one).days > 0


def test_tables_have_the_answer() -> None:
    rng = random.Random(5)
    for _ in range(50):
        made = lookup.make_table(rng, DOMAINS, 12, 4)
        asked, answer, by = lookup.ask(rng, made)
        (row,) = (
            row
            for row in made.rows
            if answer in row and any(c.lower() in asked.lower() for c in row if c != answer)
        )
        assert (by == lookup.BY_VALUE) == (answer == row[0])
        assert lookup.ask(rng, made, by_value=False)[2] == lookup.BY_NAME
        assert all(cell in made.text for row in made.rows for cell in row)


def test_twenty_questions_share_their_first_message() -> None:
    examples = lookup.shared_table(random.Random(1))
    assert len(examples) == 20 == len({question(e) for e in examples})
    assert len({e.messages[0]["content"] for e in examples}) == 1
    assert examples[0].messages[0]["role"] == "system"
    assert all(e.check(raw(e)) and len(e.messages) == 3 for e in examples)


# JSON and tools.


def test_schemas_are_checked() -> None:
    size = {"type": "string", "enum": ["small", "large"]}
    schema = {
        "type": "object",
        "properties": {
            "age": {"type": "integer"},
            "size": size,
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["age"],
    }
    assert fits(schema, {"age": 3, "size": "small", "tags": ["a"]})
    for value in (
        [],
        {},
        {"age": "3"},
        {"age": True},
        {"age": 3.5},
        {"age": 3, "size": "huge"},
        {"age": 3, "tags": [1]},
        {"age": 3, "other": 1},
    ):
        assert not fits(schema, value), value
    with pytest.raises(ValueError, match="minimum"):
        fits({"type": "integer", "minimum": 3}, 4)


def test_json_is_right_in_any_layout() -> None:
    for e in drawn("json", "train", 100):
        head, ended, answer = raw(e).rpartition("</think>")
        content = json.loads(answer)
        for text in (json.dumps(content, indent=2), json.dumps(dict(reversed(content.items())))):
            assert e.check(head + ended + text)
        name, value = next(iter(content.items()))
        missing = {k: v for k, v in content.items() if k != name}
        for wrong in ({**content, name: f"{value}x"}, {**content, "more": 1}, missing):
            assert not e.check(head + ended + json.dumps(wrong))
        assert not e.check(f"{head}{ended}Here it is: {answer}")
        assert not e.check(f"{head}{ended}{'[' * 100_000}")


def test_calls_fit_what_is_offered() -> None:
    kinds: Counter[str] = Counter()
    for e in drawn("tool_call", "train", 400) + drawn("tool_result", "train", 200):
        offered = {tool["function"]["name"]: tool["function"] for tool in e.tools}
        assert len(offered) == len(e.tools)
        calls = [c["function"] for m in e.messages for c in m.get("tool_calls", ())]
        kinds[f"{e.task} {len(calls)} of {len(offered)}"] += 1
        for call in calls:
            assert fits(offered[call["name"]]["parameters"], call["arguments"])
        if not calls:  # a sum, with no wish for a sentence
            assert raw(e).isdigit()
    assert {f"tool_call {calls} of 4" for calls in (0, 1, 2)} <= set(kinds)
    assert {f"tool_result {calls} of 4" for calls in (1, 2)} <= set(kinds)


def test_a_call_must_be_the_one_asked_for() -> None:
    for e in drawn("tool_call", "train", 100):
        calls = [c["function"] for c in e.messages[-1].get("tool_calls", ())]
        if not calls:
            continue
        name, arguments = calls[0]["name"], calls[0]["arguments"]
        rest = [call_text(**call) for call in calls[1:]]
        assert e.check("\n".join([call_text(name, dict(reversed(arguments.items()))), *rest]))
        changed = {**arguments, next(iter(arguments)): "?"}
        for wrong in (
            [call_text("other", arguments)],
            [call_text(name, changed)],
            [call_text(name, arguments), call_text(name, arguments)],
            ["Well: " + call_text(name, arguments)],
            [call_text(name, arguments).replace("}", "", 1)],
            [f"<tool_call>\n{'[' * 100_000}\n</tool_call>"],
        ):
            assert not e.check("\n".join([*wrong, *rest]))


def test_calls_are_compared_as_json() -> None:
    a, b = call_text("a", {"n": 1, "on": True}), call_text("b", {"x": [2]})
    expected = json.dumps(
        [{"name": "a", "arguments": {"n": 1, "on": True}}, {"name": "b", "arguments": {"x": [2]}}]
    )
    for right in (f"{a}\n{b}", f"{b}\n{a}", f"{a}\n{b}".replace("1", "1.0")):
        assert says_calls(expected, right)
    for wrong in (a, f"{a}\n{b}\n{b}", f"{a}\n{a}", f"{a}\n{b}".replace("1", "true")):
        assert not says_calls(expected, wrong)
    assert not says_calls(expected, f"{a}\n{b}".replace("true", "1"))


def test_a_story_is_of_the_grammar_and_about_whom_was_asked() -> None:
    for e in drawn("story", "train", 50):
        head, ended, story = raw(e).rpartition("</think>")
        sentences = re.findall(r"[^.]+\.", story)
        assert 5 <= len(sentences) <= len(stories.GRAMMAR)
        for wrong in (
            "".join(sentences[1:]),
            "".join(reversed(sentences)),
            story.replace("The ", "A ") if "The " in story else "",
            story + " The end.",
        ):
            assert not e.check(head + ended + wrong)
    for e, other in pairwise(drawn("story", "train", 50)):
        assert e.check(raw(other)) == (e.key == other.key)


def test_held_out_levels_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["multiply"]
    assert task.held_out_levels == arithmetic.MULTIPLY_HELD_OUT
    easier = type(task)(**{**vars(task), "held_out_levels": (1,)})
    rng = random.Random(1)
    assert {draw(easier, rng, "held_out").difficulty for _ in range(5)} == {1}
