"""All answers to one request: engine outputs in, chunks of whichever answer they are for out.

Both faces use it, over one Answer a choice. Which answers are the best is decided here too: only
the text tells where a stop string ended one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import invalid
from ..sched.request import FinishReason, RequestOutput, SamplingParams
from .answer import Answer, Chunk, Completion


class Choices:
    """Follows one request.

    Args:
      sampling: of the request.
      make: an Answer for one choice.

    Attributes:
      finished: nothing more will come.
    """

    def __init__(self, sampling: SamplingParams, make: Callable[[], Answer]):
        self._answers = [make() for _ in range(sampling.choices)]
        self._unfinished = len(self._answers)
        self._untold: list[int] = []  # ended by their text, of which the engine does not know
        self.finished = False

    def push(self, output: RequestOutput) -> Chunk | None:
        """The chunk an engine output makes; None when that answer had already ended.

        Raises:
          QuireError: the request ended with an error, and all its answers with it.
        """
        if self.finished:
            return None
        if output.error is not None:
            self.finished = True
            raise output.error
        answer = self._answers[output.choice]
        chunk = answer.push(output)
        if chunk is not None and answer.finished:
            self._unfinished -= 1
            self.finished = not self._unfinished
            if answer.ended_by_text and output.finish_reason is None:
                self._untold.append(output.choice)
        return chunk

    def news(self, *, leaving: bool = False) -> Iterator[tuple[FinishReason, int | None]]:
        """What the engine has to be told of the request's choices (None: all of them), once.

        Args:
          leaving: nobody reads on.
        """
        if leaving and not self.finished:
            self.finished = True
            self._untold.clear()
            yield FinishReason.ABORT, None
        while self._untold:
            yield FinishReason.STOP, self._untold.pop()


def check_streamable(sampling: SamplingParams) -> None:
    """Raises InvalidRequest for what cannot be told before all answers have ended."""
    if sampling.ranked:
        limit = f"n ({sampling.n}), or none, in a stream: the best are known only at the end"
        raise invalid("best_of", sampling.best_of, limit)


def best(completions: list[Completion], sampling: SamplingParams) -> list[Completion]:
    """The answers to return, by falling sum of log-probabilities where there are more."""
    if not sampling.ranked:
        return completions
    ranked = sorted(completions, key=lambda c: c.cumulative_logprob or 0.0, reverse=True)
    for index, completion in enumerate(ranked[: sampling.n]):
        completion.index = index
    return ranked[: sampling.n]
