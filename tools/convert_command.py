"""`quire convert SRC DST`: a Hugging Face checkpoint into an Orbax one (checkpoints/convert.py)."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import EngineConfig, settings_of
from ..errors import InvalidConfig
from .flags import MODEL_HELP, add_settings, settings_from

_USED = ("revision", "offline", "ignore_config_fields")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=MODEL_HELP)
    parser.add_argument("target", metavar="DST", help="folder to make")
    parser.add_argument(
        "--dtype",
        dest="cast_to",
        choices=("bfloat16", "float16", "float32"),
        help="cast the weights (default: each tensor stays as it is)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace DST, if that is a converted folder"
    )
    others = [setting.name for setting in settings_of(EngineConfig) if setting.name not in _USED]
    add_settings(parser, EngineConfig, skip=others)


def run(args: argparse.Namespace) -> None:
    config = EngineConfig(**settings_from(args, EngineConfig))
    import jax

    # Orbax asks JAX which process it is, which would take a GPU's memory for nothing.
    jax.config.update("jax_platforms", "cpu")
    from ..checkpoints.convert import convert
    from ..checkpoints.locate import locate
    from ..model.memory import human_bytes
    from ..serving.progress import Terminal

    if not args.source or not args.target:
        raise InvalidConfig("SRC and DST: got '', must be a model and a folder to make")
    reporter = Terminal()
    source = locate(args.source, reporter, revision=config.revision, offline=config.offline)
    with _interrupted_by(signal.SIGTERM, signal.SIGHUP):
        manifest = convert(
            source,
            Path(args.target),
            reporter,
            origin=args.source + (f"@{config.revision}" if config.revision else ""),
            dtype=args.cast_to,
            force=args.force,
            ignore_fields=config.ignore_config_fields,
        )
    size = sum(entry.size for entry in manifest.files.values())
    reporter.note(f"wrote {args.target}: {len(manifest.tensors)} tensors, {human_bytes(size)}")


@contextmanager
def _interrupted_by(*signals: signal.Signals) -> Iterator[None]:
    """These end the block as Ctrl-C does, which removes what was begun, unless they are ignored."""
    heard = [one for one in signals if signal.getsignal(one) is signal.SIG_DFL]
    for one in heard:
        signal.signal(one, signal.default_int_handler)
    try:
        yield
    finally:
        for one in heard:
            signal.signal(one, signal.SIG_DFL)
