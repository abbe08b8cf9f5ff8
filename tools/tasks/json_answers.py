"""Answering in JSON to a schema: what a text says, in the properties that are asked for.

The schema has some of the properties that the text speaks of, in any order; the check parses the
answer, validates it and compares the content.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .example import Example, asked, system
from .schema import fits
from .words import CITIES, COLORS, FOODS, JOBS, NAMES, SURNAMES, THINGS, WEEKDAYS, a, some


@dataclass(frozen=True)
class Property:
    """A property, its values, and how a text says them.

    Attributes:
      says: templates with {x} (the value; `worded` of it where given) and {who} (the subject).
    """

    name: str
    schema: dict[str, Any]
    draw: Callable[[random.Random], Any]
    says: tuple[str, ...]
    worded: Callable[[Any], str] = str


@dataclass(frozen=True)
class Record:
    """A kind of thing: what it is called, its subject in sentences, its properties."""

    title: str
    subject: Callable[[random.Random], str]
    subject_property: str | None  # the property that is the subject itself
    properties: tuple[Property, ...]


_STRING, _INTEGER, _NUMBER, _BOOLEAN = (
    {"type": kind} for kind in ("string", "integer", "number", "boolean")
)


def _one_of(choices: Sequence[Any]) -> Callable[[random.Random], Any]:
    return lambda rng: rng.choice(choices)


def _integer(least: int, most: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.randint(least, most)


def _several(choices: Sequence[str]) -> Callable[[random.Random], list[str]]:
    return lambda rng: rng.sample(choices, rng.randint(1, 3))


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _price(rng: random.Random) -> float:
    return rng.randint(1, 99) + rng.choice((0.25, 0.5, 0.75, 0.95, 0.1, 0.2))


def _time(rng: random.Random) -> str:
    return f"{rng.randint(7, 21):02d}:{rng.choice(('00', '15', '30', '45'))}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(2020, 2039)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _full_name(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"


_TITLES = ("The Red Kite", "Blue Rain", "Old Stone", "The Last Train", "Green Hill", "White Night")
_SIZES = ("small", "medium", "large")


def _yes_no(is_so: bool) -> str:
    return "" if is_so else "not "


_RECORDS = (
    Record(
        "person",
        _full_name,
        "name",
        (
            Property(
                "age",
                _INTEGER,
                _integer(18, 89),
                ("{who} is {x} years old.", "{who}'s age is {x}."),
            ),
            Property("city", _STRING, _one_of(CITIES), ("{who} lives in {x}.",)),
            Property(
                "job",
                _STRING,
                _one_of(JOBS),
                ("{who} works as {x}.", "{who} is {x}."),
                a,
            ),
            Property(
                "married", _BOOLEAN, _one_of((True, False)), ("{who} is {x}married.",), _yes_no
            ),
            Property(
                "phone",
                _STRING,
                _one_of([f"{n:04d}" for n in range(0, 10000, 7)]),
                ("{who}'s phone number is {x}.",),
            ),
            Property(
                "likes",
                {"type": "array", "items": _STRING},
                _several(tuple(map(some, FOODS))),
                ("{who} likes {x}.",),
                _listed,
            ),
        ),
    ),
    Record(
        "product",
        lambda rng: f"{rng.choice(COLORS)} {rng.choice(THINGS)}",
        "product",
        (
            Property(
                "price",
                _NUMBER,
                _price,
                ("The {who} costs {x} euros.", "The price of the {who} is {x}."),
            ),
            Property("stock", _INTEGER, _integer(0, 400), ("We have {x} of the {who} in stock.",)),
            Property(
                "size",
                {"type": "string", "enum": list(_SIZES)},
                _one_of(_SIZES),
                ("The {who} comes in size {x}.", "The size of the {who} is {x}."),
            ),
            Property("maker", _STRING, _one_of(SURNAMES), ("The {who} is made by {x}.",)),
            Property(
                "sold_out",
                _BOOLEAN,
                _one_of((True, False)),
                ("The {who} is {x}sold out.",),
                _yes_no,
            ),
        ),
    ),
    Record(
        "meeting",
        _one_of(
            [f"meeting about {thing}" for thing in ("money", "sales", "travel", "food", "music")]
        ),
        None,
        (
            Property("date", _STRING, _date, ("The {who} is on {x}.",)),
            Property("time", _STRING, _time, ("The {who} starts at {x}.", "It starts at {x}.")),
            Property("room", _INTEGER, _integer(100, 999), ("The {who} is in room {x}.",)),
            Property(
                "guests",
                {"type": "array", "items": _STRING},
                _several(NAMES),
                ("{x} will come to the {who}.", "The guests of the {who} are {x}."),
                _listed,
            ),
            Property("minutes", _INTEGER, _integer(10, 180), ("The {who} takes {x} minutes.",)),
        ),
    ),
    Record(
        "booking",
        _full_name,
        "guest",
        (
            Property("city", _STRING, _one_of(CITIES), ("{who} books a hotel in {x}.",)),
            Property("nights", _INTEGER, _integer(1, 21), ("{who} stays for {x} nights.",)),
            Property("arrival", _STRING, _date, ("{who} arrives on {x}.",)),
            Property("rooms", _INTEGER, _integer(1, 6), ("{who} needs {x} rooms.",)),
            Property(
                "breakfast",
                _BOOLEAN,
                _one_of((True, False)),
                ("{who} does {x}want breakfast.",),
                _yes_no,
            ),
        ),
    ),
    Record(
        "weather",
        _one_of(CITIES),
        "city",
        (
            Property("temperature", _INTEGER, _integer(-15, 40), ("It is {x} degrees in {who}.",)),
            Property(
                "sky",
                {"type": "string", "enum": ["clear", "cloudy", "foggy", "rainy"]},
                _one_of(("clear", "cloudy", "foggy", "rainy")),
                ("The sky in {who} is {x}.",),
            ),
            Property("wind", _INTEGER, _integer(0, 90), ("The wind in {who} blows at {x} km/h.",)),
            Property("day", _STRING, _one_of(WEEKDAYS), ("This is the weather in {who} on {x}.",)),
        ),
    ),
)

_PROMPTS = (
    "Answer in JSON that fits this schema: {schema}\n\n{text}",
    "{text}\n\nWrite this as JSON with this schema: {schema}",
    "Extract the {title} as JSON.\nSchema: {schema}\nText: {text}",
    "Schema: {schema}\n\n{text}",
    "{text}\n\nGive me JSON for the schema {schema}",
)
_SYSTEMS = (
    "Answer only in JSON that fits this schema: {schema}",
    "Extract JSON from what the user says. Schema: {schema}",
    "You turn texts into JSON of this schema: {schema}",
)


def json_answer(rng: random.Random) -> Example:
    record = rng.choice(_RECORDS)
    who = record.subject(rng)
    said = rng.sample(record.properties, rng.randint(1, len(record.properties)))
    values = [prop.draw(rng) for prop in said]
    text = " ".join(
        [
            rng.choice(prop.says).format(who=who, x=prop.worded(value))
            for prop, value in zip(said, values, strict=True)
        ]
    )
    text = text[0].upper() + text[1:]
    fields = [(p.name, p.schema, v) for p, v in zip(said, values, strict=True)]
    if record.subject_property is not None:
        fields.append((record.subject_property, _STRING, who))
    fields = rng.sample(fields, rng.randint(1, len(fields)))
    schema = {
        "type": "object",
        "properties": {name: kind for name, kind, _ in fields},
        "required": [name for name, _, _ in fields],
    }
    content = {name: value for name, _, value in fields}
    slots = {"schema": json.dumps(schema), "text": text, "title": record.title}
    before: tuple[dict[str, Any], ...] = ()
    if rng.random() < 0.3:
        before = (system(rng.choice(_SYSTEMS).format(**slots)),)
        question = text
    else:
        question = rng.choice(_PROMPTS).format(**slots)
    answer = json.dumps(content)
    key = f"json {json.dumps(content, sort_keys=True)}"
    check = partial(says_json, answer, slots["schema"])
    return asked(rng, "json", key, question, answer, before=before, check=check)


def says_json(expected: str, schema: str, text: str) -> bool:
    """Whether the text is JSON of the schema with the content expected, in any layout."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # some models never close what they open
        return False
    return fits(json.loads(schema), value) and bool(value == json.loads(expected))
