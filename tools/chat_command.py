"""`quire chat [MODEL]`: a conversation in the terminal, streamed."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig
from ..errors import InvalidRequest
from . import standard_streams
from .flags import add_model, add_settings, settings_from
from .sampling_flags import add_sampling, sampling_from
from .thoughts import OPEN, Thoughts

if TYPE_CHECKING:
    from ..checkpoints.chat_template import ChatTemplate
    from ..serving.llm import LLM
    from ..serving.progress import Reporter

_HELP = "/new starts over, /quit (or the end of input) leaves"
_COMMAND = re.compile(r"/[a-z]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, default="demo")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--thinking",
        action="store_true",
        help="have the model think before it answers; its thoughts go to standard error",
    )
    add_sampling(parser)
    add_settings(parser, EngineConfig, skip=("model", "max_queue"))


def run(args: argparse.Namespace) -> None:
    chosen, settings = sampling_from(args), settings_from(args, EngineConfig)
    standard_streams.stdin(), standard_streams.stdout()
    from ..serving.progress import Terminal

    reporter = Terminal()
    _check_can_chat(settings, reporter, args.thinking)
    from ..serving.llm import LLM

    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages: list[dict[str, Any]] = list(opening)
    with LLM(reporter=reporter, **settings) as llm:
        reporter.note(_HELP)
        while (said := _listen()) is not None:
            if said == "/new":
                messages = list(opening)
                continue
            if _COMMAND.fullmatch(said):
                reporter.note(f"{said}: no such command; {_HELP}")
                continue
            messages.append({"role": "user", "content": said})
            try:
                answer = (_think if args.thinking else _say)(llm, messages, chosen)
            except InvalidRequest as error:  # such as a conversation too long for the model
                messages.pop()
                # With turns before it, the conversation is what is too long.
                reporter.note(f"{error}; {_HELP}" if len(messages) > len(opening) else str(error))
            else:
                messages.append({"role": "assistant", **answer})


def _check_can_chat(settings: dict[str, Any], reporter: Reporter, thinking: bool) -> None:
    """Raises InvalidRequest for a model that cannot, before its weights are read."""
    from ..serving.assemble import open_checkpoint
    from ..serving.intake import no_tokenizer

    checkpoint = open_checkpoint(EngineConfig(**settings), reporter)
    if not checkpoint.has_tokenizer:
        raise no_tokenizer("messages")
    template, asked = checkpoint.chat_template, [{"role": "user", "content": "?"}]
    template.render(asked)
    if thinking and not _opens(template, asked):
        with_it, without = (template.render(asked, enable_thinking=on) for on in (True, False))
        if with_it == without:
            raise InvalidRequest(
                "--thinking: this model's chat template ignores it (enable_thinking)"
            )


def _opens(template: ChatTemplate, messages: list[dict[str, Any]]) -> bool:
    """Whether the prompt ends inside the thoughts."""
    return template.render(messages, enable_thinking=True).rstrip().endswith(OPEN)


def _listen() -> str | None:
    """The next line a person typed; None to leave."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        said = line.strip()
        if not line or said == "/quit":
            return None
        if said:
            return said


def _say(llm: LLM, messages: list[dict[str, Any]], chosen: dict[str, Any]) -> dict[str, Any]:
    """Streams the answer to stdout; an interrupt ends the answer, not the conversation."""
    prompt = llm.chat_prompt(messages)
    answer = ""
    with llm.stream(prompt, llm.default_sampling_params(prompt, **chosen)) as stream:
        try:
            for chunk in stream:
                answer += chunk.text
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass
    sys.stdout.write("\n")
    sys.stdout.flush()
    return {"content": answer}


def _think(llm: LLM, messages: list[dict[str, Any]], chosen: dict[str, Any]) -> dict[str, Any]:
    """As `_say`, with the thoughts before the answer dim on stderr."""
    from rich.console import Console

    aside = Console(file=sys.stderr, stderr=True, highlight=False)
    said = Thoughts(open=_opens(llm.parts.checkpoint.chat_template, messages))
    prompt = llm.chat_prompt(messages, enable_thinking=True)
    chosen = {**chosen, "skip_special_tokens": False}  # the tags may be special tokens

    def show(thought: str, answer: str) -> None:
        aside.print(thought, end="", style="dim", markup=False, emoji=False, soft_wrap=True)
        if answer and answer == said.answer:
            aside.print()
        sys.stdout.write(answer)
        sys.stdout.flush()

    with llm.stream(prompt, llm.default_sampling_params(prompt, **chosen)) as stream:
        try:
            for chunk in stream:
                show(*said.hear(chunk.text))
        except KeyboardInterrupt:
            pass
    show(*said.end())
    sys.stdout.write("\n")
    sys.stdout.flush()
    return {"content": said.answer, "reasoning_content": said.thoughts}
