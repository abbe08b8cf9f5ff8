"""API keys as callers meet them: who gets in, as whom, and what changes with the file."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from engines import eventually
from frontends import ASK, Frontend
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_supervisor import Service

from quire.errors import InvalidRequest
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1.generation_pb2_grpc import GenerationServiceStub
from quire.sched.quota import Limits
from quire.serving import watched_file
from quire.serving.auth.follow import follow_keys
from quire.serving.auth.interceptor import KeyInterceptor
from quire.serving.auth.key_file import Key, KeyTable, write_keys
from quire.serving.auth.keys import KeyHash, draw_key


def make_table(*tenants: str) -> tuple[KeyTable, list[str]]:
    """A key for each tenant."""
    drawn = [draw_key() for _ in tenants]
    keys = {
        id: Key(id=id, tenant=tenant, hash=KeyHash.of(text))
        for tenant, (id, text) in zip(tenants, drawn, strict=True)
    }
    return KeyTable({tenant: Limits() for tenant in tenants}, keys), [text for _, text in drawn]


TABLE, (ACME, OTHER) = make_table("acme", "other")


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[Frontend]:
    checks = KeyInterceptor()
    checks.use(TABLE)
    with Frontend(folder, interceptors=[checks]) as frontend:
        yield frontend


def said_by(frontend: Frontend, caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Other servers of this process may say something, too."""
    return [record for record in caplog.records if record.thread == frontend.thread]


def code_of(call: Any) -> tuple[StatusCode, str]:
    """How a call ended."""
    try:
        result = call()
        if not isinstance(result, pb.GenerateResponse):
            list(result)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return StatusCode.OK, ""


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", f"Bearer {ACME}")],
        [("authorization", f"bearer  {ACME} ")],
        [("x-api-key", ACME)],
        [("x-api-key", ACME), ("authorization", f"Bearer {ACME}")],
    ],
)
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_a_known_key_is_let_in_as_its_tenant(
    locked: Frontend, metadata: list[tuple[str, str]], method: str
) -> None:
    call = getattr(locked.stub(), method)
    assert code_of(lambda: call(ASK, metadata=metadata, timeout=20)) == (StatusCode.OK, "")
    assert locked.link.requests[-1].tenant == "acme"


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ([], "API key: got none; send metadata"),
        ([("x-api-key", "")], "API key: not known"),
        ([("x-api-key", ACME[:-1])], "API key: not known"),
        ([("authorization", f"Basic {ACME}")], "API key: not known"),
        ([("authorization", ACME)], "API key: not known"),
        ([("x-api-key", ACME), ("x-api-key", OTHER)], "API key: got several"),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_nobody_else_is(
    locked: Frontend, metadata: Any, says: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    served = len(locked.link.requests)
    call = getattr(locked.stub(), method)
    code, details = code_of(lambda: call(ASK, metadata=metadata, timeout=20))
    assert code is StatusCode.UNAUTHENTICATED
    assert details.startswith(says) and ACME[:20] not in details
    assert len(locked.link.requests) == served
    assert locked.link.told[-1] == ("UNAUTHENTICATED", "", "")
    assert not said_by(locked, caplog)  # the request log has it, and bounds how often


def test_health_needs_no_key_and_all_else_does(locked: Frontend) -> None:
    channel = locked.channel()
    health = health_pb2_grpc.HealthStub(channel)
    response = health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert response.status == health_pb2.HealthCheckResponse.SERVING
    watched = health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
    assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
    watched.cancel()
    for path in ("/quire.v1.GenerationService/None", "/grpc.health.v1.HealthX/Check", "/x/y"):
        call = channel.unary_unary(path)
        assert code_of(lambda call=call: call(b"", timeout=20))[0] is StatusCode.UNAUTHENTICATED
    reflect = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    )
    code, _ = code_of(lambda: reflect(iter([b""]), timeout=20))
    assert code is StatusCode.UNAUTHENTICATED


def test_a_caller_cannot_name_the_tenant_of_another(locked: Frontend) -> None:
    stub, metadata = locked.stub(), [("x-api-key", OTHER)]

    def ask(tenant: str) -> tuple[StatusCode, str]:
        request = pb.GenerateRequest(text="hello", tenant=tenant, request_id="r")
        return code_of(lambda: stub.Generate(request, metadata=metadata, timeout=20))

    assert ask("") == ask("other") == (StatusCode.OK, "")
    assert {request.tenant for request in locked.link.requests[-2:]} == {"other"}
    code, details = ask("acme")
    assert code is StatusCode.PERMISSION_DENIED
    assert details == "tenant: got 'acme', must be empty or 'other', the tenant of the API key"
    assert locked.link.told[-1] == ("PERMISSION_DENIED", "r", "other")  # not whom it named


def test_without_keys_callers_name_their_tenant(folder: Path) -> None:
    with Frontend(folder) as frontend:
        request = pb.GenerateRequest(text="hello", tenant="whoever")
        frontend.stub().Generate(request, metadata=[("x-api-key", "ignored")], timeout=20)
        assert frontend.link.requests[-1].tenant == "whoever"


def test_calls_side_by_side_keep_their_tenants(locked: Frontend) -> None:
    stub = locked.stub()
    calls = []
    for n in range(40):
        key = (ACME, OTHER)[n % 2]
        request = pb.GenerateRequest(text="hello", cache_salt=("acme", "other")[n % 2])
        calls.append(stub.Generate.future(request, metadata=[("x-api-key", key)], timeout=20))
    for call in calls:
        call.result()
    for request in locked.link.requests[-40:]:
        assert request.cache_salt == request.tenant


def test_tenants_name_their_requests_as_they_like(locked: Frontend) -> None:
    calls = locked.server._service.calls
    first = calls.named("acme", "first")
    with first, calls.named("other", "first"), pytest.raises(InvalidRequest):
        calls.named("acme", "first").__enter__()
    with calls.named("acme", "first"), calls.named("acme", ""), calls.named("acme", ""):
        pass


UNREADABLE = (
    "keys: [nonsense",
    "keys: [{id: a, tenant: b, created: !!int x}]",  # no such number
    "keys: [{id: a, tenant: b, note: " + "9" * 5000 + "}]",  # more digits than Python reads
    "[" * 5000,
)


OFTEN = 0.005
"""Seconds between looks."""


def test_a_fault_of_what_reads_does_not_end_the_watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, used = tmp_path / "file", list[str]()
    file.write_text("bad")

    def read(path: str | Path) -> str:
        text = Path(path).read_text()
        if text == "bad":
            raise ZeroDivisionError
        return text

    async def story() -> None:
        watching = asyncio.ensure_future(watched_file.watch(file, read, used.append, None, OFTEN))
        for wanted in (lambda: "stays in force" in caplog.text, lambda: used == ["good"]):
            end = time.monotonic() + 20
            while not wanted():
                assert time.monotonic() < end and not watching.done()
                await asyncio.sleep(0.002)
            (tmp_path / "next").write_text("good")
            (tmp_path / "next").replace(file)
        watching.cancel()

    asyncio.run(story())


def test_a_file_is_followed_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, used = tmp_path / "keys", list[KeyTable]()
    first, second = make_table("a")[0], make_table("b")[0]

    async def until(count: int, errors: int) -> None:
        end = time.monotonic() + 20
        while len(used) < count or caplog.text.count("stays in force") < errors:
            assert time.monotonic() < end, "it did not come"
            await asyncio.sleep(0.002)

    async def story() -> None:
        write_keys(file, first)
        following = follow_keys(str(file), used.append, OFTEN)
        assert used == [first]
        write_keys(file, second)
        await until(2, 0)
        for count, content in enumerate(UNREADABLE, start=1):
            (tmp_path / "next").write_text(content)
            (tmp_path / "next").replace(file)
            await until(2, count)
        file.unlink()
        await until(2, len(UNREADABLE) + 1)
        write_keys(file, first)
        await until(3, len(UNREADABLE) + 1)
        assert not following.done()
        following.cancel()

    asyncio.run(story())
    assert used == [first, second, first]
    # Once each, not at every look.
    assert caplog.text.count("stays in force") == len(UNREADABLE) + 1


def test_it_is_new_keys_that_count(folder: Path) -> None:
    checks = KeyInterceptor()
    with Frontend(folder, interceptors=[checks]) as frontend:
        stub = frontend.stub()

        def ask(key: str) -> StatusCode:
            metadata = [("x-api-key", key)]
            return code_of(lambda: stub.Generate(ASK, metadata=metadata, timeout=20))[0]

        assert ask(ACME) is StatusCode.UNAUTHENTICATED
        checks.use(TABLE)
        assert ask(ACME) is StatusCode.OK
        table, (new,) = make_table("acme")
        checks.use(table)
        assert [ask(ACME), ask(new)] == [StatusCode.UNAUTHENTICATED, StatusCode.OK]


def test_limits_hold_across_frontends_and_follow_the_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    table, (key,) = make_table("acme")
    write_keys(file, KeyTable({"acme": Limits(requests_per_minute=1)}, table.keys))
    metadata = [("x-api-key", key)]
    short = pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=1))
    with Service(folder, frontends=2, api_keys=str(file)).ready() as service:
        answered, refused = 0, []
        for _ in range(15):  # each has a connection of its own, to whichever frontend takes it
            stub = GenerationServiceStub(service.channel())
            try:
                stub.Generate(short, metadata=metadata, timeout=20)
                answered += 1
            except grpc.RpcError as error:
                assert error.code() is StatusCode.RESOURCE_EXHAUSTED
                refused.append(error)
        assert answered == 1  # within the minute that one more takes to be due
        assert "requests_per_minute: tenant 'acme' is at its limit of 1" in refused[-1].details()
        assert 0 < float(dict(refused[-1].trailing_metadata())["retry-after"]) <= 60

        write_keys(file, KeyTable({"acme": Limits()}, table.keys))
        stub = GenerationServiceStub(service.channel())
        eventually(
            lambda: (
                code_of(lambda: stub.Generate(short, metadata=metadata, timeout=20))[0]
                is StatusCode.OK
            )
        )
        write_keys(file, KeyTable())
        for _ in range(6):
            stub = GenerationServiceStub(service.channel())
            eventually(
                lambda stub=stub: (
                    code_of(lambda: stub.Generate(short, metadata=metadata, timeout=20))[0]
                    is StatusCode.UNAUTHENTICATED
                )
            )


def test_a_file_that_cannot_be_read_ends_the_start(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "quire.tools.cli", "serve", str(folder), "--port=0"]
    file = tmp_path / "none"
    ended = subprocess.run(
        [*command, f"--api-keys={file}"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"quire: {file}: cannot be read")
