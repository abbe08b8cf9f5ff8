"""The `quire` command. Composes everything; each subcommand has its own module in tools/.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 an error of Quire's own
(one line says what), 2 a wrong command line, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import QuireError

COMMANDS = {
    "generate": "answer prompts and print the answers",
    "chat": "talk to a model in the terminal",
    "serve": "serve a model over gRPC",
    "keys": "make, list and remove API keys for serve",
    "inspect": "say what a checkpoint is and what memory it needs",
    "convert": "turn a Hugging Face checkpoint into an Orbax one, with checksums",
    "doctor": "check this machine and this installation",
    "config": "say which settings are in force, and where each comes from",
    "bench": "measure: throughput, latency, a server under load, start-up, kernels, scheduler",
    "demo": "watch the engine answer several questions at once",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line. Each subcommand's module adds its own arguments; none loads JAX."""
    top = argparse.ArgumentParser(
        prog="quire",
        description="Serve open-weight language models with JAX, on TPUs and GPUs.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"quire {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        module = importlib.import_module(f".{name}_command", __package__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        args.run(args)
        if sys.stdout is not None:  # else the shell closed it
            sys.stdout.flush()  # here, where a reader that has gone is no surprise
        return 0
    except QuireError as error:
        _say(" ".join(str(error).split("\n")))
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except OSError as error:
        # A reader that has gone (`quire generate … | head`) is no error; a full disk is one.
        if not isinstance(error, BrokenPipeError):
            _say(str(error))
        _drop_output()
        return 1


def _drop_output() -> None:
    """Lets what could not be written go, or Python would try again, and complain, at its exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"quire: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
