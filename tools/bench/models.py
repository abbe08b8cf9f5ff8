"""Which model a benchmark runs: as everywhere, or a well-known one by its numbers alone.

The config.json of a few models ships with the benchmarks, so that they can be measured without
their weights: `--model llama-3.1-8b --dummy-weights`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...config import EngineConfig
from ...errors import InvalidConfig
from ..flags import add_settings, settings_from

DATA = Path(__file__).parent / "data"


def shipped_configs() -> list[str]:
    """Names of the models whose config.json ships."""
    return sorted(folder.name for folder in (DATA / "configs").iterdir())


def add_engine(parser: argparse.ArgumentParser, *, skip: tuple[str, ...] = ()) -> None:
    """Adds all engine settings, --model among them."""
    add_settings(parser, EngineConfig, skip=("max_queue", *skip))
    parser.epilog = (
        f"With --dummy-weights, --model may also be one of {', '.join(shipped_configs())}: their "
        "config.json ships with Quire."
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's settings.

    Raises:
      InvalidConfig: settings are wrong, or no model is named.
    """
    # As with LLM: who calls in process waits for results anyway.
    given: dict[str, Any] = {**settings_from(args, EngineConfig), "max_queue": 2**31}
    name = given.get("model")
    if not name:
        raise InvalidConfig("model: got none, must be given by --model or in the --config file")
    if name in shipped_configs() and not Path(name).exists():
        if not given.get("dummy_weights"):
            raise InvalidConfig(
                f"model: of {name} only the config.json ships with Quire; add --dummy-weights, or "
                "name a checkpoint folder"
            )
        given["model"] = str(DATA / "configs" / name)
    return EngineConfig(**given)


def context_of(config: EngineConfig) -> int:
    """Most tokens of prompt and output together, as far as the model and `max_model_len` say: asked
    before anything that takes long is started. An engine may have memory for fewer."""
    from ...model.sizing import longest_wanted
    from ...serving.assemble import open_checkpoint

    return longest_wanted(config, open_checkpoint(config).config)


def check_fits(config: EngineConfig, setting: str, prompt: int, output: int) -> None:
    """Raises InvalidConfig where the model cannot serve prompts of so many tokens, and so many
    tokens after them."""
    most = context_of(config) - output
    if prompt > most:
        raise InvalidConfig(
            f"{setting}: got {prompt}, must be at most {most}: what {output} tokens of output "
            f"leave of {most + output} (the model's context, or max_model_len; with "
            "lift_context_limit that may be longer than the context)"
        )
