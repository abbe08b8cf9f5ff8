"""`quire generate MODEL (--prompt TEXT | --prompt-ids 1,2,3 | --prompts-file F) [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig
from ..errors import InvalidRequest
from .flags import add_settings, settings_from
from .sampling_flags import _ids, add_sampling, sampling_from

if TYPE_CHECKING:
    from ..serving.intake import Prompt
    from ..serving.llm import Completion, Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, or `demo`")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="text to continue; may be given again")
    source.add_argument("--prompt-ids", type=_ids, metavar="IDS", help="token ids: 1,2,3")
    source.add_argument(
        "--prompts-file", metavar="FILE", help="one prompt a line; - reads standard input"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a prompt, in the order of the prompts"
    )
    add_sampling(parser)
    add_settings(parser, EngineConfig, skip=("model",))


def run(args: argparse.Namespace) -> None:
    prompts = _prompts(args)
    from ..serving.llm import LLM
    from ..serving.progress import Terminal

    reporter = Terminal()
    with LLM(reporter=reporter, **settings_from(args, EngineConfig)) as llm:
        sampling = llm.default_sampling_params(**sampling_from(args))
        results = llm.generate(prompts, sampling, progress=reporter)
        for result in results:
            text = json.dumps(as_json(result), ensure_ascii=False) if args.json else _plain(result)
            sys.stdout.write(text + "\n")


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of whichever source was given."""
    if args.prompt_ids is not None:
        return [list(args.prompt_ids)]
    if args.prompt is not None:
        return list(args.prompt)
    try:
        if args.prompts_file == "-":
            text = sys.stdin.read()
        else:
            text = Path(args.prompts_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--prompts-file {args.prompts_file}: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InvalidRequest(f"--prompts-file {args.prompts_file}: holds no prompt")
    return list(lines)


def _plain(result: Generation) -> str:
    return result.outputs[0].text


def as_json(result: Generation) -> dict[str, Any]:
    """One prompt's result, as `--json` prints it."""
    answers = result.outputs
    return {
        "prompt_token_ids": result.prompt_token_ids,
        "outputs": [_answer(a) for a in answers],
        "usage": {
            "prompt_tokens": len(result.prompt_token_ids),
            "completion_tokens": sum(len(a.token_ids) for a in answers),
            "cached_tokens": result.cached_tokens,
        },
    }


def _answer(answer: Completion) -> dict[str, Any]:
    logprobs = None
    if answer.logprobs is not None:
        logprobs = [
            {
                "token_id": token,
                "token": at[token].decoded_token,
                "logprob": at[token].logprob,
                "rank": at[token].rank,
                "top": [
                    {"token_id": t, "token": lp.decoded_token, "logprob": lp.logprob}
                    for t, lp in at.items()
                ],
            }
            for token, at in zip(answer.token_ids, answer.logprobs, strict=True)
        ]
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "logprobs": logprobs,
    }
