"""The tools that tool_calls.py offers: their schemas, how people ask for them, what they return."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .words import CITIES, MONTHS, NAMES, SURNAMES, THINGS, WEEKDAYS, plural

Values = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """A parameter under one of its names."""

    names: tuple[str, ...]
    schema: dict[str, Any]
    draw: Callable[[random.Random], Any]


@dataclass(frozen=True)
class Tool:
    """A function under one of its names.

    Attributes:
      parameters: by the slot that they fill in `requests` and `answer`.
      answer: what to say when it has returned; a template over the slots and the result.
    """

    names: tuple[str, ...]
    description: str
    parameters: dict[str, Parameter]
    requests: tuple[str, ...]
    result: Callable[[random.Random, Values], Values]
    answer: str


@dataclass(frozen=True)
class Offer:
    """A tool as it is offered in one conversation, with the arguments someone will ask for."""

    tool: Tool
    name: str
    parameter_names: dict[str, str]  # by slot
    values: Values  # by slot

    @property
    def arguments(self) -> Values:
        return {self.parameter_names[slot]: value for slot, value in self.values.items()}

    @property
    def key(self) -> str:
        """The instance: the same under every name and wording."""
        return f"{self.tool.names[0]} {self.values}"

    @cached_property
    def schema(self) -> dict[str, Any]:
        """In OpenAI's form."""
        parameters = self.tool.parameters
        names = self.parameter_names
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.tool.description,
                "parameters": {
                    "type": "object",
                    "properties": {names[slot]: p.schema for slot, p in parameters.items()},
                    "required": list(names.values()),
                },
            },
        }

    def request(self, rng: random.Random) -> str:
        """Someone's words that ask for it."""
        return rng.choice(self.tool.requests).format(**self.values)


def offer(rng: random.Random, tool: Tool) -> Offer:
    return Offer(
        tool,
        rng.choice(tool.names),
        {slot: rng.choice(p.names) for slot, p in tool.parameters.items()},
        {slot: p.draw(rng) for slot, p in tool.parameters.items()},
    )


def _one_of(choices: Sequence[Any]) -> Callable[[random.Random], Any]:
    return lambda rng: rng.choice(choices)


def _integer(least: int, most: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.randint(least, most)


def _time(rng: random.Random) -> str:
    return f"{rng.randrange(24):02d}:{rng.randrange(0, 60, 5):02d}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(2024, 2035)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _note(rng: random.Random) -> str:
    return rng.choice(_NOTES).format(
        things=plural(rng.choice(THINGS)),
        thing=rng.choice(THINGS),
        weekday=rng.choice(WEEKDAYS),
        time=_time(rng),
        name=rng.choice(NAMES),
        n=rng.randint(2, 99),
    )


_NOTES = (
    "buy {n} {things}",
    "call {name} on {weekday}",
    "dinner is at {time}",
    "bring the {thing}",
    "the {thing} is for {name}",
    "meet {name} at {time}",
    "the code is {n}",
    "pay {n} euros for the {thing}",
)
_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_ROOMS = ("kitchen", "bathroom", "bedroom", "office", "garage", "garden", "hall")
_SWITCHED = ("lamp", "radio", "fan", "heater", "camera", "clock")
_LANGUAGES = ("French", "German", "Greek", "Italian", "Spanish", "Polish")
_MONEY = ("EUR", "USD", "GBP", "JPY", "CHF")
_SKIES = ("clear", "cloudy", "foggy", "rainy", "windy", "sunny")

_CITY = Parameter(("city", "location", "place"), _STRING, _one_of(CITIES))
_NAME = Parameter(("to", "recipient", "name"), _STRING, _one_of(NAMES))
_CLOCK = Parameter(("time", "at"), _STRING, _time)
_DAY = Parameter(("date", "day"), _STRING, _date)


def _done(rng: random.Random, values: Values) -> Values:
    return {"status": "done"}


def _switch(state: str) -> Tool:
    return Tool(
        (f"turn_{state}", f"switch_{state}"),
        f"Switch a device {state}.",
        {
            "device": Parameter(("device", "thing"), _STRING, _one_of(_SWITCHED)),
            "room": Parameter(("room", "place"), _STRING, _one_of(_ROOMS)),
        },
        (
            f"Turn {state} the {{device}} in the {{room}}.",
            f"Switch {state} the {{device}} in the {{room}}, please.",
            f"Can you switch the {{device}} in the {{room}} {state}?",
        ),
        lambda rng, values: {"state": state, "watts": rng.randint(0, 400)},
        "The {device} in the {room} is {state} and takes {watts} watts.",
    )


TOOLS: tuple[Tool, ...] = (
    Tool(
        ("get_weather", "weather", "find_weather"),
        "Get the weather of a city on a day.",
        {"city": _CITY, "date": _DAY},
        (
            "What is the weather like in {city} on {date}?",
            "How will the weather be in {city} on {date}?",
            "What is the weather in {city} on {date}?",
            "Weather in {city}, {date}?",
        ),
        lambda rng, values: {"degrees": rng.randint(-15, 40), "sky": rng.choice(_SKIES)},
        "It will be {degrees} degrees and {sky} in {city}.",
    ),
    Tool(
        ("get_time", "current_time", "time_in"),
        "Get the time in a city.",
        {"city": _CITY},
        (
            "What time is it in {city}?",
            "Tell me the time in {city}.",
            "How late is it in {city} now?",
        ),
        lambda rng, values: {"time": f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"},
        "It is {time} in {city}.",
    ),
    Tool(
        ("set_timer", "start_timer"),
        "Start a timer.",
        {"minutes": Parameter(("minutes", "length"), _INTEGER, _integer(1, 240))},
        (
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes.",
            "Wake me in {minutes} minutes.",
        ),
        lambda rng, values: {"ends": _time(rng)},
        "The timer ends at {ends}.",
    ),
    Tool(
        ("set_alarm", "add_alarm"),
        "Set an alarm.",
        {"time": _CLOCK, "date": _DAY},
        ("Set an alarm for {time} on {date}.", "Wake me at {time} on {date}."),
        lambda rng, values: {"alarm": rng.randint(1, 99)},
        "Alarm {alarm} is set for {time} on {date}.",
    ),
    Tool(
        ("send_message", "send_text", "message"),
        "Send a message to someone.",
        {"name": _NAME, "text": Parameter(("text", "message", "content"), _STRING, _note)},
        (
            "Send {name} the message: {text}",
            "Tell {name}: {text}",
            'Send "{text}" to {name}.',
            'Write "{text}" to {name}.',
        ),
        lambda rng, values: {"sent": _time(rng)},
        "I sent it to {name} at {sent}.",
    ),
    Tool(
        ("add_note", "create_note", "save_note"),
        "Keep a note.",
        {"text": Parameter(("text", "note", "content"), _STRING, _note)},
        ("Take a note: {text}", "Note: {text}", 'Keep the note "{text}".'),
        lambda rng, values: {"note": rng.randint(1, 999)},
        "I keep it as note {note}.",
    ),
    Tool(
        ("convert_money", "exchange"),
        "Convert money to another currency.",
        {
            "amount": Parameter(("amount", "value"), _INTEGER, _integer(1, 9999)),
            "have": Parameter(
                ("from", "source"), {"type": "string", "enum": list(_MONEY)}, _one_of(_MONEY)
            ),
            "want": Parameter(
                ("to", "target"), {"type": "string", "enum": list(_MONEY)}, _one_of(_MONEY)
            ),
        },
        (
            "How much are {amount} {have} in {want}?",
            "Convert {amount} {have} to {want}.",
            "What are {amount} {have} in {want}?",
        ),
        lambda rng, values: {"result": rng.randint(1, 9999)},
        "{amount} {have} are {result} {want}.",
    ),
    Tool(
        ("add_event", "create_event"),
        "Put an event into the calendar.",
        {
            "title": Parameter(
                ("title", "event", "name"),
                _STRING,
                lambda rng: (
                    f"{rng.choice(('lunch', 'dinner', 'call', 'tea'))} with {rng.choice(NAMES)}"
                ),
            ),
            "date": _DAY,
            "time": _CLOCK,
        },
        (
            "Add {title} on {date} at {time}.",
            "Put {title} into my calendar: {date}, {time}.",
            "On {date} at {time} I have {title}. Add it.",
        ),
        lambda rng, values: {"id": rng.randint(100, 999)},
        "I added {title} as event {id}.",
    ),
    Tool(
        ("list_events", "get_events", "find_events"),
        "List the events of a day.",
        {"date": _DAY},
        ("What is on my calendar on {date}?", "What do I have on {date}?", "My events on {date}?"),
        lambda rng, values: {"event": f"lunch with {rng.choice(NAMES)}", "time": _time(rng)},
        "You have {event} at {time}.",
    ),
    Tool(
        ("find_route", "get_route", "route"),
        "Find the way between two cities.",
        {
            "start": Parameter(("from", "start", "origin"), _STRING, _one_of(CITIES)),
            "end": Parameter(("to", "end", "destination"), _STRING, _one_of(CITIES)),
        },
        (
            "How do I get from {start} to {end}?",
            "Find a route from {start} to {end}.",
            "How far is it from {start} to {end}?",
        ),
        lambda rng, values: {"km": rng.randint(50, 9999), "hours": rng.randint(1, 60)},
        "From {start} to {end} it is {km} km, about {hours} hours.",
    ),
    Tool(
        ("order_item", "buy", "place_order"),
        "Order something.",
        {
            "item": Parameter(("item", "product"), _STRING, _one_of(THINGS)),
            "count": Parameter(("count", "quantity", "number"), _INTEGER, _integer(1, 60)),
        },
        (
            "Order {count} of the {item}.",
            "I need the {item}, {count} times.",
            "Buy the {item} {count} times.",
        ),
        lambda rng, values: {"order": rng.randint(1000, 9999), "price": rng.randint(2, 999)},
        "Order {order} is placed and costs {price} euros.",
    ),
    Tool(
        ("translate", "translate_text"),
        "Translate a text.",
        {
            "text": Parameter(("text", "content"), _STRING, _note),
            "language": Parameter(("language", "to", "target"), _STRING, _one_of(_LANGUAGES)),
        },
        ('Translate "{text}" to {language}.', 'What is "{text}" in {language}?'),
        lambda rng, values: {"words": rng.randint(2, 9), "file": f"{rng.randint(100, 999)}.txt"},
        "The {language} text of {words} words is in {file}.",
    ),
    Tool(
        ("find_phone", "get_phone", "phone_of"),
        "Look up someone's phone number.",
        {
            "name": Parameter(
                ("name", "person"),
                _STRING,
                lambda rng: f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}",
            )
        },
        (
            "What is the phone number of {name}?",
            "Find the number of {name}.",
            "How can I call {name}?",
        ),
        lambda rng, values: {"phone": str(rng.randint(10000, 99999))},
        "The number of {name} is {phone}.",
    ),
    Tool(
        ("book_table", "reserve_table"),
        "Book a table in a restaurant.",
        {
            "people": Parameter(("people", "guests", "seats"), _INTEGER, _integer(1, 20)),
            "time": _CLOCK,
            "city": _CITY,
        },
        (
            "Book a table for {people} in {city} at {time}.",
            "We are {people} and want to eat in {city} at {time}.",
            "Reserve a table in {city} for {people} people at {time}.",
        ),
        lambda rng, values: {"table": rng.randint(1, 60)},
        "Table {table} is yours at {time}.",
    ),
    Tool(
        ("sales_of", "get_sales", "sales"),
        "Get the sales of a month.",
        {
            "month": Parameter(("month", "of"), _STRING, _one_of(MONTHS)),
            "year": Parameter(("year", "in_year"), _INTEGER, _integer(1990, 2035)),
        },
        (
            "What were the sales in {month} {year}?",
            "How much did we sell in {month} {year}?",
            "Show me the sales of {month} {year}.",
        ),
        lambda rng, values: {"sales": rng.randint(100, 99999)},
        "In {month} {year} the sales were {sales}.",
    ),
    _switch("on"),
    _switch("off"),
)
