"""Looking something up in a table: short ones, and long ones with several questions.

A long table takes about 300 to 1,500 tokens of the demo model, in the system prompt or the first
user turn, so that prompts are long and share their beginning. `shared_table` makes the
demonstration of that: many questions about one table.
"""

from __future__ import annotations

import hashlib
import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

from .example import Example, Message, assistant, exactly, spread, system, user
from .table_domains import DOMAINS, Column, Domain

SHORT_ROWS = (2, 16)
LONG_TOKENS = (300, 1500)
_COLUMNS = (1, 4)
_LONG_MOST_ROWS = 110
_MOST_TOKENS = 1900
"""Of a long table and its questions together."""

_TURN_TOKENS = 34
"""About, of a question and its answer, the template's marks included."""

_MOST_QUESTIONS = 24

BY_NAME, BY_VALUE = 1, 2
"""What the last question of an example is asked by, as its difficulty: of a row that is named, or
for the name of the row that has a value."""


@dataclass(frozen=True)
class Table:
    """A table with its cells as text: rows[i][0] is the row's name."""

    columns: tuple[Column, ...]
    rows: list[list[str]]
    text: str


_LONG_DOMAINS = tuple(domain for domain in DOMAINS if domain.key_title != "Animal")

_BELOW_SYSTEM = (
    "Answer from this table.\n\n{table}",
    "Use this table to answer.\n\n{table}",
    "You answer questions about this table:\n{table}",
    "{table}\n\nAnswer questions about this table.",
)
_IN_QUESTION = (
    "{table}\n\n{question}",
    "Here is a table:\n{table}\n\n{question}",
    "Look at this table.\n\n{table}\n\n{question}",
    "{question}\n\n{table}",
)


_TOKENS = re.compile(r"[A-Za-z]+|\d|[^\w\s]+|(?<=[a-z]) (?=\d)|$")
"""About the demo model's tokens of a line."""


def make_table(
    rng: random.Random,
    domains: Sequence[Domain],
    rows: int,
    columns: int,
    tokens: int | None = None,
) -> Table:
    """A random table.

    Args:
      rows: how many; with `tokens` at most.
      columns: beside the first; fewer where the domain has no more.
      tokens: about how long it may become.
    """
    domain = rng.choice(domains)
    chosen = tuple(rng.sample(domain.columns, min(columns, len(domain.columns))))
    drawers = [column.draw for column in chosen]
    body = [[key, *[draw(rng) for draw in drawers]] for key in domain.keys(rng, rows)]
    titles = [domain.key_title, *(column.title for column in chosen)]
    style = rng.randrange(4)
    # At the start of a line a word is spelled letter by letter, a code is not.
    if style == 2 and body[0][0].isalpha():
        style = 3
    if style < 2:
        head = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
        lines = [f"| {' | '.join(row)} |" for row in body]
    elif style == 2:
        head = [", ".join(titles)]
        lines = [", ".join(row) for row in body]
    else:
        head = []
        form = "- {}: " + ", ".join([f"{title} {{}}" for title in titles[1:]])
        lines = [form.format(*row) for row in body]
    if tokens is not None:
        sizes = accumulate([len(_TOKENS.findall(line)) for line in lines])
        fitting = bisect_left(list(sizes), tokens)
        body, lines = body[:fitting], lines[:fitting]
    return Table(chosen, body, "\n".join([*head, *lines]))


def ask(rng: random.Random, table: Table, *, by_value: bool = True) -> tuple[str, str, int]:
    """A question about a table, its answer, and BY_NAME or, with `by_value`, maybe BY_VALUE."""
    at = rng.randrange(len(table.columns))
    column = table.columns[at]
    row = rng.choice(table.rows)
    if by_value and column.backwards and rng.random() < 0.35:
        value = row[at + 1]
        if sum(other[at + 1] == value for other in table.rows) == 1:
            return rng.choice(column.backwards).format(value=value), row[0], BY_VALUE
    return rng.choice(column.questions).format(key=row[0]), row[at + 1], BY_NAME


def table(rng: random.Random) -> Example:
    """A short table, one to six questions.

    The smallest are as frequent as the largest: on them looking up is learned at all.
    """
    made = make_table(rng, DOMAINS, spread(rng, *SHORT_ROWS), rng.randint(*_COLUMNS))
    return _with_table(rng, "table", made, rng.choice((1, 1, 2, 3, 4, 6)))


def table_row(rng: random.Random) -> Example:
    """Of short tables the questions by value, alone."""
    while (example := table(rng)).difficulty != BY_VALUE:
        pass
    return replace(example, task="table_row", difficulty=0)


def long_table(rng: random.Random) -> Example:
    """A table of 300 to 1,500 tokens, one to two dozen questions."""
    tokens = rng.randint(*LONG_TOKENS)
    made = _long_table(rng, rng.randint(*_COLUMNS), tokens)
    room = (_MOST_TOKENS - tokens) // _TURN_TOKENS
    return _with_table(rng, "long_table", made, rng.randint(1, min(_MOST_QUESTIONS, room)))


def shared_table(rng: random.Random, questions: int = 20) -> list[Example]:
    """Examples that share their first message: a system prompt with a long table."""
    made = _long_table(rng, _COLUMNS[1], LONG_TOKENS[1])
    first = system(rng.choice(_BELOW_SYSTEM).format(table=made.text))
    asked: dict[str, str] = {}
    while len(asked) < questions:
        question, answer, _ = ask(rng, made, by_value=False)
        asked.setdefault(question, answer)
    return [
        Example(
            "long_table",
            _key(made, question),
            (first, user(question), assistant(answer)),
            partial(exactly, answer),
        )
        for question, answer in asked.items()
    ]


def _long_table(rng: random.Random, columns: int, tokens: int) -> Table:
    return make_table(rng, _LONG_DOMAINS, _LONG_MOST_ROWS, columns, tokens)


def _with_table(rng: random.Random, task: str, made: Table, questions: int) -> Example:
    messages: list[Message] = []
    in_system = rng.random() < 0.5
    if in_system:
        messages.append(system(rng.choice(_BELOW_SYSTEM).format(table=made.text)))
    for turn in range(questions):
        question, answer, level = ask(rng, made)
        if turn == 0 and not in_system:
            question = rng.choice(_IN_QUESTION).format(table=made.text, question=question)
        messages += [user(question), assistant(answer)]
    check = partial(exactly, answer)
    return Example(task, _key(made, question), tuple(messages), check, difficulty=level)


def _key(made: Table, question: str) -> str:
    """Names the cells and the question, in few characters."""
    text = f"{made.rows} {question}"
    return f"table {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
