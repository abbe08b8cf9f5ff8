"""What is asked: held-out examples of the chosen tasks, rendered for one model.

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
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest

if TYPE_CHECKING:
    from ...checkpoints.folder import Checkpoint
    from ...serving.progress import Reporter
    from ..tasks.example import Example
    from ..tasks.registry import Task

_DRAWS = 200
"""Draws for each example wanted, after which a task is taken to have no other ones."""


@dataclass(frozen=True, slots=True)
class Question:
    """An example as one model sees it.

    Attributes:
      prompt: token ids up to where the answer begins.
      right: token ids of the right answer, the end of the turn included; empty where the chat
        template does not go on from the prompt, so that it cannot be scored.
      room: tokens that a right answer needs.
    """

    example: Example
    prompt: tuple[int, ...]
    right: tuple[int, ...]
    room: int


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
    papers, ignored = [], _Ignored()
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


def _paper(task: Task, n: int, seed: int, checkpoint: Checkpoint, ignored: _Ignored) -> Paper:
    paper = Paper(task, [])
    for example in held_out(task, n, seed):
        try:
            paper.questions.append(pose(checkpoint, example))
            ignored.look(checkpoint, example)
        except InvalidRequest as error:
            paper.refused += 1
            paper.refusal = paper.refusal or str(error)
    return paper


def check_can_chat(checkpoint: Checkpoint) -> None:
    """Raises InvalidRequest for a checkpoint without tokenizer or chat template."""
    from ...serving.intake import no_tokenizer

    if not checkpoint.has_tokenizer:
        raise no_tokenizer("messages")
    checkpoint.chat_template.render([{"role": "user", "content": "?"}])


def pose(checkpoint: Checkpoint, example: Example) -> Question:
    """Raises InvalidRequest where the chat template refuses the example."""
    asked = render(checkpoint, example)
    whole = render(checkpoint, example, answered=True)
    encode = checkpoint.tokenizer.encode
    prompt = encode(asked, add_special_tokens=False)
    if not whole.startswith(asked):
        room = len(encode(str(example.messages[-1].get("content")), add_special_tokens=False)) + 1
        return Question(example, tuple(prompt), (), room)
    right = encode(whole[len(asked) :], add_special_tokens=False)
    end = next((at for at, token in enumerate(right) if token in checkpoint.eos_ids), len(right))
    right = right[: end + 1]  # what a template writes after the end of a turn, no model has to say
    return Question(example, tuple(prompt), tuple(right), len(right))


def render(checkpoint: Checkpoint, example: Example, *, answered: bool = False) -> str:
    """The text of an example's prompt, or of all of it."""
    return _render(checkpoint, example, list(example.tools), example.thinking, answered)


def _render(
    checkpoint: Checkpoint,
    example: Example,
    tools: list[dict[str, Any]],
    thinking: bool,
    answered: bool = False,
) -> str:
    return checkpoint.chat_template.render(
        example.messages if answered else example.messages[:-1],
        tools=tools or None,
        add_generation_prompt=not answered,
        enable_thinking=thinking,
    )


class _Ignored:
    """Which of an example's wishes the chat template does not hear, looked up once for each task:
    then the model is asked all the same, and must fail through no fault of its own."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], bool] = {}  # (wish, task) -> ignored

    def look(self, checkpoint: Checkpoint, example: Example) -> None:
        if example.tools and ("tools", example.task) not in self._seen:
            without = _render(checkpoint, example, [], example.thinking)
            self._note("tools", checkpoint, example, without)
        if example.thinking and ("enable_thinking", example.task) not in self._seen:
            without = _render(checkpoint, example, list(example.tools), False)
            self._note("enable_thinking", checkpoint, example, without)

    def notes(self) -> list[str]:
        found: dict[str, list[str]] = {}
        for (wish, task), ignored in self._seen.items():
            if ignored:
                found.setdefault(wish, []).append(task)
        return [
            f"the chat template ignores {wish}: {', '.join(tasks)} asked without"
            for wish, tasks in found.items()
        ]

    def _note(self, wish: str, checkpoint: Checkpoint, example: Example, without: str) -> None:
        self._seen[wish, example.task] = render(checkpoint, example) == without
