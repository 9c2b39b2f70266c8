"""`docker rm -f` of all containers at once: the service is whole again within the time that a cold start takes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from pathlib import Path

import docker
import pytest

from kernelprovisioner.launchers.container_spec import LABEL_OWNER
from tests import services
from tests.chaos import census
from tests.gateway_process import GatewayProcess

pytestmark = pytest.mark.service

WARM = 3
SESSIONS = 2
#: How much longer than the cold start of as many sandboxes healing may take: other tests' load comes and goes.
FACTOR = 3.0
SECONDS = 120.0


def until_whole(gateway: GatewayProcess, former: set[str]) -> None:
    """Wait until the pool is settled and nothing of `former` is left of it."""
    deadline = time.monotonic() + SECONDS
    while True:
        there = set(census.containers(str(gateway.docker_url), gateway.runtime))
        if census.is_settled(gateway.pool()) and len(there) >= WARM and not there & former:
            return
        assert time.monotonic() < deadline, f"{gateway.pool()}, containers {there}, before {former}"
        time.sleep(0.05)


def remove_all(url: str, runtime: Path) -> None:
    """Remove every sandbox of the owners in one runtime directory, side by side."""
    with contextlib.closing(docker.DockerClient(base_url=url, timeout=60)) as client:
        found = client.api.containers(all=True, filters={"label": services.LABEL})
        ours = [each["Id"] for each in found if Path(each["Labels"].get(LABEL_OWNER, "")).parent == runtime]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda container: client.api.remove_container(container, force=True), ours))


def test_the_service_is_whole_again_within_the_time_of_a_cold_start(
    docker_url: str, kernel_image: str, short_directory: Path
) -> None:
    settings = {"CONTAINER_POOL_PY_MIN": str(WARM), "CONTAINER_POOL_PY_MAX": "8", "SAMOVAR_POOL_SETTINGS_HIT_RATE": "0"}
    gateway = GatewayProcess(short_directory, docker_url, settings)
    try:
        began = time.monotonic()
        gateway.start()
        until_whole(gateway, set())
        cold = time.monotonic() - began
        sessions = [gateway.exec("n = 1")["session_id"] for _ in range(SESSIONS)]
        until_whole(gateway, set())
        former = set(census.containers(docker_url, gateway.runtime))
        assert len(former) == WARM + SESSIONS

        began = time.monotonic()
        remove_all(docker_url, gateway.runtime)
        until_whole(gateway, former)
        healed = time.monotonic() - began
        print(f"cold start of {WARM}: {cold:.1f} s; whole again {healed:.1f} s after rm -f of {len(former)}")
        assert healed < FACTOR * cold

        for session in sessions:
            answer = gateway.exec("print('n' in globals())", session)
            assert answer["session_id"] == session and answer["stdout"] == "False\n"
            assert "removed from outside" in answer["stderr"], "the session is told why its variables are gone"
            gateway.call("DELETE", f"/api/v1/sessions/{session}")
        until_whole(gateway, former)
        assert census.problems(docker_url, gateway) == []
    finally:
        code = gateway.stop() if gateway.process is not None else None
    assert code == 0, gateway.log.read_text()
    assert census.containers(docker_url, gateway.runtime) == {} and census.directories(gateway.runtime) == {}
