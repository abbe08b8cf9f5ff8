"""`quire convert` and the folders it makes: whole or absent, equal to their source, checked."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_checkpoint
from notes import Notes
from safetensors.numpy import load_file, save_file

from quire import LLM, SamplingParams
from quire.checkpoints import convert as module
from quire.checkpoints.convert import convert
from quire.checkpoints.folder import Checkpoint
from quire.checkpoints.hf_config import read_config
from quire.checkpoints.manifest import MANIFEST, damaged_files, read_manifest
from quire.checkpoints.names import parameters
from quire.checkpoints.params import save_params
from quire.checkpoints.tensors import open_tensors
from quire.errors import CheckpointError
from quire.tools.cli import main

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint.write(
        tmp_path / "source", generation={"do_sample": True, "temperature": 0.5}
    )


@pytest.fixture
def target(source: Path) -> Path:
    """A converted folder."""
    made = source.with_name("made")
    convert(source, made, Notes())
    return made


def params(folder: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    Checkpoint.open(folder).load_params(dtype, found.__setitem__)
    return found


def assert_equal_params(a: Path, b: Path) -> None:
    first, second = params(a), params(b)
    assert list(first) == list(second) and first
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


# What is made


def test_orbax_itself_restores_every_tensor_under_its_own_name(source: Path, target: Path) -> None:
    wanted = load_file(source / "model.safetensors")
    restored = ocp.PyTreeCheckpointer().restore(target / "weights")
    assert restored.keys() == wanted.keys() and Q_PROJ in restored  # not fused
    for name, array in wanted.items():
        assert restored[name].dtype == array.dtype
        np.testing.assert_array_equal(restored[name], array, err_msg=name)


def test_nothing_is_lost(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "consolidated.safetensors").write_bytes(b"the same again")
    (source / ".gitattributes").write_text("x")
    (source / "runs").mkdir()
    reporter = Notes()
    manifest = convert(source, tmp_path / "made", reporter, origin="org/name")
    other_form = {"model.safetensors", "consolidated.safetensors", "pytorch_model.bin"}
    other_form |= {".gitattributes"}
    files = {
        p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()
    } - other_form
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "made" / name).read_bytes() == (source / name).read_bytes()
    assert files < set(manifest.files) and "weights/_METADATA" in manifest.files
    assert reporter.said == [
        "left out, not part of the model: consolidated.safetensors, pytorch_model.bin, runs/"
    ]
    assert (manifest.source, manifest.cast) == ("org/name", None)
    assert "orbax-checkpoint" in manifest.made_by
    assert read_manifest(tmp_path / "made") == manifest
    weights = sum(a.nbytes for a in load_file(source / "model.safetensors").values())
    assert ("converting", weights, weights) in reporter.progress
    assert ("checking", weights, weights) in reporter.progress


@pytest.mark.parametrize("buffer", [np.float32(3), np.ones(4), np.ones(0, np.float16)], ids=repr)
def test_buffers_that_follow_from_the_config_stay_behind(
    source: Path, tmp_path: Path, buffer: Any
) -> None:
    """Whatever their shape and dtype, which nothing reads."""
    tensors = load_file(source / "model.safetensors")
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    save_file(tensors | {n: np.asarray(buffer) for n in names}, source / "model.safetensors")
    reporter = Notes()
    manifest = convert(source, tmp_path / "made", reporter, dtype="float32")
    assert manifest.tensors.keys() == tensors.keys() and manifest.cast is None
    assert reporter.said == [f"left out, follow from config.json: 2 tensors such as {names[0]}"]
    assert_equal_params(source, tmp_path / "made")


def test_tokens_are_equal_from_both_kinds(source: Path, target: Path) -> None:
    answers = []
    for folder in (source, target):
        settings: dict[str, Any] = {"max_num_seqs": 4, "max_batched_tokens": 32, "page_size": 16}
        with LLM(folder, warmup=False, **settings) as llm:
            sampling = [
                SamplingParams(temperature=t, seed=7, max_tokens=12, ignore_eos=True, logprobs=2)
                for t in (0.0, 1.0)
            ]
            answers.append(
                [
                    [(o.token_ids, o.logprobs, o.text) for o in result.outputs]
                    for result in llm.generate(["hello world", "what is a page?"], sampling)
                ]
            )
            assert llm.default_sampling_params("x").temperature == 0.5
    assert answers[0] == answers[1]
    assert_equal_params(source, target)


def test_blocks_of_rows_and_shards(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Tensors of several blocks, the last one short, from a sharded source."""
    from quire.checkpoints import orbax_tensors

    monkeypatch.setattr(orbax_tensors, "MIN_BLOCK", 700)
    monkeypatch.setattr(orbax_tensors, "MAX_BLOCK", 9000)
    tensors = load_file(source / "model.safetensors")
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n, s in weight_map.items() if s == shard}, source / shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (source / "model.safetensors").rename(tmp_path / "whole")
    convert(source, tmp_path / "made", Notes())
    blocks = list((tmp_path / "made" / "weights" / "lm_head.weight").glob("*.0"))
    assert len(blocks) == 5 and tiny_checkpoint.VOCAB % 5 == 0  # 4 of 70 rows, and one of 20
    assert_equal_params(source, tmp_path / "made")
    with open_tensors(tmp_path / "made") as made:
        assert made.nbytes("lm_head.weight") == tensors["lm_head.weight"].nbytes
        first = next(iter(made.chunks("lm_head.weight")))
        assert first[0].start == 0 and first[1].nbytes < tensors["lm_head.weight"].nbytes / 4


def test_cast_is_said_aloud_and_kept(source: Path, tmp_path: Path) -> None:
    reporter = Notes()
    manifest = convert(source, tmp_path / "made", reporter, dtype="bfloat16")
    assert reporter.said == ["casting weights from float32 to bfloat16"]
    assert manifest.cast == "float32 to bfloat16"
    assert {entry.dtype for entry in manifest.tensors.values()} == {"bfloat16"}
    assert Checkpoint.open(tmp_path / "made").config.dtype == "bfloat16"
    assert list(damaged_files(tmp_path / "made")) == []
    for name, array in params(source, "bfloat16").items():
        np.testing.assert_array_equal(params(tmp_path / "made", "bfloat16")[name], array)
    same = Notes()
    assert convert(source, tmp_path / "same", same, dtype="float32").cast is None
    assert same.said == []


def test_float16_refuses_what_it_cannot_hold(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: holds 100000, which float16"):
        convert(source, tmp_path / "made", Notes(), dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# The target


def test_an_existing_target_stays(source: Path, target: Path, tmp_path: Path) -> None:
    before = (target / MANIFEST).read_bytes()
    with pytest.raises(CheckpointError, match="made: exists already; --force replaces"):
        convert(source, target, Notes())
    assert (target / MANIFEST).read_bytes() == before
    convert(source, target, Notes(), force=True, dtype="bfloat16")
    assert read_manifest(target).cast
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    for force in (False, True):
        with pytest.raises(CheckpointError, match=r"precious: is not a converted .* an empty f"):
            convert(source, precious, Notes(), force=force)
    assert (precious / "thesis.txt").exists()
    for holds_source in (source, tmp_path):
        with pytest.raises(CheckpointError, match="holds the source"):
            convert(source, holds_source, Notes(), force=True)
    with pytest.raises(CheckpointError, match="nowhere: does not exist, must be a folder to write"):
        convert(source, tmp_path / "nowhere" / "made", Notes())
    with pytest.raises(CheckpointError, match="is converted already"):
        convert(target, tmp_path / "again", Notes())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "precious", "source"]


def test_an_empty_folder_is_a_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    convert(source, tmp_path / "made", Notes())
    assert_equal_params(source, tmp_path / "made")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with pytest.raises(CheckpointError, match="link: is not a converted folder"):
        convert(source, tmp_path / "link", Notes())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "link", "made", "source"]


def test_a_full_disk_is_known_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(CheckpointError, match=r"converting source needs .* 1 MiB free at"):
        convert(source, tmp_path / "made", Notes())
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


CUT_OFF = """
import os, signal, sys
from pathlib import Path
from quire.checkpoints import convert as module, orbax_tensors
from quire.checkpoints.convert import convert
from quire.serving.progress import Silent

source, target, where = sys.argv[1:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if where == "weights":
    calls = []
    write = orbax_tensors._write
    async def third(folder, leaf):
        calls.append(leaf)
        die() if len(calls) == 3 else await write(folder, leaf)
    orbax_tensors._write = third
else:
    setattr(module, where, die)
convert(Path(source), Path(target), Silent())
"""


@pytest.mark.parametrize("where", ["weights", "_copy_files", "write_manifest", "_check_written"])
def test_a_cut_off_conversion_is_never_taken_for_a_whole_one(
    source: Path, tmp_path: Path, where: str
) -> None:
    made, left = tmp_path / "made", tmp_path / ".made.partial"
    argv = [sys.executable, "-P", "-c", CUT_OFF, str(source), str(made), where]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert left.is_dir() and not made.exists()
    if where != "_check_written":  # all is there then, under the other name
        with pytest.raises(CheckpointError, match="unfinished conversion; run `quire convert`"):
            Checkpoint.open(left)
    reporter = Notes()
    convert(source, made, reporter)
    assert reporter.said == [f"{left} was left by a conversion that was cut off: begun anew"]
    assert not left.exists() and list(damaged_files(made)) == []
    assert_equal_params(source, made)


INTERRUPTED = """
import os, signal, sys
from quire.checkpoints import convert as module, orbax_tensors
from quire.tools.cli import main

source, target, where, number = sys.argv[1:]
# As in a terminal: who runs tests, or a library in its process, may have it ignored.
usual = signal.default_int_handler if int(number) == signal.SIGINT else signal.SIG_DFL
signal.signal(int(number), usual)
place = orbax_tensors if where == "_write" else module
calls, work = [], getattr(place, where)
def interrupted(*args):
    calls.append(args)
    if len(calls) == 3 or place is module:
        os.kill(os.getpid(), int(number))
    return work(*args)
setattr(place, where, interrupted)
sys.exit(main(["convert", source, target]))
"""


@pytest.mark.parametrize(
    ("where", "number"),
    [("_write", signal.SIGINT), ("_check_written", signal.SIGTERM), ("_copy_files", signal.SIGHUP)],
)
def test_an_interrupted_conversion_leaves_nothing(
    source: Path, tmp_path: Path, where: str, number: signal.Signals
) -> None:
    script = ["-c", INTERRUPTED, str(source), str(tmp_path / "made"), where, str(int(number))]
    done = subprocess.run(
        [sys.executable, "-P", *script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("quire: interrupted\n") and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_two_conversions_do_not_write_one_folder(source: Path, tmp_path: Path) -> None:
    class Meanwhile(Notes):
        def note(self, text: str) -> None:
            pass

        @contextlib.contextmanager
        def phase(self, name: str) -> Iterator[Any]:
            with pytest.raises(CheckpointError, match="another conversion is writing it"):
                convert(source, tmp_path / "made", Notes())
            yield lambda done, total: None

    convert(source, tmp_path / "made", Meanwhile())
    assert_equal_params(source, tmp_path / "made")


def test_what_does_not_read_back_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        module, "_list_files", lambda folder: spoil(folder / "weights" / Q_PROJ / "0.0") or {}
    )
    with pytest.raises(CheckpointError, match=f"tensor {Q_PROJ}: does not read back"):
        convert(source, tmp_path / "made", Notes())
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# Damage


def spoil(file: Path, at: int = -1) -> None:
    """Flips one bit of a byte."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_flipped_byte_is_found_and_named_wherever_it_is(target: Path, capsys: Any) -> None:
    assert main(["inspect", str(target), "--verify"]) == 0
    assert "every file is as it was written" in capsys.readouterr().err
    names = list(read_manifest(target).files)
    assert len(names) > 40
    for name in names:
        file = target / name
        whole = file.read_bytes()
        spoil(file, at=len(whole) // 2)
        (found,) = damaged_files(target)
        assert found.startswith(f"{file}: checksum differs")
        if name.startswith("weights/model"):
            assert found.endswith(f"(tensor {Path(name).parts[1]})")
        file.write_bytes(whole)
    spoil(target / "weights" / Q_PROJ / "0.0")
    assert main(["inspect", str(target), "--verify"]) == 1
    said = capsys.readouterr()
    assert f"(tensor {Q_PROJ})" in said.err and said.out == ""


def test_verify_needs_checksums(source: Path, capsys: Any) -> None:
    assert main(["inspect", str(source), "--verify"]) == 1
    assert "has no checksums; a folder made by `quire convert` has" in capsys.readouterr().err


def test_opening_checks_version_and_structure(target: Path) -> None:
    whole = (target / MANIFEST).read_text()

    def refused(pattern: str) -> None:
        with pytest.raises(CheckpointError, match=pattern):
            Checkpoint.open(target)
        (target / MANIFEST).write_text(whole)

    for version, mend in ((2, "update Quire"), (0, "convert the original again")):
        newer = json.loads(whole) | {"format_version": version}
        (target / MANIFEST).write_text(json.dumps(newer))
        refused(f"format_version: got {version}, must be 1 for this Quire; {mend}")
    (target / MANIFEST).write_text(whole.replace('"float32"', '"float16"', 1))
    refused("checksum: differs, so the file is damaged")
    (target / MANIFEST).write_text(whole[: len(whole) // 2])
    refused("cannot be read as JSON")
    (target / MANIFEST).write_text("{}")
    refused("format: must be a checkpoint written by")
    block = target / "weights" / Q_PROJ / "0.0"
    content = block.read_bytes()
    block.write_bytes(content[:-1])
    refused(f"0.0: got {len(content) - 1} bytes, must be {len(content)}")
    block.unlink()  # would read as zeros
    refused("0.0: does not exist, but quire_checkpoint.json lists it")
    (target / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="an unfinished conversion"):
        Checkpoint.open(target)


def test_zeros_are_written_too(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][:] = 0
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "made", Notes())
    assert (tmp_path / "made" / "weights" / "model.norm.weight" / "0").stat().st_size == 128


# Memory


MEASURE = """
import sys
from pathlib import Path
from quire.checkpoints.convert import convert
from quire.checkpoints.folder import Checkpoint
from quire.serving.progress import Silent

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10

def peak(work):
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

def load(folder):
    Checkpoint.open(folder).load_params("bfloat16", lambda name, array: None)

small, big, out = map(Path, sys.argv[1:])
convert(small, out / "small", Silent())  # so that every library is loaded
load(out / "small")
print(peak(lambda: convert(big, out / "big", Silent())), peak(lambda: load(out / "big")))
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Mapped pages of the source plus twice the largest tensor; far from twice the weights."""
    small = tiny_checkpoint.write(tmp_path / "small")
    big = tmp_path / "source"
    big.mkdir()
    sizes = {"vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64}
    layers = {"num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16}
    fields = {**tiny_checkpoint.CONFIG, **sizes, **layers, "torch_dtype": "bfloat16"}
    (big / "config.json").write_text(json.dumps(fields))
    config = read_config(big)
    arrays = {p.name: np.ones(p.shape, ml_dtypes.bfloat16) for p in parameters(config)}
    save_params(big, config, arrays)
    on_disk = (big / "model.safetensors").stat().st_size
    largest = 4096 * 1024 * 2
    assert on_disk > 16 * largest
    (tmp_path / "out").mkdir()
    argv = [sys.executable, "-P", "-c", MEASURE, *map(str, (small, big, tmp_path / "out"))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
    converting, loading = map(int, done.stdout.split())
    assert converting < on_disk + 2 * largest, converting
    # Nothing is mapped here: the fused parameter (two tensors) and the blocks on their way.
    assert loading < 4 * largest < on_disk / 4, loading


# The command


def test_the_command(source: Path, tmp_path: Path, capsys: Any) -> None:
    made = tmp_path / "made"
    assert main(["convert", str(source), str(made), "--dtype=bfloat16"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "casting weights from float32 to bfloat16" in said.err
    assert f"wrote {made}: 21 tensors" in said.err and "converting" in said.err
    assert main(["convert", str(source), str(made)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["inspect", str(made), "--json", "--verify"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] is True
    assert report["architecture"]["checkpoint_dtype"] == "bfloat16"
    assert main(["convert", str(source), ""]) == 1
