"""Models that come with Quire, by name. Wherever a command takes MODEL, these names work."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

SHIPPED = tuple(name for name in ("demo", "demo-draft") if (_HERE / name / "config.json").is_file())
"""A small model to try Quire with, and a smaller one that guesses its answers."""


def resolve(model: str) -> Path:
    """The folder that MODEL names: a shipped model's, else the path itself.

    A folder of the user's own that has a shipped model's name is reached as `./demo`.
    """
    if model in SHIPPED:
        return _HERE / model
    return Path(model).expanduser()
