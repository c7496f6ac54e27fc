"""Dates as people write them, and the same in digits: pairs that are made on the spot and judged at a glance.

"the twenty-eighth of october, sixteen sixty-eight" becomes "1 6 6 8 - 1 0 - 2 8". Every pair is of another day, so that
whatever pairs are held out share no date with the others.
"""

from __future__ import annotations

import datetime
import random

PAIRS = 20_000
SEED = 1  # of the pairs, whatever --seed is, so that runs compare
FIRST, LAST = datetime.date(1500, 1, 1), datetime.date(1999, 12, 31)

_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
_SMALL = (
    "", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
             "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"}  # fmt: skip


def date_pairs(count: int = PAIRS, seed: int = SEED) -> list[tuple[str, str]]:
    """Return (a date as people write it, its digits) of `count` different days from FIRST to LAST, drawn by a seed."""
    draw = random.Random(seed)
    days = draw.sample(range(FIRST.toordinal(), LAST.toordinal() + 1), count)
    return [(_written(day, draw), " ".join(day.isoformat())) for day in map(datetime.date.fromordinal, days)]


def _written(date: datetime.date, draw: random.Random) -> str:
    """Return the date in one of six ways, half of them in words."""
    day, month, year = date.day, _MONTHS[date.month - 1], date.year
    return draw.choice(
        (
            f"the {_ordinal(day)} of {month}, {_year(year)}",
            f"{month} {_ordinal(day)}, {_year(year)}",
            f"{day} {month}, {_year(year)}",
            f"{day} {month[:3]} {year}",
            f"{month[:3]} {day}, {year}",
            f"{date.month}/{day}/{year}",
        )
    )


def _year(year: int) -> str:
    """Return a year before 2000 as it is said: "sixteen sixty-eight", "nineteen oh four", "eighteen hundred"."""
    century, rest = divmod(year, 100)
    return f"{_SMALL[century]} {'hundred' if rest == 0 else f'oh {_SMALL[rest]}' if rest < 10 else _number(rest)}"


def _number(number: int) -> str:
    """Return 1 to 99 in words."""
    tens, ones = divmod(number, 10)
    return _SMALL[number] if number < 20 else f"{_TENS[tens]}-{_SMALL[ones]}" if ones else _TENS[tens]


def _ordinal(number: int) -> str:
    """Return "twenty-eighth" for 28."""
    start, dash, last = _number(number).rpartition("-")
    return f"{start}{dash}{_ORDINALS.get(last, last + 'th')}"
