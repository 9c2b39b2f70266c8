"""Recovery: what a starting gateway finds of the one before it: adopt or reap.

What is decided is decided by `plan`, from the records alone; the rest carries it out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from gateway.kernel import KERNEL, Kernel
from gateway.kernels import KernelRegistry
from gateway.notebook_session import NotebookSession
from gateway.session import SESSION, Followed, Session
from gateway.sessions import SessionRegistry
from kernelprovisioner.adoption import PROVISIONER
from kernelprovisioner.claim_server import ClaimServer
from kernelprovisioner.exit_log import ExitEntry
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.pool import SandboxPool
from kernelprovisioner.records import SandboxRecord
from kernelprovisioner.sandbox import Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.sandboxes import Sandboxes

#: How long one sandbox may take to answer, in seconds, and how many are asked at once. Much less than the others have:
#: code can stop its own kernel.
_ADOPTION_SECONDS = 10.0
_AT_ONCE = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """What is asked of a pool to decide what it gets back: its bound, and the template that it launches now.

    `template` is None where that cannot be told yet; stale members are then found later.
    """

    maximum: int
    template: str | None


@dataclass(frozen=True)
class Plan:
    """What becomes of the sandboxes of the gateway before: `adopt` in this order, `reap` for the reason given."""

    adopt: Sequence[SandboxRecord]
    reap: Sequence[tuple[SandboxRecord, str]]


@dataclass
class Recovered:
    """What came of it. `followed`: for each adopted session's sandbox the cell that may still run in it."""

    adopted: Counter[str] = field(default_factory=Counter)
    reaped: list[tuple[SandboxRecord, str]] = field(default_factory=list)
    followed: dict[str, asyncio.Task[Followed | None]] = field(default_factory=dict)


class _SessionHolder(msgspec.Struct):
    """A session as `Session.holder` writes it."""

    session_id: str
    owner: str
    created: float
    user_id: str | None = None
    entity_id: str | None = None
    named: bool = False
    env: dict[str, str] = {}


class KernelHolder(msgspec.Struct):
    """A kernel as `Kernel.holder` writes it."""

    id: str
    owner: str
    name: str
    created: float
    path: str | None = None
    session_name: str | None = None
    env: dict[str, str] = {}
    notebooks: list[NotebookSession] = []


def plan(records: Sequence[SandboxRecord], pools: Mapping[str, Pool]) -> Plan:
    """Decide what is adopted: claimed ones, each holder's newest; then the youngest warm ones that still fit."""
    adopt: list[SandboxRecord] = []
    reap: list[tuple[SandboxRecord, str]] = []
    places: set[tuple[str, ...]] = set()
    live: Counter[str] = Counter()
    by_age = sorted(records, key=lambda record: record.claimed_at or record.created_at, reverse=True)
    # Claimed ones first: they count before warm ones, and are the ones that somebody waits for.
    for record in sorted(by_age, key=lambda record: record.state != "claimed"):
        place = _place(record)
        pool = pools.get(record.image)
        if pool is None:
            reap.append((record, f"this gateway does not serve the kernel image {record.image!r}"))
        elif record.state == "claimed" and place is None:
            reap.append((record, "its record does not tell who holds it"))
        elif place in places:
            reap.append((record, "its holder has a newer one"))
        elif record.state == "warm" and pool.template not in (None, record.template):
            reap.append((record, "it is of an older configuration"))
        elif record.state == "warm" and live[record.image] >= pool.maximum:
            reap.append((record, "the pool is full"))
        else:
            adopt.append(record)
            live[record.image] += 1
            if place is not None:
                places.add(place)
    return Plan(adopt, reap)


def session_of(record: SandboxRecord) -> Session | None:
    """The session that holds a sandbox, without it; None where the record has none."""
    if record.state != "claimed" or record.holder.get("kind") != SESSION:
        return None
    try:
        holder = msgspec.convert(record.holder, _SessionHolder)
        created = datetime.fromtimestamp(holder.created, UTC)
    except (msgspec.ValidationError, ValueError, OverflowError, OSError):
        return None
    # Its first cell was sent, so that its client may have heard of it; whether it came back nobody wrote down.
    return Session(
        holder.owner,
        record.image,
        holder.user_id,
        holder.entity_id,
        holder.env,
        holder.named,
        id=holder.session_id,
        created=created,
        executions=1,
        came_back=True,
    )


def kernel_holder_of(record: SandboxRecord) -> KernelHolder | None:
    """What the record tells of the kernel that holds a sandbox; None where it has none."""
    if record.state != "claimed" or record.holder.get("kind") != KERNEL:
        return None
    try:
        holder = msgspec.convert(record.holder, KernelHolder)
        datetime.fromtimestamp(holder.created, UTC)
    except (msgspec.ValidationError, ValueError, OverflowError, OSError):
        return None
    return holder


async def recover(
    sandboxes: Sandboxes,
    pools: Mapping[str, SandboxPool],
    bounds: Mapping[str, int],
    sessions: SessionRegistry,
    kernels: KernelRegistry,
    claims: ClaimServer,
    *,
    longest_cell: float,
) -> Recovered:
    """Adopt what the gateway before left and can be used; remove the rest. `longest_cell`: seconds.

    Before the pools start, while `claims` takes holders back and no claims. No failure of a sandbox stops it: one that
    cannot be adopted is removed, and its session's next call says so.
    """
    records = await sandboxes.recoverable()
    images = {name: pool.image for name, pool in pools.items()}
    known = {name: Pool(bounds[name], await sandboxes.launcher.template(image)) for name, image in images.items()}
    chosen = plan(records, known)
    recovered = Recovered(reaped=list(chosen.reap))
    room = asyncio.Semaphore(_AT_ONCE)

    async def adopt(record: SandboxRecord) -> Sandbox | LaunchError:
        async with room:
            sandbox = await _adopt(sandboxes, record, images[record.image])
        if not isinstance(sandbox, LaunchError):
            # A schedule counts those that were claimed since its first time.
            age = max(0.0, time.time() - (record.claimed_at or record.created_at))
            pools[record.image].adopt(sandbox, record.owner if record.state == "claimed" else None, age=age)
            if _holder_kind(record) == PROVISIONER:
                # At once: its holder waits for it, but not for others that do not answer.
                claims.restore(pools[record.image], sandbox)
        return sandbox

    found = await asyncio.gather(*(adopt(record) for record in chosen.adopt))
    # Oldest first, as sessions are kept.
    for record, sandbox in reversed(list(zip(chosen.adopt, found, strict=True))):
        session, kernel = session_of(record), kernel_holder_of(record)
        if isinstance(sandbox, LaunchError):
            lost = SandboxExit(ExitCause.GATEWAY, evidence={"reason": str(sandbox)})
            recovered.reaped.append((record, str(sandbox)))
            if session is not None:
                session.last_exit = lost
                sessions.add(session)
            if kernel is not None:
                kernels.restore_dead(_kernel(kernel, record, kernels), lost)
            continue
        recovered.adopted[_holder_kind(record)] += 1
        if session is not None:
            recovered.followed[sandbox.id] = sessions.restore(session, sandbox, longest_cell)
        if kernel is not None:
            kernels.restore(_kernel(kernel, record, kernels), sandbox)
    await sandboxes.settle()
    _tell(recovered)
    return recovered


async def _adopt(sandboxes: Sandboxes, record: SandboxRecord, image: KernelImage) -> Sandbox | LaunchError:
    try:
        return await sandboxes.adopt(record, image, timeout=_ADOPTION_SECONDS)
    except LaunchError as error:
        return error
    except Exception as error:
        _log.exception("sandbox %s could not be adopted", record.sandbox_id)
        return LaunchError(f"sandbox {record.sandbox_id} could not be adopted: {error!r}")


def _kernel(holder: KernelHolder, record: SandboxRecord, kernels: KernelRegistry) -> Kernel:
    return Kernel(
        holder.owner,
        holder.id,
        holder.name,
        record.image,
        kernels.make_channels(),
        holder.path,
        holder.env,
        holder.session_name,
        created=datetime.fromtimestamp(holder.created, UTC),
        notebooks={notebook.id: notebook for notebook in holder.notebooks},
    )


def _holder_kind(record: SandboxRecord) -> str:
    """What holds an adopted sandbox: SESSION, KERNEL or PROVISIONER; or `warm`."""
    return str(record.holder["kind"]) if record.state == "claimed" else record.state


def _place(record: SandboxRecord) -> tuple[str, ...] | None:
    """Whose sandbox it is, where nobody else may have it; None for a warm one, or where that cannot be told."""
    if record.state != "claimed":
        return None
    if record.holder.get("kind") == PROVISIONER:
        token = record.holder.get("token")
        return (PROVISIONER, record.kernel_id) if isinstance(token, str) and token else None
    kernel = kernel_holder_of(record)
    if kernel is not None:
        return KERNEL, kernel.owner, kernel.id
    session = session_of(record)
    return None if session is None else (SESSION, session.owner, session.id)


def _tell(recovered: Recovered) -> None:
    for record, reason in recovered.reaped:
        fields: dict[str, Any] = {}
        if record.state == "claimed":
            # Whoever looks for the end of a session in the log finds it.
            lost = SandboxExit(ExitCause.GATEWAY, evidence={"reason": reason})
            fields = {"event": "exit", **ExitEntry(record.sandbox_id, record.image, record.kernel_id, lost).as_dict()}
        said = "sandbox %s of an earlier gateway is removed: %s"
        _log.info(said, record.sandbox_id, reason, extra={"fields": fields})
    if recovered.adopted:
        adopted = recovered.adopted
        _log.info(
            "carrying on with what an earlier gateway left: %d sessions, %d kernels of Jupyter clients, %d warm"
            " sandboxes; %d were removed",
            *(adopted[SESSION], adopted[KERNEL] + adopted[PROVISIONER], adopted["warm"], len(recovered.reaped)),
        )
