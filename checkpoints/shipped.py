"""Models that come with Quire, by name. Wherever a command takes MODEL, these names work."""

from __future__ import annotations

from pathlib import Path

SHIPPED = ("demo",)


def resolve(model: str) -> Path:
    """The folder that MODEL names: a shipped model's, else the path itself.

    A folder of the user's own that has a shipped model's name is reached as `./demo`.
    """
    if model in SHIPPED:
        return Path(__file__).parent / model
    return Path(model).expanduser()
