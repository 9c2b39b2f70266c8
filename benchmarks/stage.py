"""Stage: what every measurement stands on: the engine, the yardstick, and gateways of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import docker

from benchmarks.bare import CODE, BareClient, StockKernel
from benchmarks.rest import RestClient
from kernelprovisioner.images import find_image
from kernelprovisioner.launchers.container_spec import LABEL_OWNER
from tests.gateway_process import GatewayProcess

IMAGE = "python"
_BARE_ROUNDS = 40
_WARM_UP = 10


class Stage:
    """An engine at `docker_url`, a short directory for sockets, and a stock kernel to compare with."""

    def __init__(self, docker_url: str, directory: Path) -> None:
        self.docker_url = docker_url
        self.directory = directory
        self.image = find_image(IMAGE)
        self.engine = docker.DockerClient(base_url=docker_url, timeout=60)
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.engine.close)
        self._gateways = 0

    def start(self) -> None:
        """Start the stock kernel. Raises TimeoutError."""
        self.stock_kernel = StockKernel(self.docker_url, self.image, self.directory / "stock")
        self._stack.callback(self.stock_kernel.stop)
        self.stock = self._stack.enter_context(BareClient(self.stock_kernel.start()))
        self.stock.wait_until_ready()

    def stop(self) -> None:
        """Remove the stock kernel."""
        self._stack.close()

    def bare(self) -> list[float]:
        """Milliseconds of some bare round trips right now, one after the other."""
        for _ in range(_WARM_UP):
            self.stock.execute(CODE)
        return [self.stock.execute(CODE) for _ in range(_BARE_ROUNDS)]

    @contextlib.contextmanager
    def gateway(self, least: int, most: int) -> Iterator[tuple[GatewayProcess, RestClient]]:
        """A gateway whose pool keeps `least` sandboxes warm and has `most` at most, once it is full."""
        settings = {
            "CONTAINER_POOL_PY_MIN": str(least),
            "CONTAINER_POOL_PY_MAX": str(most),
            # A machine with few cores starts fifty sandboxes in more than the usual limit.
            "SAMOVAR_POOL_SETTINGS_LINE_TIMEOUT": "600",
            # Else it would learn from what is measured here, and keep more and more of them.
            "SAMOVAR_POOL_SETTINGS_HIT_RATE": "0",
            "LOG_LEVEL": "WARNING",
        }
        self._gateways += 1
        directory = self.directory / str(self._gateways)
        directory.mkdir(mode=0o700)
        gateway = GatewayProcess(directory, self.docker_url, settings)
        gateway.start()
        try:
            with contextlib.closing(RestClient(gateway)) as rest:
                rest.wait_for_warm(least)
                yield gateway, rest
        finally:
            gateway.stop(timeout=120)

    def containers(self, gateway: GatewayProcess) -> list[str]:
        """The ids of the containers that this gateway's sandboxes run in."""
        found = self.engine.containers.list(filters={"label": LABEL_OWNER}, ignore_removed=True)
        inside = f"{gateway.runtime.resolve()}/"
        return [str(one.id) for one in found if one.labels[LABEL_OWNER].startswith(inside)]

    def first_process(self, container_id: str) -> int:
        """The process id, on this host, of a container's PID 1."""
        return int(self.engine.api.inspect_container(container_id)["State"]["Pid"])


def settle(seconds: float = 0.2) -> None:
    """Let what has just become warm end what it still does."""
    time.sleep(seconds)
