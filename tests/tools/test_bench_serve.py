"""`quire bench serve`: that it asks, counts and divides as it says. No figure is held against a
clock: servers here answer at once, and the arithmetic is shown on times that were written down."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest
import uvloop

from quire.errors import QuireError
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1 import generation_pb2_grpc as pb_grpc
from quire.tools.bench.caller_figures import figures_of
from quire.tools.bench.load import Served, poisson, run_closed, run_load, scattered
from quire.tools.bench.openai_target import OpenAITarget, tokens_so_far
from quire.tools.cli import main

TRACE = [[5, 4], [3, 1], [40, 6], [7, 2]]


class Grpc(pb_grpc.GenerationServiceServicer):
    """Two tokens a message; prompts of `fails_at` tokens are refused."""

    def __init__(self, fails_at: int = 0):
        self.requests: list[pb.GenerateRequest] = []
        self._fails_at = fails_at

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.ModelInfo:
        return pb.ModelInfo(name="m", dtype="bfloat16", max_running=8, kv_pages=9, page_size=32)

    def StreamGenerate(self, request: pb.GenerateRequest, context: Any) -> Iterator[Any]:
        self.requests.append(request)
        if len(request.token_ids.ids) == self._fails_at:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "prompt: got it, must not")
        left = request.sampling.max_tokens
        while left:
            count = min(left, 2)
            left -= count
            yield pb.GenerateChunk(token_ids=[1] * count)
        usage = pb.Usage(cached_tokens=len(request.token_ids.ids) // 2)
        spent = pb.Timing(queue_seconds=1.0, prefill_seconds=0.5, decode_seconds=9.0)
        end = pb.FINISH_REASON_LENGTH
        yield pb.GenerateChunk(finish_reason=end, usage=usage, timing=spent)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs the benchmark on TRACE; its status, what it said, its last line of complaint."""
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps(TRACE))

    def run(*argv: str) -> tuple[int, dict[str, Any], str]:
        status = main(["bench", "serve", f"--trace={trace}", "--json", *argv])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, json.loads(said.out or "{}"), said.err.splitlines()[-1]

    return run


def serving(service: Grpc) -> tuple[grpc.Server, str]:
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"--address=127.0.0.1:{port}"


def test_over_grpc(run: Any, tmp_path: Path) -> None:
    service = Grpc()
    server, address = serving(service)
    plot = tmp_path / "serve.png"
    status, said, _ = run(
        address,
        "--rate=500",
        "--vocab=9",
        "--slo-ttft=60000",
        "--slo-tpot=0.000001",
        f"--plot={plot}",
    )
    server.stop(None)
    assert status == 0 and said["errors"] == 0 and said["requests"] == 4
    assert plot.stat().st_size > 10_000
    settings = {"model": "m", "dtype": "bfloat16", "max_num_seqs": 8, "page_size": 32, "pages": 9}
    assert said["settings"] == settings
    assert said["tokens_per_message"] == 13 / 7
    # Of two tokens or fewer, one message: no time per further token, which breaks no bound.
    assert set(said["ttft_engine_ms"].values()) == {1500.0}
    assert said["good"] == 2 and set(said["tpot_ms"]) == {"p50", "p90", "p99", "mean"}
    asked = service.requests[1:]  # the first one opened the connection
    assert sorted(len(r.token_ids.ids) for r in asked) == [3, 5, 7, 40]
    assert all(max(r.token_ids.ids) < 9 for r in asked)
    for request in asked:
        sampling = request.sampling
        assert [len(request.token_ids.ids), sampling.max_tokens] in TRACE
        assert sampling.ignore_eos and sampling.HasField("temperature") and not sampling.temperature


@pytest.mark.parametrize("clients", [1, 3])
def test_a_closed_loop(run: Any, clients: int) -> None:
    """Of several processes, each sends what none has sent before it."""
    service = Grpc()
    server, address = serving(service)
    status, said, _ = run(address, "--concurrency=2", f"--clients={clients}")
    server.stop(None)
    assert status == 0 and (said["errors"], said["requests"]) == (0, 4)
    assert said["ttft_engine_ms"]["p99"] == 1500.0
    assert (said["concurrency"], said["clients"], said["rate_req_s"]) == (2, clients, None)
    assert said["prefix_hit_tokens"] == 5 // 2 + 3 // 2 + 40 // 2 + 7 // 2
    lengths = [len(request.token_ids.ids) for request in service.requests]
    assert sorted(lengths) == sorted([1] * (1 if clients == 1 else 1 + clients) + [3, 5, 7, 40])


def test_prompts_are_others_in_each_run(run: Any) -> None:
    asked, seeds = [], []
    for more in ((), (), ("--seed=7",), ("--seed=7",)):
        service = Grpc()
        server, address = serving(service)
        _, said, _ = run(address, *more)
        server.stop(None)
        seeds.append(said["trace"]["seed"])
        asked.append({tuple(r.token_ids.ids) for r in service.requests if len(r.token_ids.ids) > 1})
    assert asked[0].isdisjoint(asked[1]) and asked[2] == asked[3]
    assert seeds[0] != seeds[1] and seeds[2:] == [7, 7]


def test_so_many_are_under_way_and_no_more() -> None:
    now, most, sent = 0, 0, []

    class Server:
        async def stream(self, prompt: Any, output: int, told: Any) -> AsyncIterator[int]:
            nonlocal now, most
            now += 1
            most = max(most, now)
            sent.append(prompt)
            for count in range(1, output + 1):
                await asyncio.sleep(0)
                yield count
            now -= 1

    target: Any = Server()
    prompts = [(at,) for at in range(7)]
    outputs = [5, 1, 1, 1, 9, 1, 1]
    served = asyncio.run(run_closed(target, prompts, outputs, 3, lambda done, total: None))
    assert most == 3 and sent == prompts
    assert [r.output for r in served] == outputs and all(r.whole for r in served)


def test_nothing_is_sent_before_it_is_due() -> None:
    """Timers of uvloop end up to half a millisecond early."""

    class Server:
        async def stream(self, *_: Any) -> AsyncIterator[int]:
            yield 1

    due = [0.0, *(0.0007 * at for at in range(1, 30))]
    target: Any = Server()
    loading = run_load(target, [(1,)] * 30, [1] * 30, due, lambda done, total: None)
    assert all(request.sent >= request.due for request in uvloop.run(loading))
    for after in (0.0107, 0.0112, 0.0114):
        begin = time.monotonic() + after
        loading = run_closed(target, [(1,)], [1], 1, lambda done, total: None, begin)
        assert uvloop.run(loading)[0].sent >= 0


def test_failures_are_counted_and_named(run: Any) -> None:
    server, address = serving(Grpc(fails_at=40))
    status, said, _ = run(address, "--clip=100")
    assert status == 0 and said["errors"] == 1
    assert said["first_errors"] == ["InvalidRequest: prompt: got it, must not"]
    server.stop(None)
    server, address = serving(Grpc(fails_at=1))  # what opens the connection
    status, _, error = run(address)
    assert status == 1 and error == "quire: prompt: got it, must not"
    server.stop(None)


class OpenAI(BaseHTTPRequestHandler):
    counts = False  # whether messages say how many tokens have come
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._answer("application/json", json.dumps({"data": [{"id": "theirs"}]}))

    def do_POST(self) -> None:
        assert self.path == "/v1/completions" and self.headers["authorization"] == "Bearer k"
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        if len(body["prompt"]) == 40:
            self._answer("application/json", '{"error": "too long"}', 400)
            return
        messages, step = [], 2 if self.counts else 1
        for so_far in range(step, body["max_tokens"] + step, step):
            message: dict[str, Any] = {"choices": [{"text": "x"}]}
            if self.counts:
                message["usage"] = {"completion_tokens": min(so_far, body["max_tokens"])}
            messages.append(message)
        usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
        lines = [f"data: {json.dumps(m)}\n\n" for m in (*messages, usage)]
        self._answer("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

    def _answer(self, kind: str, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("counts", [False, True])
def test_over_http(run: Any, tmp_path: Path, counts: bool) -> None:
    key = tmp_path / "key"
    key.write_text("k\n")
    handler = type("Handler", (OpenAI,), {"counts": counts, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        status, said, _ = run(
            f"--address=127.0.0.1:{server.server_port}", "--api=openai", f"--api-key-file={key}"
        )
        server.shutdown()
        thread.join()
    assert status == 0 and said["errors"] == 1
    assert said["first_errors"] == ['QuireError: status 400: {"error": "too long"}']
    assert said["tokens_per_message"] == (7 / 4 if counts else 1)
    assert [a["model"] for a in handler.asked] == ["theirs"] * 5
    assert all(a["ignore_eos"] and a["temperature"] == 0 for a in handler.asked)


def _text(text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason}], **more}


@pytest.mark.parametrize(
    ("messages", "counts"),
    [
        # The last message has no text, as OpenAI's own servers and llama.cpp's end.
        ([_text("x"), _text("x"), _text("x"), _text("", "length")], [1, 2, 3]),
        (
            [_text("x"), _text("x"), _text("x"), _text("", "length"), {"usage": None}],
            [1, 2, 3],
        ),
        ([_text("x", error=None), _text("xx", "length")], [1, 3]),  # several tokens a message
        ([_text("x"), _text(""), _text("x", "length")], [1, 3]),  # half a character
        # More texts than tokens: held back, and sent by themselves.
        ([_text("x")] * 4 + [{"usage": {"completion_tokens": 3}}], [1, 2, 3, 4, 3]),
        ([_text("x", usage={"prompt_tokens": 1})] * 3, [1, 2, 3]),
    ],
)
def test_tokens_are_counted_as_servers_tell_them(
    messages: list[dict[str, Any]], counts: list[int]
) -> None:
    seen, count = [], 0
    for message in messages:
        if (now := tokens_so_far(message, count, 3)) != count:
            seen.append(count := now)
    assert seen == counts


@pytest.mark.parametrize(
    ("message", "error"), [([1], "must be a JSON object"), ({"error": "busy"}, "busy")]
)
def test_what_is_no_message_fails_its_request_alone(message: Any, error: str) -> None:
    with pytest.raises(QuireError, match=error):
        tokens_so_far(message, 0, 3)


def test_an_address_may_end_with_its_version() -> None:
    for address in ("h:1", "http://h:1", "http://h:1/v1", "http://h:1/v1/"):
        assert OpenAITarget(address, api_key=None, model="m").base == "http://h:1"
    assert OpenAITarget("https://h/api/v1", api_key=None, model="m").base == "https://h/api"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rate=5", "--concurrency=2"], "rate: got 5, must be inf with --concurrency"),
        (["--clients=2", "--api=openai"], "clients: got 2, must be 1 for openai, and with keys"),
        (["--requests=5"], "requests: got 5, must be at most 4"),
        (["--served-model=x"], "served_model: for openai alone"),
        (["--api=openai", "--tls-ca=x"], "tls_ca: for grpc alone"),
        (["--api=openai", "--tls-key=x"], "tls_key: for grpc alone"),
        (["--tls-ca=/none", "--tls-cert=/none"], "key: got none, must be given with the other"),
        (["--tls-ca=/none"], "ca: got '/none', must be a readable file"),
        (["--api-key-file=/none"], "api_key_file: /none cannot be read"),
        (["--api-key-file=/dev/null"], "api_key_file: got an empty text, must be printable ASCII"),
    ],
)
def test_what_is_refused(run: Any, argv: list[str], message: str) -> None:
    status, _, error = run("--address=127.0.0.1:1", *argv)
    assert status == 1 and message in error


@pytest.mark.filterwarnings("error")
def test_a_key_over_http_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="the API key goes to http://10.0.0.1:1 in plain text"):
        OpenAITarget("10.0.0.1:1", api_key="secret", model="m")
    for address, key in (("127.0.0.1:1", "k"), ("https://10.0.0.1:1", "k"), ("10.0.0.1:1", None)):
        OpenAITarget(address, api_key=key, model="m")


def test_the_arithmetic() -> None:
    steady = Served(1.0, 5, 1.0, [(1.5, 1), (1.75, 3), (2.5, 5)], 2.5)
    single = Served(2.0, 3, 2.25, [(4.0, 3)], 4.0)
    broken = Served(0.0, 9, 0.0, [(0.5, 1)], 5.0, "Internal: x")
    short = Served(0.0, 9, 0.0, [(0.5, 8)], 5.0)
    figures = figures_of([steady, single, broken, short], {"ttft_ms": 600.0, "tpot_ms": 250.0})
    assert figures["errors"] == 2
    assert figures["first_errors"] == ["Internal: x", "tokens are missing"]
    assert figures["output_tok_s"] == (5 + 3 + 1 + 8) / 5.0
    assert figures["ttft_ms"]["p50"] == 1250.0  # of 500 and 2,000
    assert figures["tpot_ms"]["mean"] == 250.0  # four tokens in a second
    assert figures["itl_ms"]["mean"] == 500.0  # of 250 and 750
    assert figures["e2e_ms"]["mean"] == 1750.0
    assert (figures["good"], figures["goodput_req_s"]) == (1, 0.2)
    assert figures_of([single], {"tpot_ms": 1.0})["good"] == 1
    assert figures_of([steady], {"e2e_ms": 1499.0})["good"] == 0


def test_arrivals_are_poisson() -> None:
    due = poisson(20_000, 50.0, np.random.default_rng(1))
    gaps = np.diff(due)
    assert due[0] == 0 and abs(gaps.mean() - 1 / 50) < 0.001
    assert abs(gaps.std() - gaps.mean()) < 0.001  # as of an exponential
    assert poisson(3, math.inf, np.random.default_rng(1)) == [0.0] * 3


def test_arrivals_of_a_given_number_come_at_random_within_their_time() -> None:
    due = scattered(20_000, 50.0, np.random.default_rng(1))
    assert len(due) == 20_000 and due == sorted(due) and 0 <= due[0] < due[-1] < 50
    in_seconds = np.bincount(np.array(due, int), minlength=50)
    assert in_seconds.std() == pytest.approx(np.sqrt(400), rel=0.3)  # Poisson's
