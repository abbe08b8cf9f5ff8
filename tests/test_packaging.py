"""What is installed is the whole package: a folder that pyproject.toml does not list is missing
from every wheel, and no test of a checkout would notice."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
NOT_THE_PACKAGE = {"tests", "docs", "build", "dist"}


def test_every_folder_of_the_package_is_listed():
    folders = {
        path.parent.relative_to(ROOT)
        for path in ROOT.rglob("__init__.py")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    }
    names = {
        ".".join(("quire", *folder.parts))
        for folder in folders
        if not folder.parts or folder.parts[0] not in NOT_THE_PACKAGE
    }
    assert names == set(SETTINGS["packages"])


def test_files_beside_the_code_are_listed():
    listed = {
        path.relative_to(ROOT)
        for pattern in SETTINGS["package-data"]["quire"]
        for path in ROOT.glob(pattern)
    }
    needed = {path.relative_to(ROOT) for path in (ROOT / "checkpoints").glob("demo*/*")}
    needed |= {path.relative_to(ROOT) for path in (ROOT / "tools" / "bench").rglob("*.json")}
    assert needed and needed <= listed
    assert Path("py.typed") in listed
