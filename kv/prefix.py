"""Which page holds the KV of which tokens: a tree of full pages.

Called by `kv/cache.py` alone. Owns the map from a page's content, and all that came before it, to
the page. A page is found by (the page before, its tokens); a first page by its tokens after a salt,
so that requests of different salts never meet. Both are compared, not digests of them: as long as a
page is in the tree, so are all before it, so by induction whole prefixes are equal.

Dropping a page drops everything below it: a child without its parent could never be found again,
would only take up room, and would seem to go on from whatever its parent's page holds next.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

RUN = 64
"""Pages cut at once from the tokens of a sequence that has so many: one by one, a long prompt takes
twice as long, and all at once would hold up the step that it comes in."""

_Content = tuple[int, bytes]
"""The page before (0 for a first page), and the tokens."""


class Chain:
    """The contents of one sequence's full pages, made once each, about as far as they are asked
    for.

    Tokens are only ever appended to a sequence, so a block stays right for its whole life, through
    preemption and requeueing. The pages of one that is not `findable` never enter the index.
    """

    __slots__ = ("_page_size", "_salt", "blocks", "findable")

    def __init__(self, page_size: int, salt: bytes, findable: bool = True):
        self.findable = findable
        self._page_size = page_size
        self._salt = salt
        self.blocks: list[bytes] = []

    def fork(self, tokens: int) -> Chain:
        """The chain of another sequence whose first `tokens` tokens are the same."""
        other = Chain(self._page_size, self._salt, self.findable)
        other.blocks = self.blocks[: tokens // self._page_size]
        return other

    def reach(self, page: int, tokens: array[int]) -> None:
        """Makes `blocks[page]` available, perhaps with some after it; `tokens` must fill that
        page."""
        size, first = self._page_size, len(self.blocks)
        if page < first:
            return
        last = max(page + 1, min(first + RUN, len(tokens) // size))
        run, width = tokens[first * size : last * size].tobytes(), size * tokens.itemsize
        blocks = [run[at : at + width] for at in range(0, len(run), width)]
        if not first:
            # The tokens' bytes have a fixed length, so salt + tokens reads in one way only.
            blocks[0] = self._salt + blocks[0]
        self.blocks += blocks


class PrefixIndex:
    """Finds pages by content.

    What it knows of a page lies in lists, at the page's number: pages come and go by the dozen in
    each step, and an object for each would cost more to make and to collect than all the rest.
    Page 0, which never has content, is the parent of all first pages.

    Attributes:
      born: [pages] which insertion made a page findable, counted from 1; 0 where it is not. A page
        that was dropped since has another number than was noted.

    Args:
      num_pages: pages in the slab, page 0 included.
    """

    def __init__(self, num_pages: int):
        self.born = [0] * num_pages
        self._insertions = 0
        self._page_of: dict[_Content, int] = {}
        self._content: list[_Content] = [(0, b"")] * num_pages
        # A page's children are a list that is linked both ways, the youngest first; 0 ends it.
        self._youngest_child = [0] * num_pages
        self._older = [0] * num_pages
        self._younger = [0] * num_pages

    def __len__(self) -> int:
        return len(self._page_of)

    def find(self, parent: int, block: bytes) -> int:
        """The page of this content after that parent; 0 if there is none."""
        return self._page_of.get((parent, block), 0)

    def follow(self, parent: int, blocks: list[bytes]) -> list[int]:
        """The pages of these contents after that parent and each other, up to the first that is
        not there."""
        found, page_of = list[int](), self._page_of
        for block in blocks:
            parent = page_of.get((parent, block), 0)
            if not parent:
                break
            found.append(parent)
        return found

    def insert(self, parent: int, block: bytes, page: int) -> int:
        """Makes `page` findable, unless equal content already is.

        Args:
          parent: the page before, findable; 0 for a first page.
          block: what `page` holds.
          page: not findable.

        Returns:
          the page by which this content is found.
        """
        content = parent, block
        found = self._page_of.setdefault(content, page)
        if found != page:
            return found
        self._insertions += 1
        self.born[page] = self._insertions
        self._content[page] = content
        older = self._youngest_child[parent]
        self._youngest_child[parent] = page
        self._older[page], self._younger[page] = older, 0
        if older:
            self._younger[older] = page
        return page

    def drop(self, page: int) -> Sequence[int]:
        """Forgets a findable page and all below it; returns those below."""
        content, older, younger = self._content[page], self._older[page], self._younger[page]
        if younger:
            self._older[younger] = older
        else:
            self._youngest_child[content[0]] = older
        if older:
            self._younger[older] = younger
        self.born[page] = 0
        del self._page_of[content]
        return self._drop_below(page) if self._youngest_child[page] else ()

    def _drop_below(self, top: int) -> list[int]:
        dropped, parents = list[int](), [top]
        while parents:
            parent = parents.pop()
            page, self._youngest_child[parent] = self._youngest_child[parent], 0
            while page:
                self.born[page] = 0
                del self._page_of[self._content[page]]
                dropped.append(page)
                parents.append(page)
                page = self._older[page]
        return dropped

    def clear(self) -> None:
        """Forgets everything; the count of insertions goes on."""
        none = [0] * len(self.born)
        self.born[:], self._youngest_child[:] = none, none
        self._page_of.clear()

    def check(self) -> set[int]:
        """Proves that each findable page is reached from page 0, once; returns them."""
        reached, parents = set[int](), [0]
        while parents:
            parent, younger = parents.pop(), 0
            page = self._youngest_child[parent]
            while page:
                if page in reached or self._content[page][0] != parent:
                    raise RuntimeError(f"prefix index: page {page} is not below one page")
                if self._younger[page] != younger or not self.born[page]:
                    raise RuntimeError(f"prefix index: page {page} was dropped and is linked")
                if self._page_of.get(self._content[page]) != page:
                    raise RuntimeError(f"prefix index: page {page} is not found by its content")
                reached.add(page)
                parents.append(page)
                page, younger = self._older[page], page
        findable = {page for page, born in enumerate(self.born) if born}
        if findable != reached or set(self._page_of.values()) != reached:
            raise RuntimeError("prefix index: a page outlived its parent")
        return reached
