"""`quire bench pages`: a run at the limit of KV pages, beside one that has all of them.

First the trace runs in a closed loop (as many requests under way as the engine runs at once, each
that ends is followed by the next) with all pages there are; then for --seconds with a part of what
that run held at most. Both runs share one engine, its programs and its slab: only the scheduler is
told of fewer pages, so that nothing else differs.

What must not happen: the device out of memory, a failed step, a page lost; and thrashing, where
requests take each other's pages and compute again and again what they had.
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import TYPE_CHECKING, Any

from ...errors import Internal, InvalidConfig
from ..flags import from_zero, positive
from .models import add_engine, context_of, engine_config
from .report import add_output, check_output, finish, table
from .trace import add_trace, read_trace

if TYPE_CHECKING:
    from .closed_loop import Look
    from .engine_run import TokenEngine

MIN_RATIO = 0.9
"""Of the unlimited run's tokens a second, what the limited one must reach."""

MAX_THRASH = 0.1
"""Tokens that may be computed again for each that is generated."""

MIN_ANSWERS = 1
"""Of each request under way, what the unlimited run must see, or its most pages are not known."""

MOST_RUNNING = 0.95
"""Of the unlimited run's requests at once: where more run at the limit, it was none."""

SETTLED_AFTER = 0.2
"""Share of a run that fills the engine and counts for nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    add_trace(group, clip=True)
    group.add_argument(
        "--seconds", type=positive, default=600, metavar="N", help="at the limit (default: 600)"
    )
    group.add_argument(
        "--unlimited-seconds",
        type=positive,
        default=60,
        metavar="N",
        help="without the limit (default: 60)",
    )
    group.add_argument(
        "--share",
        type=_share,
        default=0.5,
        metavar="S",
        help="pages at the limit, of what the unlimited run held at most (default: 0.5)",
    )
    group.add_argument(
        "--streams",
        type=positive,
        metavar="N",
        help="requests under way (default: as many as the engine runs at once)",
    )
    group.add_argument("--seed", type=from_zero, default=0, help="of the token ids (default: 0)")
    add_output(parser)
    add_engine(parser)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a number above 0, at most 1")
    return share


def run(args: argparse.Namespace) -> None:
    check_output(args)
    config = engine_config(args)
    import numpy as np

    from ...serving.progress import Terminal
    from .closed_loop import ClosedLoop
    from .engine_run import TokenEngine

    trace = read_trace(args.trace)
    if not args.clip:
        trace.fitted(context_of(config), clip=False)  # refused before anything is loaded
    reporter = Terminal()
    with TokenEngine(config, reporter) as engine:
        trace = trace.fitted(engine.longest, clip=args.clip)
        spec = engine.parts.sizes.spec
        streams = args.streams or spec.num_slots
        draw = np.random.default_rng(args.seed)
        with reporter.phase("all pages") as update:
            loop = ClosedLoop(engine, trace, streams, draw)
            unlimited = _figures(engine, loop.run(args.unlimited_seconds, update), loop.answered)
        if not unlimited["output_tok_s"]:
            raise InvalidConfig(
                f"unlimited_seconds: got {args.unlimited_seconds}, too short for {streams} "
                "requests under way: no token came after the first fifth"
            )
        for problem in _not_unlimited(unlimited, streams):
            reporter.note(problem)  # now, and not only when the run at the limit is over
        peak = unlimited["pages_most"]
        longest = max(p + o for p, o in zip(trace.prompts, trace.outputs, strict=True))
        least = -(-longest // spec.page_size)
        pages = round(args.share * peak)
        if pages < least:
            raise InvalidConfig(
                f"share: got {args.share:g}, which makes {pages} of {peak} pages, must be at least "
                f"{least / peak:.3g}: the longest request of the trace needs {least}"
            )
        scheduler = engine.limit_pages(pages + 1)
        with reporter.phase(f"{pages:,} pages") as update:
            loop = ClosedLoop(engine, trace, streams, draw)
            looks = loop.run(args.seconds, update)
            limited = _figures(engine, looks, loop.answered)
        at_rest = engine.stats()
        settings = engine.described()
        compiles = engine.parts.runner.compiles_after_ready
        page_bytes = settings["sizes"]["kv_bytes_per_token"] * spec.page_size
    scheduler.check_integrity()  # raises; the engine's thread has ended
    results = {
        "settings": settings,
        "trace": {"name": trace.name, "requests": len(trace), "clipped": trace.clipped},
        "seed": args.seed,
        "streams": streams,
        "share": args.share,
        "pages": pages,
        "kv_memory": (pages + 1) * page_bytes,
        "unlimited": unlimited,
        "limited": limited,
        "ratio": limited["output_tok_s"] / unlimited["output_tok_s"],
        "at_rest": {
            "running": at_rest.running,
            "waiting": at_rest.waiting,
            "pages_used": at_rest.pages_used,
        },
        "compiles_after_ready": compiles,
    }
    results["problems"] = _problems(results)
    finish(args, results, [_table(results)], lambda figure: _draw(figure, results))
    if results["problems"]:
        raise Internal("; ".join(results["problems"]))


def _figures(engine: TokenEngine, looks: list[Look], answered: int) -> dict[str, Any]:
    """Of the run after it had settled; page use from its begin."""
    settled = [look for look in looks if look.at >= SETTLED_AFTER * looks[-1].at]
    first, last = settled[0], settled[-1]
    seconds = last.at - first.at

    def more(name: str) -> int:
        return getattr(last.stats, name) - getattr(first.stats, name)

    tokens = more("output_tokens")
    steps, total = more("steps"), first.stats.pages_total
    return {
        "seconds": last.at,
        "settled_after": first.at,
        "output_tok_s": tokens / seconds if seconds else 0.0,
        "answers": answered,
        "steps": steps,
        "running_mean": mean(look.stats.running for look in settled),
        "pages": total,
        "pages_most": max(look.stats.pages_used for look in looks),
        "pages_mean": mean(look.stats.pages_used for look in settled),
        "preemptions": more("preemptions"),
        "recomputed_tokens": more("recomputed_tokens"),
        "thrash": more("recomputed_tokens") / max(tokens, 1),
        "failed_steps": last.stats.failed_steps,
        "padding_waste": 1 - more("real_tokens") / max(more("padded_tokens"), 1),
        # A look a second is enough for a picture.
        "over_time": [
            {
                "at": look.at,
                "pages_used": look.stats.pages_used,
                "pages_cached": look.stats.pages_cached,
                "running": look.stats.running,
                "waiting": look.stats.waiting,
                "preemptions": look.stats.preemptions,
            }
            for look in looks[:: max(1, len(looks) // 600)]
        ],
    }


def _not_unlimited(unlimited: dict[str, Any], streams: int) -> list[str]:
    """Why the first run says little of what there is without a limit."""
    problems = []
    if unlimited["answers"] < MIN_ANSWERS * streams:
        problems.append(
            f"{unlimited['answers']:,} answers of {streams:,} requests under way ended in the "
            "unlimited run, must be at least one of each; give it more --unlimited-seconds"
        )
    if unlimited["preemptions"]:
        problems.append(
            f"the unlimited run was short of pages itself ({unlimited['preemptions']:,} "
            "preemptions); give it fewer --streams, or more memory"
        )
    return problems


def _problems(results: dict[str, Any]) -> list[str]:
    limited, unlimited = results["limited"], results["unlimited"]
    problems = _not_unlimited(unlimited, results["streams"])
    most = MOST_RUNNING * unlimited["running_mean"]
    if not limited["preemptions"] and limited["running_mean"] > most:
        problems.append(
            f"{results['pages']:,} pages were no limit: {limited['running_mean']:.1f} requests ran "
            f"at once, {unlimited['running_mean']:.1f} without it; lower --share"
        )
    if results["ratio"] < MIN_RATIO:
        problems.append(
            f"with {results['pages']:,} pages {results['ratio']:.1%} of the unlimited run's tokens "
            f"a second, must be at least {MIN_RATIO:.0%}"
        )
    if limited["thrash"] > MAX_THRASH:
        problems.append(
            f"{limited['thrash']:.2f} tokens computed again for each generated, must be at most "
            f"{MAX_THRASH:g}"
        )
    for name in ("unlimited", "limited"):
        if failed := results[name]["failed_steps"]:
            problems.append(f"{failed} steps failed in the {name} run; the log says why")
    left = {name: count for name, count in results["at_rest"].items() if count}
    if left:
        problems.append(f"at rest there are {left}, must be none")
    return problems


def _table(results: dict[str, Any]) -> Any:
    made = table(
        f"pages: {results['settings']['model']}, {results['trace']['name']}, "
        f"{results['streams']:,} requests under way",
        "",
        "all pages",
        "at the limit",
    )
    both = (results["unlimited"], results["limited"])
    forms = {
        "pages": "{:,}",
        "pages_most": "{:,}",
        "pages_mean": "{:,.0f}",
        "running_mean": "{:,.1f}",
        "output_tok_s": "{:,.0f}",
        "answers": "{:,}",
        "preemptions": "{:,}",
        "recomputed_tokens": "{:,}",
        "thrash": "{:.4f}",
        "failed_steps": "{}",
        "padding_waste": "{:.1%}",
        "seconds": "{:.0f}",
    }
    names = {"thrash": "computed again, for each token generated"}
    for name, form in forms.items():
        made.add_row(names.get(name, name.replace("_", " ")), *(form.format(f[name]) for f in both))
    made.add_row("of the unlimited run's tokens a second", "", f"{results['ratio']:.1%}")
    made.add_row("as with --kv-memory", "", f"{results['kv_memory']:,}")
    made.add_row("pages held at rest", "", str(results["at_rest"]["pages_used"]))
    made.add_row("compiles after ready", "", str(results["compiles_after_ready"]))
    for problem in results["problems"]:
        made.add_row(f"[red]{problem}[/]")
    return made


def _draw(figure: Any, results: dict[str, Any]) -> None:
    """Pages held, and requests running and waiting, of the run at the limit."""
    above, below = figure.subplots(2, 1, sharex=True)
    looks = results["limited"]["over_time"]
    seconds = [look["at"] for look in looks]
    above.plot(seconds, [look["pages_used"] for look in looks], label="held by requests")
    above.axhline(results["pages"], color="0.4", linestyle=":", label="all there are")
    above.set(ylabel="pages", ylim=(0, 1.1 * results["pages"]))
    above.legend(loc="lower right")
    for name in ("running", "waiting"):
        below.plot(seconds, [look[name] for look in looks], label=name)
    below.set(xlabel="seconds", ylabel="requests", ylim=(0, None))
    # A count of all so far outgrows what runs: it has an axis of its own.
    before = looks[0]["preemptions"]
    counts = below.twinx()
    counts.plot(
        seconds, [look["preemptions"] - before for look in looks], "C2--", label="preemptions"
    )
    counts.set(ylabel="preemptions so far", ylim=(0, None))
    counts.yaxis.get_major_locator().set_params(integer=True)
    lines = [*below.get_lines(), *counts.get_lines()]
    below.legend(lines, [line.get_label() for line in lines], loc="center right")
    figure.suptitle(
        f"{results['pages']:,} pages: {results['limited']['output_tok_s']:,.0f} output tokens/s, "
        f"{results['ratio']:.1%} of the unlimited"
    )
