"""`quire serve MODEL`: the gRPC service in one process, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal

from ..config import EngineConfig, ServerConfig
from .flags import add_settings, settings_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, or `demo`")
    add_settings(parser, ServerConfig)
    add_settings(parser, EngineConfig, skip=("model",))


def run(args: argparse.Namespace) -> None:
    engine = EngineConfig(**settings_from(args, EngineConfig))
    server = ServerConfig(**settings_from(args, ServerConfig))
    asyncio.run(_serve(engine, server))


async def _serve(config: EngineConfig, server_config: ServerConfig) -> None:
    from ..serving.assemble import assemble
    from ..serving.grpc_server import Server
    from ..serving.progress import Terminal

    reporter = Terminal()
    server = Server(server_config.host, server_config.port)
    port = await server.bind()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for wanted in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(wanted, stopping.set)

    opening = asyncio.ensure_future(
        server.open(lambda deliver: assemble(config, deliver, reporter))
    )
    stop = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({opening, stop}, return_when=asyncio.FIRST_COMPLETED)
    if not opening.done():
        reporter.note("stopped before the engine was ready")
        os._exit(0)  # XLA cannot be interrupted in the middle of a compilation
    parts = await opening
    reporter.note(f"serving on {server_config.host}:{port}")
    await stop
    reporter.note(f"stopping: running requests have {server_config.drain_timeout} s to end")
    await server.drain(server_config.drain_timeout)
    await loop.run_in_executor(None, lambda: parts.engine.stop(drain=False))
    reporter.note("stopped")
