"""`quire bench online`: that rates are asked as the peers were asked, by several processes as by
one. The server here answers at once; no figure is held against a clock."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from quire.config import EngineConfig
from quire.errors import Unavailable
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1 import generation_pb2_grpc as pb_grpc
from quire.tools.bench import load_process, online, server_process
from quire.tools.bench.models import DATA
from quire.tools.cli import main
from quire.tools.settings_file import read_settings_file

TRACE = [[5, 4], [3, 1], [40, 6], [7, 2], [2, 3]]


class Service(pb_grpc.GenerationServiceServicer):
    """Two tokens a message; one prompt length is refused."""

    def __init__(self, fails_at: int = 0):
        self.prompts: list[list[int]] = []
        self._fails_at = fails_at
        self._lock = threading.Lock()

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.ModelInfo:
        return pb.ModelInfo(name="m", dtype="bfloat16", vocab_size=50, max_running=8, kv_pages=9)

    def StreamGenerate(self, request: pb.GenerateRequest, context: Any) -> Iterator[Any]:
        with self._lock:
            self.prompts.append(list(request.token_ids.ids))
        assert request.sampling.ignore_eos and request.sampling.temperature == 0
        if len(request.token_ids.ids) == self._fails_at:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "prompt: got it, must not")
        left = request.sampling.max_tokens
        while left:
            count = min(left, 2)
            left -= count
            yield pb.GenerateChunk(token_ids=[1] * count)
        yield pb.GenerateChunk(finish_reason=pb.FINISH_REASON_LENGTH)


class Process:
    """Stands for `quire serve`."""

    device = "gpu", "NVIDIA H200"
    argv: list[str]
    settings: dict[str, Any]
    service = Service()

    def __init__(self, argv: list[str], log: Path):
        type(self).argv = argv
        file = argv[0].removeprefix("--config=")
        type(self).settings = {k: v.value for k, v in read_settings_file(file).items()}
        self._server = grpc.server(ThreadPoolExecutor(8))
        pb_grpc.add_GenerationServiceServicer_to_server(self.service, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def wait_ready(self, timeout: float) -> None:
        self._server.start()

    def weigh(self) -> dict[str, server_process.Weight]:
        return {"engine": server_process.Weight(1, 5, 6)}

    def stop(self) -> int:
        self._server.stop(0)
        return 0


@pytest.fixture
def ask(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Runs the benchmark on TRACE against a service; its status, and what it said."""
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps(TRACE))

    def ask(service: Service, *argv: str) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(Process, "service", service)
        monkeypatch.setattr(server_process, "ServerProcess", Process)
        status = main(["bench", "online", f"--model={folder}", f"--trace={trace}", "--json", *argv])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, json.loads(said.out or "{}"), said.err

    return ask


def test_several_rates(ask: Any, tmp_path: Path, folder: Path) -> None:
    service = Service()
    plot = tmp_path / "online.png"
    argv = ["--rates=400,800", "--requests=4", "--warmup-requests=2", "--clients=2"]
    argv += ["--repeat=2", "--serve=--frontends=2", "--max-num-seqs=8", f"--plot={plot}"]
    status, said, _ = ask(service, *argv)
    assert status == 0
    assert [run["rate_req_s"] for run in said["rates"]] == [400, 800] * 2
    for run in said["rates"]:
        assert (run["requests"], run["errors"], run["warmup_errors"]) == (4, 0, 0)
        assert (run["trace"]["prompt_tokens"], run["trace"]["output_tokens"]) == (55, 13)
        assert run["ttft_ms"]["p99"] > 0 and run["seconds"] > 0
        assert run["tokens_per_message"] == pytest.approx(13 / 7)
    assert said["device"] == {"platform": "gpu", "kind": "NVIDIA H200"}
    settings = {"model": "m", "dtype": "bfloat16", "max_num_seqs": 8, "pages": 9}
    settings |= {"decode_steps": 1, "prefill_chunk": None}
    assert settings.items() <= said["settings"].items()
    # The server gets the settings given, and its own defaults for the rest.
    assert Process.argv[1:] == ["--frontends=2"]
    assert Process.settings == {"model": str(folder), "max_num_seqs": 8}
    # The trace in order after a warm-up, of new tokens each time.
    lengths = [len(prompt) for prompt in service.prompts]
    assert sorted(lengths) == sorted([*[5, 3], *[5, 3, 40, 7]] * 4)
    assert len({tuple(p) for p in service.prompts if len(p) == 40}) == 4
    assert all(0 <= token < 50 for prompt in service.prompts for token in prompt)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_failures_are_counted(ask: Any) -> None:
    argv = ["--rates=500", "--requests=5", "--warmup-requests=1", "--clients=2"]
    status, said, _ = ask(Service(fails_at=3), *argv)
    assert status == 0 and said["rates"][0]["errors"] == 1
    assert "must not" in said["rates"][0]["first_errors"][0]


def test_a_trace_that_is_too_short_is_said(ask: Any) -> None:
    status, said, err = ask(Service(), "--rates=500", "--clients=1")
    assert status == 0 and "500/s: 5 requests, of 900: all the trace has" in err
    assert said["warmup_requests"] == said["rates"][0]["requests"] == 5


def test_callers_say_how_far_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    async def hear() -> list[int]:
        stdout, heard = asyncio.StreamReader(), list[int]()
        stdout.feed_data(b'3\n7\n[{"due": 1.0, "output": 2}]\n')
        process: Any = SimpleNamespace(stdout=stdout)
        (served,) = await load_process._hear(process, heard.append)
        assert (served.due, served.output) == (1.0, 2)
        return heard

    assert asyncio.run(hear()) == [3, 7]
    progress = load_process._Progress()
    progress._last -= 2 * load_process._SAY_EVERY
    progress(4, 9)
    progress(5, 9)
    assert capsys.readouterr().out == "4\n"


def test_callers_leave_an_interrupt_to_who_started_them() -> None:
    command = [sys.executable, "-P", "-m", load_process.__name__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        nothing: dict[str, list[Any]] = {"prompts": [], "outputs": [], "due": []}
        job = {"address": "127.0.0.1:1", "nearby": False, "warm": nothing, "load": nothing}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "[]\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("0.0\n", timeout=60)
    assert (process.returncode, out, err) == (0, "[]\n", "")


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    server = server_process.ServerProcess(["--nonsense"], tmp_path / "log")
    with pytest.raises(Unavailable, match="ended with status 2 before it was ready: quire: error"):
        server.wait_ready(60)


def test_a_rate_gets_as_many_requests_as_the_peers_sent() -> None:
    peers = json.loads((DATA / "peers_h200.json").read_text())
    runs = [
        run
        for model in peers.values()
        if isinstance(model, dict)
        for run in model.get("online", ())
    ]
    assert len(runs) == 8
    for run in runs:
        assert online.requests_of(run["rate_req_s"]) == run["requests"]
    assert online.requests_of(2) == 100
    assert "max(100, 15 r) requests after a warm-up of 50" in peers["online_method"]


@pytest.mark.parametrize("rates", ["", "0", "-1", "inf", "nan", "1,x"])
def test_rates_that_are_none(rates: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "online", f"--rates={rates}"])
    assert "must be numbers above 0, as in 25,50" in capsys.readouterr().err


def test_settings_of_a_server(tmp_path: Path) -> None:
    config = EngineConfig(model="m: x", max_queue=2**31, overlap=False, ignore_config_fields=("a",))
    found = read_settings_file(str(online._settings_file(tmp_path, config)))
    assert {name: given.value for name, given in found.items()} == {
        "model": "m: x", "overlap": False, "ignore_config_fields": ["a"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("/a b/llama on gpu (NVIDIA H200)", ("gpu", "NVIDIA H200")),
        ("demo on cpu", ("cpu", "cpu")),
        ("listening on 127.0.0.1:1", ("", "")),
    ],
)
def test_the_servers_word_on_its_device(line: str, device: tuple[str, str]) -> None:
    found = server_process._DEVICE.search(line)
    assert ((found[1], found[2] or found[1]) if found else ("", "")) == device
