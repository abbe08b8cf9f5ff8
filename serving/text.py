"""One answer's text: tokens in, safe-to-show text out. Used by serving/answer.py.

Text is held back only as long as it may turn out to be the beginning of a stop string; a stop
string itself is never emitted, nor anything after it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoints.detokenize import StreamDecoder


class TextAssembler:
    """Turns tokens into text and finds stop strings.

    Args:
      decoder: of this answer alone.
      stop: strings that end the answer.
      min_tokens: a stop string completed before this many tokens does not end the answer.
    """

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = (), min_tokens: int = 0):
        self._decoder = decoder
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._longest = max((len(s) for s in self._stop), default=0)
        self._count = 0
        self._tail = ""  # recent text already searched, in which a stop string may have begun
        self._held = ""  # the end of _tail that has not been emitted
        self.stopped_by: str | None = None

    def push(self, token: int, *, silent: bool = False) -> str:
        """Text that may be shown now. `silent` tokens (the stop id that ends an answer) have none.

        After it, `stopped_by` is the stop string this token completed, if any; then push no more.
        """
        self._count += 1
        return "" if silent else self._add(self._decoder.step(token))

    def finish(self) -> str:
        """The rest, when the answer ends without a stop string."""
        text = self._add(self._decoder.flush())
        if self.stopped_by is not None:
            return text
        held, self._held = self._held, ""
        return text + held

    def _add(self, piece: str) -> str:
        if not self._stop or not piece:
            return piece
        # A match must end in the new piece, so it can begin at most `_longest - 1` before it.
        recent = self._tail[-(self._longest - 1) :] if self._longest > 1 else ""
        window = recent + piece
        pending = self._held + piece
        if self._count >= self._min_tokens:
            found = self._first_stop(window, len(recent))
            if found is not None:
                at, self.stopped_by = found
                keep = len(pending) - (len(window) - at)
                return pending[: max(keep, 0)]
        hold = self._holdback(window)
        self._tail = window
        self._held = pending[len(pending) - hold :] if hold else ""
        return pending[: len(pending) - hold]

    def _first_stop(self, window: str, old: int) -> tuple[int, str] | None:
        """Where the earliest stop string that ends beyond `old` begins."""
        found = []
        for stop in self._stop:
            at = window.find(stop, max(old - len(stop) + 1, 0))
            if at >= 0:
                found.append((at, stop))
        return min(found, default=None)

    def _holdback(self, window: str) -> int:
        """Length of the longest end of `window` that a stop string begins with."""
        for size in range(min(self._longest - 1, len(window)), 0, -1):
            end = window[-size:]
            if any(stop.startswith(end) for stop in self._stop if len(stop) > size):
                return size
        return 0
