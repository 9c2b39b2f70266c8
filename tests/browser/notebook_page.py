"""JupyterLab's page, in the words of somebody who works with a notebook."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from playwright.sync_api import Locator, Page, expect

from tests.browser.jupyterlab import TOKEN

#: The shelf for screenshots and logs, kept by CI.
SHELF = Path(__file__).resolve().parents[2] / ".cache" / "browser"
#: the kernelspec's display name
KERNEL = "Python 3 (sandbox)"
#: milliseconds that the page may take to show something
PATIENCE = 30_000


class NotebookPage:
    """One notebook in one browser page. Cells are counted from 0."""

    def __init__(self, page: Page, url: str, shelf_mark: str) -> None:
        self.page = page
        self._url = url
        self._mark = shelf_mark
        page.set_default_timeout(PATIENCE)
        lost = self.dialog.filter(has_text="Server Connection Error")
        page.add_locator_handler(lost, lambda: lost.locator("button").click())

    # --- opening ------------------------------------------------------------------------------------------------------

    def open(self, path: str) -> None:
        """Open a notebook of the server; returns when its kernel is idle."""
        self.page.goto(f"{self._url}/lab/tree/{path}?token={TOKEN}&reset")
        self.panel.wait_for()
        self.wait_until("Idle")

    def open_launcher(self) -> None:
        """Open an empty JupyterLab, with its launcher."""
        self.page.goto(f"{self._url}/lab?token={TOKEN}&reset")
        self.page.locator(".jp-LauncherCard").first.wait_for()

    def start_from_launcher(self) -> None:
        """Click the kernel's card; returns when the new notebook's kernel is idle."""
        self.launcher_card.click()
        self.panel.wait_for()
        self.wait_until("Idle")

    def reload(self) -> None:
        """Reload the page; returns when the notebook is there again."""
        self.page.reload()
        self.panel.wait_for()

    # --- what is on the screen ----------------------------------------------------------------------------------------

    @property
    def panel(self) -> Locator:
        """The notebook that is in front."""
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    @property
    def launcher_card(self) -> Locator:
        """What starts a new notebook for the kernel."""
        return self.page.locator('.jp-LauncherCard[data-category="Notebook"]', has_text=KERNEL)

    def cell(self, number: int) -> Locator:
        """A cell with its input and outputs."""
        return self.panel.locator(".jp-Notebook-cell").nth(number)

    def outputs(self, number: int) -> Locator:
        """What stands under a cell."""
        return self.cell(number).locator(".jp-OutputArea-output")

    def text(self, number: int) -> str:
        """All text of a cell's outputs."""
        return "\n".join(text.strip("\n") for text in self.outputs(number).all_inner_texts())

    @property
    def dialog(self) -> Locator:
        """The dialog in front of everything."""
        return self.page.locator(".jp-Dialog-content")

    def wait_until(self, status: str, timeout: float = PATIENCE) -> None:
        """Wait until the status bar shows the kernel as `Idle`, `Busy`, …"""
        # The circle above the notebook shows an idle kernel also where there is none yet.
        expect(self.page.locator("#jp-main-statusbar")).to_contain_text(f"{KERNEL} | {status}", timeout=timeout)

    def wait_for_text(self, number: int, text: str | re.Pattern[str], timeout: float = PATIENCE) -> None:
        """Wait until something stands under a cell."""
        expect(self.cell(number).locator(".jp-Cell-outputArea")).to_contain_text(text, timeout=timeout)

    def screenshot(self, name: str) -> Path:
        """Keep what is on the screen now."""
        SHELF.mkdir(parents=True, exist_ok=True)
        path = SHELF / f"{self._mark}-{name}.png"
        self.page.screenshot(path=path)
        return path

    # --- what a user does ---------------------------------------------------------------------------------------------

    def add_cell(self) -> None:
        """Click the plus of the notebook: a new cell below."""
        self.panel.locator('[data-command="notebook:insert-cell-below"]').first.click()

    def type(self, number: int, code: str) -> None:
        """Write code into an empty cell, key by key."""
        self.cell(number).locator(".cm-content").click()
        self.page.keyboard.type(code)

    def start(self, number: int) -> None:
        """Run a cell with Ctrl-Enter; returns at once."""
        self.cell(number).locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")

    def run(self, number: int, timeout: float = PATIENCE) -> str:
        """Run a cell, wait for its end, return the text under it."""
        self.start(number)
        # A cell that waits or runs shows [*].
        expect(self.cell(number).locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"), timeout=timeout)
        self.wait_until("Idle", timeout)
        return self.text(number)

    def answer(self, number: int, text: str) -> None:
        """Type an answer into the field that `input()` shows."""
        field = self.cell(number).locator(".jp-Stdin-input").last
        field.fill(text)
        field.press("Enter")

    def save(self) -> None:
        """Save with Ctrl-S; returns when the notebook is no longer marked as changed."""
        self.page.keyboard.press("Control+s")
        expect(self.page.locator(".lm-TabBar-tab.lm-mod-current.jp-mod-dirty")).to_have_count(0)

    def interrupt(self) -> None:
        """Click the stop button."""
        self.panel.locator('[data-command="notebook:interrupt-kernel"]').click()

    def confirm(self, question: str) -> None:
        """Wait for a dialog with this text and accept it."""
        dialog = self.dialog.filter(has_text=question)
        dialog.locator(".jp-mod-accept").click()
        expect(dialog).to_have_count(0)

    def restart(self) -> None:
        """Click the restart button and confirm; returns when the new kernel is idle."""
        self.panel.locator('[data-command="notebook:restart-kernel"]').click()
        self.confirm("Restart Kernel?")
        self.wait_until("Idle")

    def menu(self, *words: str) -> None:
        """Choose an entry of the menu bar."""
        self.page.locator(".lm-MenuBar-item", has_text=words[0]).first.click()
        for word in words[1:]:
            self.page.locator(".lm-Menu-item", has_text=word).first.click()


def write_notebook(path: Path, *cells: str) -> None:
    """A saved notebook for the `sandbox` kernel, as a user's own."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "sandbox", "display_name": KERNEL, "language": "python"}
    nbformat.write(book, path)
