"""`quire bench soak`: that it would notice. Whole runs are slow, and marked so."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from quire.errors import Unavailable
from quire.protos.v1 import generation_pb2 as pb
from quire.tools.bench import soak
from quire.tools.bench.server_process import ServerProcess
from quire.tools.bench.soak_callers import Cable, Misbehaved, _check_stream, asks_wrongly
from quire.tools.cli import main

LAST = pb.GenerateChunk(
    token_ids=[3], finish_reason=pb.FINISH_REASON_STOP, usage=pb.Usage(completion_tokens=3)
)


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        ([pb.GenerateChunk(token_ids=[1, 2])], "usage on message 0"),
        ([pb.GenerateChunk(token_ids=[1, 2]), LAST, LAST], "usage on message 1"),
        ([pb.GenerateChunk(token_ids=[1]), LAST], "2 tokens came, of 3"),
        ([pb.GenerateChunk(token_ids=[1, 2], index=1), LAST], "ended so often: {0: 1}"),
        ([], "ended so often: {}"),
    ],
)
def test_a_stream_that_ends_wrongly_is_seen(chunks: list[pb.GenerateChunk], why: str) -> None:
    _check_stream([pb.GenerateChunk(token_ids=[1, 2]), LAST])
    with pytest.raises(Misbehaved) as caught:
        _check_stream(chunks)
    assert why in str(caught.value)


def test_a_bad_request_that_is_served_is_seen() -> None:
    class Obliging:
        async def generate(self, *_: Any, **__: Any) -> pb.GenerateResponse:
            return pb.GenerateResponse()

        async def stream(self, *_: Any, **__: Any) -> Any:
            yield pb.GenerateChunk()

    for seed in range(8):
        with pytest.raises(Misbehaved, match="served, and should not be"):
            asyncio.run(asks_wrongly(Obliging(), random.Random(seed)))  # type: ignore[arg-type]


def test_a_cable_carries_until_it_is_cut() -> None:
    async def run() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while some := await reader.read(100):
                writer.write(some)
            writer.close()

        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with Cable(f"127.0.0.1:{port}") as cable:
                host, _, port = cable.address.rpartition(":")
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                cable.cut()
                with pytest.raises(ConnectionError):
                    while await reader.read(100):
                        pass
                    raise ConnectionError  # an orderly end would do, too
                writer.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_growth_is_of_what_comes_after_things_have_settled() -> None:
    filling = [(second, second * 10**6) for second in range(100)]
    still = [(second, 100 * 10**6 + second % 3) for second in range(100, 500)]
    assert abs(soak.growth(filling + still)) < 1000
    leaking = [(second, 100 * 10**6 + second * 50_000) for second in range(500)]
    assert soak.growth(leaking) == pytest.approx(3e6)
    assert soak.growth([]) == soak.growth([(0.0, 5)]) == 0


def test_what_is_left_over_is_a_problem() -> None:
    rest = {"quire_requests_running": 0.0, "quire_kv_pages_used": 0.0, "quire_engine_ready": 1.0}
    good = {
        "misbehaved": [],
        "at_rest": rest,
        "growth_bytes_per_minute": 9e5,
        "exit_status": 0,
    }
    assert soak._problems(good) == []
    bad = {
        "misbehaved": ["odd"],
        "at_rest": {**rest, "quire_kv_pages_used": 2.0, "quire_engine_ready": 0.0},
        "growth_bytes_per_minute": 1.5e6,
        "exit_status": 1,
    }
    assert soak._problems(bad) == [
        "a caller saw: odd",
        "at rest quire_kv_pages_used is 2, must be 0",
        "at rest quire_engine_ready is 0, must be 1",
        "memory grew by 1.50 MB a minute",
        "the server ended with status 1",
    ]


def test_a_server_that_does_not_start_is_said(tmp_path: Path) -> None:
    server = ServerProcess(["/no/such/model"], tmp_path / "log")
    with pytest.raises(Unavailable, match="did not get ready"):
        server.wait_ready(60)
    assert server.stop() == 1 and not server.alive and not server.memory()
    assert "/no/such/model" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_short_soak(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Growth is not judged: pools are still filling after so short a time."""
    plot = tmp_path / "soak.png"
    main(["bench", "soak", "--seconds=20", "--streams=48", "--json", f"--plot={plot}"])
    said = json.loads(capsys.readouterr().out)
    assert [p for p in said["problems"] if not p.startswith("memory grew")] == []
    assert said["calls"] > 50 and len(said["ended"]) >= 6 and plot.stat().st_size
