"""Clients by HTTP: nbclient, papermill, nbconvert, `samovar run` with our kernel manager; jupyter-kernel-client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from jupyter_kernel_client import JupyterKernelClient
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

from tests.conformance.conftest import WHERE
from tests.conformance.test_clients import notebook, printed
from tests.conformance.test_front import SLOW
from tests.gateway_process import ROOT, GatewayProcess
from tests.proxies import CuttableProxy
from tests.waiting import until

pytestmark = pytest.mark.conformance

MANAGER = "gateway.remote.RemoteKernelManager"


@dataclass
class Remote:
    """A gateway, and an environment in which its clients find it."""

    gateway: GatewayProcess
    directory: Path
    environment: dict[str, str]
    created: set[str]

    def check_container(self, text: str) -> None:
        found = re.search(r"container ([0-9a-f]{64})", text)
        assert found and found[1] in self.created, text

    def kernels(self) -> list[Any]:
        return list(self.gateway.call("GET", "/api/kernels").body)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=90,
        )


@pytest.fixture
def remote(
    created: set[str], conformance_gateway: GatewayProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Remote]:
    """With no kernel of its own left behind."""
    monkeypatch.setenv("JUPYTER_GATEWAY_URL", conformance_gateway.url)
    monkeypatch.setenv("JUPYTER_GATEWAY_AUTH_TOKEN", conformance_gateway.key)
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernel-images"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    remote = Remote(conformance_gateway, tmp_path, environment, created)
    yield remote
    assert remote.kernels() == []


def test_nbclient(remote: Remote) -> None:
    book = notebook(WHERE, "x = 20 + 1", "2 * x", "for i in range(5000): print(i, flush=True)")
    NotebookClient(book, kernel_manager_class=MANAGER, timeout=60).execute()
    remote.check_container(printed(book.cells[0]))
    assert book.cells[2].outputs[0]["data"]["text/plain"] == "42"
    assert printed(book.cells[3]) == "".join(f"{i}\n" for i in range(5000))
    assert book.metadata.language_info.name == "python"


def test_nbclient_over_a_line_that_is_cut(remote: Remote) -> None:
    book = notebook(SLOW, "print('on')")
    with CuttableProxy(remote.gateway.port) as proxy:

        def cut_three_times() -> None:
            for _ in range(3):
                time.sleep(0.7)
                proxy.cut()
                time.sleep(0.2)
                proxy.mend()

        thread = threading.Thread(target=cut_three_times)
        client = NotebookClient(
            book,
            kernel_manager_class=MANAGER,
            config=Config({"RemoteKernelManager": {"gateway_url": f"http://127.0.0.1:{proxy.port}"}}),
            timeout=60,
            on_cell_execute=lambda cell, cell_index: thread.start() if cell_index == 0 else None,
        )
        client.execute()
        thread.join()
        assert proxy.cuts >= 3
    assert printed(book.cells[0]) == "".join(f"{i}\n" for i in range(30)), "each line once, in order"
    assert book.cells[0].outputs[-1]["data"]["text/plain"] == "'end'"
    assert printed(book.cells[1]) == "on\n"


def test_nbclient_is_told_why_a_kernel_died(remote: Remote) -> None:
    book = notebook("print('so far', flush=True)\nimport os; os._exit(7)")
    with pytest.raises(CellExecutionError, match="exit code 7"):
        NotebookClient(book, kernel_manager_class=MANAGER, timeout=60).execute()
    assert printed(book.cells[0]).startswith("so far\n")


def test_papermill(remote: Remote) -> None:
    source, result = remote.directory / "in.ipynb", remote.directory / "out.ipynb"
    book = notebook("n = 1", WHERE, "print(n)")
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, source)
    papermill.execute_notebook(
        source, result, parameters={"n": 42}, kernel_manager_class=MANAGER, progress_bar=False, kernel_name="sandbox"
    )
    done = nbformat.read(result, 4)
    remote.check_container(printed(done.cells[2]))
    assert printed(done.cells[3]) == "42\n"


def test_nbconvert(remote: Remote) -> None:
    nbformat.write(notebook(WHERE, "6 * 7"), remote.directory / "book.ipynb")
    manager = f"--ExecutePreprocessor.kernel_manager_class={MANAGER}"
    done = remote.run("nbconvert", "--to", "notebook", "--execute", manager, "--output", "done.ipynb", "book.ipynb")
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(remote.directory / "done.ipynb", 4).cells
    remote.check_container(printed(cells[0]))
    assert cells[1].outputs[0]["data"]["text/plain"] == "42"


def test_samovar_run(remote: Remote) -> None:
    nbformat.write(notebook(WHERE, "6 * 7", "1 / 0", "print('never')"), remote.directory / "book.ipynb")
    url = remote.gateway.url
    arguments = ["book.ipynb", "-o", "out.ipynb", "--gateway-url", url, "--api-key", remote.gateway.key]
    done = remote.run("gateway.cli", "run", *arguments)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    remote.check_container(done.stdout)
    assert done.stdout.splitlines()[1:] == ["42"]
    result = nbformat.read(remote.directory / "out.ipynb", as_version=4)
    assert result.cells[1].outputs[0]["data"]["text/plain"] == "42" and result.cells[3].outputs == []


def test_samovar_run_with_a_wrong_key(remote: Remote) -> None:
    nbformat.write(notebook("1"), remote.directory / "book.ipynb")
    done = remote.run(
        "gateway.cli", "run", "book.ipynb", "--gateway-url", remote.gateway.url, "--api-key", "no-such-key"
    )
    assert done.returncode == 70
    assert done.stderr == f"samovar run: the gateway at {remote.gateway.url} does not accept this API key\n"


def test_samovar_run_is_interrupted(remote: Remote) -> None:
    nbformat.write(notebook("import time\nprint('on', flush=True)\ntime.sleep(600)"), remote.directory / "book.ipynb")
    arguments = ["book.ipynb", "--gateway-url", remote.gateway.url, "--api-key", remote.gateway.key]
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", "run", *arguments],
        cwd=remote.directory,
        env=remote.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: [kernel["execution_state"] for kernel in remote.kernels()] == ["busy"], 60)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130, error
    assert error.endswith("samovar run: interrupted.\n") and "Traceback" not in error


def test_jupyter_kernel_client(remote: Remote) -> None:
    client = JupyterKernelClient(server_url=remote.gateway.url, token=remote.gateway.key)
    client.start(name="sandbox")
    try:
        assert client.kernel_info is not None and client.kernel_info["language_info"]["name"] == "python"
        result = client.execute(WHERE + "\nx = 6\nx * 7")
        assert (result["status"], result["execution_count"]) == ("ok", 1)
        remote.check_container(result["outputs"][0]["text"])
        assert result["outputs"][1]["data"]["text/plain"] == "42"
        assert "x" in {variable["name"] for variable in client.list_variables()}
        asked = client.execute(
            "print(input('?'))", allow_stdin=True, stdin_hook=lambda _: client._manager.client.input("answer")
        )
        assert asked["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "answer\n"}]
        failed = client.execute("1 / 0")
        assert failed["status"] == "error" and failed["outputs"][0]["ename"] == "ZeroDivisionError"
        client.restart()
        assert client.execute("'x' in globals()")["outputs"][0]["data"]["text/plain"] == "False"
        assert [model["id"] for model in client.list_kernels()] == [client.id]
    finally:
        client.stop()
    assert not client.has_kernel


def test_jupyter_kernel_client_ends_its_kernel_by_a_message(remote: Remote) -> None:
    client = JupyterKernelClient(server_url=remote.gateway.url, token=remote.gateway.key)
    client.start(name="sandbox")
    manager = client._manager
    client.execute("1")
    # As its stop(shutdown_now=False) does it before it closes the connection.
    manager.client.shutdown(False)
    until(lambda: manager.refresh_model() is None, 10)


def test_the_clients_are_those_that_are_pinned() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    pinned = dict(requirement.split("==") for requirement in requirements if "==" in requirement)
    assert {"jupyter-kernel-client", "jupyter_server", "jupyterlab", "nbclient", "papermill"} <= pinned.keys()
    assert {name: version(name) for name in pinned} == pinned
