"""Reaping on request: what dead owners left in a runtime directory and an engine, and its removal."""

from __future__ import annotations

from pathlib import Path

from kernelprovisioner.inventory import Inventory, Life, Owner
from kernelprovisioner.launchers.docker_engine import Engine
from kernelprovisioner.launchers.process import kill_noted
from kernelprovisioner.runtime import RuntimeRoot

_IN_ENGINE = "docker "


def to_be_reaped(found: Inventory, root: Path, engine_id: str | None) -> tuple[list[Owner], list[Owner]]:
    """Return the dead owners that can be reaped from here, and those that cannot: another engine has their containers.

    Of this runtime directory also a gateway that the next one could continue: who reaps on request gives that up. A
    gateway of another directory keeps its grace.
    """
    reaped: list[Owner] = []
    left: list[Owner] = []
    for owner in found.owners:
        ours = owner.path.parent == root
        if owner.life is not Life.DEAD or (owner.is_awaited and not ours):
            continue
        elsewhere = ours and (owner.kind or "").startswith(_IN_ENGINE) and owner.kind != f"{_IN_ENGINE}{engine_id}"
        (left if elsewhere else reaped).append(owner)
    return reaped, left


def reap(root: RuntimeRoot, engine: Engine | None) -> None:
    """Remove the containers, networks, processes and directories of dead owners. Blocks.

    Raises ENGINE_ERRORS where the engine does not answer at all; what it does not remove stays with its directory.
    """
    dead = []
    kinds = (None, "process") if engine is None else (None, "process", f"{_IN_ENGINE}{engine.id}")
    for owner in root.dead_owners(gateways=True):
        if owner.read_kind() in kinds:
            dead.append(owner)
        else:
            owner.release()
    failed: set[Path] = set()
    try:
        if engine is not None:
            _, failed = engine.reap(dead)
        for owner in dead:
            if owner.path not in failed:
                for note in owner.path.glob("*.pid"):
                    kill_noted(note)
                root.remove_links_into(owner)
                owner.close()
    finally:
        for owner in dead:
            owner.release()
