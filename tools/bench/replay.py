"""`quire bench replay`: a trace in virtual time, with no device: the real scheduler and the pacing
of the engine's loop, and steps that take what step_costs.py says they take on an H200 with
Llama-3.1-8B; or, of another model, what its steps were measured to take, by their tokens.

For choosing what the scheduler does: a run of 17 s takes two. Requests come all at once, in a
closed loop, or at random (Poisson) by the method of online.py, without its warm-up; what gRPC,
processes and text cost is not in the figures.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..flags import from_zero, names, positive, rate
from .online import requests_of
from .report import add_output, check_output, finish, table
from .trace import Trace, add_trace, draw_prompts, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...model.plan import RunnerSpec, StepPlan
    from .step_clock import Step, Work

PAGES, PAGE_SIZE, LONGEST = 55_040, 16, 131_072
"""Of Llama-3.1-8B on an H200."""

HOST_SECONDS = 1e-3
"""That planning and launching a step are taken to need."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    add_trace(group)
    group.add_argument(
        "--rates",
        type=_rates,
        default=(math.inf, 25.0, 50.0),
        metavar="LIST",
        help="requests a second, inf for all at once (default: inf,25,50)",
    )
    group.add_argument(
        "--concurrency",
        type=positive,
        metavar="N",
        help="of those that come all at once so many are under way, each followed by the next",
    )
    group.add_argument("--seed", type=from_zero, default=0, help="of ids and times (default: 0)")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--step-times",
        type=_step_times,
        metavar="LIST",
        help="milliseconds of a step by the tokens of its program, as in 1:1.4,32:1.9,2048:12, and "
        "between them in proportion, beyond them as the nearest (default: a model of "
        "Llama-3.1-8B's on an H200)",
    )
    group.add_argument("--max-num-seqs", type=positive, default=1024, metavar="N")
    group.add_argument("--max-batched-tokens", type=positive, default=2048, metavar="N")
    group.add_argument(
        "--prefill-chunk", type=positive, metavar="N", help="(default: tokens of a step)"
    )
    group.add_argument(
        "--plan-at-once", action="store_true", help="plan each step as soon as the last began"
    )
    add_output(parser)


def _rates(text: str) -> tuple[float, ...]:
    return tuple(map(rate, names(text) or (text,)))


def _step_times(text: str) -> tuple[tuple[int, float], ...]:
    try:
        pairs = [part.split(":") for part in names(text)]
        times = tuple((int(tokens), float(ms)) for tokens, ms in pairs)
    except ValueError:
        times = ()
    tokens = [at for at, _ in times]
    ascends = tokens == sorted({*tokens}) and all(0 < at <= LONGEST for at in tokens)
    if not times or not ascends or not all(0 < ms < math.inf for _, ms in times):
        limit = f"TOKENS:MS with ascending tokens from 1 to {LONGEST} and times above 0"
        raise argparse.ArgumentTypeError(f"got {text!r}, must be {limit}, as in 1:1.4,32:1.9")
    return times


def _by_tokens(times: Sequence[tuple[int, float]]) -> Callable[[Work], float]:
    """What a step takes, in ms, by its program's tokens alone."""
    import numpy as np

    tokens, ms = zip(*times, strict=True)
    return lambda work: float(np.interp(work.bucket.tokens, tokens, ms))


def run(args: argparse.Namespace) -> None:
    check_output(args)

    trace, spec = read_trace(args.trace), _spec(args)
    trace.fitted(LONGEST, clip=False)
    found = []
    for each in args.rates:
        online = not math.isinf(each)
        part = trace.first(requests_of(each)) if online else trace
        played = play(
            part,
            _due(part, each, args.seed),
            spec,
            chunk=args.prefill_chunk,
            most=None if online else args.concurrency,
            late=not args.plan_at_once,
            seed=args.seed,
            cost=_by_tokens(args.step_times) if args.step_times else None,
        )
        found.append({"rate_req_s": each if online else None, **played.figures()})
    settings = (
        *("max_num_seqs", "max_batched_tokens", "prefill_chunk", "plan_at_once"),
        "step_times",
    )
    results = {
        "settings": {name: getattr(args, name) for name in settings},
        "trace": trace.name,
        "concurrency": args.concurrency,
        "rates": found,
    }
    of = "steps as given" if args.step_times else "Llama-3.1-8B on an H200, by a model of its steps"
    finish(args, results, [_table(found, of)], lambda f: _draw(f, found, of), on_device=False)


def _spec(args: argparse.Namespace) -> RunnerSpec:
    from ...model.ladder import make_ladder
    from .null_runner import null_spec

    slots, tokens = args.max_num_seqs, args.max_batched_tokens
    spec = null_spec(slots, page_size=PAGE_SIZE, max_model_len=LONGEST, pages=PAGES)
    return replace(spec, ladder=make_ladder(slots, tokens))


def _due(trace: Trace, rate: float, seed: int) -> list[float]:
    import numpy as np

    from .load import poisson

    return poisson(len(trace), rate, np.random.default_rng(seed))


@dataclass
class Played:
    """What came of it. Seconds of virtual time.

    Attributes:
      due: when each request came; in a closed loop, when it was sent.
      first, last, tokens: when its first and last tokens came, and how many.
      gaps: between the tokens of all.
    """

    due: list[float]
    first: list[float]
    last: list[float]
    tokens: list[int]
    gaps: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        import numpy as np

        from .step_clock import bucket_name, by_bucket

        firsts, lasts, tokens = map(np.array, (self.first, self.last, self.tokens))
        several = tokens > 1
        samples = {
            "ttft_ms": firsts - self.due,
            "tpot_ms": ((lasts - firsts)[several] / (tokens[several] - 1)),
            "itl_ms": np.array(self.gaps),
        }
        return {
            "requests": len(tokens),
            "seconds": self.seconds,
            "output_tok_s": int(tokens.sum()) / self.seconds,
            "steps": len(self.steps),
            "steps_by_bucket": {
                bucket_name(bucket): seen for bucket, seen in by_bucket(self.steps).items()
            },
            **{
                name: {f"p{p}": 1e3 * float(np.percentile(values, p)) for p in (50, 99)}
                for name, values in samples.items()
                if len(values)
            },
        }


def play(
    trace: Trace,
    due: Sequence[float],
    spec: RunnerSpec,
    *,
    chunk: int | None = None,
    most: int | None = None,
    late: bool = True,
    seed: int = 0,
    cost: Callable[[Work], float] | None = None,
) -> Played:
    """Plays a trace to its end.

    Args:
      due: when each request comes.
      chunk: tokens of one prompt in one step at most; None: as many as the step has.
      most: requests under way at once.
      late: plan as late as the engine does, not at once.
      cost: milliseconds of a step; None: of Llama-3.1-8B's on an H200.
    """
    import numpy as np

    from ...sched.pacing import Pacing
    from ...sched.request import Request, SamplingParams
    from ...sched.scheduler import Scheduler
    from .null_runner import NullRunner
    from .step_clock import Step, Work
    from .step_costs import milliseconds

    cost = cost or milliseconds
    tokens, now, count = spec.ladder.max_tokens, 0.0, len(trace)
    scheduler = Scheduler(
        spec,
        max_batched_tokens=tokens,
        prefill_chunk=chunk or tokens,
        max_queue=count,
        clock=lambda: now,
    )
    runner, pacing = NullRunner(spec), Pacing()
    flights: deque[tuple[StepPlan, float]] = deque()
    prompts = draw_prompts(trace.prompts, spec.vocab_size, np.random.default_rng(seed))
    played = Played([*due], [0.0] * count, [0.0] * count, [0] * count)
    sent = ended = 0
    while ended < count:
        at = now  # when the next step is planned: the one in flight begins now
        if flights and late and not scheduler.waiting:
            running = flights[0][0]
            at += max(0.0, pacing.wait(running.bucket, running.num_rows, now, now))
        while sent < count and due[sent] <= at and sent - ended < (most or count):
            if most is not None:
                played.due[sent] = now
            output = trace.outputs[sent]
            sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=output, ignore_eos=True)
            scheduler.submit(Request(id=str(sent), prompt=prompts[sent], sampling=sampling))
            pacing.came(due[sent])
            sent += 1
        plan = scheduler.schedule()
        if plan is not None:
            work = Work.of(plan)
            flights.append((plan, 1e-3 * cost(work)))
            pacing.planned(HOST_SECONDS)
            played.steps.append(Step(work, flights[-1][1]))
        if not flights:
            now = due[sent]
        elif len(flights) > (plan is not None):
            done, took = flights.popleft()
            end = now + took
            # The device cannot begin with a step that has not been launched.
            seen = end if plan is None else max(end, at + HOST_SECONDS)
            if plan is not None:
                left = max(0.0, end - at - HOST_SECONDS)
                pacing.took(done.bucket, seen - now, left)
            now = seen
            for answer in scheduler.update(done, runner.collect(done)):
                which = int(answer.request_id)
                if played.tokens[which]:
                    played.gaps.append(now - played.last[which])
                else:
                    played.first[which] = now
                played.last[which] = now
                played.tokens[which] += len(answer.tokens)
                ended += answer.ended
    played.seconds = now
    return played


def _table(found: list[dict[str, Any]], of: str) -> Any:
    names = (f"{r['rate_req_s']:g}/s" if r["rate_req_s"] else "at once" for r in found)
    made = table(f"replay: {of}", "", *names)
    made.add_row("seconds", *(f"{r['seconds']:.2f}" for r in found))
    made.add_row("output tok/s", *(f"{r['output_tok_s']:,.0f}" for r in found))
    made.add_row("steps", *(f"{r['steps']:,}" for r in found))
    for name, title in (
        ("ttft_ms", "time to first token"),
        ("tpot_ms", "time per output token"),
        ("itl_ms", "time between tokens"),
    ):
        for p in ("p50", "p99"):
            made.add_row(f"{title} {p}, ms", *(f"{r[name][p]:,.1f}" for r in found))
    return made


def _draw(figure: Any, found: list[dict[str, Any]], of: str) -> None:
    """Where the time of each goes, by step program."""
    axes = figure.subplots()
    for at, one in enumerate(found):
        left = 0.0
        for kind, (name, seen) in enumerate(one["steps_by_bucket"].items()):
            share = seen["sum_ms"] / 1e3
            axes.barh(at, share, left=left, color=f"C{kind % 10}", edgecolor="white")
            if share > one["seconds"] / 15:
                axes.text(left + share / 2, at, name.split()[0], ha="center", va="center")
            left += share
    names = [f"{r['rate_req_s']:g}/s" if r["rate_req_s"] else "at once" for r in found]
    axes.set_yticks(range(len(found)), names)
    axes.set(xlabel="s, by tokens of the step program", title=f"replay: {of}")
