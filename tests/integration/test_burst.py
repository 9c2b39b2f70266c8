"""More callers than places: everybody gets the own answer from a fresh sandbox, and the bound holds in the engine."""

from __future__ import annotations

import concurrent.futures
import secrets
import time

import pytest

from tests.gateway_process import GatewayProcess
from tests.integration.engine_census import Census

pytestmark = pytest.mark.service

CALLERS = 50
PLACES = 20


@pytest.fixture(scope="module")
def gateway_settings() -> dict[str, str]:
    """Twenty places for fifty callers; the default deadline of the line, 120 s."""
    return {"CONTAINER_POOL_PY_MIN": "4", "CONTAINER_POOL_PY_MAX": str(PLACES)}


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
