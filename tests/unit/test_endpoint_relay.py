"""Kernels behind TCP ports are reached through ipc endpoints, and a dead kernel's endpoints say why it died."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from jupyter_client.session import Session

from kernelprovisioner.death import DeathNotice
from kernelprovisioner.launchers.base import Endpoint
from kernelprovisioner.launchers.configurable import CHANNELS
from kernelprovisioner.monitor import RunningCell
from kernelprovisioner.relay import EndpointRelay
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit

DIED = SandboxExit(ExitCause.EXITED, 7)


async def test_zmq_passes_through_a_relay(short_directory: Path) -> None:
    context = zmq.asyncio.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    relay = EndpointRelay()
    try:
        endpoint = Endpoint(host="127.0.0.1", port=router.bind_to_random_port("tcp://127.0.0.1"))
        await relay.start(short_directory, dict.fromkeys(CHANNELS, endpoint))
        dealer.connect(f"ipc://{short_directory}/k-1")
        await dealer.send_multipart([b"x" * 1_000_000, b"y"])
        async with asyncio.timeout(5):
            identity, *frames = await router.recv_multipart()
            assert frames == [b"x" * 1_000_000, b"y"]
            await router.send_multipart([identity, b"answer"])
            assert await dealer.recv_multipart() == [b"answer"]
    finally:
        await relay.close()
        context.destroy(linger=0)


class Client:
    """A client's shell and iopub sockets, as jupyter_client connects them."""

    def __init__(self, directory: Path) -> None:
        self.session = Session(key=b"key")
        self.context = zmq.asyncio.Context()
        self.shell, self.iopub = self.context.socket(zmq.DEALER), self.context.socket(zmq.SUB)
        self.shell.setsockopt(zmq.IDENTITY, self.session.bsession)
        self.iopub.setsockopt(zmq.SUBSCRIBE, b"")
        self.shell.connect(f"ipc://{directory}/k-1")
        self.iopub.connect(f"ipc://{directory}/k-2")

    async def heard(self, socket: zmq.asyncio.Socket) -> tuple[str, dict[str, Any], str]:
        async with asyncio.timeout(5):
            _, frames = self.session.feed_identities(await socket.recv_multipart())
        message = self.session.deserialize(frames)
        return message["msg_type"], message["content"], message["parent_header"].get("msg_id", "")


async def test_a_death_is_told_to_the_cell_that_ran_and_to_who_asks_later(short_directory: Path) -> None:
    client = Client(short_directory)
    notice = DeathNotice(short_directory, b"key", DIED)
    try:
        header = {"msg_id": "cell", "session": client.session.session, "msg_type": "execute_request"}
        unsent = [{"kind": "text", "name": "stdout", "text": "last words\n", "parent": header}]
        await notice.tell([RunningCell(header, 3)], unsent)
        text = "The kernel process ended with exit code 7."
        assert await client.heard(client.iopub) == ("stream", {"name": "stdout", "text": "last words\n"}, "cell")
        assert await client.heard(client.iopub) == ("stream", {"name": "stderr", "text": text + "\n"}, "cell")
        msg_type, content, parent = await client.heard(client.iopub)
        assert (msg_type, content["evalue"], parent) == ("error", text, "cell")
        assert await client.heard(client.iopub) == ("status", {"execution_state": "idle"}, "cell")
        msg_type, content, parent = await client.heard(client.shell)
        assert (msg_type, content["evalue"], content["execution_count"], parent) == ("execute_reply", text, 3, "cell")

        later = client.session.msg("kernel_info_request")
        for frames in ([b"no", b"message"], client.session.serialize(later)):
            await client.shell.send_multipart(frames)
        msg_type, content, parent = await client.heard(client.shell)
        assert (msg_type, content["status"], parent) == ("kernel_info_reply", "error", later["header"]["msg_id"])
    finally:
        await notice.close()
        client.context.destroy(linger=0)


async def test_a_death_that_nobody_hears_ends_in_time(short_directory: Path) -> None:
    notice = DeathNotice(short_directory, b"key", DIED)
    header = {"msg_id": "cell", "session": "nobody", "msg_type": "execute_request"}
    try:
        async with asyncio.timeout(1.5):
            await notice.tell([RunningCell(header)], [])
    finally:
        await notice.close()
