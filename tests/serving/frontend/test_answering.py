"""How a call follows its request, while the engine takes its time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_checkpoint

from quire import SamplingParams
from quire.checkpoints.detokenize import TokenTable
from quire.sched.request import FinishReason, Request, RequestOutput, Timing
from quire.serving.answer import Answer
from quire.serving.choices import Choices
from quire.serving.frontend import answering
from quire.serving.frontend.answering import Piece, answers
from quire.serving.frontend.pending import Pending

TOKENIZER = tiny_checkpoint.make_tokenizer()
TIMING = Timing(1.0, 2.0, 3.0)


class Link:
    """To an engine that gives what tests put into `pending`; `told` is what it is told."""

    def __init__(self) -> None:
        self.pending = Pending("r")
        self.told: list[tuple[FinishReason, int | None]] = []

    @contextmanager
    def open(self, request: Request) -> Iterator[Pending]:
        yield self.pending

    def finish(self, request_id: str, reason: FinishReason, choice: int | None) -> None:
        self.told.append((reason, choice))

    def put(self, text: str, choice: int = 0) -> None:
        tokens = tuple(TOKENIZER.encode(text).ids)
        self.pending.put(RequestOutput("r", tokens, choice=choice))

    def end(self) -> None:
        stop = FinishReason.STOP
        self.pending.put(RequestOutput("r", finish_reason=stop, ended=True, timing=TIMING))


def follow(link: Link, **sampling: Any) -> Any:
    params = SamplingParams(stop=(". ",), seed=1, **sampling)
    table = TokenTable(TOKENIZER, frozenset())
    choices = Choices(params, lambda: Answer(params, table.stream(True), str))
    request = Request(id="r", prompt=(1,), sampling=params, eos_ids=())
    return answers(link, choices, request)  # type: ignore[arg-type]


async def now(pieces: Any) -> Piece:
    """The next piece, which needs nothing more from the engine."""
    async with asyncio.timeout(10):
        return await anext(pieces)  # type: ignore[no-any-return]


def test_text_before_a_stop_string_does_not_wait_for_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answering, "TIMING_WAIT", 1000.0)

    async def run() -> None:
        link = Link()
        pieces = follow(link)
        link.put("the fox. and")
        first = await now(pieces)
        assert (first.chunk.text, first.chunk.finish_reason) == ("the fox", None)
        assert first.chunk.token_ids and not first.is_last
        assert link.told == [(FinishReason.STOP, 0)]
        link.end()
        last = await now(pieces)
        assert (last.chunk.text, last.chunk.token_ids, last.is_last) == ("", [], True)
        assert (last.chunk.finish_reason, last.chunk.stop_reason) == ("stop", ". ")
        assert last.chunk.timing is TIMING
        assert [piece async for piece in pieces] == []
        assert link.told == [(FinishReason.STOP, 0)]

    asyncio.run(run())


def test_only_the_last_answer_to_end_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "TIMING_WAIT", 1000.0)

    async def run() -> None:
        link = Link()
        pieces = follow(link, n=2)
        link.put("the. ", choice=1)
        first = await now(pieces)
        assert (first.chunk.index, first.chunk.finish_reason) == (1, "stop") and not first.is_last
        link.put("a fox. ")
        second = await now(pieces)
        assert (second.chunk.text, second.chunk.finish_reason) == ("a fox", None)
        link.end()
        last = await now(pieces)
        assert (last.chunk.index, last.chunk.finish_reason, last.is_last) == (0, "stop", True)

    asyncio.run(run())


def test_an_engine_that_does_not_say_ends_no_call_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "TIMING_WAIT", 0.01)

    async def run() -> None:
        link = Link()
        pieces = follow(link)
        link.put("the fox. ")
        await now(pieces)
        last = await now(pieces)
        assert last.is_last and last.chunk.finish_reason == "stop" and last.chunk.timing is None

    asyncio.run(run())


def test_who_leaves_early_is_told_of_once() -> None:
    async def run() -> None:
        link = Link()
        pieces = follow(link)
        link.put("the fox")
        await now(pieces)
        await pieces.aclose()
        assert link.told == [(FinishReason.ABORT, None)]

    asyncio.run(run())
