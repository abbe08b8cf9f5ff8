"""Embeddings in the making: what follows a request for one, as choices.py follows one for answers.

Used by both faces: serving/llm.py and the gRPC service (frontend/embedding.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..model.plan import FloatArray
from ..sched.request import FinishReason, RequestOutput


class Embedding:
    """Follows one request for an embedding.

    Attributes:
      finished: nothing more will come.
    """

    def __init__(self) -> None:
        self.finished = False

    def push(self, output: RequestOutput) -> FloatArray | None:
        """The embedding, float32 [E] of length 1; None where there was nothing left to come.

        Raises:
          QuireError: the request ended with an error.
        """
        if self.finished:
            return None
        self.finished = output.ended
        if output.error is not None:
            raise output.error
        return output.pooled

    def news(self, *, leaving: bool = False) -> Iterator[tuple[FinishReason, int | None]]:
        """What the engine has to be told, once: that nobody waits for it any more."""
        if leaving and not self.finished:
            self.finished = True
            yield FinishReason.ABORT, None
