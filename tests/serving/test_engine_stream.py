"""The stream between a frontend and the engine process, end to end over a socket."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from quire.protos.v1 import engine_pb2 as pb
from quire.serving.engine_stream import (
    GREETING,
    EngineStream,
    Listener,
    OtherEnd,
    connect,
    listen,
)

ToEngine = EngineStream[pb.ToEngine]
FromEngine = EngineStream[pb.FromEngine]
PATIENCE = 20.0

run = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


def said(prompt: bytes) -> pb.ToEngine:
    return pb.ToEngine(submits=[pb.Submit(prompt=prompt)])


async def ends(folder: Path) -> tuple[ToEngine, FromEngine, Listener]:
    """Both, connected."""
    engines: asyncio.Future[ToEngine] = asyncio.get_running_loop().create_future()

    async def serve(stream: ToEngine) -> None:
        engines.set_result(stream)
        await stream.ended

    address = f"unix:{folder / 'engine'}"
    listener = await listen(address, pb.ToEngine, serve)
    frontend = await connect(address, pb.FromEngine)
    return await engines, frontend, listener


def on_a_loop(
    run: Callable[..., None],
    folder: Path,
    work: Callable[[ToEngine, FromEngine], Awaitable[None]],
) -> None:
    async def main() -> None:
        engine, frontend, listener = await ends(folder)
        async with asyncio.timeout(PATIENCE):
            await work(engine, frontend)
            await listener.stop(0)

    run(main())


@run
def test_messages_of_any_size_come_in_order(run: Callable[..., None], tmp_path: Path) -> None:
    sizes = [0, 1, 3_000_000, 0, 70_000, 5]

    async def work(engine: ToEngine, frontend: FromEngine) -> None:
        for size in sizes[:3]:
            frontend.send(said(b"x" * size))
        frontend.send(pb.ToEngine())
        heard = [await engine.read() for _ in sizes[:3]]
        done = asyncio.Event()

        def hear(message: pb.ToEngine) -> None:
            heard.append(message)
            if len(heard) == len(sizes) + 1:
                done.set()

        engine.listen(hear)
        for size in sizes[3:]:
            frontend.send(said(b"x" * size))
        await done.wait()
        del heard[3]  # the empty one
        assert [len(each.submits[0].prompt) for each in heard if each] == sizes
        engine.send(pb.FromEngine(awaited=True))
        answer = await frontend.read()
        assert answer is not None and answer.awaited

    on_a_loop(run, tmp_path, work)


@run
def test_what_was_said_before_the_end_is_heard(run: Callable[..., None], tmp_path: Path) -> None:
    async def work(engine: ToEngine, frontend: FromEngine) -> None:
        frontend.send(said(b"last" * 100_000))
        frontend.close()
        frontend.send(said(b"too late"))
        heard = await engine.read()
        assert heard is not None and len(heard.submits[0].prompt) == 400_000
        assert await engine.read() is None and await engine.ended == ""
        engine.send(pb.FromEngine())  # nobody hears it

    on_a_loop(run, tmp_path, work)


@run
def test_what_is_no_message_ends_the_stream(run: Callable[..., None], tmp_path: Path) -> None:
    async def work(engine: ToEngine, frontend: FromEngine) -> None:
        frontend._transport.write(struct.pack("<I", 2) + b"\xff\xff" + struct.pack("<I", 0))
        assert await engine.read() is None
        assert "no message" in await engine.ended
        assert await frontend.read() is None

    on_a_loop(run, tmp_path, work)


@run
def test_who_speaks_something_else_is_told_from_who_leaves(
    run: Callable[..., None], tmp_path: Path
) -> None:
    async def main() -> None:
        path, says = tmp_path / "engine", b"PRI * HTTP/2.0\r\n"

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(says)
            await reader.read(1)
            writer.close()

        server = await asyncio.start_unix_server(serve, path)
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(OtherEnd, match="something else"):
                await (await connect(f"unix:{path}", pb.FromEngine)).read()
            says = GREETING[:7]  # and then nothing: it has died
            assert await (await connect(f"unix:{path}", pb.FromEngine)).read() is None
        server.close()
        os.unlink(path)
        with pytest.raises(OSError):
            await connect(f"unix:{path}", pb.FromEngine)

    run(main())


@run
def test_silence_and_signs_of_life(run: Callable[..., None], tmp_path: Path) -> None:
    async def work(engine: ToEngine, frontend: FromEngine) -> None:
        heard = list[pb.ToEngine]()
        engine.listen(heard.append)
        beating = asyncio.ensure_future(frontend.beat(pb.ToEngine(), 0.01))
        silent = asyncio.ensure_future(engine.silent(0.5))
        while len(heard) < 5:
            await asyncio.sleep(0.01)
        assert not silent.done() and not any(each.ByteSize() for each in heard)
        beating.cancel()
        await silent

    on_a_loop(run, tmp_path, work)


@run
def test_a_socket_that_a_dead_process_left_is_taken(
    run: Callable[..., None], tmp_path: Path
) -> None:
    async def main() -> None:
        async def serve(stream: ToEngine) -> None:
            stream.send(pb.FromEngine(awaited=True))

        path = tmp_path / "engine"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        listener = await listen(f"unix:{path}", pb.ToEngine, serve)
        message = await (await connect(f"unix:{path}", pb.FromEngine)).read()
        assert message is not None and message.awaited
        await listener.stop(1)

    run(main())


@run
def test_a_stream_that_is_closing_keeps_no_loop_busy(
    run: Callable[..., None], tmp_path: Path
) -> None:
    """A beat may be due between the end of a stream and that of the task."""

    async def work(engine: ToEngine, frontend: FromEngine) -> None:
        await asyncio.sleep(0.01)  # a beat is overdue
        frontend.abort()
        await frontend.beat(pb.ToEngine(), 0.001)

    on_a_loop(run, tmp_path, work)


@run
def test_silence_counts_from_when_somebody_listens_for_it(
    run: Callable[..., None], tmp_path: Path
) -> None:
    """A frontend has nothing to say while the engine reads its model."""
    seconds = 0.2

    async def work(engine: ToEngine, frontend: FromEngine) -> None:
        frontend.send(pb.ToEngine(hello=pb.Hello(name="here")))
        assert await engine.read() is not None
        await asyncio.sleep(seconds)
        begin = asyncio.get_running_loop().time()
        await engine.silent(seconds)
        assert asyncio.get_running_loop().time() - begin > seconds * 0.9

    on_a_loop(run, tmp_path, work)


@run
def test_a_length_that_no_message_has_ends_the_stream(
    run: Callable[..., None], tmp_path: Path
) -> None:
    async def work(engine: ToEngine, frontend: FromEngine) -> None:
        frontend._transport.write(struct.pack("<I", 2**31))
        assert "2147483648" in await engine.ended

    on_a_loop(run, tmp_path, work)


@run
def test_who_does_not_read_is_not_waited_for(run: Callable[..., None], tmp_path: Path) -> None:
    async def main() -> None:
        opened: list[ToEngine] = []

        async def serve(stream: ToEngine) -> None:
            opened.append(stream)
            stream.send(pb.ToEngine(submits=[pb.Submit(prompt=b"x" * 8_000_000)]))

        path = tmp_path / "engine"
        await listen(f"unix:{path}", pb.ToEngine, serve)
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(path))
            async with asyncio.timeout(PATIENCE):
                while not opened:
                    await asyncio.sleep(0.01)
                await opened[0].ended

    run(main())
