"""`quire bench soak`: that it would notice. Whole runs are slow, and marked so."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quire.errors import Unavailable
from quire.protos.v1 import generation_pb2 as pb
from quire.tools.bench import soak
from quire.tools.bench.server_process import ServerProcess, _name, _weigh
from quire.tools.bench.soak_callers import Cable, Call, Misbehaved, _check_stream, asks_wrongly
from quire.tools.bench.soak_ledger import Ledger, Seen
from quire.tools.bench.soak_memory import growth, windows
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

    client: Any = Obliging()
    for seed in range(8):
        with pytest.raises(Misbehaved, match="served, and should not be"):
            asyncio.run(asks_wrongly(Call(client, random.Random(seed), "id", Ledger())))


def lines(*entries: tuple[str, str, str]) -> list[str]:
    """What a server's log says: (ended or refused, id, reason)."""
    return [
        "ready on 127.0.0.1:1",
        *(
            f"I1122 07:46:47.03 1 request_log.py:69] request {how} request_id={id}/af31 "
            f'tenant="" finish_reason={reason} prompt_tokens=5'
            for how, id, reason in entries
        ),
    ]


def test_the_servers_account_and_the_callers_agree() -> None:
    ledger = Ledger()
    for id, seen in zip("abcde", [*Seen, Seen.NOTHING], strict=True):
        ledger.note(id, Seen.NOTHING)
        ledger.note(id, seen)
    ledger.note("d", Seen.BEGUN)  # it stays whole
    told = [("refused", "b", "error"), ("ended", "c", "abort"), ("ended", "d", "stop")]
    assert ledger.disagreements(lines(*told)) == []
    assert ledger.disagreements(lines(*told, ("ended", "a", "abort"))) == []
    assert ledger.disagreements(lines(*told, ("refused", "e", "error"))) == []
    assert ledger.count(Seen.BEGUN) == 2 and ledger.count(Seen.NOTHING) == 5


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ([], "a: ended 0 times, refused 0 times; its caller saw WHOLE"),
        ([("ended", "a", "stop")] * 2, "a: ended 2 times, refused 0 times; its caller saw WHOLE"),
        ([("refused", "a", "error")], "a: ended 0 times, refused 1 times; its caller saw WHOLE"),
        ([("ended", "a", "abort")], "a: ended by abort; its caller saw WHOLE"),
        ([("ended", "a", "length"), ("ended", "z", "stop")], "z: nobody asked"),
        (
            [("ended", "a", "stop"), ("ended", "b", "stop"), ("refused", "b", "error")],
            "b: ended 1 times, refused 1 times; its caller saw NOTHING",
        ),
        (
            [("ended", "a", "stop"), ("ended", "c", "stop")],
            "c: ended 1 times, refused 0 times; its caller saw REFUSED",
        ),
    ],
)
def test_where_accounts_differ_it_is_said(told: Any, says: str) -> None:
    ledger = Ledger()
    for id, seen in (("a", Seen.WHOLE), ("b", Seen.NOTHING), ("c", Seen.REFUSED)):
        ledger.note(id, seen)
    assert ledger.disagreements(lines(*told)) == [says]


def test_processes_are_weighed_by_name(tmp_path: Path) -> None:
    # One that does nothing else, as this one may.
    program = "import sys; print(flush=True); input(); f = open(sys.argv[1], 'w'); print(); input()"
    command = [sys.executable, "-P", "-u", "-c", program, str(tmp_path / "one")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        weight = _weigh(process.pid)
        assert weight is not None and weight.memory > 2**20
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        more = _weigh(process.pid)
        assert more is not None and more.files == weight.files + 1
        process.kill()
    run = ["python", "-P", "-m", "quire.serving.lifeline", "MODULE", "1", "5"]
    taken: list[str] = []
    for module in ("", "engine_host.main", "frontend.main", "frontend.main", "frontend.main"):
        command = [f"quire.serving.{module}" if word == "MODULE" else word for word in run]
        taken.append(_name(command, taken))
    assert taken == ["parent", "engine", "frontend", "frontend 2", "frontend 3"]


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
    filling = [(float(second), second * 10**6) for second in range(100)]
    still = [(float(second), 100 * 10**6 + second % 3) for second in range(100, 500)]
    assert abs(growth(filling + still)) < 1000
    leaking = [(float(second), 100 * 10**6 + second * 50_000) for second in range(500)]
    assert growth(leaking) == pytest.approx(3e6)
    assert growth([]) == growth([(0.0, 5)]) == 0
    assert windows([]) == [] and windows([(0.0, 5)]) == [(0.0, 5, 5)]
    assert windows([(0.0, 7), (1.0, 3), (2.0, 9), (40.0, 4)]) == [
        (1.0, 3, 7),
        (2.0, 9, 9),
        (40.0, 4, 4),
    ]


def test_what_is_given_back_is_no_growth_and_hides_none() -> None:
    rng = random.Random(0)
    peaks = [rng.random() ** 4 * 150e6 for _ in range(600)]  # most are low
    for leak in (0.0, 2e6):
        seen = [(float(s), int(1e8 + leak * s / 60 + peak)) for s, peak in enumerate(peaks)]
        assert growth(seen) == pytest.approx(leak, abs=3e5)


def good_results() -> dict[str, Any]:
    rest = {"quire_requests_running": 0.0, "quire_kv_pages_used": 0.0, "quire_engine_ready": 1.0}
    return {
        "misbehaved": [],
        "disagreements": [],
        "disagreements_in_all": 0,
        "restarted": [],
        "files": {"engine": {"before": 16, "at_rest": 40}},
        "at_rest": rest,
        "growth_bytes_per_minute": {"engine": 9e5, "frontend": -5e6, "all": 9e5},
        "exit_status": 0,
    }


def test_what_is_left_over_is_a_problem() -> None:
    good = good_results()
    assert soak._problems(good) == []
    bad = {
        "misbehaved": ["odd"],
        "disagreements": ["a: ended 2 times"],
        "disagreements_in_all": 7,
        "restarted": ["engine"],
        "files": {"frontend": {"before": 16, "at_rest": 90}},
        "at_rest": {
            **good["at_rest"],
            "quire_kv_pages_used": 2.0,
            "quire_engine_ready": 0.0,
            "quire_failed_steps_total": -1,
        },
        "growth_bytes_per_minute": {"engine": 1.5e6, "frontend": -2e6, "all": 1.5e6},
        "exit_status": 1,
    }
    assert soak._problems(bad) == [
        "a caller saw: odd",
        "7 requests ended otherwise than their callers saw, such as a: ended 2 times",
        "the process engine was started again",
        "frontend has 90 files and sockets open at rest, and had 16 before",
        "at rest quire_kv_pages_used is 2, must be 0",
        "at rest quire_engine_ready is 0, must be 1",
        "at rest nothing was to be had of quire_failed_steps_total",
        "memory grew by 1.50 MB a minute (engine 1.50, frontend -2.00)",
        "the server ended with status 1",
    ]


def test_a_server_that_does_not_start_is_said(tmp_path: Path) -> None:
    server = ServerProcess(["/no/such/model"], tmp_path / "log")
    with pytest.raises(Unavailable, match="ended with status"):
        server.wait_ready(60)
    assert server.stop() == 1 and not server.alive and not server.weigh()
    assert "/no/such/model" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_short_soak(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Growth is not judged: pools are still filling after so short a time."""
    plot = tmp_path / "soak.png"
    main(["bench", "soak", "--seconds=20", "--streams=48", "--json", f"--plot={plot}"])
    said = json.loads(capsys.readouterr().out)
    assert [p for p in said["problems"] if not p.startswith("memory grew")] == []
    assert said["calls"] > 50 and len(said["ended"]) >= 6 and plot.stat().st_size
