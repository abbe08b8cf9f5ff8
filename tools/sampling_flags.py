"""Sampling parameters as flags, for the commands that generate."""

from __future__ import annotations

import argparse
from typing import Any

from .flags import names, token_ids

_NUMBERS: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 is greedy (default: the model's own, else 0)"),
    "top_k": (int, "keep the k likeliest tokens; 0 keeps all"),
    "top_p": (float, "keep the likeliest tokens that together reach this probability"),
    "min_p": (float, "drop tokens less likely than this times the likeliest"),
    "repetition_penalty": (
        float,
        "above 1 discourages tokens of prompt and answer (default: the model's own, else 1)",
    ),
    "presence_penalty": (float, "discourages tokens that are in the answer (-2 to 2)"),
    "frequency_penalty": (float, "discourages tokens as often as they are in the answer (-2 to 2)"),
    "seed": (int, "makes sampled answers repeatable"),
    "max_tokens": (
        int,
        "output tokens at most (default: the model's own, else what the context allows)",
    ),
    "min_tokens": (int, "nothing ends the answer before this many tokens"),
}

_REPORTED: dict[str, tuple[type, str]] = {
    "logprobs": (int, "report log-probabilities of this many alternatives per token (0 to 20)"),
    "prompt_logprobs": (int, "the same for each token of the prompt (0 to 20)"),
    "n": (int, "answers to each prompt (1 to 128)"),
    "best_of": (int, "answers to make, of which the n likeliest are shown"),
}
"""For commands that show more than one answer's text as it comes."""


def _biases(text: str) -> dict[int, float]:
    """An argument such as 5=2.5,7=-100."""
    try:
        pairs = [part.split("=") for part in names(text)]
        given = [(int(token), float(bias)) for token, bias in pairs]
    except ValueError:
        given = []
    if not given:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be like 5=2.5,7=-100 (id=bias)")
    tokens = [token for token, _ in given]
    for token in tokens:
        if tokens.count(token) > 1:
            raise argparse.ArgumentTypeError(f"got {text!r}, must name token {token} once")
    return dict(given)


def add_sampling(parser: argparse.ArgumentParser, *, reports: bool = False) -> None:
    """Adds one flag per sampling parameter.

    Args:
      reports: also those that ask for more than one answer's text.
    """
    group = parser.add_argument_group("sampling")
    for name, (kind, help) in (_NUMBERS | (_REPORTED if reports else {})).items():
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
        "--logit-bias",
        type=_biases,
        metavar="ID=BIAS,...",
        help="added to the logits of these tokens (-100 to 100)",
    )
    group.add_argument(
        "--allowed-token-ids",
        type=token_ids,
        metavar="IDS",
        help="emit no other token ids: 1,2,3",
    )
    group.add_argument(
        "--bad-word",
        action="append",
        metavar="TEXT",
        help="must not be in the answer; may be given again",
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

    given = {name: getattr(args, name) for name in (*_NUMBERS, *_REPORTED) if name in args}
    if args.stop:
        given["stop"] = tuple(args.stop)
    if args.stop_token_ids:
        given["stop_token_ids"] = args.stop_token_ids
    for name in ("logit_bias", "allowed_token_ids"):
        if getattr(args, name):
            given[name] = getattr(args, name)
    if args.bad_word:
        given["bad_words"] = tuple(args.bad_word)
    if args.ignore_eos:
        given["ignore_eos"] = True
    if args.keep_special_tokens:
        given["skip_special_tokens"] = False
    SamplingParams(**{"max_tokens": None, **given})  # before anything that takes long
    return given
