"""Step programs against each other and against NumPy: a FULL step in two programs, controls over
whole answers, prompt scores, several tokens a dispatch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from shaping import shaped
from stepping import CONFIG, decode_plan, ints, make_runner, pages, prompt_plan, run, state

from quire.model.ladder import Bucket, Ladder, Sampler
from quire.model.plan import MAX_LOGPROBS, Emit, RunnerSpec, ScoredRow, SlotControls, SlotInit
from quire.model.programs import SCORE, STATE
from quire.model.score import SCORE_ROWS
from quire.model.slots import Word

pytestmark = pytest.mark.xdist_group("steps")

ROWS, K = 4, 3
DECODE = {s: Bucket(ROWS, ROWS, s) for s in Sampler}
MIXED = {s: Bucket(24, ROWS, s) for s in (Sampler.SAMPLE, Sampler.FULL)}
LONG = Bucket(300, ROWS, Sampler.FULL)
AT_ONCE = {s: Bucket(ROWS, ROWS, s, K) for s in (Sampler.GREEDY, Sampler.SAMPLE)}
SPEC = RunnerSpec(
    num_slots=ROWS,
    num_pages=330,
    page_size=4,
    max_pages_per_seq=80,
    max_model_len=320,
    vocab_size=CONFIG.vocab_size,
    ladder=Ladder([*DECODE.values(), *MIXED.values(), LONG, *AT_ONCE.values()]),
    max_k=K,
)
PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9), (3, 2, 3, 8, 4, 6))
NEW = 9
SAMPLED = (
    {"temperature": 0.9, "seed": 1},
    {"temperature": 1.3, "top_k": 20, "seed": 2},
    {},
    {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01, "seed": 3, "choice": 1},
)


@pytest.fixture(scope="module")
def runner():
    return make_runner(SPEC)


@pytest.fixture
def fresh(runner):
    runner.reset()
    return runner


def start(runner, slot, bucket, prompt=None, *, controls=None, done=(), remaining=NEW, **fields):
    """Prefills a prompt and the outputs there are already; the step's outputs."""
    prompt = (*(prompt or PROMPTS[slot]), *done)
    init = SlotInit(
        slot=slot, position=0, remaining=remaining, sample_index=len(done),
        controlled=controls is not None, **fields,
    )  # fmt: skip
    rules = ()
    if controls is not None:
        rules = (dataclasses.replace(controls, slot=slot, output=ints(*done)),)
    plan = prompt_plan(
        prompt, bucket, slot=slot, inits=(init,), page_adds=pages(slot, 1 + 80 * slot, 80),
        controls=rules,
    )  # fmt: skip
    return run(runner, plan)


def answers(runner, sampler, slots, fields, controls=None, steps=NEW, **more):
    """Each slot's tokens, and their log-probabilities where there are any."""
    tokens, logprobs = {s: [] for s in slots}, {s: [] for s in slots}

    def take(outputs, rows):
        for row, slot in enumerate(rows):
            tokens[slot] += outputs.tokens[row, : outputs.n_valid[row]].tolist()
            if outputs.logprobs is not None and outputs.n_valid[row]:
                arrays = dataclasses.astuple(outputs.logprobs)
                logprobs[slot].append([a[row].tolist() for a in arrays])

    for slot in slots:
        rules = None if controls is None else controls[slot]
        options = {**fields[slot], **more}
        take(start(runner, slot, MIXED[sampler], controls=rules, **options), [slot])
    for _ in range(steps - 1):
        take(run(runner, decode_plan(*slots, bucket=DECODE[sampler])), slots)
    return tokens, logprobs


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_full_step_is_the_fused_step_in_two(fresh):
    """Token for token and slot for slot, with stops, limits and min_tokens on the way."""
    plain, _ = answers(fresh, Sampler.SAMPLE, range(ROWS), SAMPLED)
    fields = [dict(f) for f in SAMPLED]
    fields[0]["stop_ids"] = (plain[0][4],)
    fields[1]["remaining"] = 5
    fields[3] |= {"stop_ids": tuple(set(plain[3][:2])), "min_remaining": 4}
    both = []
    for sampler in (Sampler.SAMPLE, Sampler.FULL):
        fresh.reset()
        both.append((answers(fresh, sampler, range(ROWS), fields)[0], state(fresh)))
    equal(*both)
    assert {s: len(t) for s, t in both[0][0].items()}[1] == 5
    assert len(both[0][0][0]) < NEW and both[0][0][0] == plain[0][: len(both[0][0][0])]


def test_a_full_step_in_the_middle_of_a_prompt_emits_and_records_nothing(fresh):
    rules = SlotControls(0, ints(*PROMPTS[0]), ints(), presence_penalty=1.0)
    init = SlotInit(slot=0, position=0, remaining=5, controlled=True)
    plan = prompt_plan(
        PROMPTS[0][:3], MIXED[Sampler.FULL], emit=Emit.NONE, inits=(init,),
        page_adds=pages(0, 1, 80), controls=(rules,),
    )  # fmt: skip
    assert run(fresh, plan).n_valid.tolist() == [0]
    words = state(fresh)[1].words[0]
    assert words[[Word.POSITION, Word.REMAINING, Word.SAMPLE_INDEX]].tolist() == [3, 5, 0]
    assert not np.asarray(fresh._controls.counts).any()
    out = run(fresh, prompt_plan(PROMPTS[0][3:], MIXED[Sampler.FULL], start=3))
    fresh.reset()
    whole = start(fresh, 0, MIXED[Sampler.FULL], controls=rules)
    assert out.tokens.tolist() == whole.tokens.tolist()


def rules(slot, **fields):
    return SlotControls(slot, ints(*PROMPTS[slot]), ints(), **fields)


CONTROLS = (
    rules(0, repetition_penalty=1.8, frequency_penalty=0.4),
    rules(1, allowed=ints(*range(10, 30)), logit_bias=((15, 3.0), (40, 50.0))),
    None,
    rules(3, presence_penalty=2.0, bad_words=((11,), (12, 13)), logit_bias=((12, 4.0), (13, 9.0))),
)
GREEDY = ({}, {}, {}, {})


class Raw:
    """Keeps the logits that forwards hand to `sample`."""

    def __init__(self, runner, monkeypatch):
        self.logits = []
        call_of = runner._call

        def spy(key):
            step = call_of(key)
            if not isinstance(key, Bucket):
                return step

            def call(*args):
                results = step(*args)
                self.logits.append(np.asarray(results[2]))
                return results

            return call

        monkeypatch.setattr(runner, "_call", spy)


def test_controls_over_whole_answers_are_those_of_numpy(fresh, monkeypatch):
    free, _ = answers(fresh, Sampler.FULL, range(ROWS), GREEDY)
    fresh.reset()
    raw = Raw(fresh, monkeypatch)
    got, _ = answers(fresh, Sampler.FULL, range(ROWS), GREEDY, CONTROLS)
    first, later = raw.logits[:ROWS], raw.logits[ROWS:]
    for slot, rule in enumerate(CONTROLS):
        each = [first[slot][0], *(logits[slot] for logits in later)]
        for i, logits in enumerate(each):
            want = logits
            if rule is not None:
                want = shaped(logits, dataclasses.replace(rule, output=ints(*got[slot][:i])))
            assert got[slot][i] == np.argmax(want), (slot, i)
        assert (got[slot] == free[slot]) == (rule is None)


@pytest.mark.parametrize("slot", range(ROWS))
def test_mixed_rows_equal_the_same_rows_alone(fresh, slot):
    together = answers(fresh, Sampler.FULL, range(ROWS), SAMPLED, CONTROLS)
    fresh.reset()
    alone = answers(fresh, Sampler.FULL, [slot], SAMPLED, CONTROLS)
    for mine, theirs in zip(alone, together, strict=True):
        assert mine[slot] == theirs[slot]


def test_controls_of_an_earlier_owner_of_a_slot_are_gone(fresh):
    for later in (None, *CONTROLS[:1]):
        fresh.reset()
        want = answers(fresh, Sampler.FULL, range(ROWS), SAMPLED, [later] * ROWS)
        everything = rules(
            0, repetition_penalty=3.0, presence_penalty=2.0, allowed=ints(7, 8, 9),
            logit_bias=((7, 5.0),), bad_words=((8,), (7, 7)),
        )  # fmt: skip
        answers(fresh, Sampler.FULL, range(ROWS), SAMPLED, [everything] * ROWS)
        assert answers(fresh, Sampler.FULL, range(ROWS), SAMPLED, [later] * ROWS) == want


@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_resumed_row_goes_on_as_if_uninterrupted(fresh, at):
    whole, _ = answers(fresh, Sampler.FULL, range(ROWS), SAMPLED, CONTROLS)
    for slot in range(ROWS):
        fresh.reset()
        done = tuple(whole[slot][:at])
        out = start(
            fresh, slot, MIXED[Sampler.FULL], controls=CONTROLS[slot], done=done,
            remaining=NEW - at, **SAMPLED[slot],
        )  # fmt: skip
        rest = out.tokens[0].tolist()
        while len(rest) < NEW - at:
            rest += run(fresh, decode_plan(slot, bucket=DECODE[Sampler.FULL])).tokens[0].tolist()
        assert [*done, *rest] == whole[slot]


def test_a_stop_id_that_nothing_could_hold_off_ends_no_answer_early(fresh):
    """All that is allowed is a stop id, and min_tokens asks for three tokens first."""
    only = [rules(s, allowed=ints(7)) for s in range(ROWS)]
    got, _ = answers(
        fresh, Sampler.FULL, [0], GREEDY, only, stop_ids=(7,), min_remaining=3, remaining=8
    )
    assert got[0] == [7] * 4


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def test_scores_are_those_of_numpy(fresh, monkeypatch):
    """Two scored prompts beside a decode row, against the logits of their prefixes."""
    raw = Raw(fresh, monkeypatch)
    start(fresh, 0, MIXED[Sampler.FULL])
    prompts = {1: PROMPTS[2], 2: PROMPTS[3]}
    expected = {}
    for slot, prompt in prompts.items():
        for end in range(1, len(prompt) + 1):
            start(fresh, slot, MIXED[Sampler.FULL], prompt[:end])
            expected[slot, end - 1] = log_softmax(raw.logits[-1][0])
    targets = {1: PROMPTS[2][1:], 2: (*PROMPTS[3][1:4], 60)}  # a whole prompt, and a chunk
    plan = prompt_plan((*PROMPTS[2], *PROMPTS[3][:4]), MIXED[Sampler.FULL])
    inits = tuple(SlotInit(slot=s, position=0, remaining=5) for s in prompts)
    plan = dataclasses.replace(
        plan, slots=ints(0, 1, 2), generations=ints(1, 1, 1), starts=ints(5, 0, 0), inits=inits,
        counts=ints(1, 7, 4), emits=ints(Emit.TOKEN, Emit.TOKEN, Emit.NONE), num_decode=1,
        scored=(ScoredRow(2, ints(*targets[2])), ScoredRow(1, ints(*targets[1]))),
    )  # fmt: skip
    out = run(fresh, plan)
    assert out.n_valid.tolist() == [1, 1, 0]
    for slot, got in zip((2, 1), out.scored, strict=True):
        assert got.chosen.shape == got.rank.shape == (len(targets[slot]), 1)
        assert got.top_ids.shape == got.top.shape == (len(targets[slot]), 1, MAX_LOGPROBS)
        for i, token in enumerate(targets[slot]):
            want = expected[slot, i]
            assert got.chosen[i, 0] == pytest.approx(want[token], abs=1e-4)
            assert got.rank[i, 0] == 1 + (want > want[token] + 1e-6).sum()
            best = np.argsort(-want, kind="stable")[:MAX_LOGPROBS]
            assert got.top_ids[i, 0].tolist() == best.tolist()
            np.testing.assert_allclose(got.top[i, 0], want[best], atol=1e-4)


def test_pooled_rows_are_what_logits_are_made_of(fresh, monkeypatch):
    """Two pooled rows beside a decode row, one of them the end of a prompt in two chunks: of length
    1, and the output projection takes each to a multiple of its prompt's logits."""
    raw = Raw(fresh, monkeypatch)
    expected = []
    for prompt in PROMPTS[1:3]:
        start(fresh, 0, MIXED[Sampler.FULL], prompt)
        expected.append(raw.logits[-1][0])
    start(fresh, 0, MIXED[Sampler.FULL])
    alone = run(fresh, decode_plan(0, bucket=DECODE[Sampler.FULL])).tokens[0]
    start(fresh, 0, MIXED[Sampler.FULL])
    first, rest = PROMPTS[2][:4], PROMPTS[2][4:]
    init = SlotInit(slot=2, position=0, remaining=1)
    chunk = prompt_plan(
        first, MIXED[Sampler.FULL], slot=2, inits=(init,), page_adds=pages(2, 161, 80),
        emit=Emit.NONE,
    )  # fmt: skip
    assert run(fresh, chunk).pooled is None
    plan = prompt_plan((*PROMPTS[1], *rest), MIXED[Sampler.FULL])
    plan = dataclasses.replace(
        plan, slots=ints(0, 1, 2), generations=ints(1, 1, 1), starts=ints(5, 0, 4), num_decode=1,
        inits=(SlotInit(slot=1, position=0, remaining=1),), page_adds=pages(1, 81, 80),
        counts=ints(1, 3, 3), emits=ints(Emit.TOKEN, Emit.POOLED, Emit.POOLED),
    )  # fmt: skip
    out = run(fresh, plan)
    assert out.n_valid.tolist() == [1, 0, 0] and out.tokens[0] == alone
    assert out.pooled.shape == (2, CONFIG.hidden_size) and out.pooled.dtype == np.float32
    head = np.asarray(fresh.params["lm_head.weight"], np.float64)
    for vector, logits in zip(out.pooled, expected, strict=True):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        made = head @ vector
        scale = np.linalg.norm(logits) / np.linalg.norm(made)
        np.testing.assert_allclose(scale * made, logits, atol=1e-4)


def test_long_prompts_are_scored_in_blocks(fresh):
    """As in two chunks, each within a block; the blocks' seam lies elsewhere then."""
    prompt = tuple(int(t) for t in np.random.default_rng(0).integers(0, 61, 290))
    assert len(prompt) > SCORE_ROWS

    def scores(cuts):
        chosen = []
        for first, last in itertools.pairwise(cuts):
            inits = (SlotInit(slot=0, position=0, remaining=5),) if first == 0 else ()
            targets = ints(*prompt[first + 1 : last + 1])
            plan = prompt_plan(
                prompt[first:last], LONG, start=first, inits=inits, page_adds=pages(0, 1, 80),
                scored=(ScoredRow(0, targets),),
            )  # fmt: skip
            chosen += run(fresh, plan).scored[0].chosen[:, 0].tolist()
        return chosen

    whole, parts = scores([0, 290]), scores([0, 140, 290])
    assert len(whole) == 289
    np.testing.assert_allclose(whole, parts, atol=1e-4)
    assert len({round(x, 3) for x in whole}) > 200


@pytest.mark.parametrize("sampler", AT_ONCE, ids=lambda s: s.name)
def test_k_tokens_at_once_are_k_single_ones(fresh, sampler):
    """With a stop, a limit and min_tokens in the middle of a dispatch."""
    fields = SAMPLED if sampler == Sampler.SAMPLE else GREEDY
    plain, _ = answers(fresh, Sampler.SAMPLE, range(ROWS), fields)
    fields = [dict(f) for f in fields]
    fields[0]["stop_ids"] = (plain[0][2],)
    fields[1]["remaining"] = 6
    if sampler == Sampler.SAMPLE:
        fields[3] |= {"stop_ids": tuple(set(plain[3][:2])), "min_remaining": 4}
    want, singles = {}, {}
    fresh.reset()
    want, _ = answers(fresh, Sampler.SAMPLE, range(ROWS), fields, steps=1 + 2 * K)
    singles = state(fresh)
    assert len(want[0]) <= 3 and len(want[1]) == 6 and len(want[2]) == 1 + 2 * K

    fresh.reset()
    got = {}
    for slot in range(ROWS):
        out = start(fresh, slot, MIXED[Sampler.SAMPLE], **fields[slot])
        got[slot] = out.tokens[0, : out.n_valid[0]].tolist()
    for _ in range(2):
        out = run(fresh, decode_plan(*range(ROWS), bucket=AT_ONCE[sampler]))
        assert out.tokens.shape == (ROWS, K)
        for slot in range(ROWS):
            got[slot] += out.tokens[slot, : out.n_valid[slot]].tolist()
    assert got == want
    equal(state(fresh)[1], singles[1])
    np.testing.assert_allclose(state(fresh)[0]["kv"], singles[0]["kv"], atol=1e-5)


def test_a_bad_row_among_k_tokens_is_flagged_alone(fresh):
    for slot in (0, 1):
        start(fresh, slot, MIXED[Sampler.SAMPLE])
    fresh._slabs = {"kv": fresh._slabs["kv"].at[1].set(np.nan)}  # slot 0's first page
    out = run(fresh, decode_plan(0, 1, bucket=AT_ONCE[Sampler.GREEDY]))
    assert out.not_finite.tolist() == [True, False]


def test_state_is_donated_to_every_program(runner):
    """No program may hold a second copy of slabs or controls, not even for a moment."""
    slab = runner._slabs["kv"].nbytes
    counts = runner._controls.counts.nbytes
    for key in runner._programs.keys():  # noqa: SIM118
        held = runner._program(key).memory_analysis().alias_size_in_bytes
        whole_steps = isinstance(key, Bucket) or key == "admit"
        takes_none = key in (SCORE, STATE)
        assert held >= (slab if whole_steps else 0 if takes_none else counts), key


def a_bit_of_everything(runner):
    """Answers under controls, scores, an embedding, k tokens at once; whole numbers first."""
    controlled, logprobs = answers(runner, Sampler.FULL, range(ROWS), SAMPLED, CONTROLS, steps=4)
    plan = prompt_plan(
        PROMPTS[2], MIXED[Sampler.FULL], inits=(SlotInit(slot=0, position=0, remaining=5),),
        scored=(ScoredRow(0, ints(*PROMPTS[2][1:])),),
    )  # fmt: skip
    scores = run(runner, plan).scored[0].chosen[:, 0].tolist()
    init = SlotInit(slot=0, position=0, remaining=1)
    plan = prompt_plan(PROMPTS[3], MIXED[Sampler.FULL], inits=(init,), emit=Emit.POOLED)
    pooled = run(runner, plan).pooled[0].tolist()
    for slot in range(ROWS):
        start(runner, slot, MIXED[Sampler.FULL], **SAMPLED[slot])
    at_once = run(runner, decode_plan(*range(ROWS), bucket=AT_ONCE[Sampler.SAMPLE])).tokens
    chosen = [step[0][0] for each in logprobs.values() for step in each]
    return [[*controlled.values(), *at_once.tolist()], [*chosen, *scores, *pooled]]


def test_over_two_devices_it_is_all_the_same(fresh):
    # JAX takes the number of CPU devices once, before its first use: hence another interpreter.
    here = Path(__file__).parent
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(here)])
    done = subprocess.run(
        [sys.executable, "-P", str(here / "two_devices_child.py")],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    tokens, logprobs = json.loads(done.stdout.splitlines()[-1])
    want_tokens, want_logprobs = a_bit_of_everything(fresh)
    assert tokens == want_tokens
    np.testing.assert_allclose(logprobs, want_logprobs, atol=1e-4)
