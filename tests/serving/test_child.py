"""What the parent makes of one process: whether it hangs, whether it is started again, and when."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quire.errors import Internal, QuireError
from quire.serving.supervisor import child, supervisor
from quire.serving.supervisor.child import Child
from quire.serving.supervisor.supervisor import Role


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find what lies beside this file."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))


READY: dict[str, Any] = {"ready": True}


@pytest.mark.parametrize(
    ("says", "short"),
    [
        ([], "STARTING_SILENCE"),  # hangs while it starts
        ([{"metrics": "x"}], "STARTING_SILENCE"),
        ([READY], "SILENCE"),
        ([READY, {"ready": False}], "SILENCE"),  # as a frontend without an engine
    ],
)
def test_who_hangs_is_killed_in_whatever_state(
    says: list[dict[str, Any]], short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "LOOK_EVERY", 0.01)
    for name in ("SILENCE", "STARTING_SILENCE"):
        monkeypatch.setattr(child, name, 0.5 if name == short else 1e9)

    async def story() -> None:
        one = Child("mute_child", {"says": says}, "ready", lambda: None)
        await one.start()
        assert await asyncio.wait_for(one.ended(), 60) == -9
        assert one.hung and (one.begun_at is not None) == (READY in says)

    asyncio.run(story())


def test_who_hangs_is_killed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes to die: a second signal could take its status from who waits for it."""
    monkeypatch.setattr(child, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(child, "STARTING_SILENCE", 0.01)

    async def story() -> None:
        one = Child("mute_child", {"says": []}, "ready", lambda: None)
        await one.start()
        kill, kills = one.kill, list[asyncio.TimerHandle]()

        def kill_late() -> None:
            kills.append(asyncio.get_running_loop().call_later(0.2, kill))

        monkeypatch.setattr(one, "kill", kill_late)
        assert await one.ended() == -9 and len(kills) == 1

    asyncio.run(story())


def test_a_start_may_be_silent_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(child, "SILENCE", 0.02)

    async def story() -> None:
        one = Child("mute_child", {"says": []}, "ready", lambda: None)
        await one.start()
        ending = asyncio.ensure_future(one.ended())
        for _ in range(20):  # looks, and more
            await asyncio.sleep(0.02)
        assert one.running and not one.hung
        one.kill()
        assert await ending == -9 and not one.hung

    asyncio.run(story())


def test_a_pause_of_the_whole_server_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its container is paused: the clock goes on, and nobody gives signs or looks.

    The clocks of this loop and of the module alone: other servers live in this process, too.
    """

    def later() -> float:
        return time.monotonic() + 3600

    async def story() -> None:
        one = Child("mute_child", {"says": [READY]}, "ready", lambda: None)
        await one.start()
        ending = asyncio.ensure_future(one.ended())
        while one.begun_at is None:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(child, "time", SimpleNamespace(monotonic=later))
        monkeypatch.setattr(asyncio.get_running_loop(), "time", later)
        await asyncio.sleep(0)
        await asyncio.wait({ending}, timeout=0.1)
        assert one.running and not one.hung
        one.kill()
        await ending

    monkeypatch.setattr(child, "LOOK_EVERY", 0.01)
    asyncio.run(story())


class Fated:
    """A child whose every run is told before."""

    pid, hung = 7, False

    def __init__(self, began: float | None, fate: str):
        self.begun_at, self._fate = began, fate
        self.news = {"error": "keys.yaml: nonsense"} if fate == "error" else {}

    async def start(self) -> None:
        if self._fate == "no memory":
            raise OSError(12, "Cannot allocate memory")

    async def ended(self) -> int:
        self.hung = self._fate == "hangs"
        return 1

    def kill(self) -> None:
        pass


LONG_AGO, JUST_NOW, NEVER = -1e9, 1e18, None


def play(*fates: tuple[float | None, str]) -> int:
    """A role with these children; the last ends the server. How many times one was lost."""

    async def story() -> None:
        stopping = asyncio.Event()

        def children() -> Iterator[Any]:
            for began, fate in fates:
                yield Fated(began, fate)
            stopping.set()
            yield Fated(JUST_NOW, "dies")

        made = children()
        await Role("the engine", lambda: next(made), lambda: lost.append(1), stopping).keep()

    lost: list[int] = []
    asyncio.run(story())
    return len(lost)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(supervisor, "LONGEST_WAIT", 0.004)


def said_by_parents(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == supervisor.__name__]


def test_who_began_once_is_started_again_for_ever(
    waits: None, caplog: pytest.LogCaptureFixture
) -> None:
    failing = ["error", "dies", "hangs", "no memory"] * 5
    fates = [(JUST_NOW, "dies"), *((NEVER, fate) for fate in failing), (JUST_NOW, "dies")]
    assert play(*fates) == len(fates)
    records = said_by_parents(caplog)
    assert {record.levelno for record in records} == {logging.ERROR}
    said = [record.getMessage() for record in records]
    assert said[:5] == [
        "the engine: ended with status 1; started again in 0.001 s",
        "the engine: keys.yaml: nonsense; started again in 0.002 s",
        "the engine: ended with status 1; started again in 0.004 s",
        "the engine: hung and was killed; started again in 0.004 s",
        "the engine: cannot be started: [Errno 12] Cannot allocate memory; "
        "started again in 0.004 s",
    ]
    assert len(said) == 22 and all(line.endswith(" in 0.004 s") for line in said[2:])


def test_a_long_life_makes_the_next_death_a_first_one(
    waits: None, caplog: pytest.LogCaptureFixture
) -> None:
    play((JUST_NOW, "dies"), (JUST_NOW, "dies"), (LONG_AGO, "dies"), (NEVER, "dies"))
    waited = [record.getMessage().split()[-2] for record in said_by_parents(caplog)]
    assert waited == ["0.001", "0.002", "0.001", "0.002"]


@pytest.mark.parametrize(
    ("fate", "kind", "says"),
    [
        ("error", QuireError, "keys.yaml: nonsense"),
        ("dies", Internal, "the engine ended with status 1 while it started"),
        ("hangs", Internal, "the engine hung and was killed while it started"),
        ("no memory", Internal, "the engine cannot be started: .*Cannot allocate memory"),
    ],
)
def test_a_first_start_that_fails_ends_the_server(
    fate: str, kind: type[QuireError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        play((NEVER, fate))


@pytest.mark.parametrize(
    ("name", "default"), [("GRPC_VERBOSITY", "NONE"), ("MALLOC_ARENA_MAX", str(os.cpu_count()))]
)
@pytest.mark.parametrize("users", [None, "7"])
def test_libraries_of_a_child_are_set_unless_the_user_did(
    name: str, default: str, users: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    if users is not None:
        monkeypatch.setenv(name, users)

    async def story() -> None:
        said = asyncio.Event()
        one = Child("mute_child", {"says": [READY]}, "ready", said.set)
        await one.start()
        while "environment" not in one.news:
            await asyncio.wait_for(said.wait(), 60)
            said.clear()
        assert one.news["environment"][name] == (users or default)
        one.kill()
        await one.ended()

    asyncio.run(story())
