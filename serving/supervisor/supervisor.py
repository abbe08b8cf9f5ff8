"""Starts a server's processes, keeps them running, and ends them in order. Used by `quire serve`.

    supervisor ──pipes──> engine process, which owns the devices
               ──pipes──> frontend processes, which own the public port together

What dies is started again, after a wait that doubles with each failure. What cannot start at all
ends the server: at the first start at once, later after `MOST_FAILURES` in a row.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...config import EngineConfig, ServerConfig
from ...errors import Internal, QuireError
from .child import Child, how
from .port import hold

FIRST_WAIT = 0.1
"""Seconds until what died is started again; twice as long with each failure in a row."""

LONGEST_WAIT = 30.0

SETTLED = 60.0
"""Seconds that a process must have been ready for its next death to be a first one again."""

MOST_FAILURES = 8
"""Starts in a row that fail, after which the server gives up."""

LAST_WORDS = 8.0
"""Seconds that a process gets to end when told to."""

_SOCKET_PATH = 100
"""Characters that a socket's path may have, and a few to spare."""

_SERVING = __package__.rpartition(".")[0]


class Supervisor:
    """One server, from start to end: `run` once.

    Args:
      engine: settings of the engine process.
      server: settings of the rest.
      say: gets lines for people and scripts: "listening on HOST:PORT" once all frontends are,
        "metrics on URL" where they are asked for, "ready on HOST:PORT" once they serve, and what
        happens later.
      engine_module: what the engine process runs; see serving/lifeline.py.

    Attributes:
      engine, frontends: who plays which part.
      engine_address: where the engine process listens.
    """

    def __init__(
        self,
        engine: EngineConfig,
        server: ServerConfig,
        say: Callable[[str], None],
        *,
        engine_module: str = f"{_SERVING}.engine_host.main",
    ):
        self._engine_config, self._config, self._say = engine, server, say
        self._engine_module = engine_module
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self.engine_address = ""
        self.engine: Role | None = None
        self.frontends: list[Role] = []

    async def run(self, first: asyncio.Event, second: asyncio.Event) -> None:
        """Serves until told to end.

        Args:
          first: ends the server when running requests have ended, or the time for that is over.
          second: ends it at once.

        Raises:
          QuireError: the port is taken, or a process cannot be started.
        """
        with hold(self._config.host, self._config.port) as port, _private_folder() as folder:
            self.engine_address = f"unix:{folder / 'engine'}"
            shared = {
                "engine": asdict(self._engine_config),
                "server": asdict(self._config),
                "engine_address": self.engine_address,
                "port": port,
            }
            self.engine = self._role("the engine", self._engine_module, shared, "ready")
            module = f"{_SERVING}.frontend.main"
            self.frontends = [
                self._role(f"frontend {number}", module, shared, "listening")
                for number in range(1, self._config.frontends + 1)
            ]
            roles = [self.engine, *self.frontends]
            keeping = [asyncio.ensure_future(role.keep()) for role in roles]
            announcing = asyncio.ensure_future(self._announce())
            asked = asyncio.ensure_future(first.wait())
            try:
                done, _ = await asyncio.wait(
                    {asked, announcing, *keeping}, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()  # raises what went wrong
                await self._end(keeping, second)
            finally:
                self._stopping.set()
                for role in roles:
                    role.kill()
                await asyncio.wait(keeping, timeout=LAST_WORDS)
                for task in (asked, announcing, *keeping):
                    task.cancel()

    def _role(self, name: str, module: str, settings: dict[str, Any], begun: str) -> Role:
        return Role(
            name,
            lambda: Child(module, settings, self._changed.set),
            begun,
            self._say,
            self._stopping,
        )

    # ---- while it runs

    async def _announce(self) -> None:
        await self._until(lambda: all(f.news("listening") for f in self.frontends))
        address = self.frontends[0].news("listening")
        self._say(f"listening on {address}")
        again, metrics = "", None
        while True:
            if self._config.metrics_port is not None:
                metrics = await self._say_metrics(metrics)
            await self._until(lambda: self._ready)
            self._say(f"ready {again}on {address}")
            await self._until(lambda: not self._ready)
            again = "again "

    async def _say_metrics(self, before: str | None) -> str:
        """Where they are, once the engine process tells and if it is not where they were."""
        engine = self.engine
        assert engine is not None
        await self._until(lambda: bool(engine.news("metrics")))
        address: str = engine.news("metrics")
        if address != before:
            self._say(f"metrics on http://{address}/metrics")
        return address

    @property
    def _ready(self) -> bool:
        assert self.engine is not None
        return all(role.news("ready") for role in (self.engine, *self.frontends))

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    # ---- the end

    async def _end(self, keeping: Sequence[asyncio.Future[None]], second: asyncio.Event) -> None:
        assert self.engine is not None
        self._stopping.set()
        if not self.engine.began:
            self._say("stopped before the engine was ready")
            return
        self._say(f"stopping: running requests have {self._config.drain_timeout} s to end")
        engine, *frontends = keeping
        aborted = asyncio.ensure_future(second.wait())
        for role in self.frontends:
            role.order("drain")
        draining = asyncio.ensure_future(asyncio.wait(frontends))
        await asyncio.wait(
            {draining, aborted},
            timeout=self._config.drain_timeout,
            return_when=asyncio.FIRST_COMPLETED,
        )
        aborted.cancel()
        for role in self.frontends:
            role.order("stop")
        await asyncio.wait({draining}, timeout=LAST_WORDS)
        self.engine.order("stop")
        await asyncio.wait({engine}, timeout=LAST_WORDS)


class Role:
    """A process that there should be, and the one that plays it now.

    Args:
      name: for people.
      make: a Child for one run.
      begun: the news by which a start has succeeded.
      say: gets lines for people.
      stopping: nothing is started again once it is set.

    Attributes:
      began: a run of it has succeeded to start.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Child],
        begun: str,
        say: Callable[[str], None],
        stopping: asyncio.Event,
    ):
        self._name, self._make, self._begun, self._say = name, make, begun, say
        self._stopping = stopping
        self._child: Child | None = None
        self._ever = False

    @property
    def began(self) -> bool:
        return self._ever or bool(self.news(self._begun))

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def news(self, name: str) -> Any:
        """The last that its process told; None of one that is gone."""
        child = self._child
        return child.news.get(name) if child is not None and child.running else None

    def order(self, word: str) -> None:
        if self._child is not None:
            self._child.order(word)

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    async def keep(self) -> None:
        """Runs it until the server stops.

        Raises:
          QuireError: it cannot be started.
        """
        failures = 0  # in a row
        wait = FIRST_WAIT
        while True:
            child = self._child = self._make()
            await child.start()
            if self._stopping.is_set():  # since before there was something to kill
                child.kill()
            begin = time.monotonic()
            status = await child.ended()
            if self._stopping.is_set():
                return
            if child.news.get(self._begun):
                self._ever, failures = True, 0
            else:
                failures += 1
            if not self._ever or failures >= MOST_FAILURES:
                raise self._reason(child, status)
            if time.monotonic() - begin > SETTLED:
                wait = FIRST_WAIT
            why = child.news.get("error") or ("hung" if child.hung else how(status))
            self._say(f"{self._name}: {why}; started again in {wait:g} s")
            try:
                await asyncio.wait_for(self._stopping.wait(), wait)
                return
            except TimeoutError:
                wait = min(2 * wait, LONGEST_WAIT)

    def _reason(self, child: Child, status: int) -> QuireError:
        if error := child.news.get("error"):
            return QuireError(error)
        return Internal(f"{self._name} {how(status)} while it started; see the log above")


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder that only this user can look into, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="quire-") as folder:
        if len(folder) <= _SOCKET_PATH:
            yield Path(folder)
            return
    with tempfile.TemporaryDirectory(prefix="quire-", dir="/tmp") as folder:
        yield Path(folder)
