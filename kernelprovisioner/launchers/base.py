"""Launcher: what makes and destroys sandboxes' containers (or plain processes)."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kernelprovisioner.images import KernelImage
from kernelprovisioner.runtime import OwnerDirectory
from kernelprovisioner.sandbox_exit import SandboxExit


class LaunchError(Exception):
    """A sandbox could not be started; the text says what failed and what to do."""


class EngineUnavailable(LaunchError):
    """The container engine does not answer."""


@dataclass(frozen=True)
class LaunchRequest:
    """What a launcher needs to know to start one sandbox.

    `mount` is a host directory that becomes the work directory itself (instead of a size-limited tmpfs).
    """

    sandbox_id: str
    image: KernelImage
    mount: Path | None = None


@dataclass(frozen=True)
class Endpoint:
    """Where one socket of a sandbox is reached from the host: a path (ipc) or host and port (tcp)."""

    path: Path | None = None
    host: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class Launched:
    """A sandbox whose container runs. Channel names: shell iopub stdin control hb; `supervisor` beside them.

    `directory` is the sandbox's runtime directory on the host (ipc sockets `k-1` … `k-5`, `sup`).
    """

    sandbox_id: str
    image: KernelImage
    runtime_id: str  # container id, or "process:<pid>"
    directory: Path
    work_directory: str  # as the sandbox sees it
    key: bytes  # the warm key: signs messages until the claim
    token: str  # opens the supervisor's socket
    supervisor: Endpoint
    channels: dict[str, Endpoint]
    transport: str = "ipc"
    isolated: bool = True
    template: str | None = None  # hash of image and settings that it was launched with; None where that is not known


ExitCallback = Callable[[str, SandboxExit], None]
"""Called with sandbox id and cause, on the loop, once for each sandbox whose container (PID 1) ended.

Not for one that `destroy()` ends, nor for one whose `launch()` failed; it may come before `launch()` has returned to
its caller."""


class Launcher(abc.ABC):
    """Makes and destroys sandboxes. All methods may be called concurrently; none blocks the loop."""

    name: str
    #: called on the loop when the engine answers again after it was away
    on_back: Callable[[], None] | None = None

    @property
    @abc.abstractmethod
    def owner(self) -> OwnerDirectory:
        """The owner directory, from `start()` to `stop()`. Raises RuntimeError before and after."""

    @property
    def available(self) -> bool:
        """Whether sandboxes can be started, as far as is known: the engine answered last time."""
        return True

    @abc.abstractmethod
    async def start(self, on_exit: ExitCallback, *, resume: bool = False) -> None:
        """Connect, reap what dead owners left, begin to watch for exits. Raises EngineUnavailable.

        With `resume` our owner directory is marked as a gateway's, and is that of a gateway that died, where there is
        one: what it left stays until `adopt()` or `settle()`.
        """

    @abc.abstractmethod
    async def adopt(self, launched: Launched) -> None:
        """Take over a sandbox of the owner that we continue. Raises LaunchError where it does not run any more."""

    @abc.abstractmethod
    async def discard(self, sandbox_id: str) -> None:
        """Remove what is left of one sandbox, adopted or not; what cannot be removed yet is tried again later."""

    @abc.abstractmethod
    async def settle(self) -> None:
        """After `start(resume=True)`: remove everything of our owner that was neither launched nor adopted by us."""

    @abc.abstractmethod
    async def template(self, image: KernelImage) -> str | None:
        """Return the template that a launch would carry now; None where that cannot be told (no image, no engine)."""

    @abc.abstractmethod
    async def launch(self, request: LaunchRequest) -> Launched:
        """Start one sandbox and return once its container runs (its kernel may still be starting).

        Raises LaunchError; whatever was half made is gone by then.
        """

    @abc.abstractmethod
    async def warmed(self, launched: Launched) -> None:
        """The sandbox is warm: give it its full share of CPU. Never raises for one that died meanwhile.

        Not at the claim: an engine takes longer to change a share than a first cell takes to run.
        """

    @abc.abstractmethod
    async def destroy(self, launched: Launched) -> None:
        """Remove container and runtime directory; returns once the engine has confirmed it. Idempotent."""

    @abc.abstractmethod
    def was_out_of_memory(self, launched: Launched, within: float) -> bool:
        """Whether a process of the sandbox was killed at the memory limit in the last `within` seconds.

        The kernel may die of it while PID 1 lives on, and then no container ends; Sandbox asks here for the cause.
        A process that died of it earlier (a child) says nothing about the kernel.
        """

    @abc.abstractmethod
    async def stop(self, give_up: asyncio.Event | None = None, *, keep: bool = False) -> list[str]:
        """Remove what is left, stop watching and release all that start() took.

        Once `give_up` is set no removal is waited for. Returns the sandboxes that stay; the next start reaps them.
        With `keep` nothing is removed: all sandboxes stay for a gateway that continues as this owner.
        """
