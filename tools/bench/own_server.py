"""A whole server of our own, processes and all, while a benchmark runs. Used by frontend.py and
fairness.py; soak.py starts `quire serve` itself, as an operator would."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...config import EngineConfig, ServerConfig

if TYPE_CHECKING:
    from ...serving.supervisor.supervisor import Supervisor

PACED = f"{__package__}.paced_engine"
"""The engine process without a device."""


@asynccontextmanager
async def own_server(
    engine: EngineConfig, server: ServerConfig, engine_module: str | None = None
) -> AsyncIterator[tuple[str, Supervisor]]:
    """Yields its address, HOST:PORT, once it is ready, and who runs it; ends it afterwards.

    Args:
      engine_module: what the engine process runs; None is the real one.

    Raises:
      QuireError: it cannot start.
    """
    from ...serving.supervisor.supervisor import Supervisor

    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()

    def hear(line: str) -> None:
        if line.startswith("ready on ") and not ready.done():
            ready.set_result(line.removeprefix("ready on "))

    module = {} if engine_module is None else {"engine_module": engine_module}
    supervisor = Supervisor(engine, server, hear, **module)
    running = asyncio.ensure_future(supervisor.run(stop, stop))
    try:
        await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        yield ready.result(), supervisor
    finally:
        stop.set()
        await running


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that processes have taken, in seconds."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
