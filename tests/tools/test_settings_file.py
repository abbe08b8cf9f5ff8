"""Settings from a YAML file, below flags, and what `quire config show` says of them."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint

from quire import EngineConfig, ServerConfig
from quire.errors import InvalidConfig
from quire.tools.cli import main
from quire.tools.flags import add_model, add_settings, settings_from
from quire.tools.settings_file import read_settings_file


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        file = tmp_path / "settings.yaml"
        file.write_text(text)
        return file

    return write


def parsed(*argv: object, default: str | None = None, skip: tuple[str, ...] = ("model",)):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    if "model" in skip:
        add_model(parser, default=default)
    add_settings(parser, ServerConfig)
    add_settings(parser, EngineConfig, skip=skip)
    args = parser.parse_args([str(arg) for arg in argv])
    return settings_from(args, EngineConfig), settings_from(args, ServerConfig)


def test_one_file_for_engine_and_server(write: Any) -> None:
    file = write(
        "# all kinds\nmodel: here\nmax-num-seqs: 4\nkv_memory: 6MiB\noverlap: false\n"
        "ignore_config_fields: [a, b]\nmax_model_len: null\nport: 8000\nhost: ::1\n"
    )
    engine, server = parsed("--config", file)
    assert engine == {
        "model": "here",
        "max_num_seqs": 4,
        "kv_memory": "6MiB",
        "overlap": False,
        "ignore_config_fields": ["a", "b"],
        "max_model_len": None,
    }
    assert EngineConfig(**engine).kv_memory == 6 * 2**20
    assert server == {"port": 8000, "host": "::1"}


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("+8", 8), ("0o10", 8), ("0x10", 16)])
def test_numbers_are_those_of_yaml_1_2(write: Any, text: str, number: int) -> None:
    engine, _ = parsed("--config", write(f"model: m\nmax_num_seqs: {text}\n"))
    assert engine["max_num_seqs"] == number


def test_flags_override_the_file(write: Any) -> None:
    file = write("model: here\nmax_num_seqs: 4\noverlap: false\nport: 8000\n")
    engine, server = parsed("there", "--config", file, "--max-num-seqs=5", "--overlap")
    assert engine == {"model": "there", "max_num_seqs": 5, "overlap": True}
    assert server == {"port": 8000}
    # One flag also mends what would contradict another setting of the file.
    file = write("model: here\nprefill_chunk: 64\n")
    with pytest.raises(InvalidConfig, match=r"settings.yaml:2: prefill_chunk: got 64, must be at"):
        parsed("--config", file, "--max-batched-tokens=32")
    engine, _ = parsed("--config", file, "--max-batched-tokens=32", "--prefill-chunk=16")
    assert engine["prefill_chunk"] == 16


def test_a_command_leaves_out_what_it_has_no_flag_for(write: Any) -> None:
    engine, _ = parsed("m", "--config", write("max_queue: 7\n"), skip=("model", "max_queue"))
    assert engine == {"model": "m"}
    with pytest.raises(InvalidConfig, match="2: max_queue: got 0, must be at least 1"):
        parsed("m", "--config", write("port: 1\nmax_queue: 0"), skip=("model", "max_queue"))


def test_the_model_comes_from_somewhere(write: Any) -> None:
    with pytest.raises(InvalidConfig, match="model: got none, must be given"):
        parsed()
    assert parsed(default="demo")[0] == {"model": "demo"}
    assert parsed("--config", write("model: x"), default="demo")[0] == {"model": "x"}
    assert parsed(write(""), "--config", write(""))[0] == {"model": str(write(""))}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("port: 1\nmax_num_seq: 4\n", ":2: max_num_seq: no such setting; did you mean max_num_s"),
        ("zzz: 4\n", ":1: zzz: no such setting; `quire config show` lists them all"),
        ("? [port]\n: 4\n", ":1: a key is a sequence, must be the name of a setting"),
        ("max_num_seqs: 22:30\n", ":1: max_num_seqs: got '22:30', must be a whole number"),
        ("max_num_seqs: 1_0\n", ":1: max_num_seqs: got '1_0', must be a whole number"),
        ("overlap: no\n", ":1: overlap: got 'no', must be true or false"),
        ("max_num_seqs: !!int x\n", ":1: is not YAML: 'x' is no int"),
        ("max_num_seqs: 1.5\n", ":1: max_num_seqs: got 1.5, must be a whole number"),
        ("max_num_seqs: 1e1\n", ":1: max_num_seqs: got 10.0, must be a whole number"),
        ("engine:\n  dtype: float32\n", ":1: engine: no such setting"),
        ("<<: {port: 1}\n", ":1: <<: no such setting"),
        ("overlap: true\n\nmax_num_seqs: four\n", ":3: max_num_seqs: got 'four', must be a whole"),
        ("page_size: 24\n", ":1: page_size: got 24, must be a power of two"),
        ("dtype: int8\n", ":1: dtype: got 'int8', must be one of auto, "),
        ("kv_memory: much\n", ":1: kv_memory: size: got 'much', must be like 512MiB"),
        ("ignore_config_fields: a,b\n", ":1: ignore_config_fields: got 'a,b', must be a list of"),
        ("ignore_config_fields: [1]\n", r":1: ignore_config_fields: got \(1,\), must be a list of"),
        ("port: 70000\n", ":1: port: got 70000, must be at most 65535"),
        ("port: 1\nhost: a\nport: 2\n", ":3: port: is there twice, also at .*:1"),
        ("kv-memory: 1\nkv_memory: 2\n", ":2: kv_memory: is there twice"),
        ("- port\n", ":1: must hold settings such as"),
        ("port: [1\nhost: 2\n", ":2: is not YAML: "),
        ("port: !!python/name:os.system\n", ":1: is not YAML: could not determine a constructor"),
    ],
)
def test_errors_name_file_and_line(write: Any, text: str, says: str) -> None:
    file = write(text)
    with pytest.raises(InvalidConfig, match="^" + re.escape(str(file)) + says):
        read_settings_file(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for bad in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InvalidConfig, match=f"config: {bad} cannot be read"):
            read_settings_file(bad)
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidConfig, match="cannot be read"):
        read_settings_file(tmp_path / "x")


# quire config show


def test_show_says_where_each_value_is_from(
    write: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_checkpoint.write(tmp_path / "tiny", tokenizer=False)
    (model / "model.safetensors").unlink()
    file = write("port: 8000\nmax_num_seqs: 4\nkv_memory: 1MiB\n")
    argv = ["config", "show", str(model), "--config", str(file), "--max-num-seqs=2", "--json"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    settings = report["settings"]
    assert settings["max_num_seqs"] == {"value": 2, "source": "flag"}
    assert settings["kv_memory"] == {"value": 2**20, "source": f"{file}:3"}
    assert settings["port"] == {"value": 8000, "source": f"{file}:1"}
    assert settings["page_size"] == {"value": None, "source": "default"}
    assert settings["model"] == {"value": str(model), "source": "flag"}
    assert report["settled"]["requests_at_once"] == 2
    assert report["settled"]["longest_sequence"] == 4064  # what 1 MiB holds
    assert report["settled"]["page_size"] == 32  # on CPU

    assert main(["config", "show", "--config", str(file), "--no-overlap"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["overlap", "false", "flag"] in lines
    assert ["dtype", "auto", "default"] in lines
    assert ["revision", "(the", "main", "branch)", "default"] in lines
    assert ["cache_dir", f"({tmp_path}/quire)", "default"] in lines
    assert ["memory", "(settled", "at", "start)", "default"] in lines
    for name in ("api_keys", "metrics_port"):  # nothing is chosen in the user's stead
        assert [name, "(none)", "default"] in lines
    assert not any("settled" in line[:1] for line in lines)


def test_show_names_the_line_of_what_does_not_fit_the_model(
    write: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("port: 1\nmax_model_len: 5000\n")
    assert main(["config", "show", str(folder), "--config", str(file)]) == 1
    assert f"quire: {file}:2: max_model_len: got 5000, must be at most 4096" in (
        capsys.readouterr().err
    )


def test_a_command_takes_its_settings_from_a_file(
    write: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(f"model: {folder}\nmax_num_seqs: 3\nkv_memory: 1MiB\nport: 1\n")
    assert main(["inspect", "--config", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["memory"]["requests_at_once"]) == (str(folder), 3)
