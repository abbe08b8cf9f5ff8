"""A call that ends early reaches the engine's loop within one device step, which frees its pages.

Steps are counted, not timed: the engine gets the results of one at a time.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import pytest
from engines import Stepping, at_rest, eventually
from grpc import StatusCode
from running import Running

from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1 import generation_pb2_grpc as pb_grpc

CLIENT = """
import sys, time, grpc
from quire.protos.v1 import generation_pb2 as pb, generation_pb2_grpc as pb_grpc
stub = pb_grpc.GenerationServiceStub(grpc.insecure_channel(sys.argv[1]))
sampling = pb.SamplingParams(temperature=0, ignore_eos=True)
for _ in stub.StreamGenerate(pb.GenerateRequest(text=sys.argv[2], sampling=sampling)):
    pass
"""
PROMPT = "what is a page? " * 8
NEIGHBOUR = "the lazy dog says: "


def ask(text: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text=text, sampling=pb.SamplingParams(temperature=0.0, ignore_eos=True)
    )


def cancelled(served: Running) -> Callable[[], None]:
    return served.stub.Generate.future(ask(PROMPT), timeout=60).cancel


def cancelled_stream(served: Running) -> Callable[[], None]:
    return served.stub.StreamGenerate(ask(PROMPT), timeout=60).cancel


def out_of_time(served: Running) -> Callable[[], None]:
    """Long enough for the steps that it takes before."""
    call = served.stub.Generate.future(ask(PROMPT), timeout=5.0)

    def end() -> None:
        assert call.exception().code() is StatusCode.DEADLINE_EXCEEDED

    return end


def channel_closed(served: Running) -> Callable[[], None]:
    channel = grpc.insecure_channel(
        served.server.address, options=[("grpc.use_local_subchannel_pool", 1)]
    )
    stream = pb_grpc.GenerationServiceStub(channel).StreamGenerate(ask(PROMPT), timeout=60)
    threading.Thread(target=drained, args=(stream,), daemon=True).start()
    return channel.close


def drained(stream: Any) -> None:
    with suppress(grpc.RpcError):
        list(stream)


def killed(served: Running) -> Callable[[], None]:
    """A client that dies without a word."""
    command = [sys.executable, "-P", "-c", CLIENT, served.server.address, PROMPT]
    client = subprocess.Popen(command)

    def end() -> None:
        client.kill()
        client.wait()

    return end


@pytest.mark.parametrize("waits", [False, True], ids=["runs", "waits"])
@pytest.mark.parametrize(
    "begin", [cancelled, cancelled_stream, out_of_time, channel_closed, killed]
)
def test_a_call_that_ends_early_is_gone_with_the_next_step(
    served: Running, begin: Callable[[Running], Callable[[], None]], waits: bool
) -> None:
    engine, roster = served.engine, served.engine._scheduler._roster
    neighbours = 4 if waits else 1  # of four slots
    with Stepping(served.parts) as steps:
        others = [
            served.stub.Generate.future(ask(f"{i} {NEIGHBOUR}"), timeout=60)
            for i in range(neighbours)
        ]
        eventually(lambda: len(engine._live) == neighbours)
        for _ in range(4):
            steps.step()
        assert len(roster.running) == neighbours
        end = begin(served)
        eventually(lambda: len(engine._live) == neighbours + 1)
        for _ in range(2):
            steps.step()
        assert (len(roster.running), len(roster.waiting)) == (min(neighbours + 1, 4), waits)

        end()
        eventually(lambda: served.server._service.calls.running == neighbours)
        eventually(lambda: bool(engine._inbox))
        steps.step()  # the one that ran when the call ended
        assert (len(roster.running), len(roster.waiting)) == (neighbours, 0)
        held = sum(len(seq.kv.pages) for seq in roster.running)
        assert engine.stats().pages_used == held
        roster.check_integrity()
        for other in others:
            other.cancel()
    at_rest(engine)
