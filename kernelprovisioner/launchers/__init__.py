"""Launchers: what makes and destroys sandboxes."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal

from traitlets.config import Configurable

from kernelprovisioner.launchers.base import EngineUnavailable
from kernelprovisioner.launchers.configurable import ConfigurableLauncher
from kernelprovisioner.launchers.docker import DockerLauncher
from kernelprovisioner.launchers.docker_engine import Engine
from kernelprovisioner.launchers.process import ProcessLauncher
from kernelprovisioner.runtime import RuntimeRoot

__all__ = ["DockerLauncher", "LauncherKind", "ProcessLauncher", "make_launcher"]

LauncherKind = Literal["auto", "docker", "process"]

#: an engine that does not answer within this time counts as none
_PROBE_SECONDS = 5.0

log = logging.getLogger(__name__)


async def make_launcher(
    kind: LauncherKind, runtime: RuntimeRoot, *, parent: Configurable | None = None
) -> ConfigurableLauncher:
    """Return a launcher that is not started yet; `parent` is where its traits' configuration comes from.

    `auto`: containers where an engine answers, else plain processes, with a warning that code is not isolated.
    """
    if kind == "process":
        return ProcessLauncher(runtime, parent=parent)
    docker = DockerLauncher(runtime, parent=parent)
    if kind == "docker":
        return docker
    try:
        await asyncio.to_thread(_probe, docker.docker_url)
    except EngineUnavailable as error:
        log.warning("%s. Code will run as plain processes of this user: IT IS NOT ISOLATED.", error)
        return ProcessLauncher(runtime, parent=parent)
    return docker


def _probe(url: str) -> None:
    Engine.connect(url, _PROBE_SECONDS).close()
