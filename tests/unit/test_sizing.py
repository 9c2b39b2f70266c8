"""How many sandboxes to start now, and how long to wait after a failure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelprovisioner import sizing

counts = st.integers(min_value=0, max_value=200)


def kept(count: int) -> sizing.Want:
    return sizing.Want(count, f"{count} kept warm")


@pytest.mark.parametrize(
    ("minimum", "waiting", "room", "count", "why"),
    [
        (2, 0, 10, 2, "2 kept warm"),
        (2, 3, 10, 5, "3 waiting and 2 kept warm"),
        (2, 3, 4, 4, "3 waiting and 2 kept warm, but max leaves room for 4"),
        (2, 0, 0, 0, "2 kept warm, but max leaves room for 0"),
        (0, 0, 10, 0, "0 kept warm"),
    ],
)
def test_what_is_wanted_and_why(minimum: int, waiting: int, room: int, count: int, why: str) -> None:
    assert sizing.wanted(kept(minimum), waiting, room) == sizing.Want(count, why)


@pytest.mark.parametrize(("room", "count"), [(10, 5), (4, 4)])
def test_one_takes_the_place_of_another(room: int, count: int) -> None:
    want = sizing.wanted(kept(2), 2, room, replaced=True)
    assert want.count == count
    assert want.why.startswith("2 waiting and 2 kept warm, and 1 to take the place of an old one")


@given(
    minimum=counts,
    waiting=counts,
    room=st.integers(min_value=-5, max_value=200),
    unclaimed=counts,
    starting=counts,
    concurrency=st.integers(min_value=1, max_value=64),
    empty=st.booleans(),
)
def test_never_more_than_fits_nor_than_may_start_at_once(
    minimum: int, waiting: int, room: int, unclaimed: int, starting: int, concurrency: int, empty: bool
) -> None:
    want = sizing.wanted(kept(minimum), waiting, room).count
    starts = sizing.starts_now(want, waiting, unclaimed, starting, concurrency, empty=empty)
    assert 0 <= starts <= max(0, concurrency - starting)
    assert starts == 0 or unclaimed + starts <= min(room, waiting + minimum)
    if starts and unclaimed + starts > min(want, waiting) and (waiting or not empty):
        assert starting + starts <= max(1, concurrency // 2), "spare sandboxes take the cores of those at work"


@pytest.mark.parametrize(
    ("want", "waiting", "unclaimed", "starting", "concurrency", "starts"),
    [
        (2, 0, 5, 0, 2, 0),  # a surplus
        (2, 0, 0, 3, 2, 0),  # more under way than may be
        (4, 0, 0, 0, 2, 1),  # spare ones: half of it
        (4, 0, 0, 0, 8, 4),
        (4, 4, 0, 0, 2, 2),  # who waits gets all of it
        (4, 1, 0, 0, 4, 2),  # one for who waits, and one spare
    ],
)
def test_how_many_start_now(
    want: int, waiting: int, unclaimed: int, starting: int, concurrency: int, starts: int
) -> None:
    assert sizing.starts_now(want, waiting, unclaimed, starting, concurrency) == starts


def test_an_empty_pool_is_filled_with_all_that_may_start() -> None:
    assert sizing.starts_now(4, 0, 0, 0, 2, empty=True) == 2
    assert sizing.starts_now(1, 0, 0, 0, 2, empty=True) == 1
    assert sizing.starts_now(4, 1, 0, 0, 2, empty=True) == 1, "who waits has the cores for itself"


def test_backoff_doubles_up_to_its_bound() -> None:
    assert [sizing.backoff(n) for n in range(9)] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert sizing.backoff(10**9) == sizing.LONGEST_BACKOFF


@given(
    waiting=counts,
    start_seconds=st.floats(min_value=0, max_value=120),
    concurrency=st.integers(min_value=0, max_value=64),
)
def test_retry_after_is_a_number_of_seconds_worth_waiting(waiting: int, start_seconds: float, concurrency: int) -> None:
    assert 1 <= sizing.retry_after(waiting, start_seconds, concurrency) <= 60
