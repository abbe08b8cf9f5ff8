"""An engine process like that of `quire bench frontend`, whose device is gone after 20 steps."""

from __future__ import annotations

from typing import Any

from quire.tools.bench import paced_engine


class FailingRunner(paced_engine.PacedRunner):
    steps = 0

    def launch(self, plan: Any) -> Any:
        self.steps += 1
        if self.steps > 20:
            raise RuntimeError("the device is gone")
        return super().launch(plan)

    def reset(self) -> None:
        raise RuntimeError("the device is gone")


async def serve(news: int) -> int:
    paced_engine.PacedRunner = FailingRunner  # type: ignore[misc]
    return await paced_engine.serve(news)
