"""Stock clients keep their kernels over a gateway's death and its replacement, and lose no line of output."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import start_new_async_kernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from kernelprovisioner.claims import RESUME_SECONDS
from tests.conformance.conftest import client_environment
from tests.conformance.test_restart import output_of
from tests.gateway_process import GatewayProcess

pytestmark = pytest.mark.conformance

LINES = "".join(f"{number}\n" for number in range(60))
COUNT = "import time\nfor number in range(60):\n    print(number, flush=True)\n    time.sleep(0.1)"

Replace = Callable[[GatewayProcess], None]


@pytest.fixture
def gateway(
    docker_url: str, kernel_image: str, kernelspec_prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[GatewayProcess]:
    """A gateway of the test's own with one warm sandbox; clients in this process find it."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        settings = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "4", "SAMOVAR_KEEP_SANDBOXES": "1"}
        process = GatewayProcess(Path(directory), docker_url, settings)
        environment = client_environment(process.runtime, docker_url, kernelspec_prefix, process.directory)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        (process.directory / "work").mkdir()
        try:
            process.start()
            deadline = time.monotonic() + 60
            while not process.call("GET", "/metrics/pool").body["pool"]["python"]["warm"]:
                assert time.monotonic() < deadline, process.log.read_text()
                time.sleep(0.05)
            yield process
        finally:
            assert process.process is not None
            process.process.send_signal(signal.SIGINT)
            process.process.wait(60)
        assert not list(process.runtime.glob("k/*")), "a kernel's link was left"
        assert not list(process.runtime.glob("????????")), "a runtime directory was left"


def killed(process: GatewayProcess) -> None:
    assert process.process is not None
    process.process.kill()
    process.process.wait()
    process.start()


def upgraded(process: GatewayProcess) -> None:
    assert process.stop() == 0
    process.start()


@pytest.mark.parametrize("replace", [killed, upgraded])
async def test_a_kernel_never_notices(gateway: GatewayProcess, replace: Replace) -> None:
    manager, client = await start_new_async_kernel(kernel_name="sandbox", cwd=str(gateway.directory / "work"))
    try:
        assert manager.provisioner.claim_source == "gateway-warm"
        assert await output_of(client, "x = 41") == ""
        running = asyncio.create_task(output_of(client, COUNT))
        await asyncio.sleep(1)
        await asyncio.to_thread(replace, gateway)
        assert await manager.is_alive()
        assert await running == LINES
        assert await output_of(client, "print(x + 1)") == "42\n"
        # What goes by way of the gateway: files, signals, and in the end the shutdown.
        assert await output_of(client, "_ = open('made', 'w').write('here')") == ""
        async with asyncio.timeout(20):
            while not (gateway.directory / "work" / "made").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        sleeping = asyncio.create_task(output_of(client, "import time\nprint('asleep', flush=True)\ntime.sleep(60)"))
        await asyncio.sleep(1)
        await manager.interrupt_kernel()
        async with asyncio.timeout(20):
            assert await sleeping == "asleep\n"
        killed(gateway)
        assert await output_of(client, "print(x + 1)") == "42\n", "and once more"
    finally:
        client.stop_channels()
        await manager.shutdown_kernel()


@pytest.mark.parametrize("replace", [killed, upgraded])
def test_a_notebook_runs_on(gateway: GatewayProcess, replace: Replace) -> None:
    cells = [COUNT, "print('next cell', number)\n_ = open('result', 'w').write(str(number))"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    replacing: list[threading.Thread] = []

    def begun(cell: Any, cell_index: int) -> None:
        if cell_index == 0:
            replacing.append(threading.Timer(1.0, replace, [gateway]))
            replacing[0].start()

    work = gateway.directory / "work"
    resources = {"metadata": {"path": str(work)}}
    NotebookClient(notebook, kernel_name="sandbox", resources=resources, on_cell_execute=begun).execute()
    replacing[0].join()
    printed = ["".join(output["text"] for output in cell.outputs) for cell in notebook.cells]
    assert printed == [LINES, "next cell 59\n"]
    assert (work / "result").read_text() == "59"


def test_a_notebook_is_told_that_its_gateway_stopped(gateway: GatewayProcess) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(COUNT)])
    assert gateway.process is not None
    stopping = threading.Timer(1.5, gateway.process.send_signal, [signal.SIGINT])
    resources = {"metadata": {"path": str(gateway.directory / "work")}}
    client = NotebookClient(
        notebook, kernel_name="sandbox", resources=resources, on_cell_execute=lambda **_: stopping.start()
    )
    with pytest.raises(CellExecutionError, match="The gateway that held the sandbox has stopped"):
        client.execute()
    stopping.join()
    assert gateway.process.wait(30) == 0


HOLDER = """
import sys, time
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="sandbox")
print(manager.provisioner.claim_source, flush=True)
time.sleep(600)"""


def test_a_holder_that_does_not_come_back_gives_its_sandbox_up(gateway: GatewayProcess) -> None:
    def claimed() -> int:
        return int(gateway.call("GET", "/metrics/pool").body["pool"]["python"]["claimed"])

    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, cwd=gateway.directory / "work", stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "gateway-warm\n"
            assert gateway.process is not None
            gateway.process.kill()
            gateway.process.wait()
        finally:
            holder.kill()
    gateway.start()
    assert claimed() == 1, "its holder has a while to come back"
    deadline = time.monotonic() + RESUME_SECONDS + 30
    while claimed():
        assert time.monotonic() < deadline
        time.sleep(0.5)
