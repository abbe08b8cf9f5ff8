"""Where compiled programs are kept between starts. Called by assemble.py and `quire inspect`.

  ROOT/RELEASE-DEVICE/           JAX's own cache
  ROOT/RELEASE-DEVICE/programs/  step programs, ready to run (model/program_store.py), and in
                                 `tuning` what XLA found out about kernels by trying them

ROOT is what the user said, else where JAX was told to keep its cache (then without the folder below
it), else `~/.cache/quire`. JAX's own cache serves what is no step program.
"""

from __future__ import annotations

import re
from pathlib import Path

import jaxlib

from ..config import EngineConfig
from ..environment import default_cache_dir
from ..model.compile import cache_folder, use_cache
from ..model.mesh import Mesh
from ..model.program_store import ProgramStore, make_private


def open_caches(config: EngineConfig, mesh: Mesh) -> tuple[ProgramStore | None, list[str]]:
    """Settles where programs are kept; returns the store, and what a user should know of it."""
    told = cache_folder()
    if config.cache_dir == "":
        use_cache(None)
        return None, []
    try:
        if config.cache_dir is None and told is not None:
            root = folder = Path(told)
        else:
            root = Path(config.cache_dir or default_cache_dir())
            make_private(root)
            device = re.sub(r"[^A-Za-z0-9]+", "-", mesh.devices[0].device_kind)
            folder = root / f"{jaxlib.version.__version__}-{device}"
        use_cache(folder)
        programs = folder / "programs"
        make_private(programs)
        # A folder that JAX was told may hold others' programs, which are not ours to remove.
        within = programs if root == folder else root
        return ProgramStore(programs, config.cache_limit, within), []
    except OSError as error:
        use_cache(None if told is None else Path(told))
        return None, [f"compiled programs are not stored: {error}"]
