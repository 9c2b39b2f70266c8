"""What all tests share: service fixtures, time limits, `async def` tests, and the check that nothing is left behind."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import inspect
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import docker
import hypothesis
import pytest

from tests import services

# Single examples are slow on a busy machine; whole tests have a limit of their own.
hypothesis.settings.register_profile("samovar", deadline=None)
hypothesis.settings.load_profile("samovar")

SERVICE_MARKERS = ("service", "conformance")
UNIT_LIMIT = 20.0
SERVICE_LIMIT = 300.0
#: how long threads and descriptors that a test gave up may take to go
SETTLE = 5.0

_engine_failure: str | None = None


# --- services ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def docker_url() -> Iterator[str]:
    """The URL of a container engine that tests may use; the test is skipped where there is none."""
    global _engine_failure
    if _engine_failure is not None:
        pytest.skip(_engine_failure)
    try:
        with services.docker_engine() as url:
            leftovers = _leftovers or Leftovers()
            leftovers.note_containers(url)
            yield url
            leftovers.check_containers(url)
    except services.ServiceMissing as missing:
        _engine_failure = str(missing)
        pytest.skip(_engine_failure)


@pytest.fixture(scope="session")
def kernel_image(docker_url: str) -> str:
    """The name of a kernel image that is built in the test engine."""
    if not os.environ.get("SAMOVAR_TEST_IMAGES_BUILT"):
        services.build_kernel_image(docker_url)
    return "python"


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A private directory with a path that is short enough for Unix sockets (pytest's tmp_path may not be)."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def runtime_directory(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of the test's own, in this process's and its children's environment."""
    directory = short_directory / "run"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("SAMOVAR_RUNTIME_DIR", str(directory))
    return directory


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, a service test that was skipped is a failure: else a machine without engine would pass."""
    report = yield
    if report.skipped and services.in_ci() and not hasattr(report, "wasxfail") and _needs_service(item):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which CI counts as a failure: {report.longrepr}"
    return report


def _needs_service(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in SERVICE_MARKERS)


# --- time limits and async tests --------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """End a test that hangs, with a traceback of where it hung."""
    limit = SERVICE_LIMIT if _needs_service(item) else UNIT_LIMIT
    if own := item.get_closest_marker("limit"):
        limit = own.args[0]

    def expired(signum: int, frame: FrameType | None) -> None:
        pytest.fail(f"the test ran longer than {limit:g} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests on a loop of their own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj) or pyfuncitem.get_closest_marker("anyio"):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names if name in pyfuncitem.funcargs}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture(autouse=True)
def no_task_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test whose loop ended (asyncio.run) while a task still ran: every task has an owner that ends it."""
    left: list[str] = []
    close: Callable[[asyncio.Runner], None] = asyncio.Runner.close

    def checked_close(runner: asyncio.Runner) -> None:
        try:
            loop = runner.get_loop()
        except RuntimeError:  # closed before
            return
        # A task that was cancelled in the test's last step needs one turn of the loop to end.
        loop.call_soon(loop.stop)
        loop.run_forever()
        left.extend(repr(task) for task in asyncio.all_tasks(loop) if not task.cancelling())
        close(runner)

    monkeypatch.setattr(asyncio.Runner, "close", checked_close)
    yield
    assert not left, "tasks left behind:\n" + "\n".join(left)


# --- nothing is left behind -------------------------------------------------------------------------------------------


class Leftovers:
    """Threads, descriptors, containers and runtime directories that no test should leave, and who left them."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._descriptors = set(_descriptors().items())
        self._directories = _runtime_directories()
        self._containers: set[str] = set()
        self._first_seen: dict[object, str] = {}
        self._problems: list[str] = []

    def look(self, nodeid: str) -> None:
        """Remember after which test a thread or descriptor was seen first."""
        for key in (*threading.enumerate(), *_descriptors().items()):
            self._first_seen.setdefault(key, nodeid)

    def note_containers(self, url: str) -> None:
        """Remember the containers that stood in the engine before the tests."""
        self._containers = {identity for identity, _ in _containers(url)}

    def check_containers(self, url: str) -> None:
        """Look for containers that the tests left; called while the engine still runs."""
        self._problems.extend(text for identity, text in _containers(url) if identity not in self._containers)

    def problems(self) -> list[str]:
        """Return one line for each thing that is left, after a moment for what is just going."""
        deadline = time.monotonic() + SETTLE
        while (left := self._left()) and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.1)
        return self._problems + left

    def _left(self) -> list[str]:
        left = []
        for thread in threading.enumerate():
            if thread not in self._threads:
                left.append(f"thread {thread.name}, first seen after {self._first_seen.get(thread, '?')}")
        for item in _descriptors().items():
            if item not in self._descriptors:
                left.append(f"descriptor {item[0]} {item[1]}, first seen after {self._first_seen.get(item, '?')}")
        left.extend(f"runtime directory {path}" for path in _runtime_directories() - self._directories)
        return left


def _descriptors() -> dict[int, str]:
    """The open descriptors of this process and what they stand for."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that listed the directory
    return found


def _containers(url: str) -> list[tuple[str, str]]:
    """Id and description of each sandbox in the engine at `url` that no living owner stands behind."""
    client = docker.DockerClient(base_url=url, timeout=30)
    try:
        return [
            (str(container.id), f"container {container.short_id} {container.name} ({container.status})")
            for container in client.containers.list(all=True, filters={"label": services.LABEL}, ignore_removed=True)
            if not _is_locked(Path(container.labels.get("com.samovar.owner", "")) / "lock")
        ]
    finally:
        client.close()


def _is_locked(path: Path) -> bool:
    """Return whether another process holds this owner's lock: it works on an engine that several share."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _runtime_directories() -> set[Path]:
    """Sandboxes' directories under the default runtime directories of this user."""
    user = os.geteuid()
    candidates = [Path("/run/samovar") if user == 0 else None, Path(f"/tmp/samovar-{user}")]
    if xdg := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.append(Path(xdg) / "samovar")
    return {sandbox for root in candidates if root and root.is_dir() for sandbox in root.glob("*/????????????????")}


_LEFT_BEHIND = "left_behind"
_leftovers: Leftovers | None = None


def pytest_sessionstart() -> None:
    """Remember what was there before the first test."""
    global _leftovers
    _leftovers = Leftovers()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Note what is there now, so that a leftover can name its test."""
    if _leftovers is not None:
        _leftovers.look(item.nodeid)


class OfWorkers:
    """What the worker processes of a run that has some left behind (each looks after its own tests)."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take in what a worker tells at its end."""
        self.problems += getattr(node, "workeroutput", {}).get(_LEFT_BEHIND, [])


def pytest_configure(config: pytest.Config) -> None:
    """Listen to workers, where there are any."""
    config.pluginmanager.register(OfWorkers(), _LEFT_BEHIND)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if something is left behind; a worker tells the process that it works for."""
    problems = _leftovers.problems() if _leftovers is not None else []
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_LEFT_BEHIND] = problems
        return
    problems += session.config.pluginmanager.get_plugin(_LEFT_BEHIND).problems  # type: ignore[union-attr]
    if problems:
        print("\nleft behind by the tests:\n  " + "\n  ".join(problems))
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
