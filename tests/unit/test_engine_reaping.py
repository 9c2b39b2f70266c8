"""What of the containers in an engine is removed that belong to nobody who can be seen."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from kernelprovisioner.launchers.container_spec import LABEL_OWNER
from kernelprovisioner.launchers.docker_engine import Engine


class FakeClient:
    """The part of docker's client that reaping needs. `containers_there`: state and seconds since the end, by id."""

    def __init__(self, containers_there: dict[str, tuple[str, float]]) -> None:
        self.there = containers_there
        self.removed: list[str] = []

    def info(self) -> dict[str, Any]:
        return {}

    def containers(self, **_: Any) -> list[dict[str, Any]]:
        return [
            {
                "Id": container_id,
                "State": state,
                "Created": int(time.time() - ago),
                "Labels": {LABEL_OWNER: "/nowhere/00000000"},
            }
            for container_id, (state, ago) in self.there.items()
        ]

    def networks(self, **_: Any) -> list[dict[str, Any]]:
        return [{"Id": "network", "Labels": {LABEL_OWNER: "/nowhere/00000000"}}]

    def inspect_container(self, container_id: str) -> dict[str, Any]:
        ended = datetime.now(UTC) - timedelta(seconds=self.there[container_id][1])
        return {"State": {"FinishedAt": ended.strftime("%Y-%m-%dT%H:%M:%S.123456789Z")}}

    def remove_container(self, container_id: str, **_: Any) -> None:
        self.removed.append(container_id)

    def remove_network(self, network_id: str) -> None:
        self.removed.append(network_id)


def test_of_an_owner_that_nobody_sees_only_what_ended_long_ago_is_removed() -> None:
    client = FakeClient(
        {
            "running": ("running", 10_000),
            "paused": ("paused", 10_000),
            "just-ended": ("exited", 60),
            "ended": ("exited", 700),
            "dead": ("dead", 700),
            "being-made": ("created", 60),
            "never-started": ("created", 700),
        }
    )
    removed, failed = Engine("", client).reap([])
    assert client.removed == ["ended", "dead", "never-started"]
    assert (removed, failed) == (3, set())
