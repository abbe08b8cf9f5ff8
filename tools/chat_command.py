"""`quire chat [MODEL]`: a conversation in the terminal, streamed."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig
from ..errors import InvalidRequest
from . import standard_streams
from .flags import add_model, add_settings, settings_from
from .sampling_flags import add_sampling, sampling_from

if TYPE_CHECKING:
    from ..serving.llm import LLM
    from ..serving.progress import Reporter

_HELP = "/new starts over, /quit (or the end of input) leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, default="demo")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_sampling(parser)
    add_settings(parser, EngineConfig, skip=("model", "max_queue"))


def run(args: argparse.Namespace) -> None:
    chosen, settings = sampling_from(args), settings_from(args, EngineConfig)
    standard_streams.stdin(), standard_streams.stdout()
    from ..serving.progress import Terminal

    reporter = Terminal()
    _check_can_chat(settings, reporter)
    from ..serving.llm import LLM

    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages: list[dict[str, Any]] = list(opening)
    with LLM(reporter=reporter, **settings) as llm:
        reporter.note(_HELP)
        while (said := _listen()) is not None:
            if said == "/new":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": said})
            try:
                answer = _say(llm, messages, chosen)
            except InvalidRequest as error:  # such as a conversation too long for the model
                messages.pop()
                reporter.note(str(error))
            else:
                messages.append({"role": "assistant", "content": answer})


def _check_can_chat(settings: dict[str, Any], reporter: Reporter) -> None:
    """Raises InvalidRequest for a model that cannot, before its weights are read."""
    from ..serving.assemble import open_checkpoint
    from ..serving.intake import no_tokenizer

    checkpoint = open_checkpoint(EngineConfig(**settings), reporter)
    if not checkpoint.has_tokenizer:
        raise no_tokenizer("messages")
    checkpoint.chat_template.render([{"role": "user", "content": "?"}])


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


def _say(llm: LLM, messages: list[dict[str, Any]], chosen: dict[str, Any]) -> str:
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
    return answer
