"""A sandbox and a pool without containers: what the gateway's own decisions are tested with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gateway.answer_store import AnswerStore
from gateway.execution import CellLimits
from gateway.handlers import SHAPES
from gateway.idempotency import KeyedCalls
from gateway.sessions import SessionRegistry
from kernelprovisioner.pool import PoolClaim
from kernelprovisioner.pool_events import Source
from kernelprovisioner.sandbox import ClaimRequest, EndedCell, Probe
from kernelprovisioner.sandbox_exit import CellReference, ExitCause, SandboxExit
from kernelprovisioner.standing import Standing
from kernelprovisioner.supervisor import KernelExit
from kernelprovisioner.wire import Message

Script = Callable[["FakeSandbox", str, dict[str, Any]], None]


def message(channel: str, kind: str, content: Any, msg_id: str = "x") -> Message:
    frames = [b"{}", b"{}", b"{}", json.dumps(content).encode()]
    return Message(channel, frames, {"msg_type": kind, "msg_id": msg_id}, {})


class FakeWire:
    """Hands each execute_request to the sandbox's script."""

    def __init__(self, sandbox: FakeSandbox) -> None:
        self.sandbox = sandbox
        self.listeners: dict[str, Callable[[Message], None]] = {}
        self.requests: list[dict[str, Any]] = []
        self.metadata: list[dict[str, Any]] = []

    def new_id(self) -> str:
        return f"id{len(self.requests)}"

    def listen(self, msg_id: str, listener: Callable[[Message], None]) -> None:
        self.listeners[msg_id] = listener

    def unlisten(self, msg_id: str) -> None:
        self.listeners.pop(msg_id, None)

    def send(self, channel: str, kind: str, content: dict[str, Any], *, metadata: dict[str, Any], msg_id: str) -> str:
        assert (channel, kind) == ("shell", "execute_request")
        self.requests.append(content)
        self.metadata.append(metadata)
        asyncio.get_running_loop().call_soon(self.sandbox.script, self.sandbox, msg_id, content)
        return msg_id

    async def drained(self, channel: str, *, timeout: float) -> None:
        await asyncio.sleep(0)


class FakeSandbox:
    """What run_cell and the registry see of a sandbox."""

    def __init__(self, number: int, script: Script) -> None:
        self.id = f"sandbox{number}"
        self.container_id = f"container{number}"
        self.script = script
        self.wire = FakeWire(self)
        self.exited: asyncio.Future[SandboxExit] = asyncio.get_running_loop().create_future()
        self.kernel_exit: KernelExit | None = None
        self.interrupts = 0
        self.running: Callable[[], CellReference | None] | None = None
        self.on_interrupt: Callable[[], None] = lambda: None
        self.end_asked = False
        self.last_use: asyncio.Future[None] | None = None
        self.holder: dict[str, Any] = {}
        self.record_stays = False
        #: what it says it runs when it is asked, first to last; after that nothing
        self.probes: list[str | Exception | None] = []
        self.ended: list[EndedCell] = []

    async def probe(self, *, timeout: float) -> Probe:
        await asyncio.sleep(0)
        answer = self.probes.pop(0) if self.probes else None
        if isinstance(answer, Exception):
            raise answer
        return Probe(answer, 2, self.ended)

    async def recorded(self) -> None:
        await asyncio.sleep(0)

    async def note_holder(self, holder: dict[str, Any]) -> None:
        self.holder = holder

    def forget_record(self) -> None:
        self.record_stays = False

    async def interrupt(self) -> None:
        self.interrupts += 1
        self.on_interrupt()

    def say(self, msg_id: str, channel: str, kind: str, content: Any, own_id: str = "x") -> None:
        if (listener := self.wire.listeners.get(msg_id)) is not None:
            listener(message(channel, kind, content, own_id))

    def reply(self, msg_id: str, status: str = "ok", **fields: Any) -> None:
        self.say(msg_id, "shell", "execute_reply", {"status": status, "execution_count": 1, **fields})

    def idle(self, msg_id: str) -> None:
        self.say(msg_id, "iopub", "status", {"execution_state": "idle"})

    def die(self, cause: ExitCause, **fields: Any) -> None:
        if not self.exited.done():
            self.exited.set_result(SandboxExit(cause, **fields))


def ends_well(sandbox: FakeSandbox, msg_id: str, content: dict[str, Any]) -> None:
    """A cell that prints its code and ends."""
    sandbox.say(msg_id, "iopub", "stream", {"name": "stdout", "text": content["code"]})
    sandbox.reply(msg_id)
    sandbox.idle(msg_id)


class FakeChannels:
    """The channels of a kernel to which nobody is connected. `calls`: what its kernel's life did with them."""

    def __init__(self) -> None:
        self.on_status: Callable[[str], None] | None = None
        self.on_activity: Callable[[], None] | None = None
        self.on_shutdown_request: Callable[[bool], None] | None = None
        self.connections = 0
        self.busy = False
        self.answering = False
        self.cell: CellReference | None = None
        self.attached: list[Any] = []
        self.calls: list[str] = []
        self.closed: list[tuple[int, str]] = []

    def attach(self, sandbox: Any, *, adopted: bool = False) -> None:
        self.attached.append(sandbox)
        self.calls.append(f"attach {sandbox.id}")

    def detach(self) -> None:
        self.calls.append("detach")

    def publish(self, channel: str, msg_type: str, content: Any) -> None:
        self.calls.append(f"{channel} {msg_type} {content['execution_state']}")

    def tell_death(self, text: str, ename: str, *, traceback: Any, unsent: Any = ()) -> None:
        self.calls.append(f"death {text}")

    def tell_restart(self) -> None:
        self.calls.append("restart")

    def make_up(self, ended: Sequence[EndedCell]) -> None:
        self.calls += [f"make up {cell.header['msg_id']}" for cell in ended]

    def follow(self, msg_id: str, execution_count: int | None = None) -> None:
        self.calls.append(f"follow {msg_id}")

    def follow_no_more(self, msg_id: str) -> None:
        self.calls.append(f"follow no more {msg_id}")

    def notice_to_each(self, text: str) -> None:
        self.calls.append(f"notice {text}")

    async def close(self, code: int, reason: str) -> None:
        self.closed.append((code, reason))
        self.calls.append(f"close {code}")
        await asyncio.sleep(0)


class FakePool:
    """Gives a new sandbox for each claim; `error` is raised instead."""

    def __init__(self, script: Script = ends_well) -> None:
        self.script = script
        self.on_evict: Callable[[Any, SandboxExit], None] | None = None
        self.made: list[FakeSandbox] = []
        self.claims: list[tuple[str, ClaimRequest]] = []
        self.released: list[tuple[FakeSandbox, SandboxExit]] = []
        self.idle: dict[str, float | None] = {}
        self.standing: dict[str, Standing] = {}
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        #: as `error`, for claims that wait at the gate already
        self.failure: Exception | None = None
        self.claimed = asyncio.Event()
        self.given_back = asyncio.Event()

    async def claim(
        self, owner: str, request: ClaimRequest, *, timeout: float, standing: Standing = Standing.KEPT
    ) -> PoolClaim:
        if self.error is not None:
            raise self.error
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        sandbox = FakeSandbox(len(self.made), self.script)
        self.made.append(sandbox)
        self.claims.append((owner, request))
        self.claimed.set()
        return PoolClaim(sandbox, Source.WARM)  # type: ignore[arg-type]

    async def release(self, sandbox: FakeSandbox, cause: SandboxExit) -> None:
        self.released.append((sandbox, cause))
        self.given_back.set()
        await asyncio.sleep(0)
        if not sandbox.exited.done():
            sandbox.exited.set_result(cause)

    def touch(self, sandbox_id: str, idle_since: float | None, standing: Standing = Standing.KEPT) -> None:
        self.idle[sandbox_id] = idle_since
        self.standing[sandbox_id] = standing

    def describe(self) -> dict[str, Any]:
        return {"warm": 0, "claimed": len(self.made), "failures_in_a_row": 0}


def keyed_calls(
    sessions: SessionRegistry, directory: Path, gateway: str = "/run/a", living: tuple[str, ...] = ()
) -> KeyedCalls:
    """Calls with a key over a store in `directory`; the gateways that are `living` live beside this one."""

    async def lives(other: str) -> bool:
        return other in living

    store = AnswerStore(directory / "answers.sqlite")
    return KeyedCalls(store, SHAPES, sessions, gateway=gateway, limits=CellLimits(0.05, 10_000, 100), lives=lives)
