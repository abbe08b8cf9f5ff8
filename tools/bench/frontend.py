"""`quire bench frontend`: what frontend processes cost and add, with an engine without a device.

A whole server runs (serving/supervisor), whose engine process gives every stream a token each 10 ms
(paced_engine.py); processes of clients read them (frontend_client.py). Token ids say when they were
made, so a delay is from the engine's step to the client's socket. Cores are CPU seconds per second,
of all processes of a kind together; what a message costs them is that by the messages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

from ...config import EngineConfig, ServerConfig
from ..flags import positive
from .own_server import PACED, cpu_seconds, own_server
from .report import add_output, check_output, finish, table

_SETTLE = 2.0
"""Seconds after the streams were opened that are not measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    for name, default, text in (
        ("--streams", 256, "open at once, each 100 tokens a second"),
        ("--seconds", 10, "to measure"),
        ("--frontends", 1, "frontend processes"),
        ("--clients", 2, "client processes"),
    ):
        group.add_argument(
            name, type=positive, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    results = asyncio.run(_measure(args))
    finish(args, results, [_table(results)], lambda f: _draw(f, results), on_device=False)


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    tokens = round((args.seconds + 2 * _SETTLE) / 0.01)
    engine = EngineConfig(
        model="demo", max_num_seqs=args.streams, max_model_len=tokens + 64, max_queue=2**20
    )
    server = ServerConfig(port=0, frontends=args.frontends, drain_timeout=0, log_level="warning")
    async with own_server(engine, server, PACED) as (address, supervisor):
        return await _clients(args, address, tokens, supervisor)


async def _clients(
    args: argparse.Namespace, address: str, tokens: int, supervisor: Any
) -> dict[str, Any]:
    """Runs the clients, and looks at the frontends meanwhile."""
    vocab = _vocab()
    begin = time.monotonic() + 1.0 + _SETTLE
    end = begin + args.seconds
    share, more = divmod(args.streams, args.clients)
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", f"{__package__}.frontend_client", address),
            *map(str, (share + (at < more), tokens, vocab, begin, end)),
            stdout=asyncio.subprocess.PIPE,
        )
        for at in range(min(args.clients, args.streams))  # each has one at least
    ]
    pids = {
        "frontends": [role.pid for role in supervisor.frontends],
        "engine": [supervisor.engine.pid],
        "clients": [process.pid for process in processes],
    }
    await asyncio.sleep(max(0.0, begin - time.monotonic()))
    before, since = {name: cpu_seconds(p) for name, p in pids.items()}, time.monotonic()
    await asyncio.sleep(max(0.0, end - time.monotonic() - 0.05))
    took = time.monotonic() - since
    cores = {name: (cpu_seconds(p) - before[name]) / took for name, p in pids.items()}
    said = [json.loads((await process.communicate())[0]) for process in processes]
    delays: Counter[int] = Counter()
    for one in said:
        delays.update({int(ms): count for ms, count in one["delays"].items()})
    messages, got = (sum(one[name] for one in said) for name in ("messages", "tokens"))
    return {
        "streams": args.streams,
        "frontends": args.frontends,
        "clients": args.clients,
        "seconds": args.seconds,
        "tokens_per_second": got / args.seconds,
        "messages_per_token": messages / max(got, 1),
        "delay_ms": {f"p{p}": _percentile(delays, p / 100) for p in (50, 90, 99)},
        "cores": cores,
        "us_per_message": {
            name: 1e6 * value * args.seconds / max(messages, 1) for name, value in cores.items()
        },
        "delays": dict(sorted(delays.items())),
    }


def _vocab() -> int:
    from ...checkpoints.folder import Checkpoint
    from ...checkpoints.shipped import resolve

    return Checkpoint.open(resolve("demo"), weights=False).config.vocab_size


def _percentile(counts: Counter[int], share: float) -> int:
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return 0


def _table(results: dict[str, Any]) -> Any:
    made = table(f"frontend: {results['streams']} streams of 100 tokens/s", "", "")
    made.add_row("tokens/s", f"{results['tokens_per_second']:,.0f}")
    made.add_row("messages per token", f"{results['messages_per_token']:.3f}")
    for name, value in results["delay_ms"].items():
        made.add_row(f"delay {name}, ms", str(value))
    for name, value in results["cores"].items():
        made.add_row(f"cores, {name}", f"{value:.2f}")
    for name, value in results["us_per_message"].items():
        made.add_row(f"µs a message, {name}", f"{value:.1f}")
    return made


def _draw(figure: Any, results: dict[str, Any]) -> None:
    axes = figure.subplots()
    total = sum(results["delays"].values())
    share, values, shares = 0.0, [], []
    for value, count in results["delays"].items():
        share += count / total
        values.append(value)
        shares.append(share)
    axes.plot(values, shares)
    axes.set_xlabel("ms from the engine's step to the client")
    axes.set_ylabel("share of tokens")
    axes.set_title(f"{results['streams']} streams, {results['tokens_per_second']:,.0f} tokens/s")
