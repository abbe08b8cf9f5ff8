"""Results for threads that wait: requests submitted together, their pieces as they come.

    engine thread:   Engine --Routes.deliver--> the queue of the stream that each output is for
    caller's thread: Stream.__next__: queue -> Choices or Embedding -> Chunk or vector

Used by serving/llm.py; the gRPC service has its own way, on an event loop.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from ..errors import QuireError
from ..sched.engine import Engine
from ..sched.request import FinishReason, Request, RequestOutput

Item = TypeVar("Item", covariant=True)
Piece = TypeVar("Piece", covariant=True)

_Queue = queue.SimpleQueue[RequestOutput | None]  # None: the stream was closed


class Follower(Protocol[Piece]):
    """What follows the outputs of one request: Choices for answers, Embedding for an embedding."""

    @property
    def finished(self) -> bool: ...

    def push(self, output: RequestOutput) -> Piece | None: ...

    def news(self, *, leaving: bool = False) -> Iterator[tuple[FinishReason, int | None]]: ...


class Routes:
    """Which queue the outputs of a request go to. Needs no lock: each use is one dict operation."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Called on the engine's thread."""
        for output in outputs:
            waiting = self._queues.get(output.request_id)
            if waiting is not None:  # else its stream was closed
                waiting.put(output)

    def add(self, request_id: str, waiting: _Queue) -> None:
        self._queues[request_id] = waiting

    def remove(self, request_id: str) -> None:
        self._queues.pop(request_id, None)


class _Open(dict[str, tuple[int, Follower[Any]]]):
    """A stream's unfinished requests, by id: which of them it is, and what follows it."""

    def __init__(self, engine: Engine, routes: Routes, waiting: _Queue):
        super().__init__()
        self._engine, self._routes, self._queue = engine, routes, waiting

    def add(self, index: int, request: Request, follower: Follower[Any]) -> None:
        self[request.id] = index, follower
        self._routes.add(request.id, self._queue)
        self._engine.submit(request)

    def tell(self, request_id: str, follower: Follower[Any], *, leaving: bool = False) -> None:
        # Of stop strings and callers who leave early the engine does not know.
        for reason, choice in follower.news(leaving=leaving):
            self._engine.finish(request_id, reason, choice)

    def leave(self, request_id: str) -> None:
        _, follower = self.pop(request_id, (0, None))  # None: another thread was faster
        self._routes.remove(request_id)
        if follower is not None:
            self.tell(request_id, follower, leaving=True)

    def close(self) -> None:
        for request_id in list(self):
            self.leave(request_id)
        self._queue.put(None)


class Stream(Iterator[Item], Generic[Item]):
    """Pieces of one or several requests' results: chunks of answers, or embeddings. The requests
    are submitted on construction.

    Ends when all of them have. Closing it early, by `close`, `with` or dropping the last reference
    to it, ends the requests and frees their pages.

    Args:
      engine: serves the requests.
      routes: where the engine delivers.
      requests: each with what follows it.
      make: (index of the request, piece) -> what the iterator gives.
      failed: (index of the request, why it failed) -> what the iterator gives, before it goes on
        with the others; None raises, and ends them.
      keep: must live as long as the stream does.

    Raises:
      QuireError: a request was refused; then none of them runs. From `next`, without `failed`: a
        request failed; then all of them end.
    """

    def __init__(
        self,
        engine: Engine,
        routes: Routes,
        requests: Sequence[tuple[Request, Follower[Piece]]],
        make: Callable[[int, Piece], Item],
        failed: Callable[[int, QuireError], Item] | None = None,
        keep: object = None,
    ):
        self._make: Callable[[int, Any], Item] = make
        self._failed, self._keep = failed, keep
        self._queue: _Queue = queue.SimpleQueue()
        self._open = _Open(engine, routes, self._queue)
        # Not `__del__`, which runs too late when the process ends.
        self._close = weakref.finalize(self, self._open.close)
        try:
            for index, (request, follower) in enumerate(requests):
                self._open.add(index, request, follower)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Item:
        while self._open:
            output = self._queue.get()
            found = None if output is None else self._open.get(output.request_id)
            if output is None or found is None:
                continue
            index, follower = found
            try:
                piece = follower.push(output)
            except QuireError as error:
                if self._failed is None:
                    self.close()
                    raise
                self._open.leave(output.request_id)
                return self._failed(index, error)
            except BaseException:
                self.close()
                raise
            self._open.tell(output.request_id, follower)
            if follower.finished:
                self._open.leave(output.request_id)
            if piece is not None:
                return self._make(index, piece)
        raise StopIteration

    def close(self) -> None:
        """Ends what is unfinished. Idempotent; safe while another thread waits for a chunk."""
        self._close()

    def __enter__(self) -> Stream[Item]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
