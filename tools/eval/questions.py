"""Which questions are asked: held-out examples of the chosen tasks, and what is left out of them.

Called by eval_command.py before the model loads, so that what cannot be asked is said at once. The
same seed draws the same examples of a task, whichever other tasks are chosen, and the first of them
whatever their number.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...errors import InvalidRequest
from .prompts import Ignored, Question, check_can_chat, pose

if TYPE_CHECKING:
    from ...checkpoints.folder import Checkpoint
    from ...serving.progress import Reporter
    from ..tasks.example import Example
    from ..tasks.registry import Task

_DRAWS = 200
"""Draws for each example wanted, after which a task is taken to have no other ones."""


@dataclass(slots=True)
class Paper:
    """The questions of one task, and how many could not be asked, and why."""

    task: Task
    questions: list[Question]
    refused: int = 0  # by the chat template
    refusal: str = ""  # what it said of the first
    too_long: int = 0  # for the model's context

    @property
    def fingerprint(self) -> str:
        """Equal where the same questions are asked, of whichever model."""
        digest = hashlib.blake2b(digest_size=8)
        for question in self.questions:
            example = question.example
            asked = (example.messages, example.tools, example.thinking)
            digest.update(json.dumps(asked, sort_keys=True).encode())
        return digest.hexdigest()

    def keep_within(self, context: int) -> None:
        """Leaves out, and counts, what a context of so many tokens cannot hold with its answer."""
        fits = [q for q in self.questions if len(q.prompt) + q.room < context]
        self.too_long += len(self.questions) - len(fits)
        self.questions = fits


@dataclass(frozen=True, slots=True)
class Exam:
    """All papers, and what a reader of the results has to know."""

    papers: list[Paper]
    notes: list[str] = field(default_factory=list)

    @property
    def questions(self) -> list[Question]:
        return [question for paper in self.papers for question in paper.questions]


def chosen_tasks(names: Sequence[str] | None) -> list[Task]:
    """The tasks of these names, in their own order; all of them for None.

    Raises:
      InvalidRequest: there is no such task; says which there are.
    """
    from ..tasks.registry import TASKS

    if names is None:
        return list(TASKS.values())
    for name in names:
        if name not in TASKS:
            raise InvalidRequest(f"--tasks: got {name!r}, must be among {', '.join(TASKS)}")
    return [task for name, task in TASKS.items() if name in names]


def held_out(task: Task, n: int, seed: int) -> list[Example]:
    """`n` different held-out examples; fewer where the task has no more."""
    from ..tasks.registry import draw

    rng = random.Random(f"{seed} {task.name}")
    found: dict[str, Example] = {}
    for _ in range(n * _DRAWS):
        example = draw(task, rng, "held_out")
        found.setdefault(example.key, example)
        if len(found) == n:
            break
    return list(found.values())


def set_exam(
    tasks: Sequence[Task], n: int, seed: int, checkpoint: Checkpoint, reporter: Reporter
) -> Exam:
    """Draws and renders `n` examples of each task.

    Raises:
      InvalidRequest: the checkpoint has no chat template or no tokenizer, or its template refused
        every example.
    """
    check_can_chat(checkpoint)
    papers, ignored = [], Ignored()
    with reporter.phase("questions") as update:
        for task in tasks:
            papers.append(_paper(task, n, seed, checkpoint, ignored))
            update(len(papers), len(tasks))
    exam = Exam(papers, ignored.notes())
    for paper in papers:
        if paper.refused:
            exam.notes.append(f"{paper.task.name}: {paper.refused} left out: {paper.refusal}")
    if not exam.questions:
        raise InvalidRequest(f"nothing can be asked: {papers[0].refusal}")
    unscored = sum(not question.right for question in exam.questions)
    if unscored:
        exam.notes.append(
            f"nll: {unscored} right answers left out: with an answer, the chat template renders "
            "another prompt than without"
        )
    return exam


def _paper(task: Task, n: int, seed: int, checkpoint: Checkpoint, ignored: Ignored) -> Paper:
    paper = Paper(task, [])
    for example in held_out(task, n, seed):
        try:
            paper.questions.append(pose(checkpoint, example))
            ignored.look(checkpoint, example)
        except InvalidRequest as error:
            paper.refused += 1
            paper.refusal = paper.refusal or str(error)
    return paper
