"""What a frontend process keeps from one engine to the next."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quire.protos.v1 import engine_pb2 as pb
from quire.serving.collector import quiet_collector
from quire.serving.frontend import main
from quire.serving.intake import Served
from quire.tools.bench.null_runner import null_spec

SPEC = null_spec(4, page_size=16, max_model_len=64, pages=20)


@pytest.fixture
def collector() -> Iterator[None]:
    """As it was, afterwards: it is that of the tests' process."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_a_tokenizer_is_read_again_only_for_another_model(folder: Path) -> None:
    def link(pid: int, name: str) -> Any:
        welcome = pb.Welcome(folder=str(folder), name=name, pid=pid)
        return SimpleNamespace(
            welcome=welcome,
            folder=str(folder),
            ignore_config_fields=(),
            spec=SPEC,
            served=Served(name, "float32"),
        )

    intakes = main._Intakes()
    first = intakes.of(link(7, "one"))
    assert intakes.of(link(8, "one")) is first  # the next engine is another process
    assert intakes.of(link(9, "two")) is not first


def test_what_belonged_to_the_last_engine_is_collected(collector: None) -> None:
    class Link:
        def __init__(self) -> None:
            self.itself = self

    link = Link()
    quiet_collector()
    gone = weakref.ref(link)
    del link
    quiet_collector()
    assert gone() is None


def test_no_call_is_left_out_of_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there when it is settled is kept until the next engine comes."""
    done = list[str]()

    class Engine:
        healthy = True

        async def lost(self) -> None:
            raise asyncio.CancelledError  # the process ends

    class Frontend:
        async def serve(self, link: Any, intake: Any) -> None:
            done.append("serves")

    async def attach(*_: Any) -> Any:
        return Engine()

    monkeypatch.setattr(main, "RemoteLink", SimpleNamespace(attach=attach))
    monkeypatch.setattr(main._Intakes, "of", lambda self, link: None)
    monkeypatch.setattr(main, "quiet_collector", lambda _: done.append("is settled"))
    line: Any = SimpleNamespace(say=lambda **news: None)
    server: Any = Frontend()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main._serve_engines(server, {"engine_address": "", "name": ""}, line))
    assert done == ["is settled", "serves"]
