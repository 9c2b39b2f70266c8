"""How ends of sandboxes are counted, kept and told in the log."""

from __future__ import annotations

import json
import logging
import signal
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import pytest

from gateway.log_file import JsonFormatter
from kernelprovisioner.claims import Ending
from kernelprovisioner.exit_log import KEPT, ExitEntry, ExitLog
from kernelprovisioner.launchers.base import Launched
from kernelprovisioner.records import SandboxRecord
from kernelprovisioner.sandbox import Sandbox
from kernelprovisioner.sandbox_exit import CellReference, ExitCause, SandboxExit
from kernelprovisioner.sandboxes import Sandboxes


def entry(cause: ExitCause, session: str = "s1", image: str = "python", **fields: object) -> ExitEntry:
    return ExitEntry("a1", image, session, SandboxExit(cause, **fields))  # type: ignore[arg-type]


def test_ends_are_counted_by_cause_and_image() -> None:
    log = ExitLog()
    for image in ("python", "python", "javascript"):
        log.add(entry(ExitCause.OUT_OF_MEMORY, image=image))
    log.add_failed_start("python")
    assert log.counts("python") == {"out_of_memory": 2, "start_failed": 1}
    assert log.counts() == {"out_of_memory": 3, "start_failed": 1}


def test_what_the_pool_thins_out_by_itself_is_no_news() -> None:
    log = ExitLog()
    log.add(entry(ExitCause.REQUESTED, session=""))
    assert log.counts() == {} and log.last(10) == []
    log.add(entry(ExitCause.REMOVED, session=""))
    log.add(entry(ExitCause.REQUESTED))
    assert log.counts() == {"removed": 1, "requested": 1}


@pytest.mark.parametrize(
    ("end", "asked", "told"),
    [
        (SandboxExit(ExitCause.SIGNAL, None, signal.SIGKILL), True, ExitCause.REQUESTED),
        (SandboxExit(ExitCause.SIGNAL, None, signal.SIGKILL), False, ExitCause.SIGNAL),
        (SandboxExit(ExitCause.OUT_OF_MEMORY, None, signal.SIGKILL), True, ExitCause.OUT_OF_MEMORY),
    ],
)
async def test_an_end_that_its_holder_asked_for_is_no_death(end: SandboxExit, asked: bool, told: ExitCause) -> None:
    exits = ExitLog()
    launched = SimpleNamespace(sandbox_id="a1", image=SimpleNamespace(name="python"))
    sandbox = Sandbox(cast(Launched, launched), Mock(), Mock(), cast(Sandboxes, SimpleNamespace(exits=exits)))
    sandbox.record = cast(SandboxRecord, SimpleNamespace(kernel_id="k1", state="claimed"))
    sandbox.end_asked = asked
    sandbox._end(end)
    assert exits.counts() == {told.value: 1}
    assert (sandbox.exited.result().cause, sandbox.exited.result().signal) == (told, signal.SIGKILL)


def test_the_last_ones_are_kept_and_no_more() -> None:
    log = ExitLog()
    for number in range(KEPT + 5):
        log.add(ExitEntry(str(number), "python", "s", SandboxExit(ExitCause.EXITED, number)))
    assert [one.sandbox_id for one in log.last(2)] == [str(KEPT + 4), str(KEPT + 3)]
    assert len(log.last(10 * KEPT)) == KEPT


def test_one_line_says_all_of_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cell = CellReference("m1", 3)
    ExitLog().add(entry(ExitCause.OUT_OF_MEMORY, evidence={"limit_mb": 64, "peak_mb": 63}, cell=cell))
    ExitLog().add(entry(ExitCause.REQUESTED))
    first, second = caplog.records
    assert first.getMessage() == (
        "sandbox a1 of python ended while cell 3 ran: The kernel ran out of memory (limit 64 MiB, peak 63 MiB) and was"
        " killed."
    )
    assert (first.levelname, second.levelname) == ("WARNING", "INFO")
    line = json.loads(JsonFormatter().format(first))
    assert line["event"] == "exit" and line["session"] == "s1" and line["cause"] == "out_of_memory"
    assert line["cell"] == {"msg_id": "m1", "execution_count": 3}


@pytest.mark.parametrize("cell", [None, CellReference("m1"), CellReference("m1", 7)])
def test_a_holder_hears_which_cell_it_was(cell: CellReference | None) -> None:
    told = SandboxExit(ExitCause.ENGINE, 137, 9, {"reason": "r"}, cell=cell)
    assert Ending.of(told.as_dict(), b"[]").exit == told
