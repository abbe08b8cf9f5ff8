"""How well a small model guesses what a large one answers: `quire eval MODEL --draft SMALL`.

The small one reads each greedy answer of the large one; a token that it finds likeliest there is
one that speculative decoding would accept. From that follows exactly how greedy speculation would
go: a round drafts k tokens, accepts those before the first mistake, and adds the one that the large
model then says itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest
from .answers import logprobs_after
from .intervals import per_token

if TYPE_CHECKING:
    from ...checkpoints.folder import Checkpoint
    from ...serving.progress import Reporter
    from .answers import Engine
    from .report import Result

K = 4
"""Tokens drafted in a round."""


def check_same_tokenizer(model: Checkpoint, draft: Checkpoint, name: str) -> None:
    """Raises InvalidRequest where a token id means something else to the draft."""
    if not draft.has_tokenizer:
        raise InvalidRequest(f"--draft: {name} has no tokenizer.json, must have the model's")
    ours, theirs = model.tokenizer.vocab, draft.tokenizer.vocab
    if ours != theirs:
        token = min(token for token, _ in ours.items() ^ theirs.items())
        raise InvalidRequest(
            f"--draft: {name} has another tokenizer ({len(theirs)} tokens, the model has "
            f"{len(ours)}; {token!r} differs), must have the model's"
        )


def acceptance(
    engine: Engine, results: Sequence[Result], context: int, reporter: Reporter
) -> dict[str, Any]:
    """Scores the answers in `results` by the draft's engine.

    Returns: {"acceptance", "acceptance_ci95", "tokens", "left_out", "k", "accepted_per_round",
      "tokens_per_round", "tasks": {name: acceptance}}. The two per round are None where there is no
      token at all, as acceptance is.
    """
    asked = [
        (result.paper.task.name, question.prompt, outcome.tokens)
        for result in results
        for question, outcome in zip(result.paper.questions, result.outcomes, strict=True)
    ]
    fits = [(name, p, t) for name, p, t in asked if t and len(p) + len(t) < context]
    scored = logprobs_after(engine, [(p, t) for _, p, t in fits], reporter)
    accepted: dict[str, list[list[bool]]] = {result.paper.task.name: [] for result in results}
    for (name, _, _), entries in zip(fits, scored, strict=True):
        if entries:
            accepted[name].append([rank == 1 for _, rank in entries])
    answers = [flags for task in accepted.values() for flags in task]
    return {
        **_share(list(accepted.values())),
        "left_out": len(asked) - len(answers),
        "k": K,
        **rounds(answers, K),
        "tasks": {name: _share([task])["acceptance"] for name, task in accepted.items()},
    }


def rounds(answers: Sequence[Sequence[bool]], k: int) -> dict[str, float | None]:
    """What a round of greedy speculation brings on average, where the flags say which tokens of the
    answers the draft guesses."""
    count = good = total = 0
    for flags in answers:
        at = 0
        while at < len(flags):
            run = 0
            while run < k and at + run < len(flags) and flags[at + run]:
                run += 1
            count, good = count + 1, good + run
            at += run + 1
        total += len(flags)
    if not count:
        return {"accepted_per_round": None, "tokens_per_round": None}
    return {
        "accepted_per_round": round(good / count, 4),
        "tokens_per_round": round(total / count, 4),
    }


def _share(tasks: Sequence[Sequence[Sequence[bool]]]) -> dict[str, Any]:
    tokens = sum(len(flags) for task in tasks for flags in task)
    if not tokens:
        return {"acceptance": None, "acceptance_ci95": [None, None], "tokens": 0}
    groups = [[(float(sum(flags)), len(flags)) for flags in task] for task in tasks]
    found = per_token(groups)
    ci = found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0)).ci
    return {"acceptance": round(found.value, 6), "acceptance_ci95": ci, "tokens": tokens}


def line(name: str, found: dict[str, Any]) -> str:
    """The same for people."""
    if found["acceptance"] is None:
        return f"draft {name}: no token of an answer could be scored"
    low, high = found["acceptance_ci95"]
    left_out = f"; {found['left_out']} answers left out" if found["left_out"] else ""
    return (
        f"draft {name}: finds {found['acceptance']:.1%} of {found['tokens']:,} tokens likeliest "
        f"(95 %: {low:.1%} to {high:.1%}); drafting {found['k']} at a time, "
        f"{found['accepted_per_round']:.2f} are accepted and {found['tokens_per_round']:.2f} made "
        f"in a round{left_out}"
    )
