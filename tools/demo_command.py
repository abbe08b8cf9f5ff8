"""`quire demo`: several questions to the shipped model at once, and what the engine did.

Every question has one right answer, so this is also a quick check of an installation: a wrong
answer makes the exit status 1.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import EngineConfig
from ..errors import Internal
from . import standard_streams
from .flags import add_settings, settings_from

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..sched.stats import EngineStats
    from ..serving.llm import LLM


@dataclass(slots=True)
class Question:
    """A question with its right answer, and the answer as it comes."""

    text: str
    expected: str
    answer: str = ""
    tokens: int = 0
    first_token: float = 0.0  # seconds after all questions were asked
    last_token: float = 0.0
    finished: bool = False

    @property
    def right(self) -> bool:
        return self.finished and self.answer.strip() == self.expected


def questions() -> list[Question]:
    """One batch of each kind of task the model learned."""
    from .train_demo.smalltalk import TOPICS

    talk = {topic.name: topic for topic in TOPICS}
    return [
        Question("What is 27 + 48?", "75"),
        Question("Add 512 and 389.", "901"),
        Question("Reverse: engine", "enigne"),
        Question("Spell backwards: slab", "bals"),
        Question("Repeat: hello there", "hello there"),
        Question("Say: good morning", "good morning"),
        *(Question(t.questions[0], t.answer) for t in list(talk.values())[:4]),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, EngineConfig, skip=("model", "max_queue"))


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..serving.llm import LLM
    from ..serving.progress import Terminal

    asked = questions()
    console = Console(file=standard_streams.stdout(), highlight=False)
    with LLM("demo", reporter=Terminal(), **settings_from(args, EngineConfig)) as llm:
        seconds = _ask(llm, asked, console)
        console.print(_summary(asked, llm.stats(), llm.compiles_after_ready, seconds))
    wrong = [q for q in asked if not q.right]
    if wrong:
        raise Internal(f"{len(wrong)} of {len(asked)} answers are wrong: {wrong[0].text!r}")


def _ask(llm: LLM, asked: list[Question], console: Console) -> float:
    """Streams all answers at once into a live table; returns the seconds it took."""
    from rich.live import Live

    prompts = [llm.chat_prompt([{"role": "user", "content": q.text}]) for q in asked]
    begin = time.monotonic()
    with Live(_answers(asked), console=console, refresh_per_second=20) as live:
        for i, chunk in llm.stream_many(prompts, llm.default_sampling_params(max_tokens=64)):
            question, now = asked[i], time.monotonic() - begin
            question.answer += chunk.text
            question.tokens += len(chunk.token_ids)
            question.first_token = question.first_token or now
            question.last_token = now
            question.finished = chunk.finish_reason is not None
            live.update(_answers(asked))
    return time.monotonic() - begin


def _answers(asked: list[Question]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "question", "answer", box=None, pad_edge=False)
    for q in asked:
        mark = ("[green]✓[/]" if q.right else "[red]✗[/]") if q.finished else "…"
        table.add_row(mark, escape(q.text), escape(q.answer))  # [brackets] are no styles
    return table


def _summary(asked: list[Question], stats: EngineStats, compiles: int, seconds: float) -> Table:
    """What the engine did, in its own numbers."""
    from rich.table import Table

    tokens = sum(q.tokens for q in asked)
    firsts = sorted(q.first_token for q in asked)
    steps_between = [(q.last_token - q.first_token) / (q.tokens - 1) for q in asked if q.tokens > 1]
    rows = {
        "right answers": f"{sum(q.right for q in asked)} of {len(asked)}",
        "output tokens": f"{tokens} in {seconds:.2f} s ({tokens / seconds:.0f} tokens/s)",
        "time to first token": f"{1e3 * firsts[len(firsts) // 2]:.0f} ms median",
        "time per output token": f"{1e3 * sum(steps_between) / len(steps_between):.1f} ms mean",
        "steps": f"{stats.steps} (prompts and answers in the same ones)",
        "padding": f"{stats.padding_waste:.0%} of the tokens computed",
        "prefix hits": f"{stats.prefix_hit_tokens} of {stats.prefix_queried_tokens} prompt tokens",
        "pages": f"{stats.pages_cached} kept for later prompts, of {stats.pages_total}",
        "page waste": f"{stats.waste:.0%} of the positions held, over time",
        "compiled after ready": str(compiles),
    }
    table = Table("the engine", "", box=None, pad_edge=False, title=" ")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
