"""How the engine process sends to a frontend that takes its time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from quire.protos.v1 import engine_pb2 as pb
from quire.serving.engine_host import host


class Context:
    """Of a stream; keeps what is written."""

    def __init__(self) -> None:
        self.sent: list[pb.FromEngine] = []

    async def write(self, message: pb.FromEngine) -> None:
        self.sent.append(message)


async def let_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def step(token: int) -> pb.Step:
    return pb.Step(handles=[1], tokens=[token])


def tokens(message: pb.FromEngine) -> list[int]:
    return [token for one in message.steps for token in one.tokens]


def write(frontend: host._Frontend, context: Any) -> asyncio.Future[None]:
    return asyncio.ensure_future(frontend.write(pb.Welcome(protocol=1), context))


def test_a_frontend_that_is_behind_gets_what_it_missed_in_one_message() -> None:
    async def work() -> None:
        frontend, context = host._Frontend(), Context()
        writing = write(frontend, context)
        await let_run()
        assert context.sent.pop().welcome.protocol == 1
        frontend.send(step(1))
        await let_run()
        assert tokens(context.sent[0]) == [1] and context.sent[0].awaited
        frontend.send(step(2))
        frontend.send(step(3))
        await let_run()
        assert len(context.sent) == 1 and frontend.behind
        frontend.taken()
        await let_run()
        assert tokens(context.sent[1]) == [2, 3] and not frontend.behind
        frontend.taken()  # and has nothing more to get
        await let_run()
        assert len(context.sent) == 2
        frontend.send(step(4))
        await let_run()
        assert tokens(context.sent[2]) == [4]
        writing.cancel()

    asyncio.run(work())


def test_signs_of_life_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "HEARTBEAT", 0.01)

    async def work() -> None:
        frontend, context = host._Frontend(), Context()
        writing = write(frontend, context)
        frontend.send(step(1))
        frontend.send(step(2))
        while len(context.sent) < 4:
            await asyncio.sleep(0.01)
        assert [len(tokens(message)) for message in context.sent[:4]] == [0, 2, 0, 0]
        assert [message.awaited for message in context.sent[:4]] == [False, True, False, False]
        writing.cancel()

    asyncio.run(work())
