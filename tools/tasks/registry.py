"""Every task by name, and how to draw from either side of the split.

`quire eval` and tools/train_demo take everything from here. A new task is one generator function in
a family's module and one entry in TASKS.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import arithmetic
from .example import Example, Split, is_held_out


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
      generate: a pure function of its random.Random; fast.
      share: of the training tokens (not examples), prompts included; all shares sum to 1. What that
        means in examples: `example_weights`.
      claim: the range, a phrase for the model card.
      instances: a lower bound of how many there are, under all wordings.
      held_out_levels: of a hard kind, the difficulties that the held-out side draws from; training
        draws from more.
    """

    name: str
    generate: Callable[[random.Random], Example]
    share: float
    claim: str
    instances: int
    held_out_levels: tuple[int, ...] = ()

    @property
    def hard(self) -> bool:
        """Whether it is meant to be answered right half to 85 % of the time, not nearly always."""
        return bool(self.held_out_levels)


def draw(task: Task, rng: random.Random, split: Split) -> Example:
    """One example of `task` from one side of the split."""
    while True:
        example = task.generate(rng)
        if is_held_out(example.key) != (split == "held_out"):
            continue
        if split == "train" or not task.hard or example.difficulty in task.held_out_levels:
            return example


def example_weights(
    count_tokens: Callable[[Example], int], seed: int = 0, sample: int = 100
) -> dict[str, float]:
    """How often to draw each task so that it gets its share of the tokens.

    Args:
      count_tokens: length of an example as it is trained on.

    Returns:
      Task name -> weight, for random.choices.
    """
    rng = random.Random(seed)
    weights = {}
    for name, task in TASKS.items():
        lengths = [count_tokens(draw(task, rng, "train")) for _ in range(sample)]
        weights[name] = task.share * sample / sum(lengths)
    return weights


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("add", arithmetic.add, 0.4, "sums of two numbers from 0 to 9,999", 50_000_000),
        Task("subtract", arithmetic.subtract, 0.3, "differences of two such numbers", 50_000_000),
        Task(
            "multiply",
            arithmetic.multiply,
            0.3,
            "products of two numbers of up to four digits, without thinking",
            1_000_000,
            arithmetic.MULTIPLY_HELD_OUT,
        ),
    )
}
