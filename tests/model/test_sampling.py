"""Sampling against plain NumPy statements of its definitions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.model.plan import MAX_LOGPROBS, Sampler, SlotInit
from quire.model.sampling.choose import row_keys
from quire.model.sampling.choose import sample as sample_traced
from quire.model.sampling.logprobs import top_k
from quire.model.sampling.truncate import _last_kept, truncate
from quire.model.slots import SLOT_WORDS, SlotRows, init_words

VOCAB = 97


def slot_rows(*inits: SlotInit) -> SlotRows:
    words = np.zeros((len(inits), SLOT_WORDS), np.int32)
    for init, row in zip(inits, words, strict=True):
        init_words(init, row)
    return SlotRows(jnp.asarray(words))


def init(**fields) -> SlotInit:
    return SlotInit(slot=0, position=0, remaining=100, **fields)


def kept_by_definition(logits, top_k, top_p, min_p):
    """Sorts, which the real one never does; thresholds by value, so that ties stay together."""
    logits = logits.astype(np.float64)
    ordered = np.sort(logits)[::-1]
    kept = np.ones(len(logits), bool)
    if top_k:
        kept &= logits >= ordered[min(top_k, len(logits)) - 1]
    probs = np.where(kept, np.exp(logits - logits.max()), 0)
    probs /= probs.sum()
    if top_p < 1:
        by_value = np.sort(probs)[::-1]
        last = np.searchsorted(np.cumsum(by_value), top_p * (1 - 1e-6))
        kept &= probs >= by_value[min(last, len(by_value) - 1)]
    return kept & (probs >= min_p * probs.max())


def margins(logits, top_k, top_p):
    """How far each running sum of what top_k leaves of probabilities is from top_p: where it is
    nil, float32 decides."""
    probs = np.sort(np.exp(logits.astype(np.float64) - logits.max()))[::-1]
    if top_k:
        probs = probs[probs >= probs[min(top_k, len(probs)) - 1]]
    return np.abs(np.cumsum(probs / probs.sum()) - top_p).min()


@jax.jit
def truncate_jit(logits, top_k, top_p, min_p, temperature=1.0):
    rows = len(logits)
    return truncate(
        logits, logits.max(-1), jnp.full(rows, temperature, jnp.float32), top_k, top_p, min_p
    )


sample = jax.jit(sample_traced, static_argnums=2, static_argnames="at_once")


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    coarse=st.booleans(),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 96, 97, 500]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_truncation_keeps_what_the_definition_keeps(seed, scale, coarse, top_k, top_p, min_p):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal(VOCAB)).astype(np.float32)
    if coarse:  # many ties, as in bfloat16
        logits = np.round(logits * 2) / 2
    want = kept_by_definition(logits, top_k, top_p, min_p)
    got = truncate_jit(
        logits[None], jnp.array([top_k]), jnp.array([top_p]), jnp.array([min_p], jnp.float32)
    )[0]
    if top_p < 1 and margins(logits, top_k, top_p) < 2e-6:
        return  # which side of the sum the threshold falls on is rounding
    differ = np.flatnonzero(np.asarray(got) != want)
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    # At the very edge of min_p, float32 and float64 may disagree.
    assert all(abs(ratio[i] - min_p) < 1e-6 for i in differ), (differ, ratio[differ])


def test_rows_are_truncated_each_by_its_own_parameters():
    logits = np.random.default_rng(0).standard_normal((6, VOCAB)).astype(np.float32)
    top_k = np.array([0, 3, 0, 10, 0, 1], np.int32)
    top_p = np.array([1.0, 1.0, 0.4, 0.7, 1.0, 0.5], np.float32)
    min_p = np.array([0.0, 0.0, 0.0, 0.1, 0.2, 0.0], np.float32)
    got = np.asarray(truncate_jit(logits, top_k, top_p, min_p))
    for row in range(6):
        want = kept_by_definition(logits[row], top_k[row], float(top_p[row]), float(min_p[row]))
        np.testing.assert_array_equal(got[row], want)


@pytest.mark.parametrize("digit_bits", [1, 2, 4])
def test_thresholds_are_exact_in_digits_of_any_size(digit_bits):
    """A GPU takes two bits at a time, a CPU one. Logits of all magnitudes, some equal."""
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal((8, VOCAB)) * 10.0 ** rng.integers(-30, 30, VOCAB)).astype("f4")
    logits[:, ::7], logits[:, 5] = logits[:, 1:2], -np.inf
    top_k = np.array([0, 1, 2, 40, VOCAB, 500, 0, 3], np.int32)
    top_p = np.array([1, 1, 1, 1, 1, 1, 0.5, 0.9], np.float32)
    ones, peak = jnp.ones(8), logits.max(-1)
    found = np.asarray(_last_kept(digit_bits, logits, peak, ones, top_k, top_p))
    ordered = np.sort(logits)[:, ::-1]
    for row, k in enumerate(top_k[:6]):
        want = ordered[row, k - 1] if 0 < k <= VOCAB else -np.inf
        assert found[row] == want or (want == -np.inf and found[row] < ordered[row, -2])
    for row in (6, 7):  # a mass that few magnitudes away from the largest have a part in
        floor = ordered[row, top_k[row] - 1] if top_k[row] else -np.inf
        assert found[row] == peak[row] or found[row] >= floor
        kept = np.exp(ordered[row] - peak[row]) * (ordered[row] >= found[row])
        whole = np.exp(ordered[row] - peak[row]) * (ordered[row] >= floor)
        assert kept.sum() >= top_p[row] * whole.sum() * (1 - 1e-6)


def test_ties_with_the_last_one_kept_are_kept():
    logits = np.array([[3.0, 2.0, 2.0, 2.0, 1.0]], np.float32)
    kept = truncate_jit(logits, jnp.array([2]), jnp.array([1.0]), jnp.array([0.0]))
    assert kept[0].tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("top_p", [1e-30, 1e-40, 1e-50])
def test_a_top_p_too_small_for_float32_keeps_the_likeliest(top_p):
    logits = np.array([[0.0, 1.0, 3.0, 2.0]], np.float32)
    kept = truncate_jit(logits, jnp.array([0]), jnp.array([top_p], jnp.float32), jnp.array([0.0]))
    assert kept[0].tolist() == [False, False, True, False]
    rows = slot_rows(init(temperature=1.0, top_p=top_p))
    assert sample(logits, rows, Sampler.SAMPLE).tokens.tolist() == [2]


def test_infinitely_unlikely_tokens_are_never_kept():
    logits = np.array([[0.0, -np.inf, -1.0]], np.float32)
    kept = truncate_jit(logits, jnp.array([0]), jnp.array([1.0]), jnp.array([0.0]))
    assert kept[0].tolist() == [True, False, True]


def test_a_draw_is_gumbel_max_with_the_key_of_seed_choice_and_index():
    """The stream, written out with jax.random alone."""
    logits = np.random.default_rng(1).standard_normal((1, VOCAB)).astype(np.float32)
    for seed, choice, index in [(0, 0, 0), (2**63 + 12345, 0, 7), (2**64 - 1, 3, 1000)]:
        rows = slot_rows(init(temperature=0.7, seed=seed, choice=choice, sample_index=index))
        words = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, choice), index)
        want = np.argmax(logits[0] / np.float32(0.7) + jax.random.gumbel(key, (VOCAB,)))
        assert sample(logits, rows, Sampler.SAMPLE).tokens.tolist() == [want]


def test_streams_differ_by_seed_choice_and_index():
    seeds = jnp.array([[0, 1], [0, 2], [1, 1], [0, 1], [0, 1]], jnp.uint32)
    keys = row_keys(seeds, jnp.array([0, 0, 0, 1, 0]), jnp.array([0, 0, 0, 0, 1]))
    assert len({tuple(k) for k in jax.random.key_data(keys).tolist()}) == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 6},
        {"temperature": 0.5, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.2},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(fields):
    """Chi-square over 8,000 draws of one distribution over 12 tokens, fixed seeds."""
    draws, vocab = 8000, 12
    logits = np.random.default_rng(3).standard_normal(vocab).astype(np.float32)
    rows = slot_rows(*(init(seed=9, sample_index=i, **fields) for i in range(draws)))
    tokens = sample(jnp.broadcast_to(logits, (draws, vocab)), rows, Sampler.SAMPLE).tokens
    tempered = logits / fields["temperature"]
    kept = kept_by_definition(
        tempered, fields.get("top_k", 0), fields.get("top_p", 1.0), fields.get("min_p", 0.0)
    )
    probs = np.where(kept, np.exp(tempered), 0)
    expected = draws * probs / probs.sum()
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    assert counts[~kept].sum() == 0
    statistic = np.sum((counts[kept] - expected[kept]) ** 2 / expected[kept])
    assert statistic < 35  # beyond the 99.97th percentile with 11 degrees of freedom


def test_greedy_rows_stay_greedy_beside_sampled_ones():
    logits = np.random.default_rng(2).standard_normal((3, VOCAB)).astype(np.float32)
    rows = slot_rows(init(), init(temperature=5.0, seed=1), init())
    for sampler in (Sampler.SAMPLE, Sampler.FULL):
        tokens = sample(logits, rows, sampler).tokens
        assert [tokens[0], tokens[2]] == [logits[0].argmax(), logits[2].argmax()]
    alone = sample(logits[1:2], slot_rows(init(temperature=5.0, seed=1)), Sampler.SAMPLE)
    assert tokens[1] == alone.tokens[0]  # whatever its neighbours


@pytest.mark.parametrize("count", [16, 18, 19])
@pytest.mark.parametrize("sampler", [Sampler.SAMPLE, Sampler.FULL])
def test_some_rows_at_a_time_give_what_all_give(count: int, sampler: Sampler) -> None:
    """To the bit, whether the rows can be divided by eight, only by six, or not at all."""
    logits = np.random.default_rng(6).standard_normal((count, VOCAB)).astype(np.float32)
    logits[count - 2, 3] = np.nan
    rows = slot_rows(*(init(temperature=i % 3, seed=i, top_k=i % 5) for i in range(count)))
    want = sample(logits, rows, sampler)
    got = sample(logits, rows, sampler, at_once=8)
    got, want = (dataclasses.replace(all_of, spent=None) for all_of in (got, want))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert want.not_finite.tolist() == [i == count - 2 for i in range(count)]


def test_logprobs_are_of_the_raw_distribution():
    logits = np.random.default_rng(4).standard_normal((2, VOCAB)).astype(np.float32) * 3
    rows = slot_rows(init(), init(temperature=3.0, top_k=20, seed=5))
    got = sample(logits, rows, Sampler.FULL)
    for row in range(2):
        wide = logits[row].astype(np.float64)
        logprobs = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
        token = int(got.tokens[row])
        assert got.logprobs.chosen[row] == pytest.approx(logprobs[token], abs=1e-5)
        assert got.logprobs.rank[row] == 1 + (logprobs > logprobs[token]).sum()
        best = np.argsort(-logprobs, kind="stable")[:MAX_LOGPROBS]
        assert got.logprobs.top_ids[row].tolist() == best.tolist()
        np.testing.assert_allclose(got.logprobs.top[row], logprobs[best], atol=1e-5)
    assert got.logprobs.rank[0] == 1


@pytest.mark.parametrize("coarse", [False, True])
def test_the_likeliest_in_parts_are_those_of_a_sort(coarse):
    x = np.random.default_rng(5).standard_normal((9, 5000)).astype(np.float32)
    if coarse:  # ties, also across the parts
        x = np.round(x)
    for k in (3, 16, 17, 20):
        *got, _ = top_k(jnp.asarray(x), k)
        jax.tree.map(np.testing.assert_array_equal, got, list(jax.lax.top_k(x, k)))


def test_logprobs_of_a_vocabulary_smaller_than_the_report():
    got = sample(np.zeros((1, 5), np.float32), slot_rows(init()), Sampler.FULL)
    assert got.logprobs.top_ids[0].tolist() == [0, 1, 2, 3, 4] + [-1] * (MAX_LOGPROBS - 5)


def test_min_tokens_holds_off_stop_ids_until_they_are_due():
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, [4, 7]] = [9.0, 8.0]
    rows = slot_rows(init(min_remaining=1, stop_ids=(4,)), init(min_remaining=0, stop_ids=(4,)))
    assert sample(logits, rows, Sampler.SAMPLE).tokens.tolist() == [7, 4]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_logits_are_flagged_in_their_row_alone(bad):
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, 50] = bad
    for sampler in Sampler:
        flags = sample(logits, slot_rows(init(), init(), init()), sampler).not_finite
        assert flags.tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [1e-37, 1e-30, 1e-20, 1e-15, 1e-9, 3e-9, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    """A quotient rounded twice in two ways once left no token to choose from."""
    logits = np.random.default_rng(8).standard_normal((4, VOCAB)).astype(np.float32) * 7
    for fields in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3}, {"top_p": 0.5, "top_k": 9}):
        rows = slot_rows(*(init(temperature=temperature, seed=i, **fields) for i in range(4)))
        tokens = sample(logits, rows, Sampler.SAMPLE).tokens
        assert tokens.tolist() == logits.argmax(-1).tolist(), fields
