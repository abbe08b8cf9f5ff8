"""The ladder: every step finds a rung, the rungs are few, the padding is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import InvalidConfig
from quire.model.ladder import MAX_PROGRAMS, Bucket, Ladder, Sampler, make_ladder

sizes = st.tuples(st.integers(1, 2048), st.integers(1, 16384)).map(lambda p: (p[0], p[0] + p[1]))


@given(sizes, st.integers(12, MAX_PROGRAMS), st.integers(1, 8))
def test_default_ladder_is_short_and_reaches_both_ends(size, max_programs, max_k):
    rows, tokens = size
    ladder = make_ladder(rows, tokens, max_programs=max_programs, max_k=max_k)
    assert ladder.num_programs <= max_programs
    assert (ladder.max_rows, ladder.max_tokens, ladder.max_k) == (rows, tokens, max_k)


def test_programs_are_all_counted():
    """Those of a ladder by hand; test_runner.py holds the count against what is compiled."""
    greedy = [Bucket(4, 4, Sampler.GREEDY), Bucket(4, 4, Sampler.GREEDY, 3)]
    full = [Bucket(4, 4, Sampler.FULL), Bucket(16, 4, Sampler.FULL), Bucket(16, 8, Sampler.FULL)]
    # Five rungs, two row counts to sample for, score, controls, admit, state.
    assert Ladder([*greedy, *full]).num_programs == 5 + 2 + 4
    # The same forwards, one of them with a row count that is sampled for already.
    sampled = [Bucket(4, 4, Sampler.SAMPLE), Bucket(16, 3, Sampler.SAMPLE)]
    assert Ladder([*greedy, *full, *sampled]).num_programs == 5 + 1 + 3 + 4


def test_a_forward_leaves_as_many_logits_as_the_next_decode_rung():
    sampled = [Bucket(n, n, Sampler.SAMPLE) for n in (4, 8)]
    mixed = [Bucket(16, n, Sampler.FULL) for n in (3, 7, 9)]
    ladder = Ladder([*sampled, *mixed, Bucket(16, 6, Sampler.GREEDY)])
    assert [ladder.logit_rows(b) for b in mixed] == [4, 8, 9]
    assert ladder.logit_rows(Bucket(16, 6, Sampler.GREEDY)) == 6
    S, F = Sampler.SAMPLE, Sampler.FULL
    assert ladder.samples == ((4, S), (4, F), (8, S), (8, F), (9, F))


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


def test_a_few_decode_rows_may_take_a_mixed_rung_that_is_smaller():
    ladder = make_ladder(1024, 2048, max_programs=25)  # its decode rungs were thinned out
    rung = ladder.choose(2, 2, Sampler.GREEDY, decode_only=True)
    assert (rung.tokens, rung.rows) == (64, 56)


def test_default_ladder_of_a_gpu():
    ladder = make_ladder(1024, 2048)
    shapes = {s: [(b.tokens, b.rows) for b in ladder.buckets if b.sampler == s] for s in Sampler}
    decode = {s: [t for t, r in of if t == r] for s, of in shapes.items()}
    mixed = {s: [t for t, r in of if t > r >= t / 2] for s, of in shapes.items()}
    few = {s: [(t, r) for t, r in of if r < t / 2] for s, of in shapes.items()}
    assert decode[Sampler.GREEDY] == [1, 32, 64, 128, 256, 384, 512, 768, 1024]
    assert mixed[Sampler.GREEDY] == [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert decode[Sampler.SAMPLE] == [1, 32, 64, 128, 256, 512, 1024]
    assert mixed[Sampler.SAMPLE] == [64, 128, 256, 512, 1024, 2048]
    assert few == {
        Sampler.GREEDY: [(32, 8), (1024, 64), (2048, 64)],
        Sampler.SAMPLE: [],
        Sampler.FULL: [],
    }
    assert shapes[Sampler.FULL] == [
        (32, 32), (128, 112), (128, 128), (256, 224), (256, 256), (1024, 896), (1024, 1024),
        (2048, 1024),
    ]  # fmt: skip
    assert set(shapes[Sampler.FULL]) <= set(shapes[Sampler.SAMPLE])  # no forward of its own
    assert len(ladder.forwards) == len(shapes[Sampler.SAMPLE])
    sampled = {s: [rows for rows, of in ladder.samples if of == s] for s in Sampler}
    assert sampled[Sampler.SAMPLE] == decode[Sampler.SAMPLE]
    assert sampled[Sampler.FULL] == [32, 128, 256, 1024]
    assert ladder.num_programs == 50


def test_sizes_halfway_between_where_there_is_room_for_their_programs():
    ladder = make_ladder(256, 2048)
    greedy = [b.rows for b in ladder.buckets if b.decode_only and b.sampler == Sampler.GREEDY]
    assert greedy == [1, 8, 16, 32, 64, 128, 192, 256]
    rung = ladder.choose(160, 160, Sampler.GREEDY, decode_only=True)
    assert rung.decode_only and rung.rows == 192
    assert ladder.num_programs == 49


def test_prompts_that_come_alone_pay_for_few_rows():
    """And none of those rungs takes what has more rows, or cuts prompts that come with answers."""
    ladder = make_ladder(1024, 2048)
    greedy = Sampler.GREEDY
    for tokens, rows, expected in [
        (7, 1, (32, 8)), (32, 8, (32, 8)), (32, 9, (64, 56)), (33, 1, (64, 56)),
        (800, 1, (1024, 64)), (1024, 64, (1024, 64)), (1024, 65, (1024, 896)),
        (1025, 2, (1536, 1024)), (2048, 1, (2048, 64)), (2048, 300, (2048, 1024)),
    ]:  # fmt: skip
        rung = ladder.choose(tokens, rows, greedy, decode_only=False)
        assert (rung.tokens, rung.rows, rung.sampler) == (*expected, greedy)
    assert ladder.choose(8, 8, greedy, decode_only=True).decode_only
    # A chunk is cut to a size that there is for any number of rows, too.
    few = {b.tokens for b in ladder.buckets if b.rows * 2 < b.tokens > 64}
    assert few <= {b.tokens for b in ladder.buckets if b.rows * 2 >= b.tokens > b.rows}
    # Where compiling is dear there are none.
    assert all(b.rows * 2 >= b.tokens for b in make_ladder(1024, 2048, max_programs=39).buckets)


def test_chunks_are_cut_to_rungs():
    ladder = make_ladder(1024, 2048)
    wanted = (1, 64, 65, 129, 768, 769, 2048, 9999)
    assert [ladder.chunk_size(n, Sampler.GREEDY) for n in wanted] == [
        32, 64, 128, 192, 768, 1024, 2048, 2048
    ]  # fmt: skip
    assert [ladder.chunk_size(n, Sampler.SAMPLE) for n in wanted] == [
        64, 64, 128, 256, 1024, 1024, 2048, 2048
    ]  # fmt: skip


def test_ladder_with_several_tokens_a_dispatch():
    ladder = make_ladder(256, 2048, max_k=4)
    assert ladder.num_programs == 50
    assert [ladder.most_k(n, Sampler.GREEDY) for n in (1, 8, 64, 65, 256)] == [4, 4, 4, 1, 1]
    assert [ladder.most_k(n, Sampler.FULL) for n in (1, 64)] == [1, 1]
    for sampler, rows in [(Sampler.GREEDY, 1), (Sampler.SAMPLE, 8)]:
        rung = ladder.choose(1, 1, sampler, decode_only=True, k=4)
        assert (rung.rows, rung.sampler, rung.k) == (rows, sampler, 4)
    with pytest.raises(ValueError, match="k=4"):
        ladder.choose(65, 65, Sampler.GREEDY, decode_only=True, k=4)
    with pytest.raises(ValueError, match="k=2"):
        ladder.choose(1, 1, Sampler.GREEDY, decode_only=True, k=2)


@given(sizes, st.sampled_from(Sampler), st.integers(1, 2048))
def test_single_tokens_never_take_a_rung_of_several(size, sampler, rows):
    ladder = make_ladder(*size, max_k=4)
    rows = min(rows, ladder.max_rows)
    assert ladder.choose(rows, rows, sampler, decode_only=True).k == 1
    if ladder.most_k(rows, sampler) == 4:
        rung = ladder.choose(rows, rows, sampler, decode_only=True, k=4)
        assert rung.k == 4 and rung.rows >= rows and rung.sampler >= sampler


def test_what_has_no_program_is_no_rung():
    for rung in (Bucket(4, 4, Sampler.FULL, 2), Bucket(16, 4, Sampler.GREEDY, 2)):
        with pytest.raises(InvalidConfig, match="only GREEDY and SAMPLE decode rungs"):
            Ladder([rung, Bucket(16, 4, Sampler.FULL)])


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
    with pytest.raises(InvalidConfig, match="max_programs: got 9, must be at least 10"):
        make_ladder(8, 64, max_programs=9)
    with pytest.raises(InvalidConfig, match="max_programs: got 11, must be at least 12"):
        make_ladder(8, 64, max_programs=11, max_k=2)


def test_a_ladder_must_hold_the_largest_step():
    rungs = [Bucket(8, 8, s) for s in Sampler]
    with pytest.raises(InvalidConfig, match="no rung of the richest sampler"):
        Ladder([*rungs, Bucket(64, 4, Sampler.FULL)])
