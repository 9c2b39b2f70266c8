"""What a monitor notes of a kernel that others talk to, honest or not."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from typing import Any, cast

import pytest

from kernelprovisioner.monitor import KernelMonitor, RunningCell
from kernelprovisioner.wire import KernelWire, Listener, Message

CELL = {"msg_id": "cell", "msg_type": "execute_request", "session": "s"}


class FakeWire:
    on_other: Listener

    def says(self, msg_type: str, content: Mapping[str, Any] | bytes, msg_id: str = "m", parent: Any = None) -> None:
        part = content if isinstance(content, bytes) else json.dumps(content).encode()
        header = {"msg_id": msg_id, "msg_type": msg_type}
        self.on_other(Message("iopub", [b"", b"", b"{}", part], header, CELL if parent is None else parent))


@pytest.fixture
def heard() -> tuple[FakeWire, KernelMonitor, list[None]]:
    wire, ends = FakeWire(), list[None]()
    return wire, KernelMonitor(cast(KernelWire, wire), lambda: ends.append(None)), ends


Heard = tuple[FakeWire, KernelMonitor, list[None]]


def test_it_knows_the_cell_that_runs_and_its_end(heard: Heard) -> None:
    wire, monitor, ends = heard
    wire.says("status", {"execution_state": "busy"})
    assert monitor.running() == [RunningCell(CELL)]
    wire.says("execute_input", {"code": "1", "execution_count": 3})
    wire.says("stream", {"name": "stdout", "text": "x"}, "out")
    assert monitor.running() == [RunningCell(CELL, 3)] and monitor.received == {"out"} and not ends
    wire.says("status", {"execution_state": "idle"})
    assert monitor.running() == [] and len(ends) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"execution_state":[1]}', b"[" * 100_000, b"\xff"])
def test_a_status_that_cannot_be_read_tells_nothing(heard: Heard, content: bytes) -> None:
    wire, monitor, ends = heard
    wire.says("status", content)
    assert monitor.running() == [] and not ends


@pytest.mark.parametrize("count", ["x", [], 1.5])
def test_a_count_that_is_none_is_left_out(heard: Heard, count: object) -> None:
    wire, monitor, _ = heard
    wire.says("status", {"execution_state": "busy"})
    wire.says("execute_input", {"execution_count": count})
    assert monitor.running() == [RunningCell(CELL)]


@pytest.mark.parametrize("msg_type", ["status", "execute_input"])
def test_no_objects_are_made_of_a_json_bomb(heard: Heard, msg_type: str) -> None:
    wire, monitor, _ = heard
    wire.says("status", {"execution_state": "busy"})
    bomb = b'{"execution_state":"idle","execution_count":1,"a":[' + b"[]," * 1_000_000 + b"[]]}"
    tracemalloc.start()
    try:
        wire.says(msg_type, bomb)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(bomb)
    finally:
        tracemalloc.stop()
    assert monitor.running() == ([] if msg_type == "status" else [RunningCell(CELL, 1)])


def test_ids_of_no_kernel_are_not_remembered(heard: Heard) -> None:
    wire, monitor, _ = heard
    wire.says("stream", {}, "x" * 60_000)
    wire.says("status", {"execution_state": "busy"}, parent={**CELL, "msg_id": "x" * 60_000})
    assert monitor.received == set() and monitor.running() == []


def test_it_knows_the_next_request_of_those_who_number_theirs(heard: Heard) -> None:
    wire, monitor, _ = heard
    for sender, number in (("a", 1), ("a", 2), ("b_7", 9)):
        parent = {"msg_id": f"{sender}_77_{number}", "msg_type": "kernel_info_request", "session": sender}
        wire.says("status", {"execution_state": "idle"}, parent=parent)
    wire.says("status", {"execution_state": "busy"}, parent={**CELL, "msg_id": "a uuid", "session": "c"})
    told = {cell.header["msg_id"]: cell.header for cell in monitor.unheard()}
    assert set(told) == {"a_77_3", "b_7_77_10"}
    assert (told["a_77_3"]["session"], told["a_77_3"]["msg_type"]) == ("a", "execute_request")


def test_who_waits_for_a_cell_that_runs_sent_no_other_one(heard: Heard) -> None:
    wire, monitor, _ = heard
    wire.says("status", {"execution_state": "busy"}, parent={**CELL, "msg_id": "s_1_4"})
    assert not monitor.unheard()
    wire.says("status", {"execution_state": "idle"}, parent={**CELL, "msg_id": "s_1_4"})
    assert [cell.header["msg_id"] for cell in monitor.unheard()] == ["s_1_5"]


def test_senders_are_bounded(heard: Heard) -> None:
    wire, monitor, _ = heard
    for sender in range(1000):
        wire.says("status", {"execution_state": "idle"}, parent={"msg_id": f"{sender}_1_1", "session": str(sender)})
    assert len(monitor.unheard()) <= 64
