"""Run one cell in a sandbox: collect its outputs until idle and reply, hold its limits, give exactly one result."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.outputs import CellError, ErrorContent, OutputCollector, cell_error
from kernelprovisioner.sandbox import Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorError, remaining_output
from kernelprovisioner.wire import Message, WireError, first_of

#: How long the idle status may come after the reply, and the end of the channels after the end of the kernel.
_TRAILING_SECONDS = 2.0
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


async def run_cell(sandbox: Sandbox, cell: Cell, limits: CellLimits, cancelled: asyncio.Future[None]) -> CellResult:
    """Run `cell` and return its result, whatever happens to it.

    `cancelled` being done means that nobody waits any more. Where the result's note has an exit, the sandbox is of no
    use any more, and the caller releases it.
    """
    run = _Run(limits, sandbox.wire.new_id())
    sandbox.wire.listen(run.msg_id, run.take)
    try:
        return await _run(sandbox, cell, limits, cancelled, run)
    finally:
        sandbox.wire.unlisten(run.msg_id)


async def _run(
    sandbox: Sandbox, cell: Cell, limits: CellLimits, cancelled: asyncio.Future[None], run: _Run
) -> CellResult:
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
    await first_of(run.finished, sandbox.exited, cancelled, timeout=cell.timeout)
    status: Status | None = None
    note: ExitNote | None = None
    if not run.finished.done() and not sandbox.exited.done():
        if run.replied:
            # The reply is there and only the idle status is missing: nothing runs that could be interrupted.
            await first_of(run.finished, sandbox.exited, timeout=_TRAILING_SECONDS)
            return run.result()
        status, cause, subject = _reason(cell, gone=cancelled.done())
        if not await _interrupted(sandbox, run, limits.grace):
            killed = SandboxExit(ExitCause.TIME_LIMIT, evidence={"limit_seconds": cell.timeout})
            text = (
                f"{subject}, and the cell did not heed the interrupt within {limits.grace:g} s: its sandbox was "
                "killed; the session's variables and files are lost."
            )
            return run.result(status, ExitNote(cause, text, killed))
        note = ExitNote(cause, f"{subject}: the cell was interrupted; the session keeps its variables and files.")
    if not run.finished.done():
        return await _died(sandbox, run, SandboxExit(ExitCause.PROTOCOL))
    return run.result(status, note)


def _reason(cell: Cell, *, gone: bool) -> tuple[Status, str, str]:
    if gone:
        return Status.CANCELLED, "cancelled", "The client went away"
    return Status.TIMEOUT, ExitCause.TIME_LIMIT, f"The cell passed its time limit of {cell.timeout:g} s"


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
    cause = sandbox.exited.result() if sandbox.exited.done() else fallback
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

    def __init__(self, limits: CellLimits, msg_id: str) -> None:
        self.msg_id = msg_id
        self.outputs = OutputCollector(max_bytes=limits.max_output_bytes, max_outputs=limits.max_outputs)
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.replied = False
        self._idle = False
        self._status = Status.OK
        self._error: CellError | None = None
        self._execution_count: int | None = None

    def take(self, message: Message) -> None:
        try:
            if message.channel == "iopub":
                self._take_output(message)
            elif message.channel == "shell" and message.msg_type == "execute_reply":
                self._take_reply(message)
        except WireError as error:
            _log.debug("message of a cell dropped: %s", error)
        if self._idle and self.replied and not self.finished.done():
            self.finished.set_result(None)

    def _take_output(self, message: Message) -> None:
        if message.msg_type == "status":
            self._idle = self._idle or message.content_as(_StatusContent).execution_state == "idle"
        else:
            self.outputs.take(message)

    def _take_reply(self, message: Message) -> None:
        self.replied = True
        try:
            content = message.content_as(_ReplyContent)
        except WireError:
            content = _ReplyContent()
        self._execution_count = content.execution_count
        if content.status == "error":
            self._status, self._error = Status.ERROR, cell_error(content)
        elif content.status != "ok":
            self._status = Status.ERROR
            self._error = CellError("Aborted", "The kernel did not run the cell.", ())

    def result(self, status: Status | None = None, note: ExitNote | None = None) -> CellResult:
        return CellResult(status or self._status, self.outputs, self._execution_count, self._error, note)
