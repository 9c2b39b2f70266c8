"""JupyterLab in a real browser: its server, its kernels' way to a sandbox, its page."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from kernelprovisioner import kernelspecs
from tests import services
from tests.browser.jupyterlab import JupyterLab
from tests.browser.notebook_page import SHELF, NotebookPage
from tests.conformance.conftest import client_environment
from tests.gateway_process import GatewayProcess
from tests.proxies import CuttableProxy

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


#: Options of `jupyter lab` for a gateway elsewhere, beside its address and key.
OUR_CONNECTION = "--ServerApp.kernel_websocket_connection_class=gateway.lab.SamovarWebSocketConnection"


@dataclass
class Lab:
    """A running JupyterLab, seen through connections that can be cut."""

    way: str
    server: JupyterLab
    #: between the page and JupyterLab; and, over HTTP, between JupyterLab and the gateway
    legs: list[CuttableProxy]
    gateway: GatewayProcess | None

    @property
    def root(self) -> Path:
        """The directory of its notebooks."""
        return self.server.root

    @property
    def copies_files(self) -> bool:
        """Whether a kernel finds the files beside its notebook: not over HTTP."""
        return len(self.legs) == 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; the test is skipped where there is none."""
    try:
        program = services.chromium()
    except services.ServiceMissing as missing:
        pytest.skip(str(missing))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=["alone", "gateway", "remote", "remote-stock"])
def lab(request: pytest.FixtureRequest, docker_url: str, kernel_image: str) -> Iterator[Lab]:
    """A user's own JupyterLab, on each way to a sandbox.

    `alone` and `gateway`: the `sandbox` kernelspec, without a gateway and with one. `remote`: `--gateway-url` with our
    websocket connection class; `remote-stock`: without it.
    """
    way = str(request.param)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp")))
        root = directory / "work"
        root.mkdir()
        runtime, legs, arguments = directory / "run", [], []
        gateway = None
        kernelspecs.install(prefix=str(directory / "prefix"))
        if way != "alone":
            bounds = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "4"}
            gateway = GatewayProcess(directory, docker_url, bounds)
            stack.callback(gateway.stop)
            gateway.start()
            runtime = gateway.runtime
        if gateway is not None and way.startswith("remote"):
            legs.append(stack.enter_context(CuttableProxy(gateway.port)))
            arguments = [f"--gateway-url=http://127.0.0.1:{legs[0].port}", f"--GatewayClient.auth_token={gateway.key}"]
            arguments += [OUR_CONNECTION] if way == "remote" else []
        environment = {**os.environ, **client_environment(runtime, docker_url, directory / "prefix", directory)}
        SHELF.mkdir(parents=True, exist_ok=True)
        server = JupyterLab(root, directory / "lab", SHELF / f"{way}-jupyterlab.log", environment, arguments)
        stack.callback(server.stop)
        server.start()
        legs.insert(0, stack.enter_context(CuttableProxy(server.port)))
        yield Lab(way, server, legs, gateway)


@pytest.fixture
def notebook(request: pytest.FixtureRequest, lab: Lab, browser: Browser) -> Iterator[NotebookPage]:
    """A new browser window; what it shows at the end of the test is kept."""
    context = browser.new_context(viewport={"width": 1280, "height": 820})
    page = NotebookPage(context.new_page(), f"http://127.0.0.1:{lab.legs[0].port}", lab.way)
    yield page
    page.screenshot(f"end-of-{request.node.originalname.removeprefix('test_').replace('_', '-')}")
    context.close()
