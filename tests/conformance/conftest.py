"""Where stock clients find the `sandbox` kernelspec: with a running gateway, and alone."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import docker
import pytest
from jupyter_core.utils import ensure_event_loop

from kernelprovisioner import kernelspecs
from tests.gateway_process import ROOT, GatewayProcess

#: Prints the container that runs it: Docker mounts some of a container's files from a directory that bears its id.
WHERE = """\
import re
print("container", re.search(r"containers/([0-9a-f]{64})/", open("/proc/self/mountinfo").read())[1])"""


@dataclass
class Place:
    """A directory to start kernels in, and what a client needs in its environment to start them."""

    directory: Path
    environment: dict[str, str]
    docker_url: str
    gateway: GatewayProcess | None
    #: ids of all sandboxes' containers that the engine has created since the tests began
    created: set[str]

    def warm_claims(self) -> int:
        """How many claims the gateway has answered with a warm sandbox."""
        assert self.gateway is not None
        return int(self.gateway.pool()["claims"]["warm"])

    def wait_until_warm(self) -> None:
        """Wait until a warm sandbox can be claimed, where there is a gateway."""
        deadline = time.monotonic() + 60
        while self.gateway is not None and not self.gateway.pool()["warm"]:
            assert time.monotonic() < deadline, self.gateway.log.read_text()[-3000:]
            time.sleep(0.05)

    @contextlib.contextmanager
    def one_claim(self) -> Iterator[None]:
        """What happens inside must claim exactly one sandbox: a warm one of the gateway, where there is one."""
        before = self.warm_claims() if self.gateway is not None else 0
        self.wait_until_warm()
        yield
        if self.gateway is not None:
            assert self.warm_claims() == before + 1, self.gateway.log.read_text()[-3000:]

    def check_source(self, source: str | None) -> None:
        """`source` is what a provisioner says; the pool may be busy, but it is never silently left aside."""
        if self.gateway is None:
            assert source == "cold"
        else:
            assert source is not None and source.startswith("gateway-")

    def check_container(self, printed: str, claimed: str | None = None) -> str:
        """Return the container id in a cell's output, which must be one of our sandboxes in the engine."""
        found = re.search(r"container ([0-9a-f]{64})", printed)
        assert found, printed
        assert claimed in (None, found[1])
        deadline = time.monotonic() + 5
        while found[1] not in self.created and time.monotonic() < deadline:
            time.sleep(0.05)  # the engine's events come a moment later
        assert found[1] in self.created
        return found[1]

    def run(self, *arguments: str, text: str | None = None, timeout: float = 90.0) -> str:
        """Run a stock command-line client in the directory; return its output. Raises where it fails."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.directory,
            env=self.environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def created(docker_url: str) -> Iterator[set[str]]:
    """Ids of sandboxes' containers, as the engine tells of them."""
    ids: set[str] = set()
    client = docker.DockerClient(base_url=docker_url, timeout=30)
    events = client.events(decode=True, filters={"event": "create", "label": "com.samovar.managed=true"})

    def listen() -> None:
        for event in events:
            ids.add(event["id"])

    thread = threading.Thread(target=listen)
    thread.start()
    yield ids
    events.close()
    thread.join()
    client.close()


@pytest.fixture(scope="session", autouse=True)
def loop_of_blocking_clients() -> Iterator[None]:
    """Blocking clients share one loop of jupyter_core's, which nobody closes."""
    yield
    ensure_event_loop().close()


@pytest.fixture(scope="session")
def kernelspec_prefix() -> Iterator[Path]:
    """A prefix with the kernelspec in it; the provisioner itself must be registered by the installed package."""
    if not entry_points(group="jupyter_client.kernel_provisioners", name=kernelspecs.PROVISIONER_NAME):
        pytest.fail("samovar is not installed in this environment: run `pip install -e .` (make test does)")
    with tempfile.TemporaryDirectory(prefix="sv-") as prefix:
        kernelspecs.install(prefix=prefix)
        yield Path(prefix)


@pytest.fixture(scope="session")
def conformance_gateway(docker_url: str, kernel_image: str, created: set[str]) -> Iterator[GatewayProcess]:
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        settings = {"CONTAINER_POOL_PY_MIN": "2", "CONTAINER_POOL_PY_MAX": "8"}
        process = GatewayProcess(Path(directory), docker_url, settings)
        try:
            process.start()
            yield process
        finally:
            code = process.stop() if process.process is not None else None
        assert code == 0, process.log.read_text()
        assert not list(process.runtime.glob("k/*")), "a kernel's link was left"


def client_environment(runtime: Path, docker_url: str, kernelspec_prefix: Path, directory: Path) -> dict[str, str]:
    """What a stock client needs in its environment to find kernelspec, runtime directory and engine."""
    return {
        "SAMOVAR_RUNTIME_DIR": str(runtime),
        "SAMOVAR_LAUNCHER": "docker",
        "DOCKER_BASE_URL": docker_url,
        "JUPYTER_PATH": str(kernelspec_prefix / "share" / "jupyter"),
        "JUPYTER_CONFIG_DIR": str(directory / "config"),
        "JUPYTER_RUNTIME_DIR": str(directory / "jupyter"),
        "IPYTHONDIR": str(directory / "ipython"),
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(ROOT), str(ROOT / "kernel-images"), os.environ.get("PYTHONPATH")))
        ),
    }


@pytest.fixture(params=["alone", "gateway"])
def place(
    request: pytest.FixtureRequest,
    docker_url: str,
    kernel_image: str,
    kernelspec_prefix: Path,
    created: set[str],
    short_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Place]:
    """With and without a gateway; clients in this process find the same place as those in another."""
    gateway: GatewayProcess | None = None
    runtime = short_directory / "run"
    if request.param == "gateway":
        gateway = request.getfixturevalue("conformance_gateway")
        runtime = gateway.runtime
    work = short_directory / "work"
    work.mkdir()
    for name, value in client_environment(runtime, docker_url, kernelspec_prefix, short_directory).items():
        monkeypatch.setenv(name, value)
    yield Place(work, dict(os.environ), docker_url, gateway, created)
    assert not list(runtime.glob("k/*")), "a kernel's link was left"
    if gateway is None:
        assert not list(runtime.glob("????????")), "a runtime directory was left"
