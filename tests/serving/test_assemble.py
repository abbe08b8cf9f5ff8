"""Starting an engine twice, from the outside: what is said, what is stored, what it took."""

from __future__ import annotations

import tracemalloc
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from quire import EngineConfig
from quire.checkpoints.safetensors_files import CHUNK_BYTES
from quire.errors import CheckpointError, InvalidConfig
from quire.model.mesh import default_mesh
from quire.serving import assemble as module
from quire.serving.assemble import Assembled, assemble
from quire.serving.phases import Phases
from quire.serving.progress import Silent

SMALL: dict[str, Any] = {"max_num_seqs": 1, "max_batched_tokens": 16, "page_size": 16}


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.phases: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Any:
        self.phases.append(name)
        yield lambda done, total: None

    def note(self, text: str) -> None:
        self.notes.append(text)


def started(folder: Path, **settings: Any) -> tuple[Assembled, Listener]:
    listener = Listener()
    config = EngineConfig(model=str(folder), **SMALL, **settings)
    parts = assemble(config, lambda outputs: None, listener)
    parts.engine.stop()
    return parts, listener


@pytest.mark.xdist_group("startup")
def test_the_second_start_compiles_nothing_and_says_so(folder: Path) -> None:
    started(folder, memory="8MiB")  # stores them, where an earlier run of the tests has not
    parts, heard = started(folder, memory="8MiB")
    assert parts.compiles == parts.runner.compiles_after_ready == 0
    assert parts.programs_stored == parts.sizes.spec.ladder.num_programs
    names = ["checkpoint", "devices", "loading", "programs", "lowering", "warmup", "ready"]
    assert sorted(parts.phases) == sorted(names)
    assert parts.phases["lowering"] == 0
    assert sorted(heard.phases) == ["loading", "programs", "warming up"]
    assert "0 compiled" in heard.notes[-1] and heard.notes[-1].startswith("ready in ")
    table = parts.sizes.memory
    assert table.total <= table.budget == 8 * 2**20
    lines = [" ".join(note.split()) for note in heard.notes]
    assert any(line.startswith("KV pages ") for line in lines)
    assert any(line.endswith("of 8 MiB allowed") for line in lines)


def test_settings_that_do_not_fit_are_refused_before_anything_loads(folder: Path) -> None:
    for settings, says in (
        ({"memory": "1KiB"}, "memory: got 1,024 bytes, but the model takes"),
        ({"memory": "1MiB", "kv_memory": "1MiB"}, "kv_memory: got 1,048,576 bytes, must be at"),
        ({"memory": "900TiB"}, "memory: got .* the device has"),
    ):
        with pytest.raises(InvalidConfig, match=says):
            started(folder, **settings)


def test_a_cache_that_others_may_write_is_not_used_and_said(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    before = jax.config.values["jax_compilation_cache_dir"]
    _, heard = started(folder, warmup=False, cache_dir=str(tmp_path))
    assert any("are not stored" in note and "chmod go-w" in note for note in heard.notes)
    assert list(tmp_path.iterdir()) == []
    assert jax.config.values["jax_compilation_cache_dir"] == before


def test_what_goes_wrong_with_the_weights_is_raised(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        data = file.read_bytes()
        damaged = file.name == "model.safetensors"
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if damaged else data)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        started(tmp_path, warmup=False)


class Starts:
    """A Startup whose stored programs do not run."""

    decoder, layers, tuned_at_once = None, 1, None

    def __init__(self, loaded: list[int]) -> None:
        self.loaded, self.forgotten = loaded, 0

    def prepare(self, **_: Any) -> Any:
        got = SimpleNamespace(programs={}, loaded=self.loaded.pop(0), lowering_seconds=0.0)
        return SimpleNamespace(spec=None), got

    def forget(self, sizes: Any, why: str) -> None:
        assert "does not run" in why
        self.forgotten += 1


@pytest.mark.parametrize(("loaded", "forgotten"), [([3, 0], 1), ([0], 0)])
def test_stored_programs_that_do_not_run_are_made_anew_once(
    loaded: list[int], forgotten: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Runner:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise jax.errors.JaxRuntimeError("NOT_FOUND: Function not found")

    monkeypatch.setattr(module, "ModelRunner", Runner)
    starts, loading = Starts(loaded), SimpleNamespace(params=dict)
    with pytest.raises(jax.errors.JaxRuntimeError):
        module._warm_runner(
            EngineConfig(),
            starts,
            loading,
            default_mesh(),
            Silent(),
            Phases(),  # type: ignore
        )
    assert (starts.forgotten, loaded) == (forgotten, [])


def test_a_runner_that_does_not_run_is_gone_before_programs_are_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its slabs fill the device."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Runner:
        def __init__(self, *_: Any, **__: Any) -> None:
            assert not alive
            alive.add(self)

        def warmup(self, _: Any) -> None:
            if starts.loaded:
                raise jax.errors.JaxRuntimeError("NOT_FOUND: Function not found")

    class Watching(Starts):
        def prepare(self, **given: Any) -> Any:
            assert not alive
            return super().prepare(**given)

    monkeypatch.setattr(module, "ModelRunner", Runner)
    starts, loading = Watching([3, 0]), SimpleNamespace(params=dict)
    runner, *_ = module._warm_runner(
        EngineConfig(),
        starts,  # type: ignore
        loading,  # type: ignore
        default_mesh(),
        Silent(),
        Phases(),
    )
    assert list(alive) == [runner]


def test_loading_takes_no_more_of_the_host_than_the_table_says() -> None:
    """On CPU the arrays themselves are the host's, too."""
    config = EngineConfig(model="demo")
    checkpoint, mesh = module.open_checkpoint(config), default_mesh()
    starting = module.make_startup(config, checkpoint, mesh)
    table = starting.sizes().memory
    tracemalloc.start()
    try:
        params = module.load(checkpoint, starting.decoder, mesh)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(array.nbytes for array in params.values()) == table.weights
    assert peak <= table.weights + table.host_staging + CHUNK_BYTES
