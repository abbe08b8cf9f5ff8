"""`quire keys add|list|remove FILE`: the API keys that `quire serve --api-keys FILE` knows.

A key is printed once, when it is added; the file keeps a hash of it (serving/auth/keys.py). Servers
read the file again when it changes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ..errors import InvalidConfig
from . import standard_streams

if TYPE_CHECKING:
    from ..serving.auth.key_file import KeyTable

_LIMITS = {
    "requests_per_minute": "requests accepted a minute",
    "tokens_per_minute": "tokens a minute, of prompts and answers",
    "concurrency": "answers at once, waiting or in the making",
    "top_priority": "the lowest number that its requests may have as priority (default: 0)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("file", metavar="FILE", help="YAML file of keys and tenants")
        return sub

    add = action("add", "make a key for a tenant and print it; it is not kept, only a hash of it")
    add.add_argument("--tenant", required=True, metavar="NAME", help="whose requests it makes")
    add.add_argument("--note", default="", metavar="TEXT", help="for people; kept beside the key")
    group = add.add_argument_group("what the tenant may ask for, with all its keys")
    for name, text in _LIMITS.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=int, metavar="N", help=text, default=argparse.SUPPRESS)
    group.add_argument(
        "--weight",
        type=float,
        metavar="X",
        help="its share when others ask too, relative to theirs (default: 1)",
        default=argparse.SUPPRESS,
    )
    listing = action("list", "print the tenants and their keys, without secrets")
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    remove = action("remove", "let a key no longer be known")
    remove.add_argument("id", metavar="ID", help="of the key: the part after `quire-`")


def run(args: argparse.Namespace) -> None:
    standard_streams.stdout()
    {"add": _add, "list": _list, "remove": _remove}[args.action](args)


def _add(args: argparse.Namespace) -> None:
    from ..serving.auth.key_file import Key, KeyTable, check_limits, check_tenant, edit_keys
    from ..serving.auth.keys import KeyHash, draw_key

    tenant = check_tenant(args.tenant)
    given = {name: getattr(args, name) for name in (*_LIMITS, "weight") if name in args}
    limits = check_limits(tenant, given)
    id, text = draw_key()
    today = datetime.date.today().isoformat()
    key = Key(id=id, tenant=tenant, hash=KeyHash.of(text), created=today, note=args.note)

    def added(table: KeyTable) -> KeyTable:
        known = table.tenants.get(tenant)
        now = limits if known is None else replace(known, **given)
        return KeyTable({**table.tenants, tenant: now}, {**table.keys, id: key})

    edit_keys(args.file, added)
    sys.stdout.write(f"{text}\n")
    sys.stderr.write(f"key {id} of tenant {tenant}; this is the only time it is shown\n")


def _list(args: argparse.Namespace) -> None:
    table = _read(args.file)
    if args.json:
        sys.stdout.write(json.dumps(_report(table), indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table("key", "tenant", "created", "note", "the tenant may ask for", box=None)
    for key in table.keys.values():
        limits = _said(table.tenants[key.tenant])
        shown.add_row(key.id, key.tenant, key.created, key.note, limits)
    for name in table.tenants.keys() - {key.tenant for key in table.keys.values()}:
        shown.add_row("none", name, "", "", _said(table.tenants[name]))
    Console(file=sys.stdout, markup=False).print(shown)


def _remove(args: argparse.Namespace) -> None:
    from ..serving.auth.key_file import KeyTable, edit_keys

    tenant = ""

    def removed(table: KeyTable) -> KeyTable:
        nonlocal tenant
        if args.id not in table.keys:
            known = ", ".join(table.keys) or "there are none"
            raise InvalidConfig(f"id: got {args.id!r}, must be a key of {args.file} ({known})")
        tenant = table.keys[args.id].tenant
        keys = {id: key for id, key in table.keys.items() if id != args.id}
        return KeyTable(table.tenants, keys)

    _read(args.file)  # a file that is not there is not made
    edit_keys(args.file, removed)
    sys.stderr.write(f"key {args.id} of tenant {tenant} is removed\n")


def _read(file: str) -> KeyTable:
    from ..serving.auth.key_file import read_keys

    return read_keys(file)


def _said(limits: Any) -> str:
    """Limits in words."""
    values = asdict(limits)
    said = [f"{name} {value:g}" for name, value in values.items() if value is not None]
    return ", ".join(said)


def _report(table: KeyTable) -> dict[str, Any]:
    return {
        "tenants": {name: asdict(limits) for name, limits in table.tenants.items()},
        "keys": [
            {"id": key.id, "tenant": key.tenant, "created": key.created, "note": key.note}
            for key in table.keys.values()
        ],
    }
