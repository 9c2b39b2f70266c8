"""ProcessLauncher: sandboxes as plain child processes, without any isolation: for development only."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import secrets
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
from kernelprovisioner.runtime import OwnerDirectory, RuntimeRoot, is_sandbox_id
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.traits import FiniteFloat

#: what a sandbox process inherits of our environment; names that start with LC_ too
INHERITED = frozenset({"PATH", "LANG", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"})

#: what a process has instead of a container's id begins with this
PROCESS_ID_PREFIX = "process:"
_KIND = "process"
_LOG_BYTES = 2000
_POLL_SECONDS = 0.05
_log = logging.getLogger(__name__)


@dataclass
class _Child:
    """One supervisor, and the task that waits for its end."""

    tree: psutil.Process
    #: None: an earlier gateway's child, that we adopted
    process: subprocess.Popen[bytes] | None
    waiting: asyncio.Task[None] | None = None
    #: the task that ends it; who destroys it again waits for the same one
    ending: asyncio.Task[None] | None = None

    async def wait(self) -> int | None:
        """Return its exit code once it has ended; None for another one's child, whose code we are not told."""
        # Polled: asyncio's own subprocesses are killed when their loop ends, but these may outlive us.
        while _runs(self.tree) if self.process is None else self.process.poll() is None:  # noqa: ASYNC110  tells nobody
            await asyncio.sleep(_POLL_SECONDS)
        return None if self.process is None else self.process.returncode


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

    async def start(self, on_exit: ExitCallback, *, resume: bool = False) -> None:
        self._on_exit = on_exit
        await asyncio.to_thread(self._reap, resume)

    async def adopt(self, launched: Launched) -> None:
        sandbox_id = launched.sandbox_id
        if sandbox_id in self._children:
            raise ValueError(f"sandbox {sandbox_id} is known already")
        supervisor = await asyncio.to_thread(noted_process, self._note(sandbox_id))
        if supervisor is None or f"{PROCESS_ID_PREFIX}{supervisor.pid}" != launched.runtime_id:
            raise LaunchError(f"sandbox {sandbox_id} is gone: its process does not run any more")
        self._watch(sandbox_id, _Child(supervisor, None), launched.directory)

    async def discard(self, sandbox_id: str) -> None:
        child = self._children.get(sandbox_id)
        if child is not None:
            await asyncio.shield(self._ending(sandbox_id, child))
        else:
            await asyncio.to_thread(self._clear, sandbox_id)

    async def settle(self) -> None:
        self._unsettled = False
        there = await asyncio.to_thread(_left_in, self.owner)
        unwanted = there - self._children.keys()
        unwanted |= {sandbox_id for sandbox_id, child in self._children.items() if child.ending is not None}
        tried = await asyncio.gather(*(self.discard(sandbox_id) for sandbox_id in unwanted), return_exceptions=True)
        for error in tried:
            if isinstance(error, OSError):
                _log.warning("what an earlier gateway left is removed when this one stops: %s", error)
            elif error is not None:
                raise error

    async def template(self, image: KernelImage) -> str | None:
        return self._template(image)

    async def launch(self, request: LaunchRequest) -> Launched:
        if request.sandbox_id in self._children:
            raise ValueError(f"sandbox {request.sandbox_id} exists already")
        with runtime_errors_as_launch_errors():
            directory = self.owner.sandbox_directory(request.sandbox_id)
        try:
            with runtime_errors_as_launch_errors():
                return self._launch(request, directory)
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

    async def stop(self, give_up: asyncio.Event | None = None, *, keep: bool = False) -> list[str]:
        going = [each for each in self._children.items() if not keep or each[1].ending is not None]
        await all_done([self._ending(*each) for each in going], give_up)
        left = sorted(self._children)
        for child in self._children.values():
            if child.waiting is not None:
                child.waiting.cancel()
                await asyncio.gather(child.waiting, return_exceptions=True)
        # What is noted there of processes that live is for whoever reaps them.
        await asyncio.to_thread(self._give_owner_up, keep or bool(left))
        return left

    def _launch(self, request: LaunchRequest, directory: Path) -> Launched:
        directory.chmod(0o700)
        work_directory = _work_directory(request, directory)
        home = directory / "home"
        home.mkdir(mode=0o700)
        key, token = secrets.token_hex(32), secrets.token_hex(32)
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
        process = _start_supervisor(environment, directory / "log")
        child = _Child(psutil.Process(process.pid), process)
        try:
            self._note(request.sandbox_id).write_text(f"{process.pid} {child.tree.create_time()!r}")
        except BaseException:
            # Whoever reaps could not find it.
            process.kill()
            process.wait()
            raise
        self._watch(request.sandbox_id, child, directory)
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
            template=self._template(request.image),
        )

    def _template(self, image: KernelImage) -> str:
        environment = thread_variables(image) | image.environment
        made_from = [image.name, image.preload if self.preload else [], environment, sys.executable]
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]

    def _note(self, sandbox_id: str) -> Path:
        """Where it is noted which process a sandbox is."""
        return self.owner.path / f"{sandbox_id}.pid"

    def _watch(self, sandbox_id: str, child: _Child, directory: Path) -> None:
        self._children[sandbox_id] = child
        child.waiting = asyncio.create_task(self._wait(sandbox_id, child, directory), name=f"wait {child.tree.pid}")

    async def _wait(self, sandbox_id: str, child: _Child, directory: Path) -> None:
        """Tell why the supervisor ended; not for one that we end ourselves."""
        code = await child.wait()
        if child.ending is not None:
            return
        words = _last_words(directory / "log")
        evidence = {"reason": words} if words else {}
        if code is None:
            self._on_exit(sandbox_id, SandboxExit(ExitCause.REMOVED, evidence=evidence))
        else:
            self._on_exit(sandbox_id, exit_of_code(code, evidence))

    def _ending(self, sandbox_id: str, child: _Child) -> asyncio.Task[None]:
        """Return the one task that ends this child; a new one where the last has failed."""
        ending = child.ending
        if ending is None or (ending.done() and (ending.cancelled() or ending.exception() is not None)):
            ending = child.ending = asyncio.create_task(self._end(sandbox_id, child), name=f"end {sandbox_id}")
        return ending

    async def _end(self, sandbox_id: str, child: _Child) -> None:
        """End the supervisor and everything it started, then remove the directory."""
        tree = _tree(child.tree)
        with suppress(psutil.NoSuchProcess):
            child.tree.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.terminate_timeout):
                await child.wait()
        for process in {*tree, *_tree(child.tree)}:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await child.wait()
        if child.waiting is not None:
            await asyncio.gather(child.waiting, return_exceptions=True)
        # Its work directory may hold any number of files.
        await asyncio.to_thread(self._remove_directory, sandbox_id)
        self._children.pop(sandbox_id, None)

    def _remove_directory(self, sandbox_id: str) -> None:
        self.owner.remove_sandbox_directory(sandbox_id)
        self._note(sandbox_id).unlink(missing_ok=True)

    def _clear(self, sandbox_id: str) -> None:
        """Kill an earlier gateway's sandbox and remove its directory."""
        kill_noted(self._note(sandbox_id))
        self._remove_directory(sandbox_id)

    def _reap(self, resume: bool) -> None:
        """Take an owner directory; kill what dead process launchers left, and remove their directories."""
        for owner in self._take_owner(_KIND, resume):
            for note in owner.path.glob("*.pid"):
                kill_noted(note)
            self.runtime.remove_links_into(owner)
            owner.close()


def sandbox_environment(environ: Mapping[str, str], image: KernelImage, home: Path) -> dict[str, str]:
    """Return a sandbox process's environment: the image's, and what is on the allow-list of ours."""
    inherited = {name: value for name, value in environ.items() if name in INHERITED or name.startswith("LC_")}
    return inherited | thread_variables(image) | {"HOME": str(home)} | image.environment


def _start_supervisor(environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "samovar_kernel.supervisor"],
                cwd="/",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"could not start a kernel process: {error.strerror}") from error


def _work_directory(request: LaunchRequest, directory: Path) -> Path:
    if request.mount is None:
        work_directory = directory / "work"
        work_directory.mkdir(mode=0o700)
        return work_directory
    mount = request.mount.resolve()
    if not mount.is_dir():
        raise LaunchError(f"the work directory {mount} cannot be used: it is not a directory")
    return mount


def _left_in(owner: OwnerDirectory) -> set[str]:
    """Return the sandboxes that an owner directory has something of."""
    return {*owner.sandbox_ids(), *(note.stem for note in owner.path.glob("*.pid") if is_sandbox_id(note.stem))}


def noted_process(note: Path) -> psutil.Process | None:
    """Return the process that was noted, None where it does not run any more."""
    try:
        pid, created = note.read_text().split()
        process = psutil.Process(int(pid))
        # The number may be another process's by now.
        return process if process.create_time() == float(created) and _runs(process) else None
    except (OSError, ValueError, psutil.Error):
        return None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_noted(note: Path) -> None:
    process = noted_process(note)
    for each in _tree(process) if process is not None else []:
        with suppress(psutil.NoSuchProcess):
            each.kill()


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
