"""The step programs by themselves: padding and frozen slots change nothing, updates of any size
arrive, nothing compiles after ready."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import threading
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stepping
from stepping import CONFIG, ints, make_runner, pages, run, state

from quire.model.compile import (
    CompileCounter,
    cache_folder,
    compile_all,
    compiler_options,
    use_cache,
)
from quire.model.inputs import ADMIT_ROOM, UpdateRoom, pack, unpack
from quire.model.ladder import Bucket, Ladder, Sampler
from quire.model.mesh import default_mesh
from quire.model.plan import Emit, RunnerSpec, ScoredRow, SlotControls, SlotInit, StepPlan
from quire.model.runner import ModelRunner
from quire.model.slots import Word

pytestmark = pytest.mark.xdist_group("runner")

LADDER = Ladder(
    [Bucket(t, 4, s) for t in (4, 24) for s in (Sampler.GREEDY, Sampler.FULL)]
    + [Bucket(24, 3, Sampler.SAMPLE), Bucket(4, 4, Sampler.SAMPLE, 3)]
)
SPEC = RunnerSpec(
    num_slots=40,
    num_pages=1200,
    page_size=4,
    max_pages_per_seq=1024,
    max_model_len=4096,
    vocab_size=CONFIG.vocab_size,
    ladder=LADDER,
    max_k=3,
)
DECODE, MIXED = (LADDER.choose(t, 1, Sampler.GREEDY, decode_only=t == 1) for t in (1, 5))


prompt_plan = partial(stepping.prompt_plan, bucket=MIXED)
decode_plan = partial(stepping.decode_plan, bucket=DECODE)


@pytest.fixture(scope="module")
def runner():
    return make_runner(SPEC)


@pytest.fixture
def fresh(runner):
    runner.reset()
    return runner


def start(runner, tokens=(3, 1, 4, 1, 5), slot=0, remaining=10, **fields):
    """Prefills a prompt in one step; returns its first token."""
    init = SlotInit(slot=slot, position=0, remaining=remaining, **fields)
    plan = prompt_plan(tokens, slot=slot, inits=(init,), page_adds=pages(slot, 1 + 5 * slot, 5))
    return int(run(runner, plan).tokens[0, 0])


@pytest.mark.parametrize("bucket", LADDER.buckets, ids=str)
def test_a_step_without_rows_changes_nothing(fresh, bucket):
    start(fresh)
    before = state(fresh)
    none = ints()
    out = run(
        fresh, StepPlan(none, none, none, none, none, num_decode=0, bucket=bucket, k=bucket.k)
    )
    assert out.tokens.shape == (0, bucket.k)
    jax.tree.map(np.testing.assert_array_equal, before, state(fresh))


def test_a_reset_gives_back_what_kept_holes_apart_first(fresh, monkeypatch):
    """The new pieces are as large as the old holes: taken while the old fences are held, they would
    have none between them afterwards."""
    fresh._fences = [jnp.zeros(3)]
    fence, held = weakref.ref(fresh._fences[0]), []
    monkeypatch.setattr("quire.model.runner.leave_holes", lambda mesh: held.append(fence()) or [])
    fresh.reset()
    assert held == [None]


def test_parameters_may_come_in_any_order(fresh):
    """Programs take them by their place, and many are alike in shape."""
    expected = start(fresh)
    params = dict(reversed(fresh.params.items()))
    decoder, mesh = fresh._programs._decoder, fresh._mesh
    other = ModelRunner(decoder, params, SPEC, mesh, compiled=fresh._compiled)
    assert start(other) == expected
    jax.tree.map(np.testing.assert_array_equal, state(other), state(fresh))
    with pytest.raises(KeyError, match="final_norm"):
        ModelRunner(decoder, {n: a for n, a in params.items() if "final" not in n}, SPEC, mesh)


def test_only_live_rows_write_and_only_their_own_pages(fresh):
    start(fresh, slot=0)
    start(fresh, slot=1)
    before = state(fresh)[0]["kv"]
    run(fresh, decode_plan(1))
    after = state(fresh)[0]["kv"]
    changed = {tuple(i) for i in np.argwhere((before != after).any(axis=(2, 3))).tolist()}
    # Position 5 of slot 1 is offset 1 of its second page, once in each layer.
    assert changed == {(7, 1), (SPEC.num_pages + 7, 1)}


def test_a_slot_freezes_itself_at_its_limit(fresh):
    start(fresh, remaining=3)
    valid = [int(run(fresh, decode_plan(0)).n_valid[0]) for _ in range(4)]
    assert valid == [1, 1, 0, 0]
    frozen = state(fresh)
    run(fresh, decode_plan(0))
    jax.tree.map(np.testing.assert_array_equal, frozen, state(fresh))


def test_a_slot_freezes_itself_at_a_stop_id_but_not_before_min_tokens(fresh):
    first = start(fresh)
    second = int(run(fresh, decode_plan(0)).tokens[0, 0])
    fresh.reset()
    assert start(fresh, stop_ids=(second,)) == first
    assert run(fresh, decode_plan(0)).n_valid.tolist() == [1]  # the stop id is delivered
    assert run(fresh, decode_plan(0)).n_valid.tolist() == [0]
    fresh.reset()
    rich = {"bucket": LADDER.choose(1, 1, Sampler.FULL, decode_only=True)}
    start(fresh, stop_ids=(second,), min_remaining=3)
    out = run(fresh, decode_plan(0, **rich))
    assert out.n_valid.tolist() == [1] and out.tokens[0, 0] != second


def test_rows_in_the_middle_of_a_prompt_emit_nothing(fresh):
    whole = start(fresh)
    fresh.reset()
    init = SlotInit(slot=0, position=0, remaining=10)
    plan = prompt_plan((3, 1, 4), emit=Emit.NONE, inits=(init,), page_adds=pages(0, 1, 5))
    assert run(fresh, plan).n_valid.tolist() == [0]
    assert state(fresh)[1].words[0, Word.POSITION] == 3
    out = run(fresh, prompt_plan((1, 5), start=3))
    assert (out.n_valid.tolist(), out.tokens.tolist()) == ([1], [[whole]])


def test_updates_beyond_the_room_of_a_step_are_sent_ahead(fresh):
    """A prefix hit can bring any number of pages, an idle engine any number of admissions."""
    expected = start(fresh)
    fresh.reset()
    many = ADMIT_ROOM.adds + 30  # more than two calls of `admit` hold
    spread = [(39 - i % 39, i // 39, 2 + i % 900) for i in range(many)]
    inits = tuple(SlotInit(slot=i, position=0, remaining=10) for i in range(35))
    plan = prompt_plan(
        (3, 1, 4, 1, 5), inits=inits, page_adds=np.concatenate([pages(0, 1, 5), ints(*spread)])
    )
    assert run(fresh, plan).tokens.tolist() == [[expected]]
    slots = state(fresh)[1]
    assert slots.words[:35, Word.REMAINING].tolist() == [9] + [10] * 34
    for slot, index, page in spread:
        assert slots.page_table[slot, index] == page


def test_a_long_prefix_hit_rides_along_with_the_step(fresh, monkeypatch):
    """One transfer and one launch, be the hit as long as a sequence may be, and others' pages with
    it; of the rest of the page table nothing changes."""
    expected = start(fresh, slot=7)
    before = state(fresh)[1].page_table
    monkeypatch.setattr(fresh, "_admit", None)  # whoever calls it fails
    hit, other = pages(3, 5, SPEC.max_pages_per_seq), pages(7, 36, 5)
    room = fresh._programs.layout(MIXED).room
    most = pages(9, 77, room.adds - len(other))
    some = hit[10:-20]  # by index: neither the first entries of the row nor the last
    init = SlotInit(slot=7, position=0, remaining=10)
    adds = np.concatenate([other, some, most])
    plan = prompt_plan((3, 1, 4, 1, 5), slot=7, inits=(init,), page_adds=adds)
    assert run(fresh, plan).tokens.tolist() == [[expected]]
    expected_table = before.copy()
    for slot, index, page in adds:
        expected_table[slot, index] = page
    np.testing.assert_array_equal(state(fresh)[1].page_table, expected_table)


@pytest.mark.parametrize("others", [0, 3])
def test_a_hit_that_outgrows_the_list_goes_into_the_row(others):
    room = UpdateRoom(inits=1, adds=4, row=100)
    hit = pages(3, 5, 40)
    adds = np.concatenate([pages(7, 60, others), hit]).astype(np.int32)
    listed, apart = room.divide(adds)
    np.testing.assert_array_equal(listed, pages(7, 60, others))
    np.testing.assert_array_equal(apart, hit)


@pytest.mark.parametrize("sampler", Sampler)
def test_a_step_is_one_transfer_whoever_samples(fresh, monkeypatch, sampler):
    sent = []
    call_of = fresh._call

    def watched(key):
        def call(*args):
            sent.extend(arg for arg in jax.tree.leaves(args) if isinstance(arg, np.ndarray))
            return call_of(key)(*args)

        return call

    monkeypatch.setattr(fresh, "_call", watched)
    bucket = LADDER.choose(5, 1, sampler, decode_only=False)
    init = SlotInit(slot=0, position=0, remaining=9)
    adds = pages(0, 1, SPEC.max_pages_per_seq)
    run(fresh, prompt_plan((3, 1, 4, 1, 5), bucket=bucket, inits=(init,), page_adds=adds))
    assert bucket.sampler == sampler and len(sent) == 1


def test_pages_are_copied_in_every_layer_before_the_step(fresh):
    start(fresh)
    before = state(fresh)[0]["kv"]
    run(fresh, decode_plan(0, page_copies=ints((1, 50), (2, 51)).reshape(2, 2)))
    after = state(fresh)[0]["kv"]
    for layer in (0, SPEC.num_pages):
        np.testing.assert_array_equal(after[layer + 50], before[layer + 1])
        np.testing.assert_array_equal(after[layer + 51], before[layer + 2])
        assert np.abs(before[layer + 1]).max() > 0
    rest = np.r_[3:50, 52 : SPEC.num_pages + 2]  # all but the written and the copied-to pages
    np.testing.assert_array_equal(after[rest], before[rest])


def test_what_is_packed_is_unpacked(fresh):
    init = SlotInit(
        slot=3, position=7, remaining=11, min_remaining=2, sample_index=5, seed=2**64 - 3,
        choice=1, temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, stop_ids=(8, 9), adapter=4,
    )  # fmt: skip
    plan = StepPlan(
        ints(5, 3), ints(1, 1), ints(20, 7), ints(1, 4), ints(Emit.TOKEN, Emit.NONE), 1, MIXED,
        prompt_tokens=ints(50, 51, 52, 53), page_adds=pages(3, 90, 2), inits=(init,),
    )  # fmt: skip
    layout = fresh._programs.layout(MIXED)
    got = unpack(jnp.asarray(pack(plan, layout)), layout)
    assert (int(got.num_rows), int(got.num_decode)) == (2, 1)
    assert got.slots.tolist() == [5, 3, 40, 40]
    assert got.counts.tolist() == [1, 4, 0, 0]
    assert got.emits.tolist() == [1, 0, 0, 0]
    assert got.prompt_tokens[:6].tolist() == [0, 50, 51, 52, 53, 0]
    assert got.updates.page_adds[:3].tolist() == [[3, 0, 90], [3, 1, 91], [40, 0, 0]]
    run(fresh, prompt_plan((1,), inits=(init,), emit=Emit.NONE, slot=9))
    rows = fresh._slots.rows(jnp.array([3]))
    for name in ("position", "remaining", "min_remaining", "sample_index", "choice", "top_k"):
        assert getattr(rows, name).tolist() == [getattr(init, name)], name
    for name in ("temperature", "top_p", "min_p"):
        assert getattr(rows, name)[0] == np.float32(getattr(init, name)), name
    assert rows.seed.tolist() == [[2**32 - 1, 2**32 - 3]]
    assert rows.stop_ids[0].tolist() == [8, 9] + [-1] * 14
    assert rows.words[0, Word.ADAPTER] == 4


def test_what_the_runner_does_not_serve_is_refused(fresh):
    with pytest.raises(ValueError, match=r"plan\.k: got 2, must be its bucket's 1"):
        fresh.launch(dataclasses.replace(decode_plan(0), k=2))
    with pytest.raises(ValueError, match=r"plan\.emits: POOLED: needs a FULL bucket with prompt"):
        fresh.launch(prompt_plan((1,), emit=Emit.POOLED))
    rich = LADDER.choose(1, 1, Sampler.FULL, decode_only=True)
    for plan in (prompt_plan((1, 2)), decode_plan(0, bucket=rich)):
        scored = dataclasses.replace(plan, scored=(ScoredRow(0, ints(1)),))
        with pytest.raises(ValueError, match=r"plan\.scored: needs a FULL bucket with prompt rows"):
            fresh.launch(scored)


def test_one_rows_not_finite_logits_leave_its_neighbours_alone(fresh):
    good = start(fresh, slot=1)
    expected = run(fresh, decode_plan(1)).tokens[0, 0]
    fresh.reset()
    start(fresh, slot=0)
    assert start(fresh, slot=1) == good
    fresh._slabs = {"kv": fresh._slabs["kv"].at[1].set(jnp.nan)}  # slot 0's first page
    out = run(fresh, decode_plan(0, 1))
    assert out.not_finite.tolist() == [True, False]
    assert out.tokens[1, 0] == expected


def test_warmup_compiles_everything_and_arms_the_guard():
    runner = make_runner(dataclasses.replace(SPEC, num_pages=40))
    seen = []
    runner.warmup(lambda done, total: seen.append((done, total)))
    steps = len(LADDER) + 2  # and updates of slots, and of controls
    assert seen[-1] == (steps, steps)
    assert len(runner._compiled) == LADDER.num_programs
    init = SlotInit(slot=0, position=0, remaining=9, controlled=True)
    rules = SlotControls(0, ints(1, 2), ints(3), allowed=ints(*range(50)), bad_words=((3, 4),))
    more = {"inits": (init,), "page_adds": pages(0, 1, 1), "controls": (rules,)}
    for bucket in LADDER.buckets:
        if bucket.decode_only:
            run(runner, decode_plan(0, bucket=bucket))
            continue
        scored = (ScoredRow(0, ints(2, 5)),) if bucket.sampler == Sampler.FULL else ()
        run(runner, prompt_plan((1, 2), bucket=bucket, scored=scored, **more))
        if bucket.sampler == Sampler.FULL:
            run(runner, prompt_plan((1, 2), bucket=bucket, emit=Emit.POOLED, inits=(init,)))
    run(runner, decode_plan(0, page_copies=ints((1, 2)).reshape(1, 2)))
    runner.reset()
    assert runner.compiles_after_ready == 0
    (jnp.arange(7) * 3).block_until_ready()  # an eager operation of a new shape
    assert runner.compiles_after_ready > 0


def test_slabs_and_slots_are_donated(runner):
    """No program may hold a second copy of the slab, not even for a moment."""
    for bucket in (DECODE, MIXED):
        compiled = runner._programs.lower(bucket).compile()
        stats = compiled.memory_analysis()
        slab_bytes = runner._slabs["kv"].nbytes
        assert stats.alias_size_in_bytes >= slab_bytes
        assert stats.temp_size_in_bytes < slab_bytes / 4


def test_compile_counter_counts_from_its_construction():
    (jnp.arange(11) + 1).block_until_ready()
    counter = CompileCounter()
    assert counter.count == 0
    jax.jit(lambda x: x * 5 + 2)(jnp.float32(1)).block_until_ready()
    assert counter.count >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="tried only there")
def test_compiling_goes_on_where_it_may_not_give_way(monkeypatch):
    def forbidden(by):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("quire.model.compile.os.nice", forbidden)
    told, _ = compile_told("cpu", "ab", threads=1)
    assert {*told} == {*"ab"}


def test_what_failed_while_programs_were_lowered_is_said_at_once():
    """Though kernels are still being built."""
    failed, over = threading.Event(), threading.Event()

    def weights():
        failed.set()
        raise OSError("no weights")

    def lower(name):
        assert name in "ab"
        if name == "b":
            assert failed.wait(60)
            while threads("loading"):
                pass
        return SimpleNamespace(compile=None)

    def threads(prefix):
        return [t for t in threading.enumerate() if t.name.startswith(prefix)]

    building = [SimpleNamespace(compile=lambda compiler_options: over.wait(60))]
    try:
        with pytest.raises(OSError, match="no weights"):
            compile_all(
                {name: partial(lower, name) for name in "abcd"},
                threads=1,
                kernels=lambda: building,
                devices=default_mesh().devices,
                before_compiling=weights,
            )
    finally:
        over.set()


def test_a_failing_compilation_is_not_swallowed():
    def broken():
        raise RuntimeError("cannot lower")

    with pytest.raises(RuntimeError, match="cannot lower"):
        compile_all({"a": broken}, threads=2, devices=default_mesh().devices)


@pytest.mark.parametrize("threads", [1, 2])
def test_programs_are_lowered_while_compiling_must_wait(threads):
    events, all_lowered = [], threading.Event()

    def lower(name):
        def compiled(compiler_options):
            events.append(f"compile {name}")
            return SimpleNamespace(memory_analysis=lambda: None)

        events.append(f"lower {name}")
        if name == "c":
            all_lowered.set()
        return SimpleNamespace(compile=compiled)

    def ready():
        assert all_lowered.wait(60)
        events.append("ready")

    names = {name: partial(lower, name) for name in "abc"}
    devices = default_mesh().devices
    got = compile_all(names, threads=threads, devices=devices, before_compiling=ready)
    assert events[:4] == ["lower a", "lower b", "lower c", "ready"]
    assert sorted(events[4:]) == ["compile a", "compile b", "compile c"]
    assert list(got.programs) == list("abc")
    with pytest.raises(OSError, match="no weights"):
        compile_all(
            names, threads=threads, devices=devices,
            before_compiling=lambda: (_ for _ in ()).throw(OSError("no weights")),
        )  # fmt: skip


@pytest.mark.parametrize("must_wait", [True, False])
def test_kernels_are_built_before_programs_are_compiled(must_wait):
    """And after what both must wait for; one that cannot be built is its program's matter."""
    events, lowered, built = [], threading.Event(), threading.Event()
    weights = threading.Event()
    both = threading.Barrier(2)

    def lower(name):
        def compiled(compiler_options):
            events.append(f"compile {name}")
            return SimpleNamespace(memory_analysis=lambda: None)

        events.append(f"lower {name}")
        came_up.extend(f"{name}{n}" for n in range(2) if name != "b")
        if name == "b" and not must_wait:
            lowered.set()
            assert built.wait(60)
        if name == "c":
            weights.set()
        return SimpleNamespace(compile=compiled)

    def ready():
        assert weights.wait(60)
        assert not any(event.startswith("build") for event in events)
        lowered.set()

    def kernel(name):
        def build(compiler_options):
            assert lowered.wait(60)
            events.append(f"build {name}")
            if name[0] == "a":
                both.wait(60)
                built.set()
                raise jax.errors.JaxRuntimeError("too large")

        return SimpleNamespace(compile=build)

    def take():
        taken = [kernel(name) for name in came_up]
        came_up.clear()
        return taken

    came_up = []
    compile_all(
        {name: partial(lower, name) for name in "abc"},
        threads=3,
        kernels=take,
        devices=default_mesh().devices,
        before_compiling=ready if must_wait else None,
    )
    if must_wait:
        assert events[:3] == ["lower a", "lower b", "lower c"]
    else:
        assert events[:2] == ["lower a", "lower b"]
        assert sorted(events[2:4]) == ["build a0", "build a1"]
    assert {"build c0", "build c1", "compile a", "compile b", "compile c"} <= {*events}


def test_programs_are_stored_once_all_are_lowered(monkeypatch):
    """By the thread that lowered them: to write one down holds the interpreter."""
    events, compiled = [], threading.Event()

    def lower(name):
        def compile_it(compiler_options):
            compiled.set()
            return SimpleNamespace(memory_analysis=lambda: None)

        if name == "b":
            assert compiled.wait(60)
        events.append(f"lower {name}")
        return SimpleNamespace(compile=compile_it)

    def keep(store, facts, program, figures):
        assert threading.current_thread() is here
        events.append(f"keep {facts}")

    here = threading.current_thread()
    monkeypatch.setattr("quire.model.compile._keep", keep)
    compile_all(
        {name: partial(lower, name) for name in "abc"},
        threads=2,
        store=SimpleNamespace(get=lambda facts: None),
        facts=lambda name: name,
        devices=default_mesh().devices,
    )
    assert events[:3] == ["lower a", "lower b", "lower c"]
    assert sorted(events[3:]) == ["keep a", "keep b", "keep c"]


def compile_told(platform, names, threads):
    """What XLA is told for each program, and how urgent the thread is that compiles it."""
    told, urgent = {}, {}

    def lower(name):
        def compiled(compiler_options):
            told[name] = compiler_options
            urgent[name] = os.getpriority(os.PRIO_PROCESS, 0)
            return SimpleNamespace(memory_analysis=lambda: None)

        return SimpleNamespace(compile=compiled)

    compile_all(
        {name: partial(lower, name) for name in names},
        threads=threads,
        options=lambda tokens: compiler_options(platform, tokens),
        devices=[SimpleNamespace(platform=platform)],
    )
    return told, urgent


@pytest.mark.skipif(sys.platform != "linux", reason="of a thread only there")
def test_compiling_gives_way_to_lowering():
    here = os.getpriority(os.PRIO_PROCESS, 0)
    _, urgent = compile_told("cpu", range(3), threads=2)
    assert all(there == min(here + 5, 19) for there in urgent.values())
    assert os.getpriority(os.PRIO_PROCESS, 0) == here


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_while_a_program_is_lowered_and_is_left_as_it_was(enabled):
    seen = []

    def lower(fails):
        seen.append(gc.isenabled())
        if fails:
            raise RuntimeError("cannot lower")
        compiled = SimpleNamespace(memory_analysis=lambda: None)
        return SimpleNamespace(compile=lambda compiler_options: compiled)

    def compile_one(fails):
        compile_all({"a": partial(lower, fails)}, threads=1, devices=default_mesh().devices)

    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        compile_one(fails=False)
        assert seen == [False] and gc.isenabled() == enabled
        with pytest.raises(RuntimeError, match="cannot lower"):
            compile_one(fails=True)
        assert seen == [False, False] and gc.isenabled() == enabled
    finally:
        gc.enable() if before else gc.disable()


def test_programs_are_kept_where_the_last_caller_said(tmp_path):
    before = cache_folder()
    try:
        use_cache(tmp_path / "first")
        jax.jit(lambda x: x * 41)(jnp.float32(2)).block_until_ready()
        assert list((tmp_path / "first").iterdir())
        use_cache(tmp_path / "second")
        jax.jit(lambda x: x * 42)(jnp.float32(2)).block_until_ready()
        assert list((tmp_path / "second").iterdir())
        use_cache(None)
        kept = len(list((tmp_path / "second").iterdir()))
        jax.jit(lambda x: x * 43)(jnp.float32(2)).block_until_ready()
        assert len(list((tmp_path / "second").iterdir())) == kept
    finally:
        use_cache(None if before is None else Path(before))
