"""What the clients of KernelChannels hear when their kernel dies, restarts, or outlives its gateway."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from kernelprovisioner.message import Message
from kernelprovisioner.sandbox import EndedCell
from tests.unit.held_channels import attach, connect, cut, send, settle, the_channels


async def test_restarting_is_said_once_to_each_client() -> None:
    async with the_channels() as channels:
        attach(channels)
        reads, cuts, away = connect(channels, "reads"), connect(channels, "cuts"), connect(channels, "away")
        await settle()
        cut(away)
        for client in (reads, cuts):
            client.answers = False
        channels.tell_death("Killed.", "SandboxDied", traceback=[])
        channels.publish("iopub", "stream", {"name": "stderr", "text": "cause"})
        channels.publish("iopub", "status", {"execution_state": "restarting"})
        await settle()
        assert reads.told == cuts.told == ["stream cause", "status restarting"]
        reads.gone = True
        assert reads.client is not None
        reads.client.closed(in_order=True)
        cut(cuts)
        attach(channels, "kernel-2")
        channels.publish("iopub", "status", {"execution_state": "starting"})
        again = [connect(channels, name) for name in ("reads", "cuts", "away")]
        await settle()
        assert [client.told for client in again] == [
            ["status starting"],
            ["stream cause", "status starting"],
            ["stream cause", "status restarting", "status starting"],
        ]


async def test_a_death_is_told_where_it_happened_and_what_waited_is_answered() -> None:
    async with the_channels() as channels:
        states: list[str] = []
        channels.on_status = states.append
        wire = attach(channels)
        one, two = connect(channels, "one"), connect(channels, "two")
        cell = await send(channels, one, code="1")
        wire.says("status", {"execution_state": "busy"}, cell)
        wire.says("execute_input", {"code": "1", "execution_count": 7}, cell)
        waits = await send(channels, two, code="2")
        asks = await send(channels, two, "complete_request")
        channels.tell_death("It ran out of memory.", "SandboxDied", traceback=["SandboxDied: memory"])
        channels.detach()
        wire.says("stream", {"name": "stdout", "text": "a ghost"}, cell)
        await settle()
        assert states == ["busy", "idle"]
        assert one.told == [
            "status busy",
            "execute_input",
            "stream It ran out of memory.",
            "error",
            "execute_reply error",
            "status idle",
            "status idle",
            "status idle",
        ]
        reply = next(content for channel, _, _, content in one.messages if channel == "shell")
        assert reply["execution_count"] == 7 and reply["ename"] == "SandboxDied"
        replies = {
            parent["msg_id"]: content["status"] for channel, _, parent, content in two.messages if channel == "shell"
        }
        assert replies == {waits["msg_id"]: "aborted", asks["msg_id"]: "aborted"}
        assert {header["session"] for _, header, _, _ in one.messages} == {"kernel-1"}
        assert not channels.busy


@pytest.mark.parametrize("end", ["death", "restart"])
async def test_a_cell_that_has_asked_its_user_something_is_answered_all_the_same(end: str) -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        page = connect(channels)
        cell = await send(channels, page, code="input(); input()")
        tag = wire.tag
        # The two channels are not in order: the first question may come before the status.
        wire.says("input_request", {"prompt": ""}, cell, channel="stdin", tag=tag)
        wire.says("status", {"execution_state": "busy"}, cell)
        wire.says("input_request", {"prompt": ""}, cell, channel="stdin", tag=tag)
        if end == "death":
            channels.tell_death("It ran out of memory.", "SandboxDied", traceback=[])
        else:
            channels.tell_restart()
        await settle()
        assert [told for told in page.told if told.startswith("execute_reply")] == [
            "execute_reply error" if end == "death" else "execute_reply aborted"
        ]
        if end == "death":
            assert "stream It ran out of memory." in page.told and "error" in page.told


async def test_the_output_that_a_dead_kernel_had_not_sent_comes_before_the_cause() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        client = connect(channels)
        cell = await send(channels, client, code="1")
        wire.says("status", {"execution_state": "busy"}, cell)
        heard = {"msg_id": "heard", "msg_type": "stream", "session": "kernel-1"}
        parts = [json.dumps(part).encode() for part in (heard, cell, {}, {"name": "stdout", "text": "sent "})]
        assert wire.on_any is not None
        wire.on_any(Message("iopub", parts, heard, cell))
        unsent = (
            {"kind": "text", "name": "stdout", "text": "sent ", "parent": cell},
            {"kind": "mark", "msg_id": "heard"},
            {"kind": "text", "name": "stdout", "text": "unsent", "parent": cell},
        )
        channels.tell_death("Killed.", "SandboxDied", traceback=[], unsent=unsent)
        await settle()
        assert client.told[1:4] == ["stream sent", "stream unsent", "stream Killed."]


async def test_what_a_sandbox_makes_up_of_its_output_does_not_hide_its_death() -> None:
    async with the_channels() as channels:
        attach(channels, adopted=True)
        page = connect(channels)
        no_json = {"msg_id": "cell", "msg_type": "execute_request", "session": "\ud800", "x": float("inf")}
        unsent = {"kind": "text", "name": "stdout", "text": "last words", "parent": no_json}
        channels.tell_death("It ran out of memory.", "SandboxDied", traceback=[], unsent=[unsent])
        await settle()
        assert page.told[:2] == ["stream last words", "stream It ran out of memory."]


async def test_a_cell_that_kills_its_kernel_before_that_could_say_busy_is_no_waiting_one() -> None:
    async with the_channels() as channels:
        attach(channels)
        page = connect(channels)
        cell = await send(channels, page, code="os._exit(7)")
        waiting = await send(channels, page, code="2")
        begun = {"kind": "text", "name": "stdout", "text": "", "parent": cell}
        channels.tell_death("It ended.", "SandboxDied", traceback=[], unsent=[begun])
        await settle()
        replies = {
            parent["msg_id"]: content["status"] for channel, _, parent, content in page.messages if channel == "shell"
        }
        assert replies == {cell["msg_id"]: "error", waiting["msg_id"]: "aborted"}


async def test_nothing_older_comes_again_after_a_death_but_its_cause_does() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        client = connect(channels, answers=False)
        cell = await send(channels, client, code="1")
        wire.says("status", {"execution_state": "busy"}, cell)
        wire.prints("old", cell)
        await settle()
        cut(client)
        channels.tell_death("Killed.", "SandboxDied", traceback=[])
        attach(channels, "kernel-2")
        channels.publish("iopub", "status", {"execution_state": "starting"})
        again = connect(channels)
        counts = connect(channels, "counts", "0")
        await settle()
        expected = ["stream Killed.", "error", "execute_reply error", "status idle", "status starting"]
        assert again.told == expected
        assert counts.told == [told for told in expected if told != "execute_reply error"]
        assert [header["session"] for _, header, _, _ in again.messages][-2:] == ["kernel-1", "kernel-2"]


async def test_a_restart_skips_what_a_slow_client_has_not_read() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        slow = connect(channels)
        cell = await send(channels, slow, code="1")
        await settle()
        slow.stalled = True
        wire.says("status", {"execution_state": "busy"}, cell)
        await settle()
        for _ in range(5):
            wire.prints("old", cell)
        channels.tell_restart()
        channels.detach()
        attach(channels, "kernel-2")
        channels.publish("iopub", "status", {"execution_state": "starting"})
        cut(slow)
        again = connect(channels)
        await settle()
        assert again.told == ["execute_reply aborted", "status idle", "status starting"]


async def test_the_client_of_an_adopted_cell_gets_a_reply_that_is_made_up() -> None:
    async with the_channels() as channels:
        wire = attach(channels, adopted=True)
        page = {"msg_id": "cell", "msg_type": "execute_request", "session": "page"}
        queued = {"msg_id": "next", "msg_type": "execute_request", "session": "page"}
        channels.follow("cell", 7)
        assert channels.busy
        wire.prints("more", page)
        wire.says("error", {"ename": "E", "evalue": "", "traceback": []}, page)
        wire.says("status", {"execution_state": "idle"}, page)
        for state in ("busy", "idle"):
            wire.says("status", {"execution_state": state}, queued)
        rest = {"msg_id": "rest", "msg_type": "execute_request", "session": wire.session}
        for state in ("busy", "idle"):
            wire.says("status", {"execution_state": state}, rest)
        client = connect(channels, "page")
        await settle()
        replies = [
            (parent["msg_id"], content["status"], content["execution_count"])
            for channel, _, parent, content in client.messages
            if channel == "shell"
        ]
        assert replies == [("cell", "error", 7), ("next", "ok", None)]
        assert client.told[0] == "stream more"
        assert not channels.busy


@pytest.mark.parametrize("how", ["died", "restarted"])
async def test_the_client_of_an_adopted_cell_hears_of_its_kernels_end(how: str) -> None:
    async with the_channels() as channels:
        wire = attach(channels, adopted=True)
        channels.follow("cell")
        wire.prints("more", {"msg_id": "cell", "msg_type": "execute_request", "session": "page"})
        if how == "died":
            channels.tell_death("It died.", "SandboxDied", traceback=[])
        else:
            channels.tell_restart()
        client = connect(channels, "page")
        await settle()
        (reply,) = [content for channel, _, _, content in client.messages if channel == "shell"]
        assert reply["status"] == ("error" if how == "died" else "aborted")
        assert client.told[-1] == "status idle" and not channels.busy


async def test_a_cell_whose_kernel_died_while_no_gateway_was_there_is_told_so() -> None:
    async with the_channels() as channels:
        attach(channels, adopted=True)
        parent = {"msg_id": "cell", "msg_type": "execute_request", "session": "page"}
        unsent = [
            {"kind": "mark", "msg_id": "x"},
            {"kind": "text", "name": "stdout", "text": "last", "parent": parent},
        ]
        channels.tell_death("It died.", "SandboxDied", traceback=[], unsent=unsent)
        client = connect(channels, "page")
        await settle()
        assert {each["msg_id"] for _, _, each, _ in client.messages} == {"cell"}
        assert [told.split()[0] for told in client.told] == ["stream", "stream", "error", "execute_reply", "status"]


async def test_cells_that_ended_while_no_gateway_was_there_are_answered() -> None:
    def ended(msg_id: str, status: str, session: object = "page", **fields: Any) -> EndedCell:
        header = {"msg_id": msg_id, "msg_type": "execute_request", "session": session}
        return msgspec.convert({"header": header, "status": status, "execution_count": 4, **fields}, EndedCell)

    async with the_channels() as channels:
        wire = attach(channels, adopted=True)
        heard = {"msg_id": "heard", "msg_type": "execute_request", "session": "page"}
        for state in ("busy", "idle"):
            wire.says("status", {"execution_state": state}, heard)
        runs = {"msg_id": "runs", "msg_type": "execute_request", "session": "page"}
        wire.says("status", {"execution_state": "busy"}, runs)
        raised = {"ename": "E", "evalue": "why", "traceback": ["E: why"]}
        channels.make_up(
            [
                ended("good", "ok"),
                ended("bad", "error", **raised),
                ended("skipped", "aborted"),
                *(ended(each, "ok") for each in ("heard", "runs")),
                *(ended("nobody's", "ok", session) for session in (None, "", "x" * 10_000, wire.session)),
            ]
        )
        client = connect(channels, "page")
        await settle()
        replies = {parent["msg_id"]: content for channel, _, parent, content in client.messages if channel == "shell"}
        assert {msg_id: reply["status"] for msg_id, reply in replies.items()} == {
            "heard": "ok",
            "good": "ok",
            "bad": "error",
            "skipped": "aborted",
        }
        assert replies["bad"]["traceback"] == ["E: why"] and replies["good"]["execution_count"] == 4
        errors = [parent["msg_id"] for _, header, parent, _ in client.messages if header["msg_type"] == "error"]
        missed = [parent["msg_id"] for _, header, parent, _ in client.messages if header["msg_type"] == "stream"]
        assert (errors, missed) == (["bad"], ["good", "bad"])


async def test_a_kernel_that_tells_of_endless_cells_is_cut_short() -> None:
    async with the_channels() as channels:
        attach(channels, adopted=True)
        header = {"msg_type": "execute_request", "session": "page"}
        channels.make_up([EndedCell({**header, "msg_id": str(number)}, "ok") for number in range(1000)])
        client = connect(channels, "page")
        await settle()
        told = [parent["msg_id"] for channel, _, parent, _ in client.messages if channel == "shell"]
        assert told == [str(number) for number in range(968, 1000)]


async def test_an_adopted_cell_whose_end_nobody_heard_ends_when_the_kernel_says_so() -> None:
    async with the_channels() as channels:
        wire = attach(channels, adopted=True)
        channels.follow("cell")
        wire.says(
            "execute_input", {"execution_count": 3}, {"msg_id": "cell", "msg_type": "execute_request", "session": "p"}
        )
        channels.follow_no_more("cell")
        client = connect(channels, "p")
        await settle()
        assert [each for each in client.told if "lost" not in each] == [
            "execute_input",
            "execute_reply ok",
            "status idle",
        ]
        assert len(client.told) == 4, "and what is missing is told of"
        assert not channels.busy
        channels.follow("unknown")
        channels.follow_no_more("unknown")
        assert not channels.busy
