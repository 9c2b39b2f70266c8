"""ContainerEnds: why containers end, by the engine's events, and by its list where events may have been lost."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import ExitCallback, Launched
from kernelprovisioner.launchers.container_spec import LABEL_SANDBOX
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, Engine
from kernelprovisioner.launchers.docker_events import Event
from kernelprovisioner.launchers.engine_calls import EngineCalls
from kernelprovisioner.launchers.exits import Evidence, signal_of
from kernelprovisioner.sandbox_exit import ExitCause

#: how long the engine's other events may come after the `die` of a killed container
_EVIDENCE_SECONDS = 0.5
#: the same after one of a container that was stopped: an engine that stops all of them is slow to say so
_STOP_EVIDENCE_SECONDS = 3.0
#: how long an engine may take to say that it is there, while somebody waits for the cause of a death
_GOING_SECONDS = 1.0


@dataclass
class Container:
    """What is known of one container between its launch and its confirmed removal."""

    sandbox_id: str
    image: KernelImage | None = None
    launched: Launched | None = None
    launched_at: float = 0.0
    evidence: Evidence = field(default_factory=Evidence)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    removal: asyncio.Task[None] | None = None


class ContainerEnds:
    """Tells `on_exit` once for each container that ended and that we do not remove ourselves. All on the loop."""

    def __init__(
        self,
        containers: Mapping[str, Container],
        engine: Engine,
        calls: EngineCalls,
        own: Callable[[Coroutine[Any, Any, None]], None],
        on_exit: ExitCallback,
    ) -> None:
        """`containers`: those that are known, by sandbox id. `own` runs work in a task of the launcher's."""
        self._containers = containers
        self._engine = engine
        self._calls = calls
        self._own = own
        self._on_exit = on_exit

    def event(self, event: Event) -> None:
        """Take in an event of the engine."""
        attributes = event.get("Actor", {}).get("Attributes", {})
        container = self._containers.get(attributes.get(LABEL_SANDBOX, ""))
        if container is None:
            return
        ended = container.evidence.ended
        container.evidence.add_event(str(event.get("Action")), attributes, asyncio.get_running_loop().time())
        container.news.set()
        if container.evidence.ended and not ended:
            self._own(self._conclude(container))

    def engine_restarted(self) -> None:
        """The engine was restarted: what is found ended from now on it took with it."""
        for container in self._containers.values():
            container.evidence.engine_restarted = container.launched is not None

    async def look_at(self, container: Container, listed: Mapping[str, str]) -> None:
        """Take in how the engine lists a container, in `listed` states by sandbox id. Raises ENGINE_ERRORS."""
        state: dict[str, Any] = {"Status": listed.get(container.sandbox_id)}
        if state["Status"] is None:
            state = {}
        elif state["Status"] != "running":
            state = await self._calls.run(self._engine.state, container.sandbox_id)
        if not container.evidence.ended:
            container.evidence.add_state(state)
            if container.evidence.ended:
                self._own(self._conclude(container))

    async def _conclude(self, container: Container) -> None:
        """Tell why a container ended, once all evidence had its time to come; not for what we remove ourselves."""
        evidence = container.evidence
        stopped = signal_of(evidence.exit_code) == signal.SIGTERM
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_EVIDENCE_SECONDS if stopped else _EVIDENCE_SECONDS):
                while not evidence.conclusive:
                    container.news.clear()
                    await container.news.wait()
        if container.removal is not None or container.launched is None:
            return
        if evidence.oom_events and container.image is not None:
            evidence.more["limit_mb"] = container.image.limits.container_memory_mb
        verdict = evidence.verdict()
        if (stopped or verdict.cause is ExitCause.REMOVED) and await self._engine_is_going():
            evidence.engine_restarted = True
            verdict = evidence.verdict()
        if verdict.cause is ExitCause.EXITED and verdict.exit_code:
            # PID 1 speaks only when it cannot start the kernel: then its words are the reason.
            words = await self._calls.run(self._engine.last_words, container.sandbox_id)
            if words:
                evidence.more["reason"] = words
        self._on_exit(container.sandbox_id, verdict)

    async def _engine_is_going(self) -> bool:
        """Whether the engine stops: it refuses answers first, then ends its containers, and tells that to the last."""
        state = self._calls.state
        try:
            async with asyncio.timeout(_GOING_SECONDS):
                await self._calls.run(self._engine.ping)
        except TimeoutError:
            return not state.available
        except ENGINE_ERRORS:
            return True
        return not state.available
