"""KernelRequests and LargeFrames: what is not over is known, and both stay within their bounds."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from gateway import kernel_requests
from gateway.kernel_requests import KernelRequests
from gateway.large_frames import LargeFrames

IDS = st.sampled_from("abcdef")
EVENTS = st.lists(st.tuples(st.sampled_from(["sent", "began", "replied", "ended"]), IDS), max_size=60)


def sent(requests: KernelRequests, msg_id: str, header: bytes = b"{}") -> None:
    requests.sent(msg_id, "execute_request", header, b"tag", "shell")


@given(EVENTS)
def test_whatever_the_order_a_request_is_over_with_its_reply_and_its_idle_status(events: list[tuple[str, str]]) -> None:
    requests = KernelRequests()
    facts: dict[str, set[str]] = {}
    for event, msg_id in events:
        if event == "sent":
            sent(requests, msg_id)
            facts[msg_id] = {"asked"}
            continue
        if event == "began":
            requests.began(msg_id, "execute_request", b"{}")
            facts.setdefault(msg_id, {"replied"}).add("began")
        elif event == "replied":
            requests.replied(msg_id)
        else:
            requests.ended(msg_id)
        if msg_id in facts:
            known = facts[msg_id] | {event}
            if "replied" in known and ("ended" in known or "began" not in known):
                del facts[msg_id]
            else:
                facts[msg_id] = known
    running = {msg_id for msg_id, known in facts.items() if "began" in known and "ended" not in known}
    assert {request.msg_id for request in requests.running} == running
    assert {request.msg_id for request in requests.waiting} == facts.keys() - running
    assert requests.busy == bool(running)


def test_requests_are_remembered_within_a_bound() -> None:
    requests = KernelRequests()
    for number in range(kernel_requests.MAX_REQUESTS + 100):
        sent(requests, f"r{number}")
    assert len(requests.waiting) == kernel_requests.MAX_REQUESTS
    assert requests.find("r99") is None and requests.find("r100") is not None
    for number in range(100):
        sent(requests, f"large{number}", b"x" * 100_000)
    assert sum(len(request.header) for request in requests.waiting) <= kernel_requests.MAX_HEADERS_BYTES


def test_what_runs_is_not_forgotten_for_what_waits() -> None:
    requests = KernelRequests()
    sent(requests, "cell")
    requests.began("cell", "execute_request", b"{}")
    for number in range(kernel_requests.MAX_REQUESTS + 100):
        sent(requests, f"r{number}")
    assert requests.busy and requests.find("cell") is not None
    for number in range(kernel_requests.MAX_REQUESTS + 100):
        requests.began(f"b{number}", "execute_request", b"{}")
    assert len(requests.running) + len(requests.waiting) == kernel_requests.MAX_REQUESTS


def test_an_adopted_cell_gets_its_header_when_the_kernel_tells_it() -> None:
    requests = KernelRequests()
    requests.adopt("cell")
    assert requests.busy
    (cell,) = requests.running
    requests.name(cell, b'{"session": "page"}')
    requests.name(cell, b'{"session": "forged"}')
    assert cell.header == b'{"session": "page"}' and cell.orphaned
    requests.ended("cell")
    assert not requests.busy and requests.find("cell") is None


async def test_large_messages_wait_in_line_for_room() -> None:
    frames = LargeFrames(100)
    order: list[str] = []
    leave = {name: asyncio.Event() for name in "abc"}

    async def send(name: str, size: int) -> None:
        async with frames.room(size, lambda: None):
            order.append(name)
            await leave[name].wait()

    tasks = [asyncio.create_task(send("a", 60)), asyncio.create_task(send("b", 70)), asyncio.create_task(send("c", 10))]
    await asyncio.sleep(0.01)
    assert order == ["a"], "c would fit, but b came first"
    leave["a"].set()
    await asyncio.sleep(0.01)
    assert order == ["a", "b", "c"]
    assert frames.used == 80
    tasks[1].cancel()
    leave["c"].set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert frames.used == 0
    async with frames.room(1000, lambda: None):
        assert frames.used == 1000


async def test_who_takes_too_long_while_others_wait_is_cut() -> None:
    frames = LargeFrames(100, patience=0.05)
    slow: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def stall() -> None:
        async with frames.room(90, lambda: slow.cancel() and None):
            await slow

    stalled = asyncio.create_task(stall())
    await asyncio.sleep(0.1)
    assert not slow.done(), "nobody waits: it may take its time"
    async with frames.room(50, lambda: None):
        assert slow.cancelled()
    await asyncio.gather(stalled, return_exceptions=True)
    assert frames.used == 0
