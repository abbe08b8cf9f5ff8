"""Trains the models that ship: `python -P -m quire.tools.train_demo train --out checkpoints`.

Tasks (tools/tasks) become chats and tokens (conversations.py, tokenizer.py), rows and batches
(packing.py, data.py); train.py trains model.py's decoders on them, exam.py looks on, state.py keeps
what is there; export.py and plot.py write the folders. `quire eval` measures them, and the command
`card` writes what it found into their model cards (card.py).
"""

from __future__ import annotations

# Worker processes import this module: what loads JAX is imported where it is needed.
import argparse
import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..flags import from_zero, positive

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ...serving.progress import Reporter
    from .data import Batches
    from .train import Recipe, Record


def main(argv: list[str] | None = None) -> None:
    from ...errors import QuireError

    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (QuireError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; --resume goes on from the last save\n")


def _train(args: argparse.Namespace) -> None:
    from tokenizers import Tokenizer

    from ...errors import CheckpointError
    from ...serving.progress import Terminal
    from .data import Batches
    from .state import RUN, TOKENIZER, mend, record_of
    from .tokenizer import build
    from .train import SHIPPED, TRIAL

    reporter = Terminal()
    began = time.monotonic() if reporter.began is None else reporter.began
    recipe = TRIAL if args.trial else SHIPPED
    if args.steps is not None:
        recipe = replace(recipe, steps=args.steps)
    mend(args.state)
    there = (args.state / RUN).exists()
    if there and not args.resume:
        raise CheckpointError(f"{args.state}: holds a training; say --resume, or another --state")
    with reporter.phase("tokenizer"):
        tokenizer = Tokenizer.from_file(str(args.state / TOKENIZER)) if there else build()
    before = record_of(args.state) if there else None
    first = before.steps if before else 0
    # Before the step is compiled: meanwhile they make the first batches.
    with Batches(tokenizer, recipe.plan, args.seed, first=first, workers=args.workers) as batches:
        _run(args, recipe, tokenizer, batches, reporter, before, began)


def _run(
    args: argparse.Namespace,
    recipe: Recipe,
    tokenizer: Tokenizer,
    batches: Batches,
    reporter: Reporter,
    before: Record | None,
    began: float,
) -> None:
    import jax

    from ...errors import InvalidConfig
    from . import plot, state
    from .attention import MIXES, fastest
    from .card import write_card
    from .exam import Exam
    from .export import export
    from .model import DEMO, shipped_configs, trial_configs
    from .train import Record, State, Trainer, train

    configs = (trial_configs if args.trial else shipped_configs)(tokenizer.get_vocab_size())
    settings = {
        "seed": args.seed,
        "models": {name: asdict(config) for name, config in configs.items()},
        "plan": asdict(recipe.plan),
        "rates": asdict(recipe.rates),
    }
    device = jax.devices()[0].device_kind
    chosen = args.attention
    if chosen is None and before is not None and before.facts["device"] == device:
        chosen = before.facts["attention"]
    if chosen is not None and chosen not in MIXES:
        raise InvalidConfig(f"--attention: got {chosen!r}, must be one of {', '.join(MIXES)}")
    if chosen is None:
        chosen = fastest(configs[DEMO], recipe.plan.layout, reporter)
    compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    reporter.note(f"training on {device}, attention {chosen}, layers in {compute}")
    trainer = Trainer(configs, recipe, MIXES[chosen], compute)
    run, record = trainer.initial(args.seed), Record()
    if before is not None:
        run, record = state.restore(args.state, run, settings)
        reporter.note(f"going on from step {record.steps}, {record.tokens / 1e6:,.0f} M tokens")
    if record.steps < recipe.steps:  # else there is nothing left but to write the folders
        record.facts = {
            "seed": args.seed,
            "device": device,
            "attention": chosen,
            "compute": compute,
            "jax": jax.__version__,
            "batch": recipe.plan.layout.tokens,
            "rates": asdict(recipe.rates),
        }

    def save(run: State, record: Record) -> None:
        state.save(args.state, run, record, settings, tokenizer)

    run = train(
        trainer,
        run,
        record,
        iter(batches),
        reporter,
        exam=Exam(trainer, *batches.held_out(args.exam_batches)),
        save=save,
        deadline=math.inf if args.time_limit is None else began + args.time_limit,
    )
    speed = record.tokens / max(record.seconds, 1e-9)
    reporter.note(
        f"{record.tokens:,} tokens in {record.seconds:.0f} s, {speed / 1e6:.2f} M a second; "
        f"{record.waited:.0f} s of these waiting for data"
    )
    if args.picture is not None:
        plot.draw(args.picture, record)
    if record.steps < recipe.steps:
        reporter.note(f"not done: say --resume to go on from {args.state}")
        return
    for name, config in configs.items():
        export(args.out / name, config, tokenizer, run.params[name])
    for folder in (args.out / name for name in configs):
        plot.write_numbers(folder, record)
        plot.draw(folder / plot.PICTURE, record)
        write_card(folder)
        reporter.note(f"wrote {folder}")


def _card(args: argparse.Namespace) -> None:
    from .card import write_card
    from .model import DEMO, DRAFT

    demo, draft = (
        json.loads(file.read_text("utf-8").splitlines()[-1]) for file in (args.demo, args.draft)
    )
    write_card(args.folder / DEMO, demo)
    write_card(args.folder / DRAFT, {**draft, "draft": demo.get("draft")})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -P -m quire.tools.train_demo", description="Train Quire's demo models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train both models and write their folders")
    command.set_defaults(run=_train)
    add = command.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="gets demo/ and demo-draft/")
    add("--seed", type=from_zero, default=0, help="of weights and data (default: %(default)s)")
    add("--steps", type=positive, metavar="N", help="default: what the shipped models had")
    add("--time-limit", type=float, metavar="SECONDS", help="of this command; then stop, and keep")
    add(
        "--state",
        type=Path,
        default=Path(".cache/train_demo"),
        metavar="FOLDER",
        help="where the training is kept (default: %(default)s)",
    )
    add("--resume", action="store_true", help="go on from what --state holds, if anything")
    add(
        "--workers",
        type=from_zero,
        default=max(1, len(os.sched_getaffinity(0)) - 1),
        metavar="N",
        help="processes that make data (default: the cores less one); 0: none",
    )
    add("--picture", type=Path, metavar="FILE", help="plot the losses here too, done or not")
    add("--attention", metavar="NAME", help="who computes it; default: the fastest, measured")
    add(
        "--exam-batches",
        type=positive,
        default=4,
        metavar="N",
        help="batches of held-out examples to look at now and then (default: %(default)s)",
    )
    add("--trial", action="store_true", help="tiny models and batches, to see that it works")

    command = commands.add_parser("card", help="write what `quire eval` found into the model cards")
    command.set_defaults(run=_card)
    add = command.add_argument
    add("folder", type=Path, metavar="FOLDER", help="with demo/ and demo-draft/ in it")
    add(
        "--demo",
        type=Path,
        required=True,
        metavar="FILE",
        help="what `quire eval FOLDER/demo --draft FOLDER/demo-draft --json` printed",
    )
    add(
        "--draft",
        type=Path,
        required=True,
        metavar="FILE",
        help="what `quire eval FOLDER/demo-draft --json` printed",
    )
    return parser


if __name__ == "__main__":
    main()
