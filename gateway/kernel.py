"""Kernel: what a Jupyter client holds on to. Its id and its channels outlive its sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from gateway.notebook_session import NotebookSession
from kernelprovisioner.sandbox import EndedCell, Sandbox
from kernelprovisioner.sandbox_exit import CellReference, SandboxExit

#: the kind of a record's holder that is one of these
KERNEL = "kernel"

STARTING, IDLE, BUSY, RESTARTING, DEAD = "starting", "idle", "busy", "restarting", "dead"


class Channels(Protocol):
    """What a kernel's life needs of its channels; see `KernelChannels`."""

    on_status: Callable[[str], None] | None
    on_activity: Callable[[], None] | None
    on_shutdown_request: Callable[[bool], None] | None

    @property
    def connections(self) -> int: ...

    @property
    def busy(self) -> bool: ...

    @property
    def answering(self) -> bool: ...

    @property
    def cell(self) -> CellReference | None: ...

    def attach(self, sandbox: Sandbox, *, adopted: bool = False) -> None: ...

    def detach(self) -> None: ...

    def publish(self, channel: str, msg_type: str, content: Mapping[str, Any]) -> None: ...

    def tell_death(
        self, text: str, ename: str, *, traceback: Sequence[str], unsent: Sequence[Mapping[str, Any]] = ()
    ) -> None: ...

    def tell_restart(self) -> None: ...

    def make_up(self, ended: Sequence[EndedCell]) -> None: ...

    def follow(self, msg_id: str, execution_count: int | None = None) -> None: ...

    def follow_no_more(self, msg_id: str) -> None: ...

    def notice_to_each(self, text: str) -> None: ...

    async def close(self, code: int, reason: str) -> None: ...


@dataclass(eq=False)
class Kernel:
    """One kernel of one owner: at most one sandbox at a time. Made and changed by its registry only."""

    owner: str
    id: str
    #: the name of its kernelspec, as it was asked for
    name: str
    #: the name of its kernel image
    image: str
    channels: Channels
    path: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    session_name: str | None = None
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    last_activity: datetime = field(default_factory=lambda: datetime.now(UTC))
    #: starting, idle, busy, restarting or dead
    execution_state: str = STARTING
    #: why it is dead, in words, and all that is known of it
    reason: str | None = None
    traceback: str | None = None
    #: how its last sandbox ended, unless somebody had asked for it
    last_exit: SandboxExit | None = None
    #: the notebook sessions that it runs for, by their id
    notebooks: dict[str, NotebookSession] = field(default_factory=dict)
    sandbox: Sandbox | None = None
    #: the one that it had before: its record tells of the kernel until the next one has one
    former: Sandbox | None = None
    #: loop time at which it got its sandbox
    attached_at: float = 0.0
    #: deaths in a row
    deaths: int = 0
    #: one change of its sandbox at a time
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: done when its id is given up: nothing is begun for it any more
    gone: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    #: a restart that is under way: whoever asks meanwhile gets this one
    restarting: asyncio.Task[None] | None = None
    interrupting: asyncio.Task[None] | None = None

    @property
    def connections(self) -> int:
        """How many websockets are open."""
        return self.channels.connections

    @property
    def dead(self) -> bool:
        """Whether it has died and is only told of."""
        return self.execution_state == DEAD

    @property
    def holder(self) -> dict[str, Any]:
        """What the record of its sandbox says of it, so that the next gateway finds it again; see `recovery`."""
        return {
            "kind": KERNEL,
            "id": self.id,
            "owner": self.owner,
            "name": self.name,
            "path": self.path,
            "env": dict(self.env),
            "session_name": self.session_name,
            "created": self.created.timestamp(),
            "notebooks": [msgspec.to_builtins(notebook) for notebook in self.notebooks.values()],
        }
