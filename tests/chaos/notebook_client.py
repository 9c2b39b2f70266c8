"""One nbclient user: notebook after notebook, each exact or with an exception whose cause was really injected."""

from __future__ import annotations

import json
import random
import re
import secrets
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos.event_log import EventLog
from tests.chaos.faults import ENGINE_KINDS, GATEWAY_KINDS, History, Kind
from tests.chaos.model import MARK, Violation, cell_code, cell_text, check_notebook_error
from tests.gateway_process import ROOT

_FILES_LOST = re.compile("may be lost|not all files came out")
#: How long one notebook may take while things break.
NOTEBOOK_SECONDS = 240.0
#: Cells of one notebook, at least and at most.
CELLS = (3, 8)
#: How many more descriptors and threads a worker may have than after its first notebook.
SLACK = 8


class NotebookUser(threading.Thread):
    """Runs notebooks in a process of its own until `stop` is set."""

    def __init__(
        self,
        name: str,
        environment: dict[str, str],
        directory: Path,
        history: History,
        log: EventLog,
        stop: threading.Event,
        seed: str,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.outcomes: Counter[str] = Counter()
        self.containers: set[str] = set()
        self._directory = directory
        self._history = history
        self._log = log
        self._stopped = stop
        self._dice = random.Random(f"{seed} {name}")
        self._first: dict[str, int] | None = None
        self._error_log = directory / f"{name}.log"
        self._errors = self._error_log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.notebook_worker"],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._notebook()
        except Exception as error:
            self._log.violation(self.name, f"the client itself failed: {error!r}")

    def kill(self) -> None:
        """End the process at once, where it still runs."""
        if self._process.poll() is None:
            self._process.kill()

    def finish(self) -> None:
        """End the process; it must end in order."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            code = self._process.wait(60)
            if code != 0:
                self._log.violation(self.name, f"the worker ended with exit code {code}")
        except subprocess.TimeoutExpired:
            self._log.violation(self.name, "the worker did not end")
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _notebook(self) -> None:
        nonces = [f"nonce-{secrets.token_hex(8)}" for _ in range(self._dice.randint(*CELLS))]
        tag = f"tag-{secrets.token_hex(6)}"
        work = self._directory / tag
        work.mkdir()
        cells = [cell_code(nonce, tag, round(self._dice.random(), 2)) for nonce in nonces]
        cells[-1] += f"\nopen('result.txt', 'w').write({tag!r})"
        self.containers = set()
        began, logged = time.monotonic(), self._error_log.stat().st_size
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"cells": cells, "directory": str(work)}).encode() + b"\n")
        self._process.stdin.flush()
        found = self._answer(began + NOTEBOOK_SECONDS)
        found["log"] = self._error_log.read_bytes()[logged:].decode(errors="replace")
        if found["error"] and not any(found["outputs"]):
            # Before its first cell nbclient says no more than that the kernel died; its process's log knows why.
            found["error"] += found["log"]
        try:
            outcome = self._check(found, nonces, tag, work, began)
        except Violation as violation:
            outcome = "VIOLATION"
            self._log.violation(self.name, f"{tag}: {violation}")
        self.outcomes[outcome] += 1
        took = round(time.monotonic() - began, 2)
        self._log.write("notebook", who=self.name, tag=tag, outcome=outcome, took=took, error=found["error"])
        if found["error"]:
            # While the engine is away each start fails at once.
            self._stopped.wait(1.0)

    def _check(self, found: dict[str, Any], nonces: list[str], tag: str, work: Path, began: float) -> str:
        expected = [cell_text(nonce, tag, count) for count, nonce in enumerate(nonces, start=1)]
        foreign = set(MARK.findall(str(found))) - {*nonces, tag}
        if foreign:
            raise Violation(f"the notebook holds marks of others: {sorted(foreign)}")
        for right, output in zip(expected, found["outputs"], strict=True):
            if output != right and not (found["error"] and right.startswith(output)):
                raise Violation(f"a cell's output is {output!r}, not {right!r}; error {found['error']}")
        if found["error"]:
            ended = time.monotonic()
            return "error: " + check_notebook_error(self._history, found["error"], self.containers, began, ended)
        if not (work / "result.txt").exists():
            gone = {happening.kind for happening in self._history.within(began, time.monotonic())}
            if _FILES_LOST.search(found["log"]) and gone & (GATEWAY_KINDS | ENGINE_KINDS | {Kind.CLAIMED}):
                return "ok, files lost and told"
            raise Violation(f"the notebook's file did not come out; log {found['log']!r}")
        counted = {name: found[name] for name in ("descriptors", "threads")}
        self._first = self._first or counted
        for name, count in counted.items():
            if count > self._first[name] + SLACK:
                raise Violation(f"{count} {name}, {self._first[name]} after the first notebook")
        return "ok"

    def _answer(self, deadline: float) -> dict[str, Any]:
        """What the worker says of the notebook. Raises RuntimeError where it does not."""
        output = self._process.stdout
        assert output is not None
        while True:
            readable, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            line = output.readline() if readable else b""
            if not line:
                self._process.kill()
                raise RuntimeError(f"the notebook did not end within {NOTEBOOK_SECONDS:g} s, or its process did")
            found: dict[str, Any] = json.loads(line)
            if "outputs" in found:
                return found
            self.containers.add(found["container"])
            self._log.write("claimed", who=self.name, **found)
