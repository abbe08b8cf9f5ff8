"""Flags from settings, and the settings themselves."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from quire import EngineConfig, ServerConfig
from quire.config import parse_bytes, settings_of
from quire.errors import InvalidConfig
from quire.tools import cli
from quire.tools.flags import add_settings, settings_from
from quire.tools.settings_file import read_settings_file

ENGINE: dict[str, tuple[list[str], Any]] = {
    "model": (["--model=here"], "here"),
    "revision": (["--revision=v1"], "v1"),
    "offline": (["--offline"], True),
    "platform": (["--platform=tpu"], "tpu"),
    "dtype": (["--dtype=bfloat16"], "bfloat16"),
    "dummy_weights": (["--dummy-weights"], True),
    "max_model_len": (["--max-model-len=100"], 100),
    "lift_context_limit": (["--lift-context-limit", "--max-model-len=100"], True),
    "max_num_seqs": (["--max-num-seqs=5"], 5),
    "max_batched_tokens": (["--max-batched-tokens=64"], 64),
    "prefill_chunk": (["--prefill-chunk=32"], 32),
    "page_size": (["--page-size=64"], 64),
    "memory": (["--memory=6GiB"], 6 * 2**30),
    "kv_memory": (["--kv-memory=1.5GiB"], 3 * 2**29),
    "tensor_parallel": (["--tensor-parallel=2"], 2),
    "prefix_caching": (["--no-prefix-caching"], False),
    "overlap": (["--no-overlap"], False),
    "decode_steps": (["--decode-steps=4"], 4),
    "max_queue": (["--max-queue=3"], 3),
    "warmup": (["--no-warmup"], False),
    "compile_threads": (["--compile-threads=2"], 2),
    "cache_dir": (["--cache-dir="], ""),
    "cache_limit": (["--cache-limit=1GiB"], 2**30),
    "ignore_config_fields": (["--ignore-config-fields=a, b"], ("a", "b")),
}
SERVER: dict[str, tuple[list[str], Any]] = {
    "host": (["--host=::1"], "::1"),
    "port": (["--port=0"], 0),
    "frontends": (["--frontends=2"], 2),
    "api_keys": (["--api-keys=keys.yaml"], "keys.yaml"),
    "insecure": (["--insecure"], True),
    "tls_cert": (["--tls-cert=cert", "--tls-key=key"], "cert"),
    "tls_key": (["--tls-key=key", "--tls-cert=cert"], "key"),
    "tls_client_ca": (["--tls-client-ca=ca", "--tls-cert=cert", "--tls-key=key"], "ca"),
    "compression": (["--compression=gzip"], "gzip"),
    "max_message_size": (["--max-message-size=1MiB"], 2**20),
    "max_calls": (["--max-calls=9"], 9),
    "keepalive": (["--keepalive=30"], 30),
    "drain_timeout": (["--drain-timeout=5"], 5),
    "step_timeout": (["--step-timeout=9"], 9),
    "metrics_port": (["--metrics-port=0"], 0),
    "metrics_host": (["--metrics-host=::1"], "::1"),
    "log_format": (["--log-format=json"], "json"),
    "log_level": (["--log-level=warning"], "warning"),
    "log_prompts": (["--log-prompts"], True),
    "otlp_endpoint": (["--otlp-endpoint=http://host:4317"], "http://host:4317"),
}


def parsed(config: type, argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_settings(parser, config)
    return settings_from(parser.parse_args(argv), config)


@pytest.mark.parametrize(("config", "table"), [(EngineConfig, ENGINE), (ServerConfig, SERVER)])
def test_every_setting_is_a_flag(config: type, table: dict[str, tuple[list[str], Any]]) -> None:
    assert list(table) == [f.name for f in fields(config)] == [s.name for s in settings_of(config)]
    for name, (argv, value) in table.items():
        found = parsed(config, argv)
        assert found[name] == value and len(found) == len(argv)
        assert value != config.__dataclass_fields__[name].default
    argv = [arg for flags, _ in table.values() for arg in flags]
    everything = {name: value for name, (_, value) in table.items()}
    assert parsed(config, argv) == everything
    assert parsed(config, []) == {}
    parser = argparse.ArgumentParser()
    add_settings(parser, config)
    shown = parser.format_help()
    for field in settings_of(config):
        assert field.metadata["help"].split()[0] in shown


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "int8"}, "dtype: got 'int8', must be one of auto, bfloat16, float16, float32"),
        ({"max_model_len": 1}, "max_model_len: got 1, must be at least 2"),
        ({"max_num_seqs": 0}, "max_num_seqs: got 0, must be at least 1"),
        ({"max_num_seqs": "4"}, "max_num_seqs: got '4', must be a whole number"),
        ({"max_num_seqs": True}, "max_num_seqs: got True, must be a whole number"),
        ({"page_size": 24}, "page_size: got 24, must be a power of two"),
        ({"max_queue": None}, "max_queue: got None, must be a whole number"),
        ({"overlap": 1}, "overlap: got 1, must be true or false"),
        ({"model": 3}, "model: got 3, must be text"),
        ({"kv_memory": "much"}, "kv_memory: size: got 'much', must be like 512MiB"),
        ({"kv_memory": 0}, "kv_memory: got 0, must be at least 1"),
        ({"cache_limit": "1KiB"}, "cache_limit: got 1024, must be at least 16777216"),
        ({"cache_limit": 2**60}, "cache_limit: got 1152921504606846976, must be at most"),
        ({"ignore_config_fields": "a"}, "ignore_config_fields: got 'a', must be a list of names"),
        ({"lift_context_limit": True}, "lift_context_limit: needs max_model_len, got none"),
        (
            {"prefill_chunk": 64, "max_batched_tokens": 32},
            r"prefill_chunk: got 64, must be at most max_batched_tokens \(32\)",
        ),
    ],
)
def test_bad_engine_settings_name_field_value_and_limit(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidConfig, match=says):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"port": -1}, "port: got -1, must be at least 0"),
        ({"port": 65536}, "port: got 65536, must be at most 65535"),
        ({"drain_timeout": -1}, "drain_timeout: got -1, must be at least 0"),
        ({"host": ""}, "host: got '', must be a name or an address"),
    ],
)
def test_bad_server_settings_name_field_value_and_limit(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidConfig, match=says):
        ServerConfig(**settings)


def test_sizes_and_lists_are_made_plain() -> None:
    config = EngineConfig(kv_memory="2KiB", ignore_config_fields=["a"])  # type: ignore[arg-type]
    assert (config.kv_memory, config.ignore_config_fields) == (2048, ("a",))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1073741824", 2**30),
        ("7B", 7),
        ("512MiB", 2**29),
        ("6GB", 6 * 10**9),
        ("6 gb", 6 * 10**9),
        ("6G", 6 * 2**30),
        ("0.5KiB", 512),
        ("1.1GB", 1_100_000_000),
        (" 2tib ", 2**41),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "1_000", "1,5GB", "5XB", "inf", "٣"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidConfig, match="must be like 512MiB, 6GB or a number of bytes"):
        parse_bytes(text)


# What documentation says of them

ROOT = Path(__file__).parents[2]
DOCS = [
    "README.md", "CHANGELOG.md", "docs/benchmarks.md", "docs/configuration.md", "docs/design.md",
    "docs/eval.md", "docs/metrics.md", "docs/operations.md", "docs/performance.md",
    "docs/tenants.md",
]  # fmt: skip
OTHERS = {"--import-mode", "--model-server-metrics-port"}  # pytest's, and Kubernetes'


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Those of a command and of all below it."""
    found: set[str] = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found.update(*map(flags_of, action.choices.values()))
    return found


@pytest.mark.parametrize("page", DOCS)
def test_documentation_names_no_flag_that_is_not_there(page: str) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / page).read_text("utf-8")))
    assert named and named - OTHERS <= flags_of(cli.parser())


def test_the_settings_file_of_the_documentation_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "docs/configuration.md").read_text("utf-8")
    file = tmp_path / "production.yaml"
    file.write_text(text.split("```yaml\n")[1].split("```")[0])
    found = read_settings_file(file)
    assert found["kv_memory"].value == "6GiB" and found["port"].value == 8000
    assert found["max_num_seqs"].where == f"{file}:3"
