"""Calling the right one of several tools with the arguments asked for, and using what it returns.

tools_offered.py has the tools. Their names and their parameters' names vary, so that the model has
to read what it is offered.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from . import arithmetic
from .example import (
    Example,
    Message,
    assistant,
    exactly,
    is_held_out,
    system,
    system_prompt,
    user,
)
from .tools_offered import TOOLS, Offer, offer

MOST_TOOLS = 4

_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_ERRORS = ("not found", "no connection", "not allowed", "try again later", "too busy")


def says_calls(expected: str, text: str) -> bool:
    """Whether the text is the expected calls (a JSON list of {name, arguments}), in whichever
    order, and no more."""
    if _CALL.sub("", text).strip():
        return False
    try:
        calls = sorted(_canonical(json.loads(call, **_AS_JSON)) for call in _CALL.findall(text))
    except (ValueError, RecursionError):  # some models never close what they open
        return False
    return calls == sorted(map(_canonical, json.loads(expected, **_AS_JSON)))


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


_AS_JSON: dict[str, Any] = {"parse_float": _number}
"""JSON knows 1 and 1.0 for the same number."""


def _canonical(value: Any) -> str:
    """Equal for equal values; Python would take true for 1 too."""
    return json.dumps(value, sort_keys=True)


def tool_call(rng: random.Random) -> Example:
    """One request, now and then two at once, now and then one that needs no tool."""
    offers = _offers(rng)
    tools = tuple(made.schema for made in rng.sample(offers, len(offers)))
    kind = rng.random()
    if kind < 0.06:
        return _needs_none(rng, tools)
    wanted = offers[:2] if kind < 0.14 and len(offers) > 1 else offers[:1]
    calls = [{"name": made.name, "arguments": made.arguments} for made in wanted]
    message = _calling(calls)
    question = " ".join([made.request(rng) for made in wanted])
    key = _key(wanted)
    check = partial(says_calls, json.dumps(calls))
    messages = (*_system(rng), user(question), message)
    return Example("tool_call", key, messages, check, tools=tools)


def tool_result(rng: random.Random) -> Example:
    """Saying what a tool returned, after one or two rounds of asking, calling and answering."""
    offers = _offers(rng)
    called = offers[: rng.choice((1, 1, 1, 2))]
    while any(is_held_out(_key([made])) for made in called):  # which `tool_call` asks
        offers = _offers(rng)
        called = offers[: len(called)]
    tools = tuple(made.schema for made in rng.sample(offers, len(offers)))
    messages: list[Message] = list(_system(rng))
    key, answer = "", ""
    for made in called:
        if rng.random() < 0.06:
            result: dict[str, Any] = {"error": rng.choice(_ERRORS)}
            answer = f"That did not work: {result['error']}."
        else:
            result = made.tool.result(rng, made.values)
            answer = made.tool.answer.format(**made.values, **result)
        messages += [
            user(made.request(rng)),
            _calling([{"name": made.name, "arguments": made.arguments}]),
            {"role": "tool", "name": made.name, "content": json.dumps(result)},
            assistant(answer),
        ]
        key = f"result {made.key} {json.dumps(result)}"
    return Example("tool_result", key, tuple(messages), partial(exactly, answer), tools=tools)


def _key(wanted: Sequence[Offer]) -> str:
    return "tool " + " ".join([made.key for made in wanted])


def _offers(rng: random.Random) -> list[Offer]:
    """Tools with arguments drawn; the first is the one that will be asked for."""
    return [offer(rng, tool) for tool in rng.sample(TOOLS, rng.randint(1, MOST_TOOLS))]


def _calling(calls: Sequence[dict[str, Any]]) -> Message:
    calls = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _system(rng: random.Random) -> tuple[Message, ...]:
    return (system(system_prompt(rng)),) if rng.random() < 0.2 else ()


def _needs_none(rng: random.Random, tools: tuple[dict[str, Any], ...]) -> Example:
    made = arithmetic.add(rng)
    while made.messages[0]["role"] == "system":  # which may want a sentence
        made = arithmetic.add(rng)
    messages = (*_system(rng), *made.messages[-2:-1], assistant(made.messages[-1]["content"]))
    check = partial(exactly, made.messages[-1]["content"])
    return Example("tool_call", made.key, messages, check, tools=tools)
