"""From the sequences a step runs to the arrays of its `StepPlan`.

Used by the scheduler, once per step: rows are added in any order of kinds; decode rows come out
first, as the contract wants.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from ..model.plan import (
    Emit,
    IntArray,
    Ladder,
    Sampler,
    ScoredRow,
    SlotControls,
    SlotInit,
    StepPlan,
)
from .controls import controls_of
from .sequence import Sequence, richest


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was planned and whose results have not been read."""

    plan: StepPlan
    rows: list[Sequence]  # [R]
    promised: list[int]  # [R] most tokens each row may bring; a pooled hidden state counts as one


class StepBuilder:
    """Gathers the rows of one step, and notes in their sequences what it may bring.

    What may fail is done before anything is added, so that a fault leaves no half of a row.

    Attributes:
      decodes: sequences that go on from their last token; whoever adds one notes in it that `k`
        more tokens are under way.
      decode_starts: where each of them is, or a little beyond.

    Args:
      k: tokens that each decode row may bring.
    """

    def __init__(self, k: int):
        self.k = k
        self._sampler = Sampler.GREEDY  # of the prompt rows that emit
        self.decodes: list[Sequence] = []
        self.decode_starts: list[int] = []
        self._prompts: list[Sequence] = []
        self._prompt_starts: list[int] = []
        self._counts: list[int] = []
        self._emits: list[int] = []
        self._tokens = array("i")
        self._page_adds: list[tuple[int, int, list[int]]] = []  # slot, first index, pages
        self._lone_adds: list[int] = []  # slot, index, page; of decode rows there may be many
        self._inits: list[SlotInit] = []
        self._controls: list[SlotControls] = []
        self._scored: list[tuple[int, array[int]]] = []  # (place among prompt rows, targets)

    @property
    def rows(self) -> int:
        return len(self.decodes) + len(self._prompts)

    def prompt(self, seq: Sequence, start: int, end: int) -> None:
        """A row for positions [start, end) of what a sequence must prefill.

        Its tokens come from the host even if it is one token: only decode rows read the last token
        on the device. The row that completes the prompt emits a token, or its pooled hidden state
        where that is what was asked for. Where log-probabilities of the prompt are wanted, the
        tokens that follow the row's are scored.
        """
        last = end == seq.target
        tokens, targets = seq.tokens[start:end], None
        if seq.unscored and start + 1 < seq.prompt_len:
            targets = seq.tokens[start + 1 : min(end + 1, seq.prompt_len)]
        self._prompts.append(seq)
        self._prompt_starts.append(start)
        self._counts.append(end - start)
        result = Emit.POOLED if seq.pooled else Emit.TOKEN
        self._emits.append(result if last else Emit.NONE)
        self._tokens += tokens
        if last and seq.sampler > self._sampler:
            self._sampler = seq.sampler
        seq.unread += last
        seq.in_flight += 1
        if targets is not None:
            self._scored.append((len(self._prompts) - 1, targets))
            self._sampler = Sampler.FULL

    def pages(self, slot: int, first: int, pages: list[int]) -> None:
        """Page-table entries of a slot, from index `first` on."""
        if len(pages) == 1:
            self._lone_adds += (slot, first, pages[0])
        elif pages:
            self._page_adds.append((slot, first, pages[:]))  # those of a sequence grow

    def init(self, seq: Sequence) -> None:
        """The device state of a slot that was just handed out."""
        sampling = seq.request.sampling
        done = seq.outputs
        assert sampling.seed is not None  # limits.py refuses requests without one
        controls = controls_of(seq)
        init = SlotInit(
            slot=seq.slot,
            position=seq.prefilled,
            remaining=seq.max_tokens - done,
            min_remaining=max(0, sampling.min_tokens - done),
            sample_index=done,
            seed=sampling.seed,
            choice=seq.choice,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop_ids=tuple(sorted(seq.stop_ids)),
            adapter=seq.request.adapter,
            controlled=controls is not None,
        )
        self._inits.append(init)
        if controls is not None:
            self._controls.append(controls)

    def build(self, ladder: Ladder) -> Flight:
        """The plan, on the cheapest step program that holds it."""
        # With few calls of NumPy: when it was not in use lately, each costs a lone request's first
        # token some microseconds.
        decodes = len(self.decodes)
        rows = self.decodes + self._prompts
        tokens = decodes + len(self._tokens)
        slots, generations, starts = np.array(
            [
                [seq.slot for seq in rows],
                [seq.generation for seq in rows],
                self.decode_starts + self._prompt_starts,
            ],
            np.int32,
        )
        counts, emits = both = np.empty((2, len(rows)), np.int32)
        both[:, :decodes] = ((1,), (Emit.TOKEN,))
        if self._prompts:
            both[:, decodes:] = self._counts, self._emits
        plan = StepPlan(
            slots=slots,
            generations=generations,
            starts=starts,
            counts=counts,
            emits=emits,
            num_decode=decodes,
            bucket=ladder.choose(
                tokens,
                len(rows),
                richest(self.decodes, self._sampler),
                decode_only=not self._prompts,
                k=self.k,
            ),
            prompt_tokens=np.array(self._tokens, np.int32),
            page_adds=self._table_entries(),
            inits=tuple(self._inits),
            controls=tuple(self._controls),
            scored=tuple(
                ScoredRow(decodes + at, np.array(targets, np.int32)) for at, targets in self._scored
            ),
            k=self.k,
        )
        promised = [self.k] * decodes + [emit != Emit.NONE for emit in self._emits]
        return Flight(plan, rows, promised)

    def _table_entries(self) -> IntArray:
        """Additions to page tables, [A, (slot, index, page)]."""
        lone = np.array(self._lone_adds, np.int32).reshape(-1, 3)
        adds, at = self._page_adds, len(lone)
        entries = np.empty((at + sum(len(pages) for _, _, pages in adds), 3), np.int32)
        entries[:at] = lone
        for slot, first, pages in adds:
            of_one = entries[at : at + len(pages)]
            of_one[:, 0] = slot
            of_one[:, 1] = np.arange(first, first + len(pages))
            of_one[:, 2] = pages
            at += len(pages)
        return entries
