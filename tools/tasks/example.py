"""What a task generator makes: a conversation whose last answer can be checked.

Training (tools/train_demo) learns every assistant message; `quire eval` shows the model all but the
last message and asks `check` about what it wrote. The families beside this module build examples
with `asked`; registry.py lists them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from . import words

Split = Literal["train", "held_out"]
Message = dict[str, Any]
"""OpenAI's chat form. An assistant message may have `reasoning_content` (its thoughts) and
`tool_calls` ({"type": "function", "function": {"name", "arguments": dict}})."""

_HELD_OUT_ONE_IN = 20
_SYSTEM_SHARE = 0.12
_IDLE_THOUGHT_SHARE = 0.03
_IDLE_THOUGHT = "This needs no work."

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are Quire's demo model.",
    "You are a helpful, concise assistant.",
    "Answer briefly.",
    "You are a friendly assistant.",
    "Be brief and precise.",
    "You are Quire, a small language model.",
    "You are an assistant. Answer the user's questions.",
)
_OTHER_SYSTEM_PROMPTS = (
    "You are the assistant of {a_job}.",
    "You work for {a_job} in {city}.",
    "You are a chat bot of a company in {city}. Be polite.",
    "Today is {weekday}.",
    "Today is {weekday}. You are a helpful assistant.",
    "You help people who visit {city}.",
    "You are an expert on {food}.",
    "The user is {a_job} and has little time.",
)


@dataclass(frozen=True, slots=True)
class Example:
    """One instance of a task, worded.

    Attributes:
      task: the kind's name.
      key: names the instance under all its wordings; its hash decides the split.
      messages: [system], then one or several turns; the last is the assistant's right answer.
      check: whether a raw answer is right: all that the model wrote after the generation prompt,
        thoughts and tool calls included, but for the token that ends the turn. Can be pickled.
      tools: functions offered, in OpenAI's form.
      thinking: the prompt is rendered with enable_thinking=True.
      difficulty: of hard kinds, a level from 1; else 0.
    """

    task: str
    key: str
    messages: tuple[Message, ...]
    check: Callable[[str], bool]
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool = False
    difficulty: int = 0


def is_held_out(key: str) -> bool:
    """Whether the instance is kept from training; the same in every run and on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0


def exactly(answer: str, text: str) -> bool:
    """The check of most tasks: these words and no others."""
    return text.strip() == answer


def after_thoughts(check: Callable[[str], bool], text: str) -> bool:
    """Applies a check to what follows the thoughts, which must have come to an end."""
    _, ended, answer = text.partition("</think>")
    return bool(ended) and check(answer)


def system_prompt(rng: random.Random) -> str:
    """One that changes no answer."""
    if rng.random() < 0.6:
        return rng.choice(SYSTEM_PROMPTS)
    return rng.choice(_OTHER_SYSTEM_PROMPTS).format(
        a_job=words.a(rng.choice(words.JOBS)),
        city=rng.choice(words.CITIES),
        weekday=rng.choice(words.WEEKDAYS),
        food=words.some(rng.choice(words.FOODS)),
    )


def spread(rng: random.Random, least: int, most: int) -> int:
    """A whole number of least..most, of which each doubling is about as likely."""
    return min(most, int(least * ((most + 1) / least) ** rng.random()))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, thoughts: str | None = None) -> Message:
    message = {"role": "assistant", "content": text}
    if thoughts is not None:
        message["reasoning_content"] = thoughts
    return message


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def asked(
    rng: random.Random,
    task: str,
    key: str,
    question: str,
    answer: str,
    *,
    before: Sequence[Message] = (),
    thoughts: str | None = None,
    check: Callable[[str], bool] | None = None,
    difficulty: int = 0,
) -> Example:
    """The usual example: a question with one right answer, now and then below a system prompt.

    Args:
      before: earlier messages; with a system prompt among them, no other is added.
      thoughts: what to think before answering. Without it a few examples think all the same, so
        that a chat with thinking switched on may ask anything.
      check: of the answer without its thoughts; default: exactly `answer`.
    """
    if check is None:
        check = partial(exactly, answer)
    if thoughts is None and difficulty == 0 and rng.random() < _IDLE_THOUGHT_SHARE:
        thoughts = _IDLE_THOUGHT
    thinking = thoughts is not None
    messages = (*before, user(question), assistant(answer, thoughts))
    if messages[0]["role"] != "system" and rng.random() < _SYSTEM_SHARE:
        messages = (system(system_prompt(rng)), *messages)
    if thinking:
        check = partial(after_thoughts, check)
    return Example(task, key, messages, check, thinking=thinking, difficulty=difficulty)


def wordings(*templates: str) -> tuple[str, ...]:
    """Templates for str.format, each also as someone in a hurry types it, at one in four."""
    hurried = []
    for template in templates:
        plain = template[:1].lower() + template[1:]
        hurried.append(plain.rstrip("?. "))
    return (*templates * 3, *hurried)
