"""Starting twice: the second time nothing is traced or compiled, the answers and the page count are
the same, and the memory table is what the device holds."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from quire.config import EngineConfig
from quire.model import programs, startup
from quire.model.compile import CompileCounter
from quire.model.config import ModelConfig, RopeConfig
from quire.model.devices import DeviceMemory, compared, measured
from quire.model.ladder import Bucket, Ladder, Sampler
from quire.model.mesh import default_mesh
from quire.model.plan import Emit, SlotInit, StepPlan
from quire.model.program_store import ProgramStore, make_private
from quire.model.programs import ADMIT, SCORE, STATE, SampleKey
from quire.model.runner import ModelRunner
from quire.model.startup import Startup

pytestmark = pytest.mark.xdist_group("startup")

BUDGET = 48 * 2**20
"""Less than the one slot could use at full length."""

MODEL = ModelConfig(
    family="llama",
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=96,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    norm_eps=1e-6,
    rope=RopeConfig(),
    windows=(None,),
    max_positions=1 << 20,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "programs"
    make_private(folder)
    return folder


def start(folder: Path | None, **settings: Any) -> Startup:
    settings = {"max_num_seqs": 1, "max_batched_tokens": 16, "memory": BUDGET, **settings}
    config = EngineConfig(model="x", **settings)
    store = None if folder is None else ProgramStore(folder, 2**30)
    return Startup(config, MODEL, default_mesh(), DeviceMemory(2**33, None), store)


def runner_of(starting: Startup, sizes: Any, compiled: Any) -> ModelRunner:
    mesh = default_mesh()
    params = jax.device_put(starting.decoder.initial_params(0), mesh.everywhere)
    return ModelRunner(starting.decoder, params, sizes.spec, mesh, compiled=compiled)


def first_token(runner: ModelRunner) -> int:
    bucket = runner.spec.ladder.choose(5, 1, 0, decode_only=False)
    ints = lambda *v: np.array(v, np.int32)  # noqa: E731
    plan = StepPlan(
        ints(0), ints(1), ints(0), ints(5), ints(Emit.TOKEN), 0, bucket,
        prompt_tokens=ints(3, 1, 4, 1, 5), inits=(SlotInit(slot=0, position=0, remaining=9),),
        page_adds=ints(0, 0, 1).reshape(1, 3),
    )  # fmt: skip
    return int(runner.collect(runner.launch(plan)).tokens[0, 0])


@pytest.fixture(scope="module")
def cold(folder: Path) -> tuple[Any, Any, int]:
    """Sizes, programs and a token of a start without anything stored."""
    starting = start(folder)
    sizes, got = starting.prepare(threads=2)
    assert starting.problems == ()
    return sizes, got, first_token(runner_of(starting, sizes, got.programs))


def test_the_second_start_traces_and_compiles_nothing(
    folder: Path, cold: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, first, token = cold
    assert first.lowering_seconds > 0
    monkeypatch.setattr(programs.Programs, "lower", lambda *_: pytest.fail("lowered"))
    starting, counter = start(folder), CompileCounter()
    again, got = starting.prepare(threads=2)
    assert counter.count == 0
    assert (got.loaded, got.lowering_seconds) == (sizes.spec.ladder.num_programs, 0.0)
    assert list(got.programs) == list(first.programs) and {ADMIT, STATE} < set(got.programs)
    assert again.spec.num_pages == sizes.spec.num_pages and again.memory == sizes.memory

    runner = runner_of(starting, again, got.programs)
    counter = CompileCounter()
    runner.warmup()
    assert (counter.count, runner.compiles_after_ready) == (0, 0)
    assert first_token(runner) == token
    runner.reset()
    assert first_token(runner) == token
    assert runner.compiles_after_ready == 0


def test_other_sizes_find_nothing(folder: Path, cold: Any) -> None:
    sizes, *_ = cold
    other = start(folder, page_size=64)
    assert other._remembered() is None
    store, mine = ProgramStore(folder, 2**30), start(folder)
    bucket = sizes.spec.ladder.buckets[0]
    assert store.get(mine._programs(sizes.spec).facts(bucket)) is not None
    assert store.get(other._programs(other.sizes().spec).facts(bucket)) is None
    facts = {str(mine._programs(sizes.spec).facts(key)) for key in sizes.spec.ladder.buckets}
    assert len(facts) == len(sizes.spec.ladder)


def test_rungs_beside_a_forward_that_say_how_many_logits_it_leaves_are_among_its_facts() -> None:
    starting = start(None)
    spec = starting.sizes().spec
    forward, most = Bucket(64, 3, Sampler.FULL), Bucket(128, 8, Sampler.FULL)
    ladders = [Ladder([forward, most, Bucket(n, n, Sampler.FULL)]) for n in (4, 8)]
    assert [ladder.logit_rows(forward) for ladder in ladders] == [4, 8]
    made = [starting._programs(dataclasses.replace(spec, ladder=ladder)) for ladder in ladders]
    assert made[0].facts(forward) != made[1].facts(forward)
    assert made[0].facts(SCORE) == made[1].facts(SCORE)


def test_one_damaged_program_is_compiled_and_the_rest_loaded(folder: Path, cold: Any) -> None:
    sizes, *_ = cold
    starting = start(folder)
    path = starting._store._path(starting._programs(sizes.spec).facts(ADMIT))
    path.write_bytes(path.read_bytes()[:-9])
    _, got = starting.prepare(threads=2)
    assert got.loaded == sizes.spec.ladder.num_programs - 1 and got.lowering_seconds > 0
    assert "damaged" in starting.problems[0]
    assert starting._store.get(starting._programs(sizes.spec).facts(ADMIT)) is not None


def test_a_whole_file_that_is_no_program_is_compiled_anew(folder: Path, cold: Any) -> None:
    sizes, *_ = cold
    starting = start(folder)
    facts = starting._programs(sizes.spec).facts(ADMIT)
    starting._store.put(facts, b"not a pickle", {"temp": 0, "outputs": 0, "code": 0})
    _, got = starting.prepare(threads=2)
    assert got.loaded == sizes.spec.ladder.num_programs - 1
    assert "cannot be loaded" in starting.problems[0]


def test_pages_get_what_programs_leave(cold: Any) -> None:
    sizes, got, _ = cold
    table = sizes.memory
    temp = max(f["temp"] for key, f in got.figures.items() if key != STATE)
    assert 0 < temp <= table.temp <= 1.01 * temp
    assert 0 < table.staging < table.temp
    assert table.total <= BUDGET < 1.02 * table.total
    without = start(None).sizes().memory  # knows of no program
    assert without.temp == 0 and without.pages >= table.pages


def test_what_a_step_hands_over_is_there_once_and_its_results_until_fetched() -> None:
    def needed(temps: dict[Any, int], outputs: dict[Any, int]) -> startup.Need:
        figures = {key: {"temp": temps[key], "outputs": outputs[key]} for key in temps}
        return startup._need(cast(Any, nothing_sent), cast(Any, SimpleNamespace(figures=figures)))

    nothing_sent = SimpleNamespace(input_bytes=lambda key: 0, logit_rows=lambda key: key.rows)
    greedy = Bucket(512, 8, Sampler.GREEDY, 1)
    full, sample = Bucket(512, 8, Sampler.FULL, 1), SampleKey(8, Sampler.FULL)
    other = SampleKey(8, Sampler.SAMPLE)  # instead of it
    # Of SCORE there are four: 128 tokens each.
    results = {greedy: 7, full: 1000, sample: 3, other: 2, SCORE: 2}
    # Sampling works in most: its 50, the logits, its results and those of the step before.
    assert needed({greedy: 9, full: 40, sample: 50, other: 6, SCORE: 1}, results) == startup.Need(
        50, 1000 + 11 + 11
    )
    # The forward of a FULL step, and GREEDY results waiting.
    assert needed({greedy: 9, full: 40}, results) == startup.Need(40, 1000 + 7)
    # A whole step needs most.
    assert needed({greedy: 5000, full: 40}, results) == startup.Need(5000, 7 + 7)


def test_the_largest_programs_alone_say_as_much(cold: Any) -> None:
    """`quire inspect` compiles only these."""
    sizes, *_ = cold
    table = start(None).measured_sizes().memory
    assert table.pages == sizes.memory.pages
    assert table.temp == pytest.approx(sizes.memory.temp, rel=0.01)


def test_the_table_is_what_the_device_holds(cold: Any) -> None:
    """Live arrays by JAX's own account; the programs' part is XLA's, as in the table."""
    sizes, got, _ = cold
    starting, mesh = start(None), default_mesh()
    gc.collect()
    before = measured(mesh)
    assert before.peak is None  # a CPU device keeps no account
    runner = runner_of(starting, sizes, got.programs)
    runner.warmup()
    gc.collect()
    after = measured(mesh)
    held = after.in_use - before.in_use
    assert held == pytest.approx(sizes.memory.arrays, rel=0.02)
    temp = max(p.memory_analysis().temp_size_in_bytes for p in got.programs.values())
    assert sizes.memory.temp == pytest.approx(temp, rel=0.01)
    assert compared(sizes.memory, type(after)(held, None, None)) == pytest.approx(0, abs=0.02)
    assert compared(sizes.memory, type(after)(held, 2 * sizes.memory.pool, 1)) == 1


def test_a_need_that_was_overestimated_leaves_the_next_start_the_same_sizes(
    folder: Path, cold: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would settle on more pages, and find none of the programs of the first."""
    sizes, got, _ = cold
    memory: list[startup.Need] = []
    monkeypatch.setattr(Startup, "_remembered", lambda self: memory[-1] if memory else None)
    monkeypatch.setattr(Startup, "_remember", lambda self, need: memory.append(need))
    monkeypatch.setattr(Startup, "_compile", lambda *_, **__: got)
    generous = startup.Need(sizes.memory.temp + 2**21, sizes.memory.staging)
    monkeypatch.setattr(Startup, "measured_sizes", lambda self, threads: self._settle(generous))
    first, _ = start(folder).prepare(threads=1)
    second, _ = start(folder).prepare(threads=1)
    assert first.memory == second.memory and first.memory.pages < sizes.memory.pages
    assert memory == [generous]


def on_gpu(model: ModelConfig = MODEL, shards: int = 1, **settings: Any) -> Startup:
    """On GPUs of 150 GB that nobody has asked anything yet."""
    config = EngineConfig(model="x", **settings)
    mesh = cast(Any, SimpleNamespace(platform="gpu", shards=shards, devices=()))
    return Startup(config, model, mesh, DeviceMemory(150_000_000_000, None), None)


def test_a_need_that_is_slight_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(Startup, "_compile", lambda *_, **__: compiled.append(1))
    table = on_gpu().measured_sizes().memory
    guess = startup.guessed_need(MODEL, on_gpu().dtype, 1024, 2048)
    assert (table.temp, table.staging) == (guess.temp, guess.staging) and not compiled
    assert guess.temp > guess.staging > 1024 * MODEL.vocab_size * 4
    assert table.total <= table.budget < 1.01 * table.total


def test_one_that_is_not_is_measured() -> None:
    """A small card, or little of a large one: half a gigabyte is many pages there."""
    for settings in ({"memory": 2**30}, {"memory": 2**31, "max_num_seqs": 1024}):
        assert on_gpu(**settings).sizes().memory.temp == 0


def test_what_is_slight_is_so_beside_the_pages() -> None:
    """Not beside weights, which leave little."""
    large = dataclasses.replace(
        MODEL, hidden_size=4096, intermediate_size=8192, num_layers=75, windows=(None,) * 75
    )
    table = on_gpu(large, memory=20 * 2**30).sizes().memory
    assert table.weights > 14 * 2**30 and table.temp == 0
    assert on_gpu(large, memory=60 * 2**30).sizes().memory.temp > 0


def test_a_guess_refuses_nobody() -> None:
    """KV memory that fits with what programs really need, but not with what is guessed."""
    unasked = on_gpu(max_num_seqs=64)
    table = unasked._settle(unasked._least).memory
    assert unasked.sizes().memory.temp > 0
    asked = on_gpu(max_num_seqs=64, kv_memory=table.budget - table.total + table.kv)
    assert asked.sizes().memory.temp == 0


@pytest.mark.parametrize("rows", [1024, 514, 64])
def test_a_guess_has_room_for_logits_however_they_are_cut(rows: int) -> None:
    """Devices gather them; 514 rows are sampled at once, for want of divisors, and 64."""
    model = dataclasses.replace(MODEL, vocab_size=200_000)
    table = on_gpu(model, shards=2, max_num_seqs=rows).sizes().memory
    logits = rows * model.vocab_size * 4
    assert table.staging > logits
    assert table.temp > (logits if rows == 1024 else 2 * logits)


def test_on_cpu_nothing_is_guessed() -> None:
    assert start(None, memory=2**33).sizes().memory.temp == 0
