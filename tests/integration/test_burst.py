"""More callers than places: everybody gets the own answer from a fresh sandbox, and the bound holds in the engine."""

from __future__ import annotations

import concurrent.futures
import secrets
import threading
import time
from pathlib import Path

import docker
import pytest

from kernelprovisioner.launchers.container_spec import LABEL_OWNER
from tests import services
from tests.gateway_process import GatewayProcess

pytestmark = pytest.mark.service

CALLERS = 50
PLACES = 20


@pytest.fixture(scope="module")
def gateway_settings() -> dict[str, str]:
    """Twenty places for fifty callers; the default deadline of the line, 120 s."""
    return {"CONTAINER_POOL_PY_MIN": "4", "CONTAINER_POOL_PY_MAX": str(PLACES)}


class Census:
    """Looks into the engine all the time: which sandboxes there were, and how many at once."""

    def __init__(self, url: str, runtime: Path) -> None:
        self._runtime = str(runtime)
        self.seen: set[str] = set()
        self.most: list[str] = []
        self._client = docker.DockerClient(base_url=url)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._count)

    def __enter__(self) -> Census:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._client.close()

    def _count(self) -> None:
        while not self._done.wait(0.2):
            everyones = self._client.api.containers(all=True, filters={"label": services.LABEL})
            listed = [item for item in everyones if item["Labels"][LABEL_OWNER].startswith(self._runtime)]
            self.seen |= {container["Id"] for container in listed}
            # What has ended may still be listed for a moment; it has neither processes nor memory.
            live = [f"{item['Id'][:12]} {item['Status']}" for item in listed if item["State"] in ("created", "running")]
            self.most = max(self.most, live, key=len)


def test_fifty_callers_get_fifty_fresh_sandboxes_and_never_more_than_twenty_live(
    gateway: GatewayProcess, docker_url: str
) -> None:
    nonces = [secrets.token_hex(8) for _ in range(CALLERS)]
    code = """
import pathlib
marker = pathlib.Path("/mnt/data/used")
print("{nonce}", "fresh" if not marker.exists() and "used" not in globals() else "used before")
marker.touch(); used = True
"""
    with Census(docker_url, gateway.runtime) as census, concurrent.futures.ThreadPoolExecutor(CALLERS) as callers:
        started = time.monotonic()
        answers = list(callers.map(lambda nonce: gateway.exec(code.format(nonce=nonce)), nonces))
        took = time.monotonic() - started
    assert [answer["stdout"] for answer in answers] == [f"{nonce} fresh\n" for nonce in nonces]
    containers = {answer["container_id"] for answer in answers}
    assert len(containers) == CALLERS
    assert containers <= census.seen, "an answer names a container that the engine never had"
    assert len(census.most) <= PLACES, "\n".join(census.most)
    assert took < 120
