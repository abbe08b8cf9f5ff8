"""Who holds which page: reference counts, the free list, and what may be evicted.

Called by `kv/cache.py` alone. Owns the state of every page of the slab; knows nothing of tokens.

    free ──allocate──> owned ──release (last holder)──> cached ──share──> owned
      ^                  └───────── not findable ─────────┐ └─evicted / dropped─┐
      └──────────────────────────────────────────────────┴────────────────────┘

Page 0 is never handed out: it fills the unused entries of page tables.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import Enum


class PageState(Enum):
    """What a page is doing. A later version adds pages in transfer between hosts."""

    FREE = "free"
    OWNED = "owned"
    """At least one running sequence holds it."""
    CACHED = "cached"
    """Nobody holds it, but the prefix index still finds it; evicted least recently used first."""


class PageAllocator:
    """Counts references to pages, and hands out free ones.

    Args:
      num_pages: pages in the slab, page 0 included.
      evict: told the least recently used cached page, which is taken because room is needed;
        returns those that cannot be found any more without it.
    """

    def __init__(self, num_pages: int, evict: Callable[[int], Iterable[int]] = lambda page: ()):
        self._evict = evict
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: warm pages are reused first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._findable = bytearray(num_pages)  # flags
        self.total = num_pages - 1

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out, by eviction if need be."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def owned(self) -> int:
        return self.total - len(self._free) - len(self._cached)

    def unheld(self, pages: Iterable[int]) -> int:
        """How many of these nobody holds."""
        return list(map(self._refs.__getitem__, pages)).count(0)

    def state(self, page: int) -> PageState:
        if self._refs[page]:
            return PageState.OWNED
        return PageState.CACHED if page in self._cached else PageState.FREE

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one holder each, or None (and no change) if there are too few."""
        free, cached, findable, refs = self._free, self._cached, self._findable, self._refs
        if count > len(free) + len(cached):
            return None
        while len(free) < count:
            page, _ = cached.popitem(last=False)
            findable[page] = False
            free.append(page)
            for below in self._evict(page):
                self.drop(below)
        first = len(free) - count
        pages = free[first:]
        del free[first:]
        pages.reverse()
        for page in pages:
            refs[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of pages that are owned or cached."""
        refs, cached = self._refs, self._cached
        for page in pages:  # hundreds, where a long prompt is found
            if not refs[page]:
                del cached[page]  # KeyError: the page is free, its content is gone
            refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder fewer of each; the last one leaves a page cached if it can be found, else
        free."""
        refs, cached, free, findable = self._refs, self._cached, self._free, self._findable
        for page in pages:
            left = refs[page] - 1
            if left < 0:
                raise RuntimeError(f"page {page} was released more often than it was held")
            refs[page] = left
            if left:
                continue
            if findable[page]:
                cached[page] = None
            else:
                free.append(page)

    def keep(self, page: int) -> None:
        """The index can find this owned page from now on."""
        self._findable[page] = True

    def drop(self, page: int) -> None:
        """The index cannot find this page any more; if nobody holds it, it becomes free."""
        self._findable[page] = False
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def check(self, counted: dict[int, int], findable: set[int]) -> None:
        """Proves the counts against what holders hold and what the index finds.

        Args:
          counted: how many holders name each page.
          findable: the pages that the index leads to.

        Raises:
          RuntimeError: a page is leaked, doubly owned or counted wrong.
        """
        free, cached = set(self._free), set(self._cached)
        owned = {page for page, refs in enumerate(self._refs) if refs}
        if len(free) != len(self._free):
            raise RuntimeError("a page is on the free list twice")
        if free & cached or free & owned or cached & owned:
            raise RuntimeError(
                f"pages in two states: {sorted(free & cached | free & owned | cached & owned)}"
            )
        if free | cached | owned != set(range(1, self.total + 1)):
            lost = set(range(1, self.total + 1)) - free - cached - owned
            raise RuntimeError(f"pages lost: {sorted(lost)}, or page 0 was handed out")
        actual = {page: self._refs[page] for page in owned}
        if actual != counted:
            wrong = {p for p in owned | set(counted) if actual.get(p) != counted.get(p)}
            raise RuntimeError(f"reference counts differ from the holders' for {sorted(wrong)}")
        self.check_findable(findable)

    def check_findable(self, findable: set[int]) -> None:
        """Proves that the index leads to these pages, and to no free one."""
        flagged = {page for page, flag in enumerate(self._findable) if flag}
        if flagged != findable or not findable >= self._cached.keys() or findable & set(self._free):
            raise RuntimeError("the prefix index and the page states disagree")
