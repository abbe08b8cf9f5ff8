"""A server's stderr, which holds up nobody: neither when its reader is slow, nor when it is gone.

Each process of a server calls `queue_stderr` once: quire serve for itself, serving/lifeline.py for
children. All that Python writes there (logs, progress, warnings, tracebacks) then goes by way of a
queue and a thread. What the queue has no room for is dropped, and counted in the log as soon as
somebody reads again.

Not logging's own QueueHandler: at a process's end that waits for the thread which waits for the
reader, and what is not logged does not pass it.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import select
import sys
import threading
from collections import deque

ROOM = 2**20
"""Bytes that may wait to be read; one line alone may have more."""

LAST_WORDS = 1.0
"""Seconds that a process which ends waits for its reader."""

log = logging.getLogger(__name__)


class QueuedStream(io.TextIOBase):
    """Text for a file descriptor, written by a thread of its own.

    Args:
      fd: what is written to.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, fd: int):
        self._fd = fd
        self._begun = ""  # of a line
        self._waiting: deque[bytes] = deque()
        self._size = 0  # of those, and of what is being written
        self._dropped = 0  # lines, since that was last told
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="quire-stderr", daemon=True).start()

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._changed:
            lines, newline, rest = text.rpartition("\n")
            if newline:
                self._put(self._begun + lines + newline)
                self._begun = rest
            else:
                self._begun += rest
        return len(text)

    def flush(self) -> None:
        """Lets a line that is begun go, too; waits for nobody."""
        with self._changed:
            if self._begun:
                self._put(self._begun)
                self._begun = ""

    def drain(self, seconds: float) -> bool:
        """Waits until all is written, at most so long; returns whether it is."""
        self.flush()
        with self._changed:
            return self._changed.wait_for(lambda: not self._size, seconds)

    def _put(self, text: str) -> None:
        data = text.encode(self.encoding, self.errors)
        if self._size and self._size + len(data) > ROOM:
            self._dropped += text.count("\n") or 1
            return
        self._waiting.append(data)
        self._size += len(data)
        self._changed.notify_all()

    # ---- the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                data = self._waiting.popleft()
            written = self._written(data)
            dropped = 0
            with self._changed:
                self._size -= len(data)
                if not written:
                    self._dropped += data.count(b"\n") or 1
                elif not self._waiting:
                    dropped, self._dropped = self._dropped, 0
                self._changed.notify_all()
            if dropped:
                log.warning("nobody read this log for a while: %d lines were dropped", dropped)

    def _written(self, data: bytes) -> bool:
        """Writes it all, however long that takes; whether there was anybody, or any disk left."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:  # whoever shares it with us has set it so
                select.select((), (self._fd,), ())
            except OSError:
                return False
        return True


def queue_stderr() -> None:
    """Puts a queue before this process's sys.stderr, if it has one."""
    before = sys.stderr
    try:
        fd = before.fileno()
    except (AttributeError, OSError, ValueError):  # the shell closed it, or a test captures it
        return
    before.flush()
    queued = sys.stderr = QueuedStream(fd)

    def end() -> None:
        if queued.drain(LAST_WORDS) and sys.stderr is queued:
            sys.stderr = before  # the thread ends with the interpreter

    atexit.register(end)


def drain_stderr(seconds: float = LAST_WORDS) -> None:
    """For a process that is about to end without Python's ado: lets what was said be read."""
    if isinstance(sys.stderr, QueuedStream):
        sys.stderr.drain(seconds)
