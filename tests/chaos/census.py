"""What there is of sandboxes on this host: containers, runtime directories, mounts, descriptors, threads."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker

from kernelprovisioner.launchers.container_spec import LABEL_OWNER, LABEL_SANDBOX
from tests import services
from tests.gateway_process import GatewayProcess

_OWNER = re.compile(r"[0-9a-f]{8}")
_SANDBOX = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Usage:
    """What a process holds: open descriptors, threads, resident bytes."""

    descriptors: int
    threads: int
    memory: int


def usage(pid: int) -> Usage:
    """Read it from /proc."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return Usage(len(os.listdir(process / "fd")), len(os.listdir(process / "task")), pages * os.sysconf("SC_PAGE_SIZE"))


def containers(url: str, runtime: Path) -> dict[str, str]:
    """Sandbox id → container id and state, of all owners in one runtime directory."""
    with contextlib.closing(docker.DockerClient(base_url=url, timeout=60)) as client:
        found = client.api.containers(all=True, filters={"label": services.LABEL})
    return {
        each["Labels"].get(LABEL_SANDBOX, each["Id"]): f"{each['Id'][:12]} {each['Status']}"
        for each in found
        if Path(each["Labels"].get(LABEL_OWNER, "")).parent == runtime
    }


def directories(runtime: Path) -> dict[str, set[str]]:
    """Owner → names of the sandboxes that have something in its directory."""
    found: dict[str, set[str]] = {}
    for owner in runtime.iterdir():
        if _OWNER.fullmatch(owner.name):
            names = {match[0] for entry in owner.iterdir() if (match := _SANDBOX.match(entry.name))}
            found[owner.name] = names
    return found


def mounts(part: str) -> list[str]:
    """The mount points of this host whose path contains `part`, without the engine's own."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1] for line in lines]
    return [point for point in points if part in point and ("/overlay2/" in point or "/containers/" in point)]


def is_settled(found: dict[str, Any]) -> bool:
    """Whether the pool has what it wants and nothing is coming or going."""
    return found["warm"] == found["want"] and not found["starting"] and not found["removing"]


def problems(url: str, gateway: GatewayProcess) -> list[str]:
    """Compare what the settled pool says with what there is; one line for each thing that does not fit."""
    found = gateway.pool()
    there, owned = containers(url, gateway.runtime), directories(gateway.runtime)
    lines = []
    if len(there) != found["warm"] + found["claimed"]:
        lines.append(f"{len(there)} containers, {found['warm']} warm + {found['claimed']} claimed: {there}")
    if len(owned) != 1:
        lines.append(f"not one owner but {sorted(owned)}")
    for name in sorted(set().union(*owned.values()) ^ set(there)):
        where = f"the container {there.get(name)}"
        if name not in there:
            where = ", ".join(str(path) for path in gateway.runtime.glob(f"*/{name}*"))
        lines.append(f"the sandbox {name} has only {where}")
    lines.extend(f"the link {link} was left" for link in gateway.runtime.glob("k/*"))
    return lines
