"""Sandbox: one running container with one kernel process in it, its life cycle and why it ended."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import logging
import os
import signal
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from kernelprovisioner.causes import find_cause
from kernelprovisioner.exit_log import ExitEntry
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import Launched, LaunchError
from kernelprovisioner.records import SandboxRecord
from kernelprovisioner.sandbox_exit import CellReference, ExitCause, SandboxExit
from kernelprovisioner.supervisor import KernelExit, SupervisorClient
from kernelprovisioner.warming import prove
from kernelprovisioner.wire import KernelWire, Message, WireError, first_of

if TYPE_CHECKING:
    from kernelprovisioner.sandboxes import Sandboxes

_CLAIM_SECONDS = 5.0
_LAST_USE_SECONDS = 10.0
#: What ended a sandbox is known a little later than that it does not answer.
_CAUSE_SECONDS = 6.0

_log = logging.getLogger(__name__)


class SandboxState(enum.StrEnum):
    """`starting → warm → claimed → gone`; never back (a claimed sandbox is destroyed, never reused)."""

    STARTING = "starting"
    WARM = "warm"
    CLAIMED = "claimed"
    GONE = "gone"


#: The whole life cycle: every state may end in `gone`, nothing else goes back.
TRANSITIONS: dict[SandboxState, frozenset[SandboxState]] = {
    SandboxState.STARTING: frozenset({SandboxState.WARM, SandboxState.GONE}),
    SandboxState.WARM: frozenset({SandboxState.CLAIMED, SandboxState.GONE}),
    SandboxState.CLAIMED: frozenset({SandboxState.GONE}),
    SandboxState.GONE: frozenset(),
}


class ClaimError(Exception):
    """A warm sandbox could not be made personal; it is of no use any more."""


class ProbeError(Exception):
    """A sandbox did not answer a probe, or not with what is one."""


class EndedCell(msgspec.Struct):
    """How a cell ended: its request's header and what its reply said."""

    header: dict[str, str | int | float | bool | None]
    status: Literal["ok", "error", "aborted"]
    execution_count: int | None = None
    ename: str = ""
    evalue: str = ""
    traceback: list[str] = []


@dataclass(frozen=True)
class Probe:
    """What a kernel says of itself: the cell that runs (msg_id and number), the number of the next one.

    `ended` are cells whose end nobody may have heard.
    """

    running: str | None
    execution_count: int
    ended: Sequence[EndedCell] = ()
    running_count: int | None = None


class _ProbeReply(msgspec.Struct):
    status: str
    execution_count: int
    running: str | None = None
    running_count: int | None = None
    #: an older image's kernel does not tell
    ended: list[EndedCell] = []


@dataclass(frozen=True)
class ClaimRequest:
    """What makes a warm sandbox personal. `hold_ms`: shell requests wait that long after the first one (restart).

    `owner` and `holder` go into the sandbox's record: the pool's owner, and what whoever claims needs to come back
    after the gateway was lost (`{"kind": …, …}`, JSON).
    """

    kernel_id: str
    key: bytes
    env: Mapping[str, str] = field(default_factory=dict)
    session_name: str | None = None
    notice: str | None = None
    hold_ms: int = 0
    owner: str = ""
    holder: Mapping[str, Any] = field(default_factory=dict)


class Sandbox:
    """One sandbox, connected. Made by `Sandboxes.launch`; whoever holds it calls `destroy` in the end."""

    def __init__(
        self, launched: Launched, supervisor: SupervisorClient, wire: KernelWire, sandboxes: Sandboxes
    ) -> None:
        self.launched = launched
        self.supervisor = supervisor
        self.wire = wire
        self.state = SandboxState.STARTING
        self.exited: asyncio.Future[SandboxExit] = asyncio.get_running_loop().create_future()
        #: how the kernel process ended and what output it had not sent, where its supervisor could still tell
        self.kernel_exit: KernelExit | None = None
        #: its holder has sent what ends it: an end by that is no death
        self.end_asked = False
        #: as it is on disk, or on its way there; None until the sandbox is warm
        self.record: SandboxRecord | None = None
        #: tells the cell that runs in it; set by whoever runs one, as long as it runs
        self.running: Callable[[], CellReference | None] | None = None
        #: a holder that still reads the files of a sandbox that ended: `destroy` waits for it, bounded
        self.last_use: asyncio.Future[None] | None = None
        #: its record outlives it, for a holder that gets another one, until that holder calls `forget_record`
        self.record_stays = False
        self._sandboxes = sandboxes
        self._destroying: asyncio.Task[None] | None = None
        self._kept = False
        #: whether its kernel ended while no gateway was there
        self._ended_before = False
        self._recording: asyncio.Future[None] | None = None

    @property
    def id(self) -> str:
        return self.launched.sandbox_id

    @property
    def image(self) -> KernelImage:
        return self.launched.image

    @property
    def template(self) -> str | None:
        """What its image was built from, where that is known."""
        return self.launched.template

    @property
    def created_at(self) -> float:
        """When it became warm, in seconds since the epoch, however many gateways ago."""
        return time.time() if self.record is None else self.record.created_at

    @property
    def container_id(self) -> str:
        """The engine's id of the container, or `process:<pid>`."""
        return self.launched.runtime_id

    async def claim(self, request: ClaimRequest) -> None:
        """Make a warm sandbox personal: key, kernel id, environment. Raises ClaimError; then destroy it.

        The kernel answers under the new key, so that the answer itself proves who holds it.
        """
        if self.state is not SandboxState.WARM:
            raise ClaimError(f"sandbox {self.id} is {self.state}, not warm")
        self._move(SandboxState.CLAIMED)
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Message] = loop.create_future()

        def take(message: Message) -> None:
            if message.msg_type == "samovar_claim_reply" and not reply.done():
                reply.set_result(message)

        msg_id = self.wire.new_id()
        self.wire.listen(msg_id, take)
        content = {
            "key": request.key.decode(),
            "kernel_id": request.kernel_id,
            "env": dict(request.env),
            "session_name": request.session_name,
            "notice": request.notice,
            "hold_ms": request.hold_ms,
        }
        try:
            self.wire.send("control", "samovar_claim_request", content, msg_id=msg_id)
            self.wire.rekey(request.key)
            async with asyncio.timeout(_CLAIM_SECONDS):
                await first_of(reply, self.wire.closed, self.exited)
            if not reply.done():
                raise ClaimError(f"sandbox {self.id} died while it was claimed")
            answer = reply.result().content
            if answer.get("status") != "ok":
                raise ClaimError(f"sandbox {self.id} refused its claim: {str(answer.get('evalue'))[:200]}")
        except TimeoutError:
            raise ClaimError(f"sandbox {self.id} did not answer its claim within {_CLAIM_SECONDS:g} s") from None
        except WireError as error:
            raise ClaimError(str(error)) from None
        finally:
            self.wire.unlisten(msg_id)
            reply.cancel()
        self._note_claim(request)

    async def with_cause(self, error: ClaimError) -> str:
        """Return what a claim failed of, and what the sandbox died of where it did: that is known a little later."""
        if not self.wire.closed.done():
            return str(error)
        await first_of(self.exited, timeout=_CAUSE_SECONDS)
        return f"{error}: {self.exited.result()}" if self.exited.done() else str(error)

    async def probe(self, *, timeout: float) -> Probe:
        """Ask the kernel what it does; it answers beside a cell that runs. Raises ProbeError after `timeout` seconds.

        No answer does not prove a dead kernel: code that keeps Python's lock for itself delays it.
        """
        try:
            message = await self.wire.request("control", "samovar_probe_request", {}, timeout=timeout)
            reply = message.content_as(_ProbeReply)
        except TimeoutError:
            raise ProbeError(f"sandbox {self.id} did not answer a probe within {timeout:g} s") from None
        except WireError as error:
            raise ProbeError(f"sandbox {self.id} could not be probed: {error}") from None
        if reply.status != "ok":
            raise ProbeError(f"sandbox {self.id} refused a probe")
        return Probe(reply.running, reply.execution_count, reply.ended, reply.running_count)

    async def hand_over(self) -> None:
        """Close our own shell, iopub and stdin channels: somebody else talks to the kernel directly now."""
        await self.wire.close(("shell", "iopub", "stdin"))

    async def interrupt(self) -> None:
        """Interrupt what runs, children included. Raises SupervisorError where the sandbox is gone.

        Through the supervisor: a kernel's own control thread can be starved by the cell that has to be interrupted.
        """
        await self.supervisor.signal(signal.SIGINT)

    async def destroy(self, cause: SandboxExit | None = None) -> None:
        """End the sandbox; returns once its container is confirmed to be gone. Idempotent.

        `cause` is what `exited` tells, unless the sandbox had died by itself before.
        """
        task = self._destroying
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            # A removal that failed (the engine was away) is tried again by whoever asks next.
            self._kept = self._sandboxes.keeping and not self.exited.done()
            self._end(cause or SandboxExit(ExitCause.REQUESTED))
            task = self._destroying = self._sandboxes.run(self._destroy())
        # Shielded: a caller that is cancelled must not leave half a sandbox behind.
        await asyncio.shield(task)

    async def _destroy(self) -> None:
        if self.last_use is not None and not self._kept:
            await asyncio.wait({self.last_use}, timeout=_LAST_USE_SECONDS)
        await self.wire.close()
        self.supervisor.close()
        if not self._kept:
            if not self.record_stays:
                self._sandboxes.records.remove(self.id)
            await self._sandboxes.launcher.destroy(self.launched)
        self._sandboxes.forget(self)

    def _end(self, cause: SandboxExit) -> None:
        if self.state is not SandboxState.GONE:
            self._move(SandboxState.GONE)
        if self.exited.done():
            return
        if self.end_asked and cause.cause in (ExitCause.EXITED, ExitCause.SIGNAL):
            cause = dataclasses.replace(cause, cause=ExitCause.REQUESTED)
        if cause.cell is None and self.running is not None:
            cause = dataclasses.replace(cause, cell=self.running())
        # Not of one that only changes its host.
        if not self._kept:
            session = self.record.kernel_id if self.record is not None and self.record.state == "claimed" else ""
            self._sandboxes.exits.add(ExitEntry(self.id, self.image.name, session, cause))
        self.exited.set_result(cause)

    def _move(self, state: SandboxState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"sandbox {self.id} cannot go from {self.state} to {state}")
        self.state = state

    async def warm(self) -> None:
        """Return once the kernel has answered and run one silent cell; then its directory loses its write bit."""
        await prove(self.wire)
        if self.launched.transport == "ipc":
            os.chmod(self.launched.directory, stat.S_IRUSR | stat.S_IXUSR | 0o055)
        await self._sandboxes.launcher.warmed(self.launched)
        self._move(SandboxState.WARM)
        self.record = SandboxRecord.of(self.launched, time.time())
        records = self._sandboxes.records
        await records.written(records.write(self.record))

    async def become(self, record: SandboxRecord, timeout: float) -> None:
        """Become what the record says. A warm one has to answer: its key proves that nobody claimed it since."""
        self.record = record
        self._ended_before = self.supervisor.exited.done()
        self._move(SandboxState.WARM)
        if record.state == "claimed":
            self._move(SandboxState.CLAIMED)
            return
        try:
            await self.probe(timeout=timeout)
        except ProbeError as error:
            raise LaunchError(f"it cannot be taken over: {error}") from None

    def _note_claim(self, request: ClaimRequest) -> None:
        """Begin to write the record of a claim that was acknowledged; `recorded` waits for it.

        A gateway that dies before it is written finds a warm record whose key opens nothing, and reaps the sandbox. One
        that goes meanwhile gets none: its record is being removed.
        """
        if self.record is None or self.state is SandboxState.GONE:
            return
        self.record = msgspec.structs.replace(
            self.record,
            state="claimed",
            key=request.key.decode(),
            claimed_at=time.time(),
            kernel_id=request.kernel_id,
            owner=request.owner,
            holder=dict(request.holder),
        )
        self._recording = self._sandboxes.records.write(self.record)

    async def note_holder(self, holder: Mapping[str, Any]) -> None:
        """Write anew what the record says of the holder; returns once it is on disk. One without a record has none."""
        if self.record is not None and self.record.state == "claimed" and self.state is not SandboxState.GONE:
            self.record = msgspec.structs.replace(self.record, holder=dict(holder))
            self._recording = self._sandboxes.records.write(self.record)
            await self.recorded()

    async def recorded(self) -> None:
        """Return once the claim's record is on disk: before it, nobody is told of a sandbox to come back to."""
        if self._recording is not None:
            await self._sandboxes.records.written(self._recording)

    def forget_record(self) -> None:
        """Begin to remove the record that outlived the sandbox, behind all that was to be written before."""
        self.record_stays = False
        self._sandboxes.records.remove(self.id)

    async def watch(self, container_ended: asyncio.Future[SandboxExit]) -> None:
        """Find out why the sandbox ends."""
        cause = await find_cause(
            self.launched,
            self.supervisor,
            self.wire.closed,
            container_ended,
            self._sandboxes.launcher,
            heard=not self._ended_before,
        )
        if self.supervisor.exited.done():
            self.kernel_exit = self.supervisor.exited.result()
        self._end(cause)
