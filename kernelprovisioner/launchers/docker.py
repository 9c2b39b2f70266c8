"""DockerLauncher: sandboxes as locked-down containers of a container engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from traitlets import Enum, Integer, Unicode, default

from kernelprovisioner.images import LABEL_IMAGE, LABEL_TEMPLATE, ImageError, KernelImage, seccomp_profile
from kernelprovisioner.launchers.base import (
    Endpoint,
    EngineUnavailable,
    ExitCallback,
    Launched,
    LaunchError,
    LaunchRequest,
)
from kernelprovisioner.launchers.configurable import (
    CHANNELS,
    ConfigurableLauncher,
    ipc_endpoints,
    runtime_errors_as_launch_errors,
)
from kernelprovisioner.launchers.container_spec import (
    LABEL_BOOT,
    LABEL_MANAGED,
    LABEL_MANAGED_ALIAS,
    LABEL_OWNER,
    LABEL_SANDBOX,
    TCP_PORTS,
    WORK_DIRECTORY,
    ContainerSpec,
    mount_group,
)
from kernelprovisioner.launchers.docker_engine import (
    ENGINE_ERRORS,
    Engine,
    boot_label,
    engine_url,
    explain,
    new_client,
)
from kernelprovisioner.launchers.docker_events import Event, EventWatch
from kernelprovisioner.launchers.exits import Evidence
from kernelprovisioner.patience import all_done, end
from kernelprovisioner.runtime import RuntimeRoot
from kernelprovisioner.sandbox_exit import ExitCause
from kernelprovisioner.traits import FiniteFloat

#: how long the engine's other events may come after the `die` of a killed container
_EVIDENCE_SECONDS = 0.5
#: events may get lost, so that the engine's list is compared at least this often
_RECONCILE_SECONDS = 30.0
_RETRY_PAUSE = 0.5

T = TypeVar("T")


@dataclass
class _Container:
    """What is known of one container between its launch and its confirmed removal."""

    sandbox_id: str
    image: KernelImage
    launched: Launched | None = None
    launched_at: float = 0.0
    evidence: Evidence = field(default_factory=Evidence)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    removal: asyncio.Task[None] | None = None


class DockerLauncher(ConfigurableLauncher):
    """Starts sandboxes in a container engine, and hears from the engine's events why they end."""

    name = "docker"

    docker_url = Unicode(
        help="The container engine's address: the environment's DOCKER_BASE_URL, else DOCKER_HOST, else the usual one."
    ).tag(config=True)
    transport = Enum(
        ("ipc", "tcp"),
        default_value="ipc",
        help="How kernels are reached: `ipc` sockets in a shared directory, without any network; or `tcp` ports on "
        "127.0.0.1, for engines that cannot share sockets (Docker Desktop). With `tcp` a sandbox has a network "
        "interface: it reaches this host's address on its bridge, and other users of this machine reach its ports.",
    ).tag(config=True)
    engine_timeout = FiniteFloat(30.0, min=0.1, help="Seconds that one call to the engine may take.").tag(config=True)
    destroy_timeout = FiniteFloat(60.0, min=0.1, help="Seconds until a sandbox must be confirmed to be gone.").tag(
        config=True
    )
    engine_threads = Integer(8, min=1, max=64, help="How many calls to the engine run at once.").tag(config=True)

    @default("docker_url")
    def _default_docker_url(self) -> str:
        return engine_url(os.environ)

    def __init__(self, runtime: RuntimeRoot, **kwargs: Any) -> None:
        super().__init__(runtime, **kwargs)
        self._containers: dict[str, _Container] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_again = asyncio.Event()
        self._engine: Engine | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._watch: EventWatch | None = None
        self._reconciling: asyncio.Task[None] | None = None
        self._network: str | None = None

    async def start(self, on_exit: ExitCallback) -> None:
        self._on_exit = on_exit
        self._threads = ThreadPoolExecutor(self.engine_threads, "samovar-engine")
        try:
            self._engine = await self._call(Engine.connect, self.docker_url, self.engine_timeout)
            with runtime_errors_as_launch_errors():
                self._owner = await self._call(self.runtime.owner_directory)
            await self._call(self._prepare)
            self._watch = EventWatch(
                lambda: new_client(self.docker_url, self.engine_timeout),
                f"{LABEL_OWNER}={self.owner.path}",
                self._event,
                self._look_again.set,
            )
            await self._watch.start(self.engine_timeout)
            self._reconciling = asyncio.create_task(self._keep_reconciled(), name="reconcile containers")
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                raise EngineUnavailable(f"the container engine at {self.docker_url} sends no events") from None
            if isinstance(error, ENGINE_ERRORS):
                raise EngineUnavailable(f"the container engine at {self.docker_url} fails: {explain(error)}") from error
            raise

    async def launch(self, request: LaunchRequest) -> Launched:
        if request.sandbox_id in self._containers:
            raise ValueError(f"sandbox {request.sandbox_id} exists already")
        container = _Container(request.sandbox_id, request.image)
        self._containers[request.sandbox_id] = container
        making = asyncio.ensure_future(self._call(self._make, request))
        try:
            container.launched = await asyncio.shield(making)
        except asyncio.CancelledError:
            # The thread cannot be stopped: what it makes is removed when it is done.
            self._own(self._remove_when_made(making, container))
            raise
        except BaseException:
            del self._containers[request.sandbox_id]
            raise
        container.launched_at = asyncio.get_running_loop().time()
        if container.evidence.ended:
            words = await self._call(self._engine_now().last_words, request.sandbox_id)
            await self.destroy(container.launched)
            raise LaunchError(
                f"the sandbox ended at once (exit code {container.evidence.exit_code}): {words}".rstrip(": ")
            )
        return container.launched

    async def warmed(self, launched: Launched) -> None:
        try:
            await self._call(self._engine_now().give_full_share, launched.runtime_id)
        except ENGINE_ERRORS as error:
            # One that is just dying: its exit is told by the events.
            self.log.debug("sandbox %s keeps its low share of CPU: %s", launched.sandbox_id, explain(error))

    async def destroy(self, launched: Launched) -> None:
        container = self._containers.get(launched.sandbox_id)
        if container is not None:
            await asyncio.shield(self._removal(container))

    def was_out_of_memory(self, launched: Launched, within: float) -> bool:
        container = self._containers.get(launched.sandbox_id)
        return container is not None and time.monotonic() - container.evidence.oom_at <= within

    async def stop(self, give_up: asyncio.Event | None = None) -> list[str]:
        if self._reconciling is not None:
            self._reconciling.cancel()
            await asyncio.gather(self._reconciling, return_exceptions=True)
            self._reconciling = None
        while self._tasks and await all_done(self._tasks, give_up):
            pass
        for container in list(self._containers.values()):
            self._own(self._removed_or_left(container))
        if self._watch is not None:
            self._own(self._stop_watching(self._watch))
            self._watch = None
        await all_done(self._tasks, give_up)
        if self._engine is not None:
            if self._network is not None:
                self._own(self._remove_network(self._engine, self._network))
                await all_done(self._tasks, give_up)
                self._network = None
            self._engine.close()
            self._engine = None
        left = sorted(self._containers)
        for container in self._containers.values():
            if container.removal is not None:
                container.removal.cancel()
        await end(self._tasks)
        if self._owner is not None:
            # Containers that could not be removed need their owner's directory, so that somebody else reaps them.
            if left:
                self._owner.release()
            else:
                await asyncio.to_thread(self._owner.close)
            self._owner = None
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None
        return left

    # --- in threads -------------------------------------------------------------------------------------------------

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking function in one of our bounded threads."""
        if self._threads is None:
            raise RuntimeError("the docker launcher is not started")
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *arguments))

    def _engine_now(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the docker launcher is not started")
        return self._engine

    def _prepare(self) -> None:
        """Reap what dead owners left in this engine, and make the network where one is needed."""
        engine = self._engine_now()
        kind = f"docker {engine.id}"
        self.owner.write_kind(kind)
        dead = []
        for owner in self.runtime.dead_owners():
            # The containers of another engine's owner cannot be seen from here.
            if owner.read_kind() in (kind, None):
                dead.append(owner)
            else:
                owner.release()
        removed, failed = engine.reap(dead)
        if removed:
            self.log.info("removed %d containers and networks of owners that are gone", removed)
        for owner in dead:
            if owner.path in failed:
                owner.release()
            else:
                self.runtime.remove_links_into(owner)
                owner.close()
        if self.transport == "tcp":
            self._network = f"samovar-{self.owner.name}"
            engine.create_network(self._network, self._labels())

    def _labels(self) -> dict[str, str]:
        labels = {LABEL_MANAGED: "true", LABEL_MANAGED_ALIAS: "true", LABEL_OWNER: str(self.owner.path)}
        boot = boot_label()
        return labels if boot is None else labels | {LABEL_BOOT: boot}

    def _make(self, request: LaunchRequest) -> Launched:
        """Start the container; on any failure nothing is left."""
        image, engine, sandbox_id = request.image, self._engine_now(), request.sandbox_id
        try:
            image_id, image_labels = engine.image(image.tag, image.name)
            mount = None if request.mount is None else request.mount.resolve()
            with runtime_errors_as_launch_errors():
                directory = self.owner.sandbox_directory(sandbox_id)
            own_labels = {LABEL_IMAGE: image.name, LABEL_SANDBOX: sandbox_id}
            template = image_labels.get(LABEL_TEMPLATE)
            if template is not None:
                own_labels[LABEL_TEMPLATE] = template
            spec = ContainerSpec(
                sandbox_id=sandbox_id,
                image=image,
                image_id=image_id,
                labels=self._labels() | own_labels,
                directory=directory,
                key=secrets.token_hex(32),
                token=secrets.token_hex(32),
                host_uid=os.geteuid(),
                host_cpus=engine.cpus,
                transport=self.transport,
                network=self._network,
                mount=mount,
                mount_gid=None if mount is None else mount_group(mount),
                seccomp=seccomp_profile(),
            )
            container_id = engine.start_container(spec)
            channels, supervisor = self._endpoints(engine, spec, container_id)
        except BaseException as error:
            self._discard(sandbox_id)
            if isinstance(error, ImageError):
                raise LaunchError(str(error)) from None
            if isinstance(error, ENGINE_ERRORS):
                raise LaunchError(f"the engine could not start a sandbox of {image.name}: {explain(error)}") from error
            raise
        return Launched(
            sandbox_id=sandbox_id,
            image=image,
            runtime_id=container_id,
            directory=directory,
            work_directory=WORK_DIRECTORY,
            key=spec.key.encode(),
            token=spec.token,
            supervisor=supervisor,
            channels=channels,
            transport=self.transport,
            template=template,
        )

    def _endpoints(
        self, engine: Engine, spec: ContainerSpec, container_id: str
    ) -> tuple[dict[str, Endpoint], Endpoint]:
        if self.transport == "ipc":
            with runtime_errors_as_launch_errors():
                return ipc_endpoints(spec.directory)
        ports = engine.published_ports(container_id)
        try:
            found = {name: Endpoint(host="127.0.0.1", port=ports[inner]) for name, inner in TCP_PORTS.items()}
        except KeyError:
            raise LaunchError("the engine has published no ports for the sandbox; it may have ended at once") from None
        return {name: found[name] for name in CHANNELS}, found["supervisor"]

    def _discard(self, sandbox_id: str) -> None:
        """Remove what a failed launch left; what the engine keeps is removed when it is compared with its list."""
        try:
            self._clear(sandbox_id)
        except ENGINE_ERRORS as error:
            self.log.warning("could not remove the failed sandbox %s yet: %s", sandbox_id, explain(error))

    def _clear(self, sandbox_id: str) -> None:
        """Remove container and runtime directory; returns once both are gone."""
        self._engine_now().remove_container(sandbox_id, time.monotonic() + self.engine_timeout)
        self.owner.remove_sandbox_directory(sandbox_id)

    # --- on the loop ------------------------------------------------------------------------------------------------

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _removed_or_left(self, container: _Container) -> None:
        # LaunchError: it stays, as stop() tells.
        with contextlib.suppress(LaunchError, *ENGINE_ERRORS):
            await self._removal(container)

    async def _stop_watching(self, watch: EventWatch) -> None:
        try:
            await watch.stop()
        except TimeoutError:
            self.log.warning("the thread that reads the container engine's events does not end")

    async def _remove_network(self, engine: Engine, network: str) -> None:
        with contextlib.suppress(*ENGINE_ERRORS):
            await self._call(engine.remove_network, network)

    def _removal(self, container: _Container) -> asyncio.Task[None]:
        """Return the one task that removes this container; a new one where the last has failed."""
        removal = container.removal
        if removal is None or (removal.done() and (removal.cancelled() or removal.exception() is not None)):
            removal = asyncio.create_task(self._remove(container), name=f"remove {container.sandbox_id}")
            container.removal = removal
        return removal

    async def _remove(self, container: _Container) -> None:
        deadline = asyncio.get_running_loop().time() + self.destroy_timeout
        while True:
            try:
                await self._call(self._clear, container.sandbox_id)
                break
            except ENGINE_ERRORS as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise LaunchError(f"sandbox {container.sandbox_id} cannot be removed: {explain(error)}") from error
            await asyncio.sleep(_RETRY_PAUSE)
        self._containers.pop(container.sandbox_id, None)

    async def _remove_when_made(self, making: asyncio.Future[Launched], container: _Container) -> None:
        await asyncio.gather(making, return_exceptions=True)
        await self._removal(container)

    def _event(self, event: Event) -> None:
        attributes = event.get("Actor", {}).get("Attributes", {})
        container = self._containers.get(attributes.get(LABEL_SANDBOX, ""))
        if container is None:
            return
        ended = container.evidence.ended
        container.evidence.add_event(str(event.get("Action")), attributes, asyncio.get_running_loop().time())
        container.news.set()
        if container.evidence.ended and not ended:
            self._own(self._conclude(container))

    async def _conclude(self, container: _Container) -> None:
        """Tell why a container ended, once all evidence had its time to come; not for what we remove ourselves."""
        evidence = container.evidence
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EVIDENCE_SECONDS):
                while not evidence.conclusive:
                    container.news.clear()
                    await container.news.wait()
        if container.removal is not None or container.launched is None:
            return
        if evidence.oom_events:
            evidence.more["limit_mb"] = container.image.limits.container_memory_mb
        verdict = evidence.verdict()
        if verdict.cause is ExitCause.EXITED and verdict.exit_code:
            # PID 1 speaks only when it cannot start the kernel: then its words are the reason.
            words = await self._call(self._engine_now().last_words, container.sandbox_id)
            if words:
                evidence.more["reason"] = words
        self.log.info("sandbox %s ended: %s", container.sandbox_id, verdict)
        self._on_exit(container.sandbox_id, verdict)

    async def _keep_reconciled(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RECONCILE_SECONDS):
                    await self._look_again.wait()
            self._look_again.clear()
            try:
                await self._reconcile()
            except (*ENGINE_ERRORS, LaunchError) as error:
                self.log.warning("could not compare sandboxes with the engine's list: %s", explain(error))

    async def _reconcile(self) -> None:
        """Compare with the engine's list: end what it lost, remove what it still has and we do not know."""
        asked_at = asyncio.get_running_loop().time()
        listed = await self._call(self._engine_now().sandboxes_of, self.owner.path)
        for sandbox_id in listed - self._containers.keys() - {""}:
            await self._call(self._clear, sandbox_id)
        for container in list(self._containers.values()):
            if container.removal is not None:
                if container.removal.done():
                    await self._removal(container)
            elif container.launched is not None and container.launched_at < asked_at and not container.evidence.ended:
                await self._look_at(container, listed)

    async def _look_at(self, container: _Container, listed: set[str]) -> None:
        state: dict[str, Any] = {}
        if container.sandbox_id in listed:
            state = await self._call(self._engine_now().state, container.sandbox_id)
        if not container.evidence.ended:
            container.evidence.add_state(state)
            if container.evidence.ended:
                self._own(self._conclude(container))
