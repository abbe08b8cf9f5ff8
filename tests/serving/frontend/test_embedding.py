"""How one call's embeddings share what room there is, without asking for it over and over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from quire.errors import Internal, Overloaded, Unavailable
from quire.sched.request import POOLED_SAMPLING, FinishReason, Request, RequestOutput
from quire.serving.frontend.embedding import embed_all
from quire.serving.frontend.pending import Pending


class Room:
    """A link to an engine that has room for so many; each takes a few turns of the event loop.

    Attributes:
      room: says for how many there is, given how many have ended.
    """

    def __init__(self, room: Callable[[int], int]) -> None:
        self.room = room
        self.tries = self.inside = self.ended = self.most = 0

    @contextmanager
    def open(self, request: Request) -> Iterator[Pending]:
        self.tries += 1
        pending = Pending(request.id)
        if self.inside >= self.room(self.ended):
            error = Overloaded("queue: full", retry_after=0.0)
            error.accounted = True  # as one that came over the wire
            pending.put(RequestOutput(request.id, finish_reason=FinishReason.ERROR, error=error))
            yield pending
            return
        self.inside += 1
        self.most = max(self.most, self.inside)

        async def answer() -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            self.inside -= 1
            self.ended += 1
            stop, vector = FinishReason.STOP, np.ones(2, np.float32)
            pending.put(RequestOutput(request.id, finish_reason=stop, pooled=vector, ended=True))

        answering = asyncio.ensure_future(answer())
        yield pending
        answering.cancel()

    def finish(self, *_: Any) -> None:
        pass

    async def lost(self) -> None:
        await asyncio.Event().wait()


def embed(link: Room, count: int) -> list[RequestOutput]:
    requests = [Request(id=str(n), prompt=(1,), sampling=POOLED_SAMPLING) for n in range(count)]
    return asyncio.run(asyncio.wait_for(embed_all(link, requests), 60))  # type: ignore[arg-type]


@pytest.mark.parametrize("room", [1, 2, 7])
def test_who_finds_no_room_asks_again_when_there_may_be_some(room: int) -> None:
    link = Room(lambda ended: room)
    outputs = embed(link, 600)
    assert [output.request_id for output in outputs] == [str(n) for n in range(600)]
    assert link.most == room
    # Each that ends lets two try again and one begin; before that, as many as may at once.
    assert link.tries <= 3 * 600 + 128


def test_room_that_grows_is_used() -> None:
    link = Room(lambda ended: 1 if ended < 50 else 100)
    embed(link, 600)
    assert link.most == 100
    assert link.tries <= 3 * 600 + 128


def test_who_gives_up_gives_account_of_it() -> None:
    link = Room(lambda ended: 0)
    with pytest.raises(Overloaded) as caught:
        embed(link, 9)
    assert not caught.value.accounted  # so the service does


def test_what_was_computed_is_not_thrown_away() -> None:
    """As where a tenant may make fewer requests a minute than the call has inputs: to refuse it
    then would take as much from its limit each time that it is tried again, and never answer."""

    class Filling(Room):
        """Accepts two; then one for each refusal while nothing was under way."""

        def __init__(self) -> None:
            super().__init__(lambda ended: 9 if self.accepted < 2 + self.waits else 0)
            self.accepted = self.waits = 0

        @contextmanager
        def open(self, request: Request) -> Iterator[Pending]:
            taken = self.inside
            with super().open(request) as pending:
                is_refused = self.inside == taken
                self.accepted += not is_refused
                self.waits += is_refused and self.inside == 0
                yield pending

    link = Filling()
    outputs = embed(link, 6)
    assert [output.request_id for output in outputs] == [str(n) for n in range(6)]
    assert link.waits


def test_who_waits_for_its_limits_hears_that_the_engine_is_gone() -> None:
    """At once, however long the wait was to be."""

    class Leaving(Room):
        def __init__(self) -> None:
            super().__init__(lambda ended: 1 - ended)
            self.gone = False

        @contextmanager
        def open(self, request: Request) -> Iterator[Pending]:
            if self.gone:
                raise Unavailable("the engine is gone")
            if self.ended:
                raise Overloaded("requests_per_minute: at its limit", retry_after=3600.0)
            with super().open(request) as pending:
                yield pending

        async def lost(self) -> None:
            self.gone = True

    with pytest.raises(Unavailable, match="the engine is gone"):
        embed(Leaving(), 2)


def test_a_failure_while_others_wait_ends_the_call() -> None:
    class Failing(Room):
        @contextmanager
        def open(self, request: Request) -> Iterator[Pending]:
            with super().open(request) as pending:
                if self.ended >= 5:
                    error = Internal("a fault")
                    reason = FinishReason.ERROR
                    pending.put(RequestOutput(request.id, finish_reason=reason, error=error))
                yield pending

    with pytest.raises(Internal, match="a fault"):
        embed(Failing(lambda ended: 3), 60)
