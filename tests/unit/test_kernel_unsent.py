"""The ring of unsent output: what a reader finds after the writer's death."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samovar_kernel import unsent
from samovar_kernel.unsent import RING_SIZE, Ring, create_ring, read_records


@pytest.fixture
def descriptor() -> Iterator[int]:
    memory = create_ring()
    yield memory
    os.close(memory)


@pytest.fixture
def ring(descriptor: int) -> Iterator[Ring]:
    writer = Ring(descriptor)
    yield writer
    writer.close()


def test_texts_and_marks_in_order(descriptor: int, ring: Ring) -> None:
    first = ring.text("stdout", b'{"msg_id": "a"}', b"one")
    ring.text("stderr", b'{"msg_id": "a"}', b"two")
    ring.mark(first, "m1")
    assert read_records(descriptor) == [
        {"kind": "text", "name": "stdout", "parent": {"msg_id": "a"}, "text": "one"},
        {"kind": "mark", "msg_id": "m1"},
        {"kind": "text", "name": "stderr", "parent": {"msg_id": "a"}, "text": "two"},
    ]


def test_neighbouring_texts_become_one(descriptor: int, ring: Ring) -> None:
    parent = b"{}"
    for piece in ("ä".encode()[:1], "ä".encode()[1:], b"!"):
        ring.text("stdout", parent, piece)
    assert [record["text"] for record in read_records(descriptor)] == ["ä!"]


def test_the_newest_survive_a_flood(descriptor: int, ring: Ring) -> None:
    parent = b'{"msg_id": "flood"}'
    written = "".join(f"{number:07d}\n" for number in range(600_000))
    for start in range(0, len(written), 50_000):
        ring.text("stdout", parent, written[start : start + 50_000].encode())
    [record] = read_records(descriptor)
    assert record["parent"] == {"msg_id": "flood"}
    assert written.endswith(record["text"])
    assert RING_SIZE - 200_000 < len(record["text"]) <= RING_SIZE


def test_cleared_ring_is_empty_and_goes_on(descriptor: int, ring: Ring) -> None:
    ring.text("stdout", b"{}", b"old")
    ring.clear()
    assert read_records(descriptor) == []
    ring.text("stdout", b'{"msg_id": "b"}', b"new")
    assert [record["text"] for record in read_records(descriptor)] == ["new"]


@given(st.binary(max_size=200), st.integers(0, 5000))
def test_a_scribbled_ring_never_hurts_its_reader(noise: bytes, at: int) -> None:
    descriptor = create_ring()
    try:
        ring = Ring(descriptor)
        for number in range(20):
            ring.mark(ring.text("stdout", b"{}", b"text %d" % number), f"m{number}")
        ring.close()
        os.pwrite(descriptor, noise, at)
        records = read_records(descriptor)
        assert all(record["kind"] in ("text", "mark") for record in records)
    finally:
        os.close(descriptor)


def test_a_record_may_lie_across_the_end(descriptor: int, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsent, "RING_SIZE", 1000)
    for number in range(100):
        ring.text("stdout", b"{}", b"%05d " % number * 7)
    text = read_records(descriptor)[0]["text"]
    assert text.endswith("00098 " * 7 + "00099 " * 7)
    assert len(text) > 700
