"""Whole servers, of several processes, while those are killed, hang and end.

The engine's runner computes nothing and takes 10 ms a step (tools/bench/paced_engine.py); all else
is the real thing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from engines import eventually
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from quire.config import EngineConfig, ServerConfig
from quire.errors import InvalidConfig, QuireError, Unavailable
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1 import generation_pb2_grpc as pb_grpc
from quire.serving.auth.key_file import KeyTable, write_keys
from quire.serving.supervisor import child
from quire.serving.supervisor.first_look import check_files
from quire.serving.supervisor.port import hold
from quire.serving.supervisor.supervisor import Supervisor

FINISHED = "quire_requests_finished_total"
PACED = "quire.tools.bench.paced_engine"


class Service:
    """A server; its parent's part runs in a thread of the test. Close it, or use `with`."""

    def __init__(
        self, folder: Path | str, *, module: str = PACED, engine: Any = None, **server: Any
    ):
        self.said: list[str] = []  # and what the parent logs, all of which are faults
        self._log = logging.Handler()
        self._log.emit = self._logged  # type: ignore[method-assign]
        logging.getLogger("quire.serving.supervisor").addHandler(self._log)
        self.error: BaseException | None = None
        self.loop = asyncio.new_event_loop()
        config = EngineConfig(model=str(folder), max_num_seqs=64, **(engine or {}))
        settings = ServerConfig(**{"port": 0, "drain_timeout": 20, **server})
        self._signals = asyncio.Event(), asyncio.Event()
        self.supervisor = Supervisor(config, settings, self.said.append, engine_module=module)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.channels: list[grpc.Channel] = []

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self.supervisor.run(*self._signals))
        except BaseException as error:
            self.error = error
        finally:
            self.loop.close()

    def _logged(self, record: logging.LogRecord) -> None:
        assert record.levelno == logging.ERROR
        self.said.append(record.getMessage())

    def signal(self, number: int = 0) -> None:
        """As SIGTERM for the first time (0) or once more (1)."""
        self.loop.call_soon_threadsafe(self._signals[number].set)

    def heard(self, pattern: str) -> str:
        """Waits until it says something; returns the first group."""
        found: list[str] = []

        def look() -> bool:
            assert self.error is None, self.error
            found.extend(m[1] for line in self.said if (m := re.fullmatch(pattern, line)))
            return bool(found)

        eventually(look, 120)
        return found[-1]

    def ready(self) -> Service:
        self.address = self.heard(r"ready on (.*)")
        return self

    def ended(self) -> list[str]:
        self._thread.join(120)
        assert not self._thread.is_alive()
        logging.getLogger("quire.serving.supervisor").removeHandler(self._log)
        return self.said

    def channel(self) -> grpc.Channel:
        """With a connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channels.append(grpc.insecure_channel(self.address, options=options))
        return self.channels[-1]

    def stream(self, tokens: int, channel: grpc.Channel | None = None) -> Any:
        stub = pb_grpc.GenerationServiceStub(channel or self.channel())
        sampling = pb.SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens)
        request = pb.GenerateRequest(text="the quick brown fox", sampling=sampling)
        return stub.StreamGenerate(request, timeout=60)

    def health(self) -> str:
        stub = health_pb2_grpc.HealthStub(self.channel())
        try:
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status
        except grpc.RpcError as error:
            return error.code().name
        return health_pb2.HealthCheckResponse.ServingStatus.Name(status)

    def metric(self, name: str) -> float:
        """Of the engine process that runs now, all its labels taken together; needs a
        metrics_port."""
        with urlopen(self.heard(r"metrics on (.*)"), timeout=20) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return sum(s.value for family in families for s in family.samples if s.name == name)

    def frontend_pids(self) -> list[int]:
        return [pid for role in self.supervisor.frontends if (pid := role.pid)]

    def engine_pid(self) -> int:
        assert self.supervisor.engine is not None and self.supervisor.engine.pid
        return self.supervisor.engine.pid

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self.channels:
            channel.close()
        if self._thread.is_alive():
            self.signal(0)
            self.signal(1)
        self.ended()


@contextmanager
def running(folder: Path | str, **settings: Any) -> Iterator[Service]:
    with Service(folder, **settings) as service:
        yield service.ready()


def tokens_of(stream: Any) -> int:
    return sum(len(chunk.token_ids) for chunk in stream)


def failed(stream: Any) -> StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    return caught.value.code()


def refused(stream: Any) -> bool:
    try:
        list(stream)
    except grpc.RpcError as error:
        assert error.code() == StatusCode.UNAVAILABLE
        return True
    return False


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_an_engine_that_is_killed_comes_back(folder: Path) -> None:
    with running(folder, metrics_port=0) as service:
        before, frontends = service.engine_pid(), service.frontend_pids()
        streams = [service.stream(3000) for _ in range(4)]
        for stream in streams:
            next(stream)
        os.kill(before, signal.SIGKILL)
        assert [failed(stream) for stream in streams] == [StatusCode.UNAVAILABLE] * 4
        eventually(lambda: service.health() == "NOT_SERVING")
        assert failed(service.stream(5)) == StatusCode.UNAVAILABLE
        service.heard(r"(the engine: was ended by SIGKILL; started again in 0\.1 s)")
        service.heard(r"(ready again on .*)")
        assert service.health() == "SERVING"
        assert tokens_of(service.stream(5)) == 5
        assert service.engine_pid() != before and service.frontend_pids() == frontends
        eventually(lambda: service.metric(FINISHED) == 1)


def test_a_frontend_that_is_killed_loses_its_streams_and_nothing_else(folder: Path) -> None:
    with running(folder, frontends=2, metrics_port=0) as service:
        victim, other = service.frontend_pids()
        streams = [service.stream(4000) for _ in range(16)]
        for stream in streams:
            next(stream)
        os.kill(victim, signal.SIGKILL)
        codes = []
        for stream in streams:
            try:
                for _ in range(20):
                    next(stream)
                codes.append(None)
                stream.cancel()
            except grpc.RpcError as error:
                codes.append(error.code())
        assert set(codes) == {None, StatusCode.UNAVAILABLE}
        # Well before they would have ended by themselves:
        eventually(lambda: service.metric("quire_requests_running") == 0)
        service.heard(r"(frontend 1: was ended by SIGKILL; started again in 0\.1 s)")
        service.heard(r"(ready again on .*)")
        assert tokens_of(service.stream(5)) == 5
        assert service.frontend_pids()[1] == other
        eventually(lambda: service.metric(FINISHED) == 17)
        for held in ("quire_requests_waiting", "quire_kv_pages_used"):
            assert service.metric(held) == 0


def test_children_die_with_their_parent(folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "quire.tools.cli", "serve", str(folder), "--port=0"]
    parent = subprocess.Popen([*command, "--no-warmup"], stderr=subprocess.PIPE, text=True)
    assert parent.stderr is not None
    for line in parent.stderr:
        if line.startswith("listening"):
            break
    task = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    children = [int(pid) for pid in task.read_text().split()]
    assert len(children) == 2
    for pid in children:  # settings may be secrets, and everybody sees command lines
        assert str(folder) not in Path(f"/proc/{pid}/cmdline").read_text()
    parent.kill()
    parent.communicate(timeout=20)
    eventually(lambda: all(gone(pid) for pid in children))


def test_a_frontend_that_hangs_is_detached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gives it up when it says nothing; the parent would, later."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    settings: dict[str, Any] = {"frontends": 2, "metrics_port": 0}
    with running(folder, module="impatient_engine", **settings) as service:
        victim = service.frontend_pids()[0]
        streams = [service.stream(3000) for _ in range(8)]
        for stream in streams:
            next(stream)
        os.kill(victim, signal.SIGSTOP)
        eventually(lambda: 0 < service.metric(FINISHED) < 8)
        os.kill(victim, signal.SIGKILL)


def test_an_engine_that_hangs_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "SILENCE", 6.0)
    with running(folder) as service:
        stream = service.stream(3000)
        next(stream)
        os.kill(service.engine_pid(), signal.SIGSTOP)
        assert failed(stream) == StatusCode.UNAVAILABLE
        service.heard(r"(the engine: hung and was killed; started again in 0\.1 s)")
        service.heard(r"(ready again on .*)")
        assert tokens_of(service.stream(5)) == 5


def test_a_step_that_hangs_ends_the_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    with running(folder, module="stalling_engine", step_timeout=3) as service:
        assert failed(service.stream(100)) == StatusCode.UNAVAILABLE
        service.heard(r"(the engine: ended with status 86; started again in 0\.1 s)")
        service.heard(r"(ready again on .*)")
        assert tokens_of(service.stream(10)) == 10
    log = capfd.readouterr().err
    assert "a device step has not come back in 3 s: 1 tokens in 1 rows, 1 of them decoding" in log
    assert "Bucket(tokens=1, rows=1" in log


def test_an_engine_that_fails_comes_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    with running(folder, module="failing_engine") as service:
        stream = service.stream(100)
        assert failed(stream) == StatusCode.INTERNAL
        service.heard(r"(the engine: ended with status 1; started again in 0\.1 s)")
        service.heard(r"(ready again on .*)")
        assert tokens_of(service.stream(10)) == 10


def test_a_drain_lets_running_requests_end(folder: Path) -> None:
    with running(folder, frontends=2) as service:
        channel = service.channel()
        stream = service.stream(100, channel)
        next(stream)
        service.signal()
        service.heard(r"(stopping: running requests have 20 s to end)")
        eventually(lambda: refused(service.stream(1, channel)))
        assert tokens_of(stream) == 99
        assert service.ended()[-1].startswith("stopping") and service.error is None


def test_a_drain_takes_no_longer_than_it_may(folder: Path) -> None:
    with running(folder, drain_timeout=1) as service:
        stream = service.stream(3000)  # 30 s
        next(stream)
        service.signal()
        service.heard(r"(stopping: running requests have 1 s to end)")
        assert failed(stream) == StatusCode.UNAVAILABLE
        assert service.ended()[-1].startswith("stopping") and service.error is None


def test_a_second_signal_ends_them(folder: Path) -> None:
    with running(folder, drain_timeout=3600) as service:
        stream = service.stream(3000)  # 30 s, at whose end it would be whole
        next(stream)
        service.signal()
        service.heard(r"(stopping: .*)")
        service.signal(1)
        assert failed(stream) == StatusCode.UNAVAILABLE
        service.ended()
        assert service.error is None


def test_an_engine_that_is_killed_while_draining_is_not_started_again(folder: Path) -> None:
    with running(folder) as service:
        stream = service.stream(3000)
        next(stream)
        service.signal()
        service.heard(r"(stopping: .*)")
        os.kill(service.engine_pid(), signal.SIGKILL)
        assert failed(stream) == StatusCode.UNAVAILABLE
        assert service.ended()[-1].startswith("stopping")


def test_an_engine_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    with Service(tmp_path / "nowhere") as service:
        service.ended()
    assert isinstance(service.error, QuireError)
    assert "nowhere" in str(service.error)


def test_nothing_hangs_while_the_engine_is_away(folder: Path, tmp_path: Path) -> None:
    """Which it is for as long as it cannot start."""
    model = tmp_path / "model"
    model.symlink_to(folder)
    with running(model) as service:
        model.unlink()
        os.kill(service.engine_pid(), signal.SIGKILL)
        eventually(lambda: service.health() == "NOT_SERVING")
        assert failed(service.stream(5)) == StatusCode.UNAVAILABLE
        stub = pb_grpc.GenerationServiceStub(service.channel())
        for call, message in (
            (stub.Generate, pb.GenerateRequest(text="a")),
            (stub.Embed, pb.EmbedRequest(inputs=[pb.EmbedInput(text="a")])),
            (stub.Tokenize, pb.TokenizeRequest(text="a")),
            (stub.Detokenize, pb.DetokenizeRequest(token_ids=[1])),
            (stub.GetModelInfo, pb.GetModelInfoRequest()),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(message, timeout=20)
            assert caught.value.code() is StatusCode.UNAVAILABLE, message
            assert "the engine is gone and is being started again" in caught.value.details()
        service.heard(r"(the engine: .*model.*; started again in 0\.2 s)")
        service.heard(r"(the engine: .*model.*; started again in 0\.4 s)")
        model.symlink_to(folder)
        service.heard(r"(ready again on .*)")
        assert tokens_of(service.stream(5)) == 5


def test_a_file_that_is_broken_for_a_while_ends_no_server(folder: Path, tmp_path: Path) -> None:
    """Not even where a process dies meanwhile, which then cannot start."""
    keys = tmp_path / "keys"
    write_keys(keys, KeyTable())
    with running(folder, api_keys=str(keys)) as service:
        keys.write_text("keys: [nonsense")
        os.kill(service.frontend_pids()[0], signal.SIGKILL)
        service.heard(r"(frontend 1: was ended by SIGKILL; started again in 0\.1 s)")
        service.heard(r"(frontend 1: .*keys: .*; started again in 0\.2 s)")
        service.heard(r"(frontend 1: .*keys: .*; started again in 0\.4 s)")
        write_keys(keys, KeyTable())
        service.heard(r"(ready again on .*)")
        assert failed(service.stream(5)) == StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("setting", "says"),
    [("api_keys", "broken: not YAML"), ("tls_cert", "tls_cert: .*broken holds no PEM certificate")],
)
def test_a_broken_file_is_found_before_a_process_is_started(
    folder: Path, tmp_path: Path, setting: str, says: str
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("keys: [nonsense")
    files = {setting: str(broken), **({"tls_key": str(broken)} if setting == "tls_cert" else {})}
    with Service(folder, **files) as service:
        service.ended()
    assert isinstance(service.error, InvalidConfig) and re.search(says, str(service.error))
    assert service.supervisor.engine is None and not service.said


def test_the_port_is_ours_alone_and_free_again_at_once(folder: Path) -> None:
    with running(folder) as service:
        port = int(service.address.rpartition(":")[2])
        with Service(folder, port=port) as second:
            second.ended()
        assert isinstance(second.error, Unavailable)
        assert f"cannot bind 127.0.0.1:{port}" in str(second.error)
        assert tokens_of(service.stream(5)) == 5  # its connection stays open until the server ends
    with running(folder, port=port) as third:
        assert tokens_of(third.stream(5)) == 5


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0"])
def test_a_held_port_is_shared_by_those_who_share(host: str) -> None:
    try:
        socket.getaddrinfo(host, 0)
        holding = hold(host, 0)
        port = holding.__enter__()
    except (OSError, Unavailable):
        pytest.skip(f"this machine has no {host}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = "127.0.0.1" if host == "localhost" else host

    def listen(**how: Any) -> socket.socket:
        return socket.create_server((address, port), family=family, **how)

    with listen(reuse_port=True), listen(reuse_port=True):
        with pytest.raises(OSError):
            listen()
        with pytest.raises(Unavailable, match="another process"), hold(host, port):
            pass
    holding.__exit__(None, None, None)
    listen().close()


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("quire.serving.frontend.main", ("jax", "jaxlib", "flax", "orbax", "torch")),
        ("quire.serving.supervisor.supervisor", ("jax", "flax", "orbax", "grpc", "numpy.ma")),
        ("quire.serving.lifeline", ("jax", "grpc", "google.protobuf")),
    ],
)
def test_what_a_process_does_not_import(module: str, never: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(sorted(set({never!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_pipe_is_no_key_file(tmp_path: Path) -> None:
    """The parent would wait for its writer, and be deaf meanwhile."""
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(InvalidConfig, match=r"api_keys: .*pipe is a pipe, must be a file"):
        check_files(ServerConfig(api_keys=str(pipe)))
