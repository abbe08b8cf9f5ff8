"""The KV cache as the scheduler sees it: pages by position, shared where prefixes are equal.

The scheduler's only door to kv/. Ownership:

    KVCache ─┬─ PageAllocator   who holds a page, which are free, which may be evicted
             └─ PrefixIndex     which page holds which tokens
    Sequence ─── Chain          digests of its tokens; lives as long as the request
             └── Holding        its pages; lives from admission to preemption or end

Only full pages are shared, and a full page is never written again, so sharing needs no copies.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .pages import PageAllocator
from .prefix import Chain, Entry, Hash, PrefixIndex, page_digest

_NEVER = sys.maxsize


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest known prefix of some tokens."""

    entries: tuple[Entry, ...]
    tokens: int
    idle_pages: int
    """Pages of the hit that nobody holds: taking the hit makes as many fewer available."""


@dataclass(slots=True, eq=False)
class Holding:
    """The pages of one running sequence, in order of position.

    `index_at` is the number of positions that fills the next page to be registered; it is out of
    reach when no more pages of this holding can be.
    """

    chain: Chain
    pages: list[int]
    capacity: int
    indexed: int
    index_at: int
    tail: Entry | None
    own: list[Entry] = field(default_factory=list)
    released: bool = False


class KVCache:
    """Hands out pages to sequences, and finds those that equal prefixes can share.

    Args:
      num_pages: pages in the slab, page 0 (never handed out) included.
      page_size: token positions in a page.
      prefix_caching: share the pages of equal prefixes.
      hash_page: digest of a page; tests force collisions here.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        prefix_caching: bool = True,
        hash_page: Hash = page_digest,
    ):
        self.page_size = page_size
        self._num_pages = num_pages
        self._caching = prefix_caching
        self._hash = hash_page
        self._index = PrefixIndex()
        self._pages = PageAllocator(num_pages, self._evict)

    def clear(self) -> None:
        """Forgets everything, holdings too: the device lost its KV."""
        self._index.clear()
        self._pages = PageAllocator(self._num_pages, self._evict)

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
        """The digests of a new sequence; only equal adapters and salts share pages.

        Args:
          private: shares them even without prefix caching, among sequences with a salt of their
            own; `forget_chain` ends that.
        """
        salt = repr((adapter, *salts)).encode()
        return Chain(self.page_size, salt, self._hash, findable=self._caching or private)

    def match(self, chain: Chain, tokens: array[int], limit: int = _NEVER) -> PrefixHit:
        """The known prefix of `tokens`: full pages, and never all of them.

        At least one token is left to compute, because sampling needs the logits of the last.

        Args:
          limit: tokens of the prefix at most.
        """
        most = min(len(tokens) - 1, limit) if chain.findable else 0
        pages, found = most // self.page_size, list[Entry]()
        while (at := len(found)) < pages:
            chain.reach(at, tokens)
            digests, blocks = chain.digests[at:pages], chain.blocks[at:pages]
            run = self._index.follow(digests, blocks, found[-1] if found else None)
            found += run
            if len(run) < len(digests):
                break
        idle = self._pages.unheld([entry.page for entry in found]) if found else 0
        return PrefixHit(tuple(found), len(found) * self.page_size, idle)

    def open(self, chain: Chain, hit: PrefixHit) -> Holding:
        """A holding that starts with the pages of a hit, which nothing may have come between."""
        pages = [entry.page for entry in hit.entries]
        self._pages.share(pages)
        return Holding(
            chain=chain,
            pages=pages,
            capacity=hit.tokens,
            indexed=len(pages),
            index_at=hit.tokens + self.page_size if chain.findable else _NEVER,
            tail=hit.entries[-1] if pages else None,
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
        chain = holding.chain
        if not chain.findable:
            return
        first, last = holding.indexed, positions // self.page_size
        if first < last:
            chain.reach(last - 1, tokens)
        for index in range(first, last):
            page = holding.pages[index]
            entry = self._index.insert(
                chain.digests[index], chain.blocks[index], holding.tail, page
            )
            if entry is None:
                holding.index_at = _NEVER
                return
            if entry.page == page:
                self._pages.keep(page)
                holding.own.append(entry)
            holding.tail = entry
            holding.indexed = index + 1
            holding.index_at += self.page_size

    def forget(self, holding: Holding) -> None:
        """What this holding registered must not be found again: its KV is bad.

        Also right for a holding that was released since: an entry knows whether it still lives.
        """
        for entry in holding.own:
            self._drop(entry)
        holding.own.clear()
        holding.index_at = _NEVER

    def forget_chain(self, chain: Chain) -> None:
        """No page that begins with this chain's first one is found again."""
        if chain.digests:
            entry = self._index.find(chain.digests[0], chain.blocks[0], None)
            if entry is not None:
                self._drop(entry)

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

    def _evict(self, page: int) -> None:
        self._drop(self._index.entry_of(page))

    def _drop(self, entry: Entry) -> None:
        for page in self._index.drop(entry):
            self._pages.drop(page)
