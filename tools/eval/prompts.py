"""What one model is asked: examples as its chat template renders them, and its tokenizer cuts them.

Called by questions.py for `quire eval`, and by `quire demo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...checkpoints.folder import Checkpoint
    from ..tasks.example import Example


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


class Ignored:
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
