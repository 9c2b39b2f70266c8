"""KernelHolder: keeps one kernel's sandbox while its manager's own loop may stand still."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import secrets
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

from kernelprovisioner import held as hands
from kernelprovisioner.claims import Ending
from kernelprovisioner.death import DeathNotice
from kernelprovisioner.held import HeldSandbox, Wanted
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.monitor import KernelMonitor
from kernelprovisioner.relay import EndpointRelay
from kernelprovisioner.runtime import OwnerDirectory, RuntimeDirectoryError, RuntimeRoot
from kernelprovisioner.sandbox_exit import CellReference, ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorError, remaining_output
from kernelprovisioner.wire import WireError, first_of
from kernelprovisioner.workdir import WorkDirectory

#: Files of a sandbox that ends come out within this time, or stay in it. In seconds.
LAST_FILES_SECONDS = 5.0
_MONITOR_SECONDS = 10.0
_RELEASE_SECONDS = 30.0
_CAUSE_SECONDS = 6.0
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-]{1,36}")
_log = logging.getLogger(__name__)

Maker = Callable[[Wanted], Awaitable[HeldSandbox]]


class KernelHolder:
    """One kernel: its sandbox, its endpoints, its files. All methods run on the loop that made it.

    `returncode` is None while the kernel lives; it is set last, after its files have come out and its death was told.
    """

    def __init__(self, root: RuntimeRoot, kernel_id: str, key: bytes, work: WorkDirectory | None) -> None:
        self.link = link_of(root, kernel_id)
        self.ended = asyncio.Event()
        self.returncode: int | None = None
        self.exit: SandboxExit | None = None
        self.held: HeldSandbox | None = None
        self._root = root
        self._key = key
        self._work = work
        self._asked = False
        self._own: OwnerDirectory | None = None
        self._monitor: KernelMonitor | None = None
        self._relay: EndpointRelay | None = None
        self._notice: DeathNotice | None = None
        self._watching: asyncio.Task[None] | None = None
        self._bringing: asyncio.Task[None] | None = None
        self._changed = False

    async def start(self, make: Maker, wanted: Wanted) -> HeldSandbox:
        """Take a sandbox by `make`, fill its work directory, put it behind the kernel's endpoints.

        Raises what `make` raises, and LaunchError; `close` it then.
        """
        held = self.held = await make(wanted)
        try:
            if self._work is not None:
                await self._work.put(held.request)
            self._monitor = await KernelMonitor.connect(
                held.channels, self._key, self._cell_ended, timeout=_MONITOR_SECONDS
            )
        except (SupervisorError, WireError) as error:
            raise LaunchError(await _why_not_ready(held, error)) from None
        if held.transport == "ipc":
            self._point_to(held.directory)
        else:
            directory = self._own_directory()
            self._relay = EndpointRelay()
            await self._relay.start(directory, held.channels)
            self._point_to(directory)
        self._watching = asyncio.create_task(self._watch(held), name=f"holder of {held.sandbox_id}")
        return held

    async def shutdown_requested(self) -> None:
        """The manager has asked the kernel to shut down: its end is no death, and its files come out first."""
        self._asked = True
        await self._bring_last()

    async def kill(self, signum: int = signal.SIGKILL) -> None:
        """End the kernel, its last files first. For a kernel that has died already this changes nothing."""
        held = self.held
        if held is None or self.ended.is_set():
            return
        if not held.ended.done():
            self._asked = True
            await self._bring_last()
            await hands.signal(held, signum)
        if signum == signal.SIGKILL:
            # Where the supervisor does not answer any more, giving the sandbox up is what ends it.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    await self.ended.wait()
                    return
            await held.release()

    async def send_signal(self, signum: int) -> None:
        """Send a signal to the kernel's process group; SIGKILL and SIGTERM end it as `kill` does."""
        if signum in (signal.SIGKILL, signal.SIGTERM):
            await self.kill(signum)
        elif self.held is not None and not self.held.ended.done():
            await hands.signal(self.held, signum)

    async def wait(self) -> int:
        """Return the kernel's exit code (−n: signal n) once it has ended."""
        await self.ended.wait()
        return self.returncode or 0

    async def close(self) -> None:
        """Give everything up and leave nothing. May be called twice, and after a failed `start`."""
        if self._watching is not None and not self.ended.is_set() and self.held is not None:
            await self.kill()
        if self._watching is not None and self.ended.is_set():
            await asyncio.wait({self._watching}, timeout=_RELEASE_SECONDS)
        for task in (self._watching, self._bringing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._unlink()
        if self._notice is not None:
            await self._notice.close()
            self._notice = None
        if self._monitor is not None:
            await self._monitor.close()
            self._monitor = None
        if self._relay is not None:
            await self._relay.close()
            self._relay = None
        held, self.held = self.held, None
        if held is not None:
            await held.release()
        if self._work is not None:
            self._work.close()
            self._work = None
        if self._own is not None:
            await asyncio.to_thread(self._own.close)
            self._own = None
        self._end(-signal.SIGKILL)

    async def _watch(self, held: HeldSandbox) -> None:
        ending = self._with_cell(await asyncio.shield(held.ended))
        self.exit = ending.exit
        asked = self._asked or ending.exit.exit_code == 0
        files = asyncio.ensure_future(self._bring_last())
        try:
            if asked:
                self._unlink()
            else:
                fields = {"event": "exit", "sandbox": held.sandbox_id, **ending.exit.as_dict()}
                _log.warning("sandbox %s died: %s", held.sandbox_id, ending.exit, extra={"fields": fields})
                if ending.exit.cause is ExitCause.GATEWAY:
                    # Its kernel lives a moment longer, and clients would stay with it instead of hearing of its end.
                    await hands.signal(held, signal.SIGKILL)
                await self._tell(ending)
            await files
        finally:
            files.cancel()
            code, signum = ending.exit.exit_code, ending.exit.signal
            self._end(code if code is not None else -(signum or signal.SIGKILL))
        # Now, not at cleanup: a dead sandbox must not keep its place until somebody closes a tab.
        await held.release()

    def _end(self, returncode: int) -> None:
        if not self.ended.is_set():
            self.returncode = returncode
            self.ended.set()

    def _with_cell(self, ending: Ending) -> Ending:
        """The gateway does not hear the cells of a kernel that it does not talk to."""
        running = self._monitor.running(ending.unsent) if self._monitor is not None else []
        if ending.exit.cell is not None or not running:
            return ending
        cell = CellReference(str(running[0].header.get("msg_id")), running[0].execution_count)
        return dataclasses.replace(ending, exit=dataclasses.replace(ending.exit, cell=cell))

    async def _tell(self, ending: Ending) -> None:
        """Tell the death over the kernel's own endpoints; where that fails, `poll` still reports it."""
        monitor = self._monitor
        running = monitor.running(ending.unsent) if monitor is not None else []
        unheard = monitor.unheard() if monitor is not None else []
        unsent = remaining_output(ending.unsent, monitor.received if monitor is not None else set())
        try:
            directory = self._own_directory()
            self._notice = DeathNotice(directory, self._key, ending.exit)
            self._point_to(directory)
            await self._notice.tell(running, unsent, unheard)
        except (OSError, RuntimeDirectoryError, ValueError) as error:
            _log.error("the kernel's death could not be told at its endpoints: %s", error)

    def _cell_ended(self) -> None:
        self._changed = True
        if self._work is not None and (self._bringing is None or self._bringing.done()):
            self._bringing = asyncio.create_task(self._bring_after_cells())

    async def _bring_after_cells(self) -> None:
        while self._changed:
            self._changed = False
            try:
                await self._bring()
            except SupervisorError as error:
                # They are asked for once more when the kernel ends.
                _log.info("files of the sandbox could not be read: %s", error)

    async def _bring_last(self) -> None:
        try:
            async with asyncio.timeout(LAST_FILES_SECONDS):
                await self._bring()
        except TimeoutError:
            _log.warning("not all files came out of the sandbox within %g s", LAST_FILES_SECONDS)
        except SupervisorError as error:
            _log.warning("files that the last cells wrote may be lost: the sandbox could not be read: %s", error)

    async def _bring(self) -> None:
        if self._work is not None and self.held is not None:
            await self._work.bring_back(self.held.request)

    def _own_directory(self) -> Path:
        if self._own is None:
            self._own = self._root.owner_directory()
        return self._own.sandbox_directory(secrets.token_hex(8))

    def _point_to(self, directory: Path) -> None:
        """Move the kernel's link in one step: a client finds the old endpoints or the new ones."""
        temporary = self.link.with_name(f".{secrets.token_hex(8)}")
        os.symlink(directory, temporary)
        os.replace(temporary, self.link)

    def _unlink(self) -> None:
        # Before the manager's cleanup_ipc_files, which would delete through it.
        self.link.unlink(missing_ok=True)


async def _why_not_ready(held: HeldSandbox, error: Exception) -> str:
    """What ended a sandbox that was just taken is known a little later than that it does not answer."""
    await first_of(held.ended, timeout=_CAUSE_SECONDS)
    if held.ended.done():
        return f"the sandbox ended before it was ready: {held.ended.result().exit}"
    return f"the sandbox could not be made ready: {error}"


def link_of(root: RuntimeRoot, kernel_id: str) -> Path:
    """Return where a kernel's endpoints are; the id is a caller's string, so only a plain one becomes a name."""
    name = kernel_id if _SAFE_NAME.fullmatch(kernel_id) else hashlib.sha256(kernel_id.encode()).hexdigest()[:32]
    return root.links / name


def remove_dead_links(root: RuntimeRoot) -> None:
    """Remove links whose sandbox is gone: a process that was killed leaves its own."""
    for link in root.links.iterdir():
        with contextlib.suppress(OSError):
            if link.is_symlink() and not link.exists():
                link.unlink()
