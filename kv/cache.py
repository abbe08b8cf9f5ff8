"""The KV cache as the scheduler sees it: pages by position, shared where prefixes are equal.

The scheduler's only door to kv/. Ownership:

    KVCache ─┬─ PageAllocator   who holds a page, which are free, which may be evicted
             └─ PrefixIndex     which page holds which tokens
    Sequence ─── Chain          its tokens, page by page; lives as long as the request
             └── Holding        its pages; lives from admission to preemption or end

Only full pages are shared, and a full page is never written again, so sharing needs no copies.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .pages import PageAllocator
from .prefix import Chain, PrefixIndex

_NEVER = sys.maxsize

ANSWER_RUN = 8
"""Pages that an answer fills before they are registered, all at once, which takes half as long as
one by one. Nobody looks for the end of an answer that is not finished; the rest is registered when
it gives back its pages (sched/roster.py)."""


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest known prefix of some tokens. Whoever takes it copies `pages`."""

    pages: list[int]
    tokens: int
    idle_pages: int
    """Pages of the hit that nobody holds: taking the hit makes as many fewer available."""


@dataclass(slots=True, eq=False)
class Holding:
    """The pages of one running sequence, in order of position.

    The first `shared` pages are those of its hit, the first `indexed` are findable or have a twin
    that is. `tail` is the page by which the last of these is found (0: there is none), `tail_born`
    says since when. `index_at` is the number of positions from which on an answer's pages are worth
    registering; it is out of reach when no more pages of this holding can be. `phase` differs from
    holding to holding, so that answers which go in step are not registered in the same one.
    """

    chain: Chain
    pages: list[int]
    capacity: int
    shared: int
    indexed: int
    index_at: int
    tail: int
    tail_born: int
    phase: int
    released: bool = False


class KVCache:
    """Hands out pages to sequences, and finds those that equal prefixes can share.

    Args:
      num_pages: pages in the slab, page 0 (never handed out) included.
      page_size: token positions in a page.
      prefix_caching: share the pages of equal prefixes.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        prefix_caching: bool = True,
    ):
        self.page_size = page_size
        self._num_pages = num_pages
        self._caching = prefix_caching
        self._opened = 0
        self._index = PrefixIndex(num_pages)
        self._pages = PageAllocator(num_pages, self._index.drop)

    def clear(self) -> None:
        """Forgets everything, holdings too: the device lost its KV."""
        self._index.clear()
        self._pages = PageAllocator(self._num_pages, self._index.drop)

    @property
    def total(self) -> int:
        return self._pages.total

    @property
    def available(self) -> int:
        """Pages that can be handed out, cached ones included."""
        return self._pages.available

    @property
    def owned(self) -> int:
        return self._pages.owned

    @property
    def cached(self) -> int:
        return self._pages.cached

    def pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    @property
    def caching(self) -> bool:
        """Whether equal prefixes are shared."""
        return self._caching

    def chain(self, adapter: int, *salts: str, private: bool = False) -> Chain:
        """The pages' contents of a new sequence; only equal adapters and salts share pages.

        Args:
          private: shares them even without prefix caching, among sequences with a salt of their
            own; `forget_chain` ends that.
        """
        salt = repr((adapter, *salts)).encode()
        return Chain(self.page_size, salt, findable=self._caching or private)

    def match(self, chain: Chain, tokens: array[int], limit: int = _NEVER) -> PrefixHit:
        """The known prefix of `tokens`: full pages, and never all of them.

        At least one token is left to compute, because sampling needs the logits of the last.

        Args:
          limit: tokens of the prefix at most.
        """
        most = min(len(tokens) - 1, limit) if chain.findable else 0
        pages, found = most // self.page_size, list[int]()
        while (at := len(found)) < pages:
            chain.reach(at, tokens)
            blocks = chain.blocks[at:pages]
            run = self._index.follow(found[-1] if found else 0, blocks)
            found += run
            if len(run) < len(blocks):
                break
        return PrefixHit(found, len(found) * self.page_size, self._pages.unheld(found))

    def open(self, chain: Chain, hit: PrefixHit) -> Holding:
        """A holding that starts with the pages of a hit, which nothing may have come between."""
        self._pages.share(hit.pages)
        self._opened += 1
        shared, tail = len(hit.pages), hit.pages[-1] if hit.pages else 0
        return Holding(
            chain=chain,
            pages=hit.pages[:],
            capacity=hit.tokens,
            shared=shared,
            indexed=shared,
            index_at=0 if chain.findable else _NEVER,
            tail=tail,
            tail_born=self._index.born[tail],
            phase=self._opened,
        )

    def grow(self, holding: Holding, positions: int) -> list[int] | None:
        """Makes room for `positions`; the pages added, or None (and no change) if there are none.

        May evict pages that nobody holds.
        """
        missing = -(-positions // self.page_size) - len(holding.pages)
        added = self._pages.allocate(missing) if missing > 0 else []
        if added:
            holding.pages += added
            holding.capacity = len(holding.pages) * self.page_size
        return added

    def register(self, holding: Holding, tokens: array[int], positions: int) -> None:
        """Makes the pages that the first `positions` of `tokens` fill findable by others."""
        if holding.index_at == _NEVER:
            return
        first, last = holding.indexed, positions // self.page_size
        if first < last:
            holding.index_at = _NEVER  # until it is done: half of it cannot be done again
            index, tail = self._index, holding.tail
            if index.born[tail] != holding.tail_born:
                return  # the page before was dropped, and so would these be
            holding.chain.reach(last - 1, tokens)
            pages, blocks = holding.pages, holding.chain.blocks
            for at in range(first, last):
                page = pages[at]
                tail = index.insert(tail, blocks[at], page)
                if tail == page:
                    self._pages.keep(page)
            holding.indexed, holding.tail, holding.tail_born = last, tail, index.born[tail]
        due = last + ANSWER_RUN - (last + holding.phase) % ANSWER_RUN
        holding.index_at = due * self.page_size

    def forget(self, holding: Holding) -> None:
        """What this holding registered must not be found again: its KV is bad.

        Also right for a holding that was released since: a page of the same content, of which
        somebody else computed the last tokens, may then not be found either.
        """
        holding.index_at = _NEVER
        found = self._index.follow(0, holding.chain.blocks[: len(holding.pages)])
        for at in range(holding.shared, len(found)):
            if found[at] == holding.pages[at]:
                self._drop(found[at])
                break  # with all below it

    def forget_chain(self, chain: Chain) -> None:
        """No page that begins with this chain's first one is found again."""
        page = self._index.find(0, chain.blocks[0]) if chain.blocks else 0
        if page:
            self._drop(page)

    def release(self, holding: Holding) -> None:
        """Gives the pages back. Exactly once."""
        if holding.released:
            raise RuntimeError("a sequence's pages were released twice")
        holding.released = True
        # Last page first: the end of a chain becomes the least recently used part of it, so that
        # eviction shortens prefixes instead of cutting off their roots.
        self._pages.release(reversed(holding.pages))

    def check_integrity(self, holders: Iterable[Holding]) -> None:
        """Proves that each page is owned once or counted right, and that none is lost.

        Args:
          holders: the holdings of all running sequences.

        Raises:
          RuntimeError: says what is wrong.
        """
        counted: Counter[int] = Counter()
        for holding in holders:
            if holding.released or holding.capacity != len(holding.pages) * self.page_size:
                raise RuntimeError("a running sequence holds pages it gave back")
            counted.update(holding.pages)
        self._pages.check(dict(counted), self._index.check())

    def check_index(self) -> None:
        """Proves that what can be found is what pages are kept for. Raises as `check_integrity`."""
        self._pages.check_findable(self._index.check())

    def _drop(self, page: int) -> None:
        self._pages.drop(page)
        for below in self._index.drop(page):
            self._pages.drop(below)
