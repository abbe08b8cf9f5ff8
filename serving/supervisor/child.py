"""One run of a child process, seen from its parent. The other end is serving/lifeline.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from ...environment import child_environment

SILENCE = 30.0
"""Seconds without a sign of life after which a child counts as hung."""

STARTING_SILENCE = 300.0
"""The same until its start has succeeded: its first sign comes when its imports are done, and what
loads or compiles a model may hold up the thread that gives signs."""

LOOK_EVERY = 1.0
"""Seconds between looks at how long it has said nothing."""

_LIFELINE = f"{__package__.rpartition('.')[0]}.lifeline"


class Child:
    """A process; `start` it once.

    Args:
      module: what it runs; see serving/lifeline.py.
      settings: told to it over a pipe, where nobody else can read them.
      begun: the news by which its start has succeeded.
      changed: called when there is news.

    Attributes:
      news: the last that it told, by name.
      begun_at: when its start had succeeded, on the clock of time.monotonic.
      hung: it was killed because it said nothing for too long.
    """

    def __init__(
        self, module: str, settings: dict[str, Any], begun: str, changed: Callable[[], None]
    ):
        self._module, self._settings, self._begun, self._changed = module, settings, begun, changed
        self._process: asyncio.subprocess.Process | None = None
        self._silent = 0.0
        self.news: dict[str, Any] = {}
        self.begun_at: float | None = None
        self.hung = False

    async def start(self) -> None:
        ours, theirs = os.pipe()
        command = (sys.executable, "-P", "-m", _LIFELINE, self._module, str(os.getpid()))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                str(theirs),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(theirs,),
                env=child_environment(),
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._reading = asyncio.ensure_future(self._read(ours))
        self._write(self._settings)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def order(self, word: str) -> None:
        """Tells it what to do; nothing if it is gone."""
        if self.running:
            self._write(word)

    def tell(self, **facts: Any) -> None:
        """Tells it what has changed since its settings; nothing if it is gone."""
        if self.running:
            self._write(facts)

    def kill(self) -> None:
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                # Not by its own method, which looks first how the process is: of one that has just
                # ended that would take the status away, from the thread that waits for it.
                os.kill(self._process.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Waits until it has ended, killing it if it hangs; returns the status, -N for signal N."""
        assert self._process is not None
        waiting = asyncio.ensure_future(self._process.wait())
        while not (await asyncio.wait({waiting}, timeout=LOOK_EVERY))[0]:
            # Not by the clock: where a container is paused, all of us stand still, and it does not.
            self._silent += LOOK_EVERY
            allowed = STARTING_SILENCE if self.begun_at is None else SILENCE
            # Once: a second signal may take the status of one that has just died from who waits.
            if self._silent > allowed and not self.hung:
                self.hung = True
                self.kill()
        await asyncio.wait({self._reading})  # its last words, such as why it ended
        return waiting.result()

    def _write(self, what: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")

    async def _read(self, news: int) -> None:
        reader = asyncio.StreamReader(limit=2**20)
        pipe = os.fdopen(news, "rb", buffering=0)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while line := await reader.readline():
                self._silent = 0.0
                said = json.loads(line)
                if said:
                    self.news |= said
                    if self.begun_at is None and said.get(self._begun):
                        self.begun_at = time.monotonic()
                    self._changed()
        finally:
            transport.close()


def how(status: int) -> str:
    """In words, how a process ended."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"
