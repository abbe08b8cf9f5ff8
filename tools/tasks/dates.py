"""Dates and times of day: written another way, some days or minutes on, the days between two."""

from __future__ import annotations

import random
from datetime import date, timedelta

from .example import Example, asked, wordings
from .words import MONTHS, WEEKDAYS

YEARS = (1950, 2049)
MAX_DAYS_ON = 14

DAYS_BETWEEN_SPANS = {1: 20, 2: 60, 3: 200, 4: 700, 5: 3000, 6: 9000, 7: 30000}
"""Most days between the dates, by level."""
DAYS_BETWEEN_TRAINED = (1, 2, 3, 3, 4, 4, 5, 5, 6, 7)

_ISO = wordings(
    "Write {day} {month} {year} as an ISO date.",
    "What is {day} {month} {year} as YYYY-MM-DD?",
    "Write {month} {day}, {year} as an ISO date.",
    "Convert {month} {day}, {year} to ISO format.",
    "ISO date of {day} {month} {year}?",
)
_WORDS = wordings(
    "Write {iso} in words.",
    "Write the date {iso} with the month's name.",
    "Which date is {iso}?",
    "What day is {iso} in plain English?",
)
_LATER = wordings(
    "What date is {n} days after {iso}?",
    "Which date comes {n} days after {iso}?",
    "{iso} plus {n} days?",
    "Add {n} days to {iso}.",
)
_EARLIER = wordings(
    "What date is {n} days before {iso}?",
    "Which date was {n} days before {iso}?",
    "{iso} minus {n} days?",
)
_NEXT = wordings("What is the day after {iso}?", "Which date follows {iso}?")
_BEFORE = wordings("What is the day before {iso}?", "Which date precedes {iso}?")
_WEEKDAY = wordings(
    "{iso} is a {weekday}. What is the date {n} days later, with the weekday?",
    "If {iso} is a {weekday}, what is the date and weekday {n} days later?",
)
_BETWEEN = wordings(
    "How many days are there between {one} and {other}?",
    "How many days are there from {one} to {other}?",
    "Days between {one} and {other}?",
    "How many days lie between {one} and {other}?",
    "Count the days from {one} to {other}.",
)
_CLOCK_LATER = wordings(
    "What time is it {n} minutes after {time}?",
    "It is {time}. What time is it in {n} minutes?",
    "{time} plus {n} minutes?",
    "What is {n} minutes later than {time}?",
)
_CLOCK_EARLIER = wordings(
    "What time was it {n} minutes before {time}?",
    "It is {time}. What time was it {n} minutes ago?",
    "{time} minus {n} minutes?",
)
_CLOCK_BETWEEN = wordings(
    "How many minutes are there from {time} to {later}?",
    "How many minutes lie between {time} and {later}?",
    "It starts at {time} and ends at {later}. How many minutes does it take?",
)

_FIRST, _LAST = date(YEARS[0], 1, 1).toordinal(), date(YEARS[1], 12, 31).toordinal()


def any_date(rng: random.Random) -> date:
    return date.fromordinal(rng.randint(_FIRST, _LAST))


def in_words(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def dates(rng: random.Random) -> Example:
    """A date in another form, or a few days on or back."""
    day = any_date(rng)
    iso = day.isoformat()
    kind = rng.randrange(8)
    if kind < 2:
        question = rng.choice(_ISO if kind == 0 else _WORDS).format(
            day=day.day, month=MONTHS[day.month - 1], year=day.year, iso=iso
        )
        answer = iso if kind == 0 else in_words(day)
        return asked(rng, "dates", f"date {iso}", question, answer)
    n = rng.randint(2, MAX_DAYS_ON)
    if kind == 2:
        back = rng.random() < 0.5
        n = -1 if back else 1
        question = rng.choice(_BEFORE if back else _NEXT).format(iso=iso)
    elif kind == 3:
        n = -n
        question = rng.choice(_EARLIER).format(iso=iso, n=-n)
    elif kind == 4:
        weekday = WEEKDAYS[day.weekday()]
        question = rng.choice(_WEEKDAY).format(iso=iso, n=n, weekday=weekday)
        then = day + timedelta(n)
        answer = f"{WEEKDAYS[then.weekday()]}, {then.isoformat()}"
        return asked(rng, "dates", f"date {iso} {n}", question, answer)
    else:
        question = rng.choice(_LATER).format(iso=iso, n=n)
    then = day + timedelta(n)
    return asked(rng, "dates", f"date {iso} {n}", question, then.isoformat())


def days_between(rng: random.Random) -> Example:
    level = rng.choice(DAYS_BETWEEN_TRAINED)
    least = DAYS_BETWEEN_SPANS.get(level - 1, 0) + 1
    span = rng.randint(least, DAYS_BETWEEN_SPANS[level])
    one = date.fromordinal(rng.randint(_FIRST, _LAST - span))
    other = one + timedelta(span)
    question = rng.choice(_BETWEEN).format(one=one.isoformat(), other=other.isoformat())
    key = f"days {one.isoformat()} {other.isoformat()}"
    answer = str((other - one).days)
    return asked(rng, "days_between", key, question, answer, difficulty=level)


def clock(rng: random.Random) -> Example:
    """A time of day some minutes on or back, or the minutes between two."""
    start = rng.randrange(24 * 60)
    n = rng.choice((rng.randint(1, 60), rng.randint(1, 200), 5 * rng.randint(1, 36)))
    kind = rng.randrange(5)
    if kind < 2:
        question = rng.choice(_CLOCK_LATER).format(time=_time(start), n=n)
        return asked(rng, "clock", f"clock {start} {n}", question, _time(start + n))
    if kind < 4:
        question = rng.choice(_CLOCK_EARLIER).format(time=_time(start), n=n)
        return asked(rng, "clock", f"clock {start} {-n}", question, _time(start - n))
    start = rng.randrange(24 * 60 - n)
    question = rng.choice(_CLOCK_BETWEEN).format(time=_time(start), later=_time(start + n))
    return asked(rng, "clock", f"clock {start} to {start + n}", question, str(n))


def _time(minutes: int) -> str:
    hours, minutes = divmod(minutes % (24 * 60), 60)
    return f"{hours:02d}:{minutes:02d}"
