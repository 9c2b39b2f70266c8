"""JupyterLab's debugger in a sandbox: debugpy is in the image, and works without network and on a read-only root."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient

from tests.conformance.conftest import Place
from tests.conformance.test_provisioner import kernel

pytestmark = pytest.mark.conformance

CODE = "def double(number):\n    result = number * 2\n    return result\ndouble(21)"


async def test_a_breakpoint_and_what_stands_there(place: Place) -> None:
    numbers = itertools.count(1)

    async def ask(client: AsyncKernelClient, command: str, **arguments: Any) -> dict[str, Any]:
        content = {"type": "request", "seq": next(numbers), "command": command, "arguments": arguments}
        request = client.session.msg("debug_request", content)
        client.control_channel.send(request)
        reply = await client.get_control_msg(timeout=30)
        assert reply["parent_header"]["msg_id"] == request["header"]["msg_id"]
        assert reply["content"]["success"], reply["content"]
        return dict(reply["content"].get("body") or {})

    async with kernel(place) as (_, client):
        await ask(client, "initialize", clientID="test", adapterID="", linesStartAt1=True, columnsStartAt1=True)
        await ask(client, "attach")
        path = (await ask(client, "dumpCell", code=CODE))["sourcePath"]
        await ask(client, "setBreakpoints", source={"path": path}, breakpoints=[{"line": 3}])
        await ask(client, "configurationDone")
        client.execute(CODE)
        event: dict[str, Any] = {}
        while event.get("event") != "stopped":
            event = (await client.get_iopub_msg(timeout=30))["content"]
        thread = event["body"]["threadId"]
        frame = (await ask(client, "stackTrace", threadId=thread))["stackFrames"][0]
        assert (frame["name"], frame["line"]) == ("double", 3)
        value = await ask(client, "evaluate", expression="result", frameId=frame["id"])
        assert value["result"] == "42"
        await ask(client, "continue", threadId=thread)
        assert (await client.get_shell_msg(timeout=30))["content"]["status"] == "ok"
        await ask(client, "disconnect", restart=False)
