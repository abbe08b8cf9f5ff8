"""An engine process like that of `quire bench frontend`, soon to take who is silent for gone."""

from __future__ import annotations

from quire.serving.engine_host import host
from quire.tools.bench import paced_engine


async def serve(news: int) -> int:
    host.SILENCE = 3.0
    return await paced_engine.serve(news)
