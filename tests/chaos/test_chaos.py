"""Everything is killed at random under load: each request has one right answer or the true cause, and nothing is left.

SAMOVAR_CHAOS_SECONDS says how long faults come (default 60), SAMOVAR_CHAOS_SEED which; the log of a run is in
.cache/chaos-runs/<seed>/events.jsonl.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from kernelprovisioner import kernelspecs
from tests import services
from tests.chaos import census
from tests.chaos.event_log import EventLog
from tests.chaos.faults import ENGINE_KINDS, Happening, History, Kind, schedule
from tests.chaos.injector import Injector
from tests.chaos.notebook_client import NotebookUser
from tests.chaos.rest_client import RestClient
from tests.chaos.service import GatewayService
from tests.gateway_process import GatewayProcess

SECONDS = float(os.environ.get("SAMOVAR_CHAOS_SECONDS", "60"))
KINDS = [Kind(name) for name in os.environ.get("SAMOVAR_CHAOS_KINDS", ",".join(Kind)).split(",")]
#: A short run has fewer: each engine that ends costs the start of all their sandboxes.
REST_CLIENTS, NOTEBOOK_USERS = (16, 4) if SECONDS >= 300 else (8, 2)
WARM = 2
LINE_SECONDS = 200.0
#: Clients of the second gateway, which is never touched itself.
NEIGHBOURS = 2
#: Until all clients have their last answers, and until the pool is whole again.
LAST_ANSWERS_SECONDS = 300.0
WHOLE_SECONDS = 180.0
#: How many more the gateway may have than before, when it holds as many sandboxes: its pool of connections to the
#: engine fills up, and its threads.
MORE = {"descriptors": 24, "threads": 8}

pytestmark = [pytest.mark.service, pytest.mark.limit(SECONDS + 900)]


@pytest.fixture(scope="module")
def engine(docker_url: str, kernel_image: str) -> Iterator[services.Engine]:
    """An own engine, which may be killed, with the kernel image in it."""
    if os.geteuid() != 0:
        pytest.skip("an engine that may be killed needs root")
    engine = services.Engine("chaos")
    try:
        engine.start()
        services.copy_image(docker_url, engine.url)
        yield engine
    except services.ServiceMissing as missing:
        pytest.skip(str(missing))
    finally:
        engine.stop()


class World:
    """Both gateways, all clients, and what breaks."""

    def __init__(self, engine: services.Engine, directory: Path, seed: int) -> None:
        self.engine = engine
        self.seed = seed
        self.log = EventLog(services.CACHE / "chaos-runs" / str(seed) / "events.jsonl")
        self.history = History()
        self.stop = threading.Event()
        settings = {
            # Else a gateway that starts while the engine is away would run code unprotected.
            "SAMOVAR_LAUNCHER": "docker",
            "CONTAINER_POOL_PY_MIN": str(WARM),
            # What is wanted in the end shall be what was wanted in the beginning.
            "SAMOVAR_POOL_SETTINGS_HIT_RATE": "0",
            "SAMOVAR_POOL_SETTINGS_LINE_TIMEOUT": str(LINE_SECONDS),
        }
        for name in ("main", "beside"):
            (directory / name).mkdir()
        self.main = GatewayProcess(
            directory / "main",
            engine.url,
            settings | {"CONTAINER_POOL_PY_MAX": "26", "SAMOVAR_KEEP_SANDBOXES": "1"},
        )
        self.beside = GatewayProcess(directory / "beside", engine.url, settings | {"CONTAINER_POOL_PY_MAX": "6"})
        kernelspecs.install(prefix=str(directory / "prefix"))
        self.directory = directory
        self.service = GatewayService(self.main, self.history, self.log)
        self.clients: list[RestClient] = []
        self.neighbours: list[RestClient] = []
        self.users: list[NotebookUser] = []

    def start(self) -> None:
        self.main.start(120)
        self.beside.start(120)
        for gateway in (self.main, self.beside):
            self.settle(gateway)
        assert self.main.process is not None
        self.before = census.usage(self.main.process.pid)
        self.service.start()
        environment = self.main.environment | {"JUPYTER_PATH": str(self.directory / "prefix" / "share" / "jupyter")}
        environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
        for name in ("config", "runtime", "ipython"):
            variable = "IPYTHONDIR" if name == "ipython" else f"JUPYTER_{name.upper()}_DIR"
            environment[variable] = str(self.directory / name)
        seed = str(self.seed)
        work = self.directory / "work"
        work.mkdir()
        self.users = [
            NotebookUser(f"notebooks-{number}", environment, work, self.history, self.log, self.stop, seed)
            for number in range(NOTEBOOK_USERS)
        ]
        self.clients = [
            RestClient(f"rest-{number}", self.main, self.history, self.log, self.stop, seed)
            for number in range(REST_CLIENTS)
        ]
        # Of what is injected only the engine's end concerns them.
        self.neighbours = [
            RestClient(f"beside-{number}", self.beside, _EngineHistory(self.history), self.log, self.stop, seed)
            for number in range(NEIGHBOURS)
        ]
        for thread in (*self.users, *self.clients, *self.neighbours):
            thread.start()

    def claimed(self) -> set[str]:
        """The containers that the main gateway's clients know."""
        known: list[RestClient | NotebookUser] = [*self.clients, *self.users]
        return set().union(*(client.containers for client in known))

    def break_things(self) -> None:
        faults = schedule(self.seed, SECONDS, KINDS)
        self.log.write("schedule", seed=self.seed, seconds=SECONDS, faults=[asdict(fault) for fault in faults])
        Injector(self.engine, self.service, self.history, self.log, self.claimed).run(faults, self.stop)

    def finish(self) -> None:
        """Last answers; sessions go; the pool is whole; then the gateways stop."""
        self.service.up.wait(LAST_ANSWERS_SECONDS)
        self.stop.set()
        deadline = time.monotonic() + LAST_ANSWERS_SECONDS
        for thread in (*self.clients, *self.neighbours, *self.users):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self.log.violation(thread.name, f"no last answer within {LAST_ANSWERS_SECONDS:g} s")
        for client in (*self.clients, *self.neighbours):
            client.last_cell()
        for user in self.users:
            user.finish()
        for gateway in (self.main, self.beside):
            self.settle(gateway)
            for line in census.problems(self.engine.url, gateway):
                self.log.violation(gateway.directory.name, line)
            for session in gateway.call("GET", "/api/v1/sessions").body["sessions"]:
                gateway.call("DELETE", f"/api/v1/sessions/{session['session_id']}")
            self.settle(gateway)
            found = gateway.pool()
            if found["claimed"]:
                self.log.violation(gateway.directory.name, f"sandboxes stay claimed without sessions: {found}")
        self._check_usage()
        self._check_stop()

    def settle(self, gateway: GatewayProcess) -> None:
        deadline = time.monotonic() + WHOLE_SECONDS
        while not census.is_settled(found := gateway.pool()):
            if time.monotonic() > deadline:
                self.log.violation(gateway.directory.name, f"not whole within {WHOLE_SECONDS:g} s: {found}")
                return
            time.sleep(0.2)

    def _check_usage(self) -> None:
        assert self.main.process is not None
        after = census.usage(self.main.process.pid)
        self.log.write("usage", before=asdict(self.before), after=asdict(after))
        for name, more in MORE.items():
            before, now = getattr(self.before, name), getattr(after, name)
            if now > before + more:
                self.log.violation("gateway", f"{now} {name}, {before} before the clients came")

    def _check_stop(self) -> None:
        codes = {"main": self.service.finish(), "beside": self.beside.stop()}
        for gateway in (self.main, self.beside):
            name = gateway.directory.name
            log = gateway.log.read_text()
            if codes[name] != 0:
                self.log.violation(name, f"exit code {codes[name]}; its log ends with {log[-1000:]}")
            left = census.containers(self.engine.url, gateway.runtime)
            if left:
                self.log.violation(name, f"containers were left: {left}")
            if owners := census.directories(gateway.runtime):
                self.log.violation(name, f"runtime directories were left: {owners}")
            for word in ("Traceback", "never retrieved", "was destroyed but it is pending", "never awaited"):
                if word in log:
                    start = log.index(word)
                    self.log.violation(name, f"its log has {word!r}: {log[max(0, start - 300) : start + 1500]}")
        if mounts := census.mounts(str(services.CACHE / "chaos")):
            self.log.violation("engine", f"mounts were left: {mounts}")

    def close(self) -> None:
        """Whatever happened: no process of ours stays, and its logs are kept."""
        self.stop.set()
        for user in self.users:
            user.kill()
        for gateway in (self.main, self.beside):
            if gateway.process is not None and gateway.process.poll() is None:
                if gateway is self.main and self.service.is_alive():
                    self.service.finish()
                else:
                    gateway.stop()
            if gateway.log.exists():
                shutil.copy(gateway.log, self.log.path.parent / f"{gateway.directory.name}.log")
        for thread in (*self.clients, *self.neighbours, *self.users):
            thread.join(60)
        for log in (self.directory / "work").glob("*.log"):
            shutil.copy(log, self.log.path.parent)
        self.log.close()


class _EngineHistory(History):
    """What of a history concerns a gateway that is not broken itself."""

    def __init__(self, whole: History) -> None:
        super().__init__()
        self._whole = whole

    def within(self, since: float, until: float) -> list[Happening]:
        return [happening for happening in self._whole.within(since, until) if happening.kind in ENGINE_KINDS]


def test_every_request_has_its_answer_or_the_true_cause(engine: services.Engine, short_directory: Path) -> None:
    seed = int(os.environ.get("SAMOVAR_CHAOS_SEED", "0")) or secrets.randbelow(10**6) + 1
    world = World(engine, short_directory, seed)
    print(f"SAMOVAR_CHAOS_SEED={seed}, log in {world.log.path}")
    try:
        world.start()
        world.break_things()
        world.finish()
    finally:
        world.close()
    outcomes = Counter[str]()
    asked: list[RestClient | NotebookUser] = [*world.clients, *world.users, *world.neighbours]
    for client in asked:
        outcomes.update({f"{client.name.partition('-')[0]}: {name}": n for name, n in client.outcomes.items()})
    injected = Counter(happening.kind.value for happening in world.history.happenings)
    print(json.dumps({"injected": injected, "outcomes": dict(sorted(outcomes.items()))}, indent=1))
    assert not world.log.violations, f"{len(world.log.violations)} violations, seed {seed}:\n" + "\n\n".join(
        world.log.violations[:20]
    )
    assert outcomes["rest: ok"] > REST_CLIENTS and outcomes["notebooks: ok"], "hardly anything was run"
