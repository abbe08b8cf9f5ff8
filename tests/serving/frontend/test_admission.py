"""What calls pass before their method sees them, as callers see it."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from engines import eventually
from frontends import ASK, Frontend
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.errors import Unavailable
from quire.protos.v1 import generation_pb2 as pb
from quire.serving.frontend.pending import Pending
from quire.serving.frontend.status import in_seconds, let_go

METHODS = pb.DESCRIPTOR.services_by_name["GenerationService"].methods_by_name
TEXT = b"\n\x02hi"
"""A GenerateRequest's `text`, and a TokenizeRequest's."""


def call(channel: grpc.Channel, method: str) -> Callable[[bytes], Any]:
    """Sends bytes as they are."""
    path = f"/quire.v1.GenerationService/{method}"
    if method == "StreamGenerate":
        stream = channel.unary_stream(path)
        return lambda sent: list(stream(sent, timeout=20))
    unary = channel.unary_unary(path)
    return lambda sent: unary(sent, timeout=20)


def failure(work: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        work()
    return caught.value


NO_UTF8 = b"\n\x02\xff\xfe"


@pytest.mark.parametrize("sent", [b"\xff\xff\xff", b"\n\x05hi", NO_UTF8])
def test_a_message_that_cannot_be_read_is_the_callers_fault(folder: Path, sent: bytes) -> None:
    with Frontend(folder) as frontend:
        channel = frontend.channel()
        for method in METHODS:
            error = failure(lambda: call(channel, method)(sent))  # noqa: B023
            if sent == NO_UTF8 and method in ("Detokenize", "Embed", "GetModelInfo"):
                continue  # where that field is none of text
            assert error.code() is StatusCode.INVALID_ARGUMENT, (method, error.details())
            name = METHODS[method].input_type.full_name
            says = f"request: got {len(sent)} bytes, must be a {name} as"
            assert error.details().startswith(says)
            assert frontend.link.told[-1] == ("INVALID_ARGUMENT", "", "")
        assert call(channel, "Generate")(TEXT) and call(channel, "StreamGenerate")(TEXT)


def test_others_make_way_for_a_call_that_comes_in(folder: Path) -> None:
    with Frontend(folder) as frontend:
        channel = frontend.channel()
        for count in (1, 2):
            assert call(channel, "StreamGenerate")(TEXT)
            assert frontend.link.made_way == count
        health = health_pb2_grpc.HealthStub(channel)
        health.Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert frontend.link.made_way == 2


class Slow:
    """An engine that answers nothing."""

    healthy = True

    def __init__(self, answering: Any) -> None:
        self.refused, self.close, self.told = answering.refused, answering.close, answering.told
        self.make_way = answering.make_way
        self.opened = 0

    def open(self, request: Any) -> Any:
        self.opened += 1
        return _Nothing(request.id)

    def finish(self, *_: Any) -> None:
        pass


class _Nothing:
    def __init__(self, name: str) -> None:
        self._pending = Pending(name)

    def __enter__(self) -> Pending:
        return self._pending

    def __exit__(self, *_: object) -> None:
        pass


def test_more_calls_than_a_frontend_may_have_are_refused_and_told_when_to_retry(
    folder: Path,
) -> None:
    with Frontend(folder, max_calls=3) as frontend:
        frontend.link = slow = Slow(frontend.link)  # type: ignore[assignment]
        frontend.run(lambda: frontend.server.serve(slow, frontend._intake))  # type: ignore[arg-type]
        stub, channel = frontend.stub(), frontend.channel()
        running = [stub.Generate.future(ASK, timeout=60) for _ in range(2)]
        eventually(lambda: slow.opened == 2)
        # Calls that say nothing after their first bytes.
        begin = channel.stream_unary("/quire.v1.GenerationService/Generate").future
        end = threading.Event()
        silent = begin(_nothing_until(end), timeout=60)
        admission = frontend.server._admission
        eventually(lambda: admission._running == 3)
        for method in METHODS:
            error = failure(lambda: call(channel, method)(TEXT))  # noqa: B023
            assert error.code() is StatusCode.RESOURCE_EXHAUSTED
            assert error.details().startswith("calls: got one more than 3 at once")
            assert dict(error.trailing_metadata())["retry-after"] == "1"
        assert slow.told == [("RESOURCE_EXHAUSTED", "", "")] * len(METHODS)
        refused = begin(_nothing_until(end), timeout=20)
        assert refused.exception().code() is StatusCode.RESOURCE_EXHAUSTED
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=20).status == 1
        for left in (silent, *running):
            left.cancel()
        eventually(lambda: admission._running == 0)
        assert call(channel, "Tokenize")(TEXT)
        end.set()


def _nothing_until(end: threading.Event) -> Iterator[bytes]:
    end.wait(60)
    yield from ()


def test_callers_of_one_connection_are_refused_too(folder: Path) -> None:
    """And do not wait for each other in silence, as HTTP/2 would have it."""
    with Frontend(folder, max_calls=2) as frontend:
        slow = Slow(frontend.link)
        frontend.run(lambda: frontend.server.serve(slow, frontend._intake))  # type: ignore[arg-type]

        async def ask() -> list[StatusCode]:
            async with grpc.aio.insecure_channel(frontend.address) as channel:
                method = channel.unary_unary("/quire.v1.GenerationService/Generate")
                calls = [method(TEXT, timeout=20) for _ in range(40)]
                codes = []
                for done in asyncio.as_completed([done_of(each) for each in calls]):
                    codes.append(await done)
                    if len(codes) == 38:
                        break
                for each in calls:
                    each.cancel()
                return codes

        async def done_of(each: Any) -> StatusCode:
            return await each.code()  # type: ignore[no-any-return]

        assert asyncio.run(ask()) == [StatusCode.RESOURCE_EXHAUSTED] * 38


@pytest.mark.parametrize(
    ("wait", "said"),
    [
        (1.0, "1"),
        (0.25, "0.25"),
        (1e-5, "0.001"),
        (1e6, "1000000"),
        (12.3456, "12.346"),
        (10, "10"),
    ],
)
def test_the_time_to_wait_is_decimal_and_never_less_than_it_is(wait: float, said: str) -> None:
    assert in_seconds(wait) == said and float(said) >= wait


def test_nothing_is_kept_of_tasks_that_failed_together() -> None:
    """As the inputs of an Embed do when the engine goes; their errors are kept with the call's."""
    kept: list[weakref.ref[Any]] = []

    class Large:
        pass

    async def fail() -> None:
        large = Large()
        kept.append(weakref.ref(large))
        raise Unavailable("the engine is gone")

    async def call() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(fail())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    with pytest.raises(Unavailable) as caught:
        asyncio.run(call())
    assert len([ref for ref in kept if ref()]) == 3
    let_go(caught.value)
    assert not [ref for ref in kept if ref()]
