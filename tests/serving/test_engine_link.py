"""The stream between a frontend and the engine process: what either end says, to those who wait and
in the log, when it loses the other."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import struct
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire.errors import Internal, Unavailable
from quire.protos.v1 import engine_pb2 as pb
from quire.sched.request import FinishReason, Request, RequestOutput, SamplingParams
from quire.serving.engine_host import attached, host
from quire.serving.engine_stream import EngineStream, Listener, listen
from quire.serving.engine_wire import LIVENESS, PROTOCOL, Liveness, limits_message
from quire.serving.frontend.remote_link import RemoteLink
from quire.serving.intake import Served
from quire.tools.bench.null_runner import null_spec

SPEC = null_spec(4, page_size=16, max_model_len=64, pages=20)
REQUEST = Request(id="mine", prompt=(1, 2), sampling=SamplingParams(seed=1))
PATIENCE = 20.0


class Busy:
    """An engine that never answers."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.ended: list[str] = []

    def submit(self, request: Request) -> None:
        self.submitted.append(request.id)

    def finish(self, request_id: str, *_: Any) -> None:
        self.ended.append(request_id)


Stream = EngineStream[pb.ToEngine]
Attach = Callable[[Stream], Coroutine[Any, Any, None]]


def scripted(then: Callable[[Stream], Awaitable[None]], protocol: int = PROTOCOL) -> Attach:
    """Welcomes a frontend, and then does what a test wants."""

    async def attach(stream: Stream) -> None:
        await stream.read()
        limits = limits_message(SPEC)
        stream.send(pb.FromEngine(welcome=pb.Welcome(protocol=protocol, limits=limits, pid=77)))
        await then(stream)

    return attach


async def serve(attach: Attach, folder: Path) -> tuple[Listener, str]:
    """A listener whose streams are dealt with so, and its address."""
    address = f"unix:{folder / 'engine'}"
    return await listen(address, pb.ToEngine, attach), address


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


def records(caplog: pytest.LogCaptureFixture, name: str, **fields: Any) -> list[logging.LogRecord]:
    """What the module of this name said of a process; servers of other tests may speak too."""
    named = [r for r in caplog.records if r.name == f"quire.serving.{name}"]
    return [r for r in named if r.fields == fields]  # type: ignore[attr-defined]


def engine_loses(
    folder: Path,
    lose: Callable[[RemoteLink], Awaitable[None]],
    patience: Liveness = LIVENESS,
    frontends: Liveness = LIVENESS,
) -> tuple[Busy, host.EngineHost]:
    """An engine process with one request of a frontend, which it then loses."""
    engine = Busy()

    async def work() -> host.EngineHost:
        served = host.EngineHost(asyncio.get_running_loop(), liveness=patience)
        server, address = await serve(served.attach, folder)
        served.open(engine, SPEC, str(folder), (), Served("model", "float32"))  # type: ignore
        link = await RemoteLink.attach(address, "frontend 3", frontends)
        with link.open(REQUEST):
            await until(lambda: bool(engine.submitted))
            await lose(link)
            await until(lambda: bool(engine.ended))
        await link.close("the test is over")
        await server.stop(None)
        return served

    return engine, asyncio.run(work())


def test_the_engine_says_which_frontend_was_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def hang(link: RemoteLink) -> None:
        pass  # and say nothing more

    engine, served = engine_loses(tmp_path, hang, Liveness(silence=0.2), Liveness(heartbeat=3600.0))
    assert engine.ended == ["mine"] and not served._routes and not served.attached
    (record,) = records(caplog, "engine_host.attached", process="frontend 3", pid=os.getpid())
    assert record.levelno == logging.ERROR
    assert record.getMessage() == (
        "frontend 3 has said nothing for 0.2 s and is detached; 1 requests of it end"
    )


def test_the_engine_says_which_frontend_has_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def die(link: RemoteLink) -> None:
        link._stream.abort()

    engine, served = engine_loses(tmp_path, die)
    assert engine.ended == ["mine"] and not served._routes and not served.attached
    (record,) = records(caplog, "engine_host.attached", process="frontend 3", pid=os.getpid())
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "frontend 3 has left; 1 requests of it end"


def test_outputs_that_cannot_be_sent_leave_nobody_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the frontend may come again."""
    engine, sound = Busy(), attached.output_message

    async def work() -> None:
        served = host.EngineHost(asyncio.get_running_loop())
        server, address = await serve(served.attach, tmp_path)
        served.open(engine, SPEC, str(tmp_path), (), Served("model", "float32"))  # type: ignore
        last = RequestOutput("mine", finish_reason=FinishReason.LENGTH, ended=True)
        for output_message, error in ((broken, Unavailable), (sound, type(None))):
            monkeypatch.setattr(attached, "output_message", output_message)
            link = await RemoteLink.attach(address)
            with link.open(REQUEST) as pending:
                await until(lambda: "mine" in served._routes)
                served.deliver([last])
                async with asyncio.timeout(PATIENCE):
                    (output,) = await pending.take()
                assert isinstance(output.error, error)
                await until(lambda: not served._routes)
            await link.close("that was it")
        await server.stop(None)

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    asyncio.run(work())
    assert engine.submitted == ["mine", "mine"] and engine.ended == ["mine"]
    assert "a step's outputs are lost" in caplog.text and "ZeroDivisionError" in caplog.text


def test_ends_that_have_nothing_to_say_say_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_engine, at_frontend = list[pb.ToEngine](), list[pb.FromEngine]()
    often = Liveness(heartbeat=0.01)

    async def work() -> None:
        monkeypatch.setattr(host.EngineHost, "_hear", lambda *said: at_engine.append(said[-1]))
        monkeypatch.setattr(RemoteLink, "_hear", lambda *said: at_frontend.append(said[-1]))
        served = host.EngineHost(asyncio.get_running_loop(), liveness=often)
        server, address = await serve(served.attach, tmp_path)
        served.open(Busy(), SPEC, str(tmp_path), (), Served("model", "float32"))  # type: ignore
        link = await RemoteLink.attach(address, liveness=often)
        await until(lambda: len(at_engine) > 3 and len(at_frontend) > 3)
        await link.close("the test is over")
        await server.stop(None)

    asyncio.run(work())
    assert not any(message.ByteSize() for message in (*at_engine, *at_frontend))


def test_a_request_that_cannot_be_sent_leaves_nothing_behind(tmp_path: Path) -> None:
    async def work() -> None:
        server, address = await serve(scripted(say_nothing), tmp_path)
        link = await RemoteLink.attach(address)
        bad = replace(REQUEST, prompt=(1 << 40,))
        with pytest.raises(OverflowError), link.open(bad):
            pass
        assert not link._open and not link._handles and not link._next.submits
        await link.close("the test is over")
        await server.stop(None)

    asyncio.run(work())


def frontend_loses(
    folder: Path, then: Callable[[Any], Awaitable[None]], liveness: Liveness = LIVENESS
) -> str:
    """A frontend with one open request, whose engine then does something; how that ended."""

    async def work() -> str:
        server, address = await serve(scripted(then), folder)
        link = await RemoteLink.attach(address, liveness=liveness)
        with link.open(REQUEST) as pending:
            async with asyncio.timeout(PATIENCE):
                (output,) = await pending.take()
                await link.lost()
        await link.close("the test is over")
        await server.stop(None)
        return str(output.error)

    return asyncio.run(work())


async def say_nothing(stream: Stream) -> None:
    await asyncio.sleep(PATIENCE)


async def hang_up(stream: Stream) -> None:
    await stream.read()


async def say_what_is_no_message(stream: Stream) -> None:
    stream._transport.write(struct.pack("<I", 3) + b"\xff\xff\xff")
    await stream.read()


async def say_what_makes_no_sense(stream: Stream) -> None:
    stream.send(pb.FromEngine(steps=[pb.Step(handles=[1], tokens=[2], counts=[1, 1])]))
    await stream.read()


@pytest.mark.parametrize(
    ("then", "why"),
    [
        (say_nothing, "it has said nothing for 0.2 s"),
        (hang_up, "it hung up"),
        (say_what_is_no_message, "its stream broke: it sent what is no message: .*"),
        (say_what_makes_no_sense, "its stream broke: .* could not be dealt with: ValueError.*"),
    ],
)
def test_a_frontend_says_how_it_lost_the_engine(
    then: Callable[[Any], Awaitable[None]],
    why: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    patience = Liveness(silence=0.2) if then is say_nothing else LIVENESS
    said = frontend_loses(tmp_path, then, patience)
    assert said.startswith("request 'mine': the engine is gone")
    (record,) = records(caplog, "frontend.remote_link", process="the engine", pid=77)
    assert record.levelno == logging.WARNING
    said = rf"the engine is lost \({why}\); 1 requests to it end with UNAVAILABLE"
    assert re.fullmatch(said, record.getMessage())


@pytest.mark.parametrize("refuses", [True, False], ids=["it refuses", "it is refused"])
def test_an_engine_of_another_build_is_no_engine_to_wait_for(refuses: bool, tmp_path: Path) -> None:
    async def work() -> None:
        if refuses:
            attach: Attach = host.EngineHost(asyncio.get_running_loop()).attach
        else:
            attach = scripted(say_nothing, PROTOCOL + 1)
        server, address = await serve(attach, tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            if refuses:
                patch.setattr(host, "PROTOCOL", PROTOCOL + 1)
            with pytest.raises(Internal, match=rf"another build.*{PROTOCOL + 1}.*ours is"):
                await RemoteLink.attach(address)
        await server.stop(None)

    asyncio.run(work())
