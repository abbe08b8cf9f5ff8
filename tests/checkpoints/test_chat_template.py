"""Chat templates: equality with transformers' apply_chat_template, errors, and bounds."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quire.checkpoints import chat_template as module
from quire.checkpoints.chat_template import ChatTemplate, load_chat_template
from quire.checkpoints.tokenizer import read_special_tokens
from quire.errors import CheckpointError, InvalidRequest

HEADERS = """{{- bos_token }}
{%- set ns = namespace(system="") %}
{%- if messages[0]["role"] == "system" %}
    {%- set ns.system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if ns.system or tools %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if tools %}
    {{- "Tools:\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- ns.system + "<|eot|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" or "tool_calls" in message and message.tool_calls %}
        {%- if message.role == "tool" %}
            {{- "<|start|>ipython<|end|>\\n\\n" + message.content | tojson + "<|eot|>" }}
            {%- continue %}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function %}
            {{- '{"name": "' + call.name + '", "parameters": ' }}
            {{- call.arguments | tojson + "}" }}
        {%- endfor %}
    {%- else %}
        {{- "<|start|>" + message["role"] + "<|end|>\\n\\n" }}
        {{- message["content"] | trim + "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant<|end|>\\n\\n" }}
{%- endif %}
"""

CHATML = """{% for message in messages %}
    {% if loop.first and message.role != "system" %}
<|im_start|>system
You help. Today is {{ strftime_now("%Y-%m-%d") }}.<|im_end|>
    {% endif %}
    {% if message.role == "assistant" %}
{% generation %}{% set inner = 1 %}
<|im_start|>assistant
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{ message.content }}<|im_end|>
{% endgeneration %}
    {% else %}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{{ message.content | map(attribute="text") | join }}{% endif %}<|im_end|>
    {% endif %}
    {% if inner is defined %}leaked{% endif %}
{% endfor %}
{% if tools is defined and tools is not none %}{{ tools | tojson(sort_keys=true) }}{% endif %}
{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{% endif %}
{{ unset_thing }}{{ eos_token }}{{ "<&>'" }}{{ dict(a=1) | tojson }}"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city: <b>now</b> & 'soon' — 天気",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CHAT = [
    {"role": "system", "content": "  You are helpful. "},
    {"role": "user", "content": "Hi <there> & 'you' 你好\n"},
    {"role": "assistant", "content": "Hello!", "reasoning": "be kind"},
    {"role": "user", "content": "Weather?"},
]
CALLS = [
    {"role": "user", "content": "Weather in Zürich?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}],
    },
    {"role": "tool", "content": {"degrees": 21.5, "sky": "<clear>"}},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]


@pytest.mark.parametrize(
    ("source", "messages"),
    [(HEADERS, CHAT), (HEADERS, CALLS), (CHATML, CHAT), (CHATML, CALLS), (CHATML, PARTS)],
    ids=["headers-chat", "headers-calls", "chatml-chat", "chatml-calls", "chatml-parts"],
)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_equals_transformers(
    source: str, messages: Any, tools: Any, prompt: bool, variables: Any, write_tokenizer: Any
) -> None:
    folder = write_tokenizer(
        chat_template=source, bos_token="<s>", eos_token={"__type": "AddedToken", "content": "</s>"}
    )
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **variables
    )
    ours = load_chat_template(folder, read_special_tokens(folder))
    assert ours.render(messages, tools=tools, add_generation_prompt=prompt, **variables) == theirs


def test_named_templates(write_tokenizer: Any) -> None:
    entries = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "{{ documents | length }}"},
    ]
    folder = write_tokenizer(chat_template=entries)
    ours, theirs = load_chat_template(folder, {}), AutoTokenizer.from_pretrained(folder)
    for tools, wanted in ((None, "plain"), (TOOLS, "tools")):
        assert ours.render(CHAT, tools=tools) == wanted
        assert theirs.apply_chat_template(CHAT, tools=tools, tokenize=False) == wanted
    assert ours.render(CHAT, template="rag", documents=[{}, {}]) == "2"
    with pytest.raises(InvalidRequest, match=r"template: got 'x', must be one of default, tool"):
        ours.render(CHAT, template="x")


def test_files_win_over_the_tokenizer_config(write_tokenizer: Any) -> None:
    folder = write_tokenizer(chat_template="config")
    assert load_chat_template(folder, {}).render(CHAT) == "config"
    (folder / "chat_template.jinja").write_text("file\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    ours, theirs = load_chat_template(folder, {}), AutoTokenizer.from_pretrained(folder)
    for tools in (None, TOOLS):
        wanted = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False)
        assert ours.render(CHAT, tools=tools) == wanted
    assert ours.render(CHAT) == "file"


def test_no_template(tmp_path: Path) -> None:
    template = load_chat_template(tmp_path, {})
    assert not template
    with pytest.raises(InvalidRequest, match=r"no chat template .*send a plain prompt"):
        template.render(CHAT)


def test_the_templates_own_refusal_reaches_the_caller() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('must start') }}{% endif %}"
    with pytest.raises(InvalidRequest, match=r"messages: .*refused them: must start$"):
        ChatTemplate({"default": source}, {}).render(CHAT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[99].role.upper() }}", "UndefinedError|undefined|no element"),
        ("{{ messages + 1 }}", "failed on them: TypeError"),
        ("{{ messages.append(1) }}", "refused them: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "refused them: .*unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ (1).bit_length() / 0 }}", "failed on them: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError|too big|Range too"),
        ("{{ 'x' * 10**9 }}", "a repeated value is too long"),
        ("{{ 10 ** 10 ** 10 }}", "a power is too large"),
    ],
)
def test_errors_while_rendering(source: str, message: str) -> None:
    template = ChatTemplate({"default": source}, {})
    with pytest.raises(InvalidRequest, match=message):
        template.render(CHAT)


NEST = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        NEST,
        "{% macro f() %}" + NEST + "{% endmacro %}{{ f() }}",
        "{% generation %}" + NEST + "{% endgeneration %}",
        "{% set x %}" + NEST + "{% endset %}",
    ],
)
def test_endless_template_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.05)
    start = time.thread_time()
    with pytest.raises(InvalidRequest, match=r"took longer than 0\.05 s"):
        ChatTemplate({"default": source}, {}).render(CHAT)
    assert time.thread_time() - start < 5


def test_huge_output_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OUTPUT", 1000)
    source = "{% for a in range(99999) %}{{ a }}{% endfor %}"
    with pytest.raises(InvalidRequest, match="more than 1000 characters"):
        ChatTemplate({"default": source}, {}).render(CHAT)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% generation %}", "{% nonsense %}"])
def test_template_that_does_not_parse(source: str, write_tokenizer: Any) -> None:
    folder = write_tokenizer(chat_template=source)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template: .*line 1"):
        load_chat_template(folder, {})


def test_template_of_a_wrong_type(write_tokenizer: Any) -> None:
    for value in ([{"name": "default"}], 3, ["x"]):
        with pytest.raises(CheckpointError, match=r"chat_template: must be a string or a list"):
            load_chat_template(write_tokenizer(chat_template=value), {})


def test_messages_are_not_changed_and_renders_are_independent() -> None:
    template = ChatTemplate({"default": "{% set messages = [] %}{{ strftime_now('%Y') }}"}, {})
    messages = [{"role": "user", "content": "x", "thinking": "y"}]
    assert template.render(messages) == template.render(messages) == str(datetime.now().year)
    assert messages == [{"role": "user", "content": "x", "thinking": "y"}]
