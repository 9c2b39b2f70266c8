"""What /health/detailed looks at: engine, images, pools and directories, each check bounded in time and in threads."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gateway.checks import Finding, check_directory, check_engine, check_image
from gateway.health import Check
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers import DockerLauncher
from kernelprovisioner.launchers.configurable import ConfigurableLauncher
from kernelprovisioner.pool import SandboxPool

#: How long a question about the health waits for a check; one that takes longer goes on behind it.
_PATIENCE_SECONDS = 2.0
#: A finding is so long as good as a new one: whoever polls quickly asks nobody twice.
_FRESH_SECONDS = 0.5


class BlockingCheck:
    """A check that blocks, in at most one thread of its own, however often it is asked and however long it takes."""

    def __init__(self, subject: str, work: Callable[[], Finding], patience: float = _PATIENCE_SECONDS) -> None:
        """`subject` begins the sentence "… has not answered for 12 s"."""
        self._subject = subject
        self._work = work
        self._patience = patience
        self._began = 0.0
        self._ended = float("-inf")
        self._last: Finding | None = None
        self._flight: asyncio.Future[Finding] | None = None

    async def __call__(self) -> dict[str, Any]:
        """Return the finding: a new one, or one that tells that the check still waits."""
        if self._flight is None:
            if self._last is not None and time.monotonic() - self._ended < _FRESH_SECONDS:
                return self._last.as_dict()
            self._flight = self._start()
        flight = self._flight
        await asyncio.wait({flight}, timeout=self._patience)
        if flight.done():
            return flight.result().as_dict()
        if self._last is not None and self._last.status == "unhealthy":
            # Asked once more, it does not answer this time either.
            return self._last.as_dict()
        facts = {} if self._last is None else self._last.facts
        seconds = time.monotonic() - self._began
        return Finding("degraded", f"{self._subject} has not answered for {seconds:.0f} s", facts=facts).as_dict()

    def _start(self) -> asyncio.Future[Finding]:
        loop = asyncio.get_running_loop()
        flight: asyncio.Future[Finding] = loop.create_future()
        self._began = time.monotonic()

        def settle(found: Finding) -> None:
            self._last, self._ended, self._flight = found, time.monotonic(), None
            if not flight.done():
                flight.set_result(found)

        def run() -> None:
            try:
                found = self._work()
            except Exception as error:
                found = Finding("unhealthy", f"{self._subject} cannot be checked: {error!r}")
            try:
                loop.call_soon_threadsafe(settle, found)
            except RuntimeError:
                # The loop is closed: nobody asks any more.
                return

        # Not one of the loop's own few threads: an engine that hangs would take them all. It ends with the process.
        threading.Thread(target=run, name=f"check {self._subject}", daemon=True).start()
        return flight


def service_checks(
    launcher: ConfigurableLauncher,
    pools: Mapping[str, SandboxPool],
    images: Mapping[str, KernelImage],
    data_directory: Path,
    runtime_directory: Path,
) -> dict[str, Check]:
    """Return the checks of all services of a gateway, by name."""
    checks: dict[str, Check] = {"engine": _engine_check(launcher)}
    for name, pool in pools.items():
        checks[f"pool:{name}"] = _pool_check(pool)
    if isinstance(launcher, DockerLauncher):
        for name, image in images.items():
            checks[f"image:{name}"] = _image_check(launcher, image, data_directory)
    # Not tempfile's own choice: where /tmp is full it takes another one, or raises.
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")
    checks["directory:runtime"] = _directory_check(runtime_directory, "the sockets of new sandboxes", full="unhealthy")
    checks["directory:data"] = _directory_check(data_directory, "what is kept of sessions and answers", full="degraded")
    checks["directory:temporary"] = _directory_check(temporary, "building images", full="degraded")
    return checks


def _engine_check(launcher: ConfigurableLauncher) -> Check:
    if not isinstance(launcher, DockerLauncher):

        async def process() -> dict[str, Any]:
            return {"status": "healthy", "launcher": launcher.name, "isolated": False}

        return process
    known = {"launcher": launcher.name, "isolated": True}
    url, timeout = launcher.docker_url, launcher.engine_timeout
    ask = BlockingCheck(f"the container engine at {url}", lambda: check_engine(url, timeout))

    async def engine() -> dict[str, Any]:
        if not launcher.available:
            found = Finding(
                "unhealthy",
                launcher.trouble,
                "start Docker; sessions that hold a sandbox go on, new ones wait until it is back",
            )
            return {**known, **found.as_dict()}
        answer = await ask()
        trouble = launcher.trouble
        if trouble is not None and answer["status"] == "healthy":
            answer = {**answer, **Finding("degraded", trouble).as_dict()}
        return {**known, **answer}

    return engine


def _image_check(launcher: DockerLauncher, image: KernelImage, data_directory: Path) -> Check:
    url, timeout = launcher.docker_url, launcher.engine_timeout
    ask = BlockingCheck(
        f"the engine's list of images ({image.tag})", lambda: check_image(url, image, data_directory, timeout)
    )

    async def check() -> dict[str, Any]:
        if not launcher.available:
            return Finding("degraded", f"whether {image.tag} is there is not known: {launcher.trouble}").as_dict()
        return await ask()

    return check


def _pool_check(pool: SandboxPool) -> Check:
    async def check() -> dict[str, Any]:
        found = pool.describe()
        if not found["failures_in_a_row"]:
            return {"status": "healthy", **found}
        usable = bool(found["warm"] + found["claimed"])
        return {"status": "degraded" if usable else "unhealthy", "error": found["last_error"], **found}

    return check


def _directory_check(path: Path, needed_for: str, *, full: Any) -> Check:
    return BlockingCheck(f"the directory {path}", lambda: check_directory(path, needed_for, when_full=full))
