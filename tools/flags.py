"""Command-line flags from config classes: a setting declared once in config.py is a flag here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import Field
from typing import Any, TypeVar

from ..config import parse_bytes, settings_of
from ..errors import InvalidConfig

Config = TypeVar("Config")

_BYTE_SETTINGS = {"kv_memory"}


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except InvalidConfig as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_settings(
    parser: argparse.ArgumentParser, config: type, *, skip: Sequence[str] = ()
) -> None:
    """Adds a flag for each setting of `config`: `--max-num-seqs`, `--no-overlap`."""
    group = parser.add_argument_group(f"{config.__name__.removesuffix('Config').lower()} settings")
    for setting in settings_of(config):
        if setting.name not in skip:
            _add(group, setting)


def _add(group: Any, setting: Field) -> None:
    flag = "--" + setting.name.replace("_", "-")
    kind = str(setting.type)
    # argparse formats help with %, so a literal one is doubled.
    options: dict[str, Any] = {"help": setting.metadata["help"].replace("%", "%%")}
    options |= {"default": argparse.SUPPRESS, "dest": setting.name}
    if kind == "bool":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    if setting.metadata["choices"]:
        options["choices"] = setting.metadata["choices"]
    if setting.name in _BYTE_SETTINGS:
        options |= {"type": _bytes, "metavar": "SIZE"}
    elif kind.startswith("int"):
        options |= {"type": int, "metavar": "N"}
    elif kind.startswith("tuple"):
        options |= {"type": _names, "metavar": "NAMES"}
    elif not setting.metadata["choices"]:
        options["metavar"] = "TEXT"
    if setting.default not in (None, (), ""):
        options["help"] += f" (default: {setting.default})"
    group.add_argument(flag, **options)


def settings_from(args: argparse.Namespace, config: type[Config]) -> dict[str, Any]:
    """The settings of `config` that the user gave."""
    given = vars(args)
    return {s.name: given[s.name] for s in settings_of(config) if s.name in given}
