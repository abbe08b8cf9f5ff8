"""Asks the demo's questions and shows the answers as they come; keeps the time.

Called by demo_command.py, once for each scene.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from ..eval.answers import most_tokens
from ..eval.prompts import pose
from .scenes import is_hard

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ...sched.sampling_params import SamplingParams
    from ...sched.stats import EngineStats
    from ...serving.answer import Chunk
    from ...serving.llm import LLM
    from ..tasks.example import Example


@dataclass(slots=True)
class Asked:
    """A question, and its answer as it comes. Times are seconds since it was asked."""

    example: Example
    prompt: Sequence[int]
    most_tokens: int  # of the answer
    text: str = ""
    tokens: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    finished: bool = False

    @property
    def question(self) -> str:
        """What the user said last, in one line."""
        said = [m["content"] for m in self.example.messages if m["role"] == "user"]
        return " ".join(str(said[-1]).split())

    @property
    def answer(self) -> str:
        """In one line, without the thoughts before it."""
        return " ".join(self.text.rpartition("</think>")[2].split())

    @property
    def right(self) -> bool:
        return self.finished and self.example.check(self.text)

    @property
    def hard(self) -> bool:
        return is_hard(self.example)

    def hear(self, chunk: Chunk, seconds: float) -> None:
        self.text += chunk.text
        self.tokens += len(chunk.token_ids)
        self.first_token = self.first_token or seconds
        self.last_token = seconds
        self.finished = chunk.finish_reason is not None


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene as it went."""

    name: str
    asked: list[Asked]
    seconds: float
    prompt_tokens: int
    hit_tokens: int  # of them, found in the prefix index


def chat(llm: LLM, examples: Sequence[Example], console: Console) -> Scene:
    """One conversation, each turn's answer streamed as it comes."""
    before, begin = llm.stats(), time.monotonic()
    messages: list[dict[str, Any]] = []
    turns = []
    for example in examples:
        messages.append(dict(example.messages[-2]))
        most = most_tokens(pose(llm.parts.checkpoint, example))
        asked = Asked(example, llm.chat_prompt(messages), most)
        said_at = time.monotonic()
        console.print(f"> {asked.question}", style="bold", markup=False)
        with llm.stream(asked.prompt, _sampling(llm, asked)) as stream:
            for chunk in stream:
                asked.hear(chunk, time.monotonic() - said_at)
                console.print(chunk.text, end="", markup=False, soft_wrap=True)
        console.print(f"  {_mark(asked)}")
        messages.append({"role": "assistant", "content": asked.text})
        turns.append(asked)
    return _scene("a chat", llm, turns, before, begin)


def at_once(llm: LLM, name: str, examples: Sequence[Example], console: Console) -> Scene:
    """All questions submitted together, their answers filling a table."""
    from rich.live import Live

    posed = [pose(llm.parts.checkpoint, example) for example in examples]
    asked = [Asked(q.example, q.prompt, most_tokens(q)) for q in posed]
    before, begin = llm.stats(), time.monotonic()
    sampling = [_sampling(llm, a) for a in asked]
    with Live(_answers(asked), console=console, refresh_per_second=10) as live:
        for at, chunk in llm.stream_many([a.prompt for a in asked], sampling):
            asked[at].hear(chunk, time.monotonic() - begin)
            if chunk.finish_reason is not None:
                live.update(_answers(asked))
    if not console.is_terminal:
        console.print()  # there, nothing ends the last line of a Live
    return _scene(name, llm, asked, before, begin)


def _sampling(llm: LLM, asked: Asked) -> SamplingParams:
    # Special tokens may frame thoughts and tool calls.
    return llm.default_sampling_params(
        temperature=0.0, max_tokens=asked.most_tokens, skip_special_tokens=False
    )


def _scene(name: str, llm: LLM, asked: list[Asked], before: EngineStats, begin: float) -> Scene:
    seconds, after = time.monotonic() - begin, llm.stats()
    return Scene(
        name,
        asked,
        seconds,
        after.prefix_queried_tokens - before.prefix_queried_tokens,
        after.prefix_hit_tokens - before.prefix_hit_tokens,
    )


def _mark(asked: Asked) -> str:
    if not asked.finished:
        return "…"
    return "[green]✓[/]" if asked.right else "[red]✗[/]"


def _answers(asked: Sequence[Asked]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    # The mark has no column of its own, which a narrow terminal would squeeze to nothing.
    for name, most in {"  question": 50, "answer": 60}.items():
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=most)
    for a in asked:
        hard = "[dim](hard)[/] " if a.hard else ""
        # [brackets] of a question are no styles.
        table.add_row(f"{_mark(a)} {hard}{escape(a.question)}", escape(a.answer))
    return table


def summary(scenes: Sequence[Scene], stats: EngineStats, compiles: int) -> Table:
    """What the engine did, in its own numbers."""
    from rich.table import Table

    table = Table("the engine", box=None, pad_edge=False)
    for scene in scenes:
        table.add_column(scene.name, justify="right")
    for name, figure in _BY_SCENE.items():
        table.add_row(name, *(figure(scene) for scene in scenes))
    rest = Table(box=None, pad_edge=False, show_header=False)
    for name, text in {
        "steps": str(stats.steps),
        "padding": f"{stats.padding_waste:.0%} of the tokens computed",
        "pages": f"{stats.pages_cached} kept for later prompts, of {stats.pages_total}",
        "page waste": f"{stats.waste:.0%} of the positions held, over time",
        "compiled after ready": str(compiles),
    }.items():
        rest.add_row(name, text)
    both = Table.grid()
    for part in (table, "", rest):
        both.add_row(part)
    return both


def _rate(scene: Scene) -> str:
    return f"{sum(a.tokens for a in scene.asked) / scene.seconds:.0f}"


def _first(scene: Scene) -> str:
    return f"{1e3 * median(a.first_token for a in scene.asked):.0f}"


def _per_token(scene: Scene) -> str:
    spans = [(a.last_token - a.first_token) / (a.tokens - 1) for a in scene.asked if a.tokens > 1]
    return f"{1e3 * fmean(spans):.1f}" if spans else ""


def _hits(scene: Scene) -> str:
    return f"{scene.hit_tokens / max(scene.prompt_tokens, 1):.0%}"


_BY_SCENE: dict[str, Callable[[Scene], str]] = {
    "right answers": lambda scene: f"{sum(a.right for a in scene.asked)} of {len(scene.asked)}",
    "prompt tokens": lambda scene: f"{scene.prompt_tokens:,}",
    "of them found in the prefix index": _hits,
    "output tokens": lambda scene: f"{sum(a.tokens for a in scene.asked):,}",
    "output tokens per second": _rate,
    "time to first token, median ms": _first,
    "time per output token, mean ms": _per_token,
    "seconds": lambda scene: f"{scene.seconds:.2f}",
}
