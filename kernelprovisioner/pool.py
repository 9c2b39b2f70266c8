"""SandboxPool: warm sandboxes of one kernel image, claims, the waiting line, refill and eviction.

All decisions are PoolState's; here is the I/O around them. Every task is owned by the pool and ends with stop().
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
import secrets
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, assert_never

from kernelprovisioner import sizing
from kernelprovisioner.images import KernelImage, PoolBounds
from kernelprovisioner.keeper import Keeper, Upkeep
from kernelprovisioner.launchers.base import LaunchError, LaunchRequest
from kernelprovisioner.patience import all_done, end
from kernelprovisioner.pool_errors import ClaimTimeout, PoolError, PoolFull, PoolStopped
from kernelprovisioner.pool_events import (
    Adopted,
    ClaimAbandoned,
    ClaimAsked,
    ClaimFailed,
    ClaimSettled,
    EngineBack,
    Event,
    Evict,
    Exited,
    Give,
    Instruction,
    ProbeFailed,
    Refusal,
    Refuse,
    Released,
    Remove,
    Removed,
    Source,
    Start,
    Started,
    StartFailed,
    Stop,
    Tick,
    Touched,
    WakeAt,
)
from kernelprovisioner.pool_figures import PoolFigures
from kernelprovisioner.pool_state import PoolState
from kernelprovisioner.sandbox import ClaimError, ClaimRequest, Sandbox, SandboxState
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.sandboxes import Sandboxes
from kernelprovisioner.standing import Standing

__all__ = ["ClaimTimeout", "PoolClaim", "PoolError", "PoolFull", "PoolStopped", "SandboxPool"]

logger = logging.getLogger(__name__)

#: A request that no sandbox accepts must not use up the pool.
_CLAIM_ATTEMPTS = 3
_RELEASE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class PoolClaim:
    """A sandbox that is personal now, where it came from, and the seconds in line that it took to be given."""

    sandbox: Sandbox
    source: Source
    waited: float = 0.0


@dataclass(slots=True)
class _Waiting:
    """A claim that is under way: `answer` is what the state decided for it."""

    answer: asyncio.Future[tuple[Sandbox, Source] | Exception]
    mount: Path | None
    seconds: float = 0.0  # in line


class SandboxPool:
    """Keeps sandboxes of one image warm and hands each of them out once.

    `bounds` are the image's own unless given; `line_bound` (default 4 × max) bounds the waiting line, `concurrency`
    (default: the cores of this machine) the starts under way, `start_timeout` (seconds) each of them. `upkeep`: how it
    looks after itself, by the `local_time` that schedules mean.
    """

    def __init__(
        self,
        image: KernelImage,
        sandboxes: Sandboxes,
        *,
        bounds: PoolBounds | None = None,
        line_bound: int | None = None,
        concurrency: int | None = None,
        start_timeout: float = 60.0,
        upkeep: Upkeep | None = None,
        local_time: Callable[[], datetime] = datetime.now,
    ) -> None:
        bounds, upkeep = bounds or image.pool, upkeep or Upkeep()
        self.image = image
        self.upkeep = upkeep
        #: told before an idle sandbox is taken from its holder, so that its session can say so at its next call
        self.on_evict: Callable[[Sandbox, SandboxExit], None] | None = None
        self._launching = sandboxes
        self._start_timeout = start_timeout
        self._state = PoolState(
            minimum=bounds.min,
            maximum=bounds.max,
            line_bound=4 * bounds.max if line_bound is None else line_bound,
            concurrency=max(2, os.cpu_count() or 1) if concurrency is None else concurrency,
            new_id=lambda: secrets.token_hex(8),
            hit_rate=upkeep.hit_rate,
            max_age=upkeep.max_age,
        )
        self._keeper = Keeper(self, upkeep, sandboxes.launcher.template, local_time)
        self._engine_back = asyncio.Event()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._sandboxes: dict[str, Sandbox] = {}
        self._causes: dict[str, SandboxExit] = {}  # as the releaser told them
        self._starts: dict[str, asyncio.Task[None]] = {}
        self._removals: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._figures = PoolFigures()

    async def start(self) -> None:
        """Begin to fill the pool in the background, and to look after it; returns at once."""
        self._handle(Tick())
        self._keeper.start()

    async def stop(self, give_up: asyncio.Event | None = None, *, keep: bool = False) -> None:
        """Refuse all that wait and destroy every sandbox; returns once the engine has confirmed it. Idempotent.

        Once `give_up` is set nothing is waited for; `Sandboxes.stop` tells what stays. With `keep` those that are warm
        or have a holder stay for another gateway to adopt.
        """
        self._handle(Stop(keep))
        await self._keeper.stop()
        if self._timer is not None:
            self._timer.cancel()
        try:
            while self._tasks and await all_done(self._tasks, give_up):
                pass
        finally:
            await end(self._tasks)

    async def claim(
        self,
        owner: str,
        request: ClaimRequest,
        *,
        timeout: float = 120.0,
        mount: Path | None = None,
        standing: Standing = Standing.KEPT,
    ) -> PoolClaim:
        """Return a sandbox that is personal for `request`; with `mount` one that was started for it alone.

        `standing` says how likely somebody comes back to it: what others of the owner this claim may cost a sandbox.

        Raises PoolFull, ClaimTimeout after `timeout` seconds, PoolStopped, and LaunchError where none can be started.
        """
        request = dataclasses.replace(request, owner=owner)
        number = next(self._numbers)
        waiting = self._waiting[number] = _Waiting(asyncio.get_running_loop().create_future(), mount)
        try:
            async with asyncio.timeout(timeout):
                self._handle(ClaimAsked(number, owner, mount is not None, standing))
                sandbox, source = await self._make_personal(number, waiting, request)
        except TimeoutError:
            raise ClaimTimeout(
                f"no sandbox of {self.image.name!r} became free within {timeout:g} s", self._retry_after()
            ) from None
        finally:
            # Settled: changes nothing. Else the claim leaves the line, and a sandbox that it was given is destroyed.
            self._handle(ClaimAbandoned(number))
            del self._waiting[number]
        self._figures.claims[source] += 1
        return PoolClaim(sandbox, source, waiting.seconds)

    async def release(self, sandbox: Sandbox, cause: SandboxExit) -> None:
        """Destroy a sandbox; `cause` is what its `exited` tells. Returns once removal is confirmed, or after 30 s.

        The place is free once it is confirmed, however long that takes, also if the caller is cancelled. Idempotent.
        """
        if sandbox.id not in self._sandboxes:
            return
        self._causes.setdefault(sandbox.id, cause)
        self._handle(Released(sandbox.id))
        if (removal := self._removals.get(sandbox.id)) is not None:
            await asyncio.wait([removal], timeout=_RELEASE_SECONDS)

    def touch(self, sandbox_id: str, idle_since: float | None, standing: Standing = Standing.KEPT) -> None:
        """Tell since when (loop time) a claimed sandbox is idle, or None: it is busy, and is not taken away."""
        self._handle(Touched(sandbox_id, idle_since, standing))

    def adopt(self, sandbox: Sandbox, owner: str | None, *, age: float = 0.0) -> bool:
        """Take in a sandbox of a gateway that is gone: of `owner`, or warm (None). Before `start`.

        `age`: seconds since it was claimed, or became warm. Returns whether it is kept: a holder's always, a warm
        one where it fits; else it is being removed.
        """
        self._take_in(sandbox)
        self._handle(Adopted(sandbox.id, sandbox.template, owner, age))
        return sandbox.id not in self._removals

    def engine_back(self) -> None:
        """The engine answers again: starts, removals and the template are tried at once."""
        self._engine_back.set()
        self._engine_back = asyncio.Event()
        self._keeper.look_again()
        self._handle(EngineBack())

    # What the keeper needs.

    @property
    def warm(self) -> list[Sandbox]:
        """The sandboxes that wait to be claimed."""
        members = self._state.members.values()
        return [self._sandboxes[member.id] for member in members if member.state is SandboxState.WARM]

    @property
    def refill_seconds(self) -> float:
        """The time that each of many sandboxes takes to start."""
        return self._state.stock.start_seconds / sizing.refill_concurrency(self._state.concurrency)

    def tell(self, event: Event) -> None:
        """Tell the state what happened."""
        self._handle(event)

    def failed_probe(self, sandbox: Sandbox, reason: str) -> None:
        """A warm sandbox does not answer: it is replaced."""
        if sandbox not in self.warm:
            return
        logger.warning("pool %s: %s; it is replaced", self.image.name, reason)
        self._figures.failed_probes += 1
        self._causes.setdefault(sandbox.id, SandboxExit(ExitCause.PROTOCOL, evidence={"reason": reason}))
        self._handle(ProbeFailed(sandbox.id))

    def describe(self) -> dict[str, Any]:
        """Return the pool for health and metrics: counts by state, the line, what is wanted and why, totals."""
        return {
            "image": self.image.name,
            **self._figures.describe(self._state, self.upkeep, self._now()),
            "exits": self._launching.exits.counts(self.image.name),
        }

    async def _make_personal(self, number: int, waiting: _Waiting, request: ClaimRequest) -> tuple[Sandbox, Source]:
        """Wait for a sandbox and claim it; one that fails is destroyed and the next one tried."""
        for attempt in itertools.count(1):
            asked = self._now()
            answer = await waiting.answer
            waiting.seconds += self._now() - asked
            if isinstance(answer, Exception):
                raise answer
            waiting.answer = asyncio.get_running_loop().create_future()
            sandbox, source = answer
            try:
                await sandbox.claim(request)
                if sandbox.exited.done() or not self._state.has_given(number):
                    raise ClaimError(f"sandbox {sandbox.id} died while it was claimed")
            except ClaimError as error:
                if attempt == _CLAIM_ATTEMPTS:
                    why = await sandbox.with_cause(error)
                    raise LaunchError(f"{attempt} sandboxes in a row could not be claimed: {why}") from error
                logger.warning("pool %s: %s; trying the next one", self.image.name, error)
                self._handle(ClaimFailed(number))
            else:
                self._handle(ClaimSettled(number))
                return sandbox, source
        raise AssertionError("unreachable")

    def _handle(self, event: Event) -> None:
        for instruction in self._state.handle(event, self._now()):
            self._carry_out(instruction)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Start(sandbox_id, claim):
                mount = None if claim is None else self._waiting[claim].mount
                start = self._run(self._start(LaunchRequest(sandbox_id, self.image, mount)))
                self._starts[sandbox_id] = start
                start.add_done_callback(lambda _: self._starts.pop(sandbox_id, None))
            case Give(sandbox_id, claim, source):
                self._answer(claim, (self._sandboxes[sandbox_id], source))
            case Refuse(claim, reason):
                self._answer(claim, self._refusal(reason))
            case Evict(sandbox_id):
                self._figures.evictions += 1
                cause = SandboxExit(ExitCause.EVICTED)
                self._tell_evicted(self._sandboxes[sandbox_id], cause)
                self._removals[sandbox_id] = self._run(self._remove(sandbox_id, cause))
            case Remove(sandbox_id, known):
                told = self._causes.get(sandbox_id) or (None if known is None else SandboxExit(known))
                self._removals[sandbox_id] = self._run(self._remove(sandbox_id, told))
            case WakeAt(at):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = asyncio.get_running_loop().call_at(at, self._handle, Tick())
            case _:
                assert_never(instruction)

    def _answer(self, claim: int, answer: tuple[Sandbox, Source] | Exception) -> None:
        # Done already: its caller was cancelled this very moment, and will abandon what it was given.
        if not (future := self._waiting[claim].answer).done():
            future.set_result(answer)

    def _refusal(self, reason: Refusal) -> Exception:
        match reason:
            case Refusal.FULL:
                seconds = self._retry_after()
                return PoolFull(
                    f"all {self._state.maximum} places of {self.image.name!r} are taken and"
                    f" {self._state.waiting} claims wait already; try again in {seconds} s",
                    seconds,
                )
            case Refusal.STOPPED:
                return PoolStopped(f"the pool of {self.image.name!r} has been stopped")
            case Refusal.START_FAILED:
                # One exception for each claim: a shared one would collect the tracebacks of all their tasks.
                error = self._figures.last_error
                return LaunchError("no sandbox could be started") if error is None else type(error)(*error.args)
            case _:
                assert_never(reason)

    def _tell_evicted(self, sandbox: Sandbox, cause: SandboxExit) -> None:
        if self.on_evict is None:
            return
        try:
            self.on_evict(sandbox, cause)
        except Exception:
            logger.exception("pool %s: the holder of sandbox %s failed on its eviction", self.image.name, sandbox.id)

    async def _start(self, request: LaunchRequest) -> None:
        try:
            sandbox = await self._launching.launch(request, timeout=self._start_timeout)
        except LaunchError as error:
            self._start_failed(request, error)
        except Exception as error:
            logger.exception("pool %s: a start failed unexpectedly", self.image.name)
            self._start_failed(request, LaunchError(f"a sandbox could not be started: {error!r}"))
        else:
            self._take_in(sandbox)
            self._handle(Started(sandbox.id, sandbox.template))

    def _take_in(self, sandbox: Sandbox) -> None:
        """From here on the pool hears of its end, whoever brings it about."""
        self._sandboxes[sandbox.id] = sandbox
        sandbox.exited.add_done_callback(lambda _: self._handle(Exited(sandbox.id)))

    def _start_failed(self, request: LaunchRequest, error: LaunchError) -> None:
        logger.warning("pool %s: sandbox %s: %s", self.image.name, request.sandbox_id, error)
        self._figures.failed_starts += 1
        self._figures.last_error = error
        self._handle(StartFailed(request.sandbox_id))

    async def _remove(self, sandbox_id: str, cause: SandboxExit | None) -> None:
        """Destroy a sandbox, however often that takes: its place stays taken until the engine has confirmed it."""
        if (start := self._starts.get(sandbox_id)) is not None:
            start.cancel()
            await asyncio.wait([start])
        sandbox = self._sandboxes.get(sandbox_id)
        for failures in itertools.count(1):
            if sandbox is None:
                break
            try:
                await sandbox.destroy(cause)
                break
            except Exception as error:
                pause = sizing.backoff(failures)
                logger.error(
                    "pool %s: sandbox %s not removed, again in %g s: %r", self.image.name, sandbox_id, pause, error
                )
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._engine_back.wait()
        self._sandboxes.pop(sandbox_id, None)
        self._causes.pop(sandbox_id, None)
        self._removals.pop(sandbox_id, None)
        self._handle(Removed(sandbox_id))

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("pool %s: a task failed", self.image.name, exc_info=error)

    def _retry_after(self) -> int:
        return sizing.retry_after(self._state.waiting, self._state.stock.start_seconds, self._state.concurrency)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
