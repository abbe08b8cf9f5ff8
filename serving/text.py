"""One answer's text: tokens in, safe-to-show text out. Used by serving/answer.py.

The answer is the decoder's text up to the stop string that is complete first (of two complete at
the same character, the longer). Text is held back only while it may turn out to be the beginning of
a stop string; a stop string itself is never emitted, nor anything after it.
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

    Attributes:
      stopped_by: the stop string that ended the answer; push no more once it is set.
    """

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = (), min_tokens: int = 0):
        self._decoder = decoder
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        # A stop string that is complete in new text begins at most this many characters before it.
        self._reach = max((len(s) for s in self._stop), default=1) - 1
        self._count = 0
        self._recent = ""  # the last `_reach` characters, which begin no complete stop string
        self._held = 0  # how many of them have not been emitted
        self.stopped_by: str | None = None

    def push(self, token: int, *, silent: bool = False) -> str:
        """Text that may be shown now. The stop id that ends an answer is `silent`: it has none."""
        self._count += 1
        return "" if silent else self._add(self._decoder.step(token))

    def push_all(self, tokens: Sequence[int]) -> str:
        """Text of several tokens, for who has no stop strings."""
        self._count += len(tokens)
        return self._decoder.push(tokens)

    def finish(self) -> str:
        """The rest, when the answer ends without a stop string."""
        text = self._add(self._decoder.flush())
        if self.stopped_by is None:
            text += self._recent[len(self._recent) - self._held :]
            self._held = 0
        return text

    def _add(self, piece: str) -> str:
        if not self._stop or not piece:
            return piece
        window = self._recent + piece
        shown = len(self._recent) - self._held
        if self._count >= self._min_tokens:
            found = self._first_stop(window, len(self._recent))
            if found is not None:
                begin, self.stopped_by = found
                self._held = 0
                return window[shown:begin]
        self._held = self._undecided(window)
        self._recent = window[max(len(window) - self._reach, 0) :]
        return window[shown : len(window) - self._held]

    def _first_stop(self, window: str, old: int) -> tuple[int, str] | None:
        """Where the stop string begins that is the first to end beyond `old` characters."""
        found = []
        for stop in self._stop:
            begin = window.find(stop, max(old - len(stop) + 1, 0))
            if begin >= 0:
                found.append((begin + len(stop), begin, stop))
        return min(found)[1:] if found else None

    def _undecided(self, window: str) -> int:
        """Length of the longest end of `window` that a longer stop string begins with."""
        longest = 0
        for stop in self._stop:
            begin = window.find(stop[0], max(len(window) - len(stop) + 1, 0))
            while begin >= 0 and len(window) - begin > longest:
                if stop.startswith(window[begin:]):
                    longest = len(window) - begin
                    break
                begin = window.find(stop[0], begin + 1)
        return longest
