"""`quire bench online`: a server of our own at several rates, as its callers see it.

Starts `quire serve` with the engine settings given, and all else as a user gets it, and drives it
over gRPC by the method of data/peers_h200.json: requests of the trace in order, of random token
ids, arrive at random (Poisson) whatever the server does; a rate R gets max(100, 15 R) of them, 900
at most, after a warm-up of 50 (the trace's first, at the same rate, to their end). The peers were
called in process; here gRPC and the frontend's work are in every figure.

Callers are processes of their own (load_process.py): Python reads some 10,000 messages a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import EngineConfig
from ...errors import Internal, InvalidConfig, Unavailable
from ..flags import from_zero, names, positive, positive_number
from .caller_figures import IN_ENGINE, LATE_MS, figures_of
from .models import add_engine, context_of, engine_config
from .report import add_output, check_output, finish, over_sizes, table
from .trace import Trace, add_trace, draw_prompts, read_trace

if TYPE_CHECKING:
    import numpy as np

    from ...protos.v1 import generation_pb2 as pb
    from .load_process import Load
    from .server_process import ServerProcess

WARM_UP = 50
SECONDS = 15.0
LEAST, MOST = 100, 900
"""Requests of a rate."""

_START = 600.0
"""Seconds within which the server must be ready."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument(
        "--rates",
        type=_rates,
        default=(25.0, 50.0),
        metavar="LIST",
        help="requests a second (default: 25,50)",
    )
    add_trace(group, clip=True)
    group.add_argument(
        "--requests", type=positive, metavar="N", help="of each rate (default: by the method)"
    )
    group.add_argument(
        "--warmup-requests",
        type=positive,
        default=WARM_UP,
        metavar="N",
        help=f"(default: {WARM_UP})",
    )
    group.add_argument(
        "--repeat", type=positive, default=1, metavar="N", help="all rates so often (default: 1)"
    )
    group.add_argument(
        "--clients",
        type=positive,
        metavar="N",
        help="processes of callers (default: a quarter of the cores, 1 to 4)",
    )
    group.add_argument(
        "--serve",
        action="append",
        default=[],
        metavar="FLAG",
        help="a flag for `quire serve`, such as --serve=--frontends=2; may be repeated",
    )
    group.add_argument("--seed", type=from_zero, default=0, help="of ids and times (default: 0)")
    add_output(parser)
    add_engine(parser)


def _rates(text: str) -> tuple[float, ...]:
    limit = "numbers above 0, as in 25,50"
    return tuple(positive_number(part, limit) for part in names(text) or (text,))


def run(args: argparse.Namespace) -> None:
    check_output(args)
    config = engine_config(args)
    from ...serving.progress import Terminal
    from .server_process import ServerProcess

    trace = read_trace(args.trace).fitted(context_of(config), clip=args.clip)
    if args.requests is not None and args.requests > len(trace):
        raise InvalidConfig(f"requests: got {args.requests}, must be at most {len(trace)}")
    reporter = Terminal()
    folder = Path(tempfile.mkdtemp(prefix="quire-online-"))
    settings = _settings_file(folder, config)
    server = ServerProcess([f"--config={settings}", *args.serve], folder / "server.log")
    status: int | None = None
    try:
        with reporter.phase("starting"):
            server.wait_ready(_START)
        reporter.note(
            f"serving on {' '.join(dict.fromkeys(server.device))}; its log: {folder / 'server.log'}"
        )
        info, rates = asyncio.run(_measure(args, trace, server, reporter))
        weights = {name: weight.memory for name, weight in server.weigh().items()}
    finally:
        status = server.stop()
    if status:
        raise Internal(f"the server ended with status {status}; see {folder / 'server.log'}")
    results = {
        "device": {"platform": server.device[0], "kind": server.device[1]},
        "settings": _settings(config, info),
        "warmup_requests": min(args.warmup_requests, len(trace)),
        "clients": _clients(args),
        "serve": args.serve,
        "resident_bytes": weights,
        "rates": rates,
    }
    finish(args, results, [_table(results)], lambda figure: _draw(figure, results), on_device=False)


def _settings_file(folder: Path, config: EngineConfig) -> Path:
    """The engine's settings for `quire serve`: JSON values are YAML. How many may wait is as it
    would be for any server."""
    given = asdict(config)
    del given["max_queue"]
    default = asdict(EngineConfig())
    lines = [f"{k}: {json.dumps(v)}\n" for k, v in given.items() if v != default[k]]
    file = folder / "settings.yaml"
    file.write_text("".join(lines))
    return file


def _settings(config: EngineConfig, info: pb.ModelInfo) -> dict[str, Any]:
    """What was measured, by the server's own word."""
    return {
        "model": info.name,
        "dtype": info.dtype,
        "dummy_weights": config.dummy_weights,
        "tensor_parallel": config.tensor_parallel,
        "max_num_seqs": info.max_running,
        "max_batched_tokens": config.max_batched_tokens,
        "prefill_chunk": config.prefill_chunk,
        "decode_steps": config.decode_steps,
        "prefix_caching": config.prefix_caching,
        "overlap": config.overlap,
        "page_size": info.page_size,
        "pages": info.kv_pages,
        "context_limit": info.context_limit,
    }


async def _measure(
    args: argparse.Namespace, trace: Trace, server: ServerProcess, reporter: Any
) -> tuple[pb.ModelInfo, list[dict[str, Any]]]:
    """All rates, one after the other; and what the server says of its model."""
    import numpy as np

    from ...client import AsyncClient
    from .load_process import serve_load

    async with AsyncClient(server.address) as client:
        info = await client.model_info()
    draw = np.random.default_rng(args.seed)
    measured = []
    for at in range(args.repeat):
        for rate in args.rates:
            part = trace.first(args.requests or requests_of(rate))
            first = trace.first(args.warmup_requests)
            warm, load = (_load(each, rate, info.vocab_size, draw) for each in (first, part))
            name = f"{rate:g}/s" + (f", {at + 1} of {args.repeat}" if args.repeat > 1 else "")
            if args.requests is None and len(part) < (wanted := requests_of(rate)):
                reporter.note(f"{name}: {len(part)} requests, of {wanted}: all the trace has")
            with reporter.phase(name) as update:
                clients = _clients(args)
                to = server.address
                warmed, served = await serve_load(to, clients, warm, load, update, nearby=True)
            figures = figures_of(served, {})
            if figures["errors"] == len(served):
                raise Unavailable(f"{name}: no request was served: {served[0].error}")
            failed = sum(not each.whole for each in warmed)
            measured.append(
                {
                    "rate_req_s": rate,
                    "trace": {**part.described(args.seed), "clipped": trace.clipped},
                    "warmup_errors": failed,
                    **figures,
                }
            )
    return info, measured


def requests_of(rate: float) -> int:
    """How many a rate gets."""
    return min(max(LEAST, round(SECONDS * rate)), MOST)


def _load(trace: Trace, rate: float, vocab: int, draw: np.random.Generator) -> Load:
    from .load import poisson

    prompts = [list(prompt) for prompt in draw_prompts(trace.prompts, vocab, draw)]
    due = poisson(len(trace), rate, draw)
    return {"prompts": prompts, "outputs": list(trace.outputs), "due": due}


def _clients(args: argparse.Namespace) -> int:
    return args.clients or min(4, max(1, (os.cpu_count() or 1) // 4))


def _table(results: dict[str, Any]) -> Any:
    rates = results["rates"]
    model = results["settings"]["model"]
    made = table(f"online: {model}", "requests/s", *(f"{r['rate_req_s']:g}" for r in rates))
    for name, title in (
        ("ttft_ms", "time to first token"),
        (IN_ENGINE, "of that in the engine"),
        ("tpot_ms", "time per output token"),
        ("itl_ms", "time between messages"),
        ("e2e_ms", "end to end"),
    ):
        for p in ("p50", "p90", "p99"):
            cells = (f"{r[name][p]:,.1f}" if name in r else "" for r in rates)
            made.add_row(f"{title} {p}, ms", *cells)
    made.add_row("output tok/s", *(f"{r['output_tok_s']:,.0f}" for r in rates))
    made.add_row("requests", *(str(r["requests"]) for r in rates))
    made.add_row("failed", *(str(r["errors"]) for r in rates))
    made.add_row("tokens per message", *(f"{r['tokens_per_message']:.2f}" for r in rates))
    made.add_row("sent late, ms (p99)", *(f"{r['late_ms_p99']:.1f}" for r in rates))
    if any(r["late_ms_p99"] > LATE_MS for r in rates):
        made.add_row("[yellow]sent late: the callers are too slow; see --clients[/]")
    for error in {error for r in rates for error in r["first_errors"]}:
        made.add_row(f"  {error[:100]}")
    return made


def _draw(figure: Any, results: dict[str, Any]) -> None:
    above, below = figure.subplots(1, 2)
    rates = results["rates"]
    sizes = sorted({r["rate_req_s"] for r in rates})
    for axes, parts in (
        (above, (("ttft_ms", "p50"), ("ttft_ms", "p99"))),
        (below, (("tpot_ms", "p50"), ("itl_ms", "p99"))),
    ):
        for name, p in parts:
            found = [(r["rate_req_s"], r[name][p]) for r in rates if name in r]
            axes.plot(*zip(*found, strict=True), "o", label=f"{name[:-3]} {p}")
        over_sizes(axes, sizes, x="requests a second", y="ms")
        axes.legend()
    figure.suptitle(f"{results['settings']['model']}, online")
