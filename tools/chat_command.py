"""`quire chat [MODEL]`: a conversation in the terminal, streamed."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..config import EngineConfig
from ..errors import InvalidRequest
from .flags import add_settings, settings_from
from .sampling_flags import add_sampling, sampling_from

_HELP = "/new starts over, /quit (or the end of input) leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="demo", help="checkpoint folder, or `demo`")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_sampling(parser)
    add_settings(parser, EngineConfig, skip=("model",))


def run(args: argparse.Namespace) -> None:
    from ..serving.llm import LLM
    from ..serving.progress import Terminal

    reporter = Terminal()
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages: list[dict[str, Any]] = list(opening)
    with LLM(reporter=reporter, **settings_from(args, EngineConfig)) as llm:
        sampling = llm.default_sampling_params(**sampling_from(args))
        reporter.note(_HELP)
        while (said := _listen()) is not None:
            if said == "/new":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": said})
            try:
                messages.append({"role": "assistant", "content": _say(llm, messages, sampling)})
            except InvalidRequest as error:  # such as a conversation too long for the model
                messages.pop()
                reporter.note(str(error))


def _listen() -> str | None:
    """The next line a person typed; None to leave."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    for line in sys.stdin:
        said = line.strip()
        if said == "/quit":
            return None
        if said:
            return said
    return None


def _say(llm: Any, messages: list[dict[str, Any]], sampling: Any) -> str:
    """Streams the answer to stdout; an interrupt ends the answer, not the conversation."""
    answer = ""
    stream = llm.stream_chat(messages, sampling)
    try:
        for chunk in stream:
            answer += chunk.text
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return answer
