"""Threads for what would hold up the event loop, such as tokenizing a long prompt.

Owned by the service of a frontend process. Texts take far more memory while they are tokenized than
they have, and every thread more delays the event loop: so there are few, and what waits for them is
bounded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ...errors import Overloaded

Result = TypeVar("Result")

LARGE = 16_384
"""Bytes of a message from which on dealing with it takes a millisecond or more."""

MAX_WAITING = 64 << 20
"""Bytes of all messages that wait or are dealt with; one alone may be of any size."""

THREADS = 4


class Workers:
    """Does work in order, a few at a time.

    Args:
      most: bytes of what may wait.
    """

    def __init__(self, most: int = MAX_WAITING) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="quire-work")
        self._most = most
        self._lock = threading.Lock()  # guards what follows
        self._taken = 0

    async def run(self, work: Callable[[], Result], size: int) -> Result:
        """What `work` gives or raises.

        Args:
          work: needs no event loop. What is small is done at once.
          size: bytes of what it is about.

        Raises:
          Overloaded: too much waits.
        """
        if size < LARGE:
            return work()
        with self._lock:
            if self._taken and self._taken + size > self._most:
                raise Overloaded(
                    f"queue: {self._taken} bytes of requests wait to be read, {size} more must be "
                    f"at most {self._most} with them; retry in 1 s"
                )
            self._taken += size
        future = self._pool.submit(work)
        # Not when the caller leaves: a thread cannot be stopped.
        future.add_done_callback(lambda _: self._give_back(size))
        return await asyncio.wrap_future(future)

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._taken -= size

    def close(self) -> None:
        """Ends the threads, once they have done what they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)
