"""API keys at rest: what is kept, what is refused, and that a secret is nowhere."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from quire.errors import InvalidConfig
from quire.sched.quota import Limits
from quire.serving.auth.key_file import Key, KeyTable, read_keys, write_keys
from quire.serving.auth.keys import KeyHash, draw_key, id_of


def a_key(tenant: str = "acme", **more: str) -> tuple[str, Key]:
    id, text = draw_key()
    return text, Key(id=id, tenant=tenant, hash=KeyHash.of(text), **more)


def table_of(*keys: Key, **tenants: Limits) -> KeyTable:
    return KeyTable(tenants or {"acme": Limits()}, {key.id: key for key in keys})


def test_a_key_is_found_by_its_whole_text_alone() -> None:
    (text, key), (_, other) = a_key(), a_key()
    table = table_of(key, other)
    assert table.find(text) is key
    wrong = [
        "", "quire-", text[:-1], text + "a", text.upper(), text.replace(key.id, other.id),
        text.replace(key.id, "00000000"), text[:-1] + ("a" if text[-1] != "a" else "b"), "é" * 9,
    ]  # fmt: skip
    for each in wrong:
        assert table.find(each) is None, each


def test_a_file_says_again_what_was_written(tmp_path: Path) -> None:
    text, key = a_key(created="2026-11-22", note='quoted: "#" ü')
    limits = Limits(requests_per_minute=6, concurrency=2, top_priority=-3, weight=0.5)
    table = table_of(key, acme=limits, empty=Limits(top_priority=0))
    write_keys(tmp_path / "keys", table)
    assert read_keys(tmp_path / "keys") == table
    assert stat.S_IMODE(os.stat(tmp_path / "keys").st_mode) == 0o600
    assert os.listdir(tmp_path) == ["keys"]
    written = (tmp_path / "keys").read_text()
    assert text not in written and text.split("-", 2)[2] not in written


def test_a_file_that_others_could_read_is_closed_when_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("")
    file.chmod(0o644)
    write_keys(file, KeyTable())
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600


def test_equal_keys_leave_different_hashes() -> None:
    _, text = draw_key()
    assert str(KeyHash.of(text)) != str(KeyHash.of(text))
    assert KeyHash.parse(str(KeyHash.of(text))).matches(text)
    assert id_of(text) is not None and len(text.split("-", 2)[2]) == 43


GOOD = str(KeyHash.of("x"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: [", "not YAML"),
        ("[1]", "the file: got list, must be names with values"),
        ("teants: {}", "the file: got 'teants', must be one of tenants, keys"),
        ("tenants: {a: {wieght: 2}}", "tenants.a.wieght: no such setting, must be one of requests"),
        ("tenants: {a: {weight: 0}}", "tenants.a.weight: got 0, must be a number in"),
        ("tenants: {a: {weight: .nan}}", "tenants.a.weight: got nan"),
        ("tenants: {a: {weight: yes}}", "tenants.a.weight: got True"),
        ("tenants: {a: {concurrency: 0}}", "tenants.a.concurrency: got 0, must be at least 1"),
        ("tenants: {a: {tokens_per_minute: 1.5}}", "got 1.5, must be a whole number"),
        ("tenants: {a: 3}", "tenants.a: got int, must be names with values"),
        ("tenants: {1: {}}", "tenant: got 1, must be a text of 1 to 256"),
        ("keys: {}", None),
        ("keys: 3", "keys: got int, must be a list"),
        (
            f"keys: [{{id: a, tenant: b, hash: '{GOOD}'}}]",
            r"keys\[0\].tenant: got 'b', must be one",
        ),
        ("keys: [{id: 1, tenant: b, hash: c}]", r"keys\[0\].id: got 1, must be a text"),
        ("keys: [{tenant: b, hash: c}]", r"keys\[0\].id: got '', must be a text"),
        ("keys: [{id: a, tenant: b, hash: hush}]", r"keys\[0\].hash: must be like sha256"),
        ("keys: [{id: a, secret: b}]", r"keys\[0\]: got 'secret', must be one of id, tenant"),
        (
            f"tenants: {{b: }}\nkeys: [{{id: a, tenant: b, hash: '{GOOD}'}}, "
            f"{{id: a, tenant: b, hash: '{GOOD}'}}]",
            r"keys\[1\].id: got 'a', must be unlike all others",
        ),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, content: str, says: str | None) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    if says is None:
        assert read_keys(file) == KeyTable()
        return
    with pytest.raises(InvalidConfig, match=says) as caught:
        read_keys(file)
    assert str(caught.value).startswith(str(file)) and "hush" not in str(caught.value)


def test_a_tenant_may_not_go_before_others_unless_the_file_says_so(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("tenants: {a: , b: {top_priority: -5}, c: {top_priority: null}}")
    found = {name: limits.top_priority for name, limits in read_keys(file).tenants.items()}
    assert found == {"a": 0, "b": -5, "c": None}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="none: cannot be read"):
        read_keys(tmp_path / "none")
