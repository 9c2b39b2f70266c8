"""The limit of open files is raised for what the pools may hold, and connections get what sandboxes leave."""

from __future__ import annotations

import resource

import pytest

from gateway.open_files import room_for_connections


@pytest.mark.parametrize(
    ("soft", "hard", "sandboxes", "raised", "room"),
    [
        (1024, 2**20, 10, 2024, 1000),
        (1024, 2**20, 200, 4024, 1000),  # a class of 200: their sockets are not taken from the connections
        (1024, 1024, 10, None, 512),
        (1024, 1024, 50, None, 312),
        (1024, 1024, 200, None, 16),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 200, None, 1000),
    ],
)
def test_the_limit_that_is_asked_for(
    soft: int, hard: int, sandboxes: int, raised: int | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    assert room_for_connections(sandboxes, 1000) == room
    assert limits == ([] if raised is None else [(raised, hard)])
