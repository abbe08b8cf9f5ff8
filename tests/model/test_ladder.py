"""The ladder: every step finds a rung, the rungs are few, the padding is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import InvalidConfig
from quire.model.ladder import MAX_PROGRAMS, Bucket, Ladder, Sampler, make_ladder

sizes = st.tuples(st.integers(1, 2048), st.integers(1, 16384)).map(lambda p: (p[0], p[0] + p[1]))


@given(sizes, st.integers(6, MAX_PROGRAMS))
def test_default_ladder_is_short_and_reaches_both_ends(size, max_programs):
    rows, tokens = size
    ladder = make_ladder(rows, tokens, max_programs=max_programs)
    assert len(ladder) <= max_programs
    assert (ladder.max_rows, ladder.max_tokens) == (rows, tokens)


@given(sizes, st.sampled_from(Sampler), st.data())
def test_every_step_fits_and_takes_the_smallest_rung_of_its_sampler(size, sampler, data):
    max_rows, max_tokens = size
    ladder = make_ladder(max_rows, max_tokens)
    rows = data.draw(st.integers(1, max_rows))
    decode_only = data.draw(st.booleans())
    tokens = rows if decode_only else data.draw(st.integers(rows, max_tokens))
    rung = ladder.choose(tokens, rows, sampler, decode_only=decode_only)
    assert rung.tokens >= tokens and rung.rows >= rows and rung.sampler >= sampler
    # A step with a prompt chunk cannot run on a decode rung, whose tokens come from the device.
    assert decode_only or not rung.decode_only
    fitting = [
        b for b in ladder.buckets
        if b.sampler == sampler and b.tokens >= tokens and b.rows >= rows
        and (decode_only or not b.decode_only)
    ]  # fmt: skip
    assert rung.tokens <= min(b.tokens for b in fitting)


def test_default_ladder_of_a_gpu():
    ladder = make_ladder(256, 2048)
    greedy = [(b.tokens, b.rows) for b in ladder.buckets if b.sampler == Sampler.GREEDY]
    assert [t for t, r in greedy if t == r] == [1, 8, 16, 32, 64, 128, 256]
    assert (2048, 256) in greedy and (64, 8) in greedy
    assert len(ladder) <= MAX_PROGRAMS


def test_padding_bound_is_the_worst_of_all_row_counts():
    ladder = make_ladder(256, 2048)
    worst = max(
        1 - n / ladder.choose(n, n, Sampler.GREEDY, decode_only=True).rows for n in range(1, 257)
    )
    assert ladder.padding_bound() == pytest.approx(worst)


def test_no_rung_is_an_error_not_a_wrong_program():
    ladder = Ladder([Bucket(4, 4, Sampler.GREEDY), Bucket(16, 4, Sampler.FULL)])
    for tokens, rows, sampler in [(5, 5, 0), (17, 2, 0), (5, 5, 2)]:
        with pytest.raises(ValueError, match="no step program"):
            ladder.choose(tokens, rows, Sampler(sampler), decode_only=tokens == rows)


def test_too_small_a_budget_is_refused():
    with pytest.raises(InvalidConfig, match="max_batched_tokens: got 8"):
        make_ladder(8, 8)
    with pytest.raises(InvalidConfig, match="max_programs: got 5"):
        make_ladder(8, 64, max_programs=5)


def test_a_ladder_must_hold_the_largest_step():
    rungs = [Bucket(8, 8, s) for s in Sampler]
    with pytest.raises(InvalidConfig, match="no rung of the richest sampler"):
        Ladder([*rungs, Bucket(64, 4, Sampler.FULL)])
