"""Tells a model's thoughts from its answer while both stream: `quire chat --thinking`."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class Thoughts:
    """Splits one answer as it comes.

    Args:
      open: the prompt has already opened the thoughts, so that the model begins inside them.
    """

    def __init__(self, *, open: bool):
        self._state = "thoughts" if open else "undecided"
        self._held = ""  # may be the beginning of a tag
        self.thoughts = ""
        self.answer = ""

    def hear(self, text: str) -> tuple[str, str]:
        """What is certain by now and was not before: (of the thoughts, of the answer)."""
        self._held += text
        thought = answer = ""
        if self._state == "undecided":
            begun = self._held.lstrip()
            if begun.startswith(OPEN):
                self._state, self._held = "thoughts", begun.removeprefix(OPEN)
            elif not OPEN.startswith(begun):
                self._state = "answer"
        if self._state == "thoughts":
            thought, closed, rest = self._held.partition(CLOSE)
            if closed:
                self._state, self._held = "answer", rest
            else:
                kept = next(n for n in range(len(CLOSE), -1, -1) if thought.endswith(CLOSE[:n]))
                thought, self._held = thought[: len(thought) - kept], CLOSE[:kept]
        if self._state == "answer":
            # The line breaks between both belong to neither.
            answer = self._held if self.answer else self._held.lstrip("\n")
            self._held = ""
        return self._add(thought, answer)

    def end(self) -> tuple[str, str]:
        """What was held back in case it became a tag."""
        held, self._held = self._held, ""
        return self._add(held, "") if self._state == "thoughts" else self._add("", held)

    def _add(self, thought: str, answer: str) -> tuple[str, str]:
        if not self.thoughts:
            thought = thought.lstrip("\n")
        self.thoughts += thought
        self.answer += answer
        return thought, answer
