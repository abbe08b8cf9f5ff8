"""Which page holds the KV of which tokens: a hash chain over full pages.

Called by `kv/cache.py` alone. Owns the map from a page's content (and all that came before it) to
the page. A page is found by the digest of (digest of the page before, its tokens); the first page
of a chain also carries a salt, so that requests of different salts never meet.

A digest only finds a candidate. A hit needs equal tokens and the very same parent entry, so by
induction the whole prefix is equal, and two prefixes whose digests collide never share a page. So a
digest need not be cryptographic, but cheap: of a prompt of 10,000 tokens 600 are made before its
first token. Nor does it mean anything in another process.

Dropping an entry drops everything below it: a child without its parent could never be found again
and would only take up a page.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice

RUN = 64
"""Pages hashed at once where a sequence has so many: one by one, a long prompt takes twice as long,
and all at once would hold up the step that it comes in."""

Hash = Callable[[int, bytes], int]


def page_digest(parent: int, block: bytes) -> int:
    """Digest of a page given the digest of the one before (0 for the first)."""
    return hash((parent, block))


class Chain:
    """The digests of one sequence's full pages, computed once each, about as far as they are asked
    for.

    Tokens are only ever appended to a sequence, so a digest stays right for its whole life, through
    preemption and requeueing. The pages of one that is not `findable` never enter the index.
    """

    __slots__ = ("_hash", "_page_size", "_salt", "blocks", "digests", "findable")

    def __init__(
        self, page_size: int, salt: bytes, hash_page: Hash = page_digest, findable: bool = True
    ):
        self.findable = findable
        self._page_size = page_size
        self._salt = salt
        self._hash = hash_page
        self.digests: list[int] = []
        self.blocks: list[bytes] = []  # what was hashed, for the check of equality

    def fork(self, tokens: int) -> Chain:
        """The chain of another sequence whose first `tokens` tokens are the same."""
        other = Chain(self._page_size, self._salt, self._hash, self.findable)
        other.digests = self.digests[: tokens // self._page_size]
        other.blocks = self.blocks[: tokens // self._page_size]
        return other

    def reach(self, page: int, tokens: array[int]) -> None:
        """Makes `digests[page]` and `blocks[page]` available, perhaps with some after them;
        `tokens` must fill that page."""
        size, first = self._page_size, len(self.digests)
        if page < first:
            return
        if page == first > 0 and len(tokens) < (page + 2) * size:  # an answer fills one at a time
            block = tokens[page * size : (page + 1) * size].tobytes()
            self.blocks.append(block)
            self.digests.append(self._hash(self.digests[-1], block))
            return
        last = max(page + 1, min(first + RUN, len(tokens) // size))
        run, width = tokens[first * size : last * size].tobytes(), size * tokens.itemsize
        blocks = [run[at : at + width] for at in range(0, len(run), width)]
        parent = self.digests[-1] if first else 0
        if not first:
            # The tokens' bytes have a fixed length, so salt + tokens reads in one way only.
            blocks[0] = self._salt + blocks[0]
        self.blocks += blocks
        self.digests += islice(accumulate(blocks, self._hash, initial=parent), 1, None)


@dataclass(slots=True, eq=False)
class Entry:
    """One findable page."""

    digest: int
    block: bytes
    parent: Entry | None
    page: int
    live: bool = True
    children: set[Entry] = field(default_factory=set)


class PrefixIndex:
    """Finds pages by content."""

    def __init__(self) -> None:
        self._by_digest: dict[int, Entry] = {}
        self._by_page: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._by_digest)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._by_digest.values())

    def find(self, digest: int, block: bytes, parent: Entry | None) -> Entry | None:
        """The entry of this content after that parent, if there is one."""
        entry = self._by_digest.get(digest)
        if entry is None or entry.parent is not parent or entry.block != block:
            return None
        return entry

    def follow(self, digests: list[int], blocks: list[bytes], parent: Entry | None) -> list[Entry]:
        """The entries of these contents after that parent and each other, up to the first that is
        not there."""
        found, by_digest = [], self._by_digest
        for digest, block in zip(digests, blocks, strict=True):
            entry = by_digest.get(digest)
            if entry is None or entry.parent is not parent or entry.block != block:
                break
            found.append(entry)
            parent = entry
        return found

    def insert(self, digest: int, block: bytes, parent: Entry | None, page: int) -> Entry | None:
        """Makes `page` findable, unless equal content already is: then that entry is returned.

        None when the chain cannot go on: its parent was dropped, or a digest collided.
        """
        if parent is not None and not parent.live:
            return None
        if digest in self._by_digest:
            return self.find(digest, block, parent)
        entry = Entry(digest, block, parent, page)
        self._by_digest[digest] = entry
        self._by_page[page] = entry
        if parent is not None:
            parent.children.add(entry)
        return entry

    def entry_of(self, page: int) -> Entry:
        return self._by_page[page]

    def drop(self, entry: Entry) -> list[int]:
        """Forgets an entry and all below it; returns their pages. Nothing if it was forgotten."""
        if not entry.live:
            return []
        if entry.parent is not None:
            entry.parent.children.discard(entry)
        pages, below = [], [entry]
        while below:
            gone = below.pop()
            gone.live = False
            del self._by_digest[gone.digest]
            del self._by_page[gone.page]
            pages.append(gone.page)
            below.extend(gone.children)
            gone.children.clear()
        return pages

    def clear(self) -> None:
        """Forgets everything; entries that others still hold know that they are dead."""
        for entry in self:
            entry.live = False
        self._by_digest.clear()
        self._by_page.clear()

    def check(self) -> set[int]:
        """Proves that every entry can be reached; returns the pages that can be found."""
        for entry in self:
            if not entry.live or self._by_page.get(entry.page) is not entry:
                raise RuntimeError(f"prefix index: page {entry.page} has a wrong entry")
            parent = entry.parent
            if parent is not None and (not parent.live or entry not in parent.children):
                raise RuntimeError(f"prefix index: page {entry.page} outlived its parent")
        if len(self._by_page) != len(self._by_digest):
            raise RuntimeError("prefix index: a page has two entries")
        return set(self._by_page)
