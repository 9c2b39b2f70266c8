"""Limits of one owner, reserved before the work starts; and sessions that nobody uses."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import pytest

from gateway.errors import RequestError
from gateway.execution import Cell, CellLimits, Status
from gateway.holdings import Holdings
from gateway.idle import IdleBounds
from gateway.limits import OwnerBounds
from gateway.session import Execution, Session
from gateway.sessions import SessionRegistry
from kernelprovisioner.sandbox_exit import ExitCause
from kernelprovisioner.standing import Standing
from tests.unit.gateway_fakes import FakePool

LIMITS = CellLimits(grace=0.05, max_output_bytes=1000, max_outputs=10)


def registry(
    pool: FakePool, *, sessions: int | None = None, executions: int | None = None, idle: IdleBounds | None = None
) -> SessionRegistry:
    bounds = OwnerBounds(sessions, executions)
    holdings = Holdings({"python": pool}, line_timeout=5.0, bounds=bounds)  # type: ignore[dict-item]
    return SessionRegistry(holdings, LIMITS, idle_bounds=idle)


async def execute(known: SessionRegistry, session: Session, timeout: float = 5.0) -> Execution:
    return await known.execute(session, Cell("code", timeout), asyncio.get_running_loop().create_future())


def new(known: SessionRegistry, owner: str = "me", **fields: str | bool) -> Session:
    return known.add(Session(owner, "python", **fields))  # type: ignore[arg-type]


def refused(answers: list[Execution | BaseException], limit: str) -> list[RequestError]:
    """The answers that are a 429 which names this limit; the others are executions."""
    found = [answer for answer in answers if isinstance(answer, RequestError)]
    assert all(isinstance(answer, Execution | RequestError) for answer in answers)
    for error in found:
        assert error.status == HTTPStatus.TOO_MANY_REQUESTS
        assert f"OwnerLimits.{limit}" in error.message and error.details[0].code == limit
        assert error.retry_after is not None and error.retry_after >= 1
    return found


async def test_parallel_creations_cannot_exceed_the_sessions_of_an_owner() -> None:
    pool = FakePool()
    pool.gate = asyncio.Event()
    known = registry(pool, sessions=3)
    asking = [asyncio.create_task(execute(known, new(known, user_id=str(number)))) for number in range(20)]
    other = asyncio.create_task(execute(known, new(known, "you")))
    await asyncio.sleep(0.01)
    assert sum(task.done() for task in asking) == 17, "they are refused before the others have a sandbox"
    pool.gate.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert len(refused(answers, "max_sessions")) == 17
    assert [owner for owner, _ in pool.claims].count("me") == 3
    assert (await other).result.status is Status.OK
    assert len(known.list("me")) == 3, "sessions that never ran are not kept"


async def test_a_session_that_ends_makes_room_for_another() -> None:
    pool = FakePool()
    known = registry(pool, sessions=1)
    first = new(known, user_id="a")
    await execute(known, first)
    with pytest.raises(RequestError):
        await execute(known, new(known, user_id="b"))
    await execute(known, first)
    await known.delete(first)
    await execute(known, new(known, user_id="b"))


async def test_a_claim_that_fails_gives_its_reservation_back() -> None:
    pool = FakePool()
    known = registry(pool, sessions=1, executions=1)
    pool.error = RuntimeError("broken")
    for _ in range(3):
        with pytest.raises(RuntimeError):
            await execute(known, new(known))
    pool.error = None
    await execute(known, new(known))


async def test_at_the_limit_idle_calls_in_passing_make_room_the_oldest_first() -> None:
    pool = FakePool()
    known = registry(pool, sessions=3)
    named, first, second = new(known, user_id="ada"), new(known), new(known)
    for session in (named, first, second):
        await execute(known, session)
    await asyncio.gather(*(execute(known, new(known)) for _ in range(2)))
    assert [session.state for session in (named, first, second)] == ["idle", "cold", "cold"]
    assert first.last_exit is not None and first.last_exit.cause is ExitCause.EVICTED
    assert [sandbox.id for sandbox, _ in pool.released] == ["sandbox1", "sandbox2"]


async def test_who_lost_a_sandbox_to_its_own_limit_is_told_that_and_not_that_the_places_were_taken() -> None:
    known = registry(FakePool(), sessions=1)
    first = new(known)
    await execute(known, first)
    await execute(known, new(known))
    assert first.last_exit is not None and first.last_exit.evidence == {"limit_sessions": 1}
    assert "its owner began another one" in str(first.last_exit) and "places" not in str(first.last_exit)


async def test_a_session_whose_cell_was_never_sent_is_idle_and_gives_its_sandbox_up() -> None:
    pool = FakePool()
    known = registry(pool, idle=IdleBounds(0.05, 0.05))

    async def sending(*_: object) -> None:
        raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "not_recorded", "The disk is full.")

    session = new(known)
    with pytest.raises(RequestError):
        await known.execute(session, Cell("code", 5.0), asyncio.get_running_loop().create_future(), sending)
    assert session.idle_since is not None and pool.standing["sandbox0"] is Standing.PASSING
    known.idle.start()
    try:
        async with asyncio.timeout(5):
            await pool.given_back.wait()
    finally:
        known.idle.stop()
    assert session.last_exit is not None and session.last_exit.cause is ExitCause.IDLE
    await known.drain(1.0, asyncio.Event())


async def test_executions_under_way_are_bounded_for_each_owner() -> None:
    known = registry(FakePool(lambda *_: None), executions=2)
    session = new(known)
    asking = [asyncio.create_task(execute(known, session, 0.05)) for _ in range(5)]
    other = asyncio.create_task(execute(known, new(known, "you"), 0.05))
    await asyncio.sleep(0.01)
    assert [task.done() for task in asking] == [False, False, True, True, True], "also one that waits is under way"
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert len(refused(answers, "max_executions")) == 3
    assert (await other).result.status is Status.TIMEOUT
    assert (await execute(known, session, 0.05)).result.status is Status.TIMEOUT, "those that ended count no more"


async def test_a_session_that_nobody_uses_gives_its_sandbox_up_and_says_so() -> None:
    pool = FakePool()
    known = registry(pool, idle=IdleBounds(session=60.0, one_off=0.05))
    passing, named, returned = new(known), new(known, user_id="ada"), new(known)
    for session in (passing, named, returned, returned):
        await execute(known, session)
    known.idle.start()
    try:
        async with asyncio.timeout(5):
            await pool.given_back.wait()
        await asyncio.sleep(0.1)
    finally:
        known.idle.stop()
    assert [session.state for session in (passing, named, returned)] == ["cold", "idle", "idle"]
    assert [(sandbox.id, cause.cause) for sandbox, cause in pool.released] == [("sandbox0", ExitCause.IDLE)]
    await execute(known, passing)
    assert "was not used for 0.05 s" in str(pool.claims[-1][1].notice)


async def test_a_cell_that_runs_for_long_is_not_idle() -> None:
    pool = FakePool(lambda *_: None)
    known = registry(pool, idle=IdleBounds(session=0.02, one_off=0.02))
    known.idle.start()
    try:
        answer = await execute(known, new(known), timeout=0.2)
    finally:
        known.idle.stop()
    assert answer.result.status is Status.TIMEOUT and answer.result.note is not None
    assert answer.result.note.cause == ExitCause.TIME_LIMIT


async def test_the_pool_learns_whether_somebody_comes_back() -> None:
    pool = FakePool()
    known = registry(pool)
    passing, named = new(known), new(known, user_id="ada")
    for session in (passing, named, new(known, entity_id="agent"), new(known, named=True)):
        await execute(known, session)
    assert list(pool.standing.values()) == [Standing.PASSING, Standing.NAMED, Standing.NAMED, Standing.NAMED]
    await asyncio.gather(*(execute(known, session) for session in (passing, named)))
    assert list(pool.standing.values())[:2] == [Standing.KEPT, Standing.KEPT]


async def test_a_second_request_counts_while_the_first_one_runs() -> None:
    pool = FakePool(lambda *_: None)
    known = registry(pool)
    session = new(known)
    first = asyncio.create_task(execute(known, session, 0.05))
    await asyncio.sleep(0.01)
    assert session.standing is Standing.PASSING
    second = asyncio.create_task(execute(known, session, 0.05))
    await asyncio.sleep(0.01)
    assert session.standing is Standing.KEPT
    await asyncio.gather(first, second)
