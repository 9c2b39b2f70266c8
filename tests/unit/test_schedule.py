"""What people write in a schedule, and what of it holds at a time."""

from __future__ import annotations

from datetime import datetime, time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelprovisioner.schedule import Entry, ScheduleError, holding, parse

MONDAY = datetime(2026, 11, 23)
CLASS = "30 python on Mondays 08:55-10:00"


def at(clock: str, *, day: int = 23) -> datetime:
    return datetime.combine(datetime(2026, 11, day), time.fromisoformat(clock))


@pytest.mark.parametrize(
    ("text", "days"),
    [
        (CLASS, {0}),
        ("30 python on Mondays 08:55\u201310:00", {0}),
        ("30 python on monday 8:55 - 10:00", {0}),
        ("30 python on Mon and Wed 08:55-10:00", {0, 2}),
        ("30 python on Mondays, Tuesdays and Fridays 08:55-10:00", {0, 1, 4}),
        ("30 python on weekdays 08:55-10:00", {0, 1, 2, 3, 4}),
        ("30 python on weekends, Mondays 08:55-10:00", {0, 5, 6}),
        ("30 Python on every day 08:55-10:00", set(range(7))),
    ],
)
def test_what_can_be_written(text: str, days: set[int]) -> None:
    assert parse(text) == Entry(30, "python", frozenset(days), time(8, 55), time(10))


@given(
    st.builds(
        Entry,
        st.integers(0, 99999),
        st.sampled_from(["python", "java-script"]),
        st.frozensets(st.integers(0, 6), min_size=1),
        st.times().map(lambda t: t.replace(second=0, microsecond=0)),
        st.just(time(12, 34)),
    ).filter(lambda entry: entry.begin != entry.end)
)
def test_an_entry_reads_what_it_says(entry: Entry) -> None:
    assert parse(str(entry)) == entry


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "thirty python on Mondays 08:55-10:00",
            "is no entry of a schedule; one is '30 python on Mondays 08:55-10:00'",
        ),
        ("30 on Mondays 08:55-10:00", "is no entry"),
        ("30 python on Mondays", "is no entry"),
        ("30 python on Moondays 08:55-10:00", "'moondays' is no day"),
        ("30 python on T 08:55-10:00", "'t' is no day"),
        ("30 python on Mondays 08:55-24:00", "24:00 is no time of a day"),
        ("30 python on Mondays 08:61-10:00", "08:61 is no time"),
        ("30 python on Mondays 10:00-10:00", "begins and ends at the same time"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, words: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("now", "held"),
    [
        (at("08:54"), False),
        (at("08:55"), True),
        (at("09:59"), True),
        (at("10:00"), False),
        (at("09:00", day=24), False),
        (at("09:00", day=30), True),
    ],
)
def test_when_an_entry_holds(now: datetime, held: bool) -> None:
    period = holding([parse(CLASS)], "python", now, 0.0)
    assert (period is not None) == held
    if period is not None:
        assert period.begin == datetime.combine(now.date(), time(8, 55))


def test_an_entry_holds_already_while_its_sandboxes_start() -> None:
    entries = [parse(CLASS)]
    assert holding(entries, "python", at("08:53"), 3.0) is None
    period = holding(entries, "python", at("08:53:31"), 3.0)
    assert period is not None and period.begin == at("08:55")
    assert holding(entries, "python", at("08:24"), 1000.0) is None, "half an hour before at most"


def test_an_entry_that_ends_on_the_next_day() -> None:
    entries = [parse("5 python on Sundays 23:00-01:00")]
    assert holding(entries, "python", at("00:30"), 0.0) is not None
    assert holding(entries, "python", at("23:30", day=22), 0.0) is not None
    assert holding(entries, "python", at("23:30"), 0.0) is None


def test_one_that_begins_at_midnight_is_prepared_the_day_before() -> None:
    period = holding([parse("60 python on Mondays 00:00-01:00")], "python", at("23:59", day=22), 3.0)
    assert period is not None and period.begin == MONDAY


def test_of_several_the_largest_holds_and_other_images_do_not_count() -> None:
    entries = [parse(CLASS), parse("5 python on weekdays 08:00-18:00"), parse("99 julia on every day 00:00-23:59")]
    period = holding(entries, "python", at("09:00"), 0.0)
    assert period is not None and period.entry.count == 30
    period = holding(entries, "python", at("11:00"), 0.0)
    assert period is not None and period.entry.count == 5
    assert holding(entries, "python", at("19:00"), 0.0) is None
