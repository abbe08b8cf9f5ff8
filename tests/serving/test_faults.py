"""Faults of the device, seen by callers over gRPC (docs/design.md, section 8)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import jax.numpy as jnp
import pytest
from engines import at_rest, eventually, held
from grpc import StatusCode
from running import Running

from quire.kv.cache import KVCache
from quire.protos.v1 import generation_pb2 as pb
from quire.sched.request import Request, SamplingParams
from quire.serving.engine_host.host import EngineHost
from quire.serving.engine_wire import submit_message

PROMPTS = [[9, 8, 7], [100, 101, 102, 103], [7, 8, 9]]


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    with Running(folder) as running:
        yield running.open()


def answers(served: Running, prompts: list[list[int]], tokens: int = 40) -> list[Any]:
    """All in the same steps; the tokens of each, or the error and the tokens before it."""

    def read(stream: Any) -> Any:
        got: list[int] = []
        try:
            for chunk in stream:
                got += chunk.token_ids
        except grpc.RpcError as error:
            return error.code(), error.details(), got
        return got

    sampling = pb.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    with held(served.parts) as go, ThreadPoolExecutor(len(prompts)) as pool:
        requests = [
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling) for ids in prompts
        ]
        streams = [served.stub.StreamGenerate(request, timeout=60) for request in requests]
        eventually(lambda: len(served.engine._live) == len(prompts))
        go.set()
        return list(pool.map(read, streams))


def test_a_row_that_is_not_finite_fails_alone(served: Running) -> None:
    runner = served.parts.runner
    params = runner._params
    (name,) = [n for n, value in params.items() if "embed" in n and value.shape[0] == 300]
    sound = params[name]
    expected = answers(served, PROMPTS)
    # A token that only the second prompt has, and no answer.
    assert 103 not in {token for answer in expected for token in answer}
    params[name] = sound.at[103].set(jnp.nan)
    runner._calls.clear()  # which have the sound ones
    try:
        first, (code, details, got), third = answers(served, PROMPTS)
        assert (code, got) == (StatusCode.INTERNAL, [])
        assert "its logits held an inf or NaN" in details
        assert (first, third) == (expected[0], expected[2])
    finally:
        params[name] = sound
        runner._calls.clear()
    at_rest(served.engine)
    assert answers(served, PROMPTS) == expected  # nothing of it was found in the prefix index


@pytest.mark.parametrize("where", ["launch", "collect"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_step_that_fails_is_survived(
    served: Running, where: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(served, PROMPTS)
    runner, failed = served.parts.runner, served.engine.stats().failed_steps
    sound, calls = getattr(runner, where), iter(range(10**6))

    def failing(what: Any) -> Any:
        if next(calls) == at:
            raise RuntimeError("injected")
        return sound(what)

    with monkeypatch.context() as patch:
        patch.setattr(runner, where, failing)
        assert answers(served, PROMPTS) == expected
    assert served.engine.stats().failed_steps == failed + 1
    at_rest(served.engine)


def test_a_request_that_cannot_be_planned_for_fails_alone(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answers(served, PROMPTS)
    sound = KVCache.grow

    def failing(self: KVCache, holding: Any, positions: int) -> Any:
        bad = [s.kv for s in served.engine._scheduler._roster.running if s.tokens[1] == 101]
        if any(holding is each for each in bad) and positions > 32:  # in the midst of its answer
            raise KeyError("a bug")
        return sound(self, holding, positions)

    failed = served.engine.stats().failed_steps
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "grow", failing)
        first, (code, details, got), third = answers(served, PROMPTS)
    assert code == StatusCode.INTERNAL and got == expected[1][: len(got)] and got
    assert details.endswith("a fault in Quire; the engine's log says more")
    assert (first, third) == (expected[0], expected[2])
    assert served.engine.stats().failed_steps == failed and served.engine.healthy
    assert "could not be planned for and ends" in caplog.text and "a bug" in caplog.text
    at_rest(served.engine)
    assert answers(served, PROMPTS) == expected


def test_a_device_that_fails_twice_costs_who_was_running(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, calls = served.parts.runner.launch, iter(range(10**6))

    def failing(plan: Any) -> Any:
        if next(calls) in (2, 6):
            raise RuntimeError("injected")
        return sound(plan)

    with monkeypatch.context() as patch:
        patch.setattr(served.parts.runner, "launch", failing)
        for answer in answers(served, PROMPTS):
            code, details, got = answer
            assert code == StatusCode.INTERNAL and "failed for the second time" in details
            assert got  # what came before is theirs
    assert served.engine.healthy
    assert all(len(answer) == 40 for answer in answers(served, PROMPTS))
    at_rest(served.engine)


def test_a_request_that_cannot_be_taken_in_tells_its_caller_no_secrets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Over the link between frontend and engine process, too."""

    class Broken:
        def submit(self, request: Any) -> None:
            raise ZeroDivisionError("secret")

    host, sent = EngineHost(None), []  # type: ignore[arg-type]
    frontend: Any = SimpleNamespace(live={}, send=sent.append)
    sampling = SamplingParams(seed=1)
    request = Request(id="mine/1", prompt=(1, 2), sampling=sampling)
    host._submit(Broken(), frontend, submit_message(7, request))  # type: ignore[arg-type]
    (output,) = sent[0].outputs
    assert (output.handle, output.ended, output.error.code) == (7, True, "INTERNAL")
    assert output.error.message == (
        "request 'mine/1': a fault in Quire; the engine's log says more"
    )
    assert "could not be submitted" in caplog.text and "secret" in caplog.text
    assert not frontend.live and not host._routes
