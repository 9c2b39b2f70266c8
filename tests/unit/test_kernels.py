"""KernelRegistry: whose kernel is which, and in what order clients hear of a restart, a death and an end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import kernel_life, kernel_sandboxes, kernels
from gateway.cancellation import Cancelled
from gateway.culling import CullBounds, overdue
from gateway.errors import RequestError
from gateway.execution import Cell, CellLimits
from gateway.holdings import Holdings
from gateway.kernel import Kernel
from gateway.kernel_bounds import LifeBounds
from gateway.kernels import KernelRegistry
from gateway.kernelspecs import KernelSpecs
from gateway.limits import OwnerBounds
from gateway.session import Session
from gateway.sessions import SessionRegistry
from kernelprovisioner.images import read_images
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.pool import PoolFull
from kernelprovisioner.sandbox import EndedCell, ProbeError
from kernelprovisioner.sandbox_exit import CellReference, ExitCause, SandboxExit
from tests.unit.gateway_fakes import FakeChannels, FakePool, FakeSandbox

SPECS = KernelSpecs(read_images(), {"python3": "sandbox"})
LIMITS = CellLimits(grace=0.05, max_output_bytes=1000, max_outputs=10)
ID = "6f1c2f0e-0000-4000-8000-000000000000"


@asynccontextmanager
async def registry(
    pool: FakePool, *, limit: int | None = None, restarts: int = 5, cull: CullBounds | None = None
) -> AsyncIterator[KernelRegistry]:
    pools: Any = {"python": pool}
    known = KernelRegistry(
        Holdings(pools, line_timeout=5.0, bounds=OwnerBounds(limit)),
        SPECS,
        FakeChannels,
        life_bounds=LifeBounds(restarts),
        cull_bounds=cull,
    )
    try:
        yield known
    finally:
        await known.stop(5.0)


def channels(kernel: Kernel) -> FakeChannels:
    assert isinstance(kernel.channels, FakeChannels)
    return kernel.channels


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.001)


async def refused(work: Awaitable[object]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await work
    return caught.value


async def test_a_kernel_is_idle_once_it_is_started_and_its_record_tells_who_holds_it() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        env = {"A": "1", "PATH": "/evil", "JPY_SESSION_NAME": "n.ipynb", "KERNEL_LAUNCH_TIMEOUT": "40"}
        kernel = await known.start("me", name="python3", path="dir", env=env)
        assert (kernel.name, kernel.image, kernel.execution_state) == ("python3", "python", "idle")
        assert uuid.UUID(kernel.id)
        assert channels(kernel).calls == ["attach sandbox0"]
        ((owner, request),) = pool.claims
        assert (owner, request.kernel_id, request.session_name) == ("me", kernel.id, "n.ipynb")
        assert "PATH" not in request.env and request.env["A"] == "1"
        assert request.holder["kind"] == "kernel" and request.holder["owner"] == "me"
        assert known.find("me", kernel.id) is kernel and known.list("me") == [kernel]


async def test_a_client_that_gives_up_soon_is_answered_before() -> None:
    waits = []

    class Waiting(FakePool):
        async def claim(self, *arguments: Any, timeout: float, **more: Any) -> Any:
            waits.append(timeout)
            return await super().claim(*arguments, timeout=timeout, **more)

    async with registry(Waiting()) as known:
        for given_up in ("7.5", "2", "1000", "soon", "nan"):
            await known.start("me", env={"KERNEL_LAUNCH_TIMEOUT": given_up})
    assert waits == [2.5, 1.0, 5.0, 5.0, 5.0]


async def test_ids_that_clients_choose_are_free_or_taken_among_their_own_only() -> None:
    async with registry(FakePool()) as known:
        mine = await known.start("me", kernel_id=ID)
        assert (await refused(known.start("me", kernel_id=ID))).status == HTTPStatus.CONFLICT
        other = await known.start("you", kernel_id=ID)
        assert (known.find("me", ID), known.find("you", ID)) == (mine, other)
        for bad in ("x", ID.upper().replace("6F1C", "6F1D"), f"{{{ID}}}", ID.replace("-", ""), ""):
            error = await refused(known.start("me", kernel_id=bad))
            assert (error.status, error.details[0].field) == (HTTPStatus.BAD_REQUEST, "kernel_id")
        await known.shutdown(mine)
        assert known.find("you", ID) is other
        with pytest.raises(RequestError) as caught:
            known.find("me", ID)
        assert caught.value.status == HTTPStatus.NOT_FOUND
        assert (await known.start("me", kernel_id=ID)).id == ID


@pytest.mark.parametrize("error", [PoolFull("all places are taken", 7), LaunchError("no engine")])
async def test_a_start_that_fails_leaves_nothing(error: Exception) -> None:
    pool = FakePool()
    async with registry(pool) as known:
        pool.error = error
        told = await refused(known.start("me", kernel_id=ID))
        assert told.status == HTTPStatus.SERVICE_UNAVAILABLE and told.retry_after
        assert known.everything() == []
        pool.error = None
        await known.start("me", kernel_id=ID)


async def test_a_start_that_nobody_waits_for_any_more_claims_nothing() -> None:
    pool = FakePool()
    pool.gate = asyncio.Event()
    async with registry(pool) as known:
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        hung_up = asyncio.create_task(known.start("me", cancelled=gone))
        cancelled = asyncio.create_task(known.start("me"))
        deleted = asyncio.create_task(known.start("me", kernel_id=ID))
        await until(lambda: len(known.everything()) == 3)
        assert {kernel.execution_state for kernel in known.list("me")} == {"starting"}
        gone.set_result(None)
        cancelled.cancel()
        await known.shutdown(known.find("me", ID))
        with pytest.raises(Cancelled):
            await hung_up
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert (await refused(deleted)).status == HTTPStatus.NOT_FOUND
        assert known.everything() == [] and pool.claims == []


async def test_a_start_that_is_cancelled_as_it_succeeds_gives_its_sandbox_back() -> None:
    pool = FakePool()
    pool.gate = asyncio.Event()
    async with registry(pool) as known:
        starting = asyncio.create_task(known.start("me"))
        await until(known.everything)
        await asyncio.sleep(0.01)
        pool.gate.set()
        await pool.claimed.wait()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await until(lambda: len(pool.released) == len(pool.made))
        assert known.everything() == []


async def test_a_kernel_that_is_ended_while_it_starts_is_not_said_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    written = asyncio.Event()

    async def recorded(_: FakeSandbox) -> None:
        await written.wait()

    monkeypatch.setattr(FakeSandbox, "recorded", recorded)
    pool = FakePool()
    async with registry(pool) as known:
        starting = asyncio.create_task(known.start("me", kernel_id=ID))
        await until(lambda: known.list("me") and known.find("me", ID).sandbox is not None)
        ending = asyncio.create_task(known.shutdown(known.find("me", ID)))
        await asyncio.sleep(0)
        written.set()
        assert (await refused(starting)).status == HTTPStatus.NOT_FOUND
        await ending
        assert len(pool.released) == 1 and not known.list("me")


async def test_a_restart_swaps_the_sandbox_in_this_order_and_two_at_once_are_one() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        told = channels(kernel)
        told.calls.clear()
        await asyncio.gather(known.restart(kernel), known.restart(kernel))
        assert told.calls == ["restart", "detach", "attach sandbox1", "iopub status starting", "iopub status idle"]
        assert [sandbox.id for sandbox, _ in pool.released] == ["sandbox0"]
        assert kernel.execution_state == "idle" and kernel.last_exit is None
        await known.restart(kernel)
        assert len(pool.made) == 3 and known.find("me", kernel.id) is kernel


@pytest.mark.parametrize("how", ["restart", "death"])
async def test_the_former_sandboxs_record_stays_until_that_of_the_next_one_is_there(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    written = asyncio.Event()
    written.set()

    async def recorded(_: FakeSandbox) -> None:
        await written.wait()

    monkeypatch.setattr(FakeSandbox, "recorded", recorded)
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        written.clear()
        if how == "restart":
            restarting = asyncio.create_task(known.restart(kernel))
        else:
            pool.made[0].die(ExitCause.OUT_OF_MEMORY)
        await until(lambda: len(pool.made) == 2 and kernel.sandbox is pool.made[1])
        assert pool.made[0].record_stays, "a gateway that crashes now leaves no record of the kernel"
        written.set()
        await until(lambda: not pool.made[0].record_stays)
        if how == "restart":
            await restarting
        assert not pool.made[1].record_stays


@pytest.mark.parametrize("how", ["failed", "shut down", "stopped", "kept"])
async def test_no_record_stays_of_a_kernel_that_gets_no_other_sandbox(how: str) -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        pool.gate = asyncio.Event()
        restarting = asyncio.create_task(known.restart(kernel))
        await until(lambda: pool.released)
        assert pool.made[0].record_stays
        if how == "failed":
            pool.failure = LaunchError("no engine")
            pool.gate.set()
        elif how == "shut down":
            await known.shutdown(kernel)
        else:
            await known.stop(5.0, keep=how == "kept")
        await asyncio.gather(restarting, return_exceptions=True)
        # The next gateway says what became of it.
        assert pool.made[0].record_stays == (how == "kept")


async def test_a_restart_waits_where_the_line_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_sandboxes, "_LINE_PAUSE", 0.01)
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        pool.error = PoolFull("all places are taken", 7)
        restarting = asyncio.create_task(known.restart(kernel))
        await asyncio.sleep(0.05)
        assert not restarting.done() and kernel.execution_state == "starting"
        pool.error = None
        await restarting
        assert kernel.execution_state == "idle"
        pool.error = PoolFull("all places are taken", 7)
        restarting = asyncio.create_task(known.restart(kernel))
        await asyncio.sleep(0.05)
        await known.shutdown(kernel)
        assert (await refused(restarting)).status == HTTPStatus.NOT_FOUND


async def test_a_restart_without_a_sandbox_leaves_a_dead_kernel_that_can_be_restarted() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        old = channels(kernel)
        pool.error = LaunchError("no engine")
        assert (await refused(known.restart(kernel))).status == HTTPStatus.SERVICE_UNAVAILABLE
        assert kernel.dead and "no engine" in str(kernel.reason) and old.closed[0][0] == 4410
        assert known.list("me") == [kernel]
        pool.error = None
        await known.restart(kernel)
        assert kernel.execution_state == "idle" and kernel.reason is None and kernel.channels is not old
        kernel.sandbox.die(ExitCause.EXITED)  # type: ignore[union-attr]
        await until(lambda: len(channels(kernel).attached) == 2)


async def test_a_kernel_that_lives_again_is_not_forgotten_for_an_earlier_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEAD_SECONDS", 0.05)
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        for _ in range(2):
            pool.error = LaunchError("no engine")
            await refused(known.restart(kernel))
        pool.error, pool.gate = None, asyncio.Event()
        restarting = asyncio.create_task(known.restart(kernel))
        await asyncio.sleep(0.1)
        pool.gate.set()
        await restarting
        await asyncio.sleep(0.1)
        assert known.list("me") == [kernel], "its sandbox would have nobody who ends it"


async def test_a_death_is_told_first_and_then_the_kernel_starts_again() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        told = channels(kernel)
        told.busy = True
        told.calls.clear()
        pool.made[0].die(ExitCause.OUT_OF_MEMORY, evidence={"limit_mb": 64})
        await until(lambda: told.calls[-1:] == ["iopub status idle"])
        assert told.calls == [
            "death The kernel ran out of memory (limit 64 MiB) and was killed.",
            "detach",
            "iopub status restarting",
            "attach sandbox1",
            "iopub status starting",
            "iopub status idle",
        ]
        assert pool.made[0].last_use is not None and pool.made[0].last_use.done()
        assert kernel.last_exit is not None and kernel.last_exit.cause is ExitCause.OUT_OF_MEMORY


async def test_a_kernel_that_dies_again_and_again_stays_dead_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = FakePool()
    async with registry(pool, restarts=2) as known:
        kernel = await known.start("me")
        for number in range(3):
            await until(lambda number=number: len(pool.made) == number + 1)
            pool.made[number].die(ExitCause.SIGNAL, signal=11)
        await until(lambda: kernel.dead)
        assert kernel.reason == "The kernel process was killed by signal 11 (SIGSEGV). It died 3 times in a row."
        assert kernel.traceback is not None and kernel.last_exit is not None
        assert channels(kernel).closed == [(4410, kernel.reason)]
        assert len(pool.made) == 3
        assert known.list("me") == [kernel]
        await known.shutdown(kernel)
        assert known.list("me") == []
        monkeypatch.setattr(kernel_life, "STABLE_SECONDS", 0.0)
        steady = await known.start("me")
        for number in range(3, 8):
            await until(lambda number=number: len(pool.made) == number + 1)
            pool.made[number].die(ExitCause.SIGNAL, signal=11)
        await until(lambda: steady.execution_state == "idle" and len(pool.made) == 9)


async def test_dead_kernels_are_forgotten_after_a_while_and_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = FakePool()
    monkeypatch.setattr(kernels, "MAX_DEAD", 2)
    async with registry(pool, restarts=0) as known:
        for number in range(3):
            await known.start("me")
            pool.made[number].die(ExitCause.EXITED, exit_code=1)
            await until(lambda: known.list("me")[-1].dead)
        assert len(known.list("me")) == 2
        mine = known.list("me")
        for number in range(3, 6):
            await known.start("you")
            pool.made[number].die(ExitCause.EXITED, exit_code=1)
            await until(lambda: known.list("you")[-1].dead)
        assert (known.list("me"), len(known.list("you"))) == (mine, 2), "nobody's dead push out another's"
        monkeypatch.setattr(kernels, "DEAD_SECONDS", 0.0)
        await known.start("me", kernel_id=ID)
        pool.made[6].die(ExitCause.EXITED, exit_code=1)
        await until(lambda: all(kernel.id != ID for kernel in known.list("me")))
        assert len(known.list("me")) == 1


async def test_a_kernel_that_its_client_tells_to_end_is_gone_and_one_told_to_restart_is_new() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        asked = channels(kernel).on_shutdown_request
        assert asked is not None
        asked(True)
        pool.made[0].die(ExitCause.EXITED, exit_code=0)
        await until(lambda: len(pool.made) == 2 and kernel.execution_state == "idle")
        assert not any(call.startswith(("death", "iopub status restarting")) for call in channels(kernel).calls)
        asked(False)
        pool.made[1].die(ExitCause.EXITED, exit_code=0)
        await until(lambda: known.list("me") == [])
        await until(lambda: len(pool.released) == 2)
        await until(lambda: channels(kernel).closed)
        assert channels(kernel).closed == [(4410, "The kernel was shut down.")]


async def test_one_that_does_not_heed_its_client_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = FakePool()
    monkeypatch.setattr(kernel_life, "_END_SECONDS", 0.01)
    async with registry(pool) as known:
        kernel = await known.start("me")
        asked = channels(kernel).on_shutdown_request
        assert asked is not None
        asked(False)
        await until(lambda: pool.released)
        assert known.list("me") == []


async def test_statuses_of_the_kernel_are_its_state_and_its_activity() -> None:
    async with registry(FakePool()) as known:
        kernel = await known.start("me")
        told = channels(kernel)
        assert told.on_status is not None and told.on_activity is not None
        kernel.last_activity -= timedelta(hours=1)
        told.on_status("busy")
        told.on_activity()
        assert kernel.execution_state == "busy"
        assert datetime.now(UTC) - kernel.last_activity < timedelta(minutes=1)
        await known.shutdown(kernel)
        told.on_status("idle")
        assert kernel.execution_state == "dead"


async def test_interrupts_that_come_at_once_are_one() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        await asyncio.gather(*(known.interrupt(kernel) for _ in range(500)))
        assert pool.made[0].interrupts == 1
        await known.interrupt(kernel)
        assert pool.made[0].interrupts == 2


async def test_sessions_and_kernels_count_together_and_a_call_in_passing_makes_room() -> None:
    pool = FakePool()
    pools: Any = {"python": pool}
    holdings = Holdings(pools, line_timeout=5.0, bounds=OwnerBounds(2))
    sessions = SessionRegistry(holdings, LIMITS)
    known = KernelRegistry(holdings, SPECS, FakeChannels)
    passing = sessions.add(Session("me", "python"))
    await sessions.execute(passing, Cell("1", 5.0), asyncio.get_running_loop().create_future())
    await known.start("me")
    await known.start("me")
    assert passing.sandbox is None, "nobody came back to it"
    error = await refused(known.start("me"))
    assert error.status == HTTPStatus.TOO_MANY_REQUESTS
    await known.start("you")
    await known.shutdown(known.list("me")[0])
    await known.start("me")
    await known.stop(5.0)
    await sessions.stop(5.0)


async def test_a_restart_needs_no_second_place_of_its_owner() -> None:
    async with registry(FakePool(), limit=1) as known:
        kernel = await known.start("me")
        await known.restart(kernel)
        assert kernel.execution_state == "idle"


async def test_a_stop_waits_for_cells_and_then_tells_them() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel, idle = await known.start("me"), await known.start("me")
        told = channels(kernel)
        assert told.on_status is not None
        told.on_status("busy")
        draining = asyncio.create_task(known.drain(5.0, asyncio.Event()))
        await asyncio.sleep(0.01)
        assert not draining.done()
        assert (await refused(known.start("me"))).status == HTTPStatus.SERVICE_UNAVAILABLE
        assert (await refused(known.restart(idle))).status == HTTPStatus.SERVICE_UNAVAILABLE
        told.on_status("idle")
        await draining
        told.on_status("busy")
        await known.drain(0.01, asyncio.Event())
        hurry = asyncio.Event()
        hurry.set()
        await known.drain(5.0, hurry)
        await known.stop(5.0)
        assert told.calls[-3:] == ["death The gateway that held the sandbox has stopped.", "detach", "close 1012"]
        assert len(pool.made) == 2


async def test_a_stop_waits_for_the_reply_that_comes_behind_the_idle_status() -> None:
    async with registry(FakePool()) as known:
        told = channels(await known.start("me"))
        told.answering = True
        draining = asyncio.create_task(known.drain(5.0, asyncio.Event()))
        await asyncio.sleep(0.05)
        assert not draining.done()
        told.answering = False
        await draining


async def test_a_kernel_that_dies_while_the_gateway_stops_is_not_started_again() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        told = channels(kernel)
        assert told.on_status is not None
        told.on_status("busy")
        draining = asyncio.create_task(known.drain(5.0, asyncio.Event()))
        await asyncio.sleep(0.01)
        pool.made[0].die(ExitCause.OUT_OF_MEMORY)
        await draining
        assert len(pool.made) == 1 and kernel.dead


async def test_kernels_that_are_kept_are_told_no_death() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        await known.stop(5.0, keep=True)
        assert channels(kernel).calls[-2:] == ["detach", "close 1012"]
        assert not any(call.startswith("death") for call in channels(kernel).calls)
        assert pool.released == []


@pytest.mark.parametrize("probes", [["x", "x", None], [ProbeError("busy"), "x", None], ["x", "y"], [None]])
async def test_what_a_kernel_that_was_taken_up_runs_is_followed_to_its_end(
    probes: list[str | Exception | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_life, "_ASKING_SECONDS", 0.01)
    monkeypatch.setattr(kernel_life, "_TRAILING_SECONDS", 0.01)
    async with registry(FakePool()) as known:
        sandbox: Any = FakeSandbox(0, lambda *_: None)
        sandbox.probes = list(probes)
        ended = EndedCell({"msg_id": "y"}, "ok")
        sandbox.ended = [ended]
        kernel = Kernel("me", ID, "sandbox", "python", FakeChannels())
        known.restore(kernel, sandbox)
        assert known.find("me", ID) is kernel and kernel.execution_state == "starting"
        await until(lambda: kernel.execution_state == "idle")
        follows = ["follow x", "follow no more x"] if "x" in probes else []
        assert channels(kernel).calls == ["attach sandbox0", "make up y", *follows]


async def test_a_kernel_whose_sandbox_an_earlier_gateway_lost_is_dead_and_can_be_restarted() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel = Kernel("me", ID, "sandbox", "python", FakeChannels(), env={"A": "1"})
        known.restore_dead(kernel, SandboxExit(ExitCause.GATEWAY, evidence={"reason": "it does not answer"}))
        await until(lambda: kernel.dead)
        assert "it does not answer" in str(known.find("me", ID).reason)
        await known.restart(kernel)
        assert kernel.execution_state == "idle" and pool.claims[0][1].env == {"A": "1"}


async def test_the_end_of_a_sandbox_names_the_cell_that_ran() -> None:
    pool = FakePool()
    async with registry(pool) as known:
        kernel = await known.start("me")
        assert pool.made[0].running is not None and pool.made[0].running() is None
        channels(kernel).cell = CellReference("id", 3)
        assert pool.made[0].running() == CellReference("id", 3)


async def test_an_unused_kernel_is_culled_and_says_so() -> None:
    pool = FakePool()
    async with registry(pool, cull=CullBounds(idle_timeout=0.01, interval=0.01)) as known:
        kernel, used = await known.start("me"), await known.start("me")
        channels(used).connections = 1
        known.culling.start()
        await until(lambda: kernel.dead)
        assert kernel.reason == "The kernel was not used for 0.01 s and was shut down."
        assert channels(kernel).calls[-3:] == [f"notice {kernel.reason}", "detach", "close 4410"]
        assert kernel.last_exit is not None and kernel.last_exit.cause is ExitCause.IDLE
        assert not used.dead


async def test_what_runs_in_a_kernel_that_is_culled_is_answered() -> None:
    pool = FakePool()
    async with registry(pool, cull=CullBounds(idle_timeout=0.01, interval=0.01, busy=True)) as known:
        kernel = await known.start("me")
        kernel.execution_state, channels(kernel).busy = "busy", True
        known.culling.start()
        await until(lambda: kernel.dead)
        assert channels(kernel).calls[-3:] == [f"death {kernel.reason}", "detach", "close 4410"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["starting", "idle", "busy", "restarting", "dead"]),
            st.integers(0, 20),
            st.integers(0, 2),
        )
    ),
    st.integers(0, 10),
    st.booleans(),
    st.booleans(),
)
def test_culling_takes_whom_it_may_and_nobody_else(
    states: list[tuple[str, int, int]], timeout: int, connected: bool, busy: bool
) -> None:
    now = datetime.now(UTC)
    asked = [
        SimpleNamespace(execution_state=state, last_activity=now - timedelta(seconds=age), connections=open_)
        for state, age, open_ in states
    ]
    taken = overdue(asked, CullBounds(timeout, 1.0, connected, busy), now)
    for kernel in asked:
        age = (now - kernel.last_activity).total_seconds()
        may = kernel.execution_state == "idle" or (busy and kernel.execution_state == "busy")
        wanted = timeout > 0 and age >= timeout and may and (connected or kernel.connections == 0)
        assert any(one is kernel for one in taken) == wanted


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["start", "restart", "shutdown", "die", "asked", "asked_restart", "full", "free", "cull"]),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=25,
)


@given(OPERATIONS)
def test_every_sandbox_has_one_kernel_and_is_given_back_once(operations: list[tuple[str, int, bool]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(_carry_out(operations, patch))


async def _carry_out(operations: list[tuple[str, int, bool]], patch: pytest.MonkeyPatch) -> None:
    pool = FakePool()
    patch.setattr(kernel_life, "_ANSWER_SECONDS", 0.0)
    async with registry(pool, restarts=2) as known:
        under_way: list[asyncio.Task[Any]] = []
        for what, index, at_once in operations:
            there = known.list("me")
            kernel = there[index % len(there)] if there else None
            sandbox: Any = kernel.sandbox if kernel is not None else None
            if what in ("full", "free"):
                pool.error = LaunchError("no engine") if what == "full" else None
            elif what == "start":
                under_way.append(asyncio.create_task(known.start("me")))
            elif kernel is not None and what in ("restart", "shutdown"):
                under_way.append(asyncio.create_task(getattr(known, what)(kernel)))
            elif kernel is not None and what == "cull":
                known._cull(kernel)
            elif kernel is not None and sandbox is not None:
                if what.startswith("asked"):
                    channels(kernel).on_shutdown_request(what == "asked_restart")  # type: ignore[misc]
                sandbox.die(ExitCause.EXITED)
            if not at_once:
                await asyncio.sleep(0)
                await asyncio.gather(*under_way, return_exceptions=True)
        for result in await asyncio.gather(*under_way, return_exceptions=True):
            assert result is None or isinstance(result, Kernel | RequestError), repr(result)
        await known._life.tasks.ended(5.0)
        await asyncio.sleep(0)
        await known._life.tasks.ended(5.0)
        held = [kernel.sandbox for kernel in known.everything() if kernel.sandbox is not None]
        given_back: list[Any] = [sandbox for sandbox, _ in pool.released]
        assert sorted(one.id for one in [*held, *given_back]) == sorted(one.id for one in pool.made)
        assert known._holdings.held("me") == len(held)
        for kernel in known.everything():
            assert kernel.dead == (kernel.sandbox is None)
            assert kernel.dead == bool(channels(kernel).closed)
            assert kernel.execution_state in ("idle", "dead")
        fake: FakeSandbox
        for fake in pool.made:
            assert fake.last_use is not None
            assert fake.last_use.done() == (fake not in held)
