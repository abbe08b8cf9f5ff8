"""The file of API keys: which keys there are, for which tenants, and what each tenant may ask for.

    tenants:
      acme: {weight: 2, requests_per_minute: 600, tokens_per_minute: 200000, concurrency: 64}
      guests: {weight: 0.5, top_priority: 10}
    keys:
      - {id: 1f0a9c3e, tenant: acme, hash: "sha256:...", created: 2026-11-22}

YAML 1.2, or JSON, which is YAML too. `quire keys` writes it, people may edit it; servers read it
again when it changes. Frontends look keys up in it, the engine process takes the tenants' limits
from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ...errors import InvalidConfig
from ...sched.quota import Limits
from .. import yaml_core
from . import file_edit
from .keys import NOBODY, KeyHash, id_of

MAX_TENANT_LENGTH = 256

TENANT_LIMITS = replace(Limits(), top_priority=0)
"""Of a tenant that the file says nothing about: none, but that it may not go before others."""

_HEADER = "# API keys of Quire. `quire keys` writes this file, and drops comments from it.\n"
_LOWEST = {"requests_per_minute": 1, "tokens_per_minute": 1, "concurrency": 1}


@dataclass(frozen=True, slots=True)
class Key:
    """One API key, without its secret.

    Attributes:
      id: tells it from others; not secret.
      tenant: whose requests it makes.
      hash: what is kept of its text.
      created: a date, as text.
      note: for people.
    """

    id: str
    tenant: str
    hash: KeyHash
    created: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class KeyTable:
    """All that a file says."""

    tenants: Mapping[str, Limits] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)  # by id

    def find(self, text: str) -> Key | None:
        """The key with this text, if there is one."""
        key = self.keys.get(id_of(text) or "")
        matches = (key.hash if key else NOBODY).matches(text)
        return key if matches else None


def read_keys(path: str | Path) -> KeyTable:
    """Reads a file of keys.

    Raises:
      InvalidConfig: it cannot be read, or holds what it must not; says where.
    """
    try:
        content = yaml.load(Path(path).read_text("utf-8"), yaml_core.CoreLoader)
    except (OSError, UnicodeError) as error:
        raise InvalidConfig(f"{path}: cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InvalidConfig(f"{path}: not YAML: {_where(error)}") from error
    try:
        return _table({} if content is None else content)
    except InvalidConfig as error:
        raise InvalidConfig(f"{path}: {error}") from error


def _where(error: Exception) -> str:
    """What is wrong, and where, without the line: whoever pasted a key there must not find it in a
    log."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    what = getattr(error, "problem", None) or "unreadable"
    return f"{what}, line {mark.line + 1}, column {mark.column + 1}"


def edit_keys(path: str | Path, change: Callable[[KeyTable], KeyTable]) -> None:
    """Changes what a file of keys says, or makes the file. Edits at once follow one another.

    Args:
      change: is given what the file says, and gives what it shall say. Where it raises, the file
        stays as it is.

    Raises:
      InvalidConfig: it cannot be read or written.
    """
    path = Path(path).resolve()  # a link stays one
    try:
        with file_edit.locked(path):
            write_keys(path, change(read_keys(path)))
    except OSError as error:
        raise InvalidConfig(f"{path}: cannot be written: {error.strerror}") from error


def write_keys(path: str | Path, table: KeyTable) -> None:
    """Replaces the file in one go; its owner, group and mode stay. A new one only its owner reads.

    Raises:
      InvalidConfig: it cannot be written.
    """
    content = {
        "tenants": {name: _settings(limits) for name, limits in table.tenants.items()},
        "keys": [
            {
                "id": key.id,
                "tenant": key.tenant,
                "hash": str(key.hash),
                **({"created": key.created} if key.created else {}),
                **({"note": key.note} if key.note else {}),
            }
            for key in table.keys.values()
        ],
    }
    path = Path(path).resolve()  # a link stays one
    try:
        file_edit.replace(path, _HEADER + yaml_core.dump(content))
    except OSError as error:
        raise InvalidConfig(f"{path}: cannot be written: {error.strerror}") from error


def check_limits(name: str, given: Mapping[str, Any]) -> Limits:
    """A tenant's limits from what a file or the command line says.

    Raises:
      InvalidConfig: names the tenant, the setting, the value and the limit.
    """
    known = [f.name for f in fields(Limits)]
    for setting, value in given.items():
        where = f"tenants.{name}.{setting}"
        if setting not in known:
            raise InvalidConfig(f"{where}: no such setting, must be one of {', '.join(known)}")
        if setting == "weight":
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not (math.isfinite(value) and 0.001 <= value <= 1000):
                raise InvalidConfig(f"{where}: got {value!r}, must be a number in [0.001, 1000]")
        elif value is None:
            continue  # no limit
        elif isinstance(value, bool) or not isinstance(value, int):
            raise InvalidConfig(f"{where}: got {value!r}, must be a whole number")
        elif value < _LOWEST.get(setting, value):
            raise InvalidConfig(f"{where}: got {value}, must be at least {_LOWEST[setting]}")
    return replace(TENANT_LIMITS, **given)


def check_tenant(name: object) -> str:
    """Raises InvalidConfig for what cannot name a tenant."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_TENANT_LENGTH:
        limit = f"a text of 1 to {MAX_TENANT_LENGTH} characters"
        raise InvalidConfig(f"tenant: got {name!r}, must be {limit}")
    return name


def _settings(limits: Limits) -> dict[str, Any]:
    return {
        f.name: getattr(limits, f.name)
        for f in fields(Limits)
        if getattr(limits, f.name) != getattr(TENANT_LIMITS, f.name)
    }


def _table(content: Any) -> KeyTable:
    content = _mapping("the file", content, ("tenants", "keys"))
    tenants = {
        check_tenant(name): check_limits(name, _mapping(f"tenants.{name}", given or {}))
        for name, given in _mapping("tenants", content.get("tenants") or {}).items()
    }
    entries = content.get("keys") or []
    if not isinstance(entries, list):
        raise InvalidConfig(f"keys: got {type(entries).__name__}, must be a list")
    keys: dict[str, Key] = {}
    for at, entry in enumerate(entries):
        key = _key(f"keys[{at}]", entry)
        if key.tenant not in tenants:
            known = ", ".join(tenants) or "there are none"
            raise InvalidConfig(
                f"keys[{at}].tenant: got {key.tenant!r}, must be one of `tenants` ({known})"
            )
        if key.id in keys:
            raise InvalidConfig(f"keys[{at}].id: got {key.id!r}, must be unlike all others")
        keys[key.id] = key
    return KeyTable(tenants, keys)


def _key(where: str, entry: Any) -> Key:
    entry = _mapping(where, entry, ("id", "tenant", "hash", "created", "note"))
    texts = {}
    for name in ("id", "tenant", "hash", "created", "note"):
        value = entry.get(name, "")
        if not isinstance(value, str) or (not value and name in ("id", "tenant", "hash")):
            raise InvalidConfig(f"{where}.{name}: got {value!r}, must be a text; quote numbers")
        texts[name] = value
    try:
        made = KeyHash.parse(texts.pop("hash"))
    except ValueError:
        # Not quoted: whoever pasted a key here must not find it in a log.
        raise InvalidConfig(f"{where}.hash: must be like sha256:SALT:DIGEST") from None
    return Key(hash=made, **texts)


def _mapping(where: str, value: Any, known: tuple[str, ...] = ()) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise InvalidConfig(f"{where}: got {type(value).__name__}, must be names with values")
    for name in value:
        if known and name not in known:
            raise InvalidConfig(f"{where}: got {name!r}, must be one of {', '.join(known)}")
    return value
