"""What is in the engine, looked at all the time."""

from __future__ import annotations

import threading
from pathlib import Path

import docker

from kernelprovisioner.launchers.container_spec import LABEL_OWNER
from tests import services


class Census:
    """Looks into the engine all the time: which sandboxes there were, and how many at once."""

    def __init__(self, url: str, runtime: Path) -> None:
        self._runtime = str(runtime)
        self.seen: set[str] = set()
        self.most: list[str] = []
        self._client = docker.DockerClient(base_url=url)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._count)

    def __enter__(self) -> Census:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._client.close()

    def _count(self) -> None:
        while not self._done.wait(0.2):
            everyones = self._client.api.containers(all=True, filters={"label": services.LABEL})
            listed = [item for item in everyones if item["Labels"][LABEL_OWNER].startswith(self._runtime)]
            self.seen |= {container["Id"] for container in listed}
            # What has ended may still be listed for a moment; it has neither processes nor memory.
            live = [f"{item['Id'][:12]} {item['Status']}" for item in listed if item["State"] in ("created", "running")]
            self.most = max(self.most, live, key=len)
