"""What becomes of sessions and pool when the engine dies, is slow, forgets the image, or loses all its containers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import docker
import nbformat
import pytest

from kernelprovisioner import kernelspecs
from tests import services
from tests.gateway_process import GatewayProcess
from tests.proxies import DelayingProxy
from tests.waiting import until

pytestmark = pytest.mark.service

SETTINGS = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "4", "MAX_EXECUTION_TIME": "120"}
#: An engine that was killed waits for its containers' end before it answers again.
BACK = 150.0


@pytest.fixture(scope="module")
def engine(docker_url: str, kernel_image: str) -> Iterator[services.Engine]:
    """An engine that no other test uses."""
    engine = services.Engine("faults")
    try:
        engine.start()
    except services.ServiceMissing as missing:
        pytest.skip(str(missing))
    try:
        services.copy_image(docker_url, engine.url)
        yield engine
    finally:
        engine.stop()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as path:
        yield Path(path)


@contextlib.contextmanager
def serving(directory: Path, url: str, **settings: str) -> Iterator[GatewayProcess]:
    """A gateway with a warm sandbox; in the end it must stop in order, and nothing may be left in the engine."""
    gateway = GatewayProcess(directory, url, {**SETTINGS, **settings})
    gateway.start()
    try:
        until(lambda: gateway.pool()["warm"] >= 1)
        yield gateway
        assert gateway.process is not None
        assert gateway.process.poll() is None, gateway.log.read_text()
    finally:
        code = gateway.stop()
    assert code == 0, gateway.log.read_text()
    assert "Traceback" not in gateway.log.read_text()


@pytest.fixture
def gateway(engine: services.Engine, directory: Path) -> Iterator[GatewayProcess]:
    with serving(directory, engine.url) as process:
        yield process


def health(gateway: GatewayProcess) -> dict[str, Any]:
    found: dict[str, Any] = gateway.call("GET", "/health/detailed").body
    return found


def in_background(work: Callable[[], Any]) -> Future[Any]:
    threads = ThreadPoolExecutor(1)
    future = threads.submit(work)
    threads.shutdown(wait=False)
    return future


def long_cell(gateway: GatewayProcess, session_id: str) -> Future[Any]:
    """A cell that is cut off by what happens to its sandbox; returns once it runs."""
    running = in_background(
        lambda: gateway.exec("import time\nprint('begun', flush=True)\ntime.sleep(100)", session_id)
    )
    until(lambda: gateway.call("GET", f"/api/v1/sessions/{session_id}").body["state"] == "busy")
    time.sleep(1)
    return running


class NotebookRun:
    """`samovar run` of a notebook whose second cell is cut off."""

    def __init__(self, gateway: GatewayProcess) -> None:
        if not entry_points(group="jupyter_client.kernel_provisioners", name=kernelspecs.PROVISIONER_NAME):
            pytest.fail("samovar is not installed in this environment: run `pip install -e .` (make test does)")
        directory = gateway.directory / "notebooks"
        directory.mkdir()
        kernelspecs.install(prefix=str(directory / "prefix"))
        self._out = directory / "out.ipynb"
        cells = ["x = 1", "open('begun', 'w').close()\n", "import time; print('waiting', flush=True); time.sleep(100)"]
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), directory / "in.ipynb"
        )
        environment = gateway.environment | {
            "JUPYTER_PATH": str(directory / "prefix" / "share" / "jupyter"),
            "SAMOVAR_LAUNCHER": "docker",
        }
        # What an installed package's entry points are found by, too.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment["PYTHONPATH"], *sys.path]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", "run", str(directory / "in.ipynb"), "-o", str(self._out)],
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # The file comes out of the sandbox when its cell has ended: the third one is next.
        until(lambda: (directory / "begun").exists())

    def outcome(self) -> tuple[str, str]:
        """What was printed, and what the notebook's last cell shows, once the run has ended."""
        said, _ = self._process.communicate(timeout=BACK)
        outputs = nbformat.read(self._out, as_version=4).cells[-1].outputs
        return said, "".join(output.get("text", "") + output.get("evalue", "") for output in outputs)


@pytest.mark.parametrize("how", ["killed", "restarted"])
def test_an_engine_that_comes_back(engine: services.Engine, gateway: GatewayProcess, how: str) -> None:
    notebook = NotebookRun(gateway)
    first = gateway.exec("x = 41")["session_id"]
    until(lambda: gateway.pool()["warm"] >= 1)
    second = gateway.exec("y = 1")["session_id"]
    running = long_cell(gateway, second)
    if how == "killed":
        until(lambda: gateway.pool()["warm"] >= 1)
        engine.kill()
        until(lambda: health(gateway)["services"]["engine"]["status"] == "unhealthy")
        found = health(gateway)
        assert "is away since" in found["services"]["engine"]["error"] and found["status"] == "unhealthy"
        # Containers outlive a killed engine until it starts again: sessions go on.
        assert gateway.exec("print(x + 1)", first)["stdout"] == "42\n"
        assert not running.done()
        engine.start_again()
    else:
        engine.restart()
    died = running.result(BACK)
    assert died["status"] == "died" and died["stdout"] == "begun\n"
    cause = died["exit_cause"]
    assert cause["cause"] == "engine" and "container engine stopped or was restarted" in cause["text"]
    assert cause["cell"]["execution_count"] == died["execution_count"] == 2
    assert "container engine stopped or was restarted" in died["stderr"]
    said, shown = notebook.outcome()
    assert "container engine stopped or was restarted" in said, said
    assert "container engine stopped or was restarted" in shown and "waiting" in shown

    until(lambda: health(gateway)["status"] == "healthy" and gateway.pool()["warm"] >= 1, BACK)
    after = gateway.exec("print('x' in globals())", first)
    assert after["stdout"] == "False\n" and "container engine stopped or was restarted" in after["stderr"]
    found = health(gateway)
    assert set(found["exits"]["counts"]) <= {"engine", "start_failed"}, found["exits"]
    assert found["exits"]["counts"]["engine"] >= 3, found["exits"]
    log = gateway.log.read_text()
    assert "while cell 2 ran: The container engine stopped" in log and "is back after" in log


def test_an_engine_that_answers_after_twenty_seconds(engine: services.Engine, directory: Path) -> None:
    target = Path(engine.url.removeprefix("unix://"))
    with DelayingProxy(directory / "engine.sock", target) as proxy, serving(directory, proxy.url) as gateway:
        session = gateway.exec("x = 41")["session_id"]
        until(lambda: gateway.pool()["warm"] >= 1)
        proxy.delay = 20.0
        fresh = gateway.exec("print('new')")  # takes the warm one: its successor has to wait for the engine
        assert fresh["stdout"] == "new\n"
        found = health(gateway)
        assert found["status"] == "degraded"
        assert "has not answered for" in found["services"]["engine"]["error"]
        for number in range(5):
            assert gateway.exec(f"print(x + {number})", session)["stdout"] == f"{41 + number}\n"
            time.sleep(1)
        proxy.delay = 0.0
        until(lambda: health(gateway)["status"] == "healthy" and gateway.pool()["warm"] >= 1, BACK)
        assert gateway.exec("print('again')")["stdout"] == "again\n"
        assert gateway.pool()["exits"] == {}


def test_an_image_that_is_deleted_under_a_running_pool(engine: services.Engine, gateway: GatewayProcess) -> None:
    with contextlib.closing(docker.DockerClient(base_url=engine.url)) as client:
        image = client.images.get("samovar/python:latest")
        session = gateway.exec("x = 41")["session_id"]
        until(lambda: gateway.pool()["warm"] >= 1)
        client.images.remove("samovar/python:latest", force=True)
        try:
            assert gateway.exec("print('new')")["stdout"] == "new\n"  # the warm one
            until(lambda: gateway.pool()["failures_in_a_row"] > 0)
            found = health(gateway)["services"]
            assert found["image:python"]["status"] == "unhealthy"
            assert "is missing" in found["image:python"]["error"]
            assert "samovar images build python" in found["image:python"]["remedy"]
            assert found["pool:python"]["status"] == "degraded" and "does not exist" in found["pool:python"]["error"]
            assert gateway.exec("print(x + 1)", session)["stdout"] == "42\n"
        finally:
            assert image.tag("samovar/python:latest")
        until(lambda: health(gateway)["services"]["pool:python"]["status"] == "healthy", BACK)
        until(lambda: gateway.pool()["warm"] >= 1)


def test_all_containers_removed_at_once(engine: services.Engine, gateway: GatewayProcess) -> None:
    session = gateway.exec("x = 1")["session_id"]
    until(lambda: gateway.pool()["warm"] >= 1 and gateway.pool()["starting"] == 0)
    running = long_cell(gateway, session)
    with contextlib.closing(docker.DockerClient(base_url=engine.url)) as client:
        containers = client.containers.list(filters={"label": services.LABEL})
        for container in containers:
            container.remove(force=True)
    died = running.result(30)
    cause = died["exit_cause"]
    assert cause["cause"] == "removed" and cause["cell"]["execution_count"] == 2
    assert "killed or removed from outside" in died["stderr"]
    # No start has failed: nothing waits for a backoff, a new sandbox is on its way at once.
    assert gateway.pool()["starting"] + gateway.pool()["warm"] >= 1
    assert gateway.exec("print('whole')")["stdout"] == "whole\n"
    until(lambda: gateway.pool()["warm"] >= 1)
    assert health(gateway)["exits"]["counts"] == {"removed": len(containers)}
    shown = health(gateway)["exits"]["last"]
    assert [one["cell"]["execution_count"] for one in shown if one["session"] == session] == [2]
    after = gateway.exec("print('x' in globals())", session)
    assert (after["stdout"], after["stderr"]) == ("False\n", "")  # its death was told in the answer already
