"""The example notebook, executed by nbclient, papermill and `samovar run`, each in a sandbox."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient

from tests.conformance.conftest import WHERE, Place
from tests.conformance.test_clients import notebook, printed
from tests.gateway_process import ROOT

pytestmark = pytest.mark.conformance

NAME = "quickstart.ipynb"


@pytest.fixture
def path(place: Place) -> Path:
    """The notebook and its CSV, in a directory of the test's own."""
    for name in (NAME, "co2.csv"):
        shutil.copy(ROOT / "notebooks" / name, place.directory)
    return place.directory / NAME


def check(book: nbformat.NotebookNode) -> None:
    text = "".join(printed(cell) for cell in book.cells if cell.cell_type == "code")
    assert "59 of 2284 weeks are missing, in 22 holes" in text
    assert "growth 1960: 0.87, 2000: 1.80 ppm per year; the fit explains 99.78%" in text
    assert re.search(r"swing 1959: 5\.5\d ppm, 2000: 6\.5\d ppm \(\+1[89]%\)", text)
    images = [
        output.data["image/png"]
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 1 and len(images[0]) > 20_000


def test_nbclient(place: Place, path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    with place.one_claim():
        NotebookClient(book, resources={"metadata": {"path": str(path.parent)}}, timeout=120).execute()
    check(book)


def test_papermill(place: Place, path: Path) -> None:
    with place.one_claim():
        papermill.execute_notebook(path, path.parent / "out.ipynb", cwd=str(path.parent), progress_bar=False)
    check(nbformat.read(path.parent / "out.ipynb", as_version=4))


def test_samovar_run(place: Place, path: Path) -> None:
    with place.one_claim():
        place.run("gateway.cli", "run", str(path), "-o", "out.ipynb")
    check(nbformat.read(place.directory / "out.ipynb", as_version=4))


def test_samovar_run_shows_outputs_and_a_progress_bar(place: Place) -> None:
    nbformat.write(notebook(WHERE, "print('\\x1b[2Jé')", "6 * 7"), place.directory / "book.ipynb")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", "run", "book.ipynb"],
        cwd=place.directory,
        env=place.environment | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=follower,
    )
    try:
        output = process.communicate(timeout=60)[0].decode()
        os.set_blocking(leader, False)
        bar = os.read(leader, 1 << 16).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert process.returncode == 0
    place.check_container(output)
    # What a cell prints may have colours, but does not talk to the terminal.
    assert output.splitlines()[1:] == ["\N{REPLACEMENT CHARACTER}[2Jé", "42"]
    assert "3/3" in bar and "cell" in bar


def test_samovar_run_of_a_cell_that_fails(place: Place) -> None:
    book = notebook("print('so far')", "1 / 0", "print('never')")
    nbformat.write(book, place.directory / "book.ipynb")
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "run", "book.ipynb", "-o", "out.ipynb"],
        cwd=place.directory,
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "so far\n")
    assert "ZeroDivisionError" in done.stderr and "samovar run: " in done.stderr
    assert "Traceback (most recent call last)" not in done.stderr.partition("samovar run")[0]
    result = nbformat.read(place.directory / "out.ipynb", as_version=4)
    assert printed(result.cells[0]) == "so far\n" and result.cells[2].outputs == []


def test_samovar_run_is_interrupted(place: Place) -> None:
    book = notebook("open('started', 'w').close()", "import time\nprint('going', flush=True)\ntime.sleep(600)")
    nbformat.write(book, place.directory / "book.ipynb")
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", "run", "book.ipynb"],
        cwd=place.directory,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (place.directory / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130, error
    assert error.endswith("samovar run: interrupted.\n") and "Traceback" not in error
