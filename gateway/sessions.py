"""SessionRegistry: all sessions, who finds which, and one cell at a time in each."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from gateway.cancellation import Closed, unless
from gateway.errors import RequestError, too_busy
from gateway.execution import Cell, CellLimits, CellResult, ExitNote, Status, Waiting, follow_cell, run_cell
from gateway.holdings import Holdings, shutting_down
from gateway.idle import IdleBounds, IdleSessions
from gateway.notices import how_it_ended, new_sandbox
from gateway.pace import Pace
from gateway.session import Execution, Followed, Sending, Session
from kernelprovisioner.pool import PoolClaim
from kernelprovisioner.sandbox import ClaimRequest, Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.standing import Standing
from kernelprovisioner.wire import first_of

#: Requests that may wait for one session's turn.
MAX_WAITING = 64
#: Sessions without a sandbox that are remembered, so that their next call can say what happened.
MAX_WITHOUT_SANDBOX = 1000

_log = logging.getLogger(__name__)


class SessionRegistry:
    """All sessions of this gateway, scoped by owner; runs cells in them with sandboxes of the pools."""

    def __init__(self, holdings: Holdings, limits: CellLimits, *, idle_bounds: IdleBounds | None = None) -> None:
        """A request may wait for its session's turn as long as it may then wait for a sandbox."""
        self._holdings = holdings
        self._pools = holdings.pools
        self._limits = limits
        self._line_timeout = holdings.line_timeout
        # In order of creation; the newest of an entity is looked for from the end.
        self._sessions: dict[tuple[str, str], Session] = {}
        self._by_sandbox: dict[str, Session] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        #: started and stopped by whoever runs the gateway
        self.idle = IdleSessions(idle_bounds or IdleBounds(), lambda: list(self._by_sandbox.values()), self._give_up)
        self._pace = Pace()
        self._active = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        #: done when no more cells are begun
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: done when running cells are to be left to the next gateway
        self._leaving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        holdings.make_room = self._make_room
        for pool in holdings.pools.values():
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

    async def execute(
        self, session: Session, cell: Cell, cancelled: asyncio.Future[None], sending: Sending | None = None
    ) -> Execution:
        """Run a cell in its session, after those that came before it, and return what came of it.

        Raises RequestError (a limit, busy, deleted, no sandbox can be started), Cancelled, and what `sending` raises.
        """
        try:
            if self._closed.done():
                raise shutting_down()
            if session.waiting >= MAX_WAITING:
                raise too_busy(f"{MAX_WAITING} requests wait for this session already.", 5)
            with self._holdings.reservations.execution(session.owner):
                return await self._in_turn(session, cell, cancelled, sending)
        finally:
            if not session.executions and session.state == "cold":
                # Its first cell never ran: nobody has heard of this session.
                self._sessions.pop((session.owner, session.id), None)

    async def _in_turn(
        self, session: Session, cell: Cell, cancelled: asyncio.Future[None], sending: Sending | None
    ) -> Execution:
        session.came_back |= session.executions > 0 or session.state == "busy"
        self._active += 1
        self._quiet.clear()
        session.waiting += 1
        asked = time.monotonic()
        try:
            try:
                await unless(cancelled, self._closed, session.turn.acquire(), self._line_timeout)
            except Closed:
                raise shutting_down() from None
            except TimeoutError:
                raise too_busy(f"The session was busy for {self._line_timeout:g} s.", 10) from None
            finally:
                session.waiting -= 1
            session.idle_since = None
            try:
                return await self._execute(session, cell, cancelled, asked, sending)
            finally:
                session.turn.release()
                session.last_activity = datetime.now(UTC)
        finally:
            self._active -= 1
            self._now_quiet()

    async def delete(self, session: Session) -> None:
        """End a session: its running cell is answered with the cause, its sandbox is gone when this returns."""
        session.deleted = True
        self._sessions.pop((session.owner, session.id), None)
        if session.sandbox is not None:
            await self._pools[session.image].release(session.sandbox, SandboxExit(ExitCause.REQUESTED))

    async def drain(self, timeout: float, hurry: asyncio.Event) -> None:
        """Begin no more cells; return once those that run have ended, after `timeout` s, or on `hurry`."""
        self._close()
        waits = [asyncio.create_task(event.wait()) for event in (self._quiet, hurry)]
        await first_of(*waits, timeout=timeout)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    def restore(self, session: Session, sandbox: Sandbox, timeout: float) -> asyncio.Task[Followed | None]:
        """Keep a session that an earlier gateway had, with the sandbox that was adopted for it.

        A cell that still runs in it has the session's turn until its end, for `timeout` seconds at most, and the
        session's next cell says how it ended. Nobody needs to wait for the task, whose result is that cell.
        """
        self.add(session)
        self._hold(session, sandbox)
        task = asyncio.create_task(self._follow(session, sandbox, timeout), name=f"follow {session.id}")
        self._keep_track(task)
        return task

    def leave(self) -> None:
        """Answer running cells now and let them run on; the next gateway follows them. Takes no more cells."""
        self._close()
        if not self._leaving.done():
            self._leaving.set_result(None)

    def _close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    async def stop(self, timeout: float) -> None:
        """Whatever is still under way ends with its sandbox, or runs on in it; at most `timeout` seconds."""
        self.leave()
        await self.drain(timeout, asyncio.Event())

    async def _follow(self, session: Session, sandbox: Sandbox, timeout: float) -> Followed | None:
        pool = self._pools[session.image]
        began = time.monotonic()
        async with session.turn:
            pool.touch(sandbox.id, None, session.standing)
            nobody: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            cell = await follow_cell(sandbox, timeout, self._limits, Waiting(nobody, self._leaving))
            session.executions = max(session.executions, cell.executions or 0)
            result = cell.result
            if result is not None and (cell.msg_id or result.status is not Status.DIED) and not result.left:
                session.notice = how_it_ended(result)
            if result is not None and result.note is not None and result.note.exit is not None:
                self._lose(session, sandbox, result.note.exit, told=False)
            else:
                self._after(session, sandbox, None)
        if result is None:
            return None
        session.last_activity = datetime.now(UTC)
        seconds = _ms(time.monotonic() - began)
        result.timings = {"turn_ms": 0.0, "wait_ms": 0.0, "claim_ms": 0.0, "run_ms": seconds, "total_ms": seconds}
        return Followed(cell.msg_id, Execution(session, result, sandbox.container_id, "held"))

    async def _execute(
        self,
        session: Session,
        cell: Cell,
        cancelled: asyncio.Future[None],
        asked: float,
        sending: Sending | None,
    ) -> Execution:
        got_turn = time.monotonic()
        if self._leaving.done():
            raise shutting_down()
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
        waited = 0.0
        if sandbox is None:
            claim = await self._claim(session, cancelled)
            sandbox, source, waited = claim.sandbox, session.source, claim.waited
        else:
            source = "held"
        if session.deleted:
            self._lose(session, sandbox, SandboxExit(ExitCause.REQUESTED), told=True)
            raise _deleted()
        pool.touch(sandbox.id, None, session.standing)
        ready = time.monotonic()
        msg_id = sandbox.wire.new_id()
        if sending is not None:
            try:
                await sending(session, sandbox, msg_id)
            except BaseException:
                self._after(session, sandbox, None)
                raise
        session.executions += 1
        notice, session.notice = session.notice, ""
        waiting = Waiting(cancelled, self._leaving)
        async with self._pace.place():
            began = time.monotonic()
            result = await run_cell(sandbox, cell, self._limits, waiting, msg_id=msg_id, notice=notice)
        if source != "held":
            # Written while the cell ran: whoever gets this answer may come back, also to the next gateway.
            await sandbox.recorded()
        ended = time.monotonic()
        result.timings = {
            "turn_ms": _ms(got_turn - asked),
            "wait_ms": _ms(waited + began - ready),
            "claim_ms": _ms(ready - got_turn - waited),
            "run_ms": _ms(ended - began),
            "total_ms": _ms(ended - asked),
        }
        if session.deleted and result.status is Status.DIED:
            result.note = ExitNote(ExitCause.REQUESTED, "The session was deleted while its cell ran.")
        if result.status is Status.CANCELLED and session.executions == 1 and session.entity_id is None:
            # Its id was told to nobody, so nobody can come back to it.
            session.deleted = True
            self._sessions.pop((session.owner, session.id), None)
            self._lose(session, sandbox, SandboxExit(ExitCause.REQUESTED), told=True)
        else:
            self._after(session, sandbox, result)
        return Execution(session, result, sandbox.container_id, source)

    def _after(self, session: Session, sandbox: Sandbox, result: CellResult | None) -> None:
        """No cell runs any more: the sandbox is idle, or lost."""
        if result is not None and result.note is not None and result.note.exit is not None:
            self._lose(session, sandbox, result.note.exit, told=result.status is not Status.CANCELLED)
        elif sandbox.exited.done():
            # It ended with its last cell: exit() answers first and ends then.
            self._lose(session, sandbox, sandbox.exited.result(), told=False)
        elif session.sandbox is sandbox:
            self._idle(session)

    async def _claim(self, session: Session, cancelled: asyncio.Future[None]) -> PoolClaim:
        request = ClaimRequest(
            kernel_id=session.id,
            key=secrets.token_hex(32).encode(),
            env=session.env,
            notice=new_sandbox(session.last_exit),
            holder=session.holder,
        )
        claim = await self._holdings.claim(
            session.owner, session.image, request, cancelled=cancelled, closed=self._closed, standing=session.standing
        )
        session.source, session.last_exit = str(claim.source), None
        self._hold(session, claim.sandbox)
        return claim

    def _make_room(self, owner: str) -> None:
        """At the owner's limit: the idle session that nobody came back to, and was used longest ago, is given up."""
        room = self._holdings.room(owner)
        held = [session for session in self._by_sandbox.values() if session.owner == owner]
        passing = [one for one in held if one.standing is Standing.PASSING and one.state == "idle"]
        if room is not None and room <= 0 and passing:
            oldest = min(passing, key=lambda session: session.idle_since or 0.0)
            limit = {"limit_sessions": self._holdings.reservations.bounds.sessions}
            self._give_up(oldest, SandboxExit(ExitCause.EVICTED, evidence=limit))

    def _idle(self, session: Session) -> None:
        """The session holds a sandbox and does nothing with it from now on."""
        if session.sandbox is not None:
            session.idle_since = asyncio.get_running_loop().time()
            self._pools[session.image].touch(session.sandbox.id, session.idle_since, session.standing)

    def _give_up(self, session: Session, cause: SandboxExit) -> None:
        """An idle session loses its sandbox, and its next call says why."""
        if session.sandbox is not None and session.state == "idle":
            self._lose(session, session.sandbox, cause, told=False)

    def _hold(self, session: Session, sandbox: Sandbox) -> None:
        session.sandbox = sandbox
        self._holdings.hold(session.owner, sandbox)
        self._by_sandbox[sandbox.id] = session
        sandbox.exited.add_done_callback(lambda _: self._exited(session, sandbox))

    def _exited(self, session: Session, sandbox: Sandbox) -> None:
        """A sandbox died; while a cell runs in it, the cell's own end tells."""
        if session.sandbox is sandbox and not session.turn.locked():
            self._lose(session, sandbox, sandbox.exited.result(), told=False)

    def _evicted(self, sandbox: Sandbox, cause: SandboxExit) -> None:
        session = self._by_sandbox.pop(sandbox.id, None)
        self._holdings.let_go(sandbox)
        if session is not None and session.sandbox is sandbox:
            session.sandbox, session.last_exit = None, cause

    def _lose(self, session: Session, sandbox: Sandbox, cause: SandboxExit, *, told: bool) -> None:
        """The session's sandbox is of no use any more: give it back, and remember why if nobody was told."""
        if self._by_sandbox.pop(sandbox.id, None) is None:
            return
        self._holdings.let_go(sandbox)
        if session.sandbox is sandbox:
            session.sandbox = None
            session.last_exit = None if told else cause
        self._own(self._pools[session.image].release(sandbox, cause))

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        self._keep_track(asyncio.create_task(work))

    def _keep_track(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        self._quiet.clear()
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._now_quiet()

    def _now_quiet(self) -> None:
        if not self._active and not self._tasks:
            self._quiet.set()


def _deleted() -> RequestError:
    return RequestError(HTTPStatus.NOT_FOUND, "session_not_found", "The session was deleted meanwhile.")


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
