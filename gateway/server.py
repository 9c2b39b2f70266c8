"""Gateway: the running parts in the order in which they start, and stop the other way round."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from traitlets.config import Configurable

from gateway import __version__
from gateway.answer_store import STORE_FILE, AnswerStore
from gateway.auth import ApiKey, all_keys, find_key
from gateway.bounded_server import MAX_CONNECTIONS, BoundedServer
from gateway.container_images import ContainerImages
from gateway.errors import ExitCode, StartError
from gateway.handlers import SHAPES, make_application
from gateway.handlers.base import Services
from gateway.health import Check, Health
from gateway.holdings import Holdings
from gateway.idempotency import KeyedCalls
from gateway.jupyter_services import JupyterServices
from gateway.jupyter_settings import JupyterSettings
from gateway.kernel_outputs import KernelOutputs
from gateway.kernels import KernelRegistry
from gateway.notebook_sessions import NotebookSessions
from gateway.open_files import room_for_connections
from gateway.open_websockets import OpenWebsockets
from gateway.patience import Patience
from gateway.recovery import recover
from gateway.service_checks import service_checks
from gateway.sessions import SessionRegistry
from gateway.settings import (
    ExecutionSettings,
    OwnerLimits,
    PoolSettings,
    SandboxLimits,
    SessionSettings,
)
from kernelprovisioner.claim_server import ClaimServer, SocketInUse
from kernelprovisioner.images import ImageError, KernelImage, read_images
from kernelprovisioner.launchers import DockerLauncher, LauncherKind, make_launcher
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.launchers.configurable import ConfigurableLauncher
from kernelprovisioner.patience import all_done
from kernelprovisioner.pool import SandboxPool
from kernelprovisioner.records import RecordStore
from kernelprovisioner.runtime import RuntimeDirectoryError, RuntimeRoot, owner_lives
from kernelprovisioner.sandboxes import Sandboxes

_MAX_BODY_BYTES = 8 * 1024 * 1024
_BODY_SECONDS = 30.0
#: How long a connection may be silent between two requests, or take for the head of one.
_IDLE_SECONDS = 120.0
#: After the drain: how long the holders of claims have to read their last files and to hang up.
_HOLDERS_SECONDS = 5.0
#: After the drain: how long the last answers (their sandboxes are gone) may take to be sent.
_LAST_ANSWERS_SECONDS = 5.0


@dataclass(frozen=True)
class GatewaySettings:
    """What a gateway starts with. `images`: names of kernel images, empty for all."""

    host: str
    port: int
    launcher: LauncherKind
    images: tuple[str, ...]
    data_directory: Path
    runtime_directory: Path | None
    api_key: str
    api_keys: Mapping[str, object]
    drain_timeout: float
    local_monitoring: bool


class Gateway:
    """A running gateway. `start` and `stop` belong together; a start that fails leaves nothing behind."""

    key: ApiKey
    launcher: ConfigurableLauncher
    runtime: RuntimeRoot

    def __init__(self, settings: GatewaySettings, parent: Configurable, report: Callable[[str], None]) -> None:
        """`parent` carries the configuration of the parts; `report` is told what takes long."""
        self.settings = settings
        self._parent = parent
        self._report = report
        self._stack = AsyncExitStack()
        #: set by a second Ctrl-C: neither cells nor removals are waited for
        self.hurry = asyncio.Event()
        self._patience = Patience(self.hurry)
        #: after `stop`: the sandboxes whose removal nobody has confirmed
        self.left: list[str] = []
        #: whether `stop` leaves the sandboxes to the next gateway, and after it those that were left
        self.keep = False
        self.kept: list[str] = []
        self._sandboxes: Sandboxes | None = None
        self.images: dict[str, KernelImage] = {}
        self.pools: dict[str, SandboxPool] = {}
        self.port = settings.port

    @property
    def isolated(self) -> bool:
        """Whether user code is locked into containers."""
        return isinstance(self.launcher, DockerLauncher)

    async def start(self) -> None:
        """Start all parts. Raises StartError with one sentence for a person."""
        try:
            await self._start()
        except BaseException as error:
            # What was adopted has holders: it stays for a start that does not fail. A stop that somebody asked for has
            # told by itself what stays.
            has_adopted = self._sandboxes is not None and bool(self._sandboxes.live)
            self.keep = self.keep or (has_adopted and isinstance(error, Exception))
            self._patience.begin()
            await self.stop()
            raise

    async def stop(self) -> None:
        """Answer what was accepted, as far as the drain timeout lets it end; leave nothing behind.

        With `keep` set, warm and claimed sandboxes stay for the next gateway, and cells that still run run on.
        An engine that does not answer holds this up for 15 s after the drain; `left` is what then stays in it.
        """
        try:
            await self._stack.aclose()
        finally:
            await self._patience.end()

    async def _start(self) -> None:
        settings, stack = self.settings, self._stack
        self.key = _prepare_data(settings)
        keys = all_keys(self.key, settings.api_keys)
        execution = ExecutionSettings(parent=self._parent)
        pool_settings = PoolSettings(parent=self._parent)
        there = _read_images()
        pool_settings.check_names(there)
        self.images = _chosen_images(there, settings.images, SandboxLimits(parent=self._parent))
        bounds = {name: pool_settings.of(image) for name, image in self.images.items()}
        jupyter = JupyterSettings(parent=self._parent)
        specs, cors = jupyter.kernel_specs(self.images), jupyter.cors
        sockets = _bind(settings.host, settings.port)
        for each in sockets:
            stack.callback(each.close)
        self.port = int(sockets[0].getsockname()[1])
        self.runtime = _open_runtime(settings.runtime_directory)
        stack.callback(os.close, _only_gateway(self.runtime))
        kind = settings.launcher
        if kind == "auto" and any(each.startswith(DockerLauncher.name) for each in self.runtime.gateway_kinds()):
            # An engine that is away when a gateway is started again must not bring its code out of its containers.
            kind = "docker"
        self.launcher = await make_launcher(kind, runtime=self.runtime, parent=self._parent)
        images: ContainerImages | None = None
        if isinstance(self.launcher, DockerLauncher):
            images = ContainerImages(self.launcher.docker_url, settings.data_directory, self._report)
        sandboxes = self._sandboxes = Sandboxes(self.launcher)
        try:
            await sandboxes.start(resume=True)
        except LaunchError as error:
            raise StartError(f"No sandbox can be started: {error}", ExitCode.NO_ENGINE) from None
        stack.push_async_callback(self._stop_sandboxes, sandboxes)
        for name, image in self.images.items():
            self.pools[name] = SandboxPool(
                image,
                sandboxes,
                bounds=bounds[name],
                line_bound=pool_settings.line_bound,
                upkeep=pool_settings.upkeep_of(image),
            )
            stack.push_async_callback(self._stop_pool, self.pools[name])
        self.launcher.on_back = self._engine_back
        owner_bounds = OwnerLimits(parent=self._parent).bounds
        holdings = Holdings(self.pools, line_timeout=pool_settings.line_timeout, bounds=owner_bounds)
        idle_bounds = SessionSettings(parent=self._parent).bounds
        sessions = SessionRegistry(holdings, execution.cell_limits, idle_bounds=idle_bounds)
        stack.push_async_callback(sessions.stop, _LAST_ANSWERS_SECONDS)
        outputs = KernelOutputs(jupyter.output_bounds, jupyter.channel_bounds, settings.data_directory)
        stack.callback(outputs.close)
        kernels = KernelRegistry(
            holdings, specs, outputs.channels, life_bounds=jupyter.life_bounds, cull_bounds=jupyter.cull_bounds
        )
        stack.push_async_callback(self._stop_kernels, kernels)
        keyed = KeyedCalls(
            AnswerStore(settings.data_directory / STORE_FILE),
            SHAPES,
            sessions,
            gateway=str(self.launcher.owner.path),
            limits=execution.cell_limits,
            lives=_lives,
        )
        stack.push_async_callback(keyed.stop, _LAST_ANSWERS_SECONDS)
        claims = ClaimServer(self.pools, self.runtime.claim_socket)
        # Each holder comes back as soon as its own sandbox is there.
        await self._serve_claims(claims)
        # Before anything that is slow: sandboxes that nobody takes up end by themselves, and their holders give up.
        recovered = await recover(
            sandboxes,
            self.pools,
            {name: bound.max for name, bound in bounds.items()},
            sessions,
            kernels,
            claims,
            longest_cell=execution.max_execution_time,
        )
        await keyed.resume(recovered.followed)
        if images is not None:
            for image in self.images.values():
                await images.ensure(image)
        for pool in self.pools.values():
            await pool.start()
        claims.open()
        sessions.idle.start()
        stack.callback(sessions.idle.stop)
        kernels.culling.start()
        services = Services(
            keys=keys,
            sessions=sessions,
            pools=self.pools,
            images=self.images,
            health=Health(__version__, self._checks(sandboxes.records), sandboxes.exits),
            keyed=keyed,
            max_execution_time=execution.max_execution_time,
            local_monitoring=settings.local_monitoring,
        )
        room = room_for_connections(sum(bound.max for bound in bounds.values()), MAX_CONNECTIONS)
        notebooks = NotebookSessions(kernels)
        jupyter_services = JupyterServices(kernels, specs, notebooks, cors, websockets=OpenWebsockets(room))
        self._serve_http(services, jupyter_services, claims, sockets, room)

    def _checks(self, records: RecordStore) -> dict[str, Check]:
        directory = self.settings.data_directory
        return service_checks(self.launcher, self.pools, self.images, records, directory, self.runtime.path)

    def _engine_back(self) -> None:
        for pool in self.pools.values():
            pool.engine_back()

    async def _serve_claims(self, claims: ClaimServer) -> None:
        """Let holders come back; new claims are taken when the pools have started."""
        try:
            await claims.start(closed=True)
        except SocketInUse as error:
            raise StartError(f"The claim socket is in use: {error}.", ExitCode.PORT_IN_USE) from None
        except OSError as error:
            raise StartError(f"The claim socket {claims.path} cannot be made: {error}.", ExitCode.UNWRITABLE) from None
        self._stack.push_async_callback(self._stop_claims, claims)

    def _serve_http(
        self,
        services: Services,
        jupyter: JupyterServices,
        claims: ClaimServer,
        sockets: list[socket.socket],
        room: int,
    ) -> None:
        server = BoundedServer(
            make_application(services, jupyter),
            max_body_size=_MAX_BODY_BYTES,
            max_buffer_size=_MAX_BODY_BYTES + 64 * 1024,
            body_timeout=_BODY_SECONDS,
            idle_connection_timeout=_IDLE_SECONDS,
        )
        server.max_connections, server.websockets = room, jupyter.websockets
        server.add_sockets(sockets)
        self._stack.push_async_callback(self._drain, server, services, jupyter.kernels, claims)

    async def _drain(
        self, server: HTTPServer, services: Services, kernels: KernelRegistry, claims: ClaimServer
    ) -> None:
        """No new connections; cells end, are cut off with their sandboxes, and are answered; then all hang up."""
        server.stop()
        timeout = self.settings.drain_timeout
        await asyncio.gather(services.sessions.drain(timeout, self.hurry), kernels.drain(timeout, self.hurry))
        if self.keep:
            services.sessions.leave()
        self._patience.begin()
        await self._stop_kernels(kernels)
        # Holders are told before their sandboxes go.
        await self._stop_claims(claims)
        # A cell is cut off as soon as its sandbox is to go, whether or not the engine confirms it.
        await asyncio.gather(
            services.sessions.drain(_LAST_ANSWERS_SECONDS, asyncio.Event()),
            *(self._stop_pool(pool) for pool in self.pools.values()),
        )
        await services.keyed.stop(_LAST_ANSWERS_SECONDS)
        await services.answers.taken(_LAST_ANSWERS_SECONDS)
        await server.close_all_connections()

    async def _stop_kernels(self, kernels: KernelRegistry) -> None:
        await kernels.stop(_LAST_ANSWERS_SECONDS, keep=self.keep)

    async def _stop_claims(self, claims: ClaimServer) -> None:
        """Tell the holders; who has not read its last files by then gets no more time."""
        stopping = asyncio.create_task(claims.stop(keep=self.keep), name="stop claims")
        with suppress(TimeoutError):
            async with asyncio.timeout(_HOLDERS_SECONDS):
                await all_done([stopping], self._patience.over)
        stopping.cancel()
        (failure,) = await asyncio.gather(stopping, return_exceptions=True)
        if isinstance(failure, Exception):
            raise failure

    async def _stop_pool(self, pool: SandboxPool) -> None:
        await pool.stop(self._patience.over, keep=self.keep)

    async def _stop_sandboxes(self, sandboxes: Sandboxes) -> None:
        if self.keep:
            sandboxes.keep_all()
            self.kept = await sandboxes.stop(self._patience.over)
        else:
            self.left = await sandboxes.stop(self._patience.over)


async def _lives(owner: str) -> bool:
    """Whether the gateway of an owner directory lives; one that cannot be seen from here will not answer any more."""
    return bool(await asyncio.to_thread(owner_lives, Path(owner)))


def _prepare_data(settings: GatewaySettings) -> ApiKey:
    directory = settings.data_directory
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(
            f"The data directory {directory} cannot be made: {error.strerror}; set SAMOVAR_DATA_DIR to another one.",
            ExitCode.UNWRITABLE,
        ) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise StartError(
            f"The data directory {directory} cannot be written; set SAMOVAR_DATA_DIR to another one.",
            ExitCode.UNWRITABLE,
        )
    return find_key(settings.api_key, directory)


def _open_runtime(directory: Path | None) -> RuntimeRoot:
    try:
        return RuntimeRoot.open(directory)
    except RuntimeDirectoryError as error:
        raise StartError(f"The gateway cannot start: {error}.", ExitCode.UNWRITABLE) from None


def _only_gateway(runtime: RuntimeRoot) -> int:
    """Return a descriptor that keeps every other gateway out of this runtime directory as long as it is open.

    Before anything is taken over: a start that then failed at the claim socket would end what it had taken.
    """
    try:
        descriptor = os.open(runtime.links, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise StartError(f"The gateway cannot start: {runtime.links}: {error.strerror}.", ExitCode.UNWRITABLE) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StartError(
            f"The claim socket is in use: another gateway serves {runtime.claim_socket}; stop it, or give this one its "
            "own SAMOVAR_RUNTIME_DIR.",
            ExitCode.PORT_IN_USE,
        ) from None
    return descriptor


def _read_images() -> dict[str, KernelImage]:
    try:
        return read_images()
    except ImageError as error:
        raise StartError(f"Bad configuration: {error}", ExitCode.CONFIGURATION) from None


def _chosen_images(
    there: dict[str, KernelImage], names: tuple[str, ...], limits: SandboxLimits
) -> dict[str, KernelImage]:
    for name in names:
        if name not in there:
            listed = ", ".join(there) or "none"
            raise StartError(f"There is no kernel image {name!r}; there is: {listed}.", ExitCode.NO_INPUT)
    return {name: limits.applied_to(image) for name, image in there.items() if not names or name in names}


def _bind(host: str, port: int) -> list[socket.socket]:
    try:
        return bind_sockets(port, host)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"Port {port} of {host} is in use; choose another one with --port or API_PORT."
        else:
            text = f"The gateway cannot listen on {host}, port {port}: {error.strerror}."
        raise StartError(text, ExitCode.PORT_IN_USE) from None
