"""`quire keys`: a key is shown once, and the file says the rest."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from quire.serving.auth.key_file import read_keys
from quire.tools.cli import main


def test_add_list_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.yaml")
    limits = ["--requests-per-minute=60", "--weight=2", "--top-priority=-1"]
    assert main(["keys", "add", file, "--tenant=acme", "--note=first one", *limits]) == 0
    first = capsys.readouterr().out.strip()
    assert main(["keys", "add", file, "--tenant", "acme", "--concurrency", "5"]) == 0
    second = capsys.readouterr().out.strip()
    table = read_keys(file)
    keys = [table.find(first), table.find(second)]
    assert [key and key.note for key in keys] == ["first one", ""]
    acme = table.tenants["acme"]
    assert (acme.requests_per_minute, acme.concurrency, acme.weight) == (60, 5, 2)
    assert (acme.top_priority, acme.tokens_per_minute) == (-1, None)
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600

    assert main(["keys", "list", file]) == 0
    listed = capsys.readouterr().out
    assert keys[0] and keys[0].id in listed and "first one" in listed
    assert main(["keys", "list", file, "--json"]) == 0
    report = capsys.readouterr().out
    assert [key["tenant"] for key in json.loads(report)["keys"]] == ["acme", "acme"]
    for secret in (first, second):
        assert secret.split("-", 2)[2] not in listed + report + Path(file).read_text()

    assert main(["keys", "remove", file, keys[0].id]) == 0
    table = read_keys(file)
    assert table.find(first) is None and table.find(second) and "acme" in table.tenants


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "FILE", "--tenant=x", "--concurrency=0"], "concurrency: got 0, must be at least"),
        (["add", "FILE", "--tenant=x", "--weight=nan"], "weight: got nan, must be a number"),
        (["add", "FILE", "--tenant="], "tenant: got '', must be a text"),
        (["remove", "FILE", "nobody"], "FILE: cannot be read"),
        (["list", "FILE"], "FILE: cannot be read"),
        (["add", "none/FILE", "--tenant=x"], "FILE: cannot be written: No such file"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["keys", *arguments]) == 1
    said = capsys.readouterr()
    assert says in said.err and not said.out
    assert said.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_broken_file_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("keys: [")
    assert main(["keys", "add", str(file), "--tenant=x"]) == 1
    assert file.read_text() == "keys: ["
