"""PageAllocator: states, counts, and which page goes first."""

import pytest

from quire.kv.pages import PageAllocator, PageState


def take(pages: PageAllocator, count: int) -> list[int]:
    got = pages.allocate(count)
    assert got is not None
    return got


def test_page_0_is_never_handed_out() -> None:
    pages = PageAllocator(5)
    assert sorted(take(pages, 4)) == [1, 2, 3, 4]
    assert pages.allocate(1) is None


def test_allocation_is_all_or_nothing() -> None:
    pages = PageAllocator(4)
    assert pages.allocate(4) is None
    assert pages.available == 3 and pages.owned == 0
    assert pages.allocate(0) == []


def test_a_shared_page_is_free_after_its_last_holder() -> None:
    pages = PageAllocator(2)
    [page] = take(pages, 1)
    pages.share([page])
    pages.release([page])
    assert pages.state(page) is PageState.OWNED
    pages.release([page])
    assert pages.state(page) is PageState.FREE
    with pytest.raises(RuntimeError, match="more often"):
        pages.release([page])


def test_a_findable_page_is_cached_and_can_be_owned_again() -> None:
    pages = PageAllocator(3)
    [page] = take(pages, 1)
    pages.keep(page)
    pages.release([page])
    assert pages.state(page) is PageState.CACHED
    assert (pages.owned, pages.cached, pages.available) == (0, 1, 2)
    pages.share([page])
    assert pages.state(page) is PageState.OWNED and pages.available == 1


def test_a_free_page_cannot_be_shared() -> None:
    pages = PageAllocator(2)
    with pytest.raises(KeyError):
        pages.share([1])


def test_eviction_takes_the_least_recently_used() -> None:
    evicted: list[int] = []

    def evict(page: int) -> list[int]:
        evicted.append(page)
        return []

    pages = PageAllocator(4, evict)
    a, b, c = take(pages, 3)
    for page in (a, b, c):
        pages.keep(page)
    pages.release([b, a, c])
    pages.share([b])  # used again: now the most recent
    pages.release([b])
    assert take(pages, 1) == [a]
    assert take(pages, 2) == [b, c]
    assert evicted == [a, c, b]


def test_what_is_below_an_evicted_page_is_free_with_it() -> None:
    pages = PageAllocator(5, lambda page: [b, c] if page == a else [])
    a, b, c, d = take(pages, 4)
    for page in (a, b, c, d):
        pages.keep(page)
    pages.release([a, d, c])
    assert pages.available == 3 and sorted(take(pages, 2)) == [a, c]
    assert pages.state(d) is PageState.CACHED
    pages.release([b])  # not findable any more either
    assert pages.state(b) is PageState.FREE


def test_free_pages_go_before_cached_ones() -> None:
    pages = PageAllocator(3)
    a, b = take(pages, 2)
    pages.keep(a)
    pages.release([a])
    pages.release([b])
    assert take(pages, 1) == [b]
    assert pages.state(a) is PageState.CACHED


@pytest.mark.parametrize("counted", [{}, {1: 2}, {1: 1, 2: 1}])
def test_check_compares_counts_with_holders(counted: dict[int, int]) -> None:
    pages = PageAllocator(3)
    [page] = take(pages, 1)
    assert page == 1
    pages.check({1: 1}, set())
    with pytest.raises(RuntimeError, match="reference counts"):
        pages.check(counted, set())


def test_check_finds_a_lost_page_and_a_stale_index() -> None:
    pages = PageAllocator(3)
    with pytest.raises(RuntimeError, match="index"):
        pages.check({}, {1})
    pages._free.remove(2)
    with pytest.raises(RuntimeError, match=r"lost: \[2\]"):
        pages.check({}, set())
    pages._free += [2, 2]
    with pytest.raises(RuntimeError, match="twice"):
        pages.check({}, set())
