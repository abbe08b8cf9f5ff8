"""A child process's line to its parent: settings and orders in, news out, and death with it.

The parent (serving/supervisor/child.py) writes lines of JSON to the child's standard input: first
the settings, later orders (text) and what else the child should know (objects, as the settings).
That pipe's end is the parent's: the child then ends at once. News goes
the other way, through a pipe of which the parent said the number; silence there means that the
child hangs. Signals are the parent's as well: this module is what a child runs first,

    python -P -m quire.serving.lifeline MODULE PARENT NEWS

and only then it imports MODULE, of which `async serve(news) -> exit status` is the child's life.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import json
import logging
import os
import signal
import sys
from typing import Any

import uvloop

from .stderr import queue_stderr

BEAT = 1.0
"""Seconds between signs of life."""

_PR_SET_PDEATHSIG = 1


def _come_of_age(parent: int) -> None:
    """Leaves signals to the parent, and dies when that does.

    A terminal and some service managers send a signal to all processes of a service at once; the
    parent alone decides what it means.

    Args:
      parent: the process that it was started by.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere the pipe's end alone tells
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Lifeline:
    """Both pipes, on the child's event loop. Made by `open`.

    Args:
      orders: of the standard input.
      news: file descriptor that news goes to.
      told: the settings.

    Attributes:
      told: the last that the parent told, by name.
    """

    def __init__(self, orders: asyncio.StreamReader, news: int, told: dict[str, Any]):
        self._orders, self._news, self.told = orders, news, told
        os.set_blocking(news, False)
        os.set_inheritable(news, False)  # its end is ours
        self._ordered: asyncio.Queue[str] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def open(cls, news: int) -> tuple[Lifeline, dict[str, Any]]:
        """The line and the settings that came over it first."""
        loop = asyncio.get_running_loop()
        orders = asyncio.StreamReader(limit=2**24)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        settings = json.loads(await orders.readline())
        line = cls(orders, news, settings)
        line._tasks = [asyncio.ensure_future(line._listen()), asyncio.ensure_future(line._beat())]
        return line, settings

    async def order(self) -> str:
        """The parent's next order."""
        return await self._ordered.get()

    def say(self, **news: Any) -> None:
        """Tells the parent something."""
        # A parent that reads nothing is stuck itself; then it misses this.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._news, json.dumps(news).encode() + b"\n")

    async def _listen(self) -> None:
        while line := await self._orders.readline():
            said = json.loads(line)
            if isinstance(said, dict):
                self.told |= said
            else:
                self._ordered.put_nowait(said)
        os._exit(1)  # the parent is gone

    async def _beat(self) -> None:
        while True:
            self.say()
            await asyncio.sleep(BEAT)


def main(module: str, parent: str, news: str) -> int:
    """A child's life; returns its exit status."""
    _come_of_age(int(parent))
    # grpc turns asyncio's loop once for each message that was sent; uvloop's turns cost far less.
    return uvloop.run(importlib.import_module(module).serve(int(news)))


if __name__ == "__main__":
    queue_stderr()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main(*sys.argv[1:]))
