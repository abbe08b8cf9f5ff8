"""`python -P -m quire.tools.start_check --model M`: a start, and its memory table by the device.

For measuring on a machine with an accelerator; flags are those of `quire`.

Prints one JSON object: seconds by phase, programs stored and compiled, the table, what JAX's
statistics say (every program has run once at its full shape by then), how far they are apart, and
what the driver says is in use on the whole device. Exit status 1 where the device took more than
2 % over the table, or more than `--memory` allows. Run it twice for a restart.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from ..config import EngineConfig
from ..errors import QuireError
from .bench.models import add_engine, engine_config

BOUND = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(prog="start_check", allow_abbrev=False)
    add_engine(parser)
    try:
        report = check(engine_config(parser.parse_args()))
    except QuireError as error:
        sys.stderr.write(f"start_check: {error}\n")
        return 1
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if report["inside"] else 1


def check(config: EngineConfig) -> dict[str, Any]:
    """Starts an engine, ends it, and says what it took."""
    from ..model.devices import compared, measured
    from ..model.mesh import default_mesh
    from ..serving.assemble import assemble
    from ..serving.progress import Terminal

    parts = assemble(config, lambda outputs: None, Terminal())
    try:
        mesh = default_mesh()
        found, table = measured(mesh), parts.sizes.memory
        used, over = driver_bytes(), compared(table, found)
        fits = config.memory is None or (used or found.most) <= config.memory
        return {
            "device": f"{mesh.platform} {mesh.devices[0].device_kind}",
            "phases": parts.phases,
            "programs_stored": parts.programs_stored,
            "compiles": parts.compiles,
            "pages": table.pages,
            "table": table.as_dict(),
            "measured": asdict(found),
            "over_table": over,
            "driver_in_use": used,
            "host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "inside": over <= BOUND and fits,
        }
    finally:
        parts.engine.stop()


def driver_bytes() -> int | None:
    """Bytes in use on the first NVIDIA GPU by everybody; None without one."""
    command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return int(said.stdout.strip()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main())
