"""The host's end of the supervisor's stream, against supervisors that are honest, dead, or forged by user code."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samovar_kernel.frames import MAX_BODY, MAX_HEADER, FrameError, FrameReader, pack

from kernelprovisioner.launchers.base import Endpoint
from kernelprovisioner.supervisor import SupervisorClient, SupervisorError, remaining_output

TOKEN = "token"
Answer = Callable[[dict[str, Any], bytes], bytes]


@asynccontextmanager
async def supervisor(directory: Path, answer: Answer) -> AsyncIterator[Endpoint]:
    """A supervisor that greets and gives `answer(header, body)` to every request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader()
        while data := await reader.read(65536):
            for header, body in frames.feed(data):
                if header["op"] == "hello":
                    assert header["token"] == TOKEN
                    writer.write(pack({"ok": True, "pid": 1, "protocol": 1}))
                else:
                    writer.write(answer(header, body))
        writer.close()

    path = directory / "sup"
    server = await asyncio.start_unix_server(serve, path)
    async with server:
        yield Endpoint(path=path)


@asynccontextmanager
async def client_of(directory: Path, answer: Answer) -> AsyncIterator[SupervisorClient]:
    async with supervisor(directory, answer) as endpoint:
        client = await SupervisorClient.connect(endpoint, TOKEN, timeout=5)
        try:
            yield client
        finally:
            client.close()
            await client.gone


async def test_a_refusal_carries_the_reason(tmp_path: Path) -> None:
    def answer(header: dict[str, Any], body: bytes) -> bytes:
        return pack({"id": header["id"], "ok": False, "error": "No space left on device"})

    async with client_of(tmp_path, answer) as client:
        with pytest.raises(SupervisorError, match="No space left"):
            await client.request("put", b"y", path="x")


@pytest.mark.parametrize(
    "forged",
    [
        struct.pack(">II", 10, 2**31),
        struct.pack(">II", 2**32 - 1, 0),
        pack({"id": "1", "ok": True}),
        pack({"id": 999, "ok": True}),
        pack({"id": [1], "ok": True}),
        struct.pack(">II", 4, 0) + b"null",
        struct.pack(">II", 2, 0) + b"\xff\xff",
        struct.pack(">II", 60_000, 0) + b"[" * 60_000,
        b"",
    ],
)
async def test_a_forged_answer_fails_the_request_and_nothing_else(tmp_path: Path, forged: bytes) -> None:
    async with client_of(tmp_path, lambda header, _: forged) as client:
        with pytest.raises(SupervisorError):
            await client.request("stats", timeout=0.3)


async def test_the_end_of_the_kernel_is_told_once_and_cleaned(tmp_path: Path) -> None:
    records: list[object] = [
        {"kind": "text", "name": "stdout", "parent": {}, "text": "a"},
        {"kind": "text", "name": "socket", "parent": {}, "text": "b"},
        {"kind": "text", "name": "stdout", "parent": None, "text": "c"},
        {"kind": "mark", "msg_id": 7},
        "nonsense",
    ]

    def answer(header: dict[str, Any], body: bytes) -> bytes:
        first = pack({"event": "exit", "code": None, "signal": 9}, json.dumps(records).encode())
        second = pack({"event": "exit", "code": "0", "signal": []}, b"not json")
        return first + second + pack({"id": header["id"], "ok": True})

    async with client_of(tmp_path, answer) as client:
        await client.request("stats")
        ended = await asyncio.wait_for(client.exited, 1)
        assert (ended.code, ended.signal) == (None, 9)
        assert ended.unsent == (records[0],)


async def test_a_supervisor_that_is_not_there_or_refuses_is_an_error_in_time(tmp_path: Path) -> None:
    with pytest.raises(SupervisorError, match=r"within 0\.2 s"):
        await SupervisorClient.connect(Endpoint(path=tmp_path / "sup"), TOKEN, timeout=0.2)


def text(value: str) -> dict[str, Any]:
    return {"kind": "text", "name": "stdout", "parent": {}, "text": value}


def test_what_was_received_is_not_told_again() -> None:
    unsent = (text("a"), {"kind": "mark", "msg_id": "1"}, text("b"), {"kind": "mark", "msg_id": "2"}, text("c"))
    assert [record["text"] for record in remaining_output(unsent, {"1"})] == ["b", "c"]
    assert [record["text"] for record in remaining_output(unsent, {"1", "2"})] == ["c"]
    assert [record["text"] for record in remaining_output(unsent, set())] == ["a", "b", "c"]


@given(st.lists(st.tuples(st.dictionaries(st.text(max_size=5), st.integers(), max_size=3), st.binary(max_size=100))))
def test_frames_survive_any_cut(sent: list[tuple[dict[str, int], bytes]]) -> None:
    stream = b"".join(pack(header, body) for header, body in sent)
    reader = FrameReader()
    received = [frame for index in range(len(stream)) for frame in reader.feed(stream[index : index + 1])]
    assert received == sent


def test_frames_are_bounded_on_both_ends() -> None:
    with pytest.raises(FrameError):
        pack({"a": "x" * MAX_HEADER})
    with pytest.raises(FrameError):
        pack({}, b"x" * (MAX_BODY + 1))
    with pytest.raises(FrameError):
        FrameReader().feed(struct.pack(">II", 0, MAX_BODY + 1))


def test_who_heard_one_cell_only_is_not_told_of_the_cells_before() -> None:
    earlier, running = (dict(text(value), parent={"msg_id": value}) for value in ("earlier", "running"))
    assert remaining_output((earlier, running), set(), "running") == [running]
