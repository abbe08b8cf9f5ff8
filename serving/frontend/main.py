"""A frontend process, from its first line to its last. Started by serving/supervisor.

Tells its parent `listening` (the address) once the port is bound, `ready` when it serves, and
`error` where it cannot start. Orders: "drain" takes no more calls and ends with the last one;
"stop" ends at once. When the engine goes it waits for the next one, and says UNAVAILABLE meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ...checkpoints.folder import Checkpoint
from ...config import ServerConfig
from ...errors import QuireError, Unavailable
from ...protos.v1 import engine_pb2 as pb
from ..auth.follow import follow_keys
from ..auth.interceptor import KeyInterceptor
from ..collector import FRONTEND, quiet_collector
from ..intake import Intake
from ..lifeline import Lifeline
from ..telemetry.logs import set_up_logs
from .remote_link import GONE, RemoteLink
from .server import Server

ATTACH_EVERY = 0.1
"""Seconds between tries to reach the engine process."""


async def serve(news: int) -> int:
    """Runs until it is told to end; returns the exit status."""
    line, given = await Lifeline.open(news)
    settings = ServerConfig(**given["server"])
    set_up_logs(settings.log_format, settings.log_level)
    checks = KeyInterceptor() if settings.api_keys is not None else None
    server = Server(
        settings, port=given["port"], shared=True, interceptors=[checks] if checks else []
    )
    try:
        if checks is not None:
            checks.refused = server.account
            _followed = follow_keys(str(settings.api_keys), checks.use)
        await server.bind()
        line.say(listening=server.address)
        serving = asyncio.ensure_future(_serve_engines(server, given, line))
        ordered = asyncio.ensure_future(line.order())
        done, _ = await asyncio.wait({serving, ordered}, return_when=asyncio.FIRST_COMPLETED)
        if serving in done:
            serving.result()  # raises why
        serving.cancel()  # the link itself tells who waits when the engine goes
        await asyncio.wait({serving})
        if ordered.result() == "drain":
            again = asyncio.ensure_future(line.order())
            draining = asyncio.ensure_future(server.drain())
            await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    except QuireError as error:
        line.say(error=str(error))
        return 1
    finally:
        await server.stop()
    return 0


async def _serve_engines(server: Server, given: Mapping[str, Any], line: Lifeline) -> None:
    """Serves one engine after the other."""
    intakes = _Intakes()
    while True:
        try:
            link = await RemoteLink.attach(given["engine_address"], given["name"])
        except Unavailable:
            await asyncio.sleep(ATTACH_EVERY)
            continue
        try:
            intake = await asyncio.to_thread(intakes.of, link)
            if link.healthy:
                quiet_collector(FRONTEND)  # before there are calls, which it would keep
                await server.serve(link, intake)
                line.say(ready=True)
                await link.lost()
                line.say(ready=False)
        finally:
            if not link.healthy:
                await server.pause(GONE)
                await link.close(GONE)


class _Intakes:
    """The last intake made, because a tokenizer takes a second to read."""

    def __init__(self) -> None:
        self._made: tuple[pb.Welcome, Intake] | None = None

    def of(self, link: RemoteLink) -> Intake:
        """Of the engine that a link leads to, or of one before it that was like it."""
        welcome = pb.Welcome()
        welcome.CopyFrom(link.welcome)
        welcome.ClearField("pid")  # of each engine another
        if self._made is None or self._made[0] != welcome:
            checkpoint = Checkpoint.open(
                link.folder, ignore_fields=link.ignore_config_fields, weights=False
            )
            self._made = welcome, Intake(checkpoint, link.spec, link.served)
        return self._made[1]
