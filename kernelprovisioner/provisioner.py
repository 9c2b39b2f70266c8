"""SandboxProvisioner: jupyter_client's adapter. `kernel_name="sandbox"` gets its kernel in a sandbox through it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar, cast

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Enum, Float, Unicode, default

from kernelprovisioner.claims import STARTING, ClaimRefused, NoGateway
from kernelprovisioner.environment import added_by_caller
from kernelprovisioner.held import GatewaySandbox, HeldSandbox, OwnSandbox, Wanted
from kernelprovisioner.holder import KernelHolder, link_of, remove_dead_links
from kernelprovisioner.images import find_image
from kernelprovisioner.launchers import LauncherKind, make_launcher
from kernelprovisioner.launchers.configurable import CHANNELS
from kernelprovisioner.launchers.process import PROCESS_ID_PREFIX
from kernelprovisioner.loop_thread import LoopThread
from kernelprovisioner.runtime import RuntimeRoot
from kernelprovisioner.workdir import MODES, WorkDirectory, refusal

#: Shell requests wait so long after a restart: clients' sockets come back to the new sandbox. In milliseconds.
HOLD_MS = 250
#: Printed in the first cell where nobody asked for plain processes.
NOT_ISOLATED = (
    "samovar: this kernel is NOT ISOLATED: no container engine answers, so it is a plain process of yours."
    " Start Docker, or set DOCKER_BASE_URL.\n"
)
_CLOSE_SECONDS = 60.0
_EXIT_SECONDS = 15.0
_log = logging.getLogger(__name__)
T = TypeVar("T")


class SandboxProvisioner(KernelProvisionerBase):
    """Gets a kernel's sandbox through a running gateway's claim socket, or launches one itself, cold.

    All that lasts longer than one call runs in a thread of its own: a blocking manager's loop stands still in between.
    """

    image = Unicode("python", help="The kernel image that the sandbox is made of.").tag(config=True)
    work_directory = Enum(
        MODES,
        default_value="copy",
        help="""What the kernel sees of the directory it was started in: a `copy` (new and changed files come back),
        nothing (`empty`), or the directory itself (`mount`).""",
    ).tag(config=True)
    launcher = Enum(
        ("auto", "docker", "process"),
        help="What starts a sandbox where no gateway runs: `docker`, `process` (code is not isolated) or `auto`.",
    ).tag(config=True)
    claim_socket = Unicode(help="The claim socket of the gateway; by default the one of this user.").tag(config=True)
    claim_timeout = Float(120.0, help="How long to wait for a sandbox, in seconds.").tag(config=True)

    @default("launcher")
    def _default_launcher(self) -> str:
        return os.environ.get("SAMOVAR_LAUNCHER", "auto")

    @default("claim_socket")
    def _default_claim_socket(self) -> str:
        return os.environ.get("SAMOVAR_CLAIM_SOCKET", "")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        #: where the sandbox came from: gateway-warm, gateway-cold, gateway-started or cold; None before the launch
        self.claim_source: str | None = None
        self.container_id: str | None = None
        self.sandbox_id: str | None = None
        self._directory: Path | None = None
        self._thread: LoopThread | None = None
        self._holder: KernelHolder | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._launched_before = False
        self._isolated_before = False

    @property
    def has_process(self) -> bool:
        """From the launch until `wait` or `cleanup` has seen the kernel's end."""
        return self._living is not None

    @property
    def _living(self) -> KernelHolder | None:
        """The holder until `cleanup`, or until the end of the process, after which managers may still call."""
        return self._holder if self._thread is not None and not self._thread.stopped else None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Choose the kernel's endpoints, before its manager writes the connection file."""
        manager = self.parent
        encryption = kwargs.pop("transport_encryption", getattr(manager, "transport_encryption", "disabled"))
        if encryption == "required":
            raise RuntimeError(
                "transport_encryption='required' does not work with the sandbox kernel yet: its sockets are Unix"
                " sockets in a directory that only you can open. Use 'auto' or 'disabled'."
            )
        scheme = manager.session.signature_scheme if manager is not None else "hmac-sha256"
        if scheme != "hmac-sha256":
            raise RuntimeError(f"the sandbox kernel signs its messages by hmac-sha256, not by {scheme!r}")
        if manager is not None and not manager.session.key:
            raise RuntimeError("the sandbox kernel signs its messages, and Session.key is empty: leave it unset")
        kwargs.pop("extra_arguments", None)  # they are for a kernel's command line; a sandbox's kernel runs already
        kwargs = await super().pre_launch(cmd=[], **kwargs)
        root = RuntimeRoot.open()
        if manager is not None:
            manager.transport = "ipc"
            manager.ip = str(link_of(root, self.kernel_id) / "k")
            for number, name in enumerate(CHANNELS, start=1):
                setattr(manager, f"{name}_port", number)
            manager.write_connection_file(jupyter_session=kwargs["env"].get("JPY_SESSION_NAME", ""))
            self.connection_info = manager.get_connection_info()
        return kwargs

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Take a sandbox and put it behind the endpoints. Raises LaunchError, ClaimRefused, ImageError."""
        if self._holder is not None:
            await self._close()
        env: dict[str, str] = kwargs.get("env", {})
        self._directory = Path(os.path.abspath(kwargs.get("cwd") or os.getcwd()))
        thread = self._thread = LoopThread(f"samovar-{self.kernel_id[:8]}")
        try:
            holder = self._holder = await self._in_thread(self._start(self._directory, env))
        except BaseException:
            self._thread = None
            await thread.stop()
            raise
        assert holder.held is not None
        self.claim_source = holder.held.source
        self.container_id = holder.held.container_id
        self.sandbox_id = holder.held.sandbox_id
        self._launched_before = True
        self._isolated_before = not self.container_id.startswith(PROCESS_ID_PREFIX)
        self._finalizer = weakref.finalize(self, _end_behind, thread, holder)
        self._finalizer.atexit = False  # _end_all is what ends them, earlier
        _open[thread] = holder
        self.log.info("kernel %s is in sandbox %s (%s)", self.kernel_id, self.sandbox_id, self.claim_source)
        return self.connection_info

    async def poll(self) -> int | None:
        """None while the kernel process lives; else its exit code, −n for signal n."""
        return 0 if self._living is None else self._living.returncode

    async def wait(self) -> int | None:
        """Wait for the kernel's end, its last files included."""
        if self._living is None:
            return 0
        code = await self._in_thread(self._living.wait())
        await self._close()
        return code

    async def send_signal(self, signum: int) -> None:
        """Signal the kernel's process group, its children included."""
        if self._living is not None:
            await self._in_thread(self._living.send_signal(signum))

    async def kill(self, restart: bool = False) -> None:
        """Kill the kernel, after its last files have come out (bounded)."""
        if self._living is not None:
            await self._in_thread(self._living.kill())

    async def terminate(self, restart: bool = False) -> None:
        """Kill as well, but by SIGTERM: a kernel that ignores it is killed by its manager."""
        if self._living is not None:
            await self._in_thread(self._living.kill(15))

    async def shutdown_requested(self, restart: bool = False) -> None:
        """The manager has sent its shutdown request: what follows is no death."""
        if self._living is not None:
            await self._in_thread(self._living.shutdown_requested())

    async def cleanup(self, restart: bool = False) -> None:
        """Leave nothing: no sandbox, link, thread or descriptor. May come twice, and without a launch."""
        await self._close()

    def get_shutdown_wait_time(self, recommended: float = 5.0) -> float:
        """Twice what the last files may take: half of it is the patience before SIGTERM."""
        return max(recommended, 12.0)

    def get_stable_start_time(self, recommended: float = 10.0) -> float:
        """A sandbox is warm when its start returns."""
        return recommended

    def resolve_path(self, path: str) -> str | None:
        """Return the absolute path of a file within the kernel's directory on the host, None for all else."""
        if self._directory is None:
            return None
        found = Path(os.path.realpath(self._directory / path))
        inside = found.is_relative_to(os.path.realpath(self._directory))
        return found.as_posix() if inside and found.exists() else None

    async def get_provisioner_info(self) -> dict[str, Any]:
        """What tells this kernel's sandbox."""
        info = await super().get_provisioner_info()
        info.update(claim_source=self.claim_source, container_id=self.container_id, sandbox_id=self.sandbox_id)
        return info

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Read what `get_provisioner_info` wrote. The sandbox stays with the process that holds it."""
        await super().load_provisioner_info(provisioner_info)
        self.claim_source = provisioner_info["claim_source"]
        self.container_id = provisioner_info["container_id"]
        self.sandbox_id = provisioner_info["sandbox_id"]

    async def _start(self, directory: Path, env: dict[str, str]) -> KernelHolder:
        """In the thread: claim or launch, and hold."""
        root = RuntimeRoot.open()
        await asyncio.to_thread(remove_dead_links, root)
        work, notice = await self._work_directory(directory)
        key = _bytes(self.connection_info["key"])
        holder = KernelHolder(root, self.kernel_id, key, work)
        wanted = Wanted(
            self.image,
            self.kernel_id,
            key,
            added_by_caller(env, os.environ, self.kernel_spec.env),
            mount=directory if self.work_directory == "mount" and notice is None else None,
            session_name=env.get("JPY_SESSION_NAME"),
            notice=notice,
            hold_ms=HOLD_MS if self._launched_before else 0,
            timeout=self.claim_timeout,
        )
        try:
            await holder.start(self._make, wanted)
        except BaseException:
            await holder.close()
            raise
        return holder

    async def _work_directory(self, directory: Path) -> tuple[WorkDirectory | None, str | None]:
        """Return what carries the files (None: nothing does) and what the person should know about it."""
        if self.work_directory == "empty":
            return None, None
        why = refusal(directory)
        if why is not None:
            return None, f"samovar: the work directory is empty: {why}, which no sandbox gets.\n"
        if self.work_directory == "mount":
            return None, None
        try:
            work = WorkDirectory(directory)
        except OSError as error:
            return None, f"samovar: the work directory is empty: {directory} cannot be read ({error.strerror}).\n"
        return work, await work.plan()

    async def _make(self, wanted: Wanted) -> HeldSandbox:
        root = RuntimeRoot.open()
        try:
            return await GatewaySandbox.claim(Path(self.claim_socket or root.claim_socket), wanted)
        except NoGateway as error:
            self.log.info("%s; launching a sandbox", error)
        except ClaimRefused as error:
            if error.code not in ("unknown_image", STARTING):
                raise
            self.log.info("%s; launching a sandbox", error)
        image = find_image(wanted.image)
        # A restart must not take a person's code out of its container: then rather no kernel.
        kind = "docker" if self.launcher == "auto" and self._isolated_before else self.launcher
        launcher = await make_launcher(cast(LauncherKind, kind), root)
        if kind == "auto" and launcher.name == "process":
            wanted = dataclasses.replace(wanted, notice=NOT_ISOLATED + (wanted.notice or ""))
        return await OwnSandbox.launch(launcher, image, wanted)

    async def _in_thread(self, work: Coroutine[Any, Any, T]) -> T:
        if self._thread is None:
            work.close()
            raise RuntimeError("this kernel has no sandbox")
        return await asyncio.wrap_future(self._thread.submit(work))

    async def _close(self) -> None:
        thread, self._thread = self._thread, None
        holder, self._holder = self._holder, None
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        if thread is None or holder is None or thread.stopped:
            return
        _open.pop(thread, None)
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await asyncio.wrap_future(thread.submit(holder.close()))
        finally:
            await thread.stop()


def _bytes(key: str | bytes) -> bytes:
    """A connection's key, which is bytes in a manager's hands and text in a file."""
    return key if isinstance(key, bytes) else key.encode()


#: threads and holders of this process, for its end
_open: dict[LoopThread, KernelHolder] = {}


def _end(thread: LoopThread, holder: KernelHolder) -> None:
    """For a manager that was dropped, or a process that ends without its kernels' shutdown."""
    try:
        thread.submit(holder.close()).result(_EXIT_SECONDS)
    except Exception as error:
        _log.warning("a sandbox was not given up in order: %r", error)
    thread.stop_and_wait(_EXIT_SECONDS)


def _end_behind(thread: LoopThread, holder: KernelHolder) -> None:
    """The garbage collector may call from any thread, the holder's own included: it must not wait."""
    if _open.pop(thread, None) is not None:
        threading.Thread(target=_end, args=(thread, holder), name="samovar-end", daemon=True).start()


def _end_all() -> None:
    while _open:
        _end(*_open.popitem())


# Earlier than atexit: by then executors accept no work any more, and a container could not be removed.
threading._register_atexit(_end_all)  # type: ignore[attr-defined]
