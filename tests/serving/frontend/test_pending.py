"""What waits for a request's handler: gathered, in order, and handed over at a pace."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from quire.errors import Unavailable
from quire.sched.request import FinishReason, RequestOutput, TokenLogprobs
from quire.serving.frontend.pending import Pace, Pending


def run(work: Callable[[Pending], Awaitable[None]], readers: int = 1) -> None:
    async def main() -> None:
        pace = Pace()
        pace.set(readers)
        await work(Pending("r", pace))

    asyncio.run(main())


def test_plain_tokens_are_gathered_into_one_output() -> None:
    async def work(pending: Pending) -> None:
        pending.put(RequestOutput("r", (1,), cached_tokens=32))
        for token in range(2, 9):
            pending.put_tokens((token,))
        assert await pending.take() == [RequestOutput("r", tuple(range(1, 9)), cached_tokens=32)]
        pending.put_tokens((9, 10))
        pending.put_tokens([11])
        assert await pending.take() == [RequestOutput("r", (9, 10, 11), cached_tokens=32)]

    run(work)


def test_what_ends_an_answer_comes_behind_its_tokens() -> None:
    async def work(pending: Pending) -> None:
        pending.put_tokens((1,))
        pending.put(RequestOutput("r", (2,), finish_reason=FinishReason.STOP, stop_token=2))
        pending.put(RequestOutput("r", (7,), choice=1))
        error = RequestOutput("r", error=Unavailable("x"), finish_reason=FinishReason.ERROR)
        pending.put(error)
        first, second, third = await pending.take()
        assert first.tokens == (1, 2) and first.stop_token == 2
        assert first.finish_reason is FinishReason.STOP
        assert (second.tokens, second.choice) == ((7,), 1)
        assert third is error

    run(work)


def test_logprobs_are_gathered_and_those_of_the_prompt_kept() -> None:
    def entry(token: int) -> TokenLogprobs:
        return TokenLogprobs(token, -float(token), 1)

    async def work(pending: Pending) -> None:
        prompt = (None, entry(5))
        pending.put(RequestOutput("r", (1,), logprobs=(entry(1),), prompt_logprobs=prompt))
        pending.put(RequestOutput("r", (2,), logprobs=(entry(2),)))
        pending.put(RequestOutput("r", (3,), logprobs=(entry(3),)))
        (output,) = await pending.take()
        assert output.logprobs == (entry(1), entry(2), entry(3))
        assert output.prompt_logprobs == prompt and output.tokens == (1, 2, 3)

    run(work)


async def reading(pending: Pending) -> asyncio.Future[list[RequestOutput]]:
    """A reader that has just been given something, and waits for more."""
    pending.put_tokens((1,))
    await pending.take()
    taking = asyncio.ensure_future(pending.take())
    await asyncio.sleep(0)
    return taking


async def let_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_alone_a_reader_is_woken_at_once() -> None:
    async def work(pending: Pending) -> None:
        await asyncio.sleep(2 * Pace.PER_READER)
        taking = await reading(pending)
        await asyncio.sleep(2 * Pace.PER_READER)
        pending.put_tokens((2,))
        await let_run()
        assert taking.done()

    run(work)


@pytest.mark.parametrize("patience", [0.001, 3600.0])
def test_one_that_was_just_woken_waits_for_more(patience: float) -> None:
    async def work(pending: Pending) -> None:
        pending._pace.interval, pending._pace.patience = 3600.0, patience
        taking = await reading(pending)
        pending.put_tokens((2,))
        pending.put_tokens((3,))
        await let_run()
        if patience > 1:
            assert not taking.done()
            # What ends an answer waits for nothing.
            pending.put(RequestOutput("r", (4,), finish_reason=FinishReason.LENGTH))
            await let_run()
            assert taking.result()[0].tokens == (2, 3, 4)
        else:
            assert (await taking)[0].tokens == (2, 3)

    run(work)


def test_a_reader_that_leaves_leaves_nothing_behind() -> None:
    async def work(pending: Pending) -> None:
        taking = asyncio.ensure_future(pending.take())
        await asyncio.sleep(0)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        pending.put_tokens((1,))
        assert (await pending.take())[0].tokens == (1,)

    run(work, 10_000)
