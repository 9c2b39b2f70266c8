"""Inventory: the owners and sandboxes that a runtime directory and an engine have, read without changing anything.

For commands beside a gateway, or after one: nothing here needs a living gateway, and nothing here talks to a sandbox.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from kernelprovisioner.images import LABEL_IMAGE
from kernelprovisioner.launchers.container_spec import LABEL_BOOT, LABEL_MANAGED, LABEL_OWNER, LABEL_SANDBOX
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, boot_label, explain, of_an_earlier_boot
from kernelprovisioner.launchers.process import PROCESS_ID_PREFIX, noted_process
from kernelprovisioner.records import SandboxRecord, read_records
from kernelprovisioner.runtime import is_gateways, is_in_grace, is_owner_name, is_sandbox_id, owner_lives

_ENDED = frozenset({"exited", "dead", "removing"})
#: As in /proc/locks: "1: FLOCK  ADVISORY  WRITE 4711 00:1a:12345 0 EOF"
_FLOCK = re.compile(r"FLOCK\s+\S+\s+\S+\s+(\d+)\s+([0-9a-f]+):([0-9a-f]+):(\d+)\s")


class Life(enum.StrEnum):
    """Whether an owner lives: its process holds the lock in its directory."""

    ALIVE = "alive"
    DEAD = "dead"
    UNSEEN = "unseen"  # its directory cannot be seen from here


@dataclass(frozen=True)
class Owner:
    """An owner of sandboxes: a gateway, or a program that started one itself. `kind`: its launcher and engine.

    `is_awaited`: it is a dead gateway whose sandboxes wait a while for the next one.
    """

    path: Path
    life: Life
    is_gateway: bool = False
    is_awaited: bool = False
    kind: str | None = None
    pid: int | None = None
    program: str | None = None

    def __str__(self) -> str:
        what = "gateway" if self.is_gateway else self.program or "owner"
        if self.life is Life.ALIVE:
            return what if self.pid is None else f"{what} {self.pid}"
        return f"{what} (gone)" if self.life is Life.DEAD else "not seen from here"


@dataclass(frozen=True)
class FoundSandbox:
    """One sandbox as it was found. `state`: starting, warm, claimed or ended; `created_at` in seconds since the epoch.

    `runtime_id` is the container's id or `process:<pid>`; None where there is neither any more.
    """

    sandbox_id: str
    image: str | None
    state: str
    owner: Owner
    created_at: float | None = None
    runtime_id: str | None = None
    record: SandboxRecord | None = None

    @property
    def session(self) -> str:
        """The kernel id of the session that holds it; empty where none does."""
        return "" if self.record is None else self.record.kernel_id

    @property
    def held_for(self) -> str:
        """Whose session holds it, as the pool says: an API key's owner, or `uid:<number>`."""
        return "" if self.record is None else self.record.owner


@dataclass
class Inventory:
    """All that was found, and sentences about what could not be read. `engine_lists`: it was asked and answered."""

    owners: list[Owner] = field(default_factory=list)
    sandboxes: list[FoundSandbox] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    engine_lists: bool = False


def take_inventory(root: Path, client: Any | None) -> Inventory:
    """Return what there is below the runtime directory and in the engine. Blocks.

    `client` is docker's low-level client, None where no engine is asked: then what was noted of a container counts.
    """
    found = Inventory()
    containers: list[Mapping[str, Any]] | None = None
    if client is not None:
        try:
            containers = client.containers(all=True, filters={"label": f"{LABEL_MANAGED}=true"})
            found.engine_lists = True
        except ENGINE_ERRORS as error:
            found.problems.append(f"the container engine does not list its containers: {explain(error)}")
    by_owner: dict[Path, dict[str, Mapping[str, Any]]] = {path: {} for path in _owner_directories(root, found.problems)}
    for container in containers or ():
        labels = container.get("Labels") or {}
        if os.path.isabs(labels.get(LABEL_OWNER, "")):
            path = Path(labels[LABEL_OWNER])
            by_owner.setdefault(path, {})[labels.get(LABEL_SANDBOX) or str(container["Id"])[:16]] = container
    holders = _lock_holders()
    boot = boot_label()
    for path in sorted(by_owner):
        owner = _owner(path, holders)
        labels_of_boot = {(each.get("Labels") or {}).get(LABEL_BOOT) for each in by_owner[path].values()}
        if owner.life is Life.UNSEEN and any(of_an_earlier_boot(label, boot) for label in labels_of_boot):
            owner = replace(owner, life=Life.DEAD)
        found.owners.append(owner)
        found.sandboxes.extend(_sandboxes(owner, by_owner[path], found.engine_lists, found.problems))
    return found


def state_of(recorded: str | None, runs: bool | None) -> str:
    """Return a sandbox's state by its record's and by whether its container runs (None: nobody can tell)."""
    return "ended" if runs is False else recorded or "starting"


def _owner_directories(root: Path, problems: list[str]) -> list[Path]:
    try:
        return [entry for entry in root.iterdir() if is_owner_name(entry.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"the runtime directory {root} cannot be read: {error.strerror}")
        return []


def _owner(path: Path, holders: Mapping[tuple[int, int], int]) -> Owner:
    life, pid = _life(path, holders)
    if life is Life.UNSEEN:
        return Owner(path, life)
    is_gateway = is_gateways(path)
    awaited = is_gateway and life is Life.DEAD and is_in_grace(path)
    return Owner(path, life, is_gateway, awaited, _text(path / "kind"), pid, None if pid is None else _program(pid))


def _life(path: Path, holders: Mapping[tuple[int, int], int]) -> tuple[Life, int | None]:
    try:
        lock = os.stat(path / "lock", follow_symlinks=False)
    except FileNotFoundError:
        # Its process died before it could lock it, or it is a directory of another machine.
        return (Life.DEAD if path.is_dir() else Life.UNSEEN), None
    except OSError:
        return Life.UNSEEN, None
    pid = holders.get((lock.st_dev, lock.st_ino))
    if pid is not None:
        return Life.ALIVE, pid
    lives = owner_lives(path)
    return (Life.UNSEEN if lives is None else Life.ALIVE if lives else Life.DEAD), None


def _lock_holders() -> dict[tuple[int, int], int]:
    """Return who holds which file's lock, by device and inode, as far as the kernel tells."""
    text = _text(Path("/proc/locks")) or ""
    return {
        (os.makedev(int(major, 16), int(minor, 16)), int(inode)): int(pid)
        for pid, major, minor, inode in _FLOCK.findall(text)
    }


def _program(pid: int) -> str | None:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return None


def _sandboxes(
    owner: Owner, containers: Mapping[str, Mapping[str, Any]], engine_asked: bool, problems: list[str]
) -> Iterable[FoundSandbox]:
    records: dict[str, SandboxRecord] = {}
    noted: set[str] = set()
    if owner.life is not Life.UNSEEN:
        readable, errors = read_records(owner.path)
        records = {record.sandbox_id: record for record in readable}
        problems.extend(str(error) for error in errors)
        noted = _noted(owner.path)
    for sandbox_id in sorted(records.keys() | noted | containers.keys()):
        record, container = records.get(sandbox_id), containers.get(sandbox_id)
        recorded = None if record is None else record.state
        if container is not None:
            labels = container.get("Labels") or {}
            image, runtime_id = labels.get(LABEL_IMAGE), str(container["Id"])
            runs: bool | None = container.get("State") not in _ENDED
            created: float | None = container.get("Created")
        elif (process := noted_process(note := owner.path / f"{sandbox_id}.pid")) is not None:
            image, runtime_id, runs = None, f"{PROCESS_ID_PREFIX}{process.pid}", True
            created = _modified(note)
        else:
            image, runtime_id, created = None, None, _modified(owner.path / sandbox_id)
            runs = _without_container(owner, engine_asked, record)
        if record is not None:
            image, created = record.image, record.created_at
        yield FoundSandbox(sandbox_id, image, state_of(recorded, runs), owner, created, runtime_id, record)


def _without_container(owner: Owner, engine_asked: bool, record: SandboxRecord | None) -> bool | None:
    """Whether a sandbox runs that no container and no process was found for: unknown if nobody could be asked.

    A living owner makes the directory first and the record last.
    """
    if record is None and owner.life is Life.ALIVE:
        return None
    in_engine = owner.kind is not None and owner.kind.startswith("docker")
    return None if in_engine and not engine_asked else False


def _noted(owner: Path) -> set[str]:
    """The sandboxes that an owner's directory knows, by directory or process file."""
    try:
        names = [entry.name.removesuffix(".pid") for entry in owner.iterdir()]
    except OSError:
        return set()
    return {name for name in names if is_sandbox_id(name)}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
