"""Trains the demo model: `python -P -m quire.tools.train_demo --out checkpoints/demo`.

Tasks and small talk (tasks.py, smalltalk.py) become text (chat.py), tokens (tokenizer.py) and
batches (data.py); train.py trains model.py's decoder on them; evaluate.py measures what export.py
will write; card.py describes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp

from ...model.abstract import AbstractDecoder
from ...serving.progress import Terminal
from .card import write_card
from .data import Stream
from .evaluate import Examiner, evaluate
from .export import export, rounded
from .model import demo_config
from .tokenizer import build
from .train import Recipe, train


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    reporter = Terminal()
    tokenizer = build()
    config = demo_config(tokenizer.get_vocab_size())
    model = AbstractDecoder(config, "float32")
    recipe = Recipe(steps=args.steps)
    stream = Stream(tokenizer, args.seed)
    run = train(model, stream, recipe, args.seed, reporter, args.time_limit)

    weights = rounded(config, run.params)
    scores = {}
    for dtype, count in (("float32", args.held_out), ("bfloat16", args.held_out // 4)):
        with reporter.phase(f"measuring, {dtype}"):
            cast = {name: jnp.asarray(array, dtype) for name, array in weights.items()}
            examiner = Examiner(AbstractDecoder(config, dtype), cast, tokenizer)
            scores[dtype] = evaluate(examiner, count, args.seed)
    for score in scores["float32"]:
        reporter.note(f"{score.kind:<32} {score.right:>5} of {score.asked:>5}  {score.share:.1%}")

    parameters = sum(array.size for array in weights.values())
    card = write_card(
        config, recipe, run, args.seed, parameters, scores["float32"], scores["bfloat16"]
    )
    export(args.out, config, tokenizer, weights, card)
    reporter.note(f"{parameters:,} parameters written to {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -P -m quire.tools.train_demo", description="Train Quire's demo model."
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="where to write the model")
    add("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    add("--steps", type=int, default=Recipe.steps, help="default: %(default)s")
    add("--time-limit", type=float, metavar="SECONDS", help="stop training early")
    add(
        "--held-out",
        type=int,
        default=1000,
        metavar="N",
        help="held-out instances per task to measure (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main()
