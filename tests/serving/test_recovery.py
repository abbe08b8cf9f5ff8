"""How long a server is away when one of its processes is killed under load; prints it.

    pytest -s -m slow tests/serving/test_recovery.py

The real thing with the shipped model. docs/operations.md has the figures; a test asserts none.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from test_serve import SHORT, Served

from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1.generation_pb2_grpc import GenerationServiceStub

STREAMS = 16
KILLS = 5
SAMPLING = pb.SamplingParams(max_tokens=500, ignore_eos=True)
REQUEST = pb.GenerateRequest(text="hello", sampling=SAMPLING)


def connect(address: str) -> grpc.Channel:
    return grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


def watch(address: str, running: threading.Barrier) -> tuple[str, float]:
    """Reads a stream of a connection of its own; how it ended, and when."""
    with connect(address) as channel:
        stream = GenerationServiceStub(channel).StreamGenerate(REQUEST, timeout=120)
        next(stream)
        running.wait(30)
        try:
            for _ in stream:
                pass
        except grpc.RpcError as error:
            return error.code().name, time.monotonic()
        return "OK", time.monotonic()


def answered_at(address: str) -> float:
    """When a call on a new connection is answered, tried again and again."""
    while True:
        with connect(address) as channel:
            try:
                GenerationServiceStub(channel).Generate(SHORT, timeout=60)
                return time.monotonic()
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "frontends", "expected"),
    [
        ("engine_host", 1, {"UNAVAILABLE"}),
        ("frontend", 1, {"UNAVAILABLE"}),
        ("frontend", 2, {"UNAVAILABLE", "OK"}),
    ],
)
def test_away_for(victim: str, frontends: int, expected: set[str]) -> None:
    flags = [f"--frontends={frontends}", f"--max-num-seqs={STREAMS}", "--log-level=error"]
    server = Served("demo", *flags, program=("-m", "quire.tools.cli", "serve"))
    told, away, whole = list[float](), list[float](), list[float]()
    try:
        address = server.ready()
        with ThreadPoolExecutor(STREAMS) as pool:
            for _ in range(KILLS):
                running = threading.Barrier(STREAMS + 1)
                streams = [pool.submit(watch, address, running) for _ in range(STREAMS)]
                running.wait(30)
                killed_at = time.monotonic()
                os.kill(server.children(victim)[0], signal.SIGKILL)
                away.append(answered_at(address) - killed_at)
                server.heard(r"(ready again on)")
                whole.append(time.monotonic() - killed_at)
                ended = [stream.result() for stream in streams]
                assert {code for code, _ in ended} <= expected
                told += [at - killed_at for code, at in ended if code != "OK"]
        server.signal()
        assert server.end() == 0
    finally:
        server.process.kill()
        server.process.wait()
    assert told and not re.search("Traceback", server.said)

    def shown(seconds: list[float]) -> str:
        return f"{statistics.median(seconds):.2f} (at most {max(seconds):.2f})"

    print(
        f"\n{victim} of {frontends} frontend(s), {KILLS} kills, {STREAMS} streams, seconds: "
        f"callers told {shown(told)}, a new call answered {shown(away)}, ready again {shown(whole)}"
    )
