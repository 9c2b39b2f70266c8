"""A process that owns sandboxes as a gateway does, for tests that kill it: `python -m tests.lost_gateway KIND ROOT`.

It starts what the last argument asks for, prints one line of JSON about it, and then waits to be killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelprovisioner.images import find_image
from kernelprovisioner.launchers import DockerLauncher, ProcessLauncher
from kernelprovisioner.launchers.base import LaunchRequest
from kernelprovisioner.launchers.configurable import ConfigurableLauncher
from kernelprovisioner.runtime import RuntimeRoot
from kernelprovisioner.sandbox import ClaimRequest, Sandbox
from kernelprovisioner.sandboxes import Sandboxes

TOKEN = "the-holder's-token"
#: sets a variable, then takes its time
LONG_CELL = "import time; value = 41; time.sleep({seconds}); value += 1"


@dataclass
class LostGateway:
    """The process and what it told: sandbox ids by what they are, and the msg_id of the cell that runs."""

    process: subprocess.Popen[str]
    told: dict[str, Any]

    @classmethod
    def start(cls, kind: str, root: Path, *what: str, cell_seconds: float = 0.0) -> LostGateway:
        """`what`: warm, session, holder, half (launched, and never warm)."""
        arguments = [sys.executable, "-m", "tests.lost_gateway", kind, str(root), str(cell_seconds), *what]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the lost gateway could not start"
        return cls(process, json.loads(line))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """Make sure that it is gone."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def make_launcher(kind: str, root: Path) -> ConfigurableLauncher:
    """Return the launcher that a test and its lost gateway use."""
    runtime = RuntimeRoot.open(root)
    if kind == "process":
        return ProcessLauncher(runtime)
    transport = "tcp" if kind == "docker-tcp" else "ipc"
    return DockerLauncher(runtime, docker_url=os.environ["SAMOVAR_TEST_DOCKER_URL"], transport=transport)


async def run(sandbox: Sandbox, code: str) -> str:
    """Run one cell and return what it printed; raises what it raised, as AssertionError."""
    text: list[str] = []
    done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    idle = asyncio.Event()
    reply: dict[str, Any] = {}

    def take(message: Any) -> None:
        if message.msg_type == "stream":
            text.append(message.content["text"])
        elif message.msg_type == "execute_reply":
            reply.update(message.content)
        elif message.msg_type == "status" and message.content["execution_state"] == "idle":
            idle.set()
        if reply and idle.is_set() and not done.done():
            done.set_result(reply)

    msg_id = send(sandbox, code, take)
    async with asyncio.timeout(30):
        await done
    sandbox.wire.unlisten(msg_id)
    assert reply["status"] == "ok", reply
    return "".join(text)


def send(sandbox: Sandbox, code: str, listener: Any = None) -> str:
    """Send a cell and return its msg_id."""
    msg_id = sandbox.wire.new_id()
    if listener is not None:
        sandbox.wire.listen(msg_id, listener)
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    return sandbox.wire.send("shell", "execute_request", content, msg_id=msg_id)


async def _session(sandboxes: Sandboxes, seconds: float) -> dict[str, str]:
    sandbox = await _launch(sandboxes)
    holder = {"kind": "session", "session_id": "s"}
    await sandbox.claim(ClaimRequest("kernel-s", b"key-s", owner="main", holder=holder))
    assert await run(sandbox, "print('mine')") == "mine\n"
    started = asyncio.Event()
    cell = send(sandbox, LONG_CELL.format(seconds=seconds), lambda message: started.set())
    await started.wait()
    return {"session": sandbox.id, "cell": cell}


async def _holder(sandboxes: Sandboxes) -> dict[str, str]:
    sandbox = await _launch(sandboxes)
    holder = {"kind": "provisioner", "token": TOKEN}
    await sandbox.claim(ClaimRequest("kernel-h", b"key-h", owner="uid:1", holder=holder))
    await sandbox.hand_over()
    return {"holder": sandbox.id}


async def _launch(sandboxes: Sandboxes) -> Sandbox:
    return await sandboxes.launch(LaunchRequest(secrets.token_hex(8), find_image("python")), timeout=120)


async def _main(kind: str, root: Path, seconds: float, what: list[str]) -> None:
    sandboxes = Sandboxes(make_launcher(kind, root))
    await sandboxes.start(resume=True)
    told: dict[str, str] = {"owner": str(sandboxes.launcher.owner.path)}
    if "warm" in what:
        told["warm"] = (await _launch(sandboxes)).id
    if "half" in what:
        told["half"] = secrets.token_hex(8)
        await sandboxes.launcher.launch(LaunchRequest(told["half"], find_image("python")))
    if "holder" in what:
        told |= await _holder(sandboxes)
    if "session" in what:
        told |= await _session(sandboxes, seconds)
    # A claim's record is written behind it.
    await sandboxes.records.flush()
    print(json.dumps(told), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
