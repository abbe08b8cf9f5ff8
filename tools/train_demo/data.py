"""Batches for training, made by other processes while the device computes; loads no JAX.

A shard is a few batches, and a function of (seed, its number) alone; shards are used in the order
of their numbers. So a run that is resumed at a step goes on with that step's batch, on any number
of cores. Nothing is used twice: one core makes about half a million tokens a second.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..tasks.example import Split
from .conversations import Conversations, DrawingRates, Writer, measure
from .packing import Layout, Packer, Words
from .tokenizer import END_OF_TEXT

_MOST_IN_VAIN = 20  # times what a shard holds: too long chats, after which something is wrong
_AHEAD = 3  # shards for each worker that may wait to be used


@dataclass(frozen=True)
class Plan:
    """What batches there are: `shard` of them are made at once."""

    layout: Layout
    shard: int = 8


class Place(NamedTuple):
    """Where a held-out example lies among the words of its batches [B, T]."""

    task: str
    batch: int
    start: int
    stop: int


class Source:
    """Makes shards. Each process has its own."""

    def __init__(self, tokenizer: Tokenizer, rates: DrawingRates, plan: Plan, seed: int):
        self._writer = Writer(tokenizer)
        self._padding = tokenizer.get_vocab()[END_OF_TEXT]
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
        """Fills the packer. Chats that no row has room for are left out, until a short one is."""
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
                if in_vain > _MOST_IN_VAIN * layout.tokens * packer.batches:
                    raise ValueError(f"hardly a chat fits rows of {layout.parts}")


_source: Source | None = None  # of a worker process


def _start(tokenizer: str, rates: DrawingRates, plan: Plan, seed: int) -> None:
    global _source
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that ends this one
    _source = Source(Tokenizer.from_str(tokenizer), rates, plan, seed)


def _shard(index: int) -> Words:
    assert _source is not None
    return _source.shard(index)


class Batches:
    """Training batches [T] from step `first` on, without end.

    Use as a context manager; leaving it ends the processes.

    Args:
      workers: processes that make batches, from now on; 0: this one makes them.
    """

    def __init__(
        self, tokenizer: Tokenizer, plan: Plan, seed: int, *, first: int = 0, workers: int = 0
    ):
        self.rates = measure(Writer(tokenizer))
        self._local = Source(tokenizer, self.rates, plan, seed)
        self._index, self._within = divmod(first, plan.shard)
        self._next = self._index
        self._pool: ProcessPoolExecutor | None = None
        self._ahead = _AHEAD * workers
        if workers:
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=get_context("spawn"),
                initializer=_start,
                initargs=(tokenizer.to_str(), self.rates, plan, seed),
            )
        self._made: dict[int, Future[Words]] = {}
        self._submit()

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

    def __iter__(self) -> Iterator[Words]:
        while True:
            yield from self._take()[self._within :]
            self._index, self._within = self._index + 1, 0

    def _take(self) -> Words:
        if self._pool is None:
            return self._local.shard(self._index)
        self._submit()
        return self._made.pop(self._index).result()

    def _submit(self) -> None:
        """Has the shards that come next made meanwhile."""
        if self._pool is None:
            return
        while self._next < self._index + self._ahead:
            self._made[self._next] = self._pool.submit(_shard, self._next)
            self._next += 1
