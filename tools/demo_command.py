"""`quire demo`: the shipped model answers, and the engine says what it did.

A short chat, streamed; a question of each task, all at once; many questions about one long table,
whose KV is computed once. Every question has an answer that can be checked, so this is also a quick
check of an installation: too few right ones make the exit status 1.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..config import EngineConfig
from ..errors import Internal
from . import standard_streams
from .flags import add_settings, from_zero, settings_from

if TYPE_CHECKING:
    from .demo.stage import Asked

MODEL = "demo"
BOUND = 0.8
"""The share of right answers, those to hard questions left out, below which something is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=from_zero, default=0, metavar="N", help="other questions (default: 0)"
    )
    add_settings(parser, EngineConfig, skip=("model", "max_queue"))


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..serving.llm import LLM
    from ..serving.progress import Terminal
    from .demo import stage
    from .demo.scenes import scenes

    console = Console(file=standard_streams.stdout(), highlight=False)
    with LLM(MODEL, reporter=Terminal(), **settings_from(args, EngineConfig)) as llm:
        asked = scenes(llm.parts.checkpoint, args.seed)
        console.print()
        went = [stage.chat(llm, asked.chat, console)]
        for name, examples in {"at once": asked.batch, "one table": asked.table}.items():
            if examples:
                console.print()
                went.append(stage.at_once(llm, name, examples, console))
        console.print()
        console.print(stage.summary(went, llm.stats(), llm.compiles_after_ready))
    check([a for scene in went for a in scene.asked])


def check(asked: list[Asked]) -> None:
    """Raises Internal where too few answers are right."""
    expected = [a for a in asked if not a.hard]
    wrong = [a for a in expected if not a.right]
    right = len(expected) - len(wrong)
    if right < BOUND * len(expected):
        raise Internal(
            f"{right} of {len(expected)} answers are right, must be at least {BOUND:.0%}; wrong: "
            f"{wrong[0].answer[:40]!r} to {wrong[0].question!r}"
        )
