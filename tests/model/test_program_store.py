"""Stored programs: found by everything that matters, never trusted, private, and bounded."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from quire.model import program_store
from quire.model.mesh import default_mesh
from quire.model.program_store import MAGIC, ProgramStore, environment, make_private

FACTS = {"program": "step", "sizes": "1, 2"}
FIGURES = {"temp": 7}


@pytest.fixture
def store(tmp_path: Path) -> ProgramStore:
    make_private(tmp_path / "programs")
    return ProgramStore(tmp_path / "programs", 10_000)


def the_file(store: ProgramStore) -> Path:
    (file,) = store.folder.iterdir()
    return file


def test_what_was_put_is_got_by_the_same_facts_only(store: ProgramStore) -> None:
    assert store.get(FACTS) is None
    store.put(FACTS, b"code", FIGURES)
    entry = store.get(dict(reversed(FACTS.items())))
    assert entry is not None and (entry.body, entry.figures) == (b"code", FIGURES)
    for other in ({**FACTS, "sizes": "1, 3"}, {**FACTS, "more": ""}, {"program": "step"}):
        assert store.get(other) is None
    assert store.problems == []


def test_a_store_that_may_only_be_read_serves_until_an_entry_is_discarded(
    store: ProgramStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    store.put(FACTS, b"code", FIGURES)
    with monkeypatch.context() as read_only:
        read_only.setattr(program_store, "os", SimpleNamespace(**{**vars(os), "utime": refuse}))
        read_only.setattr(Path, "unlink", refuse)
        assert store.get(FACTS) is not None
        assert store.problems == []
        store.discard(FACTS, "it does not run")
        assert store.get(FACTS) is None  # or a start would load and discard it for ever
    store.put(FACTS, b"new", FIGURES)
    entry = store.get(FACTS)
    assert entry is not None and entry.body == b"new"


def flip(at: int):
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)

    return damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut_short(file: Path) -> None:
    file.write_bytes(MAGIC[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty,
        cut_short,
        *(flip(at) for at in (0, len(MAGIC), len(MAGIC) + 33, len(MAGIC) + 60, -1)),
    ],
)
def test_a_damaged_file_is_removed_and_said(store: ProgramStore, damage) -> None:
    store.put(FACTS, b"code", FIGURES)
    damage(the_file(store))
    assert store.get(FACTS) is None
    assert list(store.folder.iterdir()) == []
    (problem,) = store.problems
    assert "is compiled anew" in problem and problem.endswith("it is damaged")
    store.put(FACTS, b"code", FIGURES)
    assert store.get(FACTS) is not None


def test_a_file_of_another_version_is_removed_and_said(
    store: ProgramStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr(program_store, "MAGIC", MAGIC.replace(b"1", b"2"))
        store.put(FACTS, b"code", FIGURES)
    assert store.get(FACTS) is None and list(store.folder.iterdir()) == []
    assert store.problems[0].endswith("it is of another version")


def test_a_file_under_anothers_name_is_not_taken(store: ProgramStore) -> None:
    store.put(FACTS, b"code", FIGURES)
    other = {**FACTS, "sizes": "other"}
    os.rename(the_file(store), store._path(other))
    assert store.get(other) is None
    assert "made from something else" in store.problems[0]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_not_read(store: ProgramStore, mode: int) -> None:
    store.put(FACTS, b"code", FIGURES)
    assert the_file(store).stat().st_mode & 0o777 == 0o600
    the_file(store).chmod(mode)
    assert store.get(FACTS) is None
    assert "others may write there" in store.problems[0]


def test_a_folder_that_others_may_write_or_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_private(tmp_path / "new" / "inner")
    assert (tmp_path / "new" / "inner").stat().st_mode & 0o777 == 0o700
    (tmp_path / "new").chmod(0o770)
    with pytest.raises(PermissionError, match=r"others may write .*chmod go-w"):
        make_private(tmp_path / "new")
    (tmp_path / "new").chmod(0o755)
    make_private(tmp_path / "new")
    another = {**vars(os), "geteuid": lambda: os.getuid() + 1}
    monkeypatch.setattr(program_store, "os", SimpleNamespace(**another))
    with pytest.raises(PermissionError, match="belongs to user"):
        make_private(tmp_path / "new")


def test_what_was_used_least_recently_goes_first(store: ProgramStore) -> None:
    for name in "abcd":
        store.put({"program": name}, bytes(3000), {})
    for age, name in enumerate("dcba"):
        os.utime(store._path({"program": name}), (1000 - age, 1000 - age))
    assert store.get({"program": "a"}) is not None  # which makes it the newest
    store.prune()
    kept = {name for name in "abcd" if store.get({"program": name}) is not None}
    assert kept == {"a", "c", "d"}
    assert sum(file.stat().st_size for file in store.folder.iterdir()) <= store.limit


def test_pruning_looks_at_the_whole_cache(tmp_path: Path) -> None:
    """An older release's programs and JAX's own count, and go, too."""
    old = tmp_path / "old" / "programs" / "x.program"
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(9000))
    os.utime(old, (1, 1))
    make_private(tmp_path / "new")
    store = ProgramStore(tmp_path / "new", 10_000, within=tmp_path)
    store.put(FACTS, bytes(3000), {})
    store.prune()
    assert not old.exists() and store.get(FACTS) is not None


def test_many_writers_leave_one_whole_file(store: ProgramStore) -> None:
    def work() -> None:
        for _ in range(20):
            store.put(FACTS, bytes(5000), FIGURES)
            entry = store.get(FACTS)
            assert entry is not None and entry.body == bytes(5000)

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and store.problems == [] and the_file(store)


def test_a_disk_that_cannot_be_written_costs_no_start(store: ProgramStore) -> None:
    store.folder.rmdir()
    store.put(FACTS, b"code", FIGURES)
    assert "was not stored" in store.problems[0]


def test_the_environment_holds_what_may_change_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = default_mesh()
    before = environment(mesh)
    assert before == environment(mesh)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    changed = {name for name, value in environment(mesh).items() if value != before[name]}
    assert changed == {"compiler settings"}
    monkeypatch.undo()
    monkeypatch.setattr(program_store, "_versions", lambda: ("jax 0.0",))
    monkeypatch.setattr(program_store, "_source_digest", lambda: "edited")
    changed = {name for name, value in environment(mesh).items() if value != before[name]}
    assert changed == {"versions", "source"}
    assert "cpu" in before["backend"] and "device_kind" in before["devices"]


def test_the_source_digest_follows_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "table.json").write_text("1")
    (tmp_path / "here.py").write_text("")
    monkeypatch.setattr(program_store, "__file__", str(tmp_path / "here.py"))
    digest = program_store._source_digest.__wrapped__
    before = digest()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_text("x")
    assert digest() == before
    (tmp_path / "kernels" / "table.json").write_text("2")
    assert digest() != before


def test_libraries_that_programs_call_are_among_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer cuBLAS or cuDNN has other algorithms under the numbers that XLA wrote down."""

    def versions(cublas: str) -> str:
        installed = [("jax", "1"), ("Rich", "2"), ("nvidia-cublas", cublas)]
        found = [SimpleNamespace(name=name, version=number) for name, number in installed]
        monkeypatch.setattr(program_store, "distributions", lambda: found)
        program_store._versions.cache_clear()
        return environment(default_mesh())["versions"]

    try:
        assert versions("13.1") == "jax 1, nvidia-cublas 13.1"
        assert versions("13.2") != versions("13.1")
    finally:
        program_store._versions.cache_clear()
