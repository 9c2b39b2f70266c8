"""Runs notebooks with nbclient, one after the other, as its parent asks by lines on its standard input.

A line: {"cells": [code, …], "directory": …}. Answers: {"container": …} once its kernel runs; then {"outputs": [text of
each cell], "error": text or null, "descriptors": n, "threads": n}.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from typing import Any

import nbformat
from nbclient import NotebookClient

CELL_SECONDS = 150


def run(cells: list[str], directory: str) -> dict[str, Any]:
    """Run one notebook; return what its cells wrote, and its error."""
    kernelspec = {"name": "sandbox", "display_name": "sandbox", "language": "python"}
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": kernelspec}
    )

    def started(**_: Any) -> None:
        provisioner: Any = client.km.provisioner if client.km is not None else None
        say(container=provisioner.container_id, source=provisioner.claim_source)

    client = NotebookClient(book, kernel_name="sandbox", timeout=CELL_SECONDS, on_notebook_start=started)
    error = None
    try:
        client.execute(cwd=directory)
    except Exception:
        error = traceback.format_exc()
    outputs = [
        "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")
        for cell in book.cells
    ]
    notes = "".join(
        output.get("text", "") for cell in book.cells for output in cell.outputs if output.get("name") == "stderr"
    )
    return {"outputs": outputs, "notes": notes, "error": error}


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        found = run(**json.loads(line))
        say(**found, descriptors=len(os.listdir("/proc/self/fd")), threads=threading.active_count())
