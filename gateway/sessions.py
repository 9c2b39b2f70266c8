"""Session and SessionRegistry: what users hold on to, who finds which, and one cell at a time in each."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, TypeVar

from gateway.errors import RequestError, too_busy
from gateway.execution import Cell, CellLimits, CellResult, ExitNote, Status, run_cell
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.pool import ClaimTimeout, PoolFull, PoolStopped, SandboxPool
from kernelprovisioner.sandbox import ClaimError, ClaimRequest, Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.wire import first_of

#: Requests that may wait for one session's turn.
MAX_WAITING = 64
#: Sessions without a sandbox that are remembered, so that their next call can say what happened.
MAX_WITHOUT_SANDBOX = 1000

_SHUTTING_DOWN = "The gateway is shutting down."
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Cancelled(Exception):
    """The client went away while its request still waited; there is nobody to answer."""


@dataclass(eq=False)
class Session:
    """One session of one owner: at most one sandbox at a time. It outlives its sandbox."""

    owner: str
    image: str
    user_id: str | None = None
    entity_id: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    last_activity: datetime = field(default_factory=lambda: datetime.now(UTC))
    sandbox: Sandbox | None = None
    #: where its sandbox came from: warm, started, cold
    source: str | None = None
    #: how its last sandbox ended, until its next cell has said so
    last_exit: SandboxExit | None = None
    executions: int = 0
    waiting: int = 0
    deleted: bool = False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def state(self) -> str:
        """`busy` (a cell runs or waits), `idle` (holds a sandbox) or `cold` (its next cell claims one)."""
        if self.waiting or self.turn.locked():
            return "busy"
        return "idle" if self.sandbox is not None else "cold"


@dataclass(frozen=True)
class Execution:
    """A cell that was run: its result, and where."""

    session: Session
    result: CellResult
    container_id: str | None
    source: str | None


class SessionRegistry:
    """All sessions of this gateway, scoped by owner; runs cells in them with sandboxes of the pools."""

    def __init__(self, pools: Mapping[str, SandboxPool], limits: CellLimits, *, line_timeout: float) -> None:
        """`line_timeout`: seconds that a request may wait, first for its session's turn, then for a sandbox."""
        self._pools = pools
        self._limits = limits
        self._line_timeout = line_timeout
        # In order of creation; the newest of an entity is looked for from the end.
        self._sessions: dict[tuple[str, str], Session] = {}
        self._by_sandbox: dict[str, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._active = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        for pool in pools.values():
            pool.on_evict = self._evicted

    def find(self, owner: str, session_id: str) -> Session | None:
        """The owner's session of that id."""
        return self._sessions.get((owner, session_id))

    def list(self, owner: str) -> list[Session]:
        """The owner's sessions, oldest first."""
        return [session for session in self._sessions.values() if session.owner == owner]

    def resolve(
        self, owner: str, *, session_id: str | None, user_id: str | None, entity_id: str | None
    ) -> Session | None:
        """The session that an /exec request means: the named one, else the newest of its entity and user.

        A request that names another user than the session's does not find it.
        """
        if session_id is not None:
            session = self.find(owner, session_id)
            if session is not None and user_id in (None, session.user_id):
                return session
        if entity_id is not None:
            for session in reversed(self._sessions.values()):
                if (session.owner, session.user_id, session.entity_id) == (owner, user_id, entity_id):
                    return session
        return None

    def add(self, session: Session) -> Session:
        """Keep a new session; the oldest ones without a sandbox are forgotten past a bound."""
        self._sessions[session.owner, session.id] = session
        if len(self._sessions) > MAX_WITHOUT_SANDBOX + len(self._by_sandbox):
            cold = [key for key, known in self._sessions.items() if known.state == "cold" and known is not session]
            for key in cold[: max(0, len(cold) - MAX_WITHOUT_SANDBOX)]:
                del self._sessions[key]
        return session

    async def execute(self, session: Session, cell: Cell, cancelled: asyncio.Future[None]) -> Execution:
        """Run a cell in its session, after those that came before it, and return what came of it.

        Raises RequestError (busy, deleted, no sandbox can be started) and Cancelled.
        """
        if self._draining:
            raise too_busy(_SHUTTING_DOWN, 5)
        if session.waiting >= MAX_WAITING:
            raise too_busy(f"{MAX_WAITING} requests wait for this session already.", 5)
        self._active += 1
        self._quiet.clear()
        session.waiting += 1
        asked = time.monotonic()
        try:
            try:
                await _unless(cancelled, session.turn.acquire(), self._line_timeout)
            except TimeoutError:
                raise too_busy(f"The session was busy for {self._line_timeout:g} s.", 10) from None
            finally:
                session.waiting -= 1
            try:
                return await self._execute(session, cell, cancelled, asked)
            finally:
                session.turn.release()
                session.last_activity = datetime.now(UTC)
        finally:
            if not session.executions and not session.waiting and session.sandbox is None:
                # Its first cell never ran: nobody has heard of this session.
                self._sessions.pop((session.owner, session.id), None)
            self._active -= 1
            self._now_quiet()

    async def delete(self, session: Session) -> None:
        """End a session: its running cell is answered with the cause, its sandbox is gone when this returns."""
        session.deleted = True
        self._sessions.pop((session.owner, session.id), None)
        if session.sandbox is not None:
            await self._pools[session.image].release(session.sandbox, SandboxExit(ExitCause.REQUESTED))

    async def drain(self, timeout: float, hurry: asyncio.Event) -> None:
        """Take no more cells; return once those that were accepted have ended, after `timeout` s, or on `hurry`."""
        self._draining = True
        waits = [asyncio.create_task(event.wait()) for event in (self._quiet, hurry)]
        await first_of(*waits, timeout=timeout)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    async def _execute(self, session: Session, cell: Cell, cancelled: asyncio.Future[None], asked: float) -> Execution:
        got_turn = time.monotonic()
        if session.deleted:
            if session.sandbox is not None:
                # It went while this request got its turn, when nobody else was to say so.
                self._lose(session, session.sandbox, SandboxExit(ExitCause.REQUESTED), told=True)
            raise _deleted()
        pool = self._pools[session.image]
        sandbox = session.sandbox
        if sandbox is not None and sandbox.exited.done():
            self._lose(session, sandbox, sandbox.exited.result(), told=False)
            sandbox = None
        if sandbox is None:
            sandbox = await self._claim(session, pool, cancelled)
            source = session.source
        else:
            source = "held"
        if session.deleted:
            self._lose(session, sandbox, SandboxExit(ExitCause.REQUESTED), told=True)
            raise _deleted()
        pool.touch(sandbox.id, None)
        ready = time.monotonic()
        session.executions += 1
        result = await run_cell(sandbox, cell, self._limits, cancelled)
        ended = time.monotonic()
        result.timings = {
            "turn_ms": _ms(got_turn - asked),
            "claim_ms": _ms(ready - got_turn),
            "run_ms": _ms(ended - ready),
            "total_ms": _ms(ended - asked),
        }
        if session.deleted and result.status is Status.DIED:
            result.note = ExitNote(ExitCause.REQUESTED, "The session was deleted while its cell ran.")
        if result.status is Status.CANCELLED and session.executions == 1 and session.entity_id is None:
            # Its id was told to nobody, so nobody can come back to it.
            session.deleted = True
            self._sessions.pop((session.owner, session.id), None)
            self._lose(session, sandbox, SandboxExit(ExitCause.REQUESTED), told=True)
        elif result.note is not None and result.note.exit is not None:
            self._lose(session, sandbox, result.note.exit, told=result.status is not Status.CANCELLED)
        elif sandbox.exited.done():
            # It ended with its last cell: exit() answers first and ends then.
            self._lose(session, sandbox, sandbox.exited.result(), told=False)
        elif session.sandbox is sandbox:
            pool.touch(sandbox.id, asyncio.get_running_loop().time())
        return Execution(session, result, sandbox.container_id, source)

    async def _claim(self, session: Session, pool: SandboxPool, cancelled: asyncio.Future[None]) -> Sandbox:
        request = ClaimRequest(
            kernel_id=session.id,
            key=secrets.token_hex(32).encode(),
            env=session.env,
            notice=_notice(session.last_exit),
        )
        claiming = pool.claim(session.owner, request, timeout=self._line_timeout)
        try:
            claim = await _unless(cancelled, claiming)
        except (PoolFull, ClaimTimeout) as error:
            raise too_busy(_sentence(error), error.retry_after) from None
        except PoolStopped:
            raise too_busy(_SHUTTING_DOWN, 5) from None
        except (LaunchError, ClaimError) as error:
            raise RequestError(
                HTTPStatus.SERVICE_UNAVAILABLE, "no_sandbox", f"No sandbox can be started: {error}", retry_after=10
            ) from None
        sandbox = claim.sandbox
        session.sandbox, session.source, session.last_exit = sandbox, str(claim.source), None
        self._by_sandbox[sandbox.id] = session
        sandbox.exited.add_done_callback(lambda _: self._exited(session, sandbox))
        return sandbox

    def _exited(self, session: Session, sandbox: Sandbox) -> None:
        """A sandbox died; while a cell runs in it, the cell's own end tells."""
        if session.sandbox is sandbox and not session.turn.locked():
            self._lose(session, sandbox, sandbox.exited.result(), told=False)

    def _evicted(self, sandbox: Sandbox, cause: SandboxExit) -> None:
        session = self._by_sandbox.pop(sandbox.id, None)
        if session is not None and session.sandbox is sandbox:
            session.sandbox, session.last_exit = None, cause

    def _lose(self, session: Session, sandbox: Sandbox, cause: SandboxExit, *, told: bool) -> None:
        """The session's sandbox is of no use any more: give it back, and remember why if nobody was told."""
        if self._by_sandbox.pop(sandbox.id, None) is None:
            return
        if session.sandbox is sandbox:
            session.sandbox = None
            session.last_exit = None if told else cause
        self._own(self._pools[session.image].release(sandbox, cause))

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        self._quiet.clear()
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._now_quiet()

    def _now_quiet(self) -> None:
        if not self._active and not self._tasks:
            self._quiet.set()


async def _unless(cancelled: asyncio.Future[None], work: Awaitable[T], timeout: float | None = None) -> T:
    """Return what `work` returns. Raises Cancelled once `cancelled` is done, TimeoutError after `timeout` seconds.

    Work that succeeds at the same moment counts: what it got is not lost.
    """
    task = asyncio.ensure_future(work)
    try:
        await first_of(task, cancelled, timeout=timeout)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    if not task.cancelled():
        return task.result()
    if cancelled.done():
        raise Cancelled
    raise TimeoutError


def _deleted() -> RequestError:
    return RequestError(HTTPStatus.NOT_FOUND, "session_not_found", "The session was deleted meanwhile.")


def _notice(exit: SandboxExit | None) -> str | None:
    if exit is None:
        return None
    return f"[samovar: {exit} This is a new sandbox: the session's former variables and files are gone.]\n"


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
