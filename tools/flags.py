"""Command-line flags from config classes: a setting declared once in config.py is a flag here, and
a key of the settings file (settings_file.py) that a flag overrides."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import Field, dataclass
from typing import Any

from ..checkpoints.shipped import SHIPPED
from ..config import EngineConfig, parse_bytes, settings_of
from ..errors import InvalidConfig
from .settings_file import check_with_places, read_settings_file

MODEL_HELP = (
    "checkpoint folder, hub name (org/name or org/name@revision), or a shipped model: "
    + ", ".join(SHIPPED)
)


def size(text: str) -> int:
    """An argument such as 512MiB, in bytes."""
    try:
        return parse_bytes(text)
    except InvalidConfig as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def from_zero(text: str) -> int:
    """An argument that is a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number from 0 on")
    return int(text)


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number from 1 on")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """An argument such as 1,8,64."""
    return tuple(positive(part) for part in names(text)) or (positive(text),)


def positive_number(text: str, limit: str = "a number above 0") -> float:
    """An argument that is a number above 0, not infinite.

    Args:
      limit: what the user is told it must be.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be {limit}")
    return value


def rate(text: str) -> float:
    """An argument such as 2.5, of requests a second; "inf" is all at once."""
    return math.inf if text == "inf" else positive_number(text, "inf, or a number above 0")


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


def add_model(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Adds MODEL, which a settings file may name instead.

    Args:
      parser: of a command that also calls `add_settings`, skipping "model".
      default: what it is when nobody names one; None makes that an error.
    """
    text = MODEL_HELP + (f" (default: {default})" if default else "")
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=text)
    parser.set_defaults(default_model=default)
    _take(parser, ["model"])


def add_settings(
    parser: argparse.ArgumentParser, config: type, *, skip: Sequence[str] = ()
) -> None:
    """Adds a flag for each setting of `config`: `--max-num-seqs`, `--no-overlap`; and `--config`
    for a file that holds them."""
    group = parser.add_argument_group(f"{config.__name__.removesuffix('Config').lower()} settings")
    if parser.get_default("config_file_flag") is None:
        parser.set_defaults(config_file_flag=True)
        group.add_argument(
            "--config",
            metavar="FILE",
            dest="config_file",
            help="YAML file of settings, `max_num_seqs: 64` a line; flags override it",
        )
    taken = [setting for setting in settings_of(config) if setting.name not in skip]
    for setting in taken:
        _add(group, setting)
    _take(parser, [setting.name for setting in taken])


def _take(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Notes which settings a command takes: the rest of a settings file is for other commands."""
    parser.set_defaults(takes=(*(parser.get_default("takes") or ()), *names))


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


@dataclass(frozen=True, slots=True)
class Given:
    """A setting that the user gave."""

    value: Any
    source: str  # "flag", or "FILE:LINE"


def given_settings(args: argparse.Namespace, config: type) -> dict[str, Given]:
    """The settings of `config` that the user gave, by flag or else in the file, and where.

    Raises:
      InvalidConfig: they are out of range, or contradict each other.
    """
    in_file = read_settings_file(args.config_file) if args.config_file else {}
    names = [s.name for s in settings_of(config)]
    given = {
        n: Given(in_file[n].value, in_file[n].where)
        for n in names
        if n in in_file and n in args.takes
    }
    given |= {n: Given(getattr(args, n), "flag") for n in names if n in args}
    places = {n: in_file[n] for n, g in given.items() if g.source != "flag"}
    check_with_places(config, {n: g.value for n, g in given.items()}, places)
    return given


def settings_from(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The values of `given_settings`. A model that the command needs is among them.

    Raises:
      InvalidConfig: as there; or nobody named a model.
    """
    given = {name: one.value for name, one in given_settings(args, config).items()}
    if config is EngineConfig and "default_model" in args and "model" not in given:
        if args.default_model is None:
            raise InvalidConfig("model: got none, must be given, here or in the --config file")
        given["model"] = args.default_model
    return given
