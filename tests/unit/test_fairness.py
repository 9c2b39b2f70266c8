"""Fairness on a virtual clock: people at work keep their sandboxes beside floods of calls, and no call starves."""

from __future__ import annotations

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelprovisioner.pool_events import (
    ClaimAsked,
    ClaimSettled,
    Evict,
    Give,
    Instruction,
    Start,
    Started,
    Tick,
    Touched,
)
from kernelprovisioner.pool_state import PoolState
from kernelprovisioner.standing import AT_WORK_SECONDS, Standing
from tests.unit.town import Simulation, Town

MINUTES = 60.0
LONG = 6 * MINUTES


def town(simulation: Simulation, *, people: int, one_key: bool, named: bool, flood: bool = True) -> Town:
    """Twelve people (or so) who arrive within the first three minutes, beside 50 calls every 30 s."""
    made = Town(simulation)
    for number in range(people):
        owner = "main" if one_key else f"person{number}"
        made.person(owner, named=named, arrives=number * 15.0, until=LONG)
    if flood:
        made.flood("main" if one_key else "calls", count=50, every=30.0, until=LONG)
    simulation.run(LONG + simulation.deadline + 60)
    return made


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("one_key", [False, True])
def test_twelve_people_at_work_beside_fifty_calls_every_thirty_seconds(seed: int, one_key: bool) -> None:
    simulation = Simulation(maximum=20, concurrency=4, seed=seed)
    busy = town(simulation, people=12, one_key=one_key, named=True)
    alone = town(Simulation(maximum=20, concurrency=4, seed=seed), people=12, one_key=one_key, named=True, flood=False)
    assert [person.lost for person in busy.people] == [[]] * 12, "somebody at work lost a sandbox"
    assert len(busy.calls) == 50 * 11 and busy.unanswered == []
    assert max(wait for call in busy.calls for wait in call.waits) < simulation.deadline / 2
    assert simulation.most <= 20
    waits = [statistics.median(person.waits) for person in busy.people]
    assert waits == [statistics.median(person.waits) for person in alone.people]


def test_without_standing_the_same_flood_evicts_people() -> None:
    """What the simulation would show if calls in passing counted like people: it can tell the difference."""
    busy = town(Simulation(maximum=20, concurrency=4, standing=False), people=12, one_key=True, named=True)
    assert sum(len(person.lost) for person in busy.people) > 12


@pytest.mark.parametrize("seed", range(3))
def test_people_who_send_only_their_session_are_at_work_from_their_second_cell_on(seed: int) -> None:
    simulation = Simulation(maximum=20, concurrency=4, seed=seed)
    made = Town(simulation)
    for number in range(12):
        made.person("main", named=False, arrives=number * 0.1, until=LONG)
    made.flood("main", count=50, every=30.0, until=LONG)
    simulation.run(LONG + simulation.deadline)
    assert [person.lost for person in made.people] == [[]] * 12
    assert made.unanswered == []


def test_where_people_have_all_places_calls_go_round_in_one_of_them() -> None:
    simulation = Simulation(maximum=10, concurrency=2)
    made = Town(simulation)
    for number in range(10):
        made.person("main", named=True, arrives=number, until=300.0, thinks=100.0)
    simulation.run(60.0)
    assert len(simulation.state.members) == 10
    made.flood("main", count=10, every=1.0, until=62.0)
    simulation.run(60.0 + simulation.deadline)
    assert made.unanswered == []
    assert sum(len(person.lost) for person in made.people) == 1


def test_more_people_than_places_take_turns() -> None:
    simulation = Simulation(maximum=8, concurrency=4)
    made = Town(simulation)
    for number in range(12):
        made.person("main", named=True, arrives=number * 0.5, until=LONG, thinks=30.0)
    simulation.run(LONG + simulation.deadline)
    assert all(person.refused == 0 and max(person.waits) < 30 for person in made.people)
    assert simulation.most <= 8


def test_whoever_has_been_away_makes_room_for_calls_in_passing() -> None:
    state = full_house(3, Standing.KEPT)
    ask = ClaimAsked(10, "main", standing=Standing.PASSING)
    # Somebody is at work: the first call costs one session, the second one waits for the first.
    assert evicted(state.handle(ask, 100.0)) == ["s1"]
    assert evicted(state.handle(ClaimAsked(11, "main", standing=Standing.PASSING), 100.0)) == []
    # Ten minutes later nobody is.
    assert evicted(state.handle(Tick(), AT_WORK_SECONDS + 10)) == ["s2"]


def test_the_call_that_nobody_came_back_to_goes_first_even_if_it_was_used_last() -> None:
    state = full_house(3, Standing.KEPT)
    state.handle(Touched("s3", 50.0, Standing.PASSING), 50.0)
    state.handle(Touched("s2", 40.0, Standing.NAMED), 50.0)
    asks = [ClaimAsked(10 + number, "main") for number in range(3)]
    assert [evicted(state.handle(ask, 60.0)) for ask in asks] == [["s3"], ["s2"], ["s1"]]


def test_a_call_of_another_owner_costs_first_what_nobody_came_back_to() -> None:
    state = full_house(4, Standing.KEPT)
    state.handle(Touched("s4", 50.0, Standing.PASSING), 50.0)
    assert evicted(state.handle(ClaimAsked(10, "other"), 60.0)) == ["s4"]


def full_house(places: int, standing: Standing) -> PoolState:
    """All places are held by idle sessions of one owner, used in the order of their names."""
    names = itertools.count(1)
    state = PoolState(minimum=0, maximum=places, line_bound=50, concurrency=places, new_id=lambda: f"s{next(names)}")
    for claim in range(1, places + 1):
        (start,) = state.handle(ClaimAsked(claim, "main", standing=standing), 0.0)
        assert isinstance(start, Start)
        (give,) = state.handle(Started(start.sandbox), 0.0)
        assert isinstance(give, Give)
        state.handle(ClaimSettled(claim), 0.0)
        state.handle(Touched(give.sandbox, float(claim), standing), float(claim))
    return state


def evicted(instructions: list[Instruction]) -> list[str]:
    return [instruction.sandbox for instruction in instructions if isinstance(instruction, Evict)]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    people=st.integers(0, 10),
    spare=st.integers(1, 6),
    count=st.integers(1, 30),
    every=st.floats(5.0, 40.0),
    concurrency=st.integers(1, 6),
    one_key=st.booleans(),
)
def test_as_long_as_there_is_one_more_place_than_people_no_flood_costs_a_person_anything(
    seed: int, people: int, spare: int, count: int, every: float, concurrency: int, one_key: bool
) -> None:
    simulation = Simulation(maximum=people + spare, concurrency=concurrency, seed=seed, line_bound=10_000)
    made = Town(simulation)
    for number in range(people):
        made.person("main" if one_key else f"person{number}", named=True, arrives=number * 2.0, until=200.0)
    made.flood("main" if one_key else "calls", count=count, every=every, until=200.0)
    simulation.run(200.0 + simulation.deadline)
    assert [person.lost for person in made.people] == [[]] * people
    assert simulation.most <= people + spare
    # Each call has its place or had its deadline; nobody is forgotten in line.
    assert simulation.state.waiting == 0
