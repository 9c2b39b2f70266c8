"""Page: from the click on a kernel in JupyterLab's launcher to the new notebook's idle kernel, in Chromium."""

from __future__ import annotations

import os
import time
import urllib.request
from collections import defaultdict
from contextlib import ExitStack

from playwright.sync_api import Browser, sync_playwright
from tqdm import tqdm

from benchmarks.figures import Quantity
from benchmarks.latency import Samples
from benchmarks.rest import RestClient
from benchmarks.stage import Stage
from kernelprovisioner import kernelspecs
from tests import services
from tests.browser.conftest import FLAGS, OUR_CONNECTION
from tests.browser.jupyterlab import TOKEN, JupyterLab
from tests.browser.notebook_page import KERNEL
from tests.conformance.conftest import client_environment
from tests.gateway_process import GatewayProcess

ROUNDS = 7
_WARM_UP = 1
_STOCK_KERNEL = "Python 3 (ipykernel)"
#: A page that has just been loaded still works; nobody clicks that early. In seconds.
_SETTLE_SECONDS = 4.0
_PATIENCE = 60_000
#: The page's own clock, from the click to the status bar's word.
_WATCH = """([kernel, patience]) => {
  const bar = document.querySelector("#jp-main-statusbar");
  window.measured = new Promise((resolve, reject) => {
    let clicked;
    setTimeout(() => reject(new Error(`${kernel} was not idle within ${patience} ms`)), patience);
    document.addEventListener("click", () => { clicked ??= performance.now(); }, true);
    new MutationObserver(() => {
      if (clicked && bar.innerText.includes(`${kernel} | Idle`)) resolve(performance.now() - clicked);
    }).observe(bar, { subtree: true, childList: true, characterData: true });
  });
}"""
_CASES = {
    "page_kernelspec": "click in JupyterLab's launcher to an idle kernel, kernelspec `sandbox`",
    "page_gateway": "the same, `--gateway-url`",
}


def measure(stage: Stage, gateway: GatewayProcess, rest: RestClient) -> list[Quantity]:
    """Clicks on our kernels in both ways in, and on the stock one of the same JupyterLab, by turns."""
    samples: Samples = defaultdict(list)
    with ExitStack() as stack:
        servers = _servers(stage, gateway, stack)
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=services.chromium(), args=list(FLAGS))
        stack.callback(browser.close)
        cases = [(case, servers[case], KERNEL) for case in _CASES]
        cases.append(("page_stock", servers["page_kernelspec"], _STOCK_KERNEL))
        for number in tqdm(range(_WARM_UP + ROUNDS), desc="clicks in JupyterLab", disable=None):
            for case, server, kernel in cases:
                rest.wait_until_quiet()
                elapsed = _click(browser, server, kernel)
                if number >= _WARM_UP:
                    samples[case].append(elapsed)
                _shut_down_all(server)
    return [
        Quantity(case, what, "ms", samples[case], "that of the stock kernel", samples["page_stock"])
        for case, what in _CASES.items()
    ]


def _servers(stage: Stage, gateway: GatewayProcess, stack: ExitStack) -> dict[str, JupyterLab]:
    arguments = {
        "page_kernelspec": [],
        "page_gateway": [f"--gateway-url={gateway.url}", f"--GatewayClient.auth_token={gateway.key}", OUR_CONNECTION],
    }
    servers = {}
    for case, each in arguments.items():
        directory = stage.directory / case
        root = directory / "work"
        root.mkdir(parents=True)
        kernelspecs.install(prefix=str(directory / "prefix"))
        environment = client_environment(gateway.runtime, stage.docker_url, directory / "prefix", directory)
        server = servers[case] = JupyterLab(
            root, directory / "lab", directory / "lab.log", {**os.environ, **environment}, each
        )
        stack.callback(server.stop)
        server.start()
    return servers


def _click(browser: Browser, server: JupyterLab, kernel: str) -> float:
    """Milliseconds, in a browser window of its own."""
    context = browser.new_context(viewport={"width": 1280, "height": 820})
    try:
        page = context.new_page()
        page.set_default_timeout(_PATIENCE)
        page.goto(f"http://127.0.0.1:{server.port}/lab?token={TOKEN}&reset")
        card = page.locator('.jp-LauncherCard[data-category="Notebook"]', has_text=kernel)
        card.wait_for()
        time.sleep(_SETTLE_SECONDS)
        page.evaluate(_WATCH, [kernel, _PATIENCE])
        card.click()
        return float(page.evaluate("measured"))
    finally:
        context.close()


def _shut_down_all(server: JupyterLab) -> None:
    for model in server.get("/api/sessions"):
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/api/sessions/{model['id']}",
            method="DELETE",
            headers={"Authorization": f"token {TOKEN}"},
        )
        urllib.request.urlopen(request, timeout=60).close()
