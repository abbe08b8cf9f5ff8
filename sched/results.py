"""What the results of a step mean for its sequences: stop rules, log-probabilities, embeddings.

`Results` is used by the scheduler, once for each step that comes back. Tokens that arrive after a
stop are dropped here, as are rows of sequences that lost their slot or ended meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import Internal
from ..kv.cache import KVCache
from ..model.plan import Emit, FloatArray, LogprobArrays, StepOutputs, StepPlan
from .plan_builder import Flight
from .request import FinishReason, RequestOutput, TokenLogprobs
from .roster import Roster
from .sequence import Group, Sequence
from .stats import Meters


class Results:
    """Takes in the steps of one scheduler.

    Args:
      roster: where choices end, and outputs go.
      cache: gets to know the pages that answers fill.
      meters: told of what was computed.
      clock: seconds.
    """

    def __init__(self, roster: Roster, cache: KVCache, meters: Meters, clock: Callable[[], float]):
        self._roster = roster
        self._cache = cache
        self._meters = meters
        self._clock = clock

    def take_in(self, flight: Flight, outputs: StepOutputs) -> None:
        """What the oldest step in flight gave, row by row."""
        plan = flight.plan
        first, counts = outputs.tokens[:, 0].tolist(), outputs.n_valid.tolist()
        generations = plan.generations.tolist()
        bad = set(outputs.not_finite.nonzero()[0].tolist())
        for scored, arrays in zip(plan.scored, outputs.scored, strict=True):
            seq = flight.rows[scored.row]
            try:
                if not seq.ended and seq.generation == generations[scored.row]:
                    start = int(plan.starts[scored.row])
                    if not gather_scores(seq.group, start, scored.targets.tolist(), arrays):
                        bad.add(scored.row)
            except Exception as fault:
                self._end(seq, fault)
        if plan.num_decode < len(flight.rows):
            self._note_first_tokens(flight.rows[plan.num_decode :], counts[plan.num_decode :])
        pooled, append, lone = pooled_rows(plan, outputs, bad), self._roster.outbox.append, 0
        # Every row of every step passes here: what most of them bring, a token that ends nothing
        # and no more, is looked for first, and costs no call.
        rows = zip(flight.rows, generations, flight.promised, counts, first, strict=True)
        for row, (seq, generation, promised, count, token) in enumerate(rows):
            try:
                if bad and row in bad:
                    self._fail(seq, "its logits held an inf or NaN")
                elif seq.generation == generation and not seq.ended:
                    seq.in_flight -= 1
                    seq.unread -= promised
                    tokens = seq.tokens
                    known = len(tokens)
                    if count == 1 and known < seq.limit and seq.plain and token not in seq.stop_ids:
                        tokens.append(token)
                        if known >= seq.kv.index_at:
                            self._cache.register(seq.kv, tokens, known)
                        append(RequestOutput(seq.id, (token,), seq.cached_tokens, seq.choice))
                        lone += 1
                    elif count:
                        new = outputs.tokens[row, :count].tolist()
                        self._receive(seq, new, row, outputs.logprobs)
                    elif row in pooled:
                        self._roster.end(seq, FinishReason.STOP, embedding_of(seq, pooled[row]))
                    elif promised and row >= plan.num_decode:
                        self._fail(seq, "its prompt gave no token")
            except Exception as fault:
                self._end(seq, fault)
        if self._roster.waiting.contended:
            self._roster.waiting.charge_rows(flight.rows, counts)
        self._meters.counters.output_tokens += lone
        self._meters.recompute.count(sum(counts[: plan.num_decode]), 0)

    def _note_first_tokens(self, prompt_rows: list[Sequence], counts: list[int]) -> None:
        """A first token comes with the row that ends a prompt."""
        now = self._clock()
        for seq, count in zip(prompt_rows, counts, strict=True):
            if count and seq.group.first_token is None:
                seq.group.first_token = now

    def _receive(
        self, seq: Sequence, tokens: list[int], row: int, arrays: LogprobArrays | None
    ) -> None:
        """New tokens of one sequence."""
        reason = accept(seq, tokens)
        self._meters.counters.output_tokens += len(tokens)
        # All but the last token are known to be part of the answer and have their KV.
        if len(seq.tokens) > seq.kv.index_at:
            self._cache.register(seq.kv, seq.tokens, len(seq.tokens) - 1)
        output = RequestOutput(seq.id, tuple(tokens), seq.cached_tokens, seq.choice)
        if arrays is not None and seq.alternatives is not None:
            output.logprobs = logprobs_of(arrays, row, tokens, seq.alternatives)
        if seq.group.scores_due and not seq.choice:
            output.prompt_logprobs = seq.group.take_scores()
        if reason is None:
            self._roster.outbox.append(output)
        else:
            self._roster.end(seq, reason, output)

    def _end(self, seq: Sequence, fault: Exception) -> None:
        """Ends one request whose results could not be taken in; raises if that was not all."""
        self._roster.fail(seq.group, "given its results", fault)
        self._roster.check_integrity()

    def _fail(self, seq: Sequence, why: str) -> None:
        """Ends one request whose results are bad, and lets nobody find its KV.

        Also when it ended meanwhile: others must not come upon what it left in the index.
        """
        self._cache.forget(seq.kv)
        if not seq.ended:
            error = Internal(f"request {seq.id!r}: {why}")
            self._roster.end_request(seq.group, FinishReason.ERROR, error)


def accept(seq: Sequence, sampled: list[int]) -> FinishReason | None:
    """Appends sampled tokens, and returns why they end the request, if they do.

    A device may run past a stop, and past what the host knows to be the last token. That is cut off
    `sampled` here, so it reaches neither a caller nor the prefix index.
    """
    count, left, reason = len(sampled), seq.limit + 1 - len(seq.tokens), None
    if count >= left:
        count, reason = left, FinishReason.LENGTH
    if not seq.stop_ids.isdisjoint(sampled):
        # The first min_tokens tokens do not end a request, whatever they are.
        held_off = max(0, seq.request.sampling.min_tokens - seq.outputs)
        for at in range(held_off, count):
            if sampled[at] in seq.stop_ids:
                count, reason = at + 1, FinishReason.STOP
                break
    del sampled[count:]
    seq.tokens.extend(sampled)
    return reason


def logprobs_of(
    arrays: LogprobArrays, row: int, tokens: list[int], alternatives: int
) -> tuple[TokenLogprobs, ...]:
    """The log-probabilities of a row's tokens, with as many alternatives as were asked for."""
    return tuple(_entry(arrays, (row, at), token, alternatives) for at, token in enumerate(tokens))


def gather_scores(group: Group, start: int, targets: list[int], arrays: LogprobArrays) -> bool:
    """Takes in the log-probabilities of the prompt tokens after positions `start`, `start` + 1, …

    Those that are known already (their rows ran again after a preemption) are passed over.

    Returns:
      whether all of them are finite.
    """
    alternatives = group.request.sampling.prompt_logprobs or 0
    known = len(group.scores) - start
    assert known >= 0, "rows of one sequence are collected in order"
    group.scores.extend(
        _entry(arrays, (at, 0), targets[at], alternatives) for at in range(known, len(targets))
    )
    return bool(np.isfinite(arrays.chosen).all())


def pooled_rows(plan: StepPlan, outputs: StepOutputs, bad: set[int]) -> dict[int, FloatArray]:
    """The pooled hidden state of each row that has one; rows whose is not finite go to `bad`."""
    if outputs.pooled is None:
        return {}
    rows = np.flatnonzero(plan.emits == Emit.POOLED)
    bad.update(rows[~np.isfinite(outputs.pooled).all(axis=1)].tolist())
    return dict(zip(rows.tolist(), outputs.pooled, strict=True))


def embedding_of(seq: Sequence, vector: FloatArray) -> RequestOutput:
    """The one output of a request for an embedding."""
    return RequestOutput(seq.id, cached_tokens=seq.cached_tokens, pooled=vector)


def _entry(
    arrays: LogprobArrays, at: tuple[int, int], token: int, alternatives: int
) -> TokenLogprobs:
    return TokenLogprobs(
        token=token,
        logprob=float(arrays.chosen[at]),
        rank=int(arrays.rank[at]),
        top=tuple(
            zip(
                arrays.top_ids[at][:alternatives].tolist(),
                arrays.top[at][:alternatives].tolist(),
                strict=True,
            )
        ),
    )
