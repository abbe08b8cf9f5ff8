"""`quire serve` as a process of its own: ports, readiness, signals, exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire import EngineConfig, ServerConfig
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1 import generation_pb2_grpc as pb_grpc
from quire.serving.engine_host import main

SMALL = ["--no-warmup", "--max-num-seqs=4", "--max-batched-tokens=32", "--page-size=16"]
LONG = pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(temperature=0, ignore_eos=True))


class Served:
    """A server process."""

    def __init__(self, folder: Path, *flags: str, **environment: str):
        command = [sys.executable, "-P", "-m", "quire.tools.cli", "serve", str(folder), *flags]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self.said = ""

    def line(self, pattern: str) -> str:
        """Reads its log up to a line of this form; returns the group in it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if found := re.fullmatch(pattern, line.rstrip("\n")):
                return found[1]
        raise AssertionError(f"it never said {pattern!r} but: {self.said}")

    def end(self, seconds: float = 120) -> int:
        """Waits for it to end; returns its exit status."""
        _, rest = self.process.communicate(timeout=seconds)
        self.said += rest
        return self.process.returncode


@pytest.fixture
def serve(folder: Path) -> Iterator[Any]:
    started: list[Served] = []

    def serve(*flags: str, **environment: str) -> Served:
        started.append(Served(folder, *flags, **environment))
        return started[-1]

    yield serve
    for one in started:
        one.process.kill()
        one.process.communicate()


def wait_until_serving(channel: grpc.Channel, seconds: float = 120) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for response in health.Watch(health_pb2.HealthCheckRequest(), timeout=seconds):
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return


def test_from_the_start_to_an_orderly_end(serve: Any) -> None:
    server = serve("--port=0", "--drain-timeout=600", *SMALL)
    address = server.line(r"listening on (127\.0\.0\.1:\d+)")
    with grpc.insecure_channel(address) as channel:
        wait_until_serving(channel)
        assert server.line(r"ready on (.*)") == address
        stub = pb_grpc.GenerationServiceStub(channel)
        sampling = pb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        response = stub.Generate(pb.GenerateRequest(text="hello", sampling=sampling), timeout=60)
        assert response.usage.completion_tokens == 8

        stream = stub.StreamGenerate(LONG, timeout=600)
        count = len(next(stream).token_ids)
        server.process.send_signal(signal.SIGTERM)
        last = None
        for last in stream:
            count += len(last.token_ids)
        assert last is not None and last.finish_reason == pb.FINISH_REASON_LENGTH
        assert count == last.usage.completion_tokens > 4000
    assert server.end() == 0, server.said
    assert "stopping" in server.said and server.said.endswith("stopped\n")
    assert "Traceback" not in server.said


def test_running_calls_get_no_longer_than_the_drain_timeout(serve: Any) -> None:
    server = serve("--port=0", "--drain-timeout=0", *SMALL)
    address = server.line(r"ready on (.*)")
    with grpc.insecure_channel(address) as channel:
        stream = pb_grpc.GenerationServiceStub(channel).StreamGenerate(LONG, timeout=60)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.end() == 0, server.said


def test_a_signal_while_loading_ends_it_promptly(serve: Any, tmp_path: Path) -> None:
    # Every program is to be compiled, and none is in a cache.
    server = serve("--port=0", JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    server.line(r"listening on (.*)")
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0, server.said
    assert time.monotonic() - begin < 60
    assert "stopped before the engine was ready" in server.said


def test_a_taken_port_is_known_before_the_model_loads(serve: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = serve(f"--port={port}", *SMALL)
        assert server.end() == 1
    *_, last = server.said.splitlines()
    assert last.startswith(f"quire: host, port: cannot bind 127.0.0.1:{port}")
    assert "loading" not in server.said and "Traceback" not in server.said


def test_keys_in_plain_text_are_warned_about(serve: Any) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:  # so that it ends at once
        port = taken.getsockname()[1]
        server = serve(f"--port={port}", "--host=0.0.0.0", "--api-keys=keys.yaml", *SMALL)
        assert server.end() == 1
    assert server.said.count("API keys come to 0.0.0.0 in plain text") == 1


@pytest.mark.parametrize(
    ("settings", "shows"),
    [
        ({"api_keys": "f"}, False),
        ({"api_keys": "f", "host": "::1"}, False),
        ({"api_keys": "f", "host": "::"}, True),
        ({"api_keys": "f", "host": "example.org"}, True),
        ({"api_keys": "f", "host": "::", "tls_cert": "c", "tls_key": "k"}, False),
        ({"host": "::", "insecure": True}, False),
    ],
)
def test_who_can_read_keys(settings: Any, shows: bool) -> None:
    assert ServerConfig(**settings).shows_keys is shows


def test_a_model_that_cannot_be_loaded_is_one_line(serve: Any, folder: Path) -> None:
    server = serve("--port=0", "--max-model-len=9999")
    assert server.end() == 1
    *_, last = server.said.splitlines()
    assert last.startswith("quire: max_model_len: got 9999, must be at most")
    assert "Traceback" not in server.said


def test_a_server_tells_machines_what_it_does(serve: Any) -> None:
    server = serve("--port=0", "--metrics-port=0", "--log-format=json", *SMALL)

    def said(message: str) -> str:
        return server.line(r'{.*"message": "' + message + '".*}')

    metrics = said(r"metrics on (http://127\.0\.0\.1:\d+/metrics)")
    address = said("ready on (.*?)")
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        sampling = pb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        request = pb.GenerateRequest(text="hello", request_id="mine", sampling=sampling)
        response = stub.Generate(request, timeout=120)
        assert response.timing.prefill_seconds > 0
        with pytest.raises(grpc.RpcError):
            request.sampling.top_p = 7
            stub.Generate(request, timeout=60)
    said("request (refused)")
    with urllib.request.urlopen(metrics, timeout=20) as answer:
        text = answer.read().decode()
    assert "\nquire_engine_ready 1.0\n" in text and "\nquire_output_tokens_total 8.0\n" in text
    assert 'quire_request_errors_total{code="INVALID_ARGUMENT",tenant="default"} 1.0' in text
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0, server.said
    lines = [json.loads(line) for line in server.said.splitlines()]  # nothing else is said
    (ended,) = [line for line in lines if line["message"] == "request ended"]
    assert ended["request_id"].startswith("mine/") and ended["output_tokens"] == 8
    assert "hello" not in server.said and lines[-1]["message"] == "stopped"


def test_what_keeps_a_server_from_starting_is_told_to_machines(serve: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = serve("--port=0", f"--metrics-port={port}", "--log-format=json", *SMALL)
        assert server.end() == 1
    *_, last = [json.loads(line) for line in server.said.splitlines()]
    assert last["level"] == "CRITICAL"
    assert last["message"].startswith(f"metrics_host, metrics_port: cannot bind 127.0.0.1:{port}")


def test_only_a_server_settles_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(
        "quire.serving.assemble.assemble", lambda *_: (done.append("assembled"), MagicMock())[1]
    )
    monkeypatch.setattr("quire.serving.collector.quiet_collector", lambda: done.append("quiet"))
    main._assembled(EngineConfig(), lambda _: None)
    assert done == ["assembled", "quiet"]
