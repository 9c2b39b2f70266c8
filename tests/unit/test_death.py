"""A dead kernel's endpoints: whoever asked, and whoever asks later, is answered once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from jupyter_client.session import Session

from kernelprovisioner.death import DeathNotice
from kernelprovisioner.monitor import RunningCell
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit

KEY = b"key"


async def test_a_request_that_was_told_of_the_death_is_not_answered_again(short_directory: Path) -> None:
    session = Session(key=KEY, username="me", check_pid=False)
    lost = session.msg("execute_request", {"code": "1"})
    exit_ = SandboxExit(ExitCause.REMOVED)
    notice = DeathNotice(short_directory, KEY, exit_)
    context = zmq.asyncio.Context()
    try:
        shell, iopub = context.socket(zmq.DEALER), context.socket(zmq.SUB)
        shell.identity = session.bsession
        iopub.subscribe(b"")
        shell.connect(f"ipc://{short_directory}/k-1")
        iopub.connect(f"ipc://{short_directory}/k-2")
        async with asyncio.timeout(10):
            await notice.tell([], unheard=[RunningCell(lost["header"])])
            # It had been on its way all the same; and then another one.
            session.send(shell, lost)
            later = session.send(shell, "execute_request", {"code": "2"})
            replies: list[Any] = []
            while not replies or replies[-1]["parent_header"]["msg_id"] != later["header"]["msg_id"]:
                _, frames = session.feed_identities(await shell.recv_multipart())
                replies.append(session.deserialize(frames))
        assert [reply["parent_header"]["msg_id"] for reply in replies] == [
            lost["header"]["msg_id"],
            later["header"]["msg_id"],
        ]
        assert {reply["content"]["evalue"] for reply in replies} == {str(exit_)}
    finally:
        await notice.close()
        context.destroy(linger=0)
