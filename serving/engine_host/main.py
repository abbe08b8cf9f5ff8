"""The engine process, from its first line to its last. Started by serving/supervisor.

Tells its parent `metrics` (the address) where those are served, `ready` once frontends are, and
`error` where it cannot start. Its one order
is "stop". It ends by itself, with a status other than 0, when the engine has failed or a device
step hangs: the parent then starts another.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ...config import EngineConfig, ServerConfig
from ...errors import QuireError
from ...model.plan import RunnerSpec
from ...protos.v1 import engine_pb2 as pb
from ...sched.engine import Engine
from ...sched.request import RequestOutput
from ..auth.follow import follow_keys
from ..auth.key_file import KeyTable
from ..engine_stream import listen
from ..intake import Served
from ..lifeline import Lifeline
from ..telemetry.logs import set_up_logs
from ..telemetry.source import Source
from ..telemetry.telemetry import open_telemetry
from ..watched_file import LOOK_EVERY as FILE_LOOK_EVERY
from .host import EngineHost
from .watchdog import watch

LOOK_EVERY = 0.2
"""Seconds between looks at whether the engine is alive."""

LAST_WORDS = 0.5
"""Seconds for frontends to hear of the end."""

SWITCH_INTERVAL = 2e-5
"""Seconds for which one thread may keep another from running Python. By default it is 5 ms, longer
than a step: what a step gave would be sent when the next one has been planned and launched, and the
engine's thread would wait for whoever reads metrics. The system's timers add 50 µs to it: with this
the event loop hears of a step 0.17 ms after it, while the engine's thread goes on with the next,
with 0.1 ms after 0.25; the engine's own work takes as long either way. (From 10 µs on, on a machine
without a core to spare, threads were seen to do little but switch.)"""


@dataclass(frozen=True, slots=True)
class Built:
    """A started engine, and what frontends have to know of it.

    Attributes:
      spec: its limits.
      folder: of the model.
      compiles: programs compiled since ready.
      text_of: gives the text of token ids, where there is a tokenizer.
    """

    engine: Engine
    spec: RunnerSpec
    folder: str
    served: Served
    compiles: Callable[[], int] = lambda: 0
    text_of: Callable[[Sequence[int]], str] | None = None


Build = Callable[[EngineConfig, Callable[[list[RequestOutput]], None]], Built]
"""(settings, where outputs go) -> engine. Called on a thread of its own."""


async def serve(news: int, build: Build | None = None) -> int:
    """Runs until it is told to end, or the engine fails; returns the exit status."""
    line, given = await Lifeline.open(news)
    config, settings = EngineConfig(**given["engine"]), ServerConfig(**given["server"])
    set_up_logs(settings.log_format, settings.log_level)
    try:
        # Before the model is read, which may take minutes.
        tenants = None if settings.api_keys is None else _Tenants(settings.api_keys)
        telemetry = open_telemetry(settings, config.model)
    except QuireError as error:
        line.say(error=str(error))
        return 1
    if telemetry.address is not None:
        line.say(metrics=telemetry.address)
    host = EngineHost(asyncio.get_running_loop(), telemetry.refused)

    def deliver(outputs: list[RequestOutput]) -> None:
        host.deliver(outputs)
        telemetry.on_outputs(outputs)

    build = build or partial(_assembled, as_log=settings.log_format == "json")
    listener = await listen(given["engine_address"], pb.ToEngine, host.attach)
    try:
        ordered = asyncio.ensure_future(line.order())
        building = asyncio.ensure_future(asyncio.to_thread(build, config, deliver))
        await asyncio.wait([ordered, building], return_when=asyncio.FIRST_COMPLETED)
        if not building.done():
            os._exit(0)  # XLA cannot be interrupted in the middle of a compilation
        built = building.result()
        sys.setswitchinterval(SWITCH_INTERVAL)
        if tenants is not None:
            tenants.limit(built.engine)
        host.open(built.engine, built.spec, built.folder, config.ignore_config_fields, built.served)
        watch(built.engine, settings.step_timeout)
        telemetry.watch(_source(config.model, built, host, line), built.text_of)
        line.say(ready=True)
        failed = asyncio.ensure_future(_failed(built.engine))
        await asyncio.wait([ordered, failed], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.to_thread(built.engine.stop, drain=False)
        return int(failed.done())
    except QuireError as error:
        line.say(error=str(error))
        return 1
    finally:
        await host.close(LAST_WORDS)
        await listener.stop(LAST_WORDS)
        await asyncio.to_thread(telemetry.close)


class _Tenants:
    """What the file of API keys says of tenants from the start on, looked at so often (seconds),
    for the engine once there is one. Raises InvalidConfig for a file that cannot be read."""

    def __init__(self, path: str, look_every: float = FILE_LOOK_EVERY) -> None:
        self._table = KeyTable()
        self._engine: Engine | None = None
        self._followed = follow_keys(path, self._use, look_every)

    def limit(self, engine: Engine) -> None:
        """Holds tenants to their limits, from now on."""
        self._engine = engine
        self._use(self._table)

    def _use(self, table: KeyTable) -> None:
        self._table = table
        if self._engine is not None:
            self._engine.limit_tenants(table.tenants)


async def _failed(engine: Engine) -> None:
    """Returns when the engine has closed by itself."""
    while engine.healthy:
        await asyncio.sleep(LOOK_EVERY)


def _source(model: str, built: Built, host: EngineHost, line: Lifeline) -> Source:
    engine = built.engine
    return Source(
        model=model,
        spec=built.spec,
        healthy=lambda: engine.healthy,
        stats=engine.stats,
        step_times=lambda: engine.step_times,
        compiles=built.compiles,
        frontends=lambda: host.attached,
        restarts=lambda: line.told["restarts"],
    )


def _assembled(
    config: EngineConfig, deliver: Callable[[list[RequestOutput]], None], *, as_log: bool = False
) -> Built:
    """The engine that serves; its start is told as it goes, in a terminal or in the log."""
    from ..assemble import assemble
    from ..collector import quiet_collector
    from ..progress import LogReporter, Terminal

    parts = assemble(config, deliver, LogReporter() if as_log else Terminal())
    quiet_collector()
    runner = parts.runner
    return Built(
        parts.engine,
        parts.sizes.spec,
        str(parts.checkpoint.folder),
        parts.intake.served,
        lambda: runner.compiles_after_ready,
        parts.intake.text_of if parts.checkpoint.has_tokenizer else None,
    )
