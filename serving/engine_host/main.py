"""The engine process, from its first line to its last. Started by serving/supervisor.

Tells its parent `ready` once frontends are served, and `error` where it cannot start. Its one order
is "stop". It ends by itself, with a status other than 0, when the engine has failed or a device
step hangs: the parent then starts another.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from ...config import EngineConfig, ServerConfig
from ...errors import QuireError
from ...model.plan import RunnerSpec
from ...protos.v1 import engine_pb2_grpc as pb_grpc
from ...sched.engine import Engine
from ...sched.request import RequestOutput
from ..auth.follow import follow_keys
from ..engine_wire import OPTIONS
from ..intake import Served
from ..lifeline import Lifeline
from .host import EngineHost
from .watchdog import watch

LOOK_EVERY = 0.2
"""Seconds between looks at whether the engine is alive."""

LAST_WORDS = 0.5
"""Seconds for frontends to hear of the end."""


@dataclass(frozen=True, slots=True)
class Built:
    """A started engine, and what frontends have to know of it."""

    engine: Engine
    spec: RunnerSpec
    folder: str
    served: Served


Build = Callable[[EngineConfig, Callable[[list[RequestOutput]], None]], Built]
"""(settings, where outputs go) -> engine. Called on a thread of its own."""


async def serve(news: int, build: Build | None = None) -> int:
    """Runs until it is told to end, or the engine fails; returns the exit status."""
    line, given = await Lifeline.open(news)
    config, settings = EngineConfig(**given["engine"]), ServerConfig(**given["server"])
    host = EngineHost(asyncio.get_running_loop())
    server = grpc.aio.server(options=OPTIONS)
    pb_grpc.add_EngineServiceServicer_to_server(  # type: ignore[no-untyped-call]
        host, server
    )
    server.add_insecure_port(given["engine_address"])
    await server.start()
    try:
        ordered = asyncio.ensure_future(line.order())
        building = asyncio.ensure_future(
            asyncio.to_thread(build or _assembled, config, host.deliver)
        )
        await asyncio.wait([ordered, building], return_when=asyncio.FIRST_COMPLETED)
        if not building.done():
            os._exit(0)  # XLA cannot be interrupted in the middle of a compilation
        built = building.result()
        host.open(built.engine, built.spec, built.folder, config.ignore_config_fields, built.served)
        watch(built.engine, settings.step_timeout)
        if settings.api_keys is not None:
            limit = built.engine.limit_tenants
            _followed = follow_keys(settings.api_keys, lambda table: limit(table.tenants))
        line.say(ready=True)
        failed = asyncio.ensure_future(_failed(built.engine))
        await asyncio.wait([ordered, failed], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.to_thread(built.engine.stop, drain=False)
        return int(failed.done())
    except QuireError as error:
        line.say(error=str(error))
        return 1
    finally:
        await server.stop(LAST_WORDS)


async def _failed(engine: Engine) -> None:
    """Returns when the engine has closed by itself."""
    while engine.healthy:
        await asyncio.sleep(LOOK_EVERY)


def _assembled(config: EngineConfig, deliver: Callable[[list[RequestOutput]], None]) -> Built:
    from ..assemble import assemble
    from ..collector import quiet_collector
    from ..progress import Terminal

    parts = assemble(config, deliver, Terminal())
    quiet_collector()
    folder = str(parts.checkpoint.folder)
    return Built(parts.engine, parts.sizes.spec, folder, parts.intake.served)
