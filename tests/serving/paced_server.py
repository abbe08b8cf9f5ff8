"""`quire serve` with the engine process of `quire bench frontend`: all but the device is real."""

from __future__ import annotations

import sys

from quire.serving.supervisor.supervisor import Supervisor
from quire.tools import cli

defaults = Supervisor.__init__.__kwdefaults__
assert "engine_module" in defaults
defaults["engine_module"] = "quire.tools.bench.paced_engine"

if __name__ == "__main__":
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
