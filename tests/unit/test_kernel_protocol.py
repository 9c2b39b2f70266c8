"""The rest of the protocol with a real kernel: debugger, subshells, stdin, comms with buffers, history, usage."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.local_sandbox import LocalSandbox, Ran


@pytest.fixture
def sandbox(short_directory: Path) -> Iterator[LocalSandbox]:
    with LocalSandbox(short_directory) as made:
        made.open()
        yield made


# --- debugger ---------------------------------------------------------------------------------------------------------

CODE = """\
def double(number):
    result = number * 2
    print("inside")
    return result
print(double(21))"""


class Debugger:
    """What JupyterLab's debugger does: requests on the control channel, events on iopub."""

    def __init__(self, sandbox: LocalSandbox) -> None:
        self._sandbox = sandbox
        self._numbers = itertools.count(1)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        request = {"type": "request", "seq": next(self._numbers), "command": command, "arguments": arguments}
        reply = self._sandbox.ask("control", "debug_request", request)
        assert reply["success"], reply
        return dict(reply.get("body") or {})

    def stopped(self) -> dict[str, Any]:
        """Wait until a breakpoint or step has stopped the cell; return the event's body."""
        message = self._sandbox.receive(
            "iopub", lambda each: each["msg_type"] == "debug_event" and each["content"]["event"] == "stopped"
        )
        return dict(message["content"]["body"])


@pytest.mark.limit(60)
def test_a_breakpoint_stops_a_cell_and_lets_it_go_on(sandbox: LocalSandbox) -> None:
    assert "debugger" in sandbox.ask("shell", "kernel_info_request", {})["supported_features"]
    debugger = Debugger(sandbox)
    assert debugger.ask("debugInfo")["isStarted"] is False
    debugger.ask("initialize", clientID="test", adapterID="", linesStartAt1=True, columnsStartAt1=True)
    debugger.ask("attach")
    path = debugger.ask("dumpCell", code=CODE)["sourcePath"]
    [point] = debugger.ask("setBreakpoints", source={"path": path}, breakpoints=[{"line": 3}])["breakpoints"]
    assert point["verified"]
    debugger.ask("configurationDone")

    cell = sandbox.start_cell(CODE)
    stop = debugger.stopped()
    assert stop["reason"] == "breakpoint"
    frame = debugger.ask("stackTrace", threadId=stop["threadId"])["stackFrames"][0]
    assert (frame["name"], frame["line"]) == ("double", 3)
    scope = debugger.ask("scopes", frameId=frame["id"])["scopes"][0]["variablesReference"]
    values = {each["name"]: each["value"] for each in debugger.ask("variables", variablesReference=scope)["variables"]}
    assert values == {"number": "21", "result": "42"}
    assert debugger.ask("evaluate", expression="result + 1", frameId=frame["id"])["result"] == "43"
    assert sandbox.ask("control", "samovar_probe_request", {})["running"] == cell
    debugger.ask("continue", threadId=stop["threadId"])
    assert sandbox.finish_cell(cell).text() == "inside\n42\n"

    cell = sandbox.start_cell(CODE)
    debugger.stopped()
    sandbox.request("signal", signum=2)
    assert sandbox.finish_cell(cell).reply["status"] == "error", "an interrupt ends a cell that stands at a breakpoint"
    debugger.ask("disconnect", restart=False)
    assert debugger.ask("debugInfo")["isStarted"] is False
    assert sandbox.run(CODE).text() == "inside\n42\n"


def test_a_debugger_that_waits_for_a_cell_keeps_nobody_waiting(sandbox: LocalSandbox) -> None:
    cell = sandbox.start_cell("import time\nfor _ in range(1000): time.sleep(0.01)")
    sandbox.receive("iopub", lambda message: message["msg_type"] == "execute_input")
    request = {"type": "request", "seq": 1, "command": "initialize", "arguments": {"adapterID": ""}}
    initialize = sandbox.send("control", "debug_request", request)
    assert sandbox.ask("control", "usage_request", {})["pid"]
    assert sandbox.ask("control", "interrupt_request", {})["status"] == "ok"
    assert sandbox.finish_cell(cell).reply["ename"] == "KeyboardInterrupt"
    reply = sandbox.receive("control", lambda message: message["parent_header"]["msg_id"] == initialize)
    assert reply["content"]["success"]


# --- subshells --------------------------------------------------------------------------------------------------------


def send_to(sandbox: LocalSandbox, subshell: str, msg_type: str, content: dict[str, Any]) -> str:
    """Send a request to a subshell and return its id."""
    message = sandbox.session.msg(msg_type, content)
    message["header"]["subshell_id"] = subshell
    sandbox.session.send(sandbox.sockets["shell"], message)
    return str(message["header"]["msg_id"])


def ask_in(sandbox: LocalSandbox, subshell: str, msg_type: str, content: dict[str, Any]) -> Ran:
    """Send a request to a subshell; return what came of it."""
    return sandbox.finish_cell(send_to(sandbox, subshell, msg_type, content))


def test_subshells_run_beside_a_busy_main_shell(sandbox: LocalSandbox) -> None:
    first, second = (sandbox.ask("control", "create_subshell_request", {})["subshell_id"] for _ in range(2))
    assert sandbox.ask("control", "list_subshell_request", {})["subshell_id"] == [first, second]
    cell = sandbox.start_cell("import time\nwhile not globals().get('done'): time.sleep(0.01)\nprint('main')")
    flood = ask_in(sandbox, first, "execute_request", {"code": "for n in range(20000): print(n)"})
    assert flood.text() == "".join(f"{number}\n" for number in range(20000))
    assert ask_in(sandbox, first, "execute_request", {"code": "1 / 0"}).reply["ename"] == "ZeroDivisionError"
    assert ask_in(sandbox, second, "complete_request", {"code": "time.sl", "cursor_pos": 7}).reply["matches"] == [
        "sleep"
    ]
    assert sandbox.ask("control", "delete_subshell_request", {"subshell_id": first})["status"] == "ok"
    refused = ask_in(sandbox, first, "execute_request", {"code": "1"}).reply
    assert (refused["status"], refused["ename"]) == ("error", "UnknownSubshellError")
    send_to(sandbox, second, "execute_request", {"code": "done = True"})
    assert sandbox.finish_cell(cell).text() == "main\n"


# --- stdin ------------------------------------------------------------------------------------------------------------


def question(sandbox: LocalSandbox) -> dict[str, Any]:
    return dict(sandbox.receive("stdin", lambda message: message["msg_type"] == "input_request")["content"])


def test_input_and_getpass(sandbox: LocalSandbox) -> None:
    code = "import getpass\nprint(input('name? '), getpass.getpass('secret? '), input())"
    cell = sandbox.start_cell(code, allow_stdin=True)
    for asked, answer in (("name? ", "ä"), ("secret? ", "s3cret"), ("", "")):
        assert question(sandbox) == {"prompt": asked, "password": asked == "secret? "}
        sandbox.send("stdin", "input_reply", {"value": answer})
    assert sandbox.finish_cell(cell).text() == "ä s3cret \n"


def test_an_answer_that_came_before_its_question_is_none(sandbox: LocalSandbox) -> None:
    sandbox.send("stdin", "input_reply", {"value": "stale"})
    cell = sandbox.start_cell("import time; time.sleep(0.3); print(input('?'))", allow_stdin=True)
    question(sandbox)
    sandbox.send("stdin", "input_reply", {"value": "fresh"})
    assert sandbox.finish_cell(cell).text() == "fresh\n"


def test_a_question_is_interrupted(sandbox: LocalSandbox) -> None:
    cell = sandbox.start_cell("input('?')", allow_stdin=True)
    question(sandbox)
    sandbox.request("signal", signum=2)
    assert sandbox.finish_cell(cell).reply["ename"] == "KeyboardInterrupt"
    assert sandbox.run("print('alive')").text() == "alive\n"


def test_who_cannot_be_asked_is_not(sandbox: LocalSandbox) -> None:
    for code in ("input()", "import getpass; getpass.getpass()"):
        assert sandbox.run(code, allow_stdin=False).reply["ename"] == "StdinNotImplementedError"


# --- comms ------------------------------------------------------------------------------------------------------------

ECHO = """
from comm import get_comm_manager
def opened(comm, message):
    @comm.on_msg
    def heard(message):
        sizes = [len(buffer) for buffer in message["buffers"]]
        print("heard", message["content"]["data"], sizes)
        comm.send({"back": sizes}, buffers=message["buffers"])
    comm.send({"opened": message["content"]["data"]}, buffers=[b"a", memoryview(bytearray(b"bc"))])
get_comm_manager().register_target("echo", opened)
"""


def comm(sandbox: LocalSandbox, msg_type: str, content: dict[str, Any], buffers: list[bytes]) -> list[dict[str, Any]]:
    """Send a comm message; return what was published for it."""
    sent = sandbox.session.send(sandbox.sockets["shell"], msg_type, {"comm_id": "c", **content}, buffers=buffers)
    found: list[dict[str, Any]] = []

    def last(message: dict[str, Any]) -> bool:
        if message["parent_header"].get("msg_id") == sent["header"]["msg_id"]:
            found.append(message)
            return bool(message["content"].get("execution_state") == "idle")
        return False

    sandbox.receive("iopub", last)
    return [message for message in found if message["msg_type"] != "status"]


def test_comms_carry_buffers_both_ways(sandbox: LocalSandbox) -> None:
    sandbox.session.copy_threshold = 1 << 30  # else pyzmq starts a thread that stays
    sandbox.run(ECHO)
    [opened] = comm(sandbox, "comm_open", {"target_name": "echo", "data": {"n": 1}}, [])
    assert opened["content"] == {"comm_id": "c", "data": {"opened": {"n": 1}}}
    assert [bytes(buffer) for buffer in opened["buffers"]] == [b"a", b"bc"]
    assert sandbox.ask("shell", "comm_info_request", {})["comms"] == {"c": {"target_name": "echo"}}
    pieces = [b"", b"\x00\xff" * 1000, bytes(range(256)) * 40_000]
    printed, back = comm(sandbox, "comm_msg", {"data": {"n": 2}}, pieces)
    assert printed["content"]["text"] == "heard {'n': 2} [0, 2000, 10240000]\n"
    assert [bytes(buffer) for buffer in back["buffers"]] == pieces
    assert comm(sandbox, "comm_close", {"data": {}}, []) == []
    assert sandbox.ask("shell", "comm_info_request", {})["comms"] == {}


def test_a_message_to_no_comm_is_not_shown_in_the_running_cell(sandbox: LocalSandbox) -> None:
    cell = sandbox.start_cell("import asyncio; await asyncio.sleep(0.3); print('done')")
    sandbox.receive("iopub", lambda message: message["msg_type"] == "execute_input")
    for msg_type in ("comm_open", "comm_msg", "comm_close"):
        sandbox.send("shell", msg_type, {"comm_id": "gone", "target_name": "nobody", "data": {}})
    ran = sandbox.finish_cell(cell)
    assert (ran.text(), ran.text("stderr")) == ("done\n", "")
    sandbox.run("get_ipython().kernel.comm_manager.register_target('bad', lambda comm, message: 1 / 0)")
    shown = comm(sandbox, "comm_open", {"target_name": "bad", "data": {}}, [])
    assert "ZeroDivisionError" in "".join(message["content"].get("text", "") for message in shown)


def test_a_buffer_is_sent_as_it_was_whatever_becomes_of_it(sandbox: LocalSandbox) -> None:
    code = """
from comm import create_comm
data = bytearray(b"before" * 1000)
comm = create_comm(target_name="t", comm_id="c")
comm.send({}, buffers=[data])
data[:6] = b"after!"
data.extend(b"more")"""
    ran = sandbox.run(code)
    assert ran.reply["status"] == "ok"
    [message] = [each for each in ran.messages if each["msg_type"] == "comm_msg"]
    assert bytes(message["buffers"][0]) == b"before" * 1000


# --- history and usage ------------------------------------------------------------------------------------------------


def test_history_without_a_database(sandbox: LocalSandbox) -> None:
    for code in ("value = 1", "value + 1", "%time value", "value + 1"):
        sandbox.run(code)

    def lines(**content: Any) -> list[Any]:
        asked = {"output": False, "raw": True, **content}
        return [line[1:] for line in sandbox.ask("shell", "history_request", asked)["history"]]

    assert lines(hist_access_type="tail", n=2) == [[3, "%time value"], [4, "value + 1"]]
    assert lines(hist_access_type="tail", n=1, output=True) == [[4, ["value + 1", "2"]]]
    assert lines(hist_access_type="tail", n=0) == []
    assert len(lines(hist_access_type="tail")) == 4
    assert lines(hist_access_type="range", session=0, start=1, stop=2) == [[1, "value = 1"]]
    assert lines(hist_access_type="search", pattern="value +*") == [[2, "value + 1"], [4, "value + 1"]]
    assert lines(hist_access_type="search", pattern="value*", unique=True) == [[1, "value = 1"], [4, "value + 1"]]
    assert lines(hist_access_type="search", pattern="*value*", n=2) == [[3, "%time value"], [4, "value + 1"]]
    assert "run_line_magic" in lines(hist_access_type="tail", n=2, raw=False)[0][1]
    assert "value = 1" in sandbox.run("%history -g value").text()
    assert "4: value + 1" in sandbox.run("%history -n").text()


def test_usage_is_told_while_a_cell_runs(sandbox: LocalSandbox) -> None:
    cell = sandbox.start_cell("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(1)")
    pid = sandbox.receive("iopub", lambda message: message["msg_type"] == "stream")["content"]["text"]
    asked = time.monotonic()
    usage = sandbox.ask("control", "usage_request", {})
    assert time.monotonic() - asked < 1, "the cell was waited for"
    assert usage["pid"] == int(pid)
    assert usage["kernel_memory"] > 2**20
    sandbox.finish_cell(cell)
