"""KernelRegistry: the kernels of Jupyter clients that come by HTTP: who may see which, their start and their end."""

from __future__ import annotations

import asyncio
import builtins
import math
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus

from gateway.culling import CullBounds, Culling
from gateway.errors import Detail, RequestError, too_busy
from gateway.holdings import Holdings, shutting_down
from gateway.kernel import BUSY, Channels, Kernel
from gateway.kernel_bounds import LifeBounds
from gateway.kernel_life import KernelLife
from gateway.kernelspecs import KernelSpecs
from kernelprovisioner.environment import allowed_in, denied
from kernelprovisioner.sandbox import Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorError
from kernelprovisioner.wire import first_of

#: How long a dead kernel is told of, in seconds, and how many of each owner are.
DEAD_SECONDS = 600.0
MAX_DEAD = 1000
#: What a client that gives up after KERNEL_LAUNCH_TIMEOUT seconds needs to get our answer before.
_ANSWER_SECONDS = 5.0
#: How long after its idle status the reply to a cell may come, in seconds, where the gateway stops.
_LAST_REPLY_SECONDS = 2.0
_SHUT_DOWN = "The kernel was shut down."


class KernelRegistry:
    """All kernels of this gateway, scoped by owner."""

    def __init__(
        self,
        holdings: Holdings,
        specs: KernelSpecs,
        make_channels: Callable[[], Channels],
        *,
        life_bounds: LifeBounds | None = None,
        cull_bounds: CullBounds | None = None,
    ) -> None:
        """`make_channels` makes those of each new kernel."""
        self._holdings = holdings
        self._specs = specs
        self.make_channels = make_channels
        self._cull_bounds = cull_bounds or CullBounds()
        self._kernels: dict[tuple[str, str], Kernel] = {}
        self._expiries: dict[Kernel, asyncio.TimerHandle] = {}
        self._life = KernelLife(holdings, life_bounds or LifeBounds(), make_channels, self._buried, self._end_later)
        #: started and stopped by whoever runs the gateway
        self.culling = Culling(self._cull_bounds, self.everything, self._cull)
        self.started = datetime.now(UTC)

    def find(self, owner: str, kernel_id: str) -> Kernel:
        """The owner's kernel of that id, dead ones included. Raises RequestError (404)."""
        kernel = self._kernels.get((owner, kernel_id))
        if kernel is None:
            text = f"Kernel does not exist: {kernel_id[:80]}"
            raise RequestError(HTTPStatus.NOT_FOUND, "kernel_not_found", text)
        return kernel

    def list(self, owner: str) -> builtins.list[Kernel]:
        """The owner's kernels, oldest first, dead ones included."""
        return [kernel for kernel in self._kernels.values() if kernel.owner == owner]

    def everything(self) -> builtins.list[Kernel]:
        """The kernels of all owners, oldest first."""
        return [*self._kernels.values()]

    async def start(
        self,
        owner: str,
        *,
        name: str | None = None,
        path: str | None = None,
        env: Mapping[str, str] | None = None,
        kernel_id: str | None = None,
        cancelled: asyncio.Future[None] | None = None,
    ) -> Kernel:
        """Start a kernel of the kernelspec `name` (default: the default one) and return it.

        `env`: JPY_SESSION_NAME names its notebook; KERNEL_LAUNCH_TIMEOUT says when its client gives up. `kernel_id`: a
        UUID that the client chose. `cancelled` is done when the client has gone.

        Raises RequestError (400, 409; 429, 503: see `Holdings.claim`) and Cancelled.
        """
        if self._life.sandboxes.closed.done():
            raise shutting_down()
        spec = self._specs.resolve(name)
        key = owner, _checked_id(kernel_id) if kernel_id is not None else str(uuid.uuid4())
        if key in self._kernels:
            raise RequestError(HTTPStatus.CONFLICT, "kernel_exists", f"You have a kernel with this id: {key[1]}")
        env = env or {}
        kernel = Kernel(
            owner,
            key[1],
            spec.name,
            spec.image.name,
            self.make_channels(),
            path,
            {name: value for name, value in allowed_in(spec.image, env).items() if not denied(name)},
            env.get("JPY_SESSION_NAME"),
        )
        self._life.open(kernel)
        self._kernels[key] = kernel
        try:
            await self._life.begin(kernel, self._seconds(env.get("KERNEL_LAUNCH_TIMEOUT")), cancelled)
        except BaseException:
            self._forget(kernel)
            await self._life.end(kernel, _SHUT_DOWN)
            raise
        return kernel

    async def interrupt(self, kernel: Kernel) -> None:
        """Interrupt what runs in the kernel. Raises RequestError (503) where that does not get through."""
        try:
            await self._life.interrupt(kernel)
        except SupervisorError as error:
            raise too_busy(f"The kernel could not be interrupted: {error}.", 1) from None

    async def restart(self, kernel: Kernel) -> None:
        """A new sandbox behind the same id, also for a dead kernel; returns when it is ready.

        Raises RequestError (404, 429, 503); then the kernel is dead, and may be restarted again.
        """
        if self._life.sandboxes.closed.done():
            raise shutting_down()
        # From here on it is not forgotten for its death; should it fail, it has died anew.
        self._keep(kernel)
        await self._life.restart(kernel)

    async def shutdown(self, kernel: Kernel) -> None:
        """End a kernel: its id is unknown at once, its sandbox is gone when this returns (or 30 s have passed)."""
        self._forget(kernel)
        await self._life.end(kernel, _SHUT_DOWN)

    async def note(self, kernel: Kernel) -> None:
        """Write down the kernel's notebook sessions for the next gateway."""
        if kernel.sandbox is not None:
            await kernel.sandbox.note_holder(kernel.holder)

    async def drain(self, timeout: float, hurry: asyncio.Event) -> None:
        """Begin nothing any more; return once no kernel runs a cell, after `timeout` s, or on `hurry`."""
        self._close()
        deadline = asyncio.get_running_loop().time() + timeout
        hurrying = asyncio.create_task(hurry.wait())
        while any(kernel.execution_state == BUSY for kernel in self._kernels.values()) and not hurry.is_set():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            self._life.changed.clear()
            changed = asyncio.create_task(self._life.changed.wait())
            await first_of(changed, hurrying, timeout=left)
            changed.cancel()
            await asyncio.gather(changed, return_exceptions=True)
        hurrying.cancel()
        await asyncio.gather(hurrying, return_exceptions=True)
        last = asyncio.get_running_loop().time() + _LAST_REPLY_SECONDS
        while any(kernel.channels.answering for kernel in self._kernels.values()) and not hurry.is_set():
            if asyncio.get_running_loop().time() > last:
                break
            await asyncio.sleep(0.01)

    async def stop(self, timeout: float, *, keep: bool = False) -> None:
        """Tell all clients and hang up; `keep`: the kernels run on for the next gateway. At most `timeout` seconds.

        Idempotent. Before the pools stop.
        """
        self._close()
        self.culling.stop()
        for expiry in self._expiries.values():
            expiry.cancel()
        self._expiries.clear()
        kernels = self.everything()
        self._kernels.clear()
        await asyncio.gather(*(self._life.leave(kernel, keep=keep) for kernel in kernels))
        await self._life.tasks.ended(timeout)

    def restore(self, kernel: Kernel, sandbox: Sandbox) -> None:
        """Keep a kernel that an earlier gateway had, with the sandbox that was adopted for it."""
        self._kernels[kernel.owner, kernel.id] = kernel
        self._life.open(kernel)
        self._life.take_up(kernel, sandbox)

    def restore_dead(self, kernel: Kernel, exit_: SandboxExit) -> None:
        """Keep a kernel that an earlier gateway had and whose sandbox was lost: it is dead, and says why."""
        self._kernels[kernel.owner, kernel.id] = kernel
        self._life.lost(kernel, exit_)

    def _close(self) -> None:
        if not self._life.sandboxes.closed.done():
            self._life.sandboxes.closed.set_result(None)

    def _seconds(self, launch_timeout: str | None) -> float:
        """How long a start may wait in line: no longer than whoever waits for it."""
        try:
            seconds = float(launch_timeout or "nan")
        except ValueError:
            seconds = math.nan
        line = self._holdings.line_timeout
        return line if not math.isfinite(seconds) else max(1.0, min(line, seconds - _ANSWER_SECONDS))

    def _cull(self, kernel: Kernel) -> None:
        limit = self._cull_bounds.idle_timeout
        exit_ = SandboxExit(ExitCause.IDLE, evidence={"limit_seconds": limit})
        unused = f"{limit / 60:g} minutes" if limit >= 120 else f"{limit:g} s"
        self._life.cull(kernel, f"The kernel was not used for {unused} and was shut down.", exit_)

    def _end_later(self, kernel: Kernel) -> None:
        self._forget(kernel)
        self._life.end_later(kernel, _SHUT_DOWN)

    def _buried(self, kernel: Kernel) -> None:
        """A kernel is dead: it is told of for a while, unless its owner has too many."""
        self._keep(kernel)
        self._expiries[kernel] = asyncio.get_running_loop().call_later(DEAD_SECONDS, self._forget, kernel)
        dead = [each for each in self._expiries if each.owner == kernel.owner]
        if len(dead) > MAX_DEAD:
            self._forget(dead[0])

    def _keep(self, kernel: Kernel) -> None:
        """The kernel lives again, or has died anew."""
        expiry = self._expiries.pop(kernel, None)
        if expiry is not None:
            expiry.cancel()

    def _forget(self, kernel: Kernel) -> None:
        self._keep(kernel)
        key = kernel.owner, kernel.id
        if self._kernels.get(key) is kernel:
            del self._kernels[key]


def _checked_id(kernel_id: str) -> str:
    """Return the id if it is a UUID as Python writes it. Raises RequestError (400)."""
    try:
        if str(uuid.UUID(kernel_id)) == kernel_id:
            return kernel_id
    except ValueError:
        pass
    text = "kernel_id: it has to be a UUID in lower case, like 6f1c2f0e-…"
    raise RequestError(HTTPStatus.BAD_REQUEST, "validation", text, details=[Detail("kernel_id", text, "invalid")])
