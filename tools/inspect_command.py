"""`quire inspect MODEL`: what a checkpoint is, and the memory plan here. Reads no weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig
from .flags import add_settings, settings_from

if TYPE_CHECKING:
    from ..model.config import ModelConfig
    from ..model.sizing import Sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, or `demo`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings(parser, EngineConfig, skip=("model",))


def run(args: argparse.Namespace) -> None:
    from ..model.mesh import default_mesh
    from ..serving.assemble import open_checkpoint, settle_sizes

    config = EngineConfig(**settings_from(args, EngineConfig))
    checkpoint = open_checkpoint(config)
    mesh = default_mesh()
    sizes = settle_sizes(config, checkpoint, mesh)
    report = {
        "model": str(checkpoint.folder),
        "architecture": architecture(checkpoint.config),
        "memory": memory(sizes, mesh.platform),
        "notes": list(sizes.notes) + list(checkpoint.generation.not_honoured),
    }
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _show(report)


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The model's numbers, as a person names them."""
    from ..model.sizing import count_parameters

    m = model
    windows = Counter("full" if w is None else f"window {w}" for w in m.windows)
    rope = m.rope.kind if m.rope.kind == "default" else f"{m.rope.kind} x{m.rope.factor:g}"
    features = {
        "qkv bias": m.qkv_bias,
        "output bias": m.out_bias,
        "MLP bias": m.mlp_bias,
        "QK norm": m.qk_norm,
        "tied embeddings": m.tied_embeddings,
    }
    return {
        "family": m.family,
        "parameters": count_parameters(m),
        "layers": m.num_layers,
        "hidden size": m.hidden_size,
        "MLP size": m.intermediate_size,
        "heads": f"{m.num_heads} query, {m.num_kv_heads} key/value, {m.head_dim} wide",
        "attention": ", ".join(f"{count} x {kind}" for kind, count in windows.items()),
        "rope": f"{rope}, theta {m.rope.theta:g}",
        "vocabulary": m.vocab_size,
        "context": m.max_served_positions,
        "features": ", ".join(name for name, on in features.items() if on) or "none",
        "checkpoint dtype": m.dtype,
    }


def memory(sizes: Sizes, platform: str) -> dict[str, Any]:
    """What an engine takes on this device, in bytes, and how it is divided."""
    spec = sizes.spec
    return {
        "device": platform,
        "dtype": sizes.dtype,
        "capacity": sizes.capacity,
        "weights": sizes.weight_bytes,
        "KV pages": sizes.kv_bytes,
        "slots": sizes.slot_bytes,
        "KV per token": sizes.token_bytes,
        "page size": spec.page_size,
        "pages": spec.num_pages,
        "tokens in pages": (spec.num_pages - 1) * spec.page_size,
        "requests at once": spec.num_slots,
        "longest sequence": spec.max_model_len,
        "step programs": len(spec.ladder),
    }


_BYTES = {"capacity", "weights", "KV pages", "slots", "KV per token"}


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    for section in ("architecture", "memory"):
        table = Table("", section, show_header=True, box=None, pad_edge=False)
        for name, value in report[section].items():
            table.add_row(name, human_bytes(value) if name in _BYTES else _plain(value))
        console.print(table, "")
    for note in report["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def human_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
