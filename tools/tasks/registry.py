"""Every task by name, and how to draw from either side of the split.

`quire eval` and tools/train_demo take everything from here. A new task is one generator function in
a family's module and one entry in TASKS.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import (
    arithmetic,
    counting,
    dates,
    facts,
    json_answers,
    lists,
    lookup,
    small_talk,
    stories,
    strings,
    thinking,
    tool_calls,
    units,
)
from .example import Example, Split, is_held_out
from .topics import TOPICS


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
      generate: a pure function of its random.Random; fast.
      share: of the training tokens (not examples), prompts included; all shares sum to 1. What that
        means in examples: `example_weights`. 0: it is only asked.
      claim: the range, a phrase for the model card.
      instances: a lower bound of how many there are, under all wordings.
      held_out_levels: the difficulties that the held-out side draws from, where training draws from
        more; (): all.
      hard: whether it is meant to be answered right half to 85 % of the time, not nearly always.
    """

    name: str
    generate: Callable[[random.Random], Example]
    share: float
    claim: str
    instances: int
    held_out_levels: tuple[int, ...] = ()
    hard: bool = False


def draw(task: Task, rng: random.Random, split: Split) -> Example:
    """One example of `task` from one side of the split."""
    while True:
        example = task.generate(rng)
        if is_held_out(example.key) != (split == "held_out"):
            continue
        levels = task.held_out_levels if split == "held_out" else ()
        if not levels or example.difficulty in levels:
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
        if not task.share:
            continue
        lengths = [count_tokens(draw(task, rng, "train")) for _ in range(sample)]
        weights[name] = task.share * sample / sum(lengths)
    return weights


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("add", arithmetic.add, 0.025, "sums of two numbers from 0 to 9,999", 50_000_000),
        Task(
            "subtract",
            arithmetic.subtract,
            0.025,
            "differences of two numbers from 0 to 9,999, also below zero",
            50_000_000,
        ),
        Task(
            "multiply",
            arithmetic.multiply,
            0.035,
            "products of two numbers of up to four digits, without thinking",
            1_000_000,
            arithmetic.MULTIPLY_HELD_OUT,
            hard=True,
        ),
        Task(
            "expression",
            arithmetic.expression,
            0.04,
            "expressions of up to five operations, without thinking",
            10_000_000,
            arithmetic.EXPRESSION_HELD_OUT,
            hard=True,
        ),
        Task(
            "follow_up",
            arithmetic.follow_up,
            0.02,
            "a sum changed by up to three further turns",
            10_000_000,
        ),
        Task(
            "think_multiply",
            thinking.think_multiply,
            0.04,
            "products of up to four by two or three by three digits, thinking",
            500_000,
        ),
        Task(
            "think_expression",
            thinking.think_expression,
            0.035,
            "expressions of two to six operations, thinking",
            10_000_000,
        ),
        Task(
            "think_problem",
            thinking.think_problem,
            0.03,
            "problems told as a story, of two to four calculations, thinking",
            10_000_000,
        ),
        Task(
            "count_letters",
            counting.count_letters,
            0.025,
            f"up to {counting.MAX_LETTER_COUNT} of a letter in a word, and the length of words",
            10_000_000,
        ),
        Task(
            "count_items",
            counting.count_items,
            0.025,
            f"up to {counting.MAX_ITEM_COUNT} words, or the same word in a list",
            10_000_000,
        ),
        Task(
            "sort_numbers",
            lists.sort_numbers,
            0.02,
            "three to seven numbers of up to three digits, up or down",
            10_000_000,
        ),
        Task(
            "sort_long",
            lists.sort_long,
            0.03,
            "8 to 64 numbers of up to three digits",
            10_000_000,
        ),
        Task(
            "sort_words",
            lists.sort_words,
            0.02,
            "three to six nouns, alphabetically",
            10_000_000,
        ),
        Task(
            "turn_list",
            lists.turn_list,
            0.015,
            "lists of three to eight numbers or nouns, from the end",
            10_000_000,
        ),
        Task(
            "extreme",
            lists.extreme,
            0.015,
            "the largest, smallest or second largest of three to ten numbers",
            10_000_000,
        ),
        Task(
            "place",
            lists.place,
            0.015,
            "the item at a place of a list of four to ten",
            10_000_000,
        ),
        Task(
            "copy",
            strings.copy,
            0.015,
            f"texts of up to {strings.MAX_COPIED_CHARS} characters",
            10_000_000,
        ),
        Task(
            "reverse",
            strings.reverse,
            0.02,
            "words of two to twelve letters, or up to ten digits",
            10_000_000,
        ),
        Task(
            "spell",
            strings.spell,
            0.015,
            "words of two to twelve letters, and words from their letters",
            10_000_000,
        ),
        Task(
            "letter",
            strings.letter,
            0.01,
            "a letter of a word by its place, from the first to the eighth or the end",
            10_000_000,
        ),
        Task(
            "edit",
            strings.edit,
            0.025,
            "one change to a word of three to ten letters",
            10_000_000,
        ),
        Task(
            "dates",
            dates.dates,
            0.03,
            f"dates from {dates.YEARS[0]} to {dates.YEARS[1]} in other forms, or up to "
            f"{dates.MAX_DAYS_ON} days on or back",
            500_000,
        ),
        Task(
            "days_between",
            dates.days_between,
            0.04,
            "the days between two dates, up to 30,000",
            10_000_000,
        ),
        Task(
            "clock",
            dates.clock,
            0.02,
            "times of day, up to 200 minutes on or back",
            500_000,
        ),
        Task("units", units.units, 0.025, "units of length, weight, time and more", 200_000),
        Task(
            "table",
            lookup.table,
            0.08,
            "a value of a named row, in tables of 2 to 16 rows",
            10_000_000,
            (lookup.BY_NAME,),
        ),
        Task(
            "long_table",
            lookup.long_table,
            0.09,
            "the same in tables of 300 to 1,500 tokens",
            10_000_000,
            (lookup.BY_NAME,),
        ),
        Task("facts", facts.facts, 0.05, "texts of up to 24 statements", 10_000_000),
        Task("json", json_answers.json_answer, 0.045, "records as JSON to a schema", 10_000_000),
        Task(
            "tool_call",
            tool_calls.tool_call,
            0.05,
            "one or two calls, with up to four tools offered",
            10_000_000,
        ),
        Task(
            "tool_result",
            tool_calls.tool_result,
            0.025,
            "saying what a tool returned",
            10_000_000,
        ),
        Task("story", stories.story, 0.015, "stories about a name, an animal and a place", 100_000),
        Task(
            "small_talk",
            small_talk.small_talk,
            0.03,
            f"{len(TOPICS)} topics, one or two at once, names and likings to remember",
            200_000,
        ),
        # Trained as part of table and long_table.
        Task(
            "table_row",
            lookup.table_row,
            0.0,
            "the name of the row that has a value, in tables of 2 to 16 rows",
            10_000_000,
        ),
        # Longer than what sort_long trains.
        Task(
            "sort_longer",
            lists.sort_longer,
            0.0,
            f"{lists.SORT_LONGER[0]} to {lists.SORT_LONGER[1]} numbers, where training ends at "
            f"{max(lists.SORT_LONG_LENGTHS.values())}",
            10_000_000,
            hard=True,
        ),
    )
}
