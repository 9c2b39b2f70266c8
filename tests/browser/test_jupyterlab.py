"""What a user of JupyterLab does with the `sandbox` kernel, in a real browser, from the first click to the last."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Lab
from tests.browser.notebook_page import NotebookPage, write_notebook
from tests.gateway_process import ROOT
from tests.waiting import until

pytestmark = pytest.mark.service

TABLE = """\
import pandas as pd
air = pd.read_csv("co2.csv", parse_dates=["date"], index_col="date").interpolate()
air.tail(3)"""
CHART = """\
import ipywidgets
import matplotlib.pyplot as plt

@ipywidgets.interact(years=ipywidgets.IntSlider(value=1, min=1, max=10, continuous_update=False))
def chart(years):
    print(f"mean of {years} years")
    air["co2"].rolling(f"{365 * years}D").mean().plot(figsize=(7, 2.1), title="CO₂ on Mauna Loa, ppm")
    plt.show()"""
PICTURE = """\
picture = ipywidgets.Image()
upload = ipywidgets.FileUpload()
upload.observe(lambda change: setattr(picture, "value", bytes(change["new"][0]["content"])), "value")
ipywidgets.HBox([upload, picture])"""
#: one black pixel
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
QUESTIONS = """\
from getpass import getpass
print("hello", input("Who is there? "))
print("secret of", len(getpass("Your word: ")), "letters")"""
WRITE = "air['co2'].resample('YE').mean().to_csv('years.csv')\nprint(open('years.csv').read())"
TICKS = """\
import time
for number in range(40):
    print("tick", number, flush=True)
    time.sleep(pause if number == 5 else 0.1)
print("all told")"""
SLEEP = """\
x = 41
print("asleep", flush=True)
try:
    time.sleep(120)
except KeyboardInterrupt:
    x += 1"""
FOR_EVER = "print('round and round', flush=True)\nwhile True: time.sleep(0.05)"
KILLED = (
    "import time\nkept = 41\nprint('ready')",
    "for number in range(40): print('tick', number, flush=True); time.sleep(0.1)\nprint('all told')",
    "print('begun', flush=True)\ntime.sleep(2)\nkept += 1",
    "print('kept', kept)",
)
EAT = "kept = [bytearray(16 << 20) for _ in range(9999)]"


def picture_width(notebook: NotebookPage, number: int) -> int:
    """Width in pixels of the picture under a cell; 0 as long as the browser has none to show."""
    return int(notebook.outputs(number).locator("img").evaluate("image => image.naturalWidth"))


def test_a_morning_with_a_notebook(lab: Lab, notebook: NotebookPage) -> None:
    """Open, run, table, plot, slider, binary messages, questions, traceback, files, save, shut down."""
    course = lab.root / "course"
    course.mkdir()
    shutil.copy(ROOT / "notebooks" / "co2.csv", course)
    table = TABLE
    if not lab.copies_files:
        lines = (course / "co2.csv").read_text().splitlines(keepends=True)
        table = f"open('co2.csv', 'w').write({''.join(lines[:1] + lines[-9:])!r})\n{TABLE}"
    write_notebook(course / "air.ipynb", table, CHART, PICTURE, QUESTIONS, "1 / 0", WRITE)
    notebook.open("course/air.ipynb")

    assert "2001-12-29" in notebook.run(0)
    expect(notebook.outputs(0).locator("table.dataframe td")).to_have_count(3)
    notebook.run(1)
    notebook.wait_for_text(1, "mean of 1 years")
    slider = notebook.outputs(1).locator(".noUi-handle")
    for years in (2, 3, 4):
        slider.press("ArrowRight")
        notebook.wait_for_text(1, f"mean of {years} years")
    assert picture_width(notebook, 1) > 300
    notebook.screenshot("slider")

    notebook.run(2)
    if lab.way == "remote-stock":
        notebook.wait_for_text(2, "gateway.lab.SamovarWebSocketConnection")
    else:
        with notebook.page.expect_file_chooser() as chooser:
            notebook.outputs(2).get_by_role("button").click()
        chooser.value.set_files({"name": "pixel.png", "mimeType": "image/png", "buffer": PNG})
        until(lambda: picture_width(notebook, 2) == 1)

    notebook.start(3)
    notebook.wait_for_text(3, "Who is there?")
    notebook.answer(3, "Ada")
    notebook.wait_for_text(3, "hello Ada")
    notebook.wait_for_text(3, "Your word:")
    notebook.answer(3, "tea")
    notebook.wait_for_text(3, "secret of 3 letters")

    assert "ZeroDivisionError: division by zero" in notebook.run(4)
    assert "2001-12-31" in notebook.run(5)
    if lab.copies_files:
        result = course / "years.csv"
        until(lambda: result.exists() and result.read_text().startswith("date,co2\n1958-12-31,315."))

    notebook.save()
    saved = json.loads((course / "air.ipynb").read_text())
    assert "hello Ada" in json.dumps(saved["cells"][3]["outputs"])
    assert "<table" in json.dumps(saved["cells"][0]["outputs"])

    notebook.menu("Kernel", "Shut Down Kernel")
    expect(notebook.page.locator(".jp-KernelName")).to_have_text("No Kernel")
    assert lab.server.kernels() == []


def test_cells_that_take_their_time(lab: Lab, notebook: NotebookPage) -> None:
    """Cut connection, reload, interrupt, restart."""
    # Our own connection loses nothing. Stock jupyter_server and JupyterLab lose what is on its way at the moment of a
    # cut: nothing is, in a pause.
    stock = lab.way == "remote-stock"
    pause = 0.1 if lab.way == "remote" else 3  # a busy machine's browser is not at the tick at once
    ticks = f"pause = {pause}\n{TICKS}"
    write_notebook(lab.root / "slow.ipynb", ticks, SLEEP, "print('x is', x)", FOR_EVER)
    notebook.open("slow.ipynb")

    for number, leg in enumerate(lab.legs, 1):
        notebook.start(0)
        expect(notebook.cell(0)).not_to_contain_text("tick 39")
        notebook.wait_for_text(0, "tick 5")
        leg.cut()
        time.sleep(1 + pause)
        notebook.screenshot(f"connection-{number}-cut")
        leg.mend()
        notebook.wait_for_text(0, "all told")
        assert leg.cuts
        shown = notebook.text(0).splitlines()
        # Over HTTP, what was sent and not acknowledged comes once more.
        assert list(dict.fromkeys(shown)) == [*(f"tick {tick}" for tick in range(40)), "all told"]
        assert len(shown) == 41 or not lab.copies_files

    notebook.start(1)
    notebook.wait_for_text(1, "asleep")
    notebook.save()
    notebook.reload()
    # The gateway tells a new page what its kernel does; jupyter_server alone leaves it in the dark until the cell ends.
    # Behind jupyter_server's own connection class a new page is told of it at times only.
    notebook.wait_until("" if stock else "Unknown" if lab.copies_files else "Busy")
    assert [kernel["execution_state"] for kernel in lab.server.kernels()] == ["busy"]
    notebook.screenshot("reloaded")
    notebook.interrupt()
    notebook.wait_until("Idle")
    assert notebook.run(2) == "x is 42"

    notebook.start(3)
    notebook.wait_for_text(3, "round and round")
    notebook.interrupt()
    notebook.wait_for_text(3, "KeyboardInterrupt")
    notebook.wait_until("Idle")
    assert notebook.run(2) == "x is 42"
    notebook.restart()
    notebook.start(2)
    notebook.wait_for_text(2, "NameError: name 'x' is not defined")


def test_a_new_notebook_that_eats_all_memory(lab: Lab, notebook: NotebookPage) -> None:
    """The launcher's card, code typed by hand, a death with its cause on the screen, and a kernel again."""
    notebook.open_launcher()
    until(lambda: bool(notebook.launcher_card.locator("img").evaluate("image => image.naturalWidth")), 10)
    notebook.start_from_launcher()
    notebook.type(0, "6 * 7")
    assert notebook.run(0) == "42"
    notebook.add_cell()
    notebook.type(1, EAT)
    notebook.start(1)
    notebook.wait_for_text(1, "ran out of memory")
    notebook.screenshot("out-of-memory")
    notebook.confirm("It will restart automatically")
    notebook.wait_until("Idle")
    notebook.add_cell()
    notebook.type(2, "6 * 9")
    assert notebook.run(2) == "54"


def test_the_gateway_is_killed_under_an_open_page(lab: Lab, notebook: NotebookPage) -> None:
    """While a cell prints, and while one ends before the next gateway is there: the page gets both replies."""
    write_notebook(lab.root / "killed.ipynb", *KILLED)
    notebook.open("killed.ipynb")
    assert notebook.run(0) == "ready"

    notebook.start(1)
    notebook.wait_for_text(1, "tick 5")
    with the_gateway_away(lab):
        pass
    notebook.wait_for_text(1, "all told")
    expect(notebook.cell(1).locator(".jp-InputPrompt")).to_have_text("[2]:")

    notebook.start(2)
    notebook.wait_for_text(2, "begun")
    with the_gateway_away(lab):
        time.sleep(3.0)
    expect(notebook.cell(2).locator(".jp-InputPrompt")).to_have_text("[3]:")
    assert "begun" in notebook.text(2)
    notebook.screenshot("gateway-was-killed")
    assert notebook.run(3) == "kept 42"


@contextmanager
def the_gateway_away(lab: Lab) -> Iterator[None]:
    """Kill the gateway, where there is one, and start the next one in the end."""
    if lab.gateway is not None:
        assert lab.gateway.process is not None
        lab.gateway.process.kill()
        lab.gateway.process.wait()
    yield
    if lab.gateway is not None:
        lab.gateway.start()


@pytest.mark.parametrize("lab", ["remote"], indirect=True)
def test_a_kernel_that_dies_again_and_again_says_why_in_a_dialog(lab: Lab, notebook: NotebookPage) -> None:
    """After its fifth restart it stays dead: the dialog has our reason, and the page does not come back for ever."""
    write_notebook(lab.root / "dying.ipynb", *["import os, time; time.sleep(0.2); os._exit(7)"] * 6)
    notebook.open("dying.ipynb")
    for number in range(6):
        notebook.start(number)
        notebook.wait_for_text(number, "exit code 7")
        notebook.confirm("Kernel Restarting" if number < 5 else "ended with exit code 7. It died 6 times in a row.")
    connections = lab.server.log.read_text().count("Connecting to kernel")
    time.sleep(2.0)
    assert lab.server.log.read_text().count("Connecting to kernel") == connections
