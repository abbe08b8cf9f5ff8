"""`quire bench fairness`: what tenants see of one that floods, over gRPC, with API keys.

Starts a whole server (own_server.py) and finds out how many requests a second its slots can serve.
Tenants then ask at random times, whatever the server does, all for answers of one length, each for
its share of that capacity, exactly so much in the time of a run; but one of them, in a second run
of the same arrivals, for many times its share. The figure is the others' time to first token.

What the server gives in the second run, when there is always more to do, is its true capacity: a
machine that others use has less than while it was measured. The load is given by that, too: above
1, the others ask for more than their share, and their queue grows in both runs.

With --paced the engine process computes nothing and takes 10 ms a step (paced_engine.py): all else
is real, and what else the machine does changes little.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import EngineConfig, ServerConfig
from ...errors import InvalidConfig, Overloaded, QuireError, Unavailable
from ..flags import MODEL_HELP, from_zero, positive
from .own_server import PACED, cpu_seconds, own_server
from .report import add_output, check_output, finish, table

if TYPE_CHECKING:
    import numpy as np

    from .load import Served
    from .targets import GrpcTarget

FLOOD = "flood"
_PERCENTILES = (50, 95)
_VOCAB = 512
"""Prompts are random token ids below this, which every model has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument("--model", default="demo", help=f"{MODEL_HELP} (default: demo)")
    group.add_argument(
        "--paced", action="store_true", help="no device: steps of 10 ms that compute nothing"
    )
    for name, default, text in (
        ("--tenants", 2, "the one that floods included"),
        ("--times", 50, "its share that it asks for"),
        ("--slots", 32, "answers at once (--max-num-seqs)"),
        ("--prompt", 32, "tokens of a prompt"),
        ("--output", 1024, "tokens of an answer"),
        ("--seconds", 120, "of each of the two runs"),
    ):
        group.add_argument(
            name, type=positive, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    group.add_argument(
        "--load",
        type=float,
        default=0.9,
        metavar="X",
        help="of the capacity as measured first, asked for by all at their share (default: 0.9)",
    )
    group.add_argument("--seed", type=from_zero, default=0, help="of ids and times (default: 0)")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    results = asyncio.run(_measure(args))
    finish(args, results, [_table(results)], lambda f: _draw(f, results), on_device=False)


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    names = [*(f"tenant {n}" for n in range(1, args.tenants)), FLOOD]
    with tempfile.TemporaryDirectory(prefix="quire-fairness-") as folder:
        file = Path(folder) / "keys.yaml"
        keys = _write_keys(file, names)
        engine = EngineConfig(
            model=args.model,
            max_num_seqs=args.slots,
            max_model_len=args.prompt + args.output,
        )
        server = ServerConfig(port=0, api_keys=str(file), drain_timeout=0, log_level="warning")
        async with AsyncExitStack() as stack:
            module = PACED if args.paced else None
            address, owner = await stack.enter_async_context(own_server(engine, server, module))
            callers = {
                name: await stack.enter_async_context(_target(address, key))
                for name, key in keys.items()
            }
            engine_pid = owner.engine.pid if owner.engine else None
            pids = {
                "engine": [engine_pid] if engine_pid else [],
                "frontend": [role.pid for role in owner.frontends if role.pid],
                "callers": [os.getpid()],
            }
            return await _runs(args, callers, pids)


async def _runs(
    args: argparse.Namespace, callers: dict[str, GrpcTarget], pids: dict[str, list[int]]
) -> dict[str, Any]:
    from ...serving.progress import Terminal

    reporter = Terminal()
    with reporter.phase("capacity"):
        took = await _seconds_of_all_slots(args, callers[FLOOD])
    check_seconds(args.seconds, took)
    share = args.load * args.slots / took / args.tenants
    runs = []
    for times in (1, args.times):
        with reporter.phase(f"flood at {times} times its share") as update:
            before = {name: cpu_seconds(of) for name, of in pids.items()}
            seen = await _flooded(args, callers, share, times, update)
            took_cpu = {name: cpu_seconds(of) - before[name] for name, of in pids.items()}
        cores = {name: used / seen.seconds for name, used in took_cpu.items()}
        runs.append({"times": times, **seen.figures(2 * took), "cores": cores})
    first, last = (each["ttft_ms"]["p95"] for each in runs)
    return {
        "model": args.model,
        "paced": args.paced,
        "tenants": args.tenants,
        "slots": args.slots,
        "prompt_tokens": args.prompt,
        "output_tokens": args.output,
        "load": args.load,
        "seconds": args.seconds,
        "seed": args.seed,
        "capacity_req_s": args.slots / took,
        "share_req_s": share,
        "load_of_given": share * args.tenants * args.output / runs[-1]["all_tok_s"],
        "runs": runs,
        "p95_growth": last / first - 1,
    }


def check_seconds(seconds: int, took: float) -> None:
    """Raises InvalidConfig where a run ends before its queues have filled."""
    if seconds < 4 * took:
        raise InvalidConfig(
            f"seconds: got {seconds}, must be at least {math.ceil(4 * took)}: an answer takes "
            f"{took:.1f} s here, and requests count from twice that on"
        )


async def _seconds_of_all_slots(args: argparse.Namespace, caller: GrpcTarget) -> float:
    """How long the server takes for as many requests as it has slots, after a warm-up."""
    import numpy as np

    from .load import run_load

    draw = np.random.default_rng(args.seed)
    for output in (8, args.output):
        prompts = [_prompt(args, draw) for _ in range(args.slots)]
        served = await run_load(
            caller, prompts, [output] * args.slots, [0.0] * args.slots, lambda *_: None
        )
        if failed := [request for request in served if not request.whole]:
            raise Unavailable(f"a request was not served: {failed[0].error}")
    return max(request.ended for request in served)


@dataclass
class Seen:
    """What came of one run.

    Attributes:
      served: the requests of those who ask for their share.
      flood: how many requests the other sent, how many were refused, how many tokens it got.
    """

    seconds: float
    served: list[Served]
    flood: dict[str, int]

    def figures(self, settled: float) -> dict[str, Any]:
        """Of requests that were due after so many seconds, when queues had filled."""
        import numpy as np

        counted = [request for request in self.served if request.due >= settled]
        first = [1e3 * request.first for request in counted if request.messages]
        if not first:
            why = counted[0].error if counted else "none came; raise --seconds"
            raise Unavailable(f"no request of a well-behaved tenant was served: {why}")
        found = np.percentile(first, _PERCENTILES)
        tokens = sum(request.tokens for request in self.served)
        return {
            "requests": len(counted),
            "failed": sum(not request.whole for request in self.served),
            "ttft_ms": {f"p{p}": float(v) for p, v in zip(_PERCENTILES, found, strict=True)},
            "all_ttft_ms": first,
            "tok_s": tokens / self.seconds,
            "all_tok_s": (tokens + self.flood["tokens"]) / self.seconds,
            "flood": {**self.flood, "tok_s": self.flood["tokens"] / self.seconds},
        }


async def _flooded(
    args: argparse.Namespace,
    callers: dict[str, GrpcTarget],
    share: float,
    times: int,
    progress: Callable[[int, int], None],
) -> Seen:
    """One run. The well-behaved ask at the same times whatever the other does, and for other
    prompts in each run, or the second would find those of the first."""
    import numpy as np

    from .load import run_load, scattered

    clock = asyncio.get_running_loop().time
    begin, count = clock(), math.ceil(args.seconds * share)
    flood = {"sent": 0, "refused": 0, "failed": 0, "tokens": 0}
    flooding = asyncio.ensure_future(
        _flood(args, callers[FLOOD], share * times, flood, np.random.default_rng(args.seed))
    )
    try:
        loads = []
        done = 0

        def one_more(*_: int) -> None:
            nonlocal done
            done += 1
            progress(done, count * (args.tenants - 1))

        for at, name in enumerate(name for name in callers if name != FLOOD):
            due = scattered(count, args.seconds, np.random.default_rng([args.seed, at]))
            draw = np.random.default_rng([args.seed, at, times])
            prompts = [_prompt(args, draw) for _ in range(count)]
            loads.append(run_load(callers[name], prompts, [args.output] * count, due, one_more))
        served = list(itertools.chain(*await asyncio.gather(*loads)))
        return Seen(clock() - begin, served, dict(flood))
    finally:
        flooding.cancel()  # and so the requests that it has open
        await asyncio.wait({flooding})


async def _flood(
    args: argparse.Namespace,
    caller: GrpcTarget,
    rate: float,
    seen: dict[str, int],
    draw: np.random.Generator,
) -> None:
    """Asks until cancelled."""
    from .load import scattered

    clock = asyncio.get_running_loop().time

    async def ask(prompt: tuple[int, ...]) -> None:
        seen["sent"] += 1
        before = 0
        try:
            async for tokens in caller.stream(prompt, args.output):
                seen["tokens"] += tokens - before
                before = tokens
        except Overloaded:
            seen["refused"] += 1
        except QuireError:
            seen["failed"] += 1

    begin, count = clock(), math.ceil(args.seconds * rate)
    async with asyncio.TaskGroup() as group:
        for again in itertools.count():
            for at in scattered(count, args.seconds, draw):
                await asyncio.sleep(begin + again * args.seconds + at - clock())
                group.create_task(ask(_prompt(args, draw)))


def _prompt(args: argparse.Namespace, draw: np.random.Generator) -> tuple[int, ...]:
    return tuple(draw.integers(0, _VOCAB, args.prompt).tolist())


def _target(address: str, key: str) -> GrpcTarget:
    from .targets import GrpcTarget

    return GrpcTarget(address, api_key=key, tls=False)


def _write_keys(file: Path, names: list[str]) -> dict[str, str]:
    """A key for each tenant, none of which has limits."""
    from ...serving.auth.key_file import TENANT_LIMITS, Key, KeyTable, write_keys
    from ...serving.auth.keys import KeyHash, draw_key

    drawn = {name: draw_key() for name in names}
    keys = {
        id: Key(id=id, tenant=name, hash=KeyHash.of(text)) for name, (id, text) in drawn.items()
    }
    write_keys(file, KeyTable(dict.fromkeys(names, TENANT_LIMITS), keys))
    return {name: text for name, (_, text) in drawn.items()}


def _table(results: dict[str, Any]) -> Any:
    device = "no device, steps of 10 ms" if results["paced"] else results["model"]
    title = (
        f"fairness: {device}; {results['slots']} slots, answers of {results['output_tokens']} "
        f"tokens, {results['tenants']} tenants, load {results['load']:g}"
    )
    runs = results["runs"]
    made = table(title, "one tenant asks for", *(f"{run['times']} x its share" for run in runs))

    def row(name: str, *values: Any, form: str = "{:,.0f}") -> None:
        made.add_row(name, *(form.format(value) for value in values))

    for p in _PERCENTILES:
        row(
            f"the others: time to first token, ms, p{p}",
            *(run["ttft_ms"][f"p{p}"] for run in runs),
            form="{:,.1f}",
        )
    row("  requests", *(run["requests"] for run in runs))
    row("  failed", *(run["failed"] for run in runs))
    row("  output tok/s", *(run["tok_s"] for run in runs))
    row("it: requests", *(run["flood"]["sent"] for run in runs))
    row("  refused", *(run["flood"]["refused"] for run in runs))
    row("  output tok/s", *(run["flood"]["tok_s"] for run in runs))
    row("all: output tok/s", *(run["all_tok_s"] for run in runs))
    for name in runs[0]["cores"]:
        row(f"cores, {name}", *(run["cores"][name] for run in runs), form="{:.2f}")
    made.add_row("load, by what all got", "", f"{results['load_of_given']:.2f}")
    made.add_row("growth of the others' p95", "", f"{100 * results['p95_growth']:+.0f} %")
    return made


def _draw(figure: Any, results: dict[str, Any]) -> None:
    """How many of the others' requests got their first token after how long at most."""
    import numpy as np

    axes = figure.subplots()
    for run in results["runs"]:
        values = np.sort(run["all_ttft_ms"])
        share = np.arange(1, len(values) + 1) / len(values)
        axes.plot(values, share, label=f"one asks for {run['times']} times its share")
    axes.axhline(0.95, color="0.6", linestyle=":")
    axes.set(xlabel="time to first token, ms", ylabel="share at most so long", ylim=(0, 1.02))
    axes.legend()
