"""`quire generate MODEL (--prompt TEXT | --prompt-ids 1,2,3 | --prompts-file F) [--json]`.

Answers go to stdout in the order of the prompts: the text alone for one answer, with a line above
each that says whose it is for several, or with --json one object a line (for one prompt, one).
Without a tokenizer, token ids stand for the text. If a prompt fails on the way, the others' answers
are printed and the command fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig
from ..errors import InvalidRequest
from . import standard_streams
from .flags import add_model, add_settings, settings_from, token_ids
from .sampling_flags import add_sampling, sampling_from

if TYPE_CHECKING:
    from ..serving.intake import Prompt
    from ..serving.llm import Completion, Generation, PositionLogprobs
    from ..serving.progress import Reporter

_SHOWN = 60  # characters of a prompt in the line above its answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be given again"
    )
    source.add_argument(
        "--prompt-ids",
        action="append",
        type=token_ids,
        metavar="IDS",
        help="token ids to continue: 1,2,3; may be given again",
    )
    source.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="one prompt a line, blank lines left out; - reads standard input",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a prompt, each on its line"
    )
    add_sampling(parser, reports=True)
    add_settings(parser, EngineConfig, skip=("model", "max_queue"))


def run(args: argparse.Namespace) -> None:
    prompts, chosen = _prompts(args), sampling_from(args)
    settings = settings_from(args, EngineConfig)
    standard_streams.stdout()
    from ..serving.progress import Terminal

    reporter = Terminal()
    has_text = _has_text(prompts, settings, reporter)
    from ..serving.llm import LLM

    with LLM(reporter=reporter, **settings) as llm:
        sampling = [llm.default_sampling_params(prompt, **chosen) for prompt in prompts]
        results = llm.generate(prompts, sampling, progress=reporter, return_errors=True)
    if args.json:
        _write_json(results)
    else:
        _write_text(results, has_text)
    for result in results:
        if result.error is not None:
            raise result.error


def _has_text(prompts: list[Prompt], settings: dict[str, Any], reporter: Reporter) -> bool:
    """Whether the model has a tokenizer; prompts that need one are refused before it loads."""
    from ..serving.assemble import open_checkpoint
    from ..serving.intake import no_tokenizer

    has_tokenizer = open_checkpoint(EngineConfig(**settings), reporter).has_tokenizer
    if not has_tokenizer and any(isinstance(prompt, str) for prompt in prompts):
        raise no_tokenizer("prompt")
    return has_tokenizer


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of whichever source was given."""
    if args.prompt_ids is not None:
        return list(args.prompt_ids)
    if args.prompt is not None:
        return list(args.prompt)
    try:
        if args.prompts_file == "-":
            text = standard_streams.stdin().buffer.read().decode()
        else:
            text = Path(args.prompts_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--prompts-file {args.prompts_file}: {error}") from error
    # Not splitlines: a prompt may hold rarer kinds of line ends.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    prompts: list[Prompt] = [line for line in lines if line.strip()]
    if not prompts:
        raise InvalidRequest(f"--prompts-file {args.prompts_file}: holds no prompt")
    return prompts


def _write_text(results: list[Generation], has_text: bool) -> None:
    answers = [(i, result, a) for i, result in enumerate(results) for a in result.outputs]
    for at, (i, result, answer) in enumerate(answers):
        if len(answers) > 1:
            gap = "\n" if at else ""
            which = f"{i + 1} of {len(results)}"
            if len(result.outputs) > 1:
                which += f", answer {answer.index + 1} of {len(result.outputs)}"
            failed = " (failed)" if result.error is not None else ""
            sys.stdout.write(f"{gap}==> {which}: {_shown(result)} <=={failed}\n")
        said = answer.text if has_text else ",".join(map(str, answer.token_ids))
        sys.stdout.write(said + "\n")


def _shown(result: Generation) -> str:
    """The beginning of a prompt, in one line."""
    text = result.prompt
    if text is None:
        text = ",".join(map(str, result.prompt_token_ids[:_SHOWN]))
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _write_json(results: list[Generation]) -> None:
    for result in results:
        sys.stdout.write(json.dumps(as_json(result)) + "\n")


def as_json(result: Generation) -> dict[str, Any]:
    """One prompt's result, as `--json` prints it."""
    return {
        "prompt_token_ids": result.prompt_token_ids,
        "prompt_logprobs": None
        if result.prompt_logprobs is None
        else _positions(result.prompt_token_ids, result.prompt_logprobs),
        "outputs": [_answer(a) for a in result.outputs],
        "usage": {
            "prompt_tokens": len(result.prompt_token_ids),
            "completion_tokens": result.completion_tokens,
            "cached_tokens": result.cached_tokens,
        },
        "error": None if result.error is None else str(result.error),
    }


def _answer(answer: Completion) -> dict[str, Any]:
    known = answer.logprobs
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "cumulative_logprob": answer.cumulative_logprob,
        "logprobs": None if known is None else _positions(answer.token_ids, known),
    }


def _positions(
    tokens: Sequence[int], positions: Sequence[PositionLogprobs | None]
) -> list[dict[str, Any] | None]:
    """For each token its own log-probability, and that of each alternative asked for."""
    shown: list[dict[str, Any] | None] = []
    for chosen, at in zip(tokens, positions, strict=True):
        if at is None:  # the first token of a prompt
            shown.append(None)
            continue
        entries = [
            {"token_id": t, "token": p.decoded_token, "logprob": p.logprob, "rank": p.rank}
            for t, p in at.items()
        ]
        own = next(entry for entry in entries if entry["token_id"] == chosen)
        shown.append({**own, "alternatives": [e for e in entries if e is not own]})
    return shown
