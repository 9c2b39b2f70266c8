"""One gateway on the real engine for a module's tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway_process import GatewayProcess


@pytest.fixture(scope="module")
def gateway_settings() -> dict[str, str]:
    """Environment of the module's gateway; a module overrides it for its own bounds."""
    return {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "4"}


@pytest.fixture(scope="module")
def gateway(docker_url: str, kernel_image: str, gateway_settings: dict[str, str]) -> Iterator[GatewayProcess]:
    """`samovar serve` over HTTP; it must end cleanly and leave no sandbox's directory."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        process = GatewayProcess(Path(directory), docker_url, gateway_settings)
        try:
            process.start()
            yield process
        finally:
            if process.process is not None:
                code = process.stop()
        assert code == 0, process.log.read_text()
        assert not list(process.runtime.glob("*/????????????????")), "a sandbox's runtime directory was left"
