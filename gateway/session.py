"""Session: what a user holds on to."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from gateway.execution import CellResult
from kernelprovisioner.sandbox import Sandbox
from kernelprovisioner.sandbox_exit import SandboxExit
from kernelprovisioner.standing import Standing

#: the kind of a record's holder that is one of these
SESSION = "session"


@dataclass(eq=False)
class Session:
    """One session of one owner: at most one sandbox at a time. It outlives its sandbox."""

    owner: str
    image: str
    user_id: str | None = None
    entity_id: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    #: whether the request that made it named a session
    named: bool = False
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    last_activity: datetime = field(default_factory=lambda: datetime.now(UTC))
    sandbox: Sandbox | None = None
    #: where its sandbox came from: warm, started, cold
    source: str | None = None
    #: how its last sandbox ended, until its next cell has said so
    last_exit: SandboxExit | None = None
    #: what its next cell says first, on standard error
    notice: str = ""
    executions: int = 0
    waiting: int = 0
    deleted: bool = False
    #: whether a second request has named it
    came_back: bool = False
    #: loop time since when it holds a sandbox and does nothing with it
    idle_since: float | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def state(self) -> str:
        """`busy` (a cell runs or waits), `idle` (holds a sandbox) or `cold` (its next cell claims one)."""
        if self.waiting or self.turn.locked():
            return "busy"
        return "idle" if self.sandbox is not None else "cold"

    @property
    def holder(self) -> dict[str, Any]:
        """What the record of its sandbox says of it, so that the next gateway finds it again; see `recovery`."""
        return {
            "kind": SESSION,
            "session_id": self.id,
            "owner": self.owner,
            "user_id": self.user_id,
            "entity_id": self.entity_id,
            "named": self.named,
            "env": dict(self.env),
            "created": self.created.timestamp(),
        }

    @property
    def standing(self) -> Standing:
        """What others of its owner may cost it: somebody came back to it, or may do so, or it was a call in passing."""
        if self.came_back or self.executions > 1:
            return Standing.KEPT
        if self.named or self.user_id is not None or self.entity_id is not None:
            return Standing.NAMED
        return Standing.PASSING


@dataclass(frozen=True)
class Execution:
    """A cell that was run: its result, and where."""

    session: Session
    result: CellResult
    container_id: str | None
    source: str | None


@dataclass(frozen=True)
class Followed:
    """A cell that an earlier gateway had sent, after its end: its request's id, and what came of it."""

    msg_id: str
    execution: Execution


Sending = Callable[[Session, Sandbox, str], Awaitable[None]]
"""Called with session, sandbox and message id before a cell is sent; what it raises keeps the cell from being sent."""
