"""Sampling parameters as flags, for the commands that generate."""

from __future__ import annotations

import argparse
from typing import Any

from .flags import token_ids

_NUMBERS: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 is greedy (default: the model's own, else 0)"),
    "top_k": (int, "keep the k likeliest tokens; 0 keeps all"),
    "top_p": (float, "keep the likeliest tokens that together reach this probability"),
    "min_p": (float, "drop tokens less likely than this times the likeliest"),
    "seed": (int, "makes sampled answers repeatable"),
    "max_tokens": (
        int,
        "output tokens at most (default: the model's own, else what the context allows)",
    ),
    "min_tokens": (int, "nothing ends the answer before this many tokens"),
    "logprobs": (int, "report log-probabilities of this many alternatives per token (0 to 20)"),
}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per sampling parameter."""
    group = parser.add_argument_group("sampling")
    for name, (kind, help) in _NUMBERS.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, help=help, default=argparse.SUPPRESS, metavar="N")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends the answer; may be given again"
    )
    group.add_argument(
        "--stop-token-ids",
        type=token_ids,
        metavar="IDS",
        help="token ids that end the answer: 1,2,3",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="do not end at the model's end of sequence"
    )
    group.add_argument(
        "--keep-special-tokens", action="store_true", help="leave special tokens in the text"
    )


def sampling_from(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters the user gave, to lay over the model's defaults.

    Raises:
      InvalidRequest: they are out of range, or contradict each other.
    """
    from ..sched.request import SamplingParams

    given = {name: getattr(args, name) for name in _NUMBERS if name in args}
    if args.stop:
        given["stop"] = tuple(args.stop)
    if args.stop_token_ids:
        given["stop_token_ids"] = args.stop_token_ids
    if args.ignore_eos:
        given["ignore_eos"] = True
    if args.keep_special_tokens:
        given["skip_special_tokens"] = False
    SamplingParams(**{"max_tokens": None, **given})  # before anything that takes long
    return given
