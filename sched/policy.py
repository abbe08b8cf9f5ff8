"""Who is served first, who gives way, who may come in, and how many tokens a dispatch decodes.

Called by the scheduler; pure but for the lists in it. Everything here could be decided otherwise
without harm to correctness: the scheduler keeps pages and slots right under any policy, as long as
the first in order never gives way to another.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from ..kv.cache import KVCache, PrefixHit
from ..model.plan import RunnerSpec
from .sequence import Group, Sequence

MAX_RECOMPUTE_RATIO = 0.1
"""Recomputed per useful token above which admission reserves the worst case."""


def by_rank(seq: Sequence) -> tuple[int, int]:
    """Order of service: lower priority numbers first, then earlier arrivals."""
    return seq.rank


def by_deadline(group: Group) -> tuple[float, int]:
    """Order of expiry, for requests that have a deadline."""
    return group.request.deadline or 0.0, group.arrival


class _Named(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=_Named)


class Ranked(Collection[Item], Generic[Item]):
    """Items in order of a key that differs for each. Short enough for a plain sorted list."""

    def __init__(self, key: Callable[[Item], Any]):
        self._key = key
        self._items: list[Item] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    @property
    def first(self) -> Item:
        return self._items[0]

    @property
    def last(self) -> Item:
        """By rank, this is who gives way: the youngest of the lowest priority."""
        return self._items[-1]

    def add(self, item: Item) -> None:
        insort(self._items, item, key=self._key)

    def remove(self, item: Item) -> None:
        at = bisect_left(self._items, self._key(item), key=self._key)
        if at == len(self._items) or self._items[at] is not item:
            raise RuntimeError(f"request {item.id!r} is not in this list")
        del self._items[at]


def decode_tokens(
    spec: RunnerSpec,
    running: Collection[Sequence],
    prefilling: int,
    waiting: int,
    cache: KVCache,
) -> int:
    """How many tokens each decode row may emit in the next dispatch.

    More than one saves host work, but holds up whoever arrives before the dispatch ends, and may
    ask for pages early. So only when nobody waits or prefills (whoever does is not held up a second
    time: the next dispatch is of one token), when every row could get its pages, and when there is
    a program for so many rows with the richest sampler among them. There is none for rows with
    controls or log-probabilities, nor, on the default ladder, for so many rows that k steps of them
    would keep an arrival waiting for more than 15 ms.
    """
    if spec.max_k == 1 or not running or prefilling or waiting:
        return 1
    if cache.available < len(running) * cache.pages_for(spec.max_k):
        return 1
    return spec.ladder.most_k(len(running), max(seq.sampler for seq in running))


def reserved_pages(
    running: Collection[Sequence],
    prefilling: Iterable[Sequence],
    cache: KVCache,
    *,
    worst_case: bool,
) -> int:
    """Pages that admission must leave for those who run already.

    Normally what their prompts still need and one more for each, so that nobody has to give way at
    once; in the worst case all they may ever need, so that nobody has to give way at all.
    """
    if worst_case:
        return sum(cache.pages_for(seq.limit) - len(seq.kv.pages) for seq in running)
    prompts = sum(cache.pages_for(seq.target) - len(seq.kv.pages) for seq in prefilling)
    return prompts + len(running)


def may_enter(
    seq: Sequence, hit: PrefixHit, reserved: int, cache: KVCache, *, worst_case: bool
) -> bool:
    """Whether pages are left for a waiting sequence, beside those reserved for running ones.

    A lone request always may: limits.py made sure that its worst case fits. Who just gave way may
    not: it needs all it gave and a page more.
    """
    horizon = seq.limit if worst_case else min(seq.limit, len(seq.tokens) + cache.page_size)
    needed = cache.pages_for(horizon) - len(hit.entries) + hit.idle_pages
    return needed + reserved <= cache.available
