"""What the demo asks: a few turns of chat, one question of each task at once, and many questions
about one long table, all drawn from tools/tasks.

Called by demo_command.py with the checkpoint that will answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ..eval.answers import most_tokens
from ..eval.prompts import pose
from ..tasks.example import Example, exactly
from ..tasks.lookup import shared_table
from ..tasks.registry import TASKS, Task, draw

if TYPE_CHECKING:
    from ...checkpoints.folder import Checkpoint

CHAT = ("small_talk", "follow_up")
"""Tasks of the chat, each in all its turns."""
TABLE_QUESTIONS = 20
_SHORT = 400  # tokens of a prompt in the batch; long ones are the table's
_TRIES = 100


@dataclass(frozen=True, slots=True)
class Scenes:
    """What is asked in each, in order.

    Attributes:
      chat: turns of one conversation; each example holds its own turn alone.
      batch: all asked at once.
      table: all about one table, which is the first message of each.
    """

    chat: list[Example]
    batch: list[Example]
    table: list[Example]


def scenes(checkpoint: Checkpoint, seed: int) -> Scenes:
    """What to ask a model that learned the tasks."""
    rng = random.Random(f"demo {seed}")
    drawn = [next(e for e in _draws(TASKS[name], rng) if _is_plain(e)) for name in CHAT]
    chat = [turn for example in drawn for turn in _turns(example)]
    batch = []
    for task in TASKS.values():
        if not task.share:  # beyond what was trained: a matter for `quire eval`
            continue
        fitting = (e for e in _draws(task, rng) if len(pose(checkpoint, e).prompt) <= _SHORT)
        batch += [example for example in [next(fitting, None)] if example is not None]
    tables = (shared_table(rng, TABLE_QUESTIONS) for _ in range(_TRIES))
    table = next(t for t in tables if all(fits(checkpoint, e) for e in t))
    return Scenes(chat, batch, table)


def fits(checkpoint: Checkpoint, example: Example) -> bool:
    """Whether the model's context holds the prompt and what an answer may become."""
    posed = pose(checkpoint, example)
    longest = len(posed.prompt) + most_tokens(posed)
    return longest < checkpoint.config.max_served_positions


def is_hard(example: Example) -> bool:
    """Whether it is meant to be answered wrongly now and then."""
    return example.task in TASKS and TASKS[example.task].hard


def _draws(task: Task, rng: random.Random) -> Iterator[Example]:
    return (draw(task, rng, "held_out") for _ in range(_TRIES))


def _is_plain(example: Example) -> bool:
    """Questions that can stand anywhere in a chat, each with one right answer."""
    roles = {message["role"] for message in example.messages}
    return roles == {"user", "assistant"} and not example.tools and not example.thinking


def _turns(example: Example) -> Iterator[Example]:
    """Each question of a conversation with its answer."""
    for at in range(0, len(example.messages), 2):
        turn = example.messages[at : at + 2]
        last = at + 2 == len(example.messages)
        check = example.check if last else partial(exactly, str(turn[1]["content"]))
        yield replace(example, messages=turn, check=check)
