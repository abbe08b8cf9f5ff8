"""The ladder: the short list of shapes that step programs are compiled for. Pure, no JAX.

Every step is padded up to a rung. A rung is (tokens, rows, sampler): decode rungs have one token a
row; mixed rungs have room for prompt chunks. Fewer rungs mean a faster start, more mean less
padding; `padding_bound` says what the choice costs at worst.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from ..errors import InvalidConfig

MAX_PROGRAMS = 31
"""Rungs at most: together with the `admit` program, an engine has at most 32."""

_FEW_ROWS = 8


class Sampler(IntEnum):
    """What the end of a step program can do; each includes the ones before it."""

    GREEDY = 0
    """Arg-max only."""
    SAMPLE = 1
    """Temperature, top-k, top-p, min-p, min-tokens, per row."""
    FULL = 2
    """SAMPLE, and penalties, bias, bad words, allowed ids, and log-probabilities of the chosen and
    the MAX_LOGPROBS likeliest tokens."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The shape of one step program: padded token count, padded row count, sampler, and how many
    tokens each row of a decode rung emits in one dispatch."""

    tokens: int
    rows: int
    sampler: Sampler
    k: int = 1

    @property
    def decode_only(self) -> bool:
        return self.tokens == self.rows


def _doublings(first: int, last: int) -> list[int]:
    """first, 2·first, … up to and including last."""
    steps = []
    size = first
    while size < last:
        steps.append(size)
        size *= 2
    return [*steps, last]


def _thin(sizes: list[int], keep: int) -> list[int]:
    """At most `keep` of `sizes`, evenly spread, the largest always among them."""
    if keep >= len(sizes):
        return sizes
    picks = {round(i * (len(sizes) - 1) / max(keep - 1, 1)) for i in range(keep)}
    return [sizes[i] for i in sorted({*picks, len(sizes) - 1})][-keep:]


class Ladder:
    """All rungs, and the choice of one for a step."""

    def __init__(self, buckets: Iterable[Bucket]):
        self.buckets: tuple[Bucket, ...] = tuple(sorted(set(buckets)))
        if not self.buckets:
            raise InvalidConfig("ladder: empty; at least one bucket is needed")
        self._decode: dict[Sampler, list[Bucket]] = {}
        self._mixed: dict[Sampler, list[Bucket]] = {}
        for sampler in Sampler:
            rungs = [b for b in self.buckets if b.sampler == sampler]
            self._decode[sampler] = sorted(
                (b for b in rungs if b.decode_only), key=lambda b: b.rows
            )
            self._mixed[sampler] = sorted(
                (b for b in rungs if not b.decode_only), key=lambda b: (b.tokens, b.rows)
            )
        self.max_rows = max(b.rows for b in self.buckets)
        self.max_tokens = max(b.tokens for b in self.buckets)
        if not self._fit(max(Sampler), self.max_tokens, self.max_rows, decode_only=False):
            raise InvalidConfig(
                f"ladder: no rung of the richest sampler holds both {self.max_tokens} tokens and "
                f"{self.max_rows} rows, which a step may have"
            )

    def __len__(self) -> int:
        return len(self.buckets)

    def choose(self, tokens: int, rows: int, sampler: Sampler, *, decode_only: bool) -> Bucket:
        """The cheapest rung that holds a step. O(log rungs) for decode steps.

        Args:
          tokens: tokens in the step.
          rows: rows in the step; equals `tokens` when `decode_only`.
          sampler: what the step's rows need at least.
          decode_only: no prompt chunk in the step.

        Raises:
          ValueError: no rung is large enough; the scheduler must never ask for that.
        """
        best: Bucket | None = None
        for kind in Sampler:
            if kind < sampler:
                continue
            found = self._fit(kind, tokens, rows, decode_only)
            # A richer sampler is worth its cost only where the poorer one has no rung this small.
            if found is not None and (best is None or found.tokens * 2 <= best.tokens):
                best = found
        if best is None:
            raise ValueError(f"no step program holds {tokens} tokens in {rows} rows ({sampler!r})")
        return best

    def _fit(self, sampler: Sampler, tokens: int, rows: int, decode_only: bool) -> Bucket | None:
        if decode_only:
            rungs = self._decode[sampler]
            i = bisect_left(rungs, rows, key=lambda b: b.rows)
            if i < len(rungs):
                return rungs[i]
        for rung in self._mixed[sampler]:
            if rung.tokens >= tokens and rung.rows >= rows:
                return rung
        return None

    def padding_bound(self, sampler: Sampler = Sampler.GREEDY) -> float:
        """Worst share of a decode step's rows that is padding, over all row counts from 1."""
        rungs = [b.rows for b in self._decode[sampler]]
        return max(1 - (below + 1) / size for below, size in zip([0, *rungs], rungs, strict=False))


def make_ladder(max_rows: int, max_tokens: int, *, max_programs: int = MAX_PROGRAMS) -> Ladder:
    """The default ladder.

    Decode rungs double from 8 rows to `max_rows` (and one of a single row); mixed rungs double from
    64 tokens to `max_tokens`, with few rows for the prompt that arrives on an idle engine and with
    all rows for the busy one. Where that makes too many programs they are thinned out, evenly.
    Log-probabilities, asked for rarely, get a coarse set.

    Args:
      max_rows: most rows a step may have (the number of slots).
      max_tokens: most tokens a step may have; must exceed `max_rows`.
      max_programs: bound on the number of rungs; at least 6 (a decode and a mixed rung for each
        sampler).
    """
    if max_tokens <= max_rows:
        raise InvalidConfig(
            f"max_batched_tokens: got {max_tokens}, must be above max_num_seqs ({max_rows}), so "
            "that a step with every slot decoding still has room for a prompt chunk"
        )
    decode = sorted({1, *_doublings(min(8, max_rows), max_rows)})
    few = max_rows if max_rows < 4 * _FEW_ROWS else _FEW_ROWS
    sizes = [t for t in _doublings(64, max_tokens) if t > few]
    all_rows = [t for t in sizes if t > max_rows]
    alone = [t for t in sizes if few < max_rows]

    spare = max_programs >= 24  # enough for more than one size of each kind
    logprobs = [(n, n) for n in _thin(decode, 3 if spare else 1)]
    logprobs += [(t, max_rows) for t in _thin(all_rows, 2 if spare else 1)]
    # What is left is for two full sets, greedy and sampled.
    room = (max_programs - len(logprobs)) // 2
    while len(decode) + len(all_rows) + len(alone) > room:
        # Large prompts fill the rungs with all rows well enough; then whatever has most goes.
        if len(alone) > 2:
            alone = alone[:-1]
        elif len(decode) >= len(all_rows) and len(decode) > 1:
            decode = _thin(decode, len(decode) - 1)
        elif len(all_rows) > 1:
            all_rows = _thin(all_rows, len(all_rows) - 1)
        elif alone:
            alone = alone[:-1]
        else:
            raise InvalidConfig(f"max_programs: got {max_programs}, must be at least 6")
    full = [(n, n) for n in decode]
    full += [(t, max_rows) for t in all_rows] + [(t, few) for t in alone]
    buckets = [Bucket(t, r, s) for s in (Sampler.GREEDY, Sampler.SAMPLE) for t, r in full]
    return Ladder(buckets + [Bucket(t, r, Sampler.FULL) for t, r in logprobs])
