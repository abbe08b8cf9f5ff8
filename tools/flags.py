"""Command-line flags from config classes: a setting declared once in config.py is a flag here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import Field
from typing import Any

from ..config import parse_bytes, settings_of
from ..errors import InvalidConfig

MODEL_HELP = "checkpoint folder, hub name (org/name or org/name@revision), or `demo`"


def size(text: str) -> int:
    """An argument such as 512MiB, in bytes."""
    try:
        return parse_bytes(text)
    except InvalidConfig as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def names(text: str) -> tuple[str, ...]:
    """An argument such as one,two,three."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def token_ids(text: str) -> tuple[int, ...]:
    """An argument such as 1,2,3."""
    try:
        ids = tuple(int(part) for part in names(text))
    except ValueError:
        ids = ()
    if not ids:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be whole numbers with commas between")
    return ids


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
    kind, choices = setting.type, setting.metadata["choices"]
    text = setting.metadata["help"]
    if kind == "bool":
        text += f" (default: {'on' if setting.default else 'off'})"
    elif setting.default not in (None, (), ""):
        text += f" (default: {setting.default})"
    # argparse formats help with %, so a literal one is doubled. A flag that is not given leaves no
    # trace, so that defaults stay where they are declared.
    options: dict[str, Any] = {
        "help": text.replace("%", "%%"),
        "default": argparse.SUPPRESS,
        "dest": setting.name,
    }
    if kind == "bool":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif choices:
        group.add_argument(flag, choices=choices, **options)
    else:
        reads, metavar = _READS[str(kind).removesuffix(" | None")]
        if setting.metadata["is_size"]:
            reads, metavar = size, "SIZE"
        group.add_argument(flag, type=reads, metavar=metavar, **options)


_READS: dict[str, tuple[Any, str]] = {
    "int": (int, "N"),
    "str": (str, "TEXT"),
    "tuple[str, ...]": (names, "NAMES"),
}


def settings_from(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The settings of `config` that the user gave.

    Raises:
      InvalidConfig: they are out of range, or contradict each other.
    """
    given = {s.name: getattr(args, s.name) for s in settings_of(config) if s.name in args}
    config(**given)  # before anything that takes long
    return given
