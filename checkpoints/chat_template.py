"""A checkpoint's chat template: messages -> the prompt's text. Made by folder.py, used by serving/.

Renders as transformers does, which is what template authors test with. A template comes with the
model and is code of a kind, so it runs in jinja's sandbox, and a clock and a limit on its output
keep one that loops from taking the process with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError, InvalidRequest
from .json_fields import read_json_if_there

MAX_OUTPUT = 32 << 20
"""Characters a rendered prompt may have; the longest contexts need a fifth of it."""

MAX_SECONDS = 5.0
"""Time a template may take, checked at each turn of a loop."""

_TICK = "quire_loop_tick"


class ChatTemplate:
    """The templates of a checkpoint by name; usually one, "default"."""

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str], where: str = "template"
    ) -> None:
        """
        Args:
          sources: name -> jinja source.
          special_tokens: variables such as bos_token, for the template.
          where: the file, for error messages.
        """
        self._special_tokens = dict(special_tokens)
        self._templates = {name: _compile(text, name, where) for name, text in sources.items()}
        self.sources = dict(sources)

    def __bool__(self) -> bool:
        """Whether the checkpoint has a template at all."""
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text. It holds the special tokens already: encode it without adding any.

        Args:
          messages: objects with a role and content, as in the OpenAI API.
          tools: JSON schemas of the functions the model may call.
          documents: for templates that know them.
          add_generation_prompt: end with the head of the assistant's answer.
          template: name of a template; default: "tool_use" with tools where there is one, else
            "default".
          variables: whatever else the template reads (enable_thinking, ...).
        """
        chosen = self._choose(template, bool(tools))
        clock = _Clock()
        inputs = {
            **self._special_tokens,
            **variables,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            _TICK: clock.tick,
        }
        try:
            return _bounded_join(chosen.generate(inputs), clock)
        except InvalidRequest:
            raise
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"messages: the chat template refused them: {error}") from error
        except Exception as error:  # a template can raise anything its expressions can
            raise InvalidRequest(
                f"messages: the chat template failed on them: {type(error).__name__}: {error}"
            ) from error

    def _choose(self, name: str | None, has_tools: bool) -> jinja2.Template:
        if not self._templates:
            raise InvalidRequest(
                "messages: this checkpoint has no chat template (chat_template in "
                "tokenizer_config.json, or chat_template.jinja); send a plain prompt instead"
            )
        if name is None:
            name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRequest(
                f"template: got {name!r}, must be one of {', '.join(self._templates)}"
            )
        return self._templates[name]


def load_chat_template(folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """The templates of a folder; files of their own win over tokenizer_config.json."""
    sources = _template_files(folder)
    if sources:
        return ChatTemplate(sources, special_tokens, f"{folder}: chat_template.jinja")
    file = folder / "tokenizer_config.json"
    value = read_json_if_there(file).get("chat_template")
    if value is None:
        return ChatTemplate({}, special_tokens)
    if isinstance(value, str):
        value = [{"name": "default", "template": value}]
    try:
        sources = {str(entry["name"]): entry["template"] for entry in value}
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: chat_template: must be a string or a list of {{name, template}}"
        ) from error
    return ChatTemplate(sources, special_tokens, f"{file}: chat_template")


def _template_files(folder: Path) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        files[extra.stem] = extra
    return {name: _read_text(file) for name, file in files.items() if file.is_file()}


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; for serving it is nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own way to declare it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope, because transformers runs the body as a macro: what it sets stays inside.
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """jinja's sandbox, which also refuses to build huge values in one operation."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > MAX_OUTPUT or abs(right) > 64):
            raise jinja2.TemplateRuntimeError("a power is too large")
        for text, times in ((left, right), (right, left)):
            is_repeat = isinstance(text, str | list | tuple) and isinstance(times, int)
            if is_repeat and len(text) * times > MAX_OUTPUT:
                raise jinja2.TemplateRuntimeError("a repeated value is too long")
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes HTML, which models were never trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compile(source: str, name: str, where: str) -> jinja2.Template:
    environment = _environment()
    try:
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            tick = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(tick, lineno=loop.lineno))
        code = environment.compile(tree, name)
    except (jinja2.TemplateError, TypeError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        at = f" line {line}" if line else ""
        raise CheckpointError(f"{where}: template {name}:{at} {error}") from error
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


class _Clock:
    """Ends a render that takes too long. jinja bounds a single range, but not loops in loops."""

    def __init__(self) -> None:
        self._end = time.monotonic() + MAX_SECONDS

    @property
    def tick(self) -> Callable[[], None]:
        end, now = self._end, time.monotonic

        def tick() -> None:
            if now() > end:
                raise jinja2.TemplateRuntimeError(f"it took longer than {MAX_SECONDS:g} s")

        return tick


def _bounded_join(pieces: Iterable[str], clock: _Clock) -> str:
    tick = clock.tick
    out, size = [], 0
    for piece in pieces:
        tick()
        size += len(piece)
        if size > MAX_OUTPUT:
            raise InvalidRequest(
                f"messages: the chat template made more than {MAX_OUTPUT} characters"
            )
        out.append(piece)
    return "".join(out)


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Hands a message's reasoning on under both names that templates read, as transformers does."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if found is None:
        return dict(message)
    return {"thinking": found, **message, "reasoning_content": found}
