"""`quire eval MODEL`: accuracy by task on held-out examples, and how likely the right answers are.

A table for people goes to stdout; with --json stdout gets one JSON object (eval/report.py says what
is in it), and the table stderr. What the figures mean: docs/eval.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any, TextIO

from ..config import EngineConfig
from ..errors import InvalidConfig, InvalidRequest, QuireError
from .bench.report import add_output, check_output
from .flags import add_model, add_settings, from_zero, names, positive, settings_from

if TYPE_CHECKING:
    from ..checkpoints.folder import Checkpoint
    from ..serving.progress import Reporter
    from .eval.compare import Difference
    from .eval.questions import Exam
    from .eval.report import Result


class Worse(QuireError):
    """The model does worse than the baseline, and --fail-if-worse makes that an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--tasks", type=names, metavar="NAMES", help="task,task,... (default: all)")
    group.add_argument(
        "--n", type=positive, default=100, metavar="N", help="examples of each task (default: 100)"
    )
    group.add_argument("--seed", type=from_zero, default=0, help="of the examples (default: 0)")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="N", help="of the answers (default: 0)"
    )
    group.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="output tokens of an answer (default: twice those of the right answer, and 64 more)",
    )
    group.add_argument(
        "--draft",
        metavar="MODEL",
        help="also measure how many tokens of the answers this smaller model guesses",
    )
    group.add_argument(
        "--baseline", metavar="FILE", help="also compare with what an earlier --json printed"
    )
    group.add_argument(
        "--fail-if-worse",
        action="store_true",
        help="exit status 1 where a figure is worse than the baseline's beyond noise",
    )
    add_output(parser)
    add_settings(parser, EngineConfig, skip=("model", "max_queue"))


def run(args: argparse.Namespace) -> None:
    check_output(args)
    _check(args)
    settings = settings_from(args, EngineConfig)
    from ..serving.assemble import open_checkpoint
    from ..serving.progress import Terminal
    from .bench.report import plot, show
    from .eval import compare, draft, report
    from .eval.questions import chosen_tasks, set_exam

    reporter = Terminal()
    tasks = chosen_tasks(args.tasks)
    baseline = compare.read_baseline(args.baseline) if args.baseline else None
    checkpoint = open_checkpoint(EngineConfig(**settings), reporter)
    if args.draft:
        _check_draft(args.draft, settings, checkpoint, reporter)
    exam = set_exam(tasks, args.n, args.seed, checkpoint, reporter)
    results = _ask(exam, settings, args, reporter)
    found = report.figures(results)
    tables, lines = [report.table_of(settings["model"], found)], exam.notes
    if args.draft:
        found["draft"] = _guess(results, settings, args.draft, reporter)
        lines.append(draft.line(args.draft, found["draft"]))
    differences: list[Difference] = []
    if baseline is not None:
        differences, notes = compare.compare(baseline, found)
        found["against_baseline"] = {d.name: d.as_json() for d in differences}
        tables.append(compare.table_of(differences, args.baseline))
        lines += notes
    if args.plot is not None:
        plot(args.plot, lambda figure: report.draw(figure, settings["model"], found))
    people: TextIO | None = sys.stderr if args.json else sys.stdout
    if people is not None:  # else the shell closed it
        show(tables, people)
        people.writelines(f"{line}\n" for line in lines)
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")
    worse = [d.name for d in differences if d.verdict == "worse"]
    if worse and args.fail_if_worse:
        sys.stdout.flush()
        raise Worse(f"worse than {args.baseline} beyond noise: {', '.join(worse)}")


def _check(args: argparse.Namespace) -> None:
    """Raises InvalidRequest for flags that do not go together, before anything that takes long."""
    from ..sched.sampling_params import SamplingParams

    SamplingParams(temperature=args.temperature)
    if args.tasks == ():
        raise InvalidRequest("--tasks: got none, must be names of tasks with commas between")
    if args.fail_if_worse and args.baseline is None:
        raise InvalidRequest("--fail-if-worse: needs --baseline")
    if args.draft and args.temperature:
        raise InvalidRequest(
            f"--draft: got --temperature {args.temperature:g}, must be 0: it is greedy answers "
            "that it guesses"
        )


def _ask(
    exam: Exam, settings: dict[str, Any], args: argparse.Namespace, reporter: Reporter
) -> list[Result]:
    """Loads the model and has it answer."""
    from ..sched.limits import context_limit
    from ..serving.llm import LLM
    from .eval.answers import answer, score
    from .eval.report import Result

    with LLM(reporter=reporter, **settings) as llm:
        context, source = context_limit(llm.parts.sizes.spec)
        for paper in exam.papers:
            paper.keep_within(context)
            if paper.too_long:
                exam.notes.append(
                    f"{paper.task.name}: {paper.too_long} of {args.n} left out: prompt and answer "
                    f"do not fit in {context} tokens ({source})"
                )
        if not exam.questions:
            raise InvalidConfig(
                f"{source}: got {context} tokens, must be more: no example fits with its answer"
            )
        outcomes = answer(
            llm,
            exam.questions,
            context=context,
            reporter=reporter,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.seed,
        )
        score(llm, exam.questions, outcomes, reporter)
    rest = iter(outcomes)
    return [Result(paper, [next(rest) for _ in paper.questions]) for paper in exam.papers]


def _draft_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The model's own, but for what names it."""
    return {**{k: v for k, v in settings.items() if k != "revision"}, "model": name}


def _check_draft(
    name: str, settings: dict[str, Any], checkpoint: Checkpoint, reporter: Reporter
) -> None:
    from ..serving.assemble import open_checkpoint
    from .eval.draft import check_same_tokenizer

    config = EngineConfig(**_draft_settings(name, settings))
    check_same_tokenizer(checkpoint, open_checkpoint(config, reporter), name)


def _guess(
    results: list[Result], settings: dict[str, Any], name: str, reporter: Reporter
) -> dict[str, Any]:
    """Loads the draft and has it guess the answers."""
    from ..sched.limits import context_limit
    from ..serving.llm import LLM
    from .eval.draft import acceptance

    with LLM(reporter=reporter, **_draft_settings(name, settings)) as llm:
        context, _ = context_limit(llm.parts.sizes.spec)
        return {"model": name, **acceptance(llm, results, context, reporter)}
