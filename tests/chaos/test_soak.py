"""A short soak in every run: nothing grows. `make soak` does 10,000 executions and draws them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.soak import SETTINGS, Sample, Soak, growth
from tests.gateway_process import GatewayProcess

EXECUTIONS = 800


@pytest.mark.service
def test_nothing_grows_over_sessions_that_come_and_go(
    docker_url: str, kernel_image: str, short_directory: Path
) -> None:
    gateway = GatewayProcess(short_directory, docker_url, SETTINGS)
    try:
        gateway.start()
        soak = Soak(gateway, EXECUTIONS, print)
        soak.run()
    finally:
        code = gateway.stop() if gateway.process is not None else None
    assert code == 0, gateway.log.read_text()
    assert soak.sessions >= EXECUTIONS // 100
    assert growth(soak.samples) == []


def test_growth_is_seen() -> None:
    flat = [Sample(number, 50.0, 40 + number % 3, 6, 4) for number in range(100)]
    assert growth(flat) == []
    leaking = [
        Sample(number, 50 + number / 10, 40 + number // 4, 6 + number // 5, 4 + number // 5) for number in range(100)
    ]
    assert [line.split()[0] for line in growth(leaking)] == ["memory", "descriptors", "threads", "containers"]
