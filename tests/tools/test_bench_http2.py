"""The callers of `quire bench online`: against a server of grpc's own, and frame by frame."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from quire.errors import InvalidRequest, Overloaded, QuireError, Unavailable
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1 import generation_pb2_grpc as pb_grpc
from quire.tools.bench.http2 import Streams, read_headers
from quire.tools.bench.targets import WireTarget

DATA, SETTINGS, WINDOW_UPDATE = 0, 4, 8
WINDOW = 65_535


class Service(pb_grpc.GenerationServiceServicer):
    """Answers with the prompt's tokens, some a message; some prompts are refused."""

    def StreamGenerate(self, request: pb.GenerateRequest, context: Any) -> Iterator[Any]:
        ids = request.token_ids.ids
        assert request.sampling.ignore_eos and request.sampling.temperature == 0
        if ids[0] == 1:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "prompt: 100 % wrong, é")
        if ids[0] == 2:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue: full")
        for at in range(0, request.sampling.max_tokens, 3):
            count = min(3, request.sampling.max_tokens - at)
            yield pb.GenerateChunk(token_ids=[len(ids)] * count)
        usage = pb.Usage(cached_tokens=7)
        yield pb.GenerateChunk(
            finish_reason=pb.FINISH_REASON_LENGTH,
            usage=usage,
            timing=pb.Timing(queue_seconds=1, prefill_seconds=2),
        )


@pytest.fixture
def address() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(8))
    pb_grpc.add_GenerationServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


async def counts(target: WireTarget, prompt: list[int], output: int) -> list[int]:
    return [count async for count in target.stream(prompt, output)]


def test_answers_side_by_side(address: str) -> None:
    """With prompts that are longer than what may be sent at once."""

    async def main() -> None:
        told = list[tuple[int, float | None]]()
        async with WireTarget(address) as target:
            prompts = [[300] * length for length in (5, 60_000, 9, 40_000)]
            found = await asyncio.gather(*(counts(target, prompt, 8) for prompt in prompts))
            assert found == [[3, 6, 8]] * 4
            async for _ in target.stream([300], 2, lambda *what: told.append(what)):
                pass
        assert told == [(7, 3.0)]

    asyncio.run(main())


def test_failures_are_what_they_are(address: str) -> None:
    async def main() -> None:
        async with WireTarget(address) as target:
            with pytest.raises(InvalidRequest, match=r"^prompt: 100 % wrong, é$"):
                await counts(target, [1], 5)
            with pytest.raises(Overloaded, match="queue: full"):
                await counts(target, [2], 5)
            assert await counts(target, [3], 1) == [1]
        with pytest.raises(Unavailable):
            await counts(target, [3], 1)
        with pytest.raises(Unavailable):
            async with WireTarget("127.0.0.1:1"):
                pass

    asyncio.run(main())


def test_a_call_that_is_left_early_is_cancelled(address: str) -> None:
    async def main() -> None:
        async with WireTarget(address) as target:
            async for count in target.stream([3] * 9, 3_000):
                assert count == 3
                break
            assert await counts(target, [3], 4) == [3, 4]

    asyncio.run(main())


def test_a_server_that_goes_away_ends_all_calls() -> None:
    async def main() -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(200)
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with WireTarget(f"127.0.0.1:{port}") as target:
            calls = [counts(target, [3] * 20, 5) for _ in range(3)]
            for found in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(found, QuireError) and "was lost" in str(found)
        server.close()

    asyncio.run(main())


class Wire(asyncio.Transport):
    """Takes what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def data(self) -> dict[int, bytes]:
        """What was sent of each call, by its number."""
        found, at = dict[int, bytes](), self.sent.index(b"SM\r\n\r\n") + 6
        while at < len(self.sent):
            size = int.from_bytes(self.sent[at : at + 3], "big")
            kind, number = self.sent[at + 3], int.from_bytes(self.sent[at + 5 : at + 9], "big")
            assert size <= 16_384
            if kind == DATA:
                found[number] = found.get(number, b"") + self.sent[at + 9 : at + 9 + size]
            at += 9 + size
        return found


def frame(kind: int, payload: bytes, stream: int = 0) -> bytes:
    return struct.pack(">IBBI", len(payload), kind, 0, stream)[1:] + payload


def test_no_more_is_sent_than_the_server_has_room_for() -> None:
    wire, streams = Wire(), Streams()
    streams.connection_made(wire)
    first, second = streams.call("/a", b"x" * 50_000), streams.call("/b", b"y" * 50_000)
    sent = wire.data()
    assert (len(sent[first]), len(sent[second])) == (50_005, WINDOW - 50_005)
    streams.data_received(frame(WINDOW_UPDATE, struct.pack(">I", 10)))
    assert len(wire.data()[second]) == WINDOW - 50_005 + 10
    streams.data_received(frame(SETTINGS, struct.pack(">HI", 4, 20_000)))  # 35,000 are sent or due
    streams.data_received(frame(WINDOW_UPDATE, struct.pack(">I", 1 << 20)))
    assert len(wire.data()[second]) == 20_000
    streams.data_received(frame(WINDOW_UPDATE, struct.pack(">I", 1 << 20), second))
    assert wire.data()[second] == struct.pack(">BI", 0, 50_000) + b"y" * 50_000


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (b"", {}),
        (b"\x88\x0f\x10\x04gzip", {}),  # by number, and one whose name is
        (b"\x20\x40\x0bgrpc-status\x010\x10\x01a\x03b c", {"grpc-status": "0", "a": "b c"}),
        (b"\x3f\xe1\x1f\x00\x0cgrpc-message\x0aa%20%C3%A9\x88", {"grpc-message": "a é"}),
        (b"\x00\x01a\x81\xff", {"a": ""}),  # in Huffman's code
        (b"\x00\x01a\x7f\x49" + b"b" * 200, {"a": "b" * 200}),
    ],
)
def test_headers(block: bytes, found: dict[str, str]) -> None:
    assert read_headers(block) == found


class Noted(Streams):
    """Calls on a wire of its own; which of them are over."""

    def __init__(self) -> None:
        super().__init__()
        self.ended, self.wire = list[int](), Wire()
        self.connection_made(self.wire)

    def over(self, number: int, headers: dict[str, str]) -> None:
        self.ended.append(number)


TRAILERS = b"\x00\x00\x00\x01\x05\x00\x00\x00\x01"  # of call 1, the end of it
RESET = frame(3, struct.pack(">I", 8), 1)


@pytest.mark.parametrize("end", [TRAILERS, RESET])
def test_a_call_may_end_before_all_of_it_is_sent(end: bytes) -> None:
    calls = Noted()
    long = calls.call("/x", b"p" * 2 * WINDOW)
    calls.data_received(end)
    assert calls.ended == [long] == [1]
    sent = len(calls.wire.data()[long])
    calls.data_received(frame(WINDOW_UPDATE, struct.pack(">I", WINDOW)))
    assert len(calls.wire.data()[long]) == sent  # nothing more of it
    other = calls.call("/x", b"q")
    assert len(calls.wire.data()[other]) == 5 + 1


def test_a_call_without_room_keeps_no_other_from_sending() -> None:
    calls = Noted()
    calls.data_received(frame(WINDOW_UPDATE, struct.pack(">I", 10 * WINDOW)))
    long = calls.call("/x", b"p" * 2 * WINDOW)
    short = calls.call("/x", b"q")
    assert {call: len(data) for call, data in calls.wire.data().items()} == {long: WINDOW, short: 6}
    calls.data_received(frame(WINDOW_UPDATE, struct.pack(">I", 2 * WINDOW), long))
    assert len(calls.wire.data()[long]) == 5 + 2 * WINDOW
