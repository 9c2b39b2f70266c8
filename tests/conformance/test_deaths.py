"""A kernel's death is told in the cell that ran, with its cause and the output so far, before its manager notices."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import docker
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.conformance.conftest import Place
from tests.conformance.test_clients import notebook, printed

pytestmark = pytest.mark.conformance

#: From the death to nbclient's error, in seconds: well under one on an idle machine, others work on this one.
LIMIT = 5.0


def die(place: Place, code: str) -> tuple[str, nbformat.NotebookNode, str, float]:
    """Run a cell that ends its kernel; return its container's id, notebook, error text and when that was raised."""
    book = notebook("before = 1", code)
    containers: list[str] = []

    def note(cell: nbformat.NotebookNode, cell_index: int) -> None:
        containers.append(client.km.provisioner.container_id)

    client = NotebookClient(book, kernel_name="sandbox", timeout=60, on_cell_execute=note)
    with pytest.raises(CellExecutionError) as error:
        client.execute(cwd=str(place.directory))
    return containers[-1], book, str(error.value), time.time()


def last_time(cell: nbformat.NotebookNode) -> float:
    """The last time that a cell printed: shortly before its death."""
    return float([line for line in printed(cell).splitlines() if line.startswith("at ")][-1].removeprefix("at "))


def test_os_exit(place: Place) -> None:
    _, book, error, told = die(place, "import os, time\nprint('so far')\nprint('at', time.time())\nos._exit(1)")
    assert "exit code 1" in error and "so far" in error
    assert told - last_time(book.cells[1]) < LIMIT


def test_out_of_memory(place: Place) -> None:
    code = """
kept = []
while True:
    kept.append(b"x" * (32 << 20))
"""
    began = time.time()
    container, _, error, told = die(place, code)
    assert "ran out of memory" in error
    # The system tries to find memory before it kills: for how long is not ours.
    assert told - out_of_memory(place, container, began) < LIMIT


def out_of_memory(place: Place, container: str, since: float) -> float:
    """When the engine saw that a container ran out of memory."""
    with contextlib.closing(docker.DockerClient(base_url=place.docker_url, timeout=30)) as engine:
        filters = {"container": container, "event": "oom"}
        # the engine counts whole seconds here
        events = engine.events(since=int(since), until=int(time.time()) + 1, filters=filters, decode=True)
        return max(event["timeNano"] for event in events) / 1e9


def test_segfault(place: Place) -> None:
    _, book, error, told = die(place, "import ctypes, time\nprint('at', time.time())\nctypes.string_at(0)")
    assert "SIGSEGV" in error
    assert told - last_time(book.cells[1]) < LIMIT


def test_killed_from_outside(place: Place) -> None:
    with killed_when_it_says_ready(place) as killed:
        code = "import time\nopen('ready', 'w').write('x')\nprint('waiting', flush=True)\ntime.sleep(60)"
        _, _, error, told = die(place, code)
    assert "killed" in error and "waiting" in error
    assert told - killed[0] < LIMIT


def test_killed_before_it_could_say_that_it_has_the_cell(place: Place) -> None:
    # The kernel stands still, so that its death takes along a request that nobody else knows of.
    stop = "import os, subprocess\nsubprocess.Popen(['sh', '-c', f'sleep 0.3; kill -STOP {os.getpid()}'])"
    book = notebook(stop, "print('never')")

    def wait(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell_index == 1:
            time.sleep(1.0)

    def kill(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell_index == 1:
            with contextlib.closing(docker.DockerClient(base_url=place.docker_url, timeout=30)) as engine:
                engine.containers.get(client.km.provisioner.container_id).kill()

    client = NotebookClient(book, kernel_name="sandbox", timeout=60, on_cell_execute=wait, on_cell_complete=kill)
    with pytest.raises(CellExecutionError, match="killed or removed from outside"):
        client.execute(cwd=str(place.directory))


@contextlib.contextmanager
def killed_when_it_says_ready(place: Place) -> Iterator[list[float]]:
    """`docker kill` the newest sandbox that runs in this place once its cell has begun; gives the time of it."""
    killed: list[float] = []

    def kill() -> None:
        with contextlib.closing(docker.DockerClient(base_url=place.docker_url, timeout=30)) as client:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                found = client.containers.list(filters={"label": "com.samovar.managed=true"}, ignore_removed=True)
                for container in found:
                    if _cell_runs(container):
                        killed.append(time.time())
                        container.kill()
                        return
                time.sleep(0.1)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        thread.join()
    assert killed, "no sandbox said that it was ready"


def _cell_runs(container: docker.models.containers.Container) -> bool:
    with contextlib.suppress(docker.errors.APIError):
        return container.exec_run(["test", "-e", "/mnt/data/ready"]).exit_code == 0
    return False


def test_files_of_a_dead_kernel_still_come_out(place: Place) -> None:
    die(place, "open('result.csv', 'w').write('1,2')\nimport os; os._exit(1)")
    assert (place.directory / "result.csv").read_text() == "1,2"


def test_sys_exit_is_no_death_of_the_session(place: Place) -> None:
    book = notebook("import sys\nsys.exit(3)")
    client = NotebookClient(book, kernel_name="sandbox", timeout=60, allow_errors=True)
    client.execute(cwd=str(place.directory))
    assert any("SystemExit" in output.get("ename", "") for output in book.cells[0].outputs)


def test_whoever_asks_later_is_told_too(place: Place) -> None:
    book = notebook("import os; os._exit(1)", "1")
    NotebookClient(book, kernel_name="sandbox", timeout=60, allow_errors=True).execute(cwd=str(place.directory))
    for cell in book.cells:
        assert [output.evalue for output in cell.outputs if output.output_type == "error"] == [
            "The kernel process ended with exit code 1."
        ]
