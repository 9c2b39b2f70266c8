"""Run one cell in a sandbox, or follow one that runs: its outputs until its end, its limits, exactly one result."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from gateway.outputs import CellError, ErrorContent, OutputCollector, cell_error
from kernelprovisioner.sandbox import ProbeError, Sandbox
from kernelprovisioner.sandbox_exit import CellReference, ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorError, remaining_output
from kernelprovisioner.wire import Message, WireError, first_of

#: How long the idle status may come after the reply, and the end of the channels after the end of the kernel.
_TRAILING_SECONDS = 2.0
#: How often a kernel is asked whether a followed cell still runs, and how long it may take to say so, in seconds.
_ASKING_SECONDS = 2.0
_PROBE_SECONDS = 5.0
_MAX_ID = 256
_MISSED = "[samovar: the gateway was lost while this cell ran: what it had written until then is lost]\n"
_LEFT = "The gateway stopped while the cell ran: it goes on in its sandbox, and what it writes from now on is lost."
_log = logging.getLogger(__name__)


class Status(enum.StrEnum):
    """How a cell ended."""

    OK = "ok"
    ERROR = "error"  # it raised
    TIMEOUT = "timeout"  # it passed its time limit
    DIED = "died"  # its sandbox did not survive it
    CANCELLED = "cancelled"  # its client went away


@dataclass(frozen=True)
class Cell:
    """What is to be run. `timeout` in seconds."""

    code: str
    timeout: float
    argv: Sequence[str] | None = None
    store_history: bool = True
    stop_on_error: bool = True


@dataclass(frozen=True)
class CellLimits:
    """Bounds on one cell: seconds it has to heed an interrupt, bytes and number of its outputs."""

    grace: float
    max_output_bytes: int
    max_outputs: int


@dataclass(frozen=True)
class ExitNote:
    """Why a cell did not end by itself, in words; `exit` is set where its sandbox is lost."""

    cause: str
    text: str
    exit: SandboxExit | None = None


@dataclass
class CellResult:
    """What came of a cell."""

    status: Status
    outputs: OutputCollector
    execution_count: int | None = None
    error: CellError | None = None
    note: ExitNote | None = None
    timings: dict[str, float] = field(default_factory=dict)
    #: it runs on, and the next gateway follows it: this is not its end
    left: bool = False


@dataclass(frozen=True)
class Waiting:
    """What ends the waiting for a cell: `cancelled` (nobody waits any more), `leaving` (the cell is to run on)."""

    cancelled: asyncio.Future[None]
    leaving: asyncio.Future[None]


async def run_cell(
    sandbox: Sandbox, cell: Cell, limits: CellLimits, waiting: Waiting, *, msg_id: str, notice: str = ""
) -> CellResult:
    """Run `cell` and return its result, whatever happens to it.

    `notice` comes before its output on standard error. Where the result's note has an exit, the sandbox is of no use
    any more, and the caller releases it.
    """
    run = _Run(limits, msg_id)
    run.outputs.write("stderr", notice)
    sandbox.wire.listen(run.msg_id, run.take)
    sandbox.running = run.reference
    try:
        return await _run(sandbox, cell, limits, waiting, run)
    finally:
        sandbox.running = None
        sandbox.wire.unlisten(run.msg_id)


@dataclass(frozen=True)
class FollowedCell:
    """What an earlier gateway's sandbox ran: its request's id, and what came of it; None: nothing ran any more.

    `msg_id` is "", and `executions` (how many cells it has run, this one included) None, where the kernel did not tell.
    """

    msg_id: str
    result: CellResult | None
    executions: int | None


async def follow_cell(sandbox: Sandbox, timeout: float, limits: CellLimits, waiting: Waiting) -> FollowedCell:
    """Wait for the end of the cell that an earlier gateway has sent, if one runs. `timeout`: seconds from now.

    Its reply goes to a connection that is no more: its end is the idle status, or the kernel's word that it does not
    run any more. The result has what it writes from now on.
    """
    run = _Run(limits, "", followed=True)
    sandbox.running = run.reference
    asking = asyncio.create_task(_ask_until_over(sandbox, run), name="ask for a cell's end")
    try:
        result = await _until_end(sandbox, timeout, limits, waiting, run)
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        sandbox.running = None
        sandbox.wire.unlisten(run.msg_id)
    return FollowedCell(run.msg_id, None if run.absent else result, run.executions)


async def _ask_until_over(sandbox: Sandbox, run: _Run) -> None:
    """Find out what runs, and end the run when that does not run any more, also where its idle status was missed."""
    while True:
        try:
            probe = await sandbox.probe(timeout=_PROBE_SECONDS)
        except ProbeError as error:
            # Code that does not let go of the interpreter lock: its time limit ends it.
            _log.debug("sandbox %s does not say what it runs: %s", sandbox.id, error)
            await asyncio.sleep(_ASKING_SECONDS)
            continue
        # Said by the sandbox: an id that we have not made ourselves is none.
        # The count is the next cell's, also while a cell runs.
        run.executions = max(0, probe.execution_count - 1)
        running = probe.running if probe.running and len(probe.running) <= _MAX_ID else None
        if not run.msg_id and running is not None:
            run.msg_id, run.execution_count = running, max(1, run.executions)
            run.outputs.write("stderr", _MISSED)
            sandbox.wire.listen(run.msg_id, run.take)
            # Asked again at once: it may have ended before we listened.
            continue
        if running is None or running != run.msg_id:
            run.absent = not run.msg_id
            await first_of(run.finished, timeout=0 if run.absent else _TRAILING_SECONDS)
            run.end()
            return
        await asyncio.sleep(_ASKING_SECONDS)


async def _run(sandbox: Sandbox, cell: Cell, limits: CellLimits, waiting: Waiting, run: _Run) -> CellResult:
    content = {
        "code": cell.code,
        "silent": False,
        "store_history": cell.store_history,
        "user_expressions": {},
        "allow_stdin": False,
        "stop_on_error": cell.stop_on_error,
    }
    metadata: Mapping[str, Any] = {} if cell.argv is None else {"samovar": {"argv": list(cell.argv)}}
    try:
        sandbox.wire.send("shell", "execute_request", content, metadata=metadata, msg_id=run.msg_id)
    except WireError as error:
        # The channels closed just now: why, the sandbox is about to know.
        await first_of(sandbox.exited, timeout=_TRAILING_SECONDS + 1)
        return await _died(sandbox, run, SandboxExit(ExitCause.PROTOCOL, evidence={"reason": str(error)}))
    return await _until_end(sandbox, cell.timeout, limits, waiting, run)


async def _until_end(sandbox: Sandbox, timeout: float, limits: CellLimits, waiting: Waiting, run: _Run) -> CellResult:
    await first_of(run.finished, sandbox.exited, waiting.cancelled, waiting.leaving, timeout=timeout)
    status: Status | None = None
    note: ExitNote | None = None
    if waiting.leaving.done() and not run.finished.done():
        result = run.result(Status.DIED, ExitNote(ExitCause.GATEWAY, _LEFT))
        result.left = True
        return result
    if not run.finished.done() and not sandbox.exited.done():
        if run.replied:
            # The reply is there and only the idle status is missing: nothing runs that could be interrupted.
            await first_of(run.finished, sandbox.exited, timeout=_TRAILING_SECONDS)
            return run.result()
        status, cause, subject = _reason(timeout, gone=waiting.cancelled.done())
        if not await _interrupted(sandbox, run, limits.grace):
            killed = SandboxExit(ExitCause.TIME_LIMIT, evidence={"limit_seconds": timeout}, cell=run.reference())
            text = (
                f"{subject}, and the cell did not heed the interrupt within {limits.grace:g} s: its sandbox was "
                "killed; the session's variables and files are lost."
            )
            return run.result(status, ExitNote(cause, text, killed))
        note = ExitNote(cause, f"{subject}: the cell was interrupted; the session keeps its variables and files.")
    if not run.finished.done():
        return await _died(sandbox, run, SandboxExit(ExitCause.PROTOCOL))
    return run.result(status, note)


def _reason(timeout: float, *, gone: bool) -> tuple[Status, str, str]:
    if gone:
        return Status.CANCELLED, "cancelled", "The client went away"
    return Status.TIMEOUT, ExitCause.TIME_LIMIT, f"The cell passed its time limit of {timeout:g} s"


async def _interrupted(sandbox: Sandbox, run: _Run, grace: float) -> bool:
    """Interrupt the cell; return whether it has ended (or its sandbox has) within the grace period."""
    deadline = asyncio.get_running_loop().time() + grace
    try:
        async with asyncio.timeout(grace):
            await sandbox.interrupt()
    except (SupervisorError, TimeoutError) as error:
        _log.info("sandbox %s could not be interrupted: %s", sandbox.id, error)
    await first_of(run.finished, sandbox.exited, timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
    return run.finished.done() or sandbox.exited.done()


async def _died(sandbox: Sandbox, run: _Run, fallback: SandboxExit) -> CellResult:
    """The result of a cell whose sandbox ended: what it had printed, also what had not left it, and why."""
    cause = sandbox.exited.result() if sandbox.exited.done() else replace(fallback, cell=run.reference())
    # What the dead kernel had sent may still be on its way; it comes before what it had not.
    await sandbox.wire.drained("iopub", timeout=_TRAILING_SECONDS)
    if sandbox.kernel_exit is not None:
        for record in remaining_output(sandbox.kernel_exit.unsent, run.outputs.stream_ids, run.msg_id):
            run.outputs.write(record["name"], record["text"])
    return run.result(Status.DIED, ExitNote(cause.cause, str(cause), cause))


class _StatusContent(msgspec.Struct):
    execution_state: str


class _ReplyContent(ErrorContent):
    status: str = ""
    execution_count: int | None = None


class _Run:
    """What is known of a running cell; fed by the wire, so nothing here may raise or wait."""

    def __init__(self, limits: CellLimits, msg_id: str, *, followed: bool = False) -> None:
        """`followed`: somebody else gets the reply."""
        self.msg_id = msg_id
        self.outputs = OutputCollector(max_bytes=limits.max_output_bytes, max_outputs=limits.max_outputs)
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.replied = False
        self.execution_count: int | None = None
        #: of a followed one: how many cells there were, and whether none of them runs any more
        self.executions: int | None = None
        self.absent = False
        self._followed = followed
        self._is_idle = False
        self._status = Status.OK
        self._error: CellError | None = None

    def take(self, message: Message) -> None:
        try:
            if message.channel == "iopub":
                self._take_output(message)
            elif message.channel == "shell" and message.msg_type == "execute_reply":
                self._take_reply(message)
        except WireError as error:
            _log.debug("message of a cell dropped: %s", error)
        if self._is_idle and (self.replied or self._followed):
            self.end()

    def reference(self) -> CellReference | None:
        """Which cell it is; None as long as that is not known."""
        return CellReference(self.msg_id, self.execution_count) if self.msg_id else None

    def end(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)

    def _take_output(self, message: Message) -> None:
        if message.msg_type == "status":
            self._is_idle = self._is_idle or message.content_as(_StatusContent).execution_state == "idle"
            return
        if message.msg_type == "execute_input":
            # A cell that does not live to its reply has its number from here.
            self.execution_count = message.content_as(_ReplyContent).execution_count
        elif self._followed and message.msg_type == "error":
            self._status, self._error = Status.ERROR, cell_error(message.content_as(ErrorContent))
        self.outputs.take(message)

    def _take_reply(self, message: Message) -> None:
        self.replied = True
        try:
            content = message.content_as(_ReplyContent)
        except WireError:
            content = _ReplyContent()
        self.execution_count = content.execution_count
        if content.status == "error":
            self._status, self._error = Status.ERROR, cell_error(content)
        elif content.status != "ok":
            self._status = Status.ERROR
            self._error = CellError("Aborted", "The kernel did not run the cell.", ())

    def result(self, status: Status | None = None, note: ExitNote | None = None) -> CellResult:
        return CellResult(status or self._status, self.outputs, self.execution_count, self._error, note)
