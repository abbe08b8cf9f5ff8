"""Embeddings in the making: what follows a request for one, as choices.py follows one for answers.

`Embedding` is used by both faces; `embed_all` by the gRPC service.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from ..errors import QuireError
from ..model.plan import FloatArray
from ..sched.request import FinishReason, Request, RequestOutput
from .engine_link import EngineLink

_AT_ONCE = 128
"""Requests of one call in the engine at once: enough to fill its steps, without filling its queue
however long the list of inputs is."""


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


async def embed_all(link: EngineLink, requests: Sequence[Request]) -> list[RequestOutput]:
    """The outputs that hold the requests' embeddings, in order.

    Raises:
      QuireError: one of them failed, or was refused; the others have been ended.
    """
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(request: Request) -> RequestOutput:
        async with room:
            return await _embed(link, request)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(request)) for request in requests]
    except BaseExceptionGroup as failures:
        # One says why; the rest were cancelled for it, or failed with it.
        known = [error for error in failures.exceptions if isinstance(error, QuireError)]
        raise (known or failures.exceptions)[0] from None
    return [task.result() for task in tasks]


async def _embed(link: EngineLink, request: Request) -> RequestOutput:
    follower = Embedding()
    with link.open(request) as pending:
        try:
            while True:
                for output in await pending.take():
                    if follower.push(output) is not None:
                        return output
        finally:
            for reason, choice in follower.news(leaving=True):
                link.finish(request.id, reason, choice)
