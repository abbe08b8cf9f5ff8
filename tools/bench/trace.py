"""Traces: how many prompt and output tokens each request has. Read here; token ids are drawn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidConfig
from .models import DATA

if TYPE_CHECKING:
    import numpy as np

SHIPPED = {
    "sharegpt-like": DATA / "trace_sharegpt_like.json",
    "long-answers": DATA / "trace_long_answers.json",
}
"""sharegpt-like: 1,000 requests with the lengths of chats, 207,595 prompt and 215,747 output
tokens. long-answers: 200 of 40 to 80 prompt and 900 to 1,000 output tokens."""


def add_trace(group: Any, *, clip: bool = False) -> None:
    """Adds --trace to a group of a parser's arguments, and a --clip that shortens by the engine's
    limit if it is to have one."""
    group.add_argument(
        "--trace",
        default="sharegpt-like",
        metavar="FILE",
        help="JSON list of [prompt tokens, output tokens], or a shipped one: sharegpt-like "
        "(default), or long-answers, whose requests all grow and so must take each other's pages",
    )
    if clip:
        group.add_argument(
            "--clip", action="store_true", help="shorten requests that are too long for the model"
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """Lengths of requests, in the order of arrival.

    Attributes:
      name: the shipped name or the file.
      prompts, outputs: tokens of each request.
      clipped: how many requests were shortened to fit an engine.
    """

    name: str
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    clipped: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def described(self, seed: int) -> dict[str, Any]:
        """As JSON has it; `seed` is what token ids were drawn by."""
        return {
            "name": self.name,
            "requests": len(self),
            "clipped": self.clipped,
            "prompt_tokens": sum(self.prompts),
            "output_tokens": sum(self.outputs),
            "seed": seed,
        }

    def first(self, count: int | None) -> Trace:
        """Its first requests; None is all."""
        return Trace(self.name, self.prompts[:count], self.outputs[:count])

    def fitted(self, longest: int, *, clip: bool) -> Trace:
        """This trace, when every request has at most `longest` tokens.

        Args:
          longest: the engine's limit on prompt and output together.
          clip: shorten what is longer, the prompt to half of the limit at most; else it is an
            error.
        """
        prompts, outputs, clipped = [], [], 0
        for at, (prompt, output) in enumerate(zip(self.prompts, self.outputs, strict=True)):
            if prompt + output > longest:
                if not clip:
                    raise InvalidConfig(
                        f"trace: request {at} has {prompt} + {output} tokens, must be at most "
                        f"{longest} (the engine's limit); add --clip to shorten such requests"
                    )
                prompt = min(prompt, longest // 2)
                output = min(output, longest - prompt)
                clipped += 1
            prompts.append(prompt)
            outputs.append(output)
        return Trace(self.name, tuple(prompts), tuple(outputs), clipped)


def read_trace(name: str) -> Trace:
    """A trace by shipped name or file: a JSON list of [prompt tokens, output tokens].

    Raises:
      InvalidConfig: no such file, or it is no trace.
    """
    file = SHIPPED.get(name, Path(name).expanduser())
    try:
        pairs = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            f"trace: got {name!r}, must be a JSON file or one of {', '.join(SHIPPED)}: {error}"
        ) from error
    if not isinstance(pairs, list) or not pairs:
        raise InvalidConfig(f"trace: {file}: must be a list of [prompt tokens, output tokens]")
    for at, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(_is_length(n) for n in pair)):
            raise InvalidConfig(
                f"trace: {file}: entry {at}: got {pair!r}, must be [prompt tokens, output tokens], "
                "each a whole number above 0"
            )
    return Trace(name, tuple(p for p, _ in pairs), tuple(o for _, o in pairs))


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def draw_prompts(
    lengths: tuple[int, ...] | list[int], vocab: int, draw: np.random.Generator
) -> list[tuple[int, ...]]:
    """Random token ids, so that no two prompts share a prefix but by chance."""
    return [tuple(draw.integers(0, vocab, length).tolist()) for length in lengths]
