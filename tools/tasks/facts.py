"""Looking something up in a text: a few plain statements, then a question about one of them."""

from __future__ import annotations

import random

from .example import Example, Message, asked, assistant, spread, system, user, wordings
from .words import ANIMALS, CITIES, COLORS, FOODS, JOBS, NAMES, THINGS, WEEKDAYS, a, some

STATEMENTS = (2, 24)

# Each: a statement, then questions and the slot of _draw that answers them; the first asks by name.
# A kind of statement occurs once per name, so only questions for the name can fit several.
_KINDS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "{name} lives in {city}.",
        (("Where does {name} live?", "city"), ("Who lives in {city}?", "name")),
    ),
    (
        "{name} is {age} years old.",
        (("How old is {name}?", "age"), ("Who is {age} years old?", "name")),
    ),
    (
        "{name} works as {a_job}.",
        (("What does {name} work as?", "job"), ("Who works as {a_job}?", "name")),
    ),
    (
        "{name} has {a_color} {thing}.",
        (
            ("What color is {name}'s {thing}?", "color"),
            ("Who has {a_color} {thing}?", "name"),
        ),
    ),
    (
        "{name} keeps {an_animal}.",
        (("Which animal does {name} keep?", "animal"), ("Who keeps {an_animal}?", "name")),
    ),
    (
        "{name} bought {count} {thing}s for {price} euros.",
        (
            ("How many {thing}s did {name} buy?", "count"),
            ("What did {name} pay for the {thing}s?", "price"),
        ),
    ),
    (
        "The meeting with {name} is on {weekday} at {time}.",
        (
            ("When does the meeting with {name} start?", "time"),
            ("On which day is the meeting with {name}?", "weekday"),
            ("Who is the meeting at {time} with?", "name"),
        ),
    ),
    (
        "{name} likes {food}, but not {food2}.",
        (
            ("What does {name} like?", "food"),
            ("What does {name} not like?", "food2"),
            ("Who likes {food}?", "name"),
        ),
    ),
    (
        "The {thing} of {name} is number {code}.",
        (
            ("What is the number of {name}'s {thing}?", "code"),
            ("Whose {thing} is number {code}?", "name"),
        ),
    ),
    (
        "On {weekday} {name} travels from {city} to {city2}.",
        (
            ("Where does {name} travel to?", "city2"),
            ("Where does {name} travel from?", "city"),
            ("On which day does {name} travel?", "weekday"),
        ),
    ),
)
_REGULAR = tuple(thing for thing in THINGS if not thing.endswith(("x", "s", "ch", "sh", "y", "fe")))

_PROMPTS = (
    "{text}\n\n{question}",
    "{text} {question}",
    "Read this: {text}\n\n{question}",
    "{question}\n\n{text}",
)
_SYSTEMS = ("You know this: {text}", "{text}\n\nAnswer questions about this text.")

_HURRIED = {question: wordings(question) for _, kinds in _KINDS for question, _ in kinds}


def facts(rng: random.Random) -> Example:
    kinds: list[int] = []
    slots: list[dict[str, str]] = []
    names = rng.sample(NAMES, rng.randint(2, 8))
    seen = set()
    for _ in range(spread(rng, *STATEMENTS)):
        kind, name = rng.randrange(len(_KINDS)), rng.choice(names)
        if (kind, name) not in seen:
            seen.add((kind, name))
            kinds.append(kind)
            slots.append(_draw(rng, name))
    text = " ".join([_KINDS[k][0].format(**s) for k, s in zip(kinds, slots, strict=True)])
    asking = [_ask(rng, kinds, slots) for _ in range(rng.choice((1, 1, 2, 3)))]
    question, answer, what = asking[-1]
    key = f"facts {what} {text}"
    before: list[Message] = []
    where = rng.randrange(8)
    if where == 0:
        before = [system(rng.choice(_SYSTEMS).format(text=text))]
    elif where == 1:
        before = [user(text), assistant("I see.")]
    for earlier, said, _ in asking[:-1]:
        if where > 1 and not before:
            earlier = rng.choice(_PROMPTS).format(text=text, question=earlier)
        before += [user(earlier), assistant(said)]
    if not before:
        question = rng.choice(_PROMPTS).format(text=text, question=question)
    return asked(rng, "facts", key, question, answer, before=before)


def _ask(rng: random.Random, kinds: list[int], slots: list[dict[str, str]]) -> tuple[str, str, str]:
    """A question about one of the statements, its answer, and what it asks for in plain."""
    at = rng.randrange(len(kinds))
    template, wanted = rng.choice(_KINDS[kinds[at]][1])
    same_kind = [s for k, s in zip(kinds, slots, strict=True) if k == kinds[at]]
    if wanted == "name" and _is_ambiguous(template, slots[at], same_kind):
        template, wanted = _KINDS[kinds[at]][1][0]
    question = rng.choice(_HURRIED[template]).format(**slots[at])
    return question, slots[at][wanted], template.format(**slots[at])


def _is_ambiguous(template: str, mine: dict[str, str], same_kind: list[dict[str, str]]) -> bool:
    """Whether the question fits more than one of the statements of its kind."""
    question = template.format(**mine)
    return sum(template.format(**slots) == question for slots in same_kind) > 1


def _draw(rng: random.Random, name: str) -> dict[str, str]:
    job, animal, color = rng.choice(JOBS), rng.choice(ANIMALS), rng.choice(COLORS)
    food, food2 = map(some, rng.sample(FOODS, 2))
    city, city2 = rng.sample(CITIES, 2)
    return {
        "name": name,
        "city": city,
        "city2": city2,
        "age": str(rng.randint(3, 99)),
        "job": job,
        "a_job": a(job),
        "animal": animal,
        "an_animal": a(animal),
        "color": color,
        "a_color": a(color),
        "thing": rng.choice(_REGULAR),
        "count": str(rng.randint(2, 60)),
        "price": str(rng.randint(2, 400)),
        "weekday": rng.choice(WEEKDAYS),
        "time": f"{rng.randint(7, 20):02d}:{rng.choice(('00', '15', '30', '45'))}",
        "food": food,
        "food2": food2,
        "code": str(rng.randint(100, 9999)),
    }
