"""Reads a settings file (`--config FILE`): YAML 1.2, one flat list of settings.

    max_num_seqs: 64
    kv-memory: 6GiB     # dashes or underscores, as one likes
    port: 8000

Keys are the settings of EngineConfig and ServerConfig, so that one file serves every command; a
command leaves out those it has no flag for. Called by flags.py. Everything in the file is checked,
whether the command at hand takes it or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..config import EngineConfig, ServerConfig, settings_of
from ..errors import InvalidConfig

CONFIGS: tuple[type, ...] = (EngineConfig, ServerConfig)
"""The classes whose settings a file may hold; no two declare the same name."""


@dataclass(frozen=True, slots=True)
class FileValue:
    """A setting as a file gives it."""

    value: Any
    where: str  # "FILE:LINE"


def read_settings_file(file: str | Path) -> dict[str, FileValue]:
    """The settings in a file, by name with underscores.

    Raises:
      InvalidConfig: it cannot be read, is not YAML, or holds an unknown key or a bad value; the
        message begins with the file and the line.
    """
    found = _parse(Path(file).expanduser(), _names())
    for config in CONFIGS:
        check_with_places(
            config, {n: v.value for n, v in found.items() if n in _names(config)}, found
        )
    return found


def check_with_places(config: type, values: dict[str, Any], places: dict[str, FileValue]) -> None:
    """Raises InvalidConfig for bad values, saying in which file and line the value stands."""
    try:
        config(**values)
    except InvalidConfig as error:
        name = str(error).partition(":")[0]  # messages begin with the setting they are about
        if name in places:
            raise InvalidConfig(f"{places[name].where}: {error}") from error
        raise


def _names(*configs: type) -> list[str]:
    return [setting.name for config in configs or CONFIGS for setting in settings_of(config)]


def _parse(file: Path, known: list[str]) -> dict[str, FileValue]:
    import yaml  # not needed by `quire --help`

    from ..serving.yaml_core import CoreLoader

    try:
        loader = CoreLoader(file.read_text("utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise InvalidConfig(f"{file}:1: must hold settings such as `max_num_seqs: 64`")
        found: dict[str, FileValue] = {}
        for key, value in root.value:
            where = f"{file}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise InvalidConfig(f"{where}: a key is a {key.id}, must be the name of a setting")
            name = _known(str(key.value), known, where)
            if name in found:
                raise InvalidConfig(f"{where}: {name}: is there twice, also at {found[name].where}")
            found[name] = FileValue(loader.construct_object(value, deep=True), where)
        return found
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"config: {file} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InvalidConfig(f"{file}{line}: is not YAML: {problem}") from error


def _known(key: str, known: list[str], where: str) -> str:
    name = key.replace("-", "_")
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "`quire config show` lists them all"
        raise InvalidConfig(f"{where}: {key}: no such setting; {hint}")
    return name
