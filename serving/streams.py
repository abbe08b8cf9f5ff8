"""Answers for threads that wait: requests submitted together, their chunks as they come.

    engine thread:   Engine --Routes.deliver--> the queue of the stream that each output is for
    caller's thread: Stream.__next__: queue -> Choices -> Chunk

Used by serving/llm.py; the gRPC service has its own way, on an event loop.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Generic, TypeVar

from ..errors import QuireError
from ..sched.engine import Engine
from ..sched.request import Request, RequestOutput
from .answer import Chunk
from .choices import Choices

Item = TypeVar("Item", covariant=True)

_Queue = queue.SimpleQueue[RequestOutput | None]  # None: the stream was closed


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


class _Open(dict[str, tuple[int, Choices]]):
    """A stream's unfinished requests, by id: which of them it is, and its answers."""

    def __init__(self, engine: Engine, routes: Routes, waiting: _Queue):
        super().__init__()
        self._engine, self._routes, self._queue = engine, routes, waiting

    def add(self, index: int, request: Request, choices: Choices) -> None:
        self[request.id] = index, choices
        self._routes.add(request.id, self._queue)
        self._engine.submit(request)

    def tell(self, request_id: str, choices: Choices, *, leaving: bool = False) -> None:
        # Of stop strings and callers who leave early the engine does not know.
        for reason, choice in choices.news(leaving=leaving):
            self._engine.finish(request_id, reason, choice)

    def leave(self, request_id: str) -> None:
        _, choices = self.pop(request_id, (0, None))  # None: another thread was faster
        self._routes.remove(request_id)
        if choices is not None:
            self.tell(request_id, choices, leaving=True)

    def close(self) -> None:
        for request_id in list(self):
            self.leave(request_id)
        self._queue.put(None)


class Stream(Iterator[Item], Generic[Item]):
    """Chunks of one or several answers. The requests are submitted on construction.

    Ends when all answers have. Closing it early, by `close`, `with` or dropping the last reference
    to it, ends the requests and frees their pages.

    Args:
      engine: serves the requests.
      routes: where the engine delivers.
      requests: each with what follows its answers.
      make: (index of the request, chunk) -> what the iterator gives.
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
        requests: Sequence[tuple[Request, Choices]],
        make: Callable[[int, Chunk], Item],
        failed: Callable[[int, QuireError], Item] | None = None,
        keep: object = None,
    ):
        self._make, self._failed, self._keep = make, failed, keep
        self._queue: _Queue = queue.SimpleQueue()
        self._open = _Open(engine, routes, self._queue)
        # Not `__del__`, which runs too late when the process ends.
        self._close = weakref.finalize(self, self._open.close)
        try:
            for index, (request, choices) in enumerate(requests):
                self._open.add(index, request, choices)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Item:
        while self._open:
            output = self._queue.get()
            found = None if output is None else self._open.get(output.request_id)
            if output is None or found is None:
                continue
            index, choices = found
            try:
                chunk = choices.push(output)
            except QuireError as error:
                if self._failed is None:
                    self.close()
                    raise
                self._open.leave(output.request_id)
                return self._failed(index, error)
            except BaseException:
                self.close()
                raise
            self._open.tell(output.request_id, choices)
            if choices.finished:
                self._open.leave(output.request_id)
            if chunk is not None:
                return self._make(index, chunk)
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
