"""`quire serve MODEL`: the gRPC service in one process, until SIGTERM or SIGINT.

Tells scripts on stderr, a line each: "listening on HOST:PORT" before the model loads (health is
NOT_SERVING) and "ready on HOST:PORT" when it serves. The first signal lets running requests end, a
second one ends them; both are an orderly end with exit status 0. A failed engine is status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig, ServerConfig
from ..errors import Internal
from .collector import quiet_collector
from .flags import add_model, add_settings, settings_from

if TYPE_CHECKING:
    from ..serving.assemble import Assembled, Deliver
    from ..serving.progress import Reporter, Terminal
    from ..serving.server import Server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_settings(parser, ServerConfig)
    add_settings(parser, EngineConfig, skip=("model",))
    parser.epilog = (
        "Says on stderr `listening on HOST:PORT` once the port is bound and `ready on HOST:PORT` "
        "once it serves; the gRPC health service says the same. SIGTERM lets running requests end."
    )


def run(args: argparse.Namespace) -> None:
    engine = EngineConfig(**settings_from(args, EngineConfig))
    server = ServerConfig(**settings_from(args, ServerConfig))
    asyncio.run(_serve(engine, server))


async def _serve(config: EngineConfig, settings: ServerConfig) -> None:
    from ..serving.progress import Terminal
    from ..serving.server import Server

    reporter, signals = Terminal(), _Signals()
    server = Server(settings.host, settings.port)
    try:
        await server.bind()
        reporter.note(f"listening on {server.address}")
        await _live(config, settings, server, reporter, signals)
    finally:
        await server.stop()
    reporter.note("stopped")


async def _live(
    config: EngineConfig,
    settings: ServerConfig,
    server: Server,
    reporter: Terminal,
    signals: _Signals,
) -> None:
    """From bound to drained."""
    opening = asyncio.ensure_future(
        server.open(lambda deliver: _assembled(config, deliver, reporter))
    )
    if not await _before(signals.first, opening):
        reporter.note("stopped before the engine was ready")
        reporter.close()
        os._exit(0)  # XLA cannot be interrupted in the middle of a compilation
    await opening  # raises what went wrong
    reporter.note(f"ready on {server.address}")

    failing = asyncio.ensure_future(server.engine_failed())
    if await _before(signals.first, failing):
        raise Internal("the engine failed; see the log above")
    reporter.note(f"stopping: running requests have {settings.drain_timeout} s to end")
    draining = asyncio.ensure_future(server.drain())
    await _before(signals.second, draining, timeout=settings.drain_timeout)


def _assembled(config: EngineConfig, deliver: Deliver, reporter: Reporter) -> Assembled:
    from ..serving.assemble import assemble

    parts = assemble(config, deliver, reporter)
    quiet_collector()
    return parts


class _Signals:
    """SIGTERM and SIGINT as events."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def _before(
    event: asyncio.Event, work: asyncio.Future[Any], timeout: float | None = None
) -> bool:
    """Waits for either; whether the work was done before the event or the timeout came."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED, timeout=timeout)
    waiting.cancel()
    return work.done()
