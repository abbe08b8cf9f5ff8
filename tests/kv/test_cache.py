"""KVCache: what is found, what is not, and what eviction leaves behind."""

from array import array

import pytest

from quire.kv.cache import ANSWER_RUN, Holding, KVCache
from quire.kv.prefix import RUN, Chain

SIZE = 4


def tokens(*values: int) -> array:
    return array("i", values)


def run(cache: KVCache, text: array, salt: str = "") -> Holding:
    """A sequence that has computed all of `text`."""
    chain = cache.chain(0, salt)
    holding = cache.open(chain, cache.match(chain, text))
    assert cache.grow(holding, len(text)) is not None
    cache.register(holding, text, len(text))
    return holding


def hit(cache: KVCache, text: array, salt: str = "", adapter: int = 0) -> int:
    return cache.match(cache.chain(adapter, salt), text).tokens


def test_full_pages_are_found_and_one_token_is_left_to_compute() -> None:
    cache = KVCache(10, SIZE)
    text = tokens(*range(10))
    holding = run(cache, text)
    assert len(holding.pages) == 3
    assert hit(cache, text) == 8
    assert hit(cache, text[:9]) == 8
    assert hit(cache, text[:8]) == 4  # the second page holds the last token
    assert hit(cache, text[:4]) == 0
    assert hit(cache, tokens(0, 1, 2, 3, 9, 9, 9, 9, 9)) == 4
    assert hit(cache, tokens(9, 1, 2, 3, 4)) == 0


def test_a_hit_shares_pages_and_they_outlive_the_first_holder() -> None:
    cache = KVCache(10, SIZE)
    text = tokens(*range(9))
    first = run(cache, text)
    second = run(cache, text)
    assert second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    cache.check_integrity([first, second])
    cache.release(first)
    cache.check_integrity([second])
    assert cache.owned == 3
    cache.release(second)
    assert (cache.owned, cache.cached) == (0, 2)
    assert hit(cache, text) == 8


def test_salt_and_adapter_keep_prefixes_apart() -> None:
    cache = KVCache(10, SIZE)
    text = tokens(*range(5))
    run(cache, text, salt="a")
    assert hit(cache, text, salt="a") == 4
    assert hit(cache, text) == 0
    assert hit(cache, text, salt="b") == 0
    assert hit(cache, text, salt="a", adapter=1) == 0


def test_equal_tokens_after_other_pages_are_no_hit() -> None:
    cache = KVCache(20, SIZE)
    run(cache, tokens(1, 1, 1, 1, 5, 5, 5, 5, 0))
    run(cache, tokens(2, 2, 2, 2, 0))
    assert hit(cache, tokens(1, 1, 1, 1, 5, 5, 5, 5, 0)) == 8
    assert hit(cache, tokens(2, 2, 2, 2, 5, 5, 5, 5, 0)) == 4
    assert hit(cache, tokens(5, 5, 5, 5, 0)) == 0


def test_nothing_hangs_below_what_a_reused_page_held() -> None:
    """Two compute the same first page at once, and the second's next page is to hang below the
    first's, which is evicted meanwhile and given to another text."""
    cache = KVCache(4, SIZE)
    text, other = tokens(*range(9)), tokens(*range(20, 25))
    one, two = (cache.open(chain, cache.match(chain, text)) for chain in (cache.chain(0, ""),) * 2)
    cache.grow(one, 4)
    cache.grow(two, 8)
    cache.register(one, text, 4)
    cache.register(two, text, 4)
    cache.release(one)
    three = run(cache, other[:4])
    assert three.pages == one.pages
    cache.register(two, text, 8)
    assert hit(cache, text) == 0 and hit(cache, tokens(*range(20, 24), *range(4, 9))) == 4
    cache.check_integrity([two, three])


def test_answers_are_registered_by_the_run_each_in_a_step_of_its_own() -> None:
    cache = KVCache(20 * ANSWER_RUN, SIZE)
    dues = set()
    for first in range(ANSWER_RUN):
        text = tokens(-first, *range(2 * SIZE - 1))
        holding = run(cache, text)
        due = holding.index_at
        assert 2 * SIZE < due <= (2 + ANSWER_RUN) * SIZE and due % SIZE == 0
        dues.add(due)
        text.extend(range(due - len(text) + 1))
        cache.grow(holding, len(text))
        cache.register(holding, text, due)
        assert holding.index_at == due + ANSWER_RUN * SIZE and hit(cache, text) == due
        cache.release(holding)
    assert len(dues) == ANSWER_RUN


def test_a_registration_that_failed_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, text = KVCache(10, SIZE), tokens(*range(12))
    holding = cache.open(chain := cache.chain(0, ""), cache.match(chain, text))
    cache.grow(holding, 12)
    cut = Chain.reach

    def fails(self: Chain, page: int, tokens: array) -> None:
        raise MemoryError

    monkeypatch.setattr(Chain, "reach", fails)
    with pytest.raises(MemoryError):
        cache.register(holding, text, 12)
    monkeypatch.setattr(Chain, "reach", cut)
    cache.register(holding, text, 12)
    assert hit(cache, text) == 0
    cache.check_integrity([holding])
    cache.release(holding)
    cache.check_integrity([])


def test_eviction_shortens_chains_from_the_end() -> None:
    cache = KVCache(4, SIZE)
    text = tokens(*range(13))
    chain = cache.chain(0, "")
    holding = cache.open(chain, cache.match(chain, text))
    cache.grow(holding, 12)
    cache.register(holding, text, 12)
    cache.release(holding)
    found = []
    for _ in range(3):
        found.append(hit(cache, text))
        other = cache.open(cache.chain(0, "x"), cache.match(cache.chain(0, "x"), tokens(1)))
        assert cache.grow(other, 1) is not None
    assert found == [12, 8, 4]
    assert hit(cache, text) == 0


def test_the_least_recently_used_prefix_goes_first() -> None:
    cache = KVCache(4, SIZE)
    texts = [tokens(*([n] * 5)) for n in range(3)]
    for text in texts:
        chain = cache.chain(0, "")
        holding = cache.open(chain, cache.match(chain, text))
        cache.grow(holding, 4)
        cache.register(holding, text, 4)
        cache.release(holding)
    chain = cache.chain(0, "")
    cache.release(cache.open(chain, cache.match(chain, texts[0])))  # used again
    blank = cache.open(cache.chain(0, "x"), cache.match(cache.chain(0, "x"), tokens(1)))
    cache.grow(blank, SIZE)
    assert [hit(cache, text) for text in texts] == [4, 0, 4]


def test_children_do_not_outlive_a_parent_that_another_registered() -> None:
    """Two compute the same first page at once; the second's next page hangs below the first's."""
    cache = KVCache(6, SIZE)
    text = tokens(*range(9))
    one, two = (cache.open(chain, cache.match(chain, text)) for chain in (cache.chain(0, ""),) * 2)
    cache.grow(one, 4)
    cache.grow(two, 9)
    cache.register(one, text, 4)
    cache.register(two, text, 8)
    assert hit(cache, text) == 8
    cache.release(one)
    cache.check_integrity([two])
    assert cache.available == 2 and cache.cached == 1
    cache.grow(one := cache.open(cache.chain(0, "x"), cache.match(two.chain, tokens(1))), 8)
    assert hit(cache, text) == 0  # the first page was evicted; its child is not garbage
    cache.check_integrity([one, two])
    cache.release(two)
    assert cache.cached == 0
    cache.check_integrity([one])


def test_forget_takes_what_one_registered_and_all_below_it() -> None:
    cache = KVCache(12, SIZE)
    good = run(cache, tokens(*range(5)))
    bad = run(cache, tokens(*range(9)))
    below = run(cache, tokens(*range(13)))
    cache.release(bad)
    cache.forget(bad)  # also after its release
    assert hit(cache, tokens(*range(13))) == 4
    cache.check_integrity([good, below])
    cache.register(below, tokens(*range(17)), 16)  # its parent is gone: not found, not garbage
    cache.check_integrity([good, below])
    for holding in (good, below):
        cache.release(holding)
    cache.check_integrity([])
    assert cache.cached == 1


def test_grow_gives_new_pages_or_changes_nothing() -> None:
    cache = KVCache(3, SIZE)
    chain = cache.chain(0, "")
    holding = cache.open(chain, cache.match(chain, tokens(1)))
    assert len(cache.grow(holding, 4) or ()) == 1
    assert cache.grow(holding, 4) == []
    assert cache.grow(holding, 13) is None
    assert holding.capacity == 4 and cache.available == 1


def test_release_happens_once() -> None:
    cache = KVCache(3, SIZE)
    holding = run(cache, tokens(1, 2))
    cache.release(holding)
    with pytest.raises(RuntimeError, match="twice"):
        cache.release(holding)
    with pytest.raises(RuntimeError, match="gave back"):
        cache.check_integrity([holding])


def test_prefix_caching_can_be_off() -> None:
    cache = KVCache(4, SIZE, prefix_caching=False)
    text = tokens(*range(9))
    holding = run(cache, text)
    assert hit(cache, text) == 0
    cache.release(holding)
    assert cache.cached == 0
    cache.check_integrity([])


def test_clear_forgets_everything() -> None:
    cache = KVCache(4, SIZE)
    text = tokens(*range(9))
    holding = run(cache, text)
    cache.release(holding)
    cache.clear()
    assert hit(cache, text) == 0
    assert cache.available == 3
    cache.forget(holding)  # entries of before mean nothing now
    cache.check_integrity([])


def test_a_hit_tells_how_many_of_its_pages_nobody_holds() -> None:
    cache = KVCache(8, SIZE)
    short, long = run(cache, tokens(*range(5))), run(cache, tokens(*range(13)))
    cache.release(long)
    found = cache.match(cache.chain(0, ""), tokens(*range(13)))
    assert (found.tokens, found.idle_pages) == (12, 2)
    cache.release(short)
    assert cache.match(cache.chain(0, ""), tokens(*range(13))).idle_pages == 3


def test_long_prefixes_are_cut_in_runs_and_found_whole() -> None:
    """As page by page, whatever the runs: also where the hit ends within one."""
    pages = 2 * RUN + 3
    cache, text = KVCache(9 * RUN, SIZE), tokens(*range(SIZE * pages + 1))
    first = run(cache, text)
    by_page = Chain(SIZE, first.chain._salt)
    for page in range(pages):
        by_page.reach(page, text[: SIZE * (page + 1)])  # no more is known yet
    assert by_page.blocks == first.chain.blocks and len(by_page.blocks) == pages
    assert hit(cache, text) == SIZE * pages
    for same in (0, 1, RUN - 1, RUN, RUN + 5, pages - 1):
        other = text[:]
        other[SIZE * same] = -1
        chain = cache.chain(0, "")
        found = cache.match(chain, other)
        assert found.tokens == SIZE * same
        assert len(chain.blocks) <= same + RUN  # no more than a run beyond what was found
    assert cache.match(cache.chain(0, ""), text, limit=SIZE * (RUN + 2)).tokens == SIZE * (RUN + 2)
