"""API keys at rest: what is kept, what is refused, and that a secret is nowhere."""

from __future__ import annotations

import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quire.errors import InvalidConfig
from quire.sched.quota import Limits
from quire.serving.auth import file_edit
from quire.serving.auth.key_file import Key, KeyTable, edit_keys, read_keys, write_keys
from quire.serving.auth.keys import KeyHash, draw_key, id_of

GOOD = str(KeyHash.of("x"))


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


def test_a_file_keeps_its_mode_and_its_group(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    write_keys(file, KeyTable())
    file.chmod(0o640)
    groups = [group for group in os.getgroups() if group != os.stat(file).st_gid]
    if groups:  # whoever runs this may give it to another of theirs
        os.chown(file, -1, groups[0])
    before = os.stat(file)
    os.utime(file, (1, 1))
    link = tmp_path / "link"
    link.symlink_to(file)
    edit_keys(link, lambda table: KeyTable({"acme": Limits()}, {}))
    after = os.stat(file)
    assert stat.S_IMODE(after.st_mode) == 0o640
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert after.st_mtime > 1 and link.is_symlink() and "acme" in read_keys(file).tenants


def test_a_file_that_cannot_be_its_owners_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a group may write the folder."""
    file = tmp_path / "keys"
    write_keys(file, KeyTable())
    was = file.read_text()
    real = os.stat

    def stat_of(path: Any, **how: Any) -> os.stat_result:
        found = real(path, **how)
        owner = found.st_uid + 1 if str(path) == str(file) else found.st_uid
        return os.stat_result((*found[:4], owner, *found[5:]))

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    changed = SimpleNamespace(**{**vars(os), "stat": stat_of, "chown": refuse})
    monkeypatch.setattr(file_edit, "os", changed)  # nobody else's in this process
    with pytest.raises(InvalidConfig, match=r"keys: cannot be written: it belongs to user \d+"):
        write_keys(file, KeyTable({"acme": Limits()}, {}))
    assert file.read_text() == was and os.listdir(tmp_path) == ["keys"]


def test_edits_at_once_follow_one_another(tmp_path: Path) -> None:
    """The file is new, and each edit takes longer than the next takes to come. Who edits once more
    finds the file that took the first one's place, while others still wait for that first one."""
    file, writers = tmp_path / "keys", 6
    together = threading.Barrier(writers)

    def edit(writer: int) -> None:
        def added(table: KeyTable) -> KeyTable:
            time.sleep(0.01)
            return KeyTable({**table.tenants, name: Limits()}, table.keys)

        together.wait()
        for number in range(3):
            name = f"{writer}-{number}"
            edit_keys(file, added)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(edit, range(writers)))
    assert len(read_keys(file).tenants) == 3 * writers
    assert os.listdir(tmp_path) == ["keys"] and stat.S_IMODE(os.stat(file).st_mode) == 0o600


def test_an_edit_that_fails_leaves_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    write_keys(file, KeyTable({"acme": Limits()}, {}))
    was = file.read_text()

    def fail(table: KeyTable) -> KeyTable:
        raise InvalidConfig("no")

    with pytest.raises(InvalidConfig, match="no"):
        edit_keys(file, fail)
    assert file.read_text() == was and os.listdir(tmp_path) == ["keys"]


# Each is something else in YAML 1.1 or 1.2 unless it is quoted.
TEXTS = ["no", "on", "null", "~", "010", "0o17", "12e45678", "1_000", "22:30", "2026-11-22", "<<"]


@pytest.mark.parametrize("text", TEXTS)
def test_whatever_looks_like_something_else_comes_back_as_text(tmp_path: Path, text: str) -> None:
    _, key = a_key(text, note=text, created=text)
    table = table_of(replace(key, id=text), **{text: Limits()})
    write_keys(tmp_path / "keys", table)
    assert read_keys(tmp_path / "keys") == table


@pytest.mark.parametrize("text", ["no", "on", "1_000", "22:30", "2026-11-22", "2026-02-31", "<<"])
def test_what_yaml_1_2_takes_for_text_needs_no_quotes(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(
        f"tenants: {{{text}: }}\nkeys: [{{id: a, tenant: {text}, hash: '{GOOD}', created: {text}}}]"
    )
    (key,) = read_keys(file).keys.values()
    assert key.tenant == key.created == text and list(read_keys(file).tenants) == [text]


def test_equal_keys_leave_different_hashes() -> None:
    _, text = draw_key()
    assert str(KeyHash.of(text)) != str(KeyHash.of(text))
    assert KeyHash.parse(str(KeyHash.of(text))).matches(text)
    assert id_of(text) is not None and len(text.split("-", 2)[2]) == 43


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: [", "not YAML"),
        ("[1]", "the file: got list, must be names with values"),
        ("teants: {}", "the file: got 'teants', must be one of tenants, keys"),
        ("tenants: {a: {wieght: 2}}", "tenants.a.wieght: no such setting, must be one of requests"),
        ("tenants: {a: {weight: 0}}", "tenants.a.weight: got 0, must be a number in"),
        ("tenants: {a: {weight: .nan}}", "tenants.a.weight: got nan"),
        ("tenants: {a: {weight: true}}", "tenants.a.weight: got True"),
        ("tenants: {a: {weight: yes}}", "tenants.a.weight: got 'yes', must be a number"),
        ("tenants: {a: {concurrency: 1_000}}", "got '1_000', must be a whole number"),
        ("tenants: {a: {weight: 1}, a: {weight: 2}}", "not YAML: a: is there twice"),
        ("tenants: {a: {concurrency: !!int x}}", "not YAML: 'x' is no int"),
        ("tenants: {a: {concurrency: !!bool x}}", "not YAML: 'x' is no bool"),
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
        (f"keys: [{{id: a, tenant: b, hash: '{GOOD}', created: 3}}]", r"created: got 3, must be"),
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


@pytest.mark.parametrize("line", ['- hash: "qk_SECRET', "- hash: [qk_SECRET", "qk_SECRET: : x"])
def test_a_key_in_a_file_that_is_not_yaml_is_not_repeated(tmp_path: Path, line: str) -> None:
    """The message goes to logs."""
    file = tmp_path / "keys"
    file.write_text(f"keys:\n  {line}\n   x")
    with pytest.raises(InvalidConfig, match=r"keys: not YAML: .*line \d+, column \d+") as caught:
        read_keys(file)
    assert "SECRET" not in str(caught.value)
