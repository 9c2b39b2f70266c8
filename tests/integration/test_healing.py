"""A pool on the real engine whose warm sandboxes are taken away, or stand still: it is whole again by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import docker
import pytest
from docker.models.containers import Container

from kernelprovisioner.launchers.container_spec import LABEL_OWNER
from tests import services
from tests.gateway_process import GatewayProcess
from tests.waiting import until

pytestmark = pytest.mark.service

WARM = 2


@pytest.fixture(scope="module")
def gateway_settings() -> dict[str, str]:
    """No more than the minimum is kept, and who does not answer is found soon."""
    return {
        "CONTAINER_POOL_PY_MIN": str(WARM),
        "CONTAINER_POOL_PY_MAX": "4",
        "SAMOVAR_POOL_SETTINGS_HIT_RATE": "0",
        "SAMOVAR_POOL_SETTINGS_PROBE_INTERVAL": "1",
    }


@pytest.fixture
def engine(docker_url: str) -> Iterator[docker.DockerClient]:
    client = docker.DockerClient(base_url=docker_url)
    yield client
    client.close()


def containers(engine: docker.DockerClient, gateway: GatewayProcess) -> dict[str, Container]:
    """The gateway's containers by their ids."""
    everyones = engine.containers.list(all=True, filters={"label": services.LABEL}, ignore_removed=True)
    mine = [each for each in everyones if each.labels[LABEL_OWNER].startswith(str(gateway.runtime))]
    return {str(each.id): each for each in mine}


def whole(engine: docker.DockerClient, gateway: GatewayProcess, without: set[str]) -> Callable[[], bool]:
    """Whether as many are warm as there were, the engine has none beside them, and none of those `without`."""

    def check() -> bool:
        there = containers(engine, gateway)
        return gateway.pool()["warm"] == WARM == len(there) and not without & there.keys()

    return check


def test_all_warm_sandboxes_killed_at_once(gateway: GatewayProcess, engine: docker.DockerClient) -> None:
    until(whole(engine, gateway, set()))
    exits = sum(gateway.pool()["exits"].values())
    gone = containers(engine, gateway)
    for container in gone.values():
        container.kill()
    until(whole(engine, gateway, set(gone)))
    after = gateway.pool()
    assert sum(after["exits"].values()) == exits + WARM, after["exits"]
    answer = gateway.exec("print(6 * 7)")
    assert answer["stdout"] == "42\n"
    gateway.call("DELETE", f"/api/v1/sessions/{answer['session_id']}")


def test_a_warm_sandbox_that_stands_still_is_noticed_and_replaced(
    gateway: GatewayProcess, engine: docker.DockerClient
) -> None:
    until(whole(engine, gateway, set()))
    failed = gateway.pool()["failed_probes"]
    frozen, other = containers(engine, gateway).values()
    frozen.pause()
    until(whole(engine, gateway, {str(frozen.id)}))
    assert gateway.pool()["failed_probes"] == failed + 1
    assert str(other.id) in containers(engine, gateway), "one that answers went, too"
    assert "did not answer a probe" in gateway.log.read_text()
