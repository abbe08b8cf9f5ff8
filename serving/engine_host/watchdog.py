"""Ends a process whose device step does not come back: nothing in it can mend a hung device.

Started by main.py of the engine process; the parent starts another.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from ...model.plan import StepPlan
from ...sched.engine import Engine
from ..stderr import drain_stderr

log = logging.getLogger(__name__)

STALLED = 86
"""The exit status."""

_LOOKS = 20
"""In a step's time allowed."""


def watch(engine: Engine, seconds: float) -> None:
    """Ends the process once a call of the engine's runner has taken so many seconds.

    A thread of its own: the event loop may be what waits.
    """

    def look() -> None:
        while True:
            time.sleep(min(seconds / _LOOKS, 1.0))
            call = engine.runner_call
            if call is not None and time.monotonic() - call[0] > seconds:
                log.critical(
                    "a device step has not come back in %g s: %s; the engine process ends",
                    seconds,
                    _shape(call[1]),
                )
                drain_stderr()
                os._exit(STALLED)

    threading.Thread(target=look, name="quire-watchdog", daemon=True).start()


def _shape(plan: StepPlan) -> str:
    return (
        f"{plan.num_tokens} tokens in {plan.num_rows} rows, {plan.num_decode} of them decoding, "
        f"run by {plan.bucket}"
    )
