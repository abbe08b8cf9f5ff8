"""A fault of ours while a step is planned, or its results are taken in, and what it costs: the one
request that it came up for, or where it is nobody's, a fresh start."""

from __future__ import annotations

from typing import Any

import pytest
from fake_runner import FakeRunner, expected_answer, make_request, make_spec
from injection import Injector

import quire.sched.plan_builder
import quire.sched.scheduler
from quire.errors import Internal
from quire.kv.cache import KVCache
from quire.sched.engine import Engine
from quire.sched.pressure import Pressure
from quire.sched.ranked import Ranked
from quire.sched.request import FinishReason, Request, RequestOutput
from quire.sched.results import Results
from quire.sched.roster import Roster
from quire.sched.scheduler import Scheduler

SPEC = make_spec(slots=3, pages=14, max_model_len=32, tokens=16)


class Served:
    """An engine whose step in flight is behind the one planned; checks itself after each step."""

    def __init__(self, *requests: Request):
        self.requests = requests
        self.heard: list[RequestOutput] = []
        self.runner = FakeRunner(SPEC)
        self.scheduler = Scheduler(SPEC, max_batched_tokens=16, prefill_chunk=8)
        self.engine = Engine(
            self.runner, self.scheduler, overlap=True, on_outputs=self.heard.extend
        )
        for request in requests:
            self.engine.submit(request)

    def run(self) -> Served:
        """To the end of all requests, unless the engine closes."""
        for _ in range(500):
            if not (self.engine.has_work and self.engine.healthy):
                return self
            self.engine.step()
            if self.engine.healthy:
                self.scheduler.check_integrity()
        raise AssertionError("requests are left")

    def errors(self) -> dict[str, str]:
        """Of the requests that ended with one. Each has ended once; the others' answers are
        whole."""
        ends = [output for output in self.heard if output.ended]
        assert sorted(o.request_id for o in ends) == sorted(r.id for r in self.requests)
        errors = {}
        for end in ends:
            if end.finish_reason is FinishReason.ERROR:
                assert isinstance(end.error, Internal)
                errors[end.request_id] = str(end.error)
        for request in self.requests:
            if request.id not in errors:
                for choice in range(request.sampling.choices):
                    assert self.tokens(request.id, choice) == answer(request, choice)
        return errors

    def tokens(self, id: str, choice: int = 0) -> list[int]:
        outputs = [o for o in self.heard if (o.request_id, o.choice) == (id, choice)]
        return [token for output in outputs for token in output.tokens]

    def is_bad(self, of_whom: Any) -> bool:
        """Whether a chain or a holding is of the request "bad"."""
        group = self.scheduler._roster.get("bad")
        sequences = group.sequences if group else []
        return any(of_whom in (seq.chain, getattr(seq, "kv", None)) for seq in sequences)


def answer(request: Request, choice: int) -> list[int]:
    return expected_answer(request, SPEC.vocab_size, request.sampling.max_tokens or 0, choice)[0]


def several() -> list[Request]:
    """Of two tenants, more than there are slots and pages for."""
    return [
        *(make_request(f"{n}", tuple(range(1, 4 + 2 * n)), 12, tenant="ab"[n % 2]) for n in (0, 1)),
        make_request("choices", (1, 2, 3, 4, 5, 6), 6, n=2),
        make_request("scored", (1, 2, 3, 4, 5, 6), 6, prompt_logprobs=1, repetition_penalty=1.2),
        make_request("long", tuple(range(1, 14)), 12, tenant="b"),
    ]


# `_tell` appends to lists and removes from dicts what is known to be there.
@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [(Scheduler, "schedule", 1), (Scheduler, "schedule", 4), (Results, "take_in", 11)],
)
def test_a_fault_before_any_line_costs_one_request_at_most(
    owner: type, method: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, outcomes = getattr(owner, method), set()
    for line in range(0, 10_000, 3):
        injector, calls = Injector(line, ("_tell",)), iter(range(10_000))

        def failing(*args: Any, fail: Any = injector, calls: Any = calls) -> Any:
            return fail(lambda: sound(*args)) if next(calls) == call else sound(*args)

        monkeypatch.setattr(owner, method, failing)
        served = Served(*several()).run()
        if not injector.was_due:
            break
        assert served.engine.healthy and served.runner.resets <= 1, f"line {line}"
        errors = served.errors()
        assert len(errors) <= 1 and "secret" not in str(errors), f"line {line}"
        outcomes.add((len(errors), served.runner.resets))
    assert line > 90 and outcomes >= {(1, 0), (0, 1)}, outcomes


@pytest.mark.parametrize(
    ("method", "call", "choices"),
    [
        *(("match", 0, 1), ("match", 0, 2), ("match", 1, 2), ("open", 0, 1), ("open", 1, 2)),
        *(("grow", 0, 1), ("grow", 1, 1), ("grow", 1, 2), ("register", 0, 1), ("register", 0, 2)),
    ],
)
def test_a_fault_for_one_request_ends_it_alone(
    method: str,
    call: int,
    choices: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sound, calls = getattr(KVCache, method), iter(range(10_000))
    served = Served(
        make_request("0", (1, 2, 3), 12),
        make_request("bad", (47, 48, 49, 46, 45), 12, n=choices),
        make_request("2", (1, 2, 3, 4, 5), 12),
    )

    def failing(self: KVCache, of_whom: Any, *args: Any) -> Any:
        if served.is_bad(of_whom) and next(calls) == call:
            raise KeyError("a bug")
        return sound(self, of_whom, *args)

    monkeypatch.setattr(KVCache, method, failing)
    said = "request 'bad': a fault in Quire; the engine's log says more"
    assert served.run().errors() == {"bad": said}
    assert served.runner.resets == 0 and served.engine.healthy  # nobody else started over
    end = next(o for o in served.heard if o.ended and o.request_id == "bad")
    assert isinstance(end.error and end.error.__cause__, KeyError) and end.timing is not None
    records = [r for r in caplog.records if r.name.startswith("quire.sched.")]
    (record,) = [r for r in records if r.levelname == "ERROR"]
    assert record.getMessage() == "request 'bad' could not be planned for and ends"
    assert "a bug" in caplog.text
    stats = served.engine.stats()
    assert (stats.pages_used, stats.running, stats.waiting, stats.failed_steps) == (0, 0, 0, 0)


@pytest.mark.parametrize("first", [0, 1])
def test_what_cannot_be_registered_still_ends_alone(
    first: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Registering fails from some call on, when the request ends, too."""
    sound, calls = KVCache.register, iter(range(10_000))
    served = Served(make_request("0", (1, 2, 3), 12), make_request("bad", (47, 48, 49), 12))

    def failing(self: KVCache, of_whom: Any, *args: Any) -> Any:
        if served.is_bad(of_whom) and next(calls) >= first:
            raise KeyError("a bug")
        return sound(self, of_whom, *args)

    monkeypatch.setattr(KVCache, "register", failing)
    assert set(served.run().errors()) <= {"bad"}
    assert served.runner.resets == 0 and served.engine.healthy
    assert "will not be found again" in caplog.text
    assert served.engine.stats().pages_used == 0


def test_those_behind_many_bad_ones_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs that would bring the next step."""
    sound = quire.sched.plan_builder.controls_of

    def failing(seq: Any) -> Any:
        return 1 / 0 if seq.id.startswith("bad") else sound(seq)

    monkeypatch.setattr(quire.sched.plan_builder, "controls_of", failing)
    served = Served(
        *(make_request(f"bad{n}") for n in range(5)),
        make_request("good"),
        *(make_request(f"bad{n}") for n in range(5, 9)),
    )
    assert len(served.run().errors()) == 9
    assert served.runner.resets == 0


def test_results_that_cannot_be_taken_in_end_their_request_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sound = Results._receive

    def failing(self: Results, seq: Any, *args: Any) -> None:
        return 1 / 0 if seq.id == "bad" else sound(self, seq, *args)

    monkeypatch.setattr(Results, "_receive", failing)
    served = Served(
        make_request("0", (1, 2, 3), 12), make_request("bad", logprobs=1), make_request("2")
    )
    assert list(served.run().errors()) == ["bad"]
    assert served.runner.resets == 0
    assert "request 'bad' could not be given its results and ends" in caplog.text


def test_what_is_nobodys_fault_makes_all_start_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sound, calls = Pressure.make_place, iter(range(10_000))
    failing_at = {4}

    def failing(self: Pressure) -> None:
        return 1 / 0 if next(calls) in failing_at else sound(self)  # type: ignore[return-value]

    monkeypatch.setattr(Pressure, "make_place", failing)
    served = Served(*several())
    assert served.run().errors() == {}
    assert served.runner.resets == served.engine.stats().failed_steps == 1
    # The second time it costs those who ran again; the others are still served.
    calls, failing_at = iter(range(10_000)), {4, 8}
    errors = (served := Served(*several())).run().errors()
    assert 0 < len(errors) <= 3 and all("failed for the second time" in e for e in errors.values())
    # Twice before anything could be planned: nothing can.
    calls, failing_at = iter(range(10_000)), {4, 5}
    errors = (served := Served(*several())).run().errors()
    assert not served.engine.healthy and set(errors) == {r.id for r in several()} - served_ids(
        served
    )


def served_ids(served: Served) -> set[str]:
    return {o.request_id for o in served.heard if o.ended and o.error is None}


def test_pages_that_a_fault_left_uncertain_are_all_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request that it came up for ends, and all others start over."""
    sound = KVCache.grow

    def leaking(self: KVCache, holding: Any, positions: int) -> Any:
        if served.is_bad(holding):
            self._pages.allocate(2)
            raise MemoryError
        return sound(self, holding, positions)

    monkeypatch.setattr(KVCache, "grow", leaking)
    served = Served(make_request("0", max_tokens=12), make_request("bad"), make_request("2"))
    assert list(served.run().errors()) == ["bad"]
    assert served.runner.resets == 1 and served.engine.stats().pages_used == 0


def test_a_move_that_a_fault_left_half_done_is_done_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue forgot the one that was to get a slot, and a choice that was to end did not."""
    enter, leave = Roster.enter, Roster._leave

    def failing_enter(self: Roster, seq: Any, hit: Any) -> None:
        if seq.id == "bad" and not seq.requeues:
            seq.requeues = 1
            self.waiting.enter(seq)
            raise KeyError
        enter(self, seq, hit)

    def failing_leave(self: Roster, seq: Any) -> None:
        leave(self, seq)
        if seq.id == "half" and not seq.choice:
            raise KeyError

    monkeypatch.setattr(Roster, "enter", failing_enter)
    monkeypatch.setattr(Roster, "_leave", failing_leave)
    served = Served(
        make_request("0", max_tokens=12), make_request("bad"), make_request("half", n=2)
    )
    errors = served.run().errors()
    assert served.engine.healthy and set(errors) <= {"bad", "half"} and "half" in errors


def test_a_fault_while_a_caller_leaves_costs_no_more_than_any_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound, calls = KVCache.release, iter(range(100))

    def failing(self: KVCache, holding: Any) -> None:
        if next(calls) == 0:
            raise KeyError("a bug")
        sound(self, holding)

    s = Served(*several())
    for _ in range(3):
        s.engine.step()
    monkeypatch.setattr(KVCache, "release", failing)
    s.engine.finish("0", FinishReason.ABORT)
    s.engine.step()
    assert s.engine.healthy
    assert set(s.run().errors()) <= {"0"}


def test_who_was_to_give_way_and_ended_half_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Served(make_request("0", (1, 2, 3), 12, tenant="a"), make_request("1", max_tokens=3))
    pressure = s.scheduler._planner.pressure
    sound = KVCache.release

    roster = s.scheduler._roster

    def failing(self: KVCache, holding: Any) -> None:
        monkeypatch.setattr(KVCache, "release", sound)
        pressure._asked = half  # as Pressure may have, where pages are short
        raise KeyError("a bug")

    s.engine.step()
    half = roster.get("1").sequences[0]  # type: ignore[union-attr]
    monkeypatch.setattr(KVCache, "release", failing)
    assert set(s.run().errors()) <= {"1"}
    assert s.engine.healthy


def test_a_deadline_that_a_fault_left_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Ranked.remove

    def failing(self: Ranked, item: Any) -> None:
        if self is s.scheduler._roster._deadlines:
            monkeypatch.setattr(Ranked, "remove", sound)
            raise KeyError("a bug")
        sound(self, item)

    s = Served(make_request("0", max_tokens=3, deadline=1e12), make_request("1", max_tokens=12))
    monkeypatch.setattr(Ranked, "remove", failing)
    s.run()
    assert not len(s.scheduler._roster._deadlines)


def test_a_fault_at_a_deadline_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quire.sched.scheduler, "DeadlineExceeded", lambda why: 1 / 0)
    s = Served(make_request("bad", max_tokens=12, deadline=1.0), make_request("1"))
    assert list(s.run().errors()) == ["bad"]
    assert s.engine.healthy and s.runner.resets == 0
