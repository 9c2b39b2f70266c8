"""KeyedCalls: a call with an Idempotency-Key runs its cell at most once, however often it is sent.

Also where its client, or the gateway, is lost in between: the store on disk tells what was sent to a kernel before.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from gateway.answer_store import AnswerStore, KeptCall, KeyedCall, SentCell, StoreError
from gateway.cancellation import Cancelled
from gateway.errors import Detail, RequestError, invalid_field, too_busy
from gateway.execution import CellLimits, CellResult, ExitNote, Status
from gateway.outputs import OutputCollector, to_json
from gateway.session import Execution, Followed, Sending, Session
from gateway.sessions import SessionRegistry
from kernelprovisioner.sandbox import Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.wire import first_of

HEADER = "Idempotency-Key"
#: The kinds of calls that may have a key: POST /exec, POST /api/v1/execute.
EXEC = "exec"
EXECUTE = "execute"
_MAX_KEY = 255
#: Calls with a key that are under way: they go on when their clients hang up, so that connections do not bound them.
MAX_UNDER_WAY = 1000
_log = logging.getLogger(__name__)

Run = Callable[[asyncio.Future[None], Sending | None], Awaitable[Execution]]
"""Runs a call's cell: takes what is done when nobody waits for it any more, and what is to happen before it is sent."""
Shape = Callable[[Execution], Mapping[str, Any]]


@dataclass(frozen=True)
class _UnderWay:
    fingerprint: bytes
    task: asyncio.Task[bytes]


def keyed_call(owner: str, key: str | None, kind: str, request: msgspec.Struct) -> KeyedCall | None:
    """The call that a request with the header `key` is; None without one. Raises RequestError where it is no key.

    Two requests are the same call where they say the same, however their JSON is written.
    """
    if key is None:
        return None
    if not 1 <= len(key) <= _MAX_KEY or not key.isascii() or not key.isprintable():
        raise invalid_field(HEADER, f"needs 1 to {_MAX_KEY} printable ASCII characters")
    said = kind.encode() + b"\n" + msgspec.json.encode(request, order="deterministic")
    return KeyedCall(owner, key, kind, hashlib.sha256(said).digest())


class KeyedCalls:
    """Runs calls that have a key, each once; a repeated one waits for the first, or gets the answer that it had."""

    def __init__(
        self,
        store: AnswerStore,
        shapes: Mapping[str, Shape],
        sessions: SessionRegistry,
        *,
        gateway: str,
        limits: CellLimits,
        lives: Callable[[str], Awaitable[bool]],
    ) -> None:
        """`shapes` makes the answer of each kind of call. `gateway` names this one, by its owner directory; `lives`
        tells whether another one that shares the data directory does."""
        self._store = store
        self.shapes = shapes
        self._sessions = sessions
        self._gateway = gateway
        self._limits = limits
        self._lives = lives
        self._under_way: dict[tuple[str, str], _UnderWay] = {}

    async def answer(self, call: KeyedCall, run: Run, cancelled: asyncio.Future[None]) -> bytes:
        """Return the call's answer as JSON; `run` runs its cell, unless that was done before.

        Raises Cancelled when `cancelled` is done before (the cell runs on), and RequestError.
        """
        under_way = self._under_way.get(call.place)
        if under_way is None:
            if len(self._under_way) >= MAX_UNDER_WAY:
                raise too_busy(f"{MAX_UNDER_WAY} calls with an {HEADER} are under way already.", 5)
            under_way = self._begin(call, self._answer(call, run))
        elif under_way.fingerprint != call.fingerprint:
            raise _another_call()
        await first_of(under_way.task, cancelled)
        if not under_way.task.done():
            raise Cancelled
        if under_way.task.cancelled():
            raise too_busy("The gateway is shutting down.", 5)
        return under_way.task.result()

    async def resume(self, followed: Mapping[str, asyncio.Task[Followed | None]]) -> None:
        """At the start: settle the calls that this gateway had sent before it was lost.

        `followed`: for the id of each sandbox that was adopted, the cell that may still run in it. A retry of the call
        that sent it is answered when it has ended; all others have died.
        """
        try:
            unanswered = await self._store.unanswered(self._gateway)
        except StoreError as error:
            # Each retry asks the store again.
            _log.error("calls that were sent before the gateway was lost cannot be looked up: %s", error)
            return
        for kept in unanswered:
            self._begin(kept.call, self._record(kept.call, self._ending(kept, followed.get(kept.cell.sandbox_id))))

    async def _ending(self, kept: KeptCall, task: asyncio.Task[Followed | None] | None) -> Execution:
        found = None
        if task is not None:
            await asyncio.wait({task})
            found = None if task.cancelled() or task.exception() is not None else task.result()
        if found is not None and found.msg_id == kept.cell.msg_id:
            return found.execution
        return await _lost(self._sessions, kept, self._limits)

    async def stop(self, timeout: float) -> None:
        """Wait until what is under way is recorded, at most `timeout` seconds, and close the store. May come twice."""
        tasks = [each.task for each in self._under_way.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._store.close()

    def _begin(self, call: KeyedCall, work: Coroutine[Any, Any, bytes]) -> _UnderWay:
        task = asyncio.create_task(work, name="call with a key")
        under_way = self._under_way[call.place] = _UnderWay(call.fingerprint, task)

        def ended(_: asyncio.Task[bytes]) -> None:
            del self._under_way[call.place]
            # Its clients may all be gone: then nobody else asks for the exception.
            if not task.cancelled():
                task.exception()

        task.add_done_callback(ended)
        return under_way

    async def _answer(self, call: KeyedCall, run: Run) -> bytes:
        try:
            kept = await self._store.find(call)
        except StoreError as error:
            raise _no_store(error) from None
        if kept is None:
            # A client that hangs up may ask again: its cell runs on.
            nobody: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            return await self._record(call, run(nobody, self._sending(call)))
        if kept.call.fingerprint != call.fingerprint:
            raise _another_call()
        if kept.answer is not None:
            return kept.answer
        if kept.cell.gateway != self._gateway and await self._lives(kept.cell.gateway):
            raise RequestError(
                HTTPStatus.CONFLICT,
                "running_elsewhere",
                "Another gateway that shares the data directory runs this call now; ask it.",
                retry_after=5,
            )
        return await self._record(call, _lost(self._sessions, kept, self._limits))

    def _sending(self, call: KeyedCall) -> Sending:
        async def sending(session: Session, sandbox: Sandbox, msg_id: str) -> None:
            cell = SentCell(self._gateway, session.id, sandbox.id, sandbox.container_id, msg_id)
            try:
                await self._store.sent(call, cell)
            except StoreError as error:
                raise _no_store(error) from None

        return sending

    async def _record(self, call: KeyedCall, ending: Awaitable[Execution]) -> bytes:
        execution = await ending
        answer = to_json(self.shapes[call.kind](execution))
        if execution.result.left:
            # Its end is still to come: the next gateway tells of it.
            return answer
        try:
            await self._store.answered(call, answer)
        except StoreError as error:
            _log.error("an answer was given and not recorded, so that a retry will not get it: %s", error)
        return answer


async def _lost(sessions: SessionRegistry, kept: KeptCall, limits: CellLimits) -> Execution:
    """What a retry gets of a cell whose gateway was lost with its answer."""
    owner, cell = kept.call.owner, kept.cell
    session = sessions.find(owner, cell.session_id)
    survived = session is not None and session.sandbox is not None and session.sandbox.id == cell.sandbox_id
    text = "The gateway was lost after it had sent this cell to its sandbox: whether the cell ran to its end is not"
    if survived:
        note = ExitNote(ExitCause.GATEWAY, f"{text} known, its output is lost. The session keeps its variables.")
    else:
        lost = SandboxExit(ExitCause.GATEWAY)
        note = ExitNote(ExitCause.GATEWAY, f"{text} known, its output is lost, and so is its sandbox.", lost)
    outputs = OutputCollector(max_bytes=limits.max_output_bytes, max_outputs=limits.max_outputs)
    result = CellResult(Status.DIED, outputs, note=note)
    return Execution(session or Session(owner, "", id=cell.session_id), result, cell.container_id, None)


def _another_call() -> RequestError:
    text = "was used for another request; a new request needs a new one"
    return RequestError(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "idempotency_key_reused",
        f"This {HEADER} {text}.",
        details=[Detail(HEADER, text, "reused")],
    )


def _no_store(error: StoreError) -> RequestError:
    _log.error("a call with an %s was refused, since it could not be recorded: %s", HEADER, error)
    return RequestError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "not_recorded",
        f"The call did not run: without a record nothing would keep it from running twice ({error}).",
        retry_after=10,
    )
