"""An engine process like that of `quire bench frontend`, soon to take who is silent for gone."""

from __future__ import annotations

from functools import partial

from quire.serving.engine_host import main
from quire.serving.engine_host.host import EngineHost
from quire.serving.engine_wire import Liveness
from quire.tools.bench import paced_engine


async def serve(news: int) -> int:
    main.EngineHost = partial(EngineHost, liveness=Liveness(silence=3.0))  # type: ignore
    return await paced_engine.serve(news)
