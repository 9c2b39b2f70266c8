"""SessionRegistry: who finds which session, one cell at a time, and what a session says after it lost its sandbox."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import pytest

from gateway import sessions
from gateway.cancellation import Cancelled
from gateway.errors import RequestError
from gateway.execution import Cell, CellLimits, Status
from gateway.holdings import Holdings
from gateway.session import Execution, Session
from gateway.sessions import SessionRegistry
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.pool import ClaimTimeout, PoolFull
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from tests.unit.gateway_fakes import FakePool, FakeSandbox, ends_well

LIMITS = CellLimits(grace=0.05, max_output_bytes=1000, max_outputs=10)


def registry(pool: FakePool, line_timeout: float = 5.0) -> SessionRegistry:
    return SessionRegistry(Holdings({"python": pool}, line_timeout=line_timeout), LIMITS)  # type: ignore[dict-item]


async def execute(known: SessionRegistry, session: Session, code: str = "code", timeout: float = 5.0) -> Execution:
    return await known.execute(session, Cell(code, timeout), asyncio.get_running_loop().create_future())


def stdout(execution: Execution) -> str:
    return execution.result.outputs.written("stdout")


async def test_a_session_keeps_its_sandbox_and_tells_the_pool_when_it_is_idle() -> None:
    pool = FakePool()
    known = registry(pool)
    session = known.add(Session("me", "python"))
    first, second = await execute(known, session), await execute(known, session)
    assert first.container_id == second.container_id
    assert (first.source, second.source) == ("warm", "held")
    assert pool.idle["sandbox0"] is not None
    assert set(first.result.timings) == {"turn_ms", "wait_ms", "claim_ms", "run_ms", "total_ms"}


async def test_cells_of_one_session_run_one_at_a_time_in_order_of_arrival() -> None:
    running = []

    def script(sandbox: FakeSandbox, msg_id: str, content: dict[str, Any]) -> None:
        running.append(content["code"])
        assert len(sandbox.wire.listeners) == 1
        asyncio.get_running_loop().call_later(0.01, ends_well, sandbox, msg_id, content)

    known = registry(FakePool(script))
    session = known.add(Session("me", "python"))
    answers = await asyncio.gather(*(execute(known, session, str(number)) for number in range(5)))
    assert running == ["0", "1", "2", "3", "4"]
    assert [stdout(answer) for answer in answers] == running


async def test_owners_users_and_entities_find_their_own_only() -> None:
    known = registry(FakePool())
    mine = known.add(Session("me", "python", "user", "agent"))
    newer = known.add(Session("me", "python", "user", "agent"))
    other = known.add(Session("me", "python", "other", "agent"))

    def resolve(owner: str = "me", **given: str | None) -> Session | None:
        return known.resolve(owner, **{"session_id": None, "user_id": None, "entity_id": None, **given})  # type: ignore[arg-type]

    assert resolve(session_id=mine.id) is mine
    assert resolve(session_id=mine.id, user_id="user") is mine
    assert resolve(session_id=mine.id, user_id="other") is None
    assert resolve(session_id=mine.id, owner="you") is None
    assert resolve(user_id="user", entity_id="agent") is newer
    assert resolve(user_id="other", entity_id="agent") is other
    assert resolve(entity_id="agent") is None
    assert resolve(owner="you", user_id="user", entity_id="agent") is None
    assert resolve(session_id="unknown", user_id="user", entity_id="agent") is newer
    assert known.list("me") == [mine, newer, other] and known.list("you") == []


async def test_an_evicted_session_says_so_at_its_next_call() -> None:
    pool = FakePool()
    known = registry(pool)
    session = known.add(Session("me", "python", env={"A": "1"}))
    await execute(known, session)
    assert pool.on_evict is not None
    pool.on_evict(pool.made[0], SandboxExit(ExitCause.EVICTED))
    assert session.state == "cold"
    answer = await execute(known, session)
    request = pool.claims[1][1]
    assert answer.container_id == "container1"
    assert request.notice is not None and "gave its sandbox up" in request.notice
    assert request.env == {"A": "1"}
    assert (await execute(known, session)).source == "held"


async def test_a_sandbox_that_dies_while_idle_is_given_back_and_the_next_call_says_so() -> None:
    pool = FakePool()
    known = registry(pool)
    session = known.add(Session("me", "python"))
    await execute(known, session)
    pool.made[0].die(ExitCause.OUT_OF_MEMORY)
    await asyncio.sleep(0.01)
    assert [sandbox.id for sandbox, _ in pool.released] == ["sandbox0"]
    await execute(known, session)
    assert "out of memory" in str(pool.claims[1][1].notice)


async def test_a_cell_that_was_killed_has_said_so_itself() -> None:
    pool = FakePool(lambda *_: None)
    known = registry(pool)
    session = known.add(Session("me", "python"))
    answer = await execute(known, session, timeout=0.02)
    assert answer.result.status is Status.TIMEOUT
    pool.script = ends_well
    await execute(known, session)
    assert pool.claims[1][1].notice is None
    assert [cause.cause for _, cause in pool.released] == [ExitCause.TIME_LIMIT]


async def test_a_sandbox_that_ends_with_its_cell_is_not_used_again() -> None:
    def script(sandbox: FakeSandbox, msg_id: str, content: dict[str, Any]) -> None:
        ends_well(sandbox, msg_id, content)
        sandbox.die(ExitCause.EXITED, exit_code=0)

    pool = FakePool(script)
    known = registry(pool)
    session = known.add(Session("me", "python"))
    assert (await execute(known, session)).result.status is Status.OK
    assert (await execute(known, session)).container_id == "container1"
    await asyncio.sleep(0.01)
    assert [sandbox.id for sandbox, _ in pool.released] == ["sandbox0", "sandbox1"]


async def test_deleting_answers_the_running_cell() -> None:
    pool = FakePool(lambda *_: None)
    known = registry(pool)
    session = known.add(Session("me", "python"))
    running = asyncio.create_task(execute(known, session))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(execute(known, session))
    await asyncio.sleep(0.01)
    await known.delete(session)
    answer = await running
    assert answer.result.status is Status.DIED
    assert answer.result.note is not None and "deleted" in answer.result.note.text
    with pytest.raises(RequestError) as caught:
        await waiting
    assert caught.value.status == HTTPStatus.NOT_FOUND
    assert known.find("me", session.id) is None


async def test_deleting_while_a_sandbox_is_claimed_gives_it_back() -> None:
    pool = FakePool()
    pool.gate = asyncio.Event()
    known = registry(pool)
    session = known.add(Session("me", "python"))
    running = asyncio.create_task(execute(known, session))
    for _ in range(20):
        await asyncio.sleep(0)
    await known.delete(session)
    pool.gate.set()
    with pytest.raises(RequestError):
        await running
    await known.stop(5)
    assert [sandbox.id for sandbox, _ in pool.released] == ["sandbox0"]


@pytest.mark.parametrize(
    ("error", "code", "retry"),
    [
        (PoolFull("all places are taken", 7), "too_busy", 7),
        (ClaimTimeout("none became free", 8), "too_busy", 8),
        (LaunchError("the engine is gone"), "no_sandbox", 10),
    ],
)
async def test_no_sandbox_is_a_503_that_says_when_to_come_back(error: Exception, code: str, retry: int) -> None:
    pool = FakePool()
    pool.error = error
    known = registry(pool)
    with pytest.raises(RequestError) as caught:
        await execute(known, known.add(Session("me", "python")))
    assert (caught.value.status, caught.value.code) == (HTTPStatus.SERVICE_UNAVAILABLE, code)
    assert caught.value.retry_after == retry
    assert known.list("me") == [], "a session that never ran is forgotten"


async def test_a_client_that_goes_away_in_line_leaves_it() -> None:
    pool = FakePool()
    pool.gate = asyncio.Event()
    known = registry(pool)
    cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(known.execute(known.add(Session("me", "python")), Cell("1", 5), cancelled))
    await asyncio.sleep(0.01)
    cancelled.set_result(None)
    with pytest.raises(Cancelled):
        await running
    assert pool.made == []


@pytest.mark.parametrize(("entity", "kept"), [(None, False), ("agent", True)])
async def test_a_session_whose_first_answer_nobody_took_is_kept_only_if_it_can_be_found(
    entity: str | None, kept: bool
) -> None:
    def script(sandbox: FakeSandbox, msg_id: str, content: dict[str, Any]) -> None:
        sandbox.on_interrupt = lambda: ends_well(sandbox, msg_id, content)

    pool = FakePool(script)
    known = registry(pool)
    cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    session = known.add(Session("me", "python", entity_id=entity))
    running = asyncio.create_task(known.execute(session, Cell("1", 5), cancelled))
    await asyncio.sleep(0.01)
    cancelled.set_result(None)
    assert (await running).result.status is Status.CANCELLED
    assert (session in known.list("me")) is kept
    await asyncio.sleep(0)
    assert len(pool.released) == (0 if kept else 1)


async def test_the_line_of_a_session_is_bounded_in_length_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_WAITING", 2)
    known = registry(FakePool(lambda *_: None), line_timeout=0.05)
    session = known.add(Session("me", "python"))
    running = asyncio.create_task(execute(known, session, timeout=0.2))
    await asyncio.sleep(0.01)
    waiting = [asyncio.create_task(execute(known, session)) for _ in range(3)]
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, RequestError) and result.status == HTTPStatus.SERVICE_UNAVAILABLE
    assert (await running).result.status is Status.TIMEOUT


async def test_sessions_without_sandbox_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_WITHOUT_SANDBOX", 3)
    known = registry(FakePool())
    held = known.add(Session("me", "python"))
    await execute(known, held)
    cold = [known.add(Session("me", "python")) for _ in range(6)]
    assert known.list("me")[0] is held
    assert cold[-1] in known.list("me") and cold[0] not in known.list("me")
    assert len(known.list("me")) <= 5


async def test_draining_waits_for_running_cells_and_takes_no_more() -> None:
    def script(sandbox: FakeSandbox, msg_id: str, content: dict[str, Any]) -> None:
        asyncio.get_running_loop().call_later(0.05, ends_well, sandbox, msg_id, content)

    known = registry(FakePool(script))
    session = known.add(Session("me", "python"))
    running = asyncio.create_task(execute(known, session))
    await asyncio.sleep(0.01)
    draining = asyncio.create_task(known.drain(5.0, asyncio.Event()))
    await asyncio.sleep(0.01)
    with pytest.raises(RequestError) as caught:
        await execute(known, session)
    assert caught.value.retry_after is not None
    await draining
    assert running.done() and stdout(running.result()) == "code"


async def test_draining_refuses_at_once_what_still_waits_for_its_turn_or_for_a_sandbox() -> None:
    pool = FakePool(lambda *_: None)
    known = registry(pool)
    session = known.add(Session("me", "python"))
    running = asyncio.create_task(execute(known, session, timeout=0.2))
    await pool.claimed.wait()
    pool.gate = asyncio.Event()
    waiting = [asyncio.create_task(execute(known, each)) for each in (session, known.add(Session("me", "python")))]
    await asyncio.sleep(0.01)
    draining = asyncio.create_task(known.drain(5.0, asyncio.Event()))
    async with asyncio.timeout(0.1):
        for each in waiting:
            with pytest.raises(RequestError, match="shutting down"):
                await each
    assert not running.done()
    await asyncio.gather(running, draining)


async def test_draining_can_be_hurried() -> None:
    known = registry(FakePool(lambda *_: None))
    running = asyncio.create_task(execute(known, known.add(Session("me", "python")), timeout=0.2))
    await asyncio.sleep(0.01)
    hurry = asyncio.Event()
    hurry.set()
    async with asyncio.timeout(0.1):
        await known.drain(60.0, hurry)
    await running
