"""Injects the faults of a schedule, one after the other, and notes what it really hit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker

from kernelprovisioner.launchers.container_spec import LABEL_OWNER
from tests import services
from tests.chaos.event_log import EventLog
from tests.chaos.faults import Fault, History, Kind
from tests.chaos.service import GatewayService

#: A container that is younger still warms.
WARMING_SECONDS = 4.0
#: How long to wait for a victim of the right kind.
PATIENCE = 20.0
#: How long an engine may be away, at most.
ENGINE_AWAY_SECONDS = 4.0
_KERNEL = "samovar_kernel.app"


class Injector:
    """`claimed` tells the containers that clients know to be theirs."""

    def __init__(
        self,
        engine: services.Engine,
        service: GatewayService,
        history: History,
        log: EventLog,
        claimed: Callable[[], set[str]],
    ) -> None:
        self._engine = engine
        self._service = service
        self._history = history
        self._log = log
        self._claimed = claimed
        self._client = docker.DockerClient(base_url=engine.url, timeout=60)

    def run(self, faults: list[Fault], stop: threading.Event) -> None:
        """Inject each fault when its time has come."""
        began = time.monotonic()
        for fault in faults:
            if stop.wait(max(0.0, began + fault.at - time.monotonic())):
                return
            with contextlib.suppress(docker.errors.NotFound):
                if not self._inject(fault):
                    self._log.write("fault left out", kind=fault.kind, why="there was no victim")
        self._client.close()

    def containers(self, runtime: Path) -> list[dict[str, Any]]:
        """The running sandboxes of the owners in one runtime directory, oldest first."""
        found = self._client.api.containers(filters={"label": services.LABEL})
        ours = [each for each in found if Path(each["Labels"].get(LABEL_OWNER, "")).parent == runtime]
        return sorted(ours, key=lambda each: (each["Created"], each["Id"]))

    def _inject(self, fault: Fault) -> bool:
        match fault.kind:
            case Kind.GATEWAY_KILL | Kind.GATEWAY_UPGRADE | Kind.GATEWAY_STOP:
                return self._service.up.wait(PATIENCE) and self._service.end(fault.kind)
            case Kind.ENGINE_KILL:
                happening = self._history.begin(fault.kind)
                self._log.write("fault", kind=fault.kind)
                self._engine.kill()
                time.sleep(fault.variant * ENGINE_AWAY_SECONDS)
                self._engine.start_again()
                happening.end = time.monotonic()
                self._log.write("engine up", kind=fault.kind)
                return True
            case Kind.ENGINE_RESTART:
                happening = self._history.begin(fault.kind)
                self._log.write("fault", kind=fault.kind)
                self._engine.restart()
                happening.end = time.monotonic()
                self._log.write("engine up", kind=fault.kind)
                return True
            case _:
                victim = self._victim(fault)
                return victim is not None and self._kill(fault, victim)

    def _victim(self, fault: Fault) -> str | None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            claimed = self._claimed()
            found = []
            for each in self.containers(self._service.gateway.runtime):
                young = time.time() - each["Created"] < WARMING_SECONDS
                kind = Kind.CLAIMED if each["Id"] in claimed else Kind.WARMING if young else Kind.WARM
                if kind is fault.kind or (fault.kind is Kind.KERNEL and kind is Kind.CLAIMED):
                    found.append(str(each["Id"]))
            if found:
                return found[int(fault.victim * len(found))]
            time.sleep(0.1)
        return None

    def _kill(self, fault: Fault, victim: str) -> bool:
        container = self._client.containers.get(victim)
        if fault.kind is not Kind.KERNEL:
            how = "kill" if fault.variant < 0.5 else "rm -f"
            self._history_of(fault, victim, how)
            try:
                container.kill() if how == "kill" else container.remove(force=True)
            except docker.errors.APIError as error:
                # It was just ending.
                self._log.write("fault failed", kind=fault.kind, container=victim[:12], error=str(error))
            return True
        try:
            table = container.top()
        except docker.errors.APIError:
            return False  # it was just ending
        column = table["Titles"].index("PID")
        # A container that is just ending has none.
        pids = [int(row[column]) for row in table["Processes"] or () if _KERNEL in row[-1]]
        if not pids:
            return False
        self._history_of(fault, victim, f"SIGKILL to {pids[0]}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[0], signal.SIGKILL)
        return True

    def _history_of(self, fault: Fault, victim: str, how: str) -> None:
        # Whenever its session asks next, this is why.
        self._history.begin(fault.kind, [victim])
        self._log.write("fault", kind=fault.kind, container=victim[:12], how=how)
