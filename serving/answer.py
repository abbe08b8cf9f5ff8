"""One answer in the making: engine outputs in, chunks out, the whole answer at the end.

Both faces use it through choices.py, one Answer for each choice of a request. It owns the text of
one choice and says when a stop string ended it, which the engine cannot know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..checkpoints.detokenize import StreamDecoder
from ..sched.request import FinishReason, RequestOutput, SamplingParams, Timing, TokenLogprobs
from .text import TextAssembler


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability (natural log) of one token; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


PositionLogprobs = dict[int, Logprob]
"""Token id to its Logprob, for one position: the alternatives asked for, likeliest first, and then
the chosen token where it is not among them."""


@dataclass(slots=True)
class Chunk:
    """What became known of an answer since the last chunk. Nobody changes one after it was made.

    Not frozen: one is made per message, and freezing would triple its cost.

    Attributes:
      text: text delta.
      token_ids: new tokens.
      logprobs: one entry a new token where asked for, else None.
      finish_reason: "stop" or "length" on the last chunk, else None.
      stop_reason: on the last chunk, the stop string or stop token id that ended the answer; None
        for the model's own end of sequence.
      cached_tokens: prompt tokens whose KV was found in the prefix index.
      index: which of the request's answers it belongs to.
      sum_logprob: of the new tokens, where log-probabilities or best_of were asked for.
      prompt_logprobs: on the first chunk of answer 0 where asked for: one entry a prompt token,
        None for the first of them.
      timing: of the request, on its last chunk where a service gives it.
    """

    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    index: int = 0
    sum_logprob: float | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    timing: Timing | None = None


@dataclass(slots=True)
class Completion:
    """A whole answer; fields as in Chunk, summed up. `index` tells a request's answers apart.

    `cumulative_logprob` is known where log-probabilities or best_of were asked for.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, chunk: Chunk) -> None:
        """Appends a chunk."""
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        if chunk.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += chunk.logprobs
        if chunk.sum_logprob is not None:
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + chunk.sum_logprob
        if chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason
            self.stop_reason = chunk.stop_reason


class Answer:
    """Follows one choice of a request.

    Args:
      sampling: of the request.
      decoder: incremental detokenizer; None where the checkpoint has no tokenizer.
      token_text: the text of a single token, for log-probabilities.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        decoder: StreamDecoder | None,
        token_text: Callable[[int], str],
    ):
        self._sampling = sampling
        self._token_text = token_text
        self._text = (
            None if decoder is None else TextAssembler(decoder, sampling.stop, sampling.min_tokens)
        )
        self.finished = False

    @property
    def ended_by_text(self) -> bool:
        """A stop string ended the answer."""
        return self._text is not None and self._text.stopped_by is not None

    def push(self, output: RequestOutput) -> Chunk | None:
        """The chunk an engine output without an error makes; None when the answer had ended."""
        if self.finished:
            return None
        text, used = self._decode(output)
        tokens = output.tokens[:used]
        reason, stop_reason = self._end(output)
        self.finished = reason is not None
        known, scores = output.logprobs, output.prompt_logprobs
        return Chunk(
            text=text,
            token_ids=list(tokens),
            logprobs=self._logprobs(known, used),
            finish_reason=reason,
            stop_reason=stop_reason,
            cached_tokens=output.cached_tokens,
            index=output.choice,
            sum_logprob=None if known is None else sum(entry.logprob for entry in known[:used]),
            prompt_logprobs=None
            if scores is None
            else [None if entry is None else self._position(entry) for entry in scores],
        )

    def _decode(self, output: RequestOutput) -> tuple[str, int]:
        """The text, and how many of the output's tokens belong to the answer."""
        if self._text is None:
            return "", len(output.tokens)
        if output.finish_reason is None and not self._sampling.stop:
            return self._text.push_all(output.tokens), len(output.tokens)
        text = ""
        last = len(output.tokens) - 1
        for i, token in enumerate(output.tokens):
            # The stop id that ends an answer is one of its tokens but not of its text.
            text += self._text.push(token, silent=output.stop_token is not None and i == last)
            if self._text.stopped_by is not None:
                return text, i + 1
        if output.finish_reason is not None:
            text += self._text.finish()
        return text, len(output.tokens)

    def _end(self, output: RequestOutput) -> tuple[str | None, str | int | None]:
        if self._text is not None and self._text.stopped_by is not None:
            return FinishReason.STOP.value, self._text.stopped_by
        if output.finish_reason is None:
            return None, None
        asked_for = output.stop_token in self._sampling.stop_token_ids
        return output.finish_reason.value, output.stop_token if asked_for else None

    def _logprobs(
        self, entries: tuple[TokenLogprobs, ...] | None, used: int
    ) -> list[PositionLogprobs] | None:
        if entries is None or self._sampling.logprobs is None:  # best_of alone needs only sums
            return None
        return [self._position(entry) for entry in entries[:used]]

    def _position(self, entry: TokenLogprobs) -> PositionLogprobs:
        at = {
            token: Logprob(value, place, self._token_text(token))
            for place, (token, value) in enumerate(entry.top, start=1)
        }
        # Its true rank: where tokens tie, a place in the list is one of several fair ones.
        at[entry.token] = Logprob(entry.logprob, entry.rank, self._token_text(entry.token))
        return at
