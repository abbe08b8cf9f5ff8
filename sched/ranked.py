"""A list kept in order: of service, of expiry. Used by the roster and the queue of tenants."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator
from typing import Any, Generic, Protocol, TypeVar


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

    def __reversed__(self) -> Iterator[Item]:
        return reversed(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    @property
    def first(self) -> Item:
        return self._items[0]

    @property
    def last(self) -> Item:
        """By rank, the youngest of the lowest priority."""
        return self._items[-1]

    def add(self, item: Item) -> None:
        insort(self._items, item, key=self._key)

    def remove(self, item: Item) -> None:
        at = bisect_left(self._items, self._key(item), key=self._key)
        if at == len(self._items) or self._items[at] is not item:
            raise RuntimeError(f"request {item.id!r} is not in this list")
        del self._items[at]

    def clear(self) -> None:
        self._items.clear()

    def discard(self, item: Item) -> None:
        """Removes it if it is there, without asking for its key, which may be what is wrong."""
        self._items = [each for each in self._items if each is not item]
