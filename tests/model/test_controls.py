"""Controls of slots against plain NumPy statements: packed, filled, applied, recorded."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shaping import shaped

from quire.model.mesh import default_mesh
from quire.model.plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, Sampler, SlotControls, SlotInit
from quire.model.sampling.choose import sample
from quire.model.sampling.control_inputs import control_buffers, empty_buffer, make_fill
from quire.model.sampling.controls import MAX_COUNT, NO_ID, abstract_controls, bar, controls_bytes
from quire.model.slots import SLOT_WORDS, SlotRows, init_words

VOCAB, SLOTS = 203, 7
fill = jax.jit(make_fill())
NONE_HELD_OFF = jnp.full((1, 1), NO_ID)
reshape = jax.jit(
    lambda state, slot, on, logits: state.rows(slot, on).reshape(
        logits, jnp.broadcast_to(NONE_HELD_OFF, (len(logits), 1))
    )
)
record = jax.jit(lambda state, slot, tokens: state.record(slot, tokens))


def ints(*values):
    return np.array(values, np.int32)


def controls(slot=0, prompt=(), output=(), **fields):
    if fields.get("allowed") is not None:
        fields["allowed"] = ints(*fields["allowed"])
    return SlotControls(slot, ints(*prompt), ints(*output), **fields)


def fresh(vocab=VOCAB):
    """Entries of earlier owners: everything that could leak is set."""
    abstract = abstract_controls(SLOTS, vocab, default_mesh())
    return jax.tree.map(lambda a: jnp.full(a.shape, 3, a.dtype), abstract)


def filled(*all_controls, vocab=VOCAB):
    state = fresh(vocab)
    for buffer in control_buffers(all_controls, SLOTS):
        state = fill(state, buffer)
    return state


OUTPUT = (5, 9, 5, 5, 17, 9, 40)
PROMPT = (1, 2, 3, 5, 31, 32, 63, 64, 202)
ALONE = {
    "repetition": {"repetition_penalty": 1.7},
    "repetition below 1": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.3},
    "frequency": {"frequency_penalty": -0.7},
    "bias": {"logit_bias": ((0, 2.5), (202, -100.0), (77, 0.25))},
    "allowed": {"allowed": (0, 31, 32, 95, 202)},
    "one token": {"bad_words": ((8,), (202,))},
    "several tokens": {"bad_words": ((9, 40, 11), (40, 12), (9, 41, 13), (17, 40, 14))},
    "longest": {"bad_words": ((*OUTPUT, 19), (6, *OUTPUT[1:], 20))},
}
MIXED = {
    "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3,
    "logit_bias": ((9, 3.0), (10, -2.0)), "allowed": (5, 9, 10, 11, 40, 80, 202),
    "bad_words": ((40, 9), (11,)),
}  # fmt: skip
CASES = {**ALONE, "all": MIXED, "nothing": {}}


def some_logits(rows, vocab=VOCAB, seed=0):
    return (4 * np.random.default_rng(seed).standard_normal((rows, vocab))).astype(np.float32)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_each_control_alone(fields):
    c = controls(2, PROMPT, OUTPUT, **fields)
    logits = some_logits(1)
    want = shaped(logits[0], c)
    assert fields == {} or (want != logits[0]).any()
    close(reshape(filled(c), ints(2), np.array([True]), logits)[0], want)


def test_rows_of_one_batch_are_each_reshaped_by_their_own():
    """All at once, in another order than their slots, a row without controls among them."""
    cases = [controls(s, PROMPT, OUTPUT[: 2 + s], **f) for s, f in enumerate((
        ALONE["repetition"], MIXED, ALONE["bias"], ALONE["allowed"], ALONE["several tokens"],
        ALONE["frequency"],
    ))]  # fmt: skip
    slot, on = ints(3, 6, 0, 5, 1, 4, 2), np.array([True, False, True, True, True, True, True])
    logits = some_logits(7)
    got = np.asarray(reshape(filled(*cases), slot, on, logits))
    np.testing.assert_array_equal(got[1], logits[1])  # slot 6: an earlier owner's entry
    for row in (0, 2, 3, 4, 5, 6):
        close(got[row], shaped(logits[row], cases[slot[row]]))
        alone = reshape(filled(cases[slot[row]]), slot, on, logits)[row]
        np.testing.assert_array_equal(got[row], alone)


def test_nothing_of_an_earlier_owner_is_left():
    for fields in (MIXED, ALONE["longest"]):
        state = filled(controls(0, PROMPT, OUTPUT, **fields))
        for buffer in control_buffers([controls(0)], SLOTS):
            state = fill(state, buffer)
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a[0], b[0]), state, filled(controls())
        )
    logits = some_logits(1)
    np.testing.assert_array_equal(reshape(state, ints(0), np.array([True]), logits), logits)


def test_other_entries_stay_and_an_empty_buffer_changes_nothing():
    before = filled(controls(1, PROMPT, OUTPUT, **MIXED))
    after = fill(before, empty_buffer(SLOTS))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    for buffer in control_buffers([controls(0), controls(2)], SLOTS):
        after = fill(after, buffer)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), before, after)


def test_recording_outputs_equals_starting_with_them():
    """So a preempted row goes on as if it had not been."""
    state = filled(*(controls(s, PROMPT, **MIXED) for s in (1, 4)))
    for token in OUTPUT:
        # The padding row is dropped, wherever it reads.
        state = record(state, ints(4, 1, SLOTS), ints(token, 202 - token, 7))
    turned = tuple(202 - t for t in OUTPUT)
    want = filled(controls(4, PROMPT, OUTPUT, **MIXED), controls(1, PROMPT, turned, **MIXED))
    jax.tree.map(np.testing.assert_array_equal, state, want)


def test_counts_stay_at_their_largest():
    state = filled(controls(0, output=[3] * (MAX_COUNT + 5)), controls(1, output=[3] * 9))
    assert state.counts[0, 3] == MAX_COUNT
    state = record(state, ints(0, 1), ints(3, 3))
    assert state.counts[:2, 3].tolist() == [MAX_COUNT, 10]


def test_more_than_one_buffer_holds():
    """Many slots with many words each: 90,000 token ids, every third of them in the prompt."""
    vocab = 90_000
    prompt, allowed = np.arange(0, vocab, 3), np.arange(vocab // 2)
    all_controls = [
        controls(s, prompt + s % 2, [s], repetition_penalty=2.0, allowed=allowed)
        for s in range(SLOTS)
    ]
    assert len(list(control_buffers(all_controls, SLOTS))) > 7
    state = filled(*all_controls, vocab=vocab)
    logits = np.ones((SLOTS, vocab), np.float32)
    got = np.asarray(reshape(state, np.arange(SLOTS), np.ones(SLOTS, bool), logits))
    for slot in range(SLOTS):
        want = np.ones(vocab)
        want[prompt + slot % 2], want[slot], want[vocab // 2 :] = 0.5, 0.5, -np.inf
        np.testing.assert_array_equal(got[slot], want)


def test_every_bad_word_has_room():
    words = tuple((OUTPUT[-1], 100 + i) for i in range(MAX_BAD_WORDS))
    c = controls(0, output=OUTPUT, bad_words=words)
    logits = some_logits(1)
    close(reshape(filled(c), ints(0), np.array([True]), logits)[0], shaped(logits[0], c))
    assert len(OUTPUT) + 1 == MAX_BAD_WORD_TOKENS  # "longest" above is the longest


def rows(*inits):
    words = np.zeros((len(inits), SLOT_WORDS), np.int32)
    for init, row in zip(inits, words, strict=True):
        init_words(init, row)
    return SlotRows(jnp.asarray(words))


@pytest.mark.parametrize(
    ("barred", "left"),
    [((1, 2, -1, -1), {0, 3, 4}), ((0, 1, 3, 4), {2}), ((4, 3, 2, 1), {0}), ((2, 2, 2, 2), {2})],
    ids=str,
)
def test_barring_takes_no_rows_last_token(barred, left):
    """The row can choose 0 to 4; in the last case, 2 alone, which comes up four times."""
    logits = np.zeros((1, 5), np.float32)
    if len(left) == 1 and len(set(barred)) == 1:
        logits[0, [0, 1, 3, 4]] = -np.inf
    got = np.asarray(bar(jnp.asarray(logits), ints(barred)[None]))[0]
    assert set(np.flatnonzero(got > -np.inf)) == left


def test_where_every_allowed_token_is_barred_bars_give_way():
    """Bad words first, then the stop ids that min_tokens holds off."""
    cases = [
        controls(0, allowed=(8,), bad_words=((8,),)),
        controls(1, allowed=(8, 9), bad_words=((8,),)),
        controls(2, allowed=(8, 9), bad_words=((8,),)),
        controls(3, allowed=(8, 9), bad_words=((8,), (9,))),
    ]
    stops = [(), (), (9,), (9,)]
    init = [
        SlotInit(slot=s, position=0, remaining=9, min_remaining=2, stop_ids=ids, controlled=True)
        for s, ids in enumerate(stops)
    ]
    slot_rows = rows(*init)
    on = filled(*cases)
    logits = some_logits(4)
    logits[:, 8], logits[:, 9] = -7, -8
    for sampled in (slot_rows, rows(*(dataclasses.replace(i, temperature=1.0) for i in init))):
        got = sample(jnp.asarray(logits), sampled, Sampler.FULL, on, jnp.arange(4))
        # 9 may not end the third row yet, but is all there is; the fourth can still choose 8.
        assert got.tokens.tolist() == [8, 9, 9, 8]
        halves = sample(jnp.asarray(logits), sampled, Sampler.FULL, on, jnp.arange(4), 2)
        halves, got = (dataclasses.replace(all_of, spent=None) for all_of in (halves, got))
        jax.tree.map(np.testing.assert_array_equal, halves, got)
        assert not got.not_finite.any()


def test_bytes_are_those_of_the_arrays():
    assert controls_bytes(SLOTS, VOCAB) == sum(a.nbytes for a in jax.tree.leaves(fresh()))
