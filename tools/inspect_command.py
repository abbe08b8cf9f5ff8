"""`quire inspect MODEL`: what a checkpoint is, and the memory plan here. Reads no weights.

What programs need is only known of a compiled one, so the largest is compiled, or found stored.
With --verify it reads all of a converted folder, and holds it against its checksums.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig
from ..errors import CheckpointError, InvalidRequest
from . import standard_streams
from .flags import add_model, add_settings, settings_from

if TYPE_CHECKING:
    from ..checkpoints.folder import Checkpoint
    from ..model.config import ModelConfig
    from ..model.sizing import Sizes
    from ..serving.progress import Reporter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--verify", action="store_true", help="read a converted folder and compare its checksums"
    )
    add_settings(parser, EngineConfig, skip=("model", "max_queue"))


def run(args: argparse.Namespace) -> None:
    standard_streams.stdout()
    config = EngineConfig(**settings_from(args, EngineConfig))
    from ..serving.assemble import make_startup, open_checkpoint, start_devices
    from ..serving.progress import Silent, Terminal

    reporter = Terminal()
    checkpoint = open_checkpoint(config, reporter)
    if args.verify:
        _verify(checkpoint, reporter)
    mesh = start_devices(config, checkpoint, Silent())
    starting = make_startup(config, checkpoint, mesh)
    sizes = starting.measured_sizes()
    not_honoured = [
        f"generation_config.json: not honoured: {setting}"
        for setting in checkpoint.generation.not_honoured
    ]
    report = {
        "model": str(checkpoint.folder),
        **({"verified": True} if args.verify else {}),
        "architecture": architecture(checkpoint.config),
        "memory": memory(sizes, mesh.platform),
        "notes": [*starting.problems, *sizes.notes, *not_honoured],
    }
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _show(report)


def _verify(checkpoint: Checkpoint, reporter: Reporter) -> None:
    """Raises CheckpointError where a converted folder is not what was written."""
    from ..checkpoints.manifest import damaged_files, is_converted

    if not is_converted(checkpoint.folder):
        raise InvalidRequest(
            f"--verify: {checkpoint.folder} has no checksums; a folder made by `quire convert` has"
        )
    with reporter.phase("verifying") as update:
        damaged = list(damaged_files(checkpoint.folder, update))
    if damaged:
        more = f"; and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        raise CheckpointError(f"damaged: {'; '.join(damaged[:5])}{more}")
    reporter.note("every file is as it was written")


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The model's numbers."""
    from ..model.sizing import count_parameters

    m = model
    windows = Counter("full" if w is None else f"window {w}" for w in m.windows)
    rope = m.rope.kind if m.rope.kind == "default" else f"{m.rope.kind} x{m.rope.factor:g}"
    features = {
        "QKV bias": m.qkv_bias,
        "output bias": m.out_bias,
        "MLP bias": m.mlp_bias,
        "QK norm": m.qk_norm,
        "tied embeddings": m.tied_embeddings,
    }
    return {
        "family": m.family,
        "parameters": count_parameters(m),
        "layers": m.num_layers,
        "hidden_size": m.hidden_size,
        "mlp_size": m.intermediate_size,
        "query_heads": m.num_heads,
        "kv_heads": m.num_kv_heads,
        "head_size": m.head_dim,
        "attention": ", ".join(f"{count} x {kind}" for kind, count in windows.items()),
        "rope": f"{rope}, theta {m.rope.theta:g}",
        "vocabulary": m.vocab_size,
        "context": m.max_served_positions,
        "features": [name for name, on in features.items() if on],
        "checkpoint_dtype": m.dtype,
    }


def memory(sizes: Sizes, platform: str) -> dict[str, Any]:
    """What an engine takes on this device, and how it is divided."""
    spec = sizes.spec
    return {
        "device": platform,
        "dtype": sizes.dtype,
        **{f"{name}_bytes": size for name, size in sizes.memory.as_dict().items()},
        "kv_bytes_per_token": sizes.token_bytes,
        "page_size": spec.page_size,
        "pages": spec.num_pages,
        "tokens_in_pages": sizes.memory.tokens,
        "requests_at_once": spec.num_slots,
        "tokens_in_a_step": spec.ladder.max_tokens,
        "prefill_chunk": sizes.prefill_chunk,
        "longest_sequence": spec.max_model_len,
        "programs": spec.ladder.num_programs,
        "worst_decode_padding": spec.ladder.padding_bound(),
    }


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # Values are shown as they are: rich would read [brackets] as styles.
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.print(report["model"], soft_wrap=True)
    for section in ("architecture", "memory"):
        table = Table("", section, show_header=True, box=None, pad_edge=False)
        for name, value in report[section].items():
            table.add_row(*row(name, value))
        console.print("", table)
    for note in report["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


_BYTES = {
    "capacity_bytes": "device memory",
    "budget_bytes": "allowed",
    "slots_bytes": "slot state",
    "temp_bytes": "program temp",
    "pool_bytes": "total of arrays",
    "total_bytes": "total with reserve",
    "host_mapped_bytes": "host, mapped while loading",
    "host_staging_bytes": "host, beside that",
}
"""Names of rows that would say too little without "bytes"."""


def row(name: str, value: Any) -> tuple[str, str]:
    """A line of the table: `weight_bytes` 2048 -> "weight", "2 KiB"."""
    if "bytes" in name:
        from ..model.memory import human_bytes

        return _BYTES.get(name, name.replace("_bytes", "").replace("_", " ")), human_bytes(value)
    if isinstance(value, float):
        value = f"{value:.0%}"
    if isinstance(value, list):
        value = ", ".join(value) or "none"
    return name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value
