"""What waits for a request's handler: gathered, in order, and handed over when it is its turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from quire.errors import Unavailable
from quire.sched.request import FinishReason, RequestOutput, TokenLogprobs
from quire.serving.frontend import pending
from quire.serving.frontend.pending import Pace, Pending


def run(work: Callable[[Pending], Awaitable[None]], pace: Pace | None = None) -> None:
    async def main() -> None:
        await work(Pending("r", pace))

    asyncio.run(main())


NEVER = 3600.0


class OneTurn(Pace):
    """There is one, and then none."""

    PER_MESSAGE = LONGEST = NEVER


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


class Readers:
    """Of several requests over one pace, each of which has had its first token.

    Attributes:
      took: which of them got which tokens, in that order.
    """

    def __init__(self, count: int, pace: Pace | None = None) -> None:
        pace = pace or Pace()
        self.pendings = [Pending(str(at), pace) for at in range(count)]
        self.took: list[tuple[int, tuple[int, ...]]] = []

    async def __aenter__(self) -> Readers:
        self._tasks = [asyncio.ensure_future(self._read(at)) for at in range(len(self.pendings))]
        self.put(range(len(self.pendings)), 0)
        await self.until(len(self.pendings))
        self.took.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    def put(self, order: Iterable[int], token: int) -> None:
        for at in order:
            self.pendings[at].put_tokens((token,))

    async def until(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.took) < count:
                await asyncio.sleep(0)

    async def _read(self, at: int) -> None:
        while True:
            for output in await self.pendings[at].take():
                self.took.append((at, output.tokens))


async def let_run() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_after_a_lull_nobody_waits() -> None:
    async def main() -> None:
        async with Readers(3) as readers:
            readers.put((2, 0, 1), 1)
            await let_run()
            assert readers.took == [(2, (1,)), (0, (1,)), (1, (1,))]

    asyncio.run(main())


class Single(Pace):
    """Turns come one by one."""

    PER_MESSAGE, BURST = 1e-3, 0.0


def test_turns_go_by_the_age_of_tokens_and_bring_all_that_came() -> None:
    now = 100.0  # until the test moves it

    async def main() -> None:
        nonlocal now
        async with Readers(3, Single(lambda: now)) as readers:
            now += 1.0
            readers.put((2, 0, 1), 1)
            await readers.until(1)
            # Who had a turn comes after those who did not.
            readers.put((2, 1, 0), 2)
            for turns in (2, 3, 4):
                await let_run()
                assert len(readers.took) == turns - 1
                now += Single.PER_MESSAGE
                await readers.until(turns)
            assert readers.took == [(2, (1,)), (0, (1, 2)), (1, (1, 2)), (2, (2,))]

    asyncio.run(main())


def test_the_first_tokens_and_the_end_of_an_answer_wait_for_no_turn() -> None:
    async def main() -> None:
        async with Readers(3, OneTurn()) as readers:  # which reads first tokens
            readers.put((2, 0, 1), 1)
            await let_run()
            assert readers.took == [(2, (1,))]
            end = RequestOutput("1", (4,), finish_reason=FinishReason.LENGTH)
            readers.pendings[1].put(end)
            await let_run()
            assert readers.took[1:] == [(1, (1, 4))]

    asyncio.run(main())


def test_what_came_while_nobody_waited_waits_for_its_turn() -> None:
    async def work(pending: Pending) -> None:
        for token in (1, 2):  # the first of all, and the one turn that there is
            pending.put_tokens((token,))
            assert (await pending.take())[0].tokens == (token,)
        pending.put_tokens((3,))
        taking = asyncio.ensure_future(pending.take())
        await let_run()
        assert not taking.done()
        pending.put(RequestOutput("r", error=Unavailable("x"), finish_reason=FinishReason.ERROR))
        assert [output.tokens for output in await taking] == [(3,), ()]

    run(work, OneTurn())


def test_a_round_takes_no_longer_than_it_may() -> None:
    class Hasty(Pace):
        PER_MESSAGE, LONGEST = NEVER, 0.0

    async def main() -> None:
        async with Readers(50, Hasty()) as readers:
            readers.put(range(50), 1)
            await let_run()
            assert len(readers.took) == 50

    asyncio.run(main())


def test_between_looks_an_event_loop_takes_in_more() -> None:
    class Pairs(Pace):
        AT_ONCE = 2

    async def main() -> None:
        async with Readers(5, Pairs()) as readers:
            readers.put(range(5), 1)
            await readers.until(1)
            readers.put((4, 0), 2)
            await readers.until(6)
            assert readers.took == [
                (0, (1,)),
                (1, (1,)),
                (2, (1,)),
                (3, (1,)),
                (4, (1, 2)),
                (0, (2,)),
            ]

    asyncio.run(main())


def test_a_first_token_passes_those_whose_turn_has_come() -> None:
    """As does a new call: an event loop is not kept by all who are due."""

    async def main() -> None:
        async with Readers(30) as readers:
            readers.put(range(30), 1)
            await readers.until(1)
            newcomer = Pending("new")
            taking = asyncio.ensure_future(newcomer.take())
            newcomer.put_tokens((7,))
            (output,) = await taking
            assert output.tokens == (7,) and len(readers.took) < 30
            await readers.until(30)

    asyncio.run(main())


def test_a_call_that_comes_in_puts_off_one_look_and_not_the_next() -> None:
    now = 100.0  # until the test moves it

    async def main() -> None:
        nonlocal now
        pace = Pace(lambda: now)
        async with Readers(3, pace) as readers:
            for token in (1, 2):
                readers.put((0, 1), token)
                pace.make_way()
                await let_run()
                assert not readers.took
                pace.make_way()  # and again: they have waited once
                await readers.until(2)
                assert readers.took == [(0, (token,)), (1, (token,))]
                readers.took.clear()
                now += Pace.TICK  # the call is in
                readers.put((2,), token)
                await let_run()
                assert readers.took == [(2, (token,))]
                readers.took.clear()

    asyncio.run(main())


def test_a_reader_that_leaves_leaves_nothing_behind() -> None:
    async def work(pending: Pending) -> None:
        pending.put_tokens((1,))
        await pending.take()
        for token in (2, 3):
            taking = asyncio.ensure_future(pending.take())
            await asyncio.sleep(0)
            pending.put_tokens((token,))  # the second time it waits for its turn
            taking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await taking
        async with asyncio.timeout(60):
            assert (await pending.take())[0].tokens == (2, 3)

    run(work, Single())


class Stage:
    """An event loop and clocks that stand still but for the waits that a pace asks for, and for
    what a message costs its process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
        self.now, self._spent, self._cost = 100.0, 5.0, cost
        self._looks = deque[tuple[float, Any]]()
        self.woken: list[float] = []
        loop = SimpleNamespace(
            call_soon=lambda look: self._looks.append((0.0, look)),
            call_later=lambda wait, look: self._looks.append((wait, look)),
        )
        monkeypatch.setattr(pending, "asyncio", SimpleNamespace(get_running_loop=lambda: loop))
        self._pace = Pace(lambda: self.now, lambda: self._spent)

    def call(self) -> None:
        self.woken.append(self.now)
        self._spent += self._cost

    def round(self, readers: int) -> list[float]:
        """Seconds after which each of so many had its turn."""
        begin, self.woken = self.now, []
        for _ in range(readers):
            self._pace.join(self)  # type: ignore[arg-type]
        while self._looks:
            wait, look = self._looks.popleft()
            self.now += wait
            look()
        return [at - begin for at in self.woken]


@pytest.mark.parametrize("readers", [10, 1_000, 5_000])
def test_a_round_is_spread_evenly_and_ends_in_time(
    readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken = Stage(monkeypatch, Pace.PER_MESSAGE / Pace.SPARE).round(readers)
    assert len(woken) == readers
    round_takes = min(readers * Pace.PER_MESSAGE, Pace.LONGEST)
    assert woken[-1] == pytest.approx(round_takes, abs=2 * Pace.TICK)
    middle = woken[readers // 2]
    assert middle == pytest.approx(round_takes / 2, abs=2 * Pace.TICK + Pace.BURST)


@pytest.mark.parametrize(
    ("cost", "believed"), [(90e-6, 90e-6), (1e-6, Pace.COSTS[0]), (1.0, Pace.COSTS[1])]
)
def test_turns_are_as_far_apart_as_messages_are_dear(
    cost: float, believed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, readers = Stage(monkeypatch, cost), 200
    stage.round(readers)  # of which some come at once, after a lull
    before = stage.round(readers)[-1]
    assert before == pytest.approx(readers * Pace.PER_MESSAGE, abs=2 * Pace.TICK)
    for _ in range(Pace.MEASURED // readers):
        stage.round(readers)
    after = stage.round(readers)[-1]
    assert after == pytest.approx(readers * believed * Pace.SPARE, abs=2 * Pace.TICK)
