"""Batches for training, made by other processes while the device computes; loads no JAX.

A shard is a few batches, and a function of (seed, its number) alone. So is the order in which
batches come: a run that is resumed at a step goes on with that step's batch, on any number of
cores. Where generating is slower than training, a window of shards is passed over `reuse` times,
its rows in another order each time, while the next window is made.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..tasks.example import Split
from .conversations import Conversations, Rates, Writer, measure
from .packing import Layout, Packer, Words, reshuffled
from .tokenizer import END_OF_TEXT

_AHEAD = 3  # shards for each worker that may wait to be used


@dataclass(frozen=True)
class Plan:
    """What batches there are, and in which order.

    Attributes:
      shard: batches of a shard.
      window: shards of a window.
      reuse: how often a window is passed over.
    """

    layout: Layout
    shard: int = 8
    window: int = 64
    reuse: int = 1


class Place(NamedTuple):
    """Where a held-out example lies among the words of its batches [B, T]."""

    task: str
    batch: int
    start: int
    stop: int


class Source:
    """Makes shards. Each process has its own."""

    def __init__(self, tokenizer: Tokenizer, rates: Rates, plan: Plan, seed: int):
        self._writer = Writer(tokenizer)
        self._padding = tokenizer.token_to_id(END_OF_TEXT)
        self._rates = rates
        self._plan = plan
        self._seed = seed

    def shard(self, index: int) -> Words:
        """[shard, T] of training data."""
        packer = Packer(self._plan.layout, self._plan.shard, self._padding)
        for _ in self._placed(packer, "train", index):
            pass
        return packer.packed(np.random.default_rng([self._seed, index]))

    def held_out(self, index: int) -> tuple[Words, list[Place]]:
        """[1, T] of held-out examples, each alone, and where they are."""
        packer = Packer(self._plan.layout, 1, self._padding)
        places = list(self._placed(packer, "held_out", index))
        return packer.packed(), places

    def _placed(self, packer: Packer, split: Split, index: int) -> Iterator[Place]:
        """Fills the packer. Chats that no row is long enough for are left out."""
        rng = random.Random(f"{split} {self._seed} {index}")
        layout = self._plan.layout
        chats = Conversations(
            self._writer,
            self._rates,
            split,
            rng,
            longest=layout.longest,
            joined=split == "train",
        )
        parts = np.cumsum([0, *(rows * length for rows, length in layout.parts)])
        in_vain = 0
        for chat, words in chats:
            if (found := packer.place(words)) is not None:
                part, row, column = found
                start = int(parts[part]) + row * layout.parts[part][1] + column
                yield Place(chat.task, 0, start, start + len(words))
            elif len(words) <= layout.parts[0][1]:
                return
            else:  # long rows are full, short ones are not
                in_vain += len(words)
                if in_vain > layout.tokens * packer.batches:
                    raise ValueError(
                        f"chats of over {layout.parts[0][1]} tokens are more than long rows hold; "
                        "the layout needs more of these"
                    )


_source: Source | None = None  # of a worker process


def _start(tokenizer: str, rates: Rates, plan: Plan, seed: int) -> None:
    global _source
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    _source = Source(Tokenizer.from_str(tokenizer), rates, plan, seed)


def _shard(index: int) -> Words:
    assert _source is not None
    return _source.shard(index)


class Batches:
    """Training batches [T] from a step on, made by `workers` processes (0: by this one).

    Use as a context manager; leaving it ends the processes.
    """

    def __init__(self, tokenizer: Tokenizer, plan: Plan, seed: int, workers: int):
        self.plan = plan
        self.rates = measure(Writer(tokenizer))
        self._local = Source(tokenizer, self.rates, plan, seed)
        self._seed = seed
        self._pool = None
        self._ahead = 1
        if workers:
            self._ahead = _AHEAD * workers if plan.reuse == 1 else plan.window
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=get_context("spawn"),
                initializer=_start,
                initargs=(tokenizer.to_str(), self.rates, plan, seed),
            )
        self._made: dict[int, Future[Words]] = {}
        self._next = 0

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def held_out(self, batches: int) -> tuple[Words, list[Place]]:
        """[batches, T] of held-out examples and where they are; the same for the same seed."""
        words, places = [], []
        for index in range(batches):
            some, found = self._local.held_out(index)
            words.append(some)
            places += [place._replace(batch=index) for place in found]
        return np.concatenate(words), places

    def start(self, step: int) -> Iterator[Words]:
        """The batch of `step` and those that follow, without end."""
        plan = self.plan
        window_steps = plan.window * plan.shard * plan.reuse
        window, within = divmod(step, window_steps)
        while True:
            yield from self._window(window, within)
            window, within = window + 1, 0

    def _window(self, window: int, within: int) -> Iterator[Words]:
        plan = self.plan
        first, steps = window * plan.window, plan.window * plan.shard
        kept: list[Words] = []
        for index in range(first, first + plan.window):
            done = (index - first + 1) * plan.shard <= within
            if done and plan.reuse == 1:
                continue
            shard = self._take(index)
            if plan.reuse > 1:
                kept.append(shard)
            for i, batch in enumerate(shard):
                if (index - first) * plan.shard + i >= within:
                    yield batch
        for again in range(1, plan.reuse):
            if within >= (again + 1) * steps:
                continue
            order = np.random.default_rng([self._seed, window, again])
            mixed = reshuffled(np.concatenate(kept), plan.layout, order)
            yield from mixed[max(0, within - again * steps) :]

    def _take(self, index: int) -> Words:
        """A shard, and has others made after it."""
        if self._pool is None:
            return self._local.shard(index)
        for following in range(max(index, self._next), index + self._ahead):
            self._made[following] = self._pool.submit(_shard, following)
            self._next = following + 1
        return self._made.pop(index).result()
