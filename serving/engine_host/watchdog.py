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
    """Ends the process once a call of the engine's runner has taken so many seconds, be it for a
    step or after one that failed.

    A thread of its own: the event loop may be what waits.
    """

    def look() -> None:
        while True:
            time.sleep(min(seconds / _LOOKS, 1.0))
            call = engine.runner_call
            if call is not None and time.monotonic() - call[0] > seconds:
                log.critical(
                    "%s has not come back in %g s%s; the engine process ends",
                    "a device step" if call[1] else "making the device's state anew",
                    seconds,
                    f": {_shape(call[1])}" if call[1] else "",
                )
                drain_stderr()
                os._exit(STALLED)

    threading.Thread(target=look, name="quire-watchdog", daemon=True).start()


def _shape(plan: StepPlan) -> str:
    return (
        f"{plan.num_tokens} tokens in {plan.num_rows} rows, {plan.num_decode} of them decoding, "
        f"run by {plan.bucket}"
    )
