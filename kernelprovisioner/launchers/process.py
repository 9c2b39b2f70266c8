"""ProcessLauncher: sandboxes as plain child processes, without any isolation: for development only."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from traitlets import Bool

from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import ExitCallback, Launched, LaunchError, LaunchRequest
from kernelprovisioner.launchers.configurable import (
    ConfigurableLauncher,
    ipc_endpoints,
    runtime_errors_as_launch_errors,
    thread_variables,
)
from kernelprovisioner.launchers.exits import exit_of_code
from kernelprovisioner.patience import all_done
from kernelprovisioner.runtime import OwnerDirectory, RuntimeRoot
from kernelprovisioner.traits import FiniteFloat

#: what a sandbox process inherits of our environment; names that start with LC_ too
INHERITED = frozenset({"PATH", "LANG", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"})

#: what a process has instead of a container's id begins with this
PROCESS_ID_PREFIX = "process:"
_KIND = "process"
_LOG_BYTES = 2000


@dataclass
class _Child:
    """One supervisor that is our child, and the task that waits for its end."""

    process: asyncio.subprocess.Process
    tree: psutil.Process
    waiting: asyncio.Task[None] | None = None
    #: the task that ends it; who destroys it again waits for the same one
    ending: asyncio.Task[None] | None = None


class ProcessLauncher(ConfigurableLauncher):
    """Starts each sandbox's supervisor as a child process of this one. Code in it can do whatever we can."""

    name = "process"

    preload = Bool(False, help="Import the kernel image's preload modules before a kernel counts as warm.").tag(
        config=True
    )
    terminate_timeout = FiniteFloat(
        2.0, min=0.0, help="Seconds that a supervisor has for ending its kernel by itself before all of it is killed."
    ).tag(config=True)

    def __init__(self, runtime: RuntimeRoot, **kwargs: Any) -> None:
        super().__init__(runtime, **kwargs)
        self._children: dict[str, _Child] = {}

    async def start(self, on_exit: ExitCallback) -> None:
        self._on_exit = on_exit
        with runtime_errors_as_launch_errors():
            self._owner = self.runtime.owner_directory()
        self._owner.write_kind(_KIND)
        await asyncio.to_thread(self._reap)

    async def launch(self, request: LaunchRequest) -> Launched:
        if request.sandbox_id in self._children:
            raise ValueError(f"sandbox {request.sandbox_id} exists already")
        with runtime_errors_as_launch_errors():
            directory = self.owner.sandbox_directory(request.sandbox_id)
        try:
            return await self._launch(request, directory)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._remove_directory, request.sandbox_id))
            raise

    async def warmed(self, launched: Launched) -> None:
        """Nothing to do: a process that gave up CPU share could not take it back without being root."""

    async def destroy(self, launched: Launched) -> None:
        child = self._children.get(launched.sandbox_id)
        if child is not None:
            await asyncio.shield(self._ending(launched.sandbox_id, child))

    def was_out_of_memory(self, launched: Launched, within: float) -> bool:
        """Never: nobody tells us, and no limit of ours is enforced."""
        return False

    async def stop(self, give_up: asyncio.Event | None = None) -> list[str]:
        await all_done([self._ending(*each) for each in self._children.items()], give_up)
        left = sorted(self._children)
        if self._owner is not None:
            # What is noted there of processes that live is for whoever reaps them.
            await asyncio.to_thread(self._owner.release if left else self._owner.close)
            self._owner = None
        return left

    async def _launch(self, request: LaunchRequest, directory: Path) -> Launched:
        directory.chmod(0o700)
        work_directory = _work_directory(request, directory)
        home = directory / "home"
        home.mkdir(mode=0o700)
        key, token = secrets.token_hex(32), secrets.token_hex(32)
        with runtime_errors_as_launch_errors():
            channels, supervisor = ipc_endpoints(directory)
        config = {
            "token": token,
            "key": key,
            "transport": "ipc",
            "directory": str(directory),
            "work_directory": str(work_directory),
            "preload": list(request.image.preload) if self.preload else [],
            "kernel": [sys.executable, "-P", "-m", "samovar_kernel.app"],
        }
        environment = sandbox_environment(os.environ, request.image, home) | {"SAMOVAR_SUPERVISOR": json.dumps(config)}
        with (directory / "log").open("wb") as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "samovar_kernel.supervisor"),
                    cwd="/",
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise LaunchError(f"could not start a kernel process: {error.strerror}") from error
        child = _Child(process, psutil.Process(process.pid))
        (self.owner.path / f"{request.sandbox_id}.pid").write_text(f"{process.pid} {child.tree.create_time()!r}")
        self._children[request.sandbox_id] = child
        child.waiting = asyncio.create_task(
            self._wait(request.sandbox_id, child, directory), name=f"wait {process.pid}"
        )
        return Launched(
            sandbox_id=request.sandbox_id,
            image=request.image,
            runtime_id=f"{PROCESS_ID_PREFIX}{process.pid}",
            directory=directory,
            work_directory=str(work_directory),
            key=key.encode(),
            token=token,
            supervisor=supervisor,
            channels=channels,
            isolated=False,
        )

    async def _wait(self, sandbox_id: str, child: _Child, directory: Path) -> None:
        """Tell why the supervisor ended; not for one that we end ourselves."""
        code = await child.process.wait()
        if child.ending is None:
            words = _last_words(directory / "log")
            self._on_exit(sandbox_id, exit_of_code(code, {"reason": words} if words else {}))

    def _ending(self, sandbox_id: str, child: _Child) -> asyncio.Task[None]:
        """Return the one task that ends this child; a new one where the last has failed."""
        ending = child.ending
        if ending is None or (ending.done() and (ending.cancelled() or ending.exception() is not None)):
            ending = child.ending = asyncio.create_task(self._end(sandbox_id, child), name=f"end {sandbox_id}")
        return ending

    async def _end(self, sandbox_id: str, child: _Child) -> None:
        """End the supervisor and everything it started, then remove the directory."""
        tree = _tree(child.tree)
        with suppress(ProcessLookupError):
            child.process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.terminate_timeout):
                await child.process.wait()
        for process in {*tree, *_tree(child.tree)}:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await child.process.wait()
        if child.waiting is not None:
            await asyncio.gather(child.waiting, return_exceptions=True)
        # Its work directory may hold any number of files.
        await asyncio.to_thread(self._remove_directory, sandbox_id)
        self._children.pop(sandbox_id, None)

    def _remove_directory(self, sandbox_id: str) -> None:
        self.owner.remove_sandbox_directory(sandbox_id)
        (self.owner.path / f"{sandbox_id}.pid").unlink(missing_ok=True)

    def _reap(self) -> None:
        """Kill what dead process launchers left, and remove their directories."""
        for owner in self.runtime.dead_owners():
            if owner.read_kind() not in (_KIND, None):
                owner.release()
                continue
            self._kill_left(owner)
            self.runtime.remove_links_into(owner)
            owner.close()

    def _kill_left(self, owner: OwnerDirectory) -> None:
        for noted in owner.path.glob("*.pid"):
            try:
                pid, created = noted.read_text().split()
                supervisor = psutil.Process(int(pid))
                # The number may be another process's by now.
                if supervisor.create_time() == float(created):
                    for process in _tree(supervisor):
                        with suppress(psutil.NoSuchProcess):
                            process.send_signal(signal.SIGKILL)
            except (OSError, ValueError, psutil.Error):
                continue


def sandbox_environment(environ: Mapping[str, str], image: KernelImage, home: Path) -> dict[str, str]:
    """Return a sandbox process's environment: the image's, and what is on the allow-list of ours."""
    inherited = {name: value for name, value in environ.items() if name in INHERITED or name.startswith("LC_")}
    return inherited | thread_variables(image) | {"HOME": str(home)} | image.environment


def _work_directory(request: LaunchRequest, directory: Path) -> Path:
    if request.mount is None:
        work_directory = directory / "work"
        work_directory.mkdir(mode=0o700)
        return work_directory
    mount = request.mount.resolve()
    if not mount.is_dir():
        raise LaunchError(f"the work directory {mount} cannot be used: it is not a directory")
    return mount


def _tree(root: psutil.Process) -> list[psutil.Process]:
    """Return the process and all its descendants, as far as they live."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _last_words(log: Path) -> str:
    try:
        return log.read_bytes()[-_LOG_BYTES:].decode(errors="replace").strip()
    except OSError:  # the directory is being removed
        return ""
