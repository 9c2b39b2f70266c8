"""SandboxPool on asyncio, with sandboxes that are made of nothing: races, failures, and that nothing is left."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kernelprovisioner.exit_log import ExitLog
from kernelprovisioner.images import KernelImage, PoolBounds
from kernelprovisioner.keeper import Upkeep
from kernelprovisioner.launchers.base import EngineUnavailable, LaunchError, LaunchRequest
from kernelprovisioner.pool import ClaimTimeout, PoolClaim, PoolFull, PoolStopped, SandboxPool
from kernelprovisioner.sandbox import ClaimError, ClaimRequest, ProbeError, Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.sandboxes import Sandboxes
from kernelprovisioner.schedule import parse

IMAGE = KernelImage("python", "python", "Python", Path("."), "base")
REQUESTED = SandboxExit(ExitCause.REQUESTED)


class FakeSandbox:
    """As much of a Sandbox as a pool sees."""

    def __init__(self, engine: FakeEngine, request: LaunchRequest) -> None:
        self.id = request.sandbox_id
        self.mount = request.mount
        self.template = engine.template
        self.exited: asyncio.Future[SandboxExit] = asyncio.get_running_loop().create_future()
        self.claims: list[str] = []
        self.probes, self.probing = 0, False
        self.answers, self.missed = True, 0
        self._engine = engine

    async def claim(self, request: ClaimRequest) -> None:
        self.claims.append(request.kernel_id)
        await self._engine.on_claim(self)

    async def with_cause(self, error: ClaimError) -> str:
        return f"{error}: {self.exited.result()}" if self.exited.done() else str(error)

    async def probe(self, *, timeout: float) -> None:
        self.probes += 1
        self.probing = True
        await self._engine.on_probe()
        self.probing = False
        self.missed, missed = max(0, self.missed - 1), self.missed
        if missed or not self.answers:
            raise ProbeError(f"sandbox {self.id} did not answer a probe within {timeout:g} s")

    async def destroy(self, cause: SandboxExit | None = None) -> None:
        if not self.exited.done():
            self.exited.set_result(cause or REQUESTED)
        await self._engine.on_destroy(self)
        self._engine.live.pop(self.id, None)


class FakeEngine:
    """Starts fake sandboxes, counts what lives, and fails where a test says so."""

    def __init__(self) -> None:
        self.live: dict[str, FakeSandbox] = {}
        self.most_live = self.most_starting = self.starting = self.launches = 0
        self.start_seconds = 0.002
        self.start_errors: list[Exception] = []
        self.claim_errors: list[Exception] = []
        self.destroy_errors: list[Exception] = []
        self.start_gate: asyncio.Event | None = None
        self.claim_gate: asyncio.Event | None = None
        self.destroy_gate: asyncio.Event | None = None
        self.probe_gate: asyncio.Event | None = None
        self.destroyed: list[str] = []
        #: what each start carries; what starts are to carry now
        self.template: str | None = None
        self.current_template: str | None = None
        self.exits = ExitLog()
        self.launcher = SimpleNamespace(template=self._current_template)

    async def _current_template(self, image: KernelImage) -> str | None:
        return self.current_template

    async def launch(self, request: LaunchRequest, *, timeout: float = 60.0) -> Sandbox:
        self.launches += 1
        sandbox = self.live[request.sandbox_id] = FakeSandbox(self, request)
        self.starting += 1
        self.most_live, self.most_starting = max(self.most_live, len(self.live)), max(self.most_starting, self.starting)
        try:
            await asyncio.sleep(self.start_seconds)
            if self.start_gate is not None:
                await self.start_gate.wait()
            if self.start_errors:
                raise self.start_errors.pop(0)
        except BaseException:
            del self.live[request.sandbox_id]
            raise
        finally:
            self.starting -= 1
        return cast(Sandbox, sandbox)

    async def on_claim(self, sandbox: FakeSandbox) -> None:
        if self.claim_gate is not None:
            await self.claim_gate.wait()
        if self.claim_errors:
            raise self.claim_errors.pop(0)

    async def on_probe(self) -> None:
        if self.probe_gate is not None:
            await self.probe_gate.wait()

    async def on_destroy(self, sandbox: FakeSandbox) -> None:
        self.destroyed.append(sandbox.id)
        if self.destroy_gate is not None:
            await self.destroy_gate.wait()
        await asyncio.sleep(0.001)
        if self.destroy_errors:
            raise self.destroy_errors.pop(0)


@asynccontextmanager
async def a_pool(min: int = 0, max: int = 4, **options: Any) -> AsyncIterator[tuple[SandboxPool, FakeEngine]]:
    engine = FakeEngine()
    options.setdefault("upkeep", Upkeep(hit_rate=0.0))
    pool = SandboxPool(IMAGE, cast(Sandboxes, engine), bounds=PoolBounds(min, max), **options)
    await pool.start()
    try:
        yield pool, engine
    finally:
        async with asyncio.timeout(5):
            await pool.stop()
        assert engine.live == {} and not pool._tasks, "something is left"
        assert engine.most_live <= max, "more live sandboxes than max"


async def until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.001)


def ask(name: str = "k") -> ClaimRequest:
    return ClaimRequest(kernel_id=name, key=b"key")


async def test_a_warm_sandbox_is_claimed_and_replaced() -> None:
    async with a_pool(min=2) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 2)
        claim = await pool.claim("ada", ask("k1"))
        assert claim.source == "warm"
        assert cast(FakeSandbox, claim.sandbox).claims == ["k1"]
        await until(lambda: pool.describe()["warm"] == 2)
        assert pool.describe()["claimed"] == 1 and engine.launches == 3


async def test_a_rebuilt_image_empties_the_pool_of_the_older_one() -> None:
    async with a_pool(min=3) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 3)
        old = set(engine.live)
        engine.template = "rebuilt"
        claim = await pool.claim("ada", ask())
        await until(lambda: not old - {claim.sandbox.id} & engine.live.keys() and pool.describe()["warm"] == 3)
        assert claim.sandbox.id in engine.live


async def test_fifty_claims_at_once_on_twenty_places_all_get_their_own() -> None:
    async with a_pool(min=2, max=20) as (pool, engine):

        async def one(number: int) -> str:
            claim = await pool.claim(f"owner-{number % 3}", ask(str(number)))
            await asyncio.sleep(0.005)
            await pool.release(claim.sandbox, REQUESTED)
            return claim.sandbox.id

        ids = await asyncio.gather(*(one(number) for number in range(50)))
        assert len(set(ids)) == 50
        assert engine.most_live <= 20 and engine.most_starting <= 2


async def test_idle_sessions_give_way_and_are_told_before() -> None:
    async with a_pool(max=2) as (pool, _):
        told: list[tuple[str, ExitCause, bool]] = []
        pool.on_evict = lambda sandbox, cause: told.append((sandbox.id, cause.cause, sandbox.exited.done()))
        first, second = await pool.claim("ada", ask()), await pool.claim("ada", ask())
        pool.touch(second.sandbox.id, 1.0)
        pool.touch(first.sandbox.id, 2.0)
        third = await pool.claim("ada", ask())
        assert told == [(second.sandbox.id, ExitCause.EVICTED, False)]
        assert second.sandbox.exited.result().cause is ExitCause.EVICTED
        assert not first.sandbox.exited.done() and third.source == "started"
        assert pool.describe()["evictions"] == 1


async def test_a_busy_session_keeps_its_sandbox_and_the_line_has_a_deadline() -> None:
    async with a_pool(max=1) as (pool, _):
        claim = await pool.claim("ada", ask())
        with pytest.raises(ClaimTimeout) as raised:
            await pool.claim("ada", ask(), timeout=0.05)
        assert raised.value.retry_after >= 1
        assert not claim.sandbox.exited.done()
        assert pool.describe()["waiting"] == 0


async def test_who_waits_gets_the_sandbox_as_soon_as_one_is_idle() -> None:
    async with a_pool(max=1) as (pool, _):
        claim = await pool.claim("ada", ask())
        waiting = asyncio.create_task(pool.claim("ada", ask()))
        await asyncio.sleep(0.01)
        pool.touch(claim.sandbox.id, 1.0)
        assert (await waiting).sandbox is not claim.sandbox


async def test_a_full_line_refuses_with_a_time_to_come_back() -> None:
    async with a_pool(max=1, line_bound=2) as (pool, _):
        claim = await pool.claim("ada", ask())
        waiting = [asyncio.create_task(pool.claim("ada", ask())) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(PoolFull, match="all 1 places of 'python' are taken and 2 claims wait already") as raised:
            await pool.claim("ada", ask())
        assert raised.value.retry_after >= 1
        await pool.release(claim.sandbox, REQUESTED)
        first = await waiting[0]
        await pool.release(first.sandbox, REQUESTED)
        await waiting[1]


async def test_a_cancelled_claim_leaves_the_line() -> None:
    async with a_pool(max=1) as (pool, _):
        claim = await pool.claim("ada", ask())
        waiting = asyncio.create_task(pool.claim("ada", ask()))
        await until(lambda: pool.describe()["waiting"] == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert pool.describe()["waiting"] == 0
        await pool.release(claim.sandbox, REQUESTED)


@pytest.mark.parametrize("turns", range(8))
async def test_a_claim_cancelled_at_any_moment_leaves_no_claimed_sandbox(turns: int) -> None:
    async with a_pool(min=1, max=1) as (pool, _):
        await until(lambda: pool.describe()["warm"] == 1)
        claim = asyncio.create_task(pool.claim("ada", ask()))
        for _ in range(turns):
            await asyncio.sleep(0)
        claim.cancel()
        (result,) = await asyncio.gather(claim, return_exceptions=True)
        if isinstance(result, PoolClaim):  # it was done before
            await pool.release(result.sandbox, REQUESTED)
        await until(lambda: pool.describe()["warm"] == 1)
        assert pool.describe()["claimed"] == 0


async def test_a_sandbox_given_in_the_turn_of_the_cancellation_is_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_pool(max=1) as (pool, engine):
        first = await pool.claim("ada", ask())
        waiting = asyncio.create_task(pool.claim("ada", ask()))
        await pool.release(first.sandbox, REQUESTED)
        await until(lambda: engine.starting == 1)
        given = next(iter(engine.live))
        answer = pool._answer
        # Cancelled in the very turn in which the state decides: the answer finds its claim gone.

        def cancel_and_answer(*decided: Any) -> None:
            waiting.cancel()
            answer(*decided)

        monkeypatch.setattr(pool, "_answer", cancel_and_answer)
        await asyncio.gather(waiting, return_exceptions=True)
        await until(lambda: given in engine.destroyed)


async def test_a_claim_cancelled_while_it_is_made_personal_destroys_the_sandbox() -> None:
    async with a_pool(min=1) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 1)
        engine.claim_gate = asyncio.Event()
        (sandbox_id,) = engine.live
        with pytest.raises(ClaimTimeout):
            await pool.claim("ada", ask(), timeout=0.02)
        await until(lambda: sandbox_id in engine.destroyed)


async def test_a_sandbox_that_cannot_be_made_personal_is_destroyed_and_the_next_one_tried() -> None:
    async with a_pool(min=2) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 2)
        engine.claim_errors = [ClaimError("no answer")]
        first = next(iter(engine.live))
        claim = await pool.claim("ada", ask())
        assert claim.sandbox.id != first and claim.source == "warm"
        await until(lambda: first not in engine.live)


async def test_a_request_that_no_sandbox_accepts_ends_after_three() -> None:
    async with a_pool(min=1) as (pool, engine):
        engine.claim_errors = [ClaimError("refused its claim")] * 9
        with pytest.raises(LaunchError, match="3 sandboxes in a row could not be claimed: refused its claim"):
            await pool.claim("ada", ask())
        assert len(engine.claim_errors) == 6


async def test_claims_that_fail_by_deaths_tell_what_of() -> None:
    async with a_pool(min=1) as (pool, engine):
        cause = SandboxExit(ExitCause.OUT_OF_MEMORY)

        async def die(sandbox: FakeSandbox) -> None:
            sandbox.exited.set_result(cause)

        engine.on_claim = die  # type: ignore[method-assign]
        with pytest.raises(LaunchError, match=f"died while it was claimed: {re.escape(str(cause))}"):
            await pool.claim("ada", ask())


async def test_a_sandbox_that_dies_while_it_is_claimed_is_not_handed_out() -> None:
    async with a_pool(min=1) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 1)
        (dying,) = engine.live.values()
        dying.exited.set_result(SandboxExit(ExitCause.SIGNAL, signal=9))  # the pool has not heard of it yet
        claim = await pool.claim("ada", ask())
        assert claim.sandbox.id != dying.id


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_sandbox_that_dies_leaves_the_pool_and_is_replaced(claimed: bool) -> None:
    async with a_pool(min=1, max=1) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 1)
        (sandbox,) = engine.live.values()
        if claimed:
            assert (await pool.claim("ada", ask())).sandbox.id == sandbox.id
        sandbox.exited.set_result(SandboxExit(ExitCause.OUT_OF_MEMORY))
        await until(lambda: sandbox.id not in engine.live and pool.describe()["warm"] == 1)
        assert sandbox.exited.result().cause is ExitCause.OUT_OF_MEMORY


async def test_a_mount_is_started_for_its_claim_alone() -> None:
    async with a_pool(min=1, max=1) as (pool, _):
        await until(lambda: pool.describe()["warm"] == 1)
        claim = await pool.claim("ada", ask(), mount=Path("/data"))
        assert claim.source == "cold"
        assert cast(FakeSandbox, claim.sandbox).mount == Path("/data")


async def test_a_mount_that_cannot_be_started_tells_its_claim_at_once() -> None:
    async with a_pool() as (pool, engine):
        engine.start_errors = [LaunchError("no such directory: /data")]
        with pytest.raises(LaunchError, match="no such directory"):
            await pool.claim("ada", ask(), mount=Path("/data"))
        assert (await pool.claim("ada", ask(), timeout=1)).source == "started"


async def test_an_abandoned_mount_ends_its_start() -> None:
    async with a_pool(max=1) as (pool, engine):
        engine.start_gate = asyncio.Event()
        with pytest.raises(ClaimTimeout):
            await pool.claim("ada", ask(), mount=Path("/data"), timeout=0.02)
        await until(lambda: pool.describe()["removing"] == 0 and engine.live == {})


async def test_failed_starts_back_off_and_the_error_reaches_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelprovisioner.sizing.FIRST_BACKOFF", 0.02)
    async with a_pool(min=1, concurrency=1) as (pool, engine):
        engine.start_errors = [EngineUnavailable("the engine does not answer")] * 3
        with pytest.raises(EngineUnavailable, match="the engine does not answer"):
            await pool.claim("ada", ask())
        described = pool.describe()
        assert described["last_error"] == "the engine does not answer"
        assert described["failures_in_a_row"] == described["failed_starts"] == 3
        await until(lambda: pool.describe()["warm"] == 1)  # it comes back by itself
        assert pool.describe()["failures_in_a_row"] == 0


async def test_an_unexpected_error_of_a_start_is_a_failed_start() -> None:
    async with a_pool(min=1) as (pool, engine):
        engine.start_errors = [ValueError("surprise")]
        await until(lambda: pool.describe()["failed_starts"] == 1)
        assert "surprise" in pool.describe()["last_error"]


async def test_a_place_stays_taken_until_removal_is_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelprovisioner.sizing.FIRST_BACKOFF", 0.02)
    async with a_pool(max=1) as (pool, engine):
        claim = await pool.claim("ada", ask())
        engine.destroy_gate = asyncio.Event()
        engine.destroy_errors = [LaunchError("the engine does not answer")]
        releasing = asyncio.create_task(pool.release(claim.sandbox, REQUESTED))
        with pytest.raises(ClaimTimeout):
            await pool.claim("bob", ask(), timeout=0.05)
        assert pool.describe()["removing"] == 1 and engine.launches == 1
        engine.destroy_gate.set()
        await releasing
        assert engine.destroyed == [claim.sandbox.id] * 2, "tried again"
        assert (await pool.claim("bob", ask())).source == "started"


async def test_release_goes_on_if_its_caller_is_cancelled_and_tells_its_cause() -> None:
    async with a_pool(max=1) as (pool, engine):
        claim = await pool.claim("ada", ask())
        releasing = asyncio.create_task(pool.release(claim.sandbox, SandboxExit(ExitCause.TIME_LIMIT)))
        await asyncio.sleep(0)
        releasing.cancel()
        await until(lambda: engine.live == {})
        assert claim.sandbox.exited.result().cause is ExitCause.TIME_LIMIT
        await pool.release(claim.sandbox, REQUESTED)  # again: nothing happens


async def test_a_holder_that_fails_on_its_eviction_does_not_stop_it() -> None:
    async with a_pool(max=1) as (pool, _):

        def fails(sandbox: Sandbox, cause: SandboxExit) -> None:
            raise RuntimeError("the session's bug")

        pool.on_evict = fails
        claim = await pool.claim("ada", ask())
        pool.touch(claim.sandbox.id, 1.0)
        assert (await pool.claim("ada", ask())).sandbox is not claim.sandbox


async def test_stop_refuses_who_waits_and_destroys_all_that_lives() -> None:
    async with a_pool(min=2, max=4) as (pool, engine):
        claims = [await pool.claim("ada", ask()) for _ in range(3)]
        engine.start_gate = asyncio.Event()
        waiting = [asyncio.create_task(pool.claim("ada", ask())) for _ in range(3)]
        waiting.append(asyncio.create_task(pool.claim("bob", ask(), mount=Path("/data"))))
        await asyncio.sleep(0.01)
        await pool.stop()
        assert engine.live == {}
        assert all(claim.sandbox.exited.result().cause is ExitCause.GATEWAY for claim in claims)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, PoolStopped | PoolClaim) for result in results)
        with pytest.raises(PoolStopped):
            await pool.claim("ada", ask())
        await pool.stop()


async def test_stop_while_a_claim_is_made_personal() -> None:
    async with a_pool(min=1) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 1)
        engine.claim_gate = asyncio.Event()
        claim = asyncio.create_task(pool.claim("ada", ask()))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(pool.stop())
        await asyncio.sleep(0)
        engine.claim_gate.set()
        with pytest.raises(PoolStopped):
            await claim
        await stopping


@pytest.mark.parametrize("fails", [False, True])
async def test_stop_waits_for_no_removal_once_it_is_given_up(fails: bool) -> None:
    engine = FakeEngine()
    pool = SandboxPool(IMAGE, cast(Sandboxes, engine), bounds=PoolBounds(0, 2), upkeep=Upkeep(hit_rate=0.0))
    claim = await pool.claim("ada", ask())
    engine.start_gate = asyncio.Event()
    starting = asyncio.create_task(pool.claim("ada", ask()))
    await until(lambda: engine.starting == 1)
    if fails:
        engine.destroy_errors = [LaunchError("the engine does not answer")] * 9
    else:
        engine.destroy_gate = asyncio.Event()
    give_up = asyncio.Event()
    stopping = asyncio.create_task(pool.stop(give_up))
    await asyncio.sleep(0.05)
    assert not stopping.done()
    give_up.set()
    async with asyncio.timeout(1):
        await stopping
        await pool.stop(give_up)
    assert not pool._tasks and claim.sandbox.exited.done()
    with pytest.raises(PoolStopped):
        await starting


def left_behind(engine: FakeEngine) -> FakeSandbox:
    """A sandbox that an earlier gateway left."""
    name = f"left-{len(engine.live)}"
    made = engine.live[name] = FakeSandbox(engine, LaunchRequest(name, IMAGE))
    return made


async def test_a_warm_sandbox_that_does_not_answer_its_probe_is_replaced() -> None:
    async with a_pool(min=2, upkeep=Upkeep(hit_rate=0.0, probe_interval=0.01)) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 2)
        deaf, other = engine.live.values()
        deaf.answers = False
        await until(lambda: deaf.id not in engine.live and pool.describe()["warm"] == 2)
        exit = deaf.exited.result()
        assert exit.cause is ExitCause.PROTOCOL
        assert exit.evidence["reason"] == f"sandbox {deaf.id} did not answer a probe within 5 s"
        assert other.id in engine.live and pool.describe()["failed_probes"] == 1


async def test_only_warm_sandboxes_are_probed() -> None:
    async with a_pool(min=1, max=2, upkeep=Upkeep(hit_rate=0.0, probe_interval=0.01)) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 1)
        claim = await pool.claim("ada", ask())
        claimed = cast(FakeSandbox, claim.sandbox)
        probes, claimed.answers = claimed.probes, False
        await until(lambda: any(sandbox.probes > 2 for sandbox in engine.live.values()))
        assert claimed.probes == probes and claimed.id in engine.live


async def test_a_sandbox_that_is_claimed_while_it_is_probed_stays_with_its_holder() -> None:
    async with a_pool(min=1, max=1, upkeep=Upkeep(hit_rate=0.0, probe_interval=0.01)) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 1)
        (sandbox,) = engine.live.values()
        engine.probe_gate = asyncio.Event()
        sandbox.answers = False
        await until(lambda: sandbox.probing)
        tries = sandbox.probes
        claim = await pool.claim("ada", ask())
        engine.probe_gate.set()
        await asyncio.sleep(0.03)
        assert not claim.sandbox.exited.done() and pool.describe()["failed_probes"] == 0
        assert sandbox.probes == tries, "asked once more although it is somebody's now"


async def test_one_missed_probe_costs_no_sandbox() -> None:
    async with a_pool(min=1, max=1, upkeep=Upkeep(hit_rate=0.0, probe_interval=0.01)) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 1)
        (sandbox,) = engine.live.values()
        engine.probe_gate = asyncio.Event()
        await until(lambda: sandbox.probing)
        sandbox.missed = 1
        engine.probe_gate.set()
        await until(lambda: sandbox.probes > 3)
        assert sandbox.missed == 0 and sandbox.id in engine.live and pool.describe()["failed_probes"] == 0


async def test_a_new_template_empties_the_pool_of_the_older_one_without_a_claim() -> None:
    async with a_pool(min=2) as (pool, engine):
        engine.template = engine.current_template = "first"
        await until(lambda: pool.describe()["warm"] == 2)
        old = set(engine.live)
        engine.template = engine.current_template = "second"
        pool.engine_back()  # the keeper looks at once; by itself every 30 s
        await until(lambda: not old & engine.live.keys() and pool.describe()["warm"] == 2)


async def test_a_template_that_cannot_be_told_changes_nothing() -> None:
    async with a_pool(min=1) as (pool, engine):
        engine.template = "first"
        await until(lambda: pool.describe()["warm"] == 1)
        old = set(engine.live)
        pool.engine_back()
        await asyncio.sleep(0.02)
        assert set(engine.live) == old


async def test_old_sandboxes_are_replaced_once_a_younger_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelprovisioner.keeper._TICK_SECONDS", 0.01)
    async with a_pool(min=2, upkeep=Upkeep(hit_rate=0.0, max_age=0.2)) as (pool, engine):
        await until(lambda: pool.describe()["warm"] == 2)
        old = set(engine.live)
        fewest = 2
        while old & engine.live.keys():
            fewest = min(fewest, pool.describe()["warm"])
            await asyncio.sleep(0.001)
        assert fewest == 2


async def test_the_schedule_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelprovisioner.keeper._TICK_SECONDS", 0.01)
    monkeypatch.setattr("kernelprovisioner.stock.SURPLUS_SECONDS", 0.05)
    now = datetime(2026, 11, 23, 8, 0)
    upkeep = Upkeep(hit_rate=0.0, schedule=[parse("3 python on Mondays 08:55-10:00")])
    async with a_pool(min=1, max=6, upkeep=upkeep, local_time=lambda: now) as (pool, _):
        await until(lambda: pool.describe()["warm"] == 1)
        await asyncio.sleep(0.05)
        assert pool.describe()["want"] == 1
        now = datetime(2026, 11, 23, 8, 56)
        await until(lambda: pool.describe()["warm"] == 3)
        described = pool.describe()
        assert described["why"] == "3 kept warm (scheduled: 3 python on Mondays 08:55-10:00)"
        assert described["schedule"] == ["3 python on Mondays 08:55-10:00"]
        now = datetime(2026, 11, 23, 10, 0)
        await until(lambda: pool.describe()["warm"] == 1)
        assert pool.describe()["why"] == "1 kept warm"


async def test_claims_at_once_make_the_pool_keep_more() -> None:
    async with a_pool(min=1, max=12, upkeep=Upkeep(hit_rate=0.9)) as (pool, _):
        claims = await asyncio.gather(*(pool.claim(f"owner-{n}", ask()) for n in range(6)))
        for claim in claims:
            await pool.release(claim.sandbox, REQUESTED)
        await until(lambda: pool.describe()["warm"] == 6)
        described = pool.describe()
        assert described["why"] == "6 kept warm, which would have served 90 % of the 6 claims of 30 min at once"
        assert described["hit_rate"]["wanted"] == 0.9 and described["hit_rate"]["claims"] == 6


async def test_adopted_sandboxes_are_members_like_others() -> None:
    engine = FakeEngine()
    pool = SandboxPool(IMAGE, cast(Sandboxes, engine), bounds=PoolBounds(2, 2), upkeep=Upkeep(hit_rate=0.0))
    told: list[str] = []
    pool.on_evict = lambda sandbox, cause: told.append(sandbox.id)
    held, warm, surplus = (left_behind(engine) for _ in range(3))
    assert pool.adopt(cast(Sandbox, held), "ada")
    assert pool.adopt(cast(Sandbox, warm), None)
    assert not pool.adopt(cast(Sandbox, surplus), None), "all places are taken"
    await pool.start()
    await until(lambda: surplus.id not in engine.live)
    assert engine.launches == 0
    assert (await pool.claim("bob", ask())).sandbox.id == warm.id
    pool.touch(held.id, 1.0)
    await pool.claim("ada", ask())
    assert told == [held.id]
    await pool.stop()
    assert engine.live == {}


async def test_an_adopted_sandbox_that_dies_is_replaced() -> None:
    engine = FakeEngine()
    pool = SandboxPool(IMAGE, cast(Sandboxes, engine), bounds=PoolBounds(1, 2), upkeep=Upkeep(hit_rate=0.0))
    warm = left_behind(engine)
    assert pool.adopt(cast(Sandbox, warm), None)
    await pool.start()
    warm.exited.set_result(SandboxExit(ExitCause.SIGNAL, signal=9))
    await until(lambda: warm.id not in engine.live and pool.describe()["warm"] == 1)
    await pool.stop()


async def test_an_engine_that_is_back_is_used_at_once() -> None:
    async with a_pool(min=1, concurrency=1) as (pool, engine):
        engine.start_errors = [EngineUnavailable("the engine does not answer")] * 3
        await until(lambda: pool.describe()["failures_in_a_row"] == 1)
        engine.start_errors.clear()
        assert pool.describe()["retry_in_seconds"] > 0
        pool.engine_back()
        assert pool.describe()["failures_in_a_row"] == 0
        await until(lambda: pool.describe()["warm"] == 1, timeout=0.4)


async def test_a_removal_is_tried_again_at_once_when_the_engine_is_back() -> None:
    async with a_pool(max=1) as (pool, engine):
        claim = await pool.claim("ada", ask())
        engine.destroy_errors = [LaunchError("the engine does not answer")] * 2
        releasing = asyncio.create_task(pool.release(claim.sandbox, REQUESTED))
        for tries in (1, 2):
            await until(lambda tries=tries: engine.destroyed == [claim.sandbox.id] * tries)  # type: ignore[misc]
            await asyncio.sleep(0.01)
            pool.engine_back()
        await until(lambda: releasing.done(), timeout=0.4)


async def test_a_stop_that_keeps_leaves_what_is_warm_or_held() -> None:
    engine = FakeEngine()
    pool = SandboxPool(IMAGE, cast(Sandboxes, engine), bounds=PoolBounds(2, 4), upkeep=Upkeep(hit_rate=0.0))
    await pool.start()
    held = await pool.claim("ada", ask())
    await until(lambda: pool.describe()["warm"] == 2)
    warm = {sandbox.id for sandbox in pool.warm}
    engine.start_gate = asyncio.Event()
    waiting = asyncio.create_task(pool.claim("bob", ask(), mount=Path("/data")))
    await until(lambda: engine.starting == 1)
    await pool.stop(keep=True)
    with pytest.raises(PoolStopped):
        await waiting
    assert engine.live.keys() == {held.sandbox.id, *warm} and engine.destroyed == []


async def test_the_pool_describes_itself() -> None:
    async with a_pool(min=2, max=4) as (pool, _):
        await until(lambda: pool.describe()["warm"] == 2)
        described = pool.describe()
        assert {
            key: described[key] for key in ("image", "min", "max", "starting", "claimed", "removing", "waiting")
        } == {
            "image": "python",
            "min": 2,
            "max": 4,
            "starting": 0,
            "claimed": 0,
            "removing": 0,
            "waiting": 0,
        }
        assert (described["want"], described["why"]) == (2, "2 kept warm")
        assert described["last_error"] is None


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_fails_all_ends_in_gone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storm of claims, deaths, failures and cancellations: each sandbox serves one claim at most, nothing is left."""
    monkeypatch.setattr("kernelprovisioner.sizing.FIRST_BACKOFF", 0.001)
    dice = random.Random(seed)
    async with a_pool(min=2, max=5) as (pool, engine):
        served: list[str] = []

        async def user(number: int) -> None:
            await asyncio.sleep(dice.random() * 0.05)
            mount = Path("/data") if dice.random() < 0.2 else None
            try:
                async with asyncio.timeout(dice.choice([0.005, 0.02, 5.0])):
                    claim = await pool.claim(f"owner-{number % 4}", ask(), timeout=2.0, mount=mount)
            except (TimeoutError, LaunchError, PoolFull, ClaimTimeout):
                return
            served.append(claim.sandbox.id)
            await asyncio.sleep(dice.random() * 0.01)
            match dice.randrange(3):
                case 0 if not claim.sandbox.exited.done():
                    claim.sandbox.exited.set_result(SandboxExit(ExitCause.SIGNAL, signal=9))
                case 1:
                    pool.touch(claim.sandbox.id, asyncio.get_running_loop().time())
                    await asyncio.wait([claim.sandbox.exited], timeout=0.05)
            await pool.release(claim.sandbox, REQUESTED)

        async def trouble() -> None:
            for _ in range(20):
                await asyncio.sleep(dice.random() * 0.01)
                errors = dice.choice([engine.start_errors, engine.claim_errors, engine.destroy_errors])
                errors.append(ClaimError("trouble") if errors is engine.claim_errors else LaunchError("trouble"))

        await asyncio.gather(trouble(), *(user(number) for number in range(60)))
        assert len(served) == len(set(served)) > 0
        engine.start_errors.clear()
        await until(lambda: pool.describe()["warm"] >= 2 and pool.describe()["claimed"] == 0)
