"""Looking something up in a table: short ones, and long ones with several questions.

A long table takes about 900 to 1,500 tokens of the demo model, in the system prompt or the first
user turn, so that prompts are long and share their beginning. `shared_table` makes the
demonstration of that: many questions about one table.
"""

from __future__ import annotations

import hashlib
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from .example import Example, Message, assistant, exactly, system, user, wordings
from .words import ANIMALS, CITIES, COLORS, FOODS, JOBS, NAMES, SURNAMES, THINGS

SHORT_ROWS = (4, 16)
LONG_TOKENS = (900, 1500)
_LONG_COLUMNS = 4
_LONG_MOST_ROWS = 110
_MOST_QUESTIONS = 12


@dataclass(frozen=True)
class Column:
    """What stands in a column, and how it is asked for.

    Attributes:
      draw: one cell.
      questions: templates with {key}, the row's name.
      backwards: templates with {value}, asking for the row's name; used where the value is unique.
    """

    title: str
    draw: Callable[[random.Random], str]
    questions: tuple[str, ...]
    backwards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """Rows named by the first column, and the columns that may follow it."""

    key_title: str
    keys: Callable[[random.Random, int], list[str]]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Table:
    """A table with its cells as text: rows[i][0] is the row's name."""

    columns: tuple[Column, ...]
    rows: list[list[str]]
    text: str


def _one_of(choices: Sequence[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(choices)


def _number(least: int, most: int) -> Callable[[random.Random], str]:
    return lambda rng: str(rng.randint(least, most))


def _price(rng: random.Random) -> str:
    return f"{rng.randint(1, 99)}.{rng.randint(0, 99):02d}"


def _time(rng: random.Random) -> str:
    return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"


def _sampled(choices: Sequence[str]) -> Callable[[random.Random, int], list[str]]:
    return lambda rng, count: rng.sample(choices, count)


def _codes(rng: random.Random, count: int) -> list[str]:
    letter = rng.choice("ABCDEFGHKLMNPRST")
    return [f"{letter}{code}" for code in rng.sample(range(100, 1000), count)]


_DOMAINS = (
    Domain(
        "Name",
        _sampled(NAMES),
        (
            Column(
                "Age",
                _number(18, 89),
                wordings("How old is {key}?", "What is the age of {key}?", "{key}'s age?"),
                wordings("Who is {value} years old?", "Whose age is {value}?"),
            ),
            Column(
                "City",
                _one_of(CITIES),
                wordings("Where does {key} live?", "In which city does {key} live?"),
                wordings("Who lives in {value}?", "Who is from {value}?"),
            ),
            Column(
                "Job",
                _one_of(JOBS),
                wordings("What is the job of {key}?", "What does {key} do?", "{key}'s job?"),
                wordings("Who is the {value}?", "Whose job is {value}?"),
            ),
            Column(
                "Room",
                _number(100, 999),
                wordings("In which room is {key}?", "What is {key}'s room?"),
                wordings("Who is in room {value}?", "Whose room is {value}?"),
            ),
            Column(
                "Phone",
                _number(1000, 9999),
                wordings("What is the phone number of {key}?", "What is {key}'s phone number?"),
                wordings(
                    "Who has the phone number {value}?",
                ),
            ),
            Column(
                "Team",
                _one_of(COLORS),
                wordings("Which team is {key} in?", "What is {key}'s team?"),
                wordings(
                    "Who is in the {value} team?",
                ),
            ),
        ),
    ),
    Domain(
        "Item",
        lambda rng, count: rng.sample(THINGS + FOODS, count),
        (
            Column(
                "Price",
                _price,
                wordings("What does the {key} cost?", "What is the price of the {key}?"),
                wordings("Which item costs {value}?", "What can I get for {value}?"),
            ),
            Column(
                "Stock",
                _number(0, 500),
                wordings("How many of the {key} are in stock?", "What is the stock of the {key}?"),
                wordings(
                    "Of which item are {value} in stock?",
                ),
            ),
            Column(
                "Color",
                _one_of(COLORS),
                wordings("What color is the {key}?", "Which color does the {key} have?"),
                wordings(
                    "Which item is {value}?",
                ),
            ),
            Column(
                "Shelf",
                lambda rng: f"{rng.choice('ABCDEFGH')}{rng.randint(1, 60)}",
                wordings("On which shelf is the {key}?", "Where is the {key}?"),
                wordings(
                    "What is on shelf {value}?",
                ),
            ),
            Column(
                "Maker",
                _one_of(SURNAMES),
                wordings("Who makes the {key}?", "Who is the maker of the {key}?"),
                wordings("What does {value} make?", "Which item is made by {value}?"),
            ),
        ),
    ),
    Domain(
        "Train",
        _codes,
        (
            Column(
                "To",
                _one_of(CITIES),
                wordings("Where does train {key} go?", "Where does {key} go to?"),
                wordings("Which train goes to {value}?", "What train do I take to {value}?"),
            ),
            Column(
                "Leaves",
                _time,
                wordings("When does train {key} leave?", "At what time does {key} leave?"),
                wordings(
                    "Which train leaves at {value}?",
                ),
            ),
            Column(
                "Track",
                _number(1, 40),
                wordings("From which track does {key} leave?", "What is the track of {key}?"),
                wordings(
                    "Which train is on track {value}?",
                ),
            ),
            Column(
                "Minutes",
                _number(20, 400),
                wordings("How many minutes does {key} take?", "How long does train {key} take?"),
                wordings(
                    "Which train takes {value} minutes?",
                ),
            ),
            Column(
                "Driver",
                _one_of(NAMES),
                wordings("Who drives train {key}?", "Who is the driver of {key}?"),
                wordings(
                    "Which train does {value} drive?",
                ),
            ),
        ),
    ),
    Domain(
        "Order",
        _codes,
        (
            Column(
                "Customer",
                lambda rng: f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}",
                wordings("Who placed order {key}?", "Whose order is {key}?"),
                wordings("Which order is from {value}?", "Which order did {value} place?"),
            ),
            Column(
                "Item",
                _one_of(THINGS),
                wordings("What was ordered in {key}?", "What is the item of order {key}?"),
                wordings(
                    "Which order has the item {value}?",
                ),
            ),
            Column(
                "Count",
                _number(1, 99),
                wordings("How many were ordered in {key}?", "What is the count of {key}?"),
                wordings(
                    "Which order has a count of {value}?",
                ),
            ),
            Column(
                "Total",
                _price,
                wordings("What is the total of {key}?", "How much does order {key} cost?"),
                wordings(
                    "Which order has a total of {value}?",
                ),
            ),
            Column(
                "City",
                _one_of(CITIES),
                wordings("Where does order {key} go?", "To which city goes order {key}?"),
                wordings(
                    "Which order goes to {value}?",
                ),
            ),
        ),
    ),
    Domain(
        "Animal",
        _sampled(ANIMALS),
        (
            Column(
                "Owner",
                _one_of(NAMES),
                wordings("Who owns the {key}?", "Whose animal is the {key}?"),
                wordings("Which animal does {value} own?", "What animal does {value} have?"),
            ),
            Column(
                "Weight",
                _number(1, 400),
                wordings("How heavy is the {key}?", "What is the weight of the {key}?"),
                wordings(
                    "Which animal weighs {value}?",
                ),
            ),
            Column(
                "Food",
                _one_of(FOODS),
                wordings("What does the {key} eat?", "Which food does the {key} get?"),
                wordings(
                    "Which animal eats {value}?",
                ),
            ),
            Column(
                "House",
                _number(1, 99),
                wordings("In which house is the {key}?", "What is the house of the {key}?"),
                wordings(
                    "Which animal is in house {value}?",
                ),
            ),
        ),
    ),
)
_LONG_DOMAINS = tuple(domain for domain in _DOMAINS if domain.key_title != "Animal")

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
    # A line that starts with a small letter is spelled letter by letter.
    if style < 2 or (style == 2 and body[0][0].islower()):
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


def ask(rng: random.Random, table: Table) -> tuple[str, str]:
    """A question about a table and its answer."""
    at = rng.randrange(len(table.columns))
    column = table.columns[at]
    row = rng.choice(table.rows)
    if column.backwards and rng.random() < 0.35:
        value = row[at + 1]
        if sum(other[at + 1] == value for other in table.rows) == 1:
            return rng.choice(column.backwards).format(value=value), row[0]
    return rng.choice(column.questions).format(key=row[0]), row[at + 1]


def table(rng: random.Random) -> Example:
    """A short table, one to four questions."""
    made = make_table(rng, _DOMAINS, rng.randint(*SHORT_ROWS), rng.randint(1, 4))
    return _with_table(rng, "table", made, rng.choice((1, 1, 2, 3, 4)))


def long_table(rng: random.Random) -> Example:
    """A table of 900 to 1,500 tokens, one to a dozen questions."""
    made = _long_table(rng, rng.randint(*LONG_TOKENS))
    return _with_table(rng, "long_table", made, rng.randint(1, _MOST_QUESTIONS))


def shared_table(rng: random.Random, questions: int = 20) -> list[Example]:
    """Examples that share their first message: a system prompt with a long table."""
    made = _long_table(rng, LONG_TOKENS[1])
    first = system(rng.choice(_BELOW_SYSTEM).format(table=made.text))
    asked: dict[str, str] = {}
    while len(asked) < questions:
        question, answer = ask(rng, made)
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


def _long_table(rng: random.Random, tokens: int) -> Table:
    return make_table(rng, _LONG_DOMAINS, _LONG_MOST_ROWS, _LONG_COLUMNS, tokens)


def _with_table(rng: random.Random, task: str, made: Table, questions: int) -> Example:
    messages: list[Message] = []
    in_system = rng.random() < 0.5
    if in_system:
        messages.append(system(rng.choice(_BELOW_SYSTEM).format(table=made.text)))
    for turn in range(questions):
        question, answer = ask(rng, made)
        if turn == 0 and not in_system:
            question = rng.choice(_IN_QUESTION).format(table=made.text, question=question)
        messages += [user(question), assistant(answer)]
    return Example(task, _key(made, question), tuple(messages), partial(exactly, answer))


def _key(made: Table, question: str) -> str:
    """Names the cells and the question, in few characters."""
    text = f"{made.rows} {question}"
    return f"table {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
