"""`quire serve` as its operator meets it: what it says, and when it ends.

All but the device is real. What needs a model that answers is in tests/tools/test_cli_serve.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from engines import eventually

from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1.generation_pb2_grpc import GenerationServiceStub

PACED = (str(Path(__file__).with_name("paced_server.py")),)
SHORT = pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=1))
LONG = pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=3000))


class Served:
    """A server process; kept from an orderly end by whoever leaves it running."""

    def __init__(self, model: Path | str, *flags: str, program: tuple[str, ...] = PACED):
        command = [sys.executable, "-P", *program, str(model), "--port=0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.log = self.process.stderr
        self.said = ""

    def heard(self, pattern: str) -> str:
        """Reads its log up to where this is said; returns the group in it."""
        for line in self.log:
            self.said += line
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"it never said {pattern!r} but: {self.said}")

    def ready(self) -> str:
        return self.heard(r"\bready on ([^\s\"]+)")

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> int:
        """Waits for it to end; returns its exit status."""
        if not self.log.closed:
            self.said += self.log.read()
        return self.process.wait(60)

    def children(self, kind: str = "") -> list[int]:
        """Pids of those in whose command line this is."""
        pid = self.process.pid
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(one) for one in pids if kind in Path(f"/proc/{one}/cmdline").read_text()]

    def kill_children(self) -> None:
        for pid in self.children():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def serve(*flags: str) -> Served:
        started.append(Served(folder, *flags))
        return started[-1]

    yield serve
    for one in started:
        one.process.kill()
        one.process.wait()
        one.log.close()


def answered(stub: Any) -> bool:
    """Whether a call is; nothing but UNAVAILABLE may keep it from that."""
    try:
        stub.Generate(SHORT, timeout=20)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        return False
    return True


def metric(address: str, series: str) -> float:
    """The value of a series, where metrics are served."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    assert found, f"no {series} in {text}"
    return float(found[1])


def test_a_server_whose_log_nobody_reads_serves_on_and_ends(serve: Any) -> None:
    server = serve()
    fcntl.fcntl(server.log.fileno(), fcntl.F_SETPIPE_SZ, 4096)
    with grpc.insecure_channel(server.ready()) as channel:
        stub = GenerationServiceStub(channel)
        for _ in range(100):  # a line each, of some 250 bytes
            assert answered(stub)
        server.kill_children()
        eventually(lambda: answered(stub))
        server.log.close()  # and now its reader is gone
        server.kill_children()
        eventually(lambda: answered(stub))
    server.signal()
    assert server.end() == 0


def test_machines_hear_what_they_wait_for_at_any_level_and_only_json(serve: Any) -> None:
    server = serve("--log-format=json", "--log-level=error", "--metrics-port=0")
    host, _, port = server.ready().rpartition(":")
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 50, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nno"):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(noise)
            with suppress(ConnectionResetError):
                stranger.recv(4096)
    server.kill_children()
    server.heard(r"(ready again on)")
    metrics = re.findall(r"metrics on http://([^/]+)", server.said)[-1]
    assert metric(metrics, "quire_frontends") == 1
    for kind in ("engine", "frontend"):
        series = f'quire_process_restarts_total{{process="{kind}"}}'
        assert metric(metrics, series) == 1
    server.signal()
    assert server.end() == 0
    lines = [json.loads(line) for line in server.said.splitlines()]
    announced = [line["message"].split(" on ")[0] for line in lines if line["level"] == "INFO"]
    assert announced[:3] == ["listening", "metrics", "ready"]
    assert announced[-1] == "stopped" and "ready again" in announced
    faults = {line["process"]: line["message"] for line in lines if line["level"] == "ERROR"}
    assert set(faults) == {"the engine", "frontend 1"}
    assert all("was ended by SIGKILL" in message for message in faults.values())


def test_a_second_sigterm_does_not_wait(serve: Any) -> None:
    server = serve("--drain-timeout=3600")
    with grpc.insecure_channel(server.ready()) as channel:
        stream = GenerationServiceStub(channel).StreamGenerate(LONG, timeout=60)
        next(stream)
        server.signal()
        server.heard(r"(stopping: running requests have 3600 s to end)")
        next(stream)  # it runs on
        server.signal()
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.end() == 0, server.said
