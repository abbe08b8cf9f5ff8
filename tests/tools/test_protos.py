"""The checks of protos/v1: that they pass, and that they find what they are for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from quire.tools import protos
from quire.tools.proto_changes import breaking_changes

FIXTURES = Path(__file__).parent / "protos"

BREAKS = """\
quire.test.Whole.removed: removed
quire.test.Whole.renumbered: number: was 2, is 20
quire.test.Whole.retyped: type: was TYPE_UINT32, is TYPE_UINT64
quire.test.Whole.single: cardinality: was LABEL_REPEATED, is LABEL_OPTIONAL
quire.test.Whole.unset_was_unset: presence: was explicit, is implicit
quire.test.Whole.leaves: presence: was explicit, is implicit
quire.test.Whole.leaves: oneof: was choice, is none
quire.test.Whole.joins: presence: was implicit, is explicit
quire.test.Whole.joins: oneof: was none, is choice
quire.test.Whole.renamed: renamed to named_anew, or its number 9 used again
quire.test.Whole.other_message: type: was .quire.test.Whole.Inner, is .quire.test.Empty
quire.test.Whole.spelled: JSON name: was spelled, is spelt
quire.test.Whole: reserved 100 to 199: reserved no more
quire.test.Whole: reserved 300: used again, by reused
quire.test.Whole: reserved 'was': used again
quire.test.Whole: reserved 'once': reserved no more
quire.test.Whole.ValuesEntry.value: type: was TYPE_UINT32, is TYPE_STRING
quire.test.Whole.Inner.deep: removed
quire.test.Whole.Nested.NESTED_GONE: removed
quire.test.Kind.KIND_GONE: removed
quire.test.Kind.KIND_MOVED: number: was 2, is 4
quire.test.Dropped: removed
quire.test.Kept.Removed: removed
quire.test.Kept.OtherInput: input type: was .quire.test.Whole, is .quire.test.Empty
quire.test.Kept.Streamed: server streaming: was False, is True
quire.test.Gone: removed"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The folder protos alone, to be spoilt."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(protos.ROOT / "protos", tmp_path / "protos", ignore=ignored)
    return tmp_path


def edit(root: Path, old: str, new: str, name: str = "generation.proto") -> None:
    path = root / "protos/v1" / name
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def described(name: str, tmp_path: Path) -> FileDescriptorSet:
    (tmp_path / "protos").mkdir(exist_ok=True)
    shutil.copy(FIXTURES / name, tmp_path / "protos/test.proto")
    return protos.describe(tmp_path, "protos/test.proto")


def test_stubs_are_fresh_and_promises_kept() -> None:
    assert protos.stale() == []
    assert protos.broken() == []


def test_every_break_of_the_fixture_is_found_and_nothing_else(tmp_path: Path) -> None:
    before, after = (described(name, tmp_path) for name in ("before.proto", "after.proto"))
    assert breaking_changes(before, after) == BREAKS.splitlines()
    assert breaking_changes(before, before) == []
    moved = FileDescriptorSet.FromString(before.SerializeToString())
    moved.file[0].package = "quire.other"
    assert "package: was quire.test, is quire.other" in breaking_changes(before, moved)[0]
    assert breaking_changes(before, FileDescriptorSet()) == ["quire/protos/test.proto: removed"]


def test_a_break_of_the_public_contract_fails_and_cannot_be_accepted(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy, "optional float temperature = 1;", "optional float temperature = 30;")
    why = "quire.v1.SamplingParams.temperature: number: was 1, is 30"
    assert protos.broken(copy) == [why]
    for action in ("check", "accept"):
        assert protos.main([action, "--root", str(copy)]) == 1
        assert why in capsys.readouterr().err
    assert protos.main(["accept", "--breaking", "--root", str(copy)]) == 0
    assert protos.broken(copy) == []


def test_an_addition_breaks_nothing_and_must_be_accepted(copy: Path) -> None:
    edit(copy, "optional uint32 best_of = 21;", "optional uint32 best_of = 21;\n  bool more = 22;")
    (found,) = protos.broken(copy)
    assert "lacks what was added" in found and "make protos-accept" in found
    assert protos.main(["accept", "--root", str(copy)]) == 0
    assert protos.broken(copy) == []


def _field(root: Path) -> None:
    edit(root, "optional uint32 best_of = 21;", "optional uint32 best_of = 22;")


def _removed(root: Path) -> None:
    (root / "protos/v1/generation_pb2_grpc.py").unlink()


def _left_over(root: Path) -> None:
    (root / "protos/v1/older_pb2.py").write_text("")


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_field, "generation_pb2.py"),
        (_removed, "generation_pb2_grpc.py"),
        (_left_over, "older_pb2.py"),
    ],
)
def test_stale_stubs_are_found(copy: Path, spoil: Callable[[Path], None], name: str) -> None:
    assert protos.stale(copy) == []
    spoil(copy)
    found = protos.stale(copy)
    assert any(line.startswith(f"protos/v1/{name}: stale") for line in found), found
    assert all("make protos" in line for line in found)


def test_stubs_are_written(copy: Path) -> None:
    _field(copy)
    assert protos.main(["write", "--root", str(copy)]) == 0
    assert protos.stale(copy) == []


def test_a_file_that_protoc_refuses_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "message TokenIds {", "message TokenIds {{")
    with pytest.raises(subprocess.CalledProcessError):
        protos.stale(copy)
    assert protos.main(["check", "--root", str(copy)]) == 1
    assert "generation.proto" in capsys.readouterr().err
