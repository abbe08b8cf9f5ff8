"""The engine process: how it starts, and sends to a frontend that takes its time."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quire.protos.v1 import engine_pb2 as pb
from quire.sched.engine import Engine
from quire.sched.quota import Limits
from quire.sched.request import Request, RequestOutput, SamplingParams
from quire.sched.scheduler import Scheduler
from quire.serving.auth.key_file import KeyTable, write_keys
from quire.serving.engine_host import attached, host, main, watchdog
from quire.tools.bench.null_runner import NullRunner as Runner
from quire.tools.bench.null_runner import null_spec

SPEC = null_spec(4, page_size=16, max_model_len=64, pages=20)


class Stream:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[pb.FromEngine] = []

    def send(self, message: pb.FromEngine) -> None:
        self.sent.append(message)


def one_attached() -> tuple[attached.Attached, list[pb.FromEngine]]:
    """A frontend, and what it is sent."""
    stream: Any = Stream()
    return attached.Attached(stream), stream.sent


async def let_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def step(token: int) -> pb.Step:
    return pb.Step(handles=[1], tokens=[token])


def tokens(message: pb.FromEngine) -> list[int]:
    return [token for one in message.steps for token in one.tokens]


def test_a_frontend_that_is_behind_gets_what_it_missed_in_one_message() -> None:
    frontend, sent = one_attached()
    frontend.send(step(1))
    assert tokens(sent[0]) == [1] and sent[0].awaited
    frontend.send(step(2))
    frontend.send(step(3))
    assert len(sent) == 1 and frontend.behind
    frontend.taken()
    assert tokens(sent[1]) == [2, 3] and not frontend.behind
    frontend.taken()  # and has nothing more to get
    assert len(sent) == 2
    frontend.send(step(4))
    assert tokens(sent[2]) == [4]


def test_what_is_urgent_waits_for_nobody_a_few_times() -> None:
    frontend, sent = one_attached()
    frontend.send(step(1))
    frontend.send(step(2))
    frontend.send(step(3), urgent=True)
    assert [tokens(message) for message in sent] == [[1], [2, 3]]
    # The answer to the first says nothing of the second, which so asks for none.
    assert [message.awaited for message in sent] == [True, False]
    assert not frontend.behind
    frontend.send(step(4))
    for token in range(5, 5 + attached.MOST_AHEAD):
        frontend.send(step(token), urgent=True)
    assert len(sent) == 1 + attached.MOST_AHEAD and frontend.behind
    frontend.taken()
    assert sent[-1].awaited and not frontend.behind
    assert [token for message in sent for token in tokens(message)] == [
        *range(1, 5 + attached.MOST_AHEAD)
    ]
    frontend.send(step(99), urgent=True)
    assert tokens(sent[-1]) == [99]  # as often again


def test_only_the_first_of_an_answer_is_urgent() -> None:
    async def work() -> None:
        sent = list[tuple[list[int], bool]]()

        class Frontend(attached.Attached):
            def send(self, step: pb.Step, *, urgent: bool = False) -> None:
                sent.append(([*step.tokens], urgent))

        served = host.EngineHost(asyncio.get_running_loop())
        stream: Any = Stream()
        frontend = Frontend(stream)
        for handle, name in enumerate("ab"):
            served._routes[name] = attached.Route(frontend, handle)
        for outputs in ([("a", 1)], [("a", 2)], [("a", 3), ("b", 4)], [("a", 5), ("b", 6)]):
            served.deliver([RequestOutput(name, (token,)) for name, token in outputs])
            await let_run()
        assert sent == [([1], True), ([2], False), ([3, 4], True), ([5, 6], False)]

    asyncio.run(work())


def test_a_broken_key_file_is_found_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, said, built = tmp_path / "keys", dict[str, Any](), []
    keys.write_text("keys: [nonsense")
    server = {"api_keys": str(keys), "log_level": "error"}
    given = {"engine": {"model": "demo"}, "server": server, "engine_address": "unix:nowhere"}
    line = SimpleNamespace(say=lambda **news: said.update(news))

    async def opened(news: int) -> Any:
        return line, given

    def build(*_: Any) -> Any:
        built.append(1)
        raise AssertionError("the model was read")

    monkeypatch.setattr(main.Lifeline, "open", opened)
    monkeypatch.setattr(main, "set_up_logs", lambda *_: None)
    assert asyncio.run(main.serve(0, build)) == 1
    assert str(keys) in said["error"] and not built


def test_no_thread_keeps_the_lock_for_as_long_as_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what a step gave would be sent when the next was planned and launched."""

    class Enough(Exception):
        pass

    def kept(seconds: float) -> None:
        assert seconds < 1e-3
        raise Enough

    async def opened(news: int) -> Any:
        server = {"log_level": "error"}
        given = {"engine": {"model": "demo"}, "server": server}
        return SimpleNamespace(order=forever), given | {"engine_address": f"unix:{tmp_path}/e"}

    async def forever() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(main.Lifeline, "open", opened)
    monkeypatch.setattr(main, "set_up_logs", lambda *_: None)
    monkeypatch.setattr(main, "sys", SimpleNamespace(setswitchinterval=kept))
    with pytest.raises(Enough):
        asyncio.run(main.serve(0, lambda *_: None))  # type: ignore[arg-type,return-value]


def test_a_device_that_is_not_made_anew_in_time_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The one call of the runner besides steps: a fault may have left the device hanging."""
    ended, seen = threading.Event(), list[Any]()

    class Hangs(Runner):
        def launch(self, plan: Any) -> Any:
            raise RuntimeError("broken")

        def reset(self) -> None:
            seen.append(engine.runner_call)

    def exit_(status: int) -> None:
        assert status == watchdog.STALLED
        stalled.runner_call = None
        ended.set()

    scheduler = Scheduler(SPEC, max_batched_tokens=SPEC.ladder.max_tokens, prefill_chunk=8)
    engine = Engine(Hangs(SPEC), scheduler, overlap=False, on_outputs=lambda _: None)
    engine.submit(Request(id="a", prompt=(1,), sampling=SamplingParams(seed=1)))
    engine.step()
    ((since, plan),) = seen
    assert plan is None and since <= time.monotonic() and engine.runner_call is None
    monkeypatch.setattr(watchdog.os, "_exit", exit_)
    monkeypatch.setattr(watchdog, "drain_stderr", lambda: None)
    stalled: Any = SimpleNamespace(runner_call=(time.monotonic() - 9, None))
    watchdog.watch(stalled, 2.0)
    assert ended.wait(20)
    assert "making the device's state anew has not come back in 2 s; the engine" in caplog.text


def test_tenants_are_limited_by_what_the_key_file_said_last(tmp_path: Path) -> None:
    """Also where it changed while the model was read, and where it broke after it had."""
    keys, limited = tmp_path / "keys", list[set[str]]()
    engine: Any = SimpleNamespace(limit_tenants=lambda table: limited.append(set(table)))

    async def work() -> None:
        write_keys(keys, KeyTable({"first": Limits()}))
        tenants = main._Tenants(str(keys), 0.01)
        write_keys(keys, KeyTable({"first": Limits(), "second": Limits()}))
        while "second" not in tenants._table.tenants:
            await asyncio.sleep(0.01)
        keys.write_text("keys: [nonsense")
        await asyncio.sleep(0.05)
        assert not limited
        tenants.limit(engine)
        assert limited == [{"first", "second"}]
        write_keys(keys, KeyTable({"third": Limits()}))
        while len(limited) < 2:
            await asyncio.sleep(0.01)
        assert limited[1] == {"third"}
        tenants._followed.cancel()

    asyncio.run(asyncio.wait_for(work(), 20))
