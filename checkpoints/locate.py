"""Where a model is, by what the user called it. Wherever a command takes MODEL, these work:

demo                a model that comes with Quire
models/llama        a folder that is there: it wins over a hub name of the same spelling
./x  ../x  /x  ~/x  always a path
org/name[@revision] a model of the Hugging Face hub, downloaded into its cache (hub.py)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from ..environment import hub_settings
from ..errors import CheckpointError, InvalidConfig
from .reporting import Reporter
from .shipped import SHIPPED, resolve

_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([^\s@]+))?", re.ASCII)
_PATH = re.compile(r"[./~]")


def locate(model: str, reporter: Reporter, *, revision: str | None, offline: bool) -> Path:
    """The folder that `model` names; downloads what is not there.

    Args:
      model: a shipped name, a path or a hub name.
      reporter: hears of a download.
      revision: branch, tag or commit of a hub name.
      offline: use nothing but what is here.

    Raises:
      CheckpointError: there is none, or it cannot be had; says why and what to do.
      InvalidConfig: a revision of what has none.
    """
    hub_name = None
    if model in SHIPPED:
        path = resolve(model)
    else:
        path = Path(model).expanduser()
        if not _PATH.match(model) and not path.exists():
            hub_name = _HUB_NAME.fullmatch(model)
            if hub_name is None:
                raise CheckpointError(_unknown(model, path))
    if hub_name is None:
        if revision is not None:
            raise InvalidConfig(f"revision: got {revision!r}, but {model} is not a hub name")
        return path
    name, inline = hub_name.groups()
    if inline and revision and inline != revision:
        raise InvalidConfig(f"revision: got {revision!r}, but the model is given as {model}")
    from .hub import fetch  # huggingface_hub takes a while to import

    settings = hub_settings()
    near = _near(name, (*_children(path.parent), *_cached_names(settings.cache)))
    return fetch(name, inline or revision, settings, reporter, offline=offline, not_found_hint=near)


def _unknown(model: str, path: Path) -> str:
    near = _near(model, (*SHIPPED, *_children(path.parent)))
    return (
        f"{model}: does not exist, must be a model folder, a shipped name ({', '.join(SHIPPED)}) "
        f"or a hub name such as org/name{near}"
    )


def _near(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(dict.fromkeys(known)), n=3)
    return f"; near it: {', '.join(close)}" if close else ""


def _children(folder: Path) -> list[str]:
    """Folders beside a path that does not exist, spelled the way it is."""
    try:
        found = [child for child in folder.iterdir() if child.is_dir()]
    except OSError:
        return []
    return [str(child) for child in found if not child.name.startswith(".")]


def _cached_names(cache: Path) -> list[str]:
    """Names of models that are in the hub's cache."""
    return [
        folder.name.removeprefix("models--").replace("--", "/", 1)
        for folder in cache.glob("models--*")
    ]
