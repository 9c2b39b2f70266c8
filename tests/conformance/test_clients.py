"""Stock Jupyter clients, unchanged, on `kernel_name="sandbox"`: each gets a container, and from where it should."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from jupyter_client.manager import start_new_kernel
from jupyter_core.utils import run_sync
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from nbclient import NotebookClient
from tornado.websocket import WebSocketClientConnection, websocket_connect

from tests.conformance.conftest import WHERE, Place
from tests.conformance.jupyter_process import JupyterProcess

pytestmark = pytest.mark.conformance

#: a page's client session: its websocket and its messages name the same one
PAGE = "a-page-of-jupyterlab"


def notebook(*cells: str) -> nbformat.NotebookNode:
    kernelspec = {"name": "sandbox", "display_name": "Python 3 (sandbox)", "language": "python"}
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": kernelspec}
    )


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_nbclient(place: Place) -> None:
    book = notebook(WHERE, "x = 20 + 1", "2 * x")
    client = NotebookClient(book, kernel_name="sandbox", timeout=60)
    with place.one_claim(), client.setup_kernel(cwd=str(place.directory), cleanup_kc=True):
        for index, cell in enumerate(book.cells):
            client.execute_cell(cell, index)
        provisioner = client.km.provisioner
        info = run_sync(provisioner.get_provisioner_info)()
        place.check_source(provisioner.claim_source)
        place.check_container(printed(book.cells[0]), provisioner.container_id)
        assert info["container_id"] == provisioner.container_id and info["claim_source"] == provisioner.claim_source
    assert book.cells[0].execution_count == 1
    assert book.cells[2].outputs[0]["data"]["text/plain"] == "42"


def test_papermill(place: Place) -> None:
    source, result = place.directory / "in.ipynb", place.directory / "out.ipynb"
    book = notebook("n = 1", WHERE, "print(n, sorted(__import__('os').listdir()))\nopen('made.csv', 'w').write('1,2')")
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, source)
    with place.one_claim():
        papermill.execute_notebook(
            source, result, parameters={"n": 42}, cwd=str(place.directory), kernel_name="sandbox", progress_bar=False
        )
    done = nbformat.read(result, 4)
    place.check_container(printed(done.cells[2]))
    assert printed(done.cells[3]).startswith("42 ['in.ipynb'")
    assert (place.directory / "made.csv").read_text() == "1,2"


def test_nbconvert_execute(place: Place) -> None:
    nbformat.write(notebook(WHERE, "print(open('data.csv').read())"), place.directory / "book.ipynb")
    (place.directory / "data.csv").write_text("of the notebook's directory")
    with place.one_claim():
        place.run("nbconvert", "--to", "notebook", "--execute", "--output", "done.ipynb", "book.ipynb")
    done = nbformat.read(place.directory / "done.ipynb", 4)
    place.check_container(printed(done.cells[0]))
    assert "of the notebook's directory" in printed(done.cells[1])


def test_jupyter_run(place: Place) -> None:
    (place.directory / "script.py").write_text(WHERE + "\nopen('from_run.txt', 'w').write('x')\n")
    with place.one_claim():
        output = place.run("jupyter", "run", "--kernel", "sandbox", "script.py")
    place.check_container(output)
    assert (place.directory / "from_run.txt").read_text() == "x", "the last files come out at the process's end"


def test_jupyter_console(place: Place) -> None:
    with place.one_claim():
        output = place.run(
            "jupyter", "console", "--kernel", "sandbox", "--simple-prompt", text=f"{WHERE}\nprint(6 * 7)\nexit\n"
        )
    place.check_container(output)
    assert re.search(r"\b42\b", output)


def test_blocking_manager(place: Place) -> None:
    with place.one_claim():
        manager, client = start_new_kernel(kernel_name="sandbox", cwd=str(place.directory))
        try:
            texts: list[str] = []
            reply = client.execute_interactive(
                WHERE, timeout=30, output_hook=lambda message: texts.append(message["content"].get("text", ""))
            )
            assert reply["content"]["status"] == "ok"
            place.check_source(manager.provisioner.claim_source)
            place.check_container("".join(texts), manager.provisioner.container_id)
            client.execute("import time; time.sleep(30)")
            time.sleep(0.5)
            manager.interrupt_kernel()
            assert client.get_shell_msg(timeout=10)["content"]["ename"] == "KeyboardInterrupt"
            assert manager.is_alive()
        finally:
            client.stop_channels()
            manager.shutdown_kernel()
    assert not manager.is_alive() and not manager.has_kernel
    manager.cleanup_resources()  # once more changes nothing


async def test_mapping_kernel_manager_of_jupyter_server(place: Place) -> None:
    manager = AsyncMappingKernelManager(root_dir=str(place.directory))
    with place.one_claim():
        kernel_id = await manager.start_kernel(kernel_name="sandbox", path="")
        kernel = manager.get_kernel(kernel_id)
        place.check_source(kernel.provisioner.claim_source)
        client = kernel.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=30)
            texts: list[str] = []
            await client._async_execute_interactive(
                WHERE, timeout=30, output_hook=lambda message: texts.append(message["content"].get("text", ""))
            )
            place.check_container("".join(texts), kernel.provisioner.container_id)
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(kernel_id)
    assert await manager.is_alive(kernel_id) is False if kernel_id in manager else True


# --- JupyterLab's own server, as a process ----------------------------------------------------------------------------


class Lab(JupyterProcess):
    """A running `jupyter lab`, and what its page would ask of it."""

    def __init__(self, place: Place) -> None:
        command = ["jupyterlab", f"--notebook-dir={place.directory}", "--ServerApp.disable_check_xsrf=True"]
        super().__init__(command, place.directory, place.directory.parent / "lab.log", place.environment, token="")

    async def connect(self, kernel_id: str) -> WebSocketClientConnection:
        return await websocket_connect(f"ws://127.0.0.1:{self.port}/api/kernels/{kernel_id}/channels?session_id={PAGE}")


async def run_cell(page: WebSocketClientConnection, code: str) -> list[dict[str, Any]]:
    """Execute as a notebook page does; return all messages of the cell, its reply included."""
    msg_id = uuid.uuid4().hex
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    header = {"msg_id": msg_id, "msg_type": "execute_request", "session": PAGE, "username": "", "version": "5.3"}
    header["date"] = "2026-01-01T00:00:00Z"
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    await page.write_message(json.dumps({**message, "buffers": []}))
    messages: list[dict[str, Any]] = []
    wanted = {"execute_reply", "idle"}
    async with asyncio.timeout(30):
        while wanted:
            raw = await page.read_message()
            assert raw is not None, "the server closed the websocket"
            answer = json.loads(raw)
            if answer["parent_header"].get("msg_id") == msg_id:
                messages.append(answer)
                wanted -= {answer["msg_type"], answer["content"].get("execution_state")}
    return messages


def text_of(messages: list[dict[str, Any]]) -> str:
    return "".join(message["content"].get("text", "") for message in messages if message["msg_type"] == "stream")


async def test_jupyterlab(place: Place) -> None:
    lab = await asyncio.to_thread(Lab, place)
    try:
        specs = await lab.ask("GET", "/api/kernelspecs")
        assert specs["kernelspecs"]["sandbox"]["spec"]["display_name"] == "Python 3 (sandbox)"
        assert "logo-svg" in specs["kernelspecs"]["sandbox"]["resources"]
        body = {"path": "a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "sandbox"}}
        with place.one_claim():
            session = await lab.ask("POST", "/api/sessions", body)
        kernel_id = session["kernel"]["id"]
        page = await lab.connect(kernel_id)
        first = place.check_container(text_of(await run_cell(page, WHERE)))
        assert text_of(await run_cell(page, "print(__session__)")).strip().endswith("a.ipynb")
        await lab.ask("POST", f"/api/kernels/{kernel_id}/restart")
        second = place.check_container(text_of(await run_cell(page, WHERE)))
        assert second != first, "a restart is a new sandbox"
        await dies_and_comes_back(lab, page, place, second)
        page.close()
        await lab.ask("DELETE", f"/api/sessions/{session['id']}")
    finally:
        await asyncio.to_thread(lab.stop)
    log = lab.log.read_text()
    assert "Traceback" not in log, log


async def dies_and_comes_back(lab: Lab, page: WebSocketClientConnection, place: Place, container: str) -> None:
    """A death is told in the cell that ran; then Jupyter's own restarter gets a new sandbox."""
    messages = await run_cell(page, "print('so far', flush=True)\nimport os; os._exit(7)")
    [reply] = [message for message in messages if message["msg_type"] == "execute_reply"]
    assert "exit code 7" in reply["content"]["evalue"]
    assert "so far" in text_of(messages) and "exit code 7" in text_of(messages)
    async with asyncio.timeout(30):
        while True:
            raw = json.loads(str(await page.read_message()))
            if raw["content"].get("execution_state") == "restarting":
                break
    await asyncio.sleep(1)
    third = place.check_container(text_of(await run_cell(page, WHERE)))
    assert third != container


def test_nothing_else_is_installed(kernelspec_prefix: Path) -> None:
    names = sorted(path.name for path in (kernelspec_prefix / "share" / "jupyter" / "kernels" / "sandbox").iterdir())
    assert names == ["kernel.json", "logo-svg.svg"]
