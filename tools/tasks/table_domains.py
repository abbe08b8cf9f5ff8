"""What tables (lookup.py) are about: their columns, what is in them, and how that is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .example import wordings
from .words import ANIMALS, CITIES, COLORS, FOODS, JOBS, NAMES, SURNAMES, THINGS


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
    letters = "ABCDEFGHKLMNPRST"
    return [f"{letters[code // 90]}{code % 90 + 10}" for code in rng.sample(range(1440), count)]


DOMAINS = (
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
