"""`quire serve MODEL`: the gRPC service, until SIGTERM or SIGINT.

This process is the parent of those that do the work (serving/supervisor). It tells scripts on
stderr, a line each and whatever the log's level: "listening on HOST:PORT" before the model loads
(health is NOT_SERVING) and "ready on HOST:PORT" when it serves. The first signal lets running
requests end, a second one ends them; both are an orderly end with exit status 0. What cannot be
started is status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys

from ..config import EngineConfig, ServerConfig
from ..errors import QuireError
from .flags import add_model, add_settings, settings_from

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_settings(parser, ServerConfig)
    add_settings(parser, EngineConfig, skip=("model",))
    parser.epilog = (
        "Says on stderr `listening on HOST:PORT` once the port is bound and `ready on HOST:PORT` "
        "once it serves (and between them `metrics on URL`, where they are asked for); the gRPC "
        "health service says the same. SIGTERM lets running requests end."
    )


def run(args: argparse.Namespace) -> None:
    engine = EngineConfig(**settings_from(args, EngineConfig))
    server = ServerConfig(**settings_from(args, ServerConfig))
    from ..serving.stderr import queue_stderr
    from ..serving.telemetry.logs import set_up_logs

    set_up_logs(server.log_format, server.log_level)
    queue_stderr()
    try:
        if server.shows_keys:
            log.warning(
                "API keys come to %s in plain text, which anybody on the way can read; set "
                "tls_cert and tls_key, unless something in front of this server talks TLS",
                server.host,
            )
        asyncio.run(_serve(engine, server))
    except QuireError as error:
        if server.log_format == "text":
            raise
        log.critical("%s", error)  # who reads JSON reads nothing else
        sys.exit(1)


async def _serve(engine: EngineConfig, server: ServerConfig) -> None:
    from ..serving.progress import Terminal
    from ..serving.supervisor.supervisor import Supervisor
    from ..serving.telemetry.logs import announce

    say = announce if server.log_format == "json" else Terminal().note
    signals = _Signals()
    await Supervisor(engine, server, say).run(signals.first, signals.second)
    say("stopped")


class _Signals:
    """SIGTERM and SIGINT as events."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        (self.second if self.first.is_set() else self.first).set()
