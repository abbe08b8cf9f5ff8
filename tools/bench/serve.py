"""`quire bench serve`: a running server under load, as its callers see it.

Requests of a trace arrive at random (Poisson) at a given rate, whatever the server does; or, with
--concurrency, each that ends is followed by the next. Prompts are drawn anew each run, so that none
finds another's in the server's prefix cache. Reports
time to first token, time per output token, time between messages, end to end, and goodput: what
was served within given bounds. Drives Quire over gRPC, or any server of OpenAI's completions, so
that engines are compared by one tool.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import secrets
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ...errors import InvalidConfig, InvalidRequest, Unavailable
from ..flags import from_zero, positive, positive_number, rate
from .caller_figures import IN_ENGINE, LATE_MS, PERCENTILES, figures_of, samples_of
from .report import add_output, check_output, finish, table
from .trace import Trace, add_trace, draw_prompts, read_trace

if TYPE_CHECKING:
    from .load import Served
    from .load_process import Load
    from .targets import Target

_TITLES = {
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token",
    "itl_ms": "time between messages",
    "e2e_ms": "end to end",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--address",
        required=True,
        metavar="HOST:PORT",
        help="of the server; for openai also a URL, with or without its /v1",
    )
    group.add_argument(
        "--api",
        choices=("grpc", "openai"),
        default="grpc",
        help="grpc is Quire's, openai /v1/completions of whatever server (default: grpc)",
    )
    group.add_argument("--served-model", metavar="NAME", help="for openai (default: its first)")
    group.add_argument("--api-key-file", metavar="FILE", help="file that holds nothing but the key")
    group.add_argument(
        "--tls-ca", metavar="FILE", help="talk TLS to a gRPC server; PEM of who vouches for it"
    )
    group.add_argument(
        "--tls-cert", metavar="FILE", help="PEM of our own certificate, where the server asks"
    )
    group.add_argument("--tls-key", metavar="FILE", help="PEM of its key")
    load = parser.add_argument_group("load")
    add_trace(load)
    load.add_argument(
        "--rate", type=rate, default=math.inf, metavar="R", help="requests a second (default: inf)"
    )
    load.add_argument(
        "--concurrency",
        type=positive,
        metavar="N",
        help="requests under way at most, each that ends is followed by the next",
    )
    load.add_argument(
        "--clients",
        type=positive,
        default=1,
        metavar="N",
        help="processes of callers, of a gRPC server without keys and TLS: one reads some 10,000 "
        "messages a second (default: 1)",
    )
    load.add_argument("--requests", type=positive, metavar="N", help="its first N (default: all)")
    load.add_argument(
        "--clip",
        type=positive,
        metavar="N",
        help="shorten requests of more than N tokens, prompt and output together",
    )
    load.add_argument(
        "--vocab",
        type=positive,
        default=512,
        metavar="N",
        help="prompts are random token ids below this (default: 512, which every model has)",
    )
    load.add_argument(
        "--seed",
        type=from_zero,
        metavar="N",
        help="of ids and times (default: another each run, as the server's prefix cache knows the "
        "prompts of a seed it has seen)",
    )
    goal = parser.add_argument_group("goodput: a request counts if it meets all that are given")
    for name in ("ttft", "tpot", "e2e"):
        goal.add_argument(
            f"--slo-{name}", type=_milliseconds, metavar="MS", help=_TITLES[f"{name}_ms"]
        )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    _check_load(args)
    trace = _trace(args)
    if args.seed is None:
        args.seed = secrets.randbits(32)
    settings, served = asyncio.run(_load(args, trace))
    figures = figures_of(served, _goals(args))
    if figures["errors"] == len(served):
        raise Unavailable(f"{args.address}: no request was served: {figures['first_errors'][0]}")
    results = {
        "target": {"address": args.address, "api": args.api},
        "settings": settings,
        "trace": trace.described(args.seed),
        "concurrency": args.concurrency,
        "clients": args.clients,
        "rate_req_s": None if math.isinf(args.rate) else args.rate,
        **figures,
    }
    finish(
        args,
        results,
        [_table(results)],
        lambda figure: _draw(figure, served, results),
        on_device=False,
    )


async def _load(args: argparse.Namespace, trace: Trace) -> tuple[dict[str, Any], list[Served]]:
    """What the server says of itself, and what it served."""
    import numpy as np

    from ...serving.progress import Terminal
    from .load import poisson, run_closed, run_load
    from .load_process import serve_load

    draw = np.random.default_rng(args.seed)
    prompts = draw_prompts(trace.prompts, args.vocab, draw)
    due = poisson(len(trace), args.rate, draw)
    reporter = Terminal()
    async with _target(args) as target:
        # Opens the connection, and finds what is wrong before the load starts.
        async for _ in target.stream(prompts[0][:1], 1):
            pass
        settings = await target.described()
        with reporter.phase("serving") as update:
            if args.clients > 1:
                load: Load = {"prompts": prompts, "outputs": [*trace.outputs], "due": due}
                first = [prompt[:1] for prompt in prompts[: args.clients]]
                warm: Load = {
                    "prompts": first,
                    "outputs": [1] * len(first),
                    "due": [0.0] * len(first),
                }
                _, served = await serve_load(
                    args.address, args.clients, warm, load, update, args.concurrency
                )
            elif args.concurrency:
                served = await run_closed(target, prompts, trace.outputs, args.concurrency, update)
            else:
                served = await run_load(target, prompts, trace.outputs, due, update)
            return settings, served


def _check_load(args: argparse.Namespace) -> None:
    if args.concurrency is not None and not math.isinf(args.rate):
        raise InvalidConfig(f"rate: got {args.rate:g}, must be inf with --concurrency")
    guarded = (args.api_key_file, args.tls_ca, args.tls_cert, args.tls_key)
    if args.clients > 1 and (args.api != "grpc" or any(guarded)):
        raise InvalidConfig(
            f"clients: got {args.clients}, must be 1 for openai, and with keys or TLS"
        )


def _trace(args: argparse.Namespace) -> Trace:

    trace = read_trace(args.trace)
    if args.requests is not None and args.requests > len(trace):
        raise InvalidConfig(f"requests: got {args.requests}, must be at most {len(trace)}")
    trace = trace.first(args.requests)
    return trace if args.clip is None else trace.fitted(max(args.clip, 2), clip=True)


def _target(args: argparse.Namespace) -> Target:
    from ...client import TLS
    from .targets import GrpcTarget

    api_key = _key(args.api_key_file)
    if args.api == "openai":
        if find_spec("httpx") is None:
            raise InvalidConfig("api: openai needs httpx; install it by pip install 'quire[bench]'")
        from .openai_target import OpenAITarget

        for name in ("tls_ca", "tls_cert", "tls_key"):
            if getattr(args, name) is not None:
                raise InvalidConfig(f"{name}: for grpc alone; give openai's --address as https://…")
        return OpenAITarget(args.address, api_key=api_key, model=args.served_model)
    if args.served_model is not None:
        raise InvalidConfig("served_model: for openai alone; a Quire server has one model")
    files = TLS(args.tls_ca, args.tls_cert, args.tls_key)
    tls: TLS | bool = files if files != TLS() else False
    return GrpcTarget(args.address, api_key=api_key, tls=tls)


def _key(file: str | None) -> str | None:
    from ...client.checks import key as check_key

    if file is None:
        return None
    try:
        with open(file, encoding="utf-8") as opened:
            key = opened.read().strip()
    except (OSError, UnicodeError) as error:
        raise InvalidConfig(f"api_key_file: {file} cannot be read: {error}") from error
    try:
        check_key("api_key_file", key)
    except InvalidRequest as error:
        raise InvalidConfig(str(error)) from error
    return key


def _goals(args: argparse.Namespace) -> dict[str, float]:
    given = {"ttft_ms": args.slo_ttft, "tpot_ms": args.slo_tpot, "e2e_ms": args.slo_e2e}
    return {name: value for name, value in given.items() if value is not None}


def _milliseconds(text: str) -> float:
    return positive_number(text, "milliseconds, a number above 0")


def _when(results: dict[str, Any]) -> str:
    if most := results["concurrency"]:
        return f"{most} under way"
    rate = results["rate_req_s"]
    return f"{rate:g} a second" if rate else "at once"


def _table(results: dict[str, Any]) -> Any:
    title = f"serve: {results['requests']} requests, {_when(results)}"
    made = table(title, "", *(f"p{p}" for p in PERCENTILES), "mean")
    for name, words in _TITLES.items():
        if name in results:
            made.add_row(f"{words}, ms", *(f"{value:,.1f}" for value in results[name].values()))
        if name == "ttft_ms" and IN_ENGINE in results:
            values = results[IN_ENGINE].values()
            made.add_row("of that in the engine, ms", *(f"{value:,.1f}" for value in values))
    made.add_row("output tok/s", f"{results['output_tok_s']:,.0f}")
    made.add_row("requests/s", f"{results['req_s']:,.2f}")
    made.add_row("tokens per message", f"{results['tokens_per_message']:.2f}")
    if "slo" in results:
        bounds = ", ".join(f"{name[:-3]} {most:g} ms" for name, most in results["slo"].items())
        made.add_row(f"goodput ({bounds}), requests/s", f"{results['goodput_req_s']:,.2f}")
    if results["prefix_hit_tokens"] is not None:
        made.add_row("prefix hit tokens", f"{results['prefix_hit_tokens']:,}")
    made.add_row("failed", str(results["errors"]))
    for error in results["first_errors"]:
        made.add_row(f"  {error[:100]}")
    if results["late_ms_p99"] > LATE_MS:
        late = f"{results['late_ms_p99']:,.1f}"
        made.add_row("sent late, ms (p99): this machine is too slow for the rate", "", "", late)
    return made


def _draw(figure: Any, served: list[Served], results: dict[str, Any]) -> None:
    """How many requests, or messages, took how long at most."""
    import numpy as np

    samples = samples_of(served)
    panes = figure.subplots(2, 2).flat
    for axes, (name, title) in zip(panes, _TITLES.items(), strict=True):
        values = np.sort(samples[name])
        axes.set(title=title, xlabel="ms", ylabel="share at most so long", ylim=(0, 1.02))
        if not len(values):
            continue
        axes.plot(values, np.arange(1, len(values) + 1) / len(values))
        for p in (50, 99):
            at = results[name][f"p{p}"]
            axes.axvline(at, color="0.6", linestyle=":")
            side = "left" if at < values[-1] / 2 else "right"  # of its line, off the axis
            axes.annotate(f" p{p} {at:,.1f} ", (at, 0.04), fontsize=8, ha=side)
        axes.set_xlim(left=0)
    figure.suptitle(
        f"{results['requests']} requests, {_when(results)}: "
        f"{results['output_tok_s']:,.0f} output tokens a second"
    )
