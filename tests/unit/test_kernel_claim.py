"""The claim: what a kernel takes over, what it refuses, and that nothing of its warm-up shows."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any, cast

import pytest
from samovar_kernel.claim import Claim, ClaimRefused

from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import Launched
from kernelprovisioner.launchers.configurable import ipc_endpoints
from kernelprovisioner.sandbox import ClaimError, ClaimRequest, Sandbox, SandboxState
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.sandboxes import Sandboxes
from kernelprovisioner.supervisor import SupervisorClient
from kernelprovisioner.wire import KernelWire
from tests.unit.local_sandbox import KEY, TOKEN, LocalSandbox

IMAGE = KernelImage("python", "python", "Python", Path("/nowhere"), "base")


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({}, "key"),
        ({"key": 5}, "key"),
        ({"key": ""}, "key"),
        ({"key": "\ud800"}, "key"),
        ({"key": "k", "env": ["a"]}, "env"),
        ({"key": "k", "env": {"a": 1}}, "env"),
        ({"key": "k", "env": {"a=b": "c"}}, "env"),
        ({"key": "k", "env": {"a": "b\0"}}, "env"),
        ({"key": "k", "env": {"a": "\ud800"}}, "env"),
        ({"key": "k", "notice": 1}, "notice"),
        ({"key": "k", "hold_ms": -1}, "hold_ms"),
        ({"key": "k", "hold_ms": "soon"}, "hold_ms"),
    ],
)
def test_a_bad_claim_names_its_field(content: dict[str, Any], field: str) -> None:
    with pytest.raises(ClaimRefused, match=f"^{field}"):
        Claim.from_content(content)


def test_a_claim_makes_a_kernel_personal(short_directory: Path) -> None:
    with LocalSandbox(short_directory, preload=["fractions"]) as sandbox:
        sandbox.open()
        sandbox.run("None", silent=True, store_history=False)
        env = {"GREETING": "hi"}
        reply = sandbox.claim(env=env, session_name="a.ipynb", notice="a notice", hold_ms=200)
        assert reply == {"status": "ok"}
        asked = time.monotonic()
        first = sandbox.run("import os, sys; print(In, Out, _, [n for n in dir() if not n.startswith('_')])")
        assert time.monotonic() - asked >= 0.2
        assert first.text("stderr") == "a notice\n"
        assert first.reply["execution_count"] == 1
        inputs = "['', \"import os, sys; print(In, Out, _, [n for n in dir() if not n.startswith('_')])\"]"
        names = "['In', 'Out', 'exit', 'get_ipython', 'open', 'os', 'quit', 'sys']"
        assert first.text() == f"{inputs} {{}}  {names}\n"

        second = sandbox.run("print(os.environ['GREETING'], __session__, 'fractions' in sys.modules)")
        assert second.text() == "hi a.ipynb True\n"
        assert second.text("stderr") == ""
        assert (
            sandbox.run("print([n for n in os.environ if 'SAMOVAR' in n], oct(os.umask(0o22)))").text() == "[] 0o22\n"
        )


@pytest.mark.parametrize("claimed", [False, True], ids=["warm", "claimed"])
def test_a_refusal_is_signed_with_the_key_asked_for_and_the_kernel_keeps_its_own(
    short_directory: Path, claimed: bool
) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        sandbox.run("None")
        if claimed:
            assert sandbox.claim(b"personal") == {"status": "ok"}
        present = sandbox.session.key
        refused = sandbox.claim(b"another", env={} if claimed else {"a=b": "c"})
        assert refused["status"] == "error"
        assert ("claimed before" if claimed else "env") in refused["evalue"]
        sandbox.session.key = present
        assert sandbox.run("print(1)").text() == "1\n"
        if not claimed:
            assert sandbox.claim(b"another") == {"status": "ok"}


def test_a_refusal_of_the_key_itself_is_signed_with_the_present_one(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        assert "key" in sandbox.ask("control", "samovar_claim_request", {"key": ""})["evalue"]


async def test_who_claims_hears_why_it_was_refused(short_directory: Path) -> None:
    channels, supervisor = ipc_endpoints(short_directory / "r")
    launched = Launched("0" * 16, IMAGE, "process:1", short_directory, "/", KEY, TOKEN, supervisor, channels)
    with LocalSandbox(short_directory):
        wire = await KernelWire.connect(channels, KEY, timeout=15)
        sandbox = Sandbox(launched, cast(SupervisorClient, None), wire, cast(Sandboxes, None))
        sandbox.state = SandboxState.WARM
        try:
            with pytest.raises(ClaimError, match=r"refused its claim: env: 'a=b' cannot be"):
                await sandbox.claim(ClaimRequest("id", b"new", {"a=b": "c"}))
        finally:
            await wire.close()


async def test_who_claims_a_dying_sandbox_hears_of_what_it_died(short_directory: Path) -> None:
    channels, supervisor = ipc_endpoints(short_directory / "r")
    launched = Launched("0" * 16, IMAGE, "process:1", short_directory, "/", KEY, TOKEN, supervisor, channels)
    cause = SandboxExit(ExitCause.REMOVED)
    with LocalSandbox(short_directory) as local:
        wire = await KernelWire.connect(channels, KEY, timeout=15)
        sandbox = Sandbox(launched, cast(SupervisorClient, None), wire, cast(Sandboxes, None))
        sandbox.state = SandboxState.WARM
        try:
            os.kill(local.hello["pid"], signal.SIGSTOP)
            claim = asyncio.ensure_future(sandbox.claim(ClaimRequest("id", b"new", {})))
            await asyncio.sleep(0.1)
            local.process.kill()
            with pytest.raises(ClaimError) as error:
                await claim
            # The cause is known a little later than the death.
            asyncio.get_running_loop().call_later(0.1, sandbox.exited.set_result, cause)
            assert await sandbox.with_cause(error.value) == f"{error.value}: {cause}"
        finally:
            await wire.close()


def test_arguments_of_one_cell(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        arguments = {"samovar": {"argv": ["--fast", "a b"]}}
        code = "import sys; print(sys.argv[1:])"
        assert sandbox.run(code, metadata=arguments).text() == "['--fast', 'a b']\n"
        assert sandbox.run(code).text() == "[]\n"


def test_a_notebook_to_libraries_that_ask(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        code = "shell = get_ipython(); print(type(shell).__name__, 'IPKernelApp' in shell.config)"
        assert sandbox.run(code).text() == "ZMQInteractiveShell True\n"


def test_input_after_its_output(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        cell = sandbox.start_cell("print('before'); print(input('name? '))", allow_stdin=True)
        sandbox.receive("iopub", lambda message: message["content"].get("text") == "before\n")
        question = sandbox.receive("stdin", lambda message: message["msg_type"] == "input_request")
        assert question["content"]["prompt"] == "name? "
        sandbox.send("stdin", "input_reply", {"value": "answer"})
        assert sandbox.finish_cell(cell).text() == "answer\n"


def test_subshell_and_debugger_still_work(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        subshell = sandbox.ask("control", "create_subshell_request", {})["subshell_id"]
        long = sandbox.start_cell("import time; time.sleep(1); print('long')")
        message = sandbox.session.msg("execute_request", {"code": "print('short')"})
        message["header"]["subshell_id"] = subshell
        sandbox.session.send(sandbox.sockets["shell"], message)
        done = sandbox.receive("shell", lambda reply: True)
        assert done["parent_header"]["msg_id"] == message["header"]["msg_id"]
        assert sandbox.finish_cell(long).text() == "long\n"
        asked = {"type": "request", "seq": 1, "command": "debugInfo", "arguments": {}}
        assert sandbox.ask("control", "debug_request", asked)["success"]


def test_a_probe_answers_beside_a_running_cell_and_nobody_sees_it(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        assert sandbox.ask("control", "samovar_probe_request", {}) == {
            "status": "ok",
            "running": None,
            "running_count": None,
            "execution_count": 1,
            "ended": [],
        }
        sandbox.run("None", silent=True, store_history=False)
        sandbox.claim()
        cell = sandbox.start_cell("import time; time.sleep(1); print('done')")
        sandbox.receive("iopub", lambda message: message["msg_type"] == "execute_input")
        during = sandbox.ask("control", "samovar_probe_request", {})
        assert (during["running"], during["running_count"], during["status"]) == (cell, 1, "ok")
        probes: list[str] = []

        def is_last(message: dict[str, Any]) -> bool:
            if message["parent_header"].get("msg_type") == "samovar_probe_request":
                probes.append(message["msg_type"])
            ours = message["parent_header"].get("msg_id") == cell
            return bool(ours and message["content"].get("execution_state") == "idle")

        sandbox.receive("iopub", is_last)
        assert probes == []
        after = sandbox.ask("control", "samovar_probe_request", {})
        assert (after["running"], after["execution_count"]) == (None, 2)


def test_a_probe_tells_the_cells_that_ended_when_nobody_listened(short_directory: Path) -> None:
    def ended() -> list[tuple[str, str, str]]:
        cells = sandbox.ask("control", "samovar_probe_request", {})["ended"]
        return [(cell["header"]["msg_id"], cell["status"], cell.get("ename", "")) for cell in cells]

    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        sandbox.run("None", silent=True, store_history=False)
        sandbox.claim()
        sandbox.run("1")
        assert ended() == []
        time.sleep(1.1)  # what ends shortly before the last listener leaves is in doubt
        cells = [sandbox.start_cell(code) for code in ("import time; time.sleep(0.5)", "1 / 0", "print()")]
        sandbox.sockets["iopub"].close()
        deadline = time.monotonic() + 10
        while (found := ended())[-1:] != [(cells[2], "aborted", "")]:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        assert found[:-1] == [(cells[0], "ok", ""), (cells[1], "error", "ZeroDivisionError")]


def test_a_warm_kernel_that_was_probed_has_nothing_to_show_for_it(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        for _ in range(3):
            sandbox.ask("control", "samovar_probe_request", {})
        sandbox.run("None", silent=True, store_history=False)
        sandbox.claim()
        ran = sandbox.run(
            "import sys; print(In[:1], Out, [n for n in dir() if n[0] != '_'], hasattr(sys, 'last_value'))"
        )
        names = "['In', 'Out', 'exit', 'get_ipython', 'open', 'quit', 'sys']"
        assert ran.text() == f"[''] {{}} {names} False\n"
        assert (ran.text("stderr"), ran.reply["execution_count"]) == ("", 1)
