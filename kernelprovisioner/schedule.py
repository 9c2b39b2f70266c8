"""Schedule: "30 python on Mondays 08:55-10:00". What is written, and what of it holds at a time: pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta

_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_GROUPS = {
    "every day": frozenset(range(7)),
    "weekdays": frozenset(range(5)),
    "weekends": frozenset({5, 6}),
}
_ENTRY = re.compile(
    r"(?P<count>\d{1,5}) +(?P<image>[a-z][a-z0-9-]*) +on +(?P<days>[a-z ,]+?) +"
    r"(?P<begin>\d{1,2}:\d{2}) *[-\u2013] *(?P<end>\d{1,2}:\d{2})",
    re.IGNORECASE,
)
#: The first sandbox is started at most this long before the time, however many there are.
_LONGEST_LEAD = timedelta(minutes=30)


class ScheduleError(ValueError):
    """An entry cannot be read; the text says what is wrong and how one looks."""


@dataclass(frozen=True, slots=True)
class Entry:
    """So many sandboxes of an image are ready between two times of some days of the week (0 is Monday).

    An end that is not after the begin is on the next day.
    """

    count: int
    image: str
    days: frozenset[int]
    begin: time
    end: time

    def __str__(self) -> str:
        groups = [name for name, days in _GROUPS.items() if days == self.days]
        days = groups[0] if groups else _listed([f"{_DAYS[day].capitalize()}s" for day in sorted(self.days)])
        return f"{self.count} {self.image} on {days} {self.begin:%H:%M}-{self.end:%H:%M}"


@dataclass(frozen=True, slots=True)
class Period:
    """An entry that holds now (or is being prepared), and when this time of it begins."""

    entry: Entry
    begin: datetime


def parse(text: str) -> Entry:
    """Read one entry. Raises ScheduleError."""
    found = _ENTRY.fullmatch(text.strip())
    if found is None:
        raise ScheduleError(f"{text!r} is no entry of a schedule; one is '30 python on Mondays 08:55-10:00'")
    begin, end = (_time(found[name], text) for name in ("begin", "end"))
    if begin == end:
        raise ScheduleError(f"{text!r} begins and ends at the same time")
    return Entry(int(found["count"]), found["image"].lower(), _days(found["days"], text), begin, end)


def holding(entries: Sequence[Entry], image: str, now: datetime, seconds_each: float) -> Period | None:
    """Return what holds for `image` at `now` (local time): of several entries the largest; None if none does.

    An entry holds already while its sandboxes have to be started, which takes `seconds_each`, so that they are ready
    when it begins.
    """
    found: Period | None = None
    for entry in entries:
        if entry.image != image:
            continue
        lead = min(timedelta(seconds=entry.count * seconds_each), _LONGEST_LEAD)
        for day in (now.date() + timedelta(days=days) for days in (-1, 0, 1)):
            if day.weekday() not in entry.days:
                continue
            begin, end = datetime.combine(day, entry.begin), datetime.combine(day, entry.end)
            if end <= begin:
                end += timedelta(days=1)
            if begin - lead <= now < end and (found is None or entry.count > found.entry.count):
                found = Period(entry, begin)
    return found


def _time(text: str, entry: str) -> time:
    hour, minute = map(int, text.split(":"))
    if hour > 23 or minute > 59:
        raise ScheduleError(f"{entry!r}: {text} is no time of a day")
    return time(hour, minute)


def _days(text: str, entry: str) -> frozenset[int]:
    days: set[int] = set()
    for word in re.split(r" *, *and +| *, *| +and +", text.strip().lower()):
        if word in _GROUPS:
            days |= _GROUPS[word]
            continue
        name = word.removesuffix("s")
        named = [number for number, day in enumerate(_DAYS) if len(name) >= 3 and day.startswith(name)]
        if len(named) != 1:
            raise ScheduleError(f"{entry!r}: {word!r} is no day; there are Mondays, …, weekdays, weekends, every day")
        days.update(named)
    return frozenset(days)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
