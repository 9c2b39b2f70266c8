"""DockerLauncher: sandboxes as locked-down containers of a container engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from traitlets import Enum, Integer, Unicode, default

from kernelprovisioner.images import ImageError, KernelImage
from kernelprovisioner.launchers.base import EngineUnavailable, ExitCallback, Launched, LaunchError, LaunchRequest
from kernelprovisioner.launchers.configurable import ConfigurableLauncher
from kernelprovisioner.launchers.container_ends import Container, ContainerEnds
from kernelprovisioner.launchers.container_spec import LABEL_OWNER
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, Engine, engine_url, explain, new_client
from kernelprovisioner.launchers.docker_events import EventWatch
from kernelprovisioner.launchers.docker_maker import ContainerMaker
from kernelprovisioner.launchers.engine_calls import EngineCalls
from kernelprovisioner.launchers.engine_state import SLOW_SECONDS
from kernelprovisioner.patience import all_done, end
from kernelprovisioner.runtime import OwnerDirectory, RuntimeRoot
from kernelprovisioner.traits import FiniteFloat

#: events may get lost, so that the engine's list is compared at least this often
_RECONCILE_SECONDS = 30.0
_RETRY_PAUSE = 0.5
#: what an engine has not removed by then goes on being removed behind a gateway that starts
_SETTLE_SECONDS = 10.0

_log = logging.getLogger(__name__)


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
        self._containers: dict[str, Container] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_again = asyncio.Event()
        self._engine: Engine | None = None
        self._calls = EngineCalls()
        self._state = self._calls.state
        self._ends: ContainerEnds | None = None
        self._watch: EventWatch | None = None
        #: dead owners whose things are removed when what we continue is safe
        self._dead: list[OwnerDirectory] = []
        self._reconciling: asyncio.Task[None] | None = None
        self._maker: ContainerMaker | None = None

    @property
    def available(self) -> bool:
        return self._state.available

    @property
    def trouble(self) -> str | None:
        """What is wrong with the engine, as far as its calls and events tell: one sentence, None where nothing is."""
        now = time.monotonic()
        if self._state.away_since is not None:
            seconds = now - self._state.away_since
            return f"the container engine at {self.docker_url} is away since {seconds:.0f} s: {self._state.reason}"
        waiting = self._state.waiting(now)
        if waiting > SLOW_SECONDS:
            return f"the container engine at {self.docker_url} is slow: a call has waited for {waiting:.0f} s"
        return None

    async def start(self, on_exit: ExitCallback, *, resume: bool = False) -> None:
        self._calls.start(self.docker_url, self.engine_threads)
        try:
            self._engine = await self._calls.run(Engine.connect, self.docker_url, self.engine_timeout)
            await self._calls.run(self._prepare, resume)
            self._ends = ContainerEnds(self._containers, self._engine, self._calls, self._own, on_exit)
            self._watch = EventWatch(
                lambda: new_client(self.docker_url, self.engine_timeout),
                f"{LABEL_OWNER}={self.owner.path}",
                self._ends.event,
                self._connected,
                self._lost,
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

    async def adopt(self, launched: Launched) -> None:
        sandbox_id = launched.sandbox_id
        if sandbox_id in self._containers:
            raise ValueError(f"sandbox {sandbox_id} is known already")
        # Known before it is looked at, so that no event of its end is missed in between.
        container = Container(sandbox_id, launched.image, launched, asyncio.get_running_loop().time())
        self._containers[sandbox_id] = container
        try:
            state = await self._calls.run(self._engine_now().state, sandbox_id)
            if state.get("Status") != "running":
                raise LaunchError(f"sandbox {sandbox_id} is gone: {_how_it_ended(state)}")
        except ENGINE_ERRORS as error:
            del self._containers[sandbox_id]
            raise LaunchError(f"the engine does not tell about sandbox {sandbox_id}: {explain(error)}") from error
        except BaseException:
            del self._containers[sandbox_id]
            raise

    async def discard(self, sandbox_id: str) -> None:
        container = self._containers.setdefault(sandbox_id, Container(sandbox_id))
        try:
            await asyncio.shield(self._removal(container))
        except LaunchError as error:
            _log.warning("%s; it is tried again", error)

    async def settle(self) -> None:
        self._unsettled = False
        dead, self._dead = self._dead, []
        if dead:
            self._own(self._reap_later(dead))
        try:
            unknown = await self._unknown(await self._listed())
        except ENGINE_ERRORS as error:
            _log.warning("what an earlier gateway left is removed later: %s", explain(error))
            self._look_again.set()
            return
        for sandbox_id in unknown:
            self._own(self.discard(sandbox_id))
        removals = [each.removal for each in self._containers.values() if each.removal is not None]
        if self._tasks or removals:
            await asyncio.wait([*self._tasks, *removals], timeout=_SETTLE_SECONDS)

    async def _reap_later(self, dead: list[OwnerDirectory]) -> None:
        try:
            await self._calls.run(self._reap, dead)
        except ENGINE_ERRORS as error:
            _log.warning("what dead owners left is removed by the next start: %s", explain(error))
        finally:
            for owner in dead:
                owner.release()

    async def template(self, image: KernelImage) -> str | None:
        try:
            return await self._calls.run(self._maker_now().template, image)
        except (LaunchError, ImageError, *ENGINE_ERRORS) as error:
            _log.debug("no template of %s: %s", image.name, explain(error))
            return None

    async def launch(self, request: LaunchRequest) -> Launched:
        if request.sandbox_id in self._containers:
            raise ValueError(f"sandbox {request.sandbox_id} exists already")
        container = Container(request.sandbox_id, request.image)
        self._containers[request.sandbox_id] = container
        making = asyncio.ensure_future(self._calls.run(self._make, request))
        try:
            container.launched = await asyncio.shield(making)
        except asyncio.CancelledError:
            # The thread cannot be stopped: what it makes is removed when it is done.
            self._own(self._remove_when_made(making, container))
            raise
        except BaseException:
            if request.sandbox_id in await self._calls.run(self.owner.sandbox_ids):
                # The engine went away in between, and may have made the container all the same.
                self._own(self._removed_or_left(container))
            else:
                del self._containers[request.sandbox_id]
            raise
        container.launched_at = asyncio.get_running_loop().time()
        if container.evidence.ended:
            words = await self._calls.run(self._engine_now().last_words, request.sandbox_id)
            await self.destroy(container.launched)
            raise LaunchError(
                f"the sandbox ended at once (exit code {container.evidence.exit_code}): {words}".rstrip(": ")
            )
        return container.launched

    async def warmed(self, launched: Launched) -> None:
        try:
            await self._calls.run(self._engine_now().give_full_share, launched.runtime_id)
        except ENGINE_ERRORS as error:
            # One that is just dying: its exit is told by the events.
            _log.debug("sandbox %s keeps its low share of CPU: %s", launched.sandbox_id, explain(error))

    async def destroy(self, launched: Launched) -> None:
        container = self._containers.get(launched.sandbox_id)
        if container is not None:
            await asyncio.shield(self._removal(container))

    def was_out_of_memory(self, launched: Launched, within: float) -> bool:
        container = self._containers.get(launched.sandbox_id)
        return container is not None and time.monotonic() - container.evidence.oom_at <= within

    async def stop(self, give_up: asyncio.Event | None = None, *, keep: bool = False) -> list[str]:
        if self._reconciling is not None:
            self._reconciling.cancel()
            await asyncio.gather(self._reconciling, return_exceptions=True)
            self._reconciling = None
        while self._tasks and await all_done(self._tasks, give_up):
            pass
        for container in list(self._containers.values()):
            if not keep or container.removal is not None:
                self._own(self._removed_or_left(container))
        if self._watch is not None:
            self._own(self._stop_watching(self._watch))
            self._watch = None
        await all_done(self._tasks, give_up)
        if self._engine is not None:
            if self._maker is not None and self._maker.network is not None and not keep:
                self._own(self._remove_network(self._engine, self._maker.network))
                await all_done(self._tasks, give_up)
            self._maker = None
            self._engine.close()
            self._engine = None
        left = sorted(self._containers)
        for container in self._containers.values():
            if container.removal is not None:
                container.removal.cancel()
        await end(self._tasks)
        # Containers that could not be removed need their owner's directory, so that somebody else reaps them.
        for owner in self._dead:
            owner.release()
        await asyncio.to_thread(self._give_owner_up, keep or bool(left))
        self._calls.stop()
        return left

    def _engine_now(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the docker launcher is not started")
        return self._engine

    def _ends_now(self) -> ContainerEnds:
        if self._ends is None:
            raise RuntimeError("the docker launcher is not started")
        return self._ends

    def _maker_now(self) -> ContainerMaker:
        if self._maker is None:
            raise RuntimeError("the docker launcher is not started")
        return self._maker

    # --- in threads -------------------------------------------------------------------------------------------------

    def _prepare(self, resume: bool) -> None:
        """Take an owner directory, reap what dead owners left in this engine, make the network where one is needed."""
        engine = self._engine_now()
        dead = self._take_owner(f"docker {engine.id}", resume)
        if self._unsettled:
            # Those that we continue have only so long to live without us: others' come later.
            self._dead = dead
        else:
            self._reap(dead)
        self._maker = ContainerMaker(engine, self.owner, self.transport)
        self._maker.prepare()

    def _reap(self, dead: list[OwnerDirectory]) -> None:
        """Remove what dead owners left in this engine, and their directories."""
        removed, failed = self._engine_now().reap(dead)
        if removed:
            _log.info("removed %d containers and networks of owners that are gone", removed)
        for owner in dead:
            if owner.path in failed:
                owner.release()
            else:
                self.runtime.remove_links_into(owner)
                owner.close()

    def _make(self, request: LaunchRequest) -> Launched:
        """Start the container; on any failure nothing is left."""
        try:
            return self._maker_now().make(request)
        except BaseException as error:
            self._discard(request.sandbox_id)
            if isinstance(error, ImageError):
                raise LaunchError(str(error)) from None
            if isinstance(error, ENGINE_ERRORS):
                name = request.image.name
                raise LaunchError(f"the engine could not start a sandbox of {name}: {explain(error)}") from error
            raise

    def _discard(self, sandbox_id: str) -> None:
        """Remove what a failed launch left; what the engine keeps is removed when it is compared with its list."""
        try:
            self._clear(sandbox_id)
        except ENGINE_ERRORS as error:
            level = logging.WARNING if self.available else logging.DEBUG
            _log.log(level, "could not remove the failed sandbox %s yet: %s", sandbox_id, explain(error))

    def _clear(self, sandbox_id: str) -> None:
        """Remove container and runtime directory; returns once both are gone."""
        self._engine_now().remove_container(sandbox_id, time.monotonic() + self.engine_timeout)
        self.owner.remove_sandbox_directory(sandbox_id)

    # --- on the loop ------------------------------------------------------------------------------------------------

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _removed_or_left(self, container: Container) -> None:
        # LaunchError: it stays, as stop() tells.
        with contextlib.suppress(LaunchError, *ENGINE_ERRORS):
            await self._removal(container)

    async def _stop_watching(self, watch: EventWatch) -> None:
        try:
            await watch.stop()
        except TimeoutError:
            _log.warning("the thread that reads the container engine's events does not end")

    async def _remove_network(self, engine: Engine, network: str) -> None:
        with contextlib.suppress(*ENGINE_ERRORS):
            await self._calls.run(engine.remove_network, network)

    def _removal(self, container: Container) -> asyncio.Task[None]:
        """Return the one task that removes this container; a new one where the last has failed."""
        removal = container.removal
        if removal is None or (removal.done() and (removal.cancelled() or removal.exception() is not None)):
            removal = asyncio.create_task(self._remove(container), name=f"remove {container.sandbox_id}")
            container.removal = removal
        return removal

    async def _remove(self, container: Container) -> None:
        deadline = asyncio.get_running_loop().time() + self.destroy_timeout
        while True:
            try:
                await self._calls.run(self._clear, container.sandbox_id)
                break
            except ENGINE_ERRORS as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise LaunchError(f"sandbox {container.sandbox_id} cannot be removed: {explain(error)}") from error
            await asyncio.sleep(_RETRY_PAUSE)
        self._containers.pop(container.sandbox_id, None)

    async def _remove_when_made(self, making: asyncio.Future[Launched], container: Container) -> None:
        await asyncio.gather(making, return_exceptions=True)
        await self._removal(container)

    def _connected(self, restarted: bool) -> None:
        """The engine's events come: the first time, or again."""
        away = self._state.connected(time.monotonic())
        if restarted:
            self._ends_now().engine_restarted()
        self._look_again.set()
        if away is not None:
            _log.warning(
                "the container engine is back after %.1f s%s", away, ", and was restarted" if restarted else ""
            )
            if self.on_back is not None:
                self.on_back()

    def _lost(self, reason: str) -> None:
        """The engine's events broke off, or it still does not answer."""
        if self._state.lost(time.monotonic(), reason):
            _log.warning("the container engine at %s is away: %s", self.docker_url, reason)

    async def _keep_reconciled(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RECONCILE_SECONDS):
                    await self._look_again.wait()
            self._look_again.clear()
            try:
                await self._reconcile()
            except (*ENGINE_ERRORS, LaunchError) as error:
                # That it is away has been told; the next connection looks again.
                level = logging.WARNING if self.available else logging.DEBUG
                _log.log(level, "could not compare sandboxes with the engine's list: %s", explain(error))
            except Exception:
                # The next round may go well, and nobody else looks.
                _log.exception("comparing sandboxes with the engine's list failed")

    async def _reconcile(self) -> None:
        """Compare with the engine's list: end what it lost, remove what it still has and we do not know."""
        asked_at = asyncio.get_running_loop().time()
        listed = await self._listed()
        if not self._unsettled:
            for sandbox_id in await self._unknown(listed):
                await self._calls.run(self._clear, sandbox_id)
        for container in list(self._containers.values()):
            if container.removal is not None:
                if container.removal.done():
                    await self._removal(container)
            elif container.launched is not None and container.launched_at < asked_at and not container.evidence.ended:
                await self._ends_now().look_at(container, listed)

    async def _listed(self) -> dict[str, str]:
        """Return the states of our owner's containers as the engine lists them, by sandbox id."""
        return await self._calls.run(self._engine_now().states_of, self.owner.path)

    async def _unknown(self, listed: Mapping[str, str]) -> set[str]:
        """Return the sandboxes of our owner that the engine or the runtime directory has and we do not know."""
        # Directories, too: of a launch that failed while the engine was away nothing else is left.
        there = await self._calls.run(self.owner.sandbox_ids)
        return {*listed, *there} - self._containers.keys() - {""}


def _how_it_ended(state: Mapping[str, Any]) -> str:
    if not state:
        return "its container does not exist any more"
    status = state.get("Status")
    what = "has ended" if status == "exited" else f"is {status}"
    return f"its container {what} (exit code {state.get('ExitCode')})"
