"""Starts a server's processes, keeps them running, and ends them in order. Used by `quire serve`.

    supervisor ──pipes──> engine process, which owns the devices
               ──pipes──> frontend processes, which own the public port together

What dies or hangs is started again, after a wait that doubles with each failure, up to
`LONGEST_WAIT`. What cannot start at all ends the server, at its first start alone: later the cause,
such as a file that is broken for a while, may go as it came.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ...config import EngineConfig, ServerConfig
from ...errors import Internal, QuireError
from ..telemetry.logs import fields
from .child import Child, how
from .first_look import check_files
from .folder import private_folder
from .port import hold

log = logging.getLogger(__name__)

FIRST_WAIT = 0.1
"""Seconds until what died is started again; twice as long with each failure in a row."""

LONGEST_WAIT = 30.0

SETTLED = 60.0
"""Seconds since its start had succeeded after which a process's death is a first one again."""

LAST_WORDS = 8.0
"""Seconds that a process gets to end when told to."""

_SERVING = __package__.rpartition(".")[0]


class Supervisor:
    """One server, from start to end: `run` once.

    Args:
      engine: settings of the engine process.
      server: settings of the rest.
      say: gets lines for people and scripts: "listening on HOST:PORT" once all frontends are,
        "metrics on URL" where they are asked for, "ready on HOST:PORT" once they serve, "ready
        again on HOST:PORT" when they do once more, and that the server stops. Faults are logged.
      engine_module: what the engine process runs; see serving/lifeline.py.

    Attributes:
      engine, frontends: who plays which part.
      restarts: how often a process of each kind was started again.
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
        self.restarts = {"engine": 0, "frontend": 0}

    async def run(self, first: asyncio.Event, second: asyncio.Event) -> None:
        """Serves until told to end.

        Args:
          first: ends the server when running requests have ended, or the time for that is over.
          second: ends it at once.

        Raises:
          QuireError: a file is wrong, the port is taken, or a process cannot be started.
        """
        check_files(self._config)
        with hold(self._config.host, self._config.port) as port, private_folder() as folder:
            self.engine_address = f"unix:{folder / 'engine'}"
            shared = {
                "engine": asdict(self._engine_config),
                "server": asdict(self._config),
                "engine_address": self.engine_address,
                "port": port,
            }
            self.engine = self._role("engine", "the engine", self._engine_module, shared, "ready")
            module = f"{_SERVING}.frontend.main"
            self.frontends = [
                self._role("frontend", f"frontend {number}", module, shared, "listening")
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

    def _role(
        self, kind: str, name: str, module: str, settings: dict[str, Any], begun: str
    ) -> Role:
        def make() -> Child:
            told = {**settings, "name": name, "restarts": self.restarts}
            return Child(module, told, begun, self._changed.set)

        def lost() -> None:
            self.restarts[kind] += 1
            if self.engine is not None:
                self.engine.tell(restarts=self.restarts)  # whose metrics say so

        return Role(name, make, lost, self._stopping)

    # ---- while it runs

    async def _announce(self) -> None:
        await self._until(lambda: all(f.news("listening") for f in self.frontends))
        address = self.frontends[0].news("listening")
        self._say(f"listening on {address}")
        again, metrics = "", None
        has_metrics = self._config.metrics_port is not None
        while True:
            if has_metrics:  # while the engine starts, which takes its time
                metrics = await self._say_metrics(metrics)
            await self._until(lambda: self._ready)
            if has_metrics:  # what was found above may have been the last words of one that died
                metrics = await self._say_metrics(metrics)
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
      lost: called when a run has ended that was not to end, and another will follow.
      stopping: nothing is started again once it is set.

    Attributes:
      began: a run of it has succeeded to start.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Child],
        lost: Callable[[], None],
        stopping: asyncio.Event,
    ):
        self._name, self._make, self._lost, self._stopping = name, make, lost, stopping
        self._child: Child | None = None
        self._ever = False

    @property
    def began(self) -> bool:
        child = self._child
        return self._ever or (child is not None and child.begun_at is not None)

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

    def tell(self, **facts: Any) -> None:
        if self._child is not None:
            self._child.tell(**facts)

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    async def keep(self) -> None:
        """Runs it until the server stops.

        Raises:
          QuireError: its first start failed.
        """
        wait = FIRST_WAIT
        while True:
            child = self._child = self._make()
            ended = await self._run(child)
            if self._stopping.is_set():
                return
            error = child.news.get("error")
            self._ever |= child.begun_at is not None
            if not self._ever:
                raise (
                    QuireError(error)
                    if error
                    else Internal(f"{self._name} {ended} while it started; see the log above")
                )
            if child.begun_at is not None and time.monotonic() - child.begun_at > SETTLED:
                wait = FIRST_WAIT
            said = fields(process=self._name, pid=child.pid)
            why = error or ended
            log.error("%s: %s; started again in %g s", self._name, why, wait, extra=said)
            self._lost()
            try:
                await asyncio.wait_for(self._stopping.wait(), wait)
                return
            except TimeoutError:
                wait = min(2 * wait, LONGEST_WAIT)

    async def _run(self, child: Child) -> str:
        """A child from its start to its end; how it ended."""
        try:
            await child.start()
        except OSError as error:  # as where the system has no memory or no file to spare
            return f"cannot be started: {error}"
        if self._stopping.is_set():  # since before there was something to kill
            child.kill()
        status = await child.ended()
        return "hung and was killed" if child.hung else how(status)
