"""The ladder: the short list of shapes that step programs are compiled for. Pure, no JAX.

Every step is padded up to a rung. A rung is (tokens, rows, sampler, k): decode rungs have one token
a row, and run k times in one dispatch; mixed rungs have room for prompt chunks, some of them for
few rows, so that a prompt that comes alone pays for no others. Fewer rungs mean a faster start,
more mean less padding; `padding_bound` says what the choice costs at worst.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from ..errors import InvalidConfig

MAX_PROGRAMS = 50
"""Programs of an engine at most."""

_K_ROWS = (1, 8, 64)
"""Sizes of k-rungs. With more rows a single token takes the device longer than the host, and k of
them would hold up an arrival."""

_HALVES_FROM = 128
"""Rows from which on a decode step takes the longer, the more it has: those of Qwen2.5-1.5B on an
H200, beside what they read of the cache, 1.9 ms with 64 and 128 rows, 2.5 with 256, 3.1 with 384.
The prompt rung of 192 tokens took as long as the decode rung of 256."""

_FEW_FROM, _FEW_ROWS = 1024, 64
"""Tokens of a prompt step from which on there is a rung of few rows as well, and how many. Each row
costs logits and a look of the attention: of the time of 1,024 tokens on an H200, those of 896 rows
that were not there took 6 %. Logits of 64 rows take as long as those of one."""

_REST = 32, 8
"""Tokens and rows of the smallest such rung: of a prompt that was computed before, less than a page
is left to compute, and the products of 64 tokens take a tenth longer than those of 16."""

_FLOOR = 64
"""Tokens that a step costs besides its own: reading the weights."""

_SINGLE_PROGRAMS = 4  # score, controls, admit, state


class Sampler(IntEnum):
    """What the end of a step program can do; each includes the ones before it."""

    GREEDY = 0
    """Arg-max only."""
    SAMPLE = 1
    """Temperature, top-k, top-p, min-p, min-tokens, per row."""
    FULL = 2
    """SAMPLE, and penalties, bias, bad words, allowed ids, and log-probabilities of the chosen and
    the MAX_LOGPROBS likeliest tokens, also of prompt tokens."""


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

    @property
    def apart(self) -> bool:
        """Forward and sampling are two programs. All samplers share the forward; and before FULL
        sampling the host can add what depends on the last token."""
        return self.sampler != Sampler.GREEDY and self.k == 1


def _doublings(first: int, last: int, halves_from: int | None = None) -> list[int]:
    """first, 2·first, … up to and including last; from `halves_from` on also halfway between."""
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        between = size + size // 2
        if halves_from is not None and halves_from <= size and between < last:
            sizes.append(between)
        size *= 2
    return [*sizes, last]


def _thin(sizes: list[int], keep: int) -> list[int]:
    """At most `keep` of `sizes`, evenly spread, the largest always among them."""
    if keep >= len(sizes):
        return sizes
    picks = {round(i * (len(sizes) - 1) / max(keep - 1, 1)) for i in range(keep)}
    return [sizes[i] for i in sorted({*picks, len(sizes) - 1})][-keep:]


def _give_up(lists: list[list[int]]) -> None:
    """Removes the size whose steps suffer least from taking the next, as a share of what they cost.
    The ends of a list go last, the largest never."""
    losses = [
        (at == 0, (_FLOOR + sizes[at + 1]) / (_FLOOR + sizes[max(at - 1, 0)]), which, at)
        for which, sizes in enumerate(lists)
        for at in range(len(sizes) - 1)
    ]
    _, _, which, at = min(losses)
    del lists[which][at]


class Ladder:
    """All rungs, and the choice of one for a step."""

    def __init__(self, buckets: Iterable[Bucket]):
        self.buckets: tuple[Bucket, ...] = tuple(sorted(set(buckets)))
        if not self.buckets:
            raise InvalidConfig("ladder: empty; at least one bucket is needed")
        self._decode: dict[tuple[Sampler, int], list[Bucket]] = {}
        self._mixed: dict[Sampler, list[Bucket]] = {s: [] for s in Sampler}
        for b in sorted(self.buckets, key=lambda b: (b.tokens, b.rows)):
            if b.k > 1 and (b.sampler == Sampler.FULL or not b.decode_only):
                raise InvalidConfig(f"ladder: {b}: only GREEDY and SAMPLE decode rungs have k > 1")
            if b.decode_only:
                self._decode.setdefault((b.sampler, b.k), []).append(b)
            else:
                self._mixed[b.sampler].append(b)
        self._sampled_rows = sorted({b.rows for b in self.buckets if b.apart and b.decode_only})
        self._chunks = {s: sorted({b.tokens for b in self._mixed[s]}) for s in Sampler}
        self.max_rows = max(b.rows for b in self.buckets)
        self.max_tokens = max(b.tokens for b in self.buckets)
        self.max_k = max(b.k for b in self.buckets)
        if not self._fit(max(Sampler), self.max_tokens, self.max_rows, decode_only=False):
            raise InvalidConfig(
                f"ladder: no rung of the richest sampler holds both {self.max_tokens} tokens and "
                f"{self.max_rows} rows, which a step may have"
            )

    def __len__(self) -> int:
        return len(self.buckets)

    @property
    def forwards(self) -> tuple[Bucket, ...]:
        """The rungs that are two programs, each (tokens, rows) once: one forward each."""
        found = {(b.tokens, b.rows): b for b in self.buckets if b.apart}
        return tuple(found[shape] for shape in sorted(found))

    @property
    def samples(self) -> tuple[tuple[int, Sampler], ...]:
        """Rows and sampler of each program that samples what a forward left."""
        return tuple(sorted({(self.logit_rows(b), b.sampler) for b in self.buckets if b.apart}))

    def logit_rows(self, bucket: Bucket) -> int:
        """Rows of logits that a rung's forward leaves: where it is a program of its own as many as
        the next decode rung has, so that programs that sample are few."""
        at = bisect_left(self._sampled_rows, bucket.rows)
        if not bucket.apart or at == len(self._sampled_rows):
            return bucket.rows
        return self._sampled_rows[at]

    @property
    def num_programs(self) -> int:
        """Programs that an engine with this ladder compiles: whole steps, forwards, those that
        sample, and `score`, `controls`, `admit` and `state`; as many as `Programs.keys` names."""
        whole = sum(not b.apart for b in self.buckets)
        return whole + len(self.forwards) + len(self.samples) + _SINGLE_PROGRAMS

    def most_k(self, rows: int, sampler: Sampler) -> int:
        """Most tokens that each row of a decode step can emit in one dispatch, a rung's k."""
        fits = (b.k for b in self.buckets if b.k > 1 and b.rows >= rows and b.sampler >= sampler)
        return max(fits, default=1)

    def chunk_size(self, tokens: int, sampler: Sampler) -> int:
        """Tokens of the sampler's smallest rung for prompts that holds so many; at most
        max_tokens."""
        sizes = self._chunks[sampler]
        at = bisect_left(sizes, tokens)
        return sizes[at] if at < len(sizes) else self.max_tokens

    def choose(
        self, tokens: int, rows: int, sampler: Sampler, *, decode_only: bool, k: int = 1
    ) -> Bucket:
        """The cheapest rung that holds a step. O(log rungs) for decode steps.

        Args:
          tokens: tokens in the step.
          rows: rows in the step; equals `tokens` when `decode_only`.
          sampler: what the step's rows need at least.
          decode_only: no prompt chunk in the step.
          k: the rung's k, exactly; above 1 for decode-only steps that `most_k` allows.

        Raises:
          ValueError: no rung is large enough; the scheduler must never ask for that.
        """
        best: Bucket | None = None
        for kind in Sampler:
            if kind < sampler:
                continue
            found = self._fit(kind, tokens, rows, decode_only, k)
            if found is None:
                continue
            # Sampling is worth its cost only where arg-max has no rung this small; FULL never is.
            if best is None or (kind < Sampler.FULL and found.tokens * 2 <= best.tokens):
                best = found
        if best is None:
            raise ValueError(
                f"no step program holds {tokens} tokens in {rows} rows ({sampler!r}, k={k})"
            )
        return best

    def _fit(
        self, sampler: Sampler, tokens: int, rows: int, decode_only: bool, k: int = 1
    ) -> Bucket | None:
        found = None
        if decode_only:
            rungs = self._decode.get((sampler, k), [])
            i = bisect_left(rungs, rows, key=lambda b: b.rows)
            found = rungs[i] if i < len(rungs) else None
        if k == 1:
            for rung in self._mixed[sampler]:
                if found is not None and rung.tokens >= found.tokens:
                    break
                if rung.tokens >= tokens and rung.rows >= rows:
                    return rung
        return found

    def padding_bound(self, sampler: Sampler = Sampler.GREEDY) -> float:
        """Worst share of a decode step's rows that is padding, over all row counts from 1."""
        rungs = [b.rows for b in self._decode.get((sampler, 1), [])]
        return max(1 - (below + 1) / size for below, size in zip([0, *rungs], rungs, strict=False))


def make_ladder(
    max_rows: int, max_tokens: int, *, max_programs: int = MAX_PROGRAMS, max_k: int = 1
) -> Ladder:
    """The default ladder.

    Decode rungs double from 8 rows to `max_rows` (and one of a single row); mixed rungs double from
    64 tokens to `max_tokens`, with room for nearly as many rows as tokens. GREEDY also has the
    sizes halfway between, where a step's time grows with its tokens, and sizes of few rows. Where
    that makes too many programs they are thinned out. FULL has some of SAMPLE's rungs: what needs
    it is asked for rarely.

    Args:
      max_rows: most rows a step may have (the number of slots).
      max_tokens: most tokens a step may have; must exceed `max_rows`.
      max_programs: bound on the number of programs, all counted; at least 10, or 12 with `max_k`
        (a decode and a mixed rung, whole and in two, and what goes with them).
      max_k: above 1, some decode sizes get rungs of this k as well.
    """
    if max_tokens <= max_rows:
        raise InvalidConfig(
            f"max_batched_tokens: got {max_tokens}, must be above max_num_seqs ({max_rows}), so "
            "that a step with every slot decoding still has room for a prompt chunk"
        )
    spare = max_programs >= 25  # enough for more than one size of each kind
    at_once: list[Bucket] = []
    if max_k > 1:
        rows = sorted({min(n, max_rows) for n in _K_ROWS})
        rows = rows if spare else rows[-1:]
        at_once += [Bucket(n, n, Sampler.GREEDY, max_k) for n in rows]
        # A lone sampled row is well served by the next size.
        at_once += [Bucket(n, n, Sampler.SAMPLE, max_k) for n in rows[-2:]]

    def mixed(tokens: int, sampler: Sampler) -> Bucket:
        wanted = max_rows if tokens == max_tokens else min(max_rows, tokens - tokens // 8)
        return Bucket(tokens, wanted, sampler)

    def of_few_rows(sizes: list[int]) -> list[Bucket]:
        if max_programs < 40:
            return []
        found = [(t, _FEW_ROWS) for t in sizes if t >= _FEW_FROM and t in doubled]
        found += [_REST] if sizes[0] > _REST[0] else []
        return [Bucket(t, rows, Sampler.GREEDY) for t, rows in found if rows < max_rows]

    def ladder(greedy: list[list[int]], sampled: list[list[int]]) -> Ladder:
        whole = [Bucket(n, n, Sampler.GREEDY) for n in greedy[0]]
        whole += [mixed(t, Sampler.GREEDY) for t in greedy[1]]
        whole += of_few_rows(greedy[1])
        apart = [Bucket(n, n, Sampler.SAMPLE) for n in sampled[0]]
        apart += [mixed(t, Sampler.SAMPLE) for t in sampled[1]]
        few = _thin(sampled[0][1:] or sampled[0], 4 if max_programs >= 40 else 1 + spare)
        full = [
            replace(b, sampler=Sampler.FULL)
            for b in apart
            if sampled[0][bisect_left(sampled[0], b.rows)] in few
        ]
        return Ladder([*whole, *apart, *full, *at_once])

    decode, doubled = _doublings(min(8, max_rows), max_rows), _doublings(64, max_tokens)
    lists = [
        sorted({1, *_doublings(min(8, max_rows), max_rows, halves_from=_HALVES_FROM)}),
        _doublings(64, max_tokens, halves_from=2 * 64),
        sorted({1, *decode}),
        doubled[:],
    ]
    while (made := ladder(lists[:2], lists[2:])).num_programs > max_programs:
        if all(len(sizes) == 1 for sizes in lists):
            least = made.num_programs
            raise InvalidConfig(f"max_programs: got {max_programs}, must be at least {least}")
        _give_up(lists)
    return made
