"""What /health/detailed looks at: engine, images, pools, records, directories; bounded in time and in threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gateway.checks import (
    BUSY_ENGINE,
    SEE_ENGINE,
    Finding,
    check_directory,
    check_engine,
    check_image,
    temporary_directory,
)
from gateway.health import Check
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers import DockerLauncher
from kernelprovisioner.launchers.configurable import ConfigurableLauncher
from kernelprovisioner.pool import SandboxPool
from kernelprovisioner.records import RecordStore

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
        text = f"{self._subject} has not answered for {seconds:.0f} s"
        return Finding("degraded", text, "see what keeps it busy", facts).as_dict()

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
    records: RecordStore,
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
    checks["records"] = records_check(records)
    temporary = temporary_directory()
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
            answer = {**answer, **Finding("degraded", trouble, BUSY_ENGINE).as_dict()}
        return {**known, **answer}

    return engine


def _image_check(launcher: DockerLauncher, image: KernelImage, data_directory: Path) -> Check:
    url, timeout = launcher.docker_url, launcher.engine_timeout
    ask = BlockingCheck(
        f"the engine's list of images ({image.tag})", lambda: check_image(url, image, data_directory, timeout)
    )

    async def check() -> dict[str, Any]:
        if not launcher.available:
            text = f"whether {image.tag} is there is not known: {launcher.trouble}"
            return Finding("degraded", text, SEE_ENGINE).as_dict()
        return await ask()

    return check


def _pool_check(pool: SandboxPool) -> Check:
    async def check() -> dict[str, Any]:
        found = pool.describe()
        if not found["failures_in_a_row"]:
            return {"status": "healthy", **found}
        usable = bool(found["warm"] + found["claimed"])
        remedy = "mend what the reason names (samovar doctor looks at all of it); starts are tried again by themselves"
        return {**Finding("degraded" if usable else "unhealthy", found["last_error"], remedy).as_dict(), **found}

    return check


def records_check(records: RecordStore) -> Check:
    """Whether what the next gateway needs to know of the sandboxes is on disk."""

    async def check() -> dict[str, Any]:
        if records.failure is None:
            return Finding("healthy").as_dict()
        text = f"{records.failure}; a gateway that crashes now would not find these sandboxes again"
        remedy = "make room where they lie; what is missing is then written within seconds"
        return Finding("degraded", text, remedy).as_dict()

    return check


def _directory_check(path: Path, needed_for: str, *, full: Any) -> Check:
    return BlockingCheck(f"the directory {path}", lambda: check_directory(path, needed_for, when_full=full))
