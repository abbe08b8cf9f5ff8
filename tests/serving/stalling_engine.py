"""An engine process like that of `quire bench frontend`, whose 20th step never comes back."""

from __future__ import annotations

import threading
from typing import Any

from quire.tools.bench import paced_engine


class StallingRunner(paced_engine.PacedRunner):
    steps = 0

    def collect(self, handle: Any) -> Any:
        self.steps += 1
        if self.steps == 20:
            threading.Event().wait()
        return super().collect(handle)


async def serve(news: int) -> int:
    paced_engine.PacedRunner = StallingRunner  # type: ignore[misc]
    return await paced_engine.serve(news)
