"""How a conversation is written as text: the chat template, and the same thing without jinja.

ChatML with the conventions of Hermes and Qwen3 for tools and thinking, so that the usual parsers
understand the model. `export.py` ships CHAT_TEMPLATE; who needs the text of many conversations
calls `pieces`, which also says what of it the model has to write. A test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
RESULT, RESULT_END = "<tool_response>", "</tool_response>"

_TOOLS = "You may call these tools.\n<tools>\n"
_TOOLS_END = "\n</tools>"

CHAT_TEMPLATE = """
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant", "tool"] %}
        {{- raise_exception("role must be system, user, assistant or tool, got " + message.role) }}
    {%- endif %}
    {%- if not (message.content is string or message.role == "assistant" and message.tool_calls) %}
        {{- raise_exception("content must be text, in the message of role " + message.role) }}
    {%- endif %}
    {%- if message.role == "user" %}
        {%- set ns.last_user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- "<|im_start|>system\\n" }}
    {%- if messages[0].role == "system" %}
        {{- messages[0].content + "\\n\\n" }}
    {%- endif %}
    {{- "You may call these tools.\\n<tools>\\n" }}
    {%- for tool in tools %}
        {{- (tool.function if tool.function else tool) | tojson }}
        {{- "\\n" if not loop.last }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.first or loop.previtem.role != "tool" %}
            {{- "<|im_start|>user" }}
        {%- endif %}
        {{- "\\n<tool_response>\\n" + message.content + "\\n</tool_response>" }}
        {%- if loop.last or loop.nextitem.role != "tool" %}
            {{- "<|im_end|>\\n" }}
        {%- endif %}
    {%- elif message.role == "assistant" %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if message.reasoning_content and loop.index0 > ns.last_user %}
            {{- "<think>\\n" + message.reasoning_content | trim + "\\n</think>\\n\\n" }}
        {%- endif %}
        {{- message.content or "" }}
        {%- for call in message.tool_calls or [] %}
            {%- set called = call.function if call.function else call %}
            {{- "\\n" if message.content or not loop.first }}
            {{- '<tool_call>\\n{"name": "' + called.name + '", "arguments": ' }}
            {{- called.arguments if called.arguments is string else called.arguments | tojson }}
            {{- "}\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- elif not (loop.first and tools and message.role == "system") %}
        {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {{- "<think>\\n" if enable_thinking }}
{%- endif %}
""".strip()


class Piece(NamedTuple):
    """Text, and whether the model has to write it."""

    text: str
    is_answer: bool


def pieces(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[Piece]:
    """A conversation as CHAT_TEMPLATE writes it, without a generation prompt.

    Pieces meet behind special tokens and newlines, which no merge of the tokenizer crosses: encoded
    one by one they give the ids of the whole text.

    Args:
      messages: as of tools/tasks: well formed, arguments of calls as objects.
    """
    written: list[Piece] = []
    prompt = ""  # what has been asked since the model last wrote
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    if tools:
        if messages[0]["role"] == "system":
            system, messages, last_user = (
                f"{messages[0]['content']}\n\n",
                messages[1:],
                last_user - 1,
            )
        else:
            system = ""
        listed = "\n".join([json.dumps(tool["function"], ensure_ascii=False) for tool in tools])
        prompt = f"{TURN_START}system\n{system}{_TOOLS}{listed}{_TOOLS_END}{TURN_END}\n"
    before = ""
    for at, message in enumerate(messages):
        role = message["role"]
        if before == "tool" != role:
            prompt += f"{TURN_END}\n"
        if role == "tool":
            prompt += "" if before == "tool" else f"{TURN_START}user"
            prompt += f"\n{RESULT}\n{message['content']}\n{RESULT_END}"
        elif role == "assistant":
            prompt += f"{TURN_START}assistant\n"
            answer = message["content"] or ""
            for call in message.get("tool_calls", ()):
                answer += "\n" if answer else ""
                called = json.dumps(call["function"], ensure_ascii=False)
                answer += f"{CALL}\n{called}\n{CALL_END}"
            thoughts = message.get("reasoning_content")
            if thoughts and at > last_user:
                prompt += f"{THINK}\n"
                answer = f"{thoughts.strip()}\n{THINK_END}\n\n{answer}"
            written += [Piece(prompt, False), Piece(answer + TURN_END, True)]
            prompt = "\n"
        else:
            prompt += f"{TURN_START}{role}\n{message['content']}{TURN_END}\n"
        before = role
    if before == "tool":
        prompt += f"{TURN_END}\n"
    return [*written, Piece(prompt, False)]
