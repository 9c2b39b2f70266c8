"""Engine: the blocking calls to the container engine, each to be run in a thread; and its errors in words."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, DockerException, NotFound
from requests.exceptions import RequestException, Timeout

from kernelprovisioner.launchers.base import EngineUnavailable, LaunchError
from kernelprovisioner.launchers.container_spec import (
    LABEL_BOOT,
    LABEL_MANAGED,
    LABEL_OWNER,
    LABEL_SANDBOX,
    WARM_CPU_SHARES,
    ContainerSpec,
    container_name,
)
from kernelprovisioner.runtime import OwnerDirectory

DEFAULT_URL = "unix:///var/run/docker.sock"
#: what a call to the engine may raise
ENGINE_ERRORS = (DockerException, RequestException, OSError)

_LOG_LINES = 20
_LOG_BYTES = 2000
_CONFLICT = 409
#: A container that ended (or was made, and never started) so many seconds ago is of no use to anybody.
_LONG_ENDED_SECONDS = 600.0

_REASONS = {
    errno.ENOENT: "there is no such socket",
    errno.ECONNREFUSED: "nobody listens there",
    errno.EACCES: "you may not open it (is your user in the group `docker`?)",
}


def engine_url(environ: Mapping[str, str]) -> str:
    """Return the engine's address that this environment names."""
    return environ.get("DOCKER_BASE_URL") or environ.get("DOCKER_HOST") or DEFAULT_URL


def explain(error: BaseException) -> str:
    """Return what an engine's error says, as one line for a person."""
    if isinstance(error, APIError) and error.explanation:
        return str(error.explanation).strip().replace("\n", " ")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Timeout):
            return "it does not answer in time"
        for candidate in (cause, *cause.args):
            if isinstance(candidate, OSError) and candidate.errno in _REASONS:
                return _REASONS[candidate.errno]
        cause = cause.__cause__ or cause.__context__
    return str(error).strip().replace("\n", " ") or type(error).__name__


def boot_label() -> str | None:
    """Return what names this machine and its current boot; None where the machine has no id (in a container)."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"{machine}/{boot}" if machine and boot else None


def of_an_earlier_boot(label: str | None, current: str | None) -> bool:
    """Whether a boot label names this machine before its last boot: nobody of that time lives any more."""
    if not label or not current:
        return False
    machine, _, boot = label.partition("/")
    current_machine, _, current_boot = current.partition("/")
    return machine == current_machine and boot != current_boot


class Engine:
    """One container engine. Every method blocks; all but `connect` raise ENGINE_ERRORS."""

    def __init__(self, url: str, client: Any) -> None:
        """Use `connect()`."""
        self.url = url
        self._client = client
        info = client.info()
        self.id = str(info.get("ID", ""))
        self.cpus = float(info.get("NCPU") or os.cpu_count() or 1)

    @classmethod
    def connect(cls, url: str, timeout: float) -> Engine:
        """Return the engine at `url`. Raises EngineUnavailable with one sentence that says why and what to do."""
        try:
            client = new_client(url, timeout)
            try:
                return cls(url, client)
            except BaseException:
                client.close()
                raise
        except ENGINE_ERRORS as error:
            why = explain(error)
        # Not from that one: as long as somebody keeps ours (nbclient does), its frames keep a socket open.
        raise EngineUnavailable(f"no container engine answers at {url}: {why}; start Docker, or set DOCKER_BASE_URL")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ping(self) -> None:
        """Return once the engine has answered."""
        self._client.ping()

    def image(self, reference: str, name: str) -> str:
        """Return the id of a container image. Raises LaunchError where it is missing."""
        try:
            found = self._client.inspect_image(reference)
        except NotFound:
            raise LaunchError(
                f"the container image {reference} does not exist; build it with: samovar images build {name}"
            ) from None
        return str(found["Id"])

    def template(self, spec: ContainerSpec) -> str:
        """Return what the container would be made from in this engine, as a hash. Asks nobody."""
        return spec.template(self._client.api_version)

    def start_container(self, spec: ContainerSpec) -> str:
        """Create and start a container; return its id."""
        host_config = spec.host_config(self._client.api_version)
        created = self._client.create_container(**spec.create_arguments(), host_config=host_config)
        self._client.start(created["Id"])
        return str(created["Id"])

    def published_ports(self, container_id: str) -> dict[int, int]:
        """Return the host's ports by the container's."""
        ports = self._client.inspect_container(container_id)["NetworkSettings"]["Ports"]
        return {int(inner.partition("/")[0]): int(outer[0]["HostPort"]) for inner, outer in ports.items() if outer}

    def remove_container(self, sandbox_id: str, deadline: float) -> None:
        """Remove a sandbox's container; returns once it is gone. One that does not exist is fine.

        Raises TimeoutError at `deadline` (monotonic seconds).
        """
        name = container_name(sandbox_id)
        while True:
            try:
                self._client.remove_container(name, force=True, v=True)
            except NotFound:
                return
            except APIError as error:
                # 409: somebody else is removing it just now.
                if error.response is None or error.response.status_code != _CONFLICT:
                    raise
            if time.monotonic() > deadline:
                raise TimeoutError(f"the engine has not removed {name} in time")
            try:
                self._client.inspect_container(name)
            except NotFound:
                return
            time.sleep(0.05)

    def give_full_share(self, container_id: str) -> None:
        """Raise a container's share of CPU from warming to warm."""
        self._client.update_container(container_id, cpu_shares=WARM_CPU_SHARES)

    def state(self, sandbox_id: str) -> dict[str, Any]:
        """Return the engine's state of a sandbox's container, empty where there is none."""
        try:
            return dict(self._client.inspect_container(container_name(sandbox_id))["State"])
        except NotFound:
            return {}

    def last_words(self, sandbox_id: str) -> str:
        """Return the end of what PID 1 wrote to its log, for a person; empty where there is none."""
        try:
            text = self._client.logs(container_name(sandbox_id), tail=_LOG_LINES)
        except ENGINE_ERRORS:  # the container is gone: there is nothing to tell
            return ""
        return bytes(text)[-_LOG_BYTES:].decode(errors="replace").strip()

    def states_of(self, owner: Path) -> dict[str, str]:
        """Return the state (`running`, `exited`, …) of this owner's containers, by sandbox id."""
        found = self._client.containers(all=True, filters={"label": f"{LABEL_OWNER}={owner}"})
        return {container["Labels"].get(LABEL_SANDBOX, ""): str(container["State"]) for container in found}

    def ensure_network(self, name: str, labels: dict[str, str]) -> None:
        """Make the bridge for `tcp`: its members reach neither each other nor, by routing, the world outside."""
        if any(network["Name"] == name for network in self._client.networks(names=[name])):
            return
        options = {
            "com.docker.network.bridge.enable_icc": "false",
            "com.docker.network.bridge.enable_ip_masquerade": "false",
        }
        self._client.create_network(name, driver="bridge", options=options, labels=labels)

    def remove_network(self, name: str) -> None:
        """Remove a network; one that does not exist is fine."""
        try:
            self._client.remove_network(name)
        except NotFound:
            return

    def reap(self, dead: list[OwnerDirectory]) -> tuple[int, set[Path]]:
        """Remove the containers and networks of dead owners; return how many, and the owners that left some.

        `dead` are those whose lock we hold. An owner elsewhere is reaped if its directory can be seen and its lock is
        free, or if it is of an earlier boot of this machine; all others are left alone, and a dead gateway that the
        next one may continue. Whosever they are, containers that ended long ago go: an owner whose directory was lost
        with the runtime directory is seen from nowhere, and its sandboxes end by themselves.
        """
        ours = {owner.path for owner in dead}
        current = boot_label()
        removed = 0
        failed: set[Path] = set()
        for path, item, remove in self._owned():
            taken = None if path in ours else OwnerDirectory.take_over(path)
            boot = item["Labels"].get(LABEL_BOOT)
            try:
                if path in ours or taken is not None or of_an_earlier_boot(boot, current) or self._is_long_ended(item):
                    remove()
                    removed += 1
            except ENGINE_ERRORS:
                failed.add(path)
            finally:
                if taken is not None:
                    taken.release()
        return removed, failed

    def _is_long_ended(self, item: Mapping[str, Any]) -> bool:
        """Whether it is a container that has not run for long."""
        state = item.get("State")
        if state == "created":
            ended = float(item["Created"])
        elif state in ("exited", "dead"):
            try:
                finished = str(self._client.inspect_container(item["Id"])["State"]["FinishedAt"])
            except NotFound:
                return False
            # Nanoseconds are more than Python reads.
            ended = datetime.fromisoformat(finished[:19]).replace(tzinfo=UTC).timestamp()
        else:
            return False
        return time.time() - ended > _LONG_ENDED_SECONDS

    def _owned(self) -> list[tuple[Path, Mapping[str, Any], Any]]:
        """Everything that Samovar made in this engine: its owner, as it is listed, how it goes; containers first."""
        filters = {"label": f"{LABEL_MANAGED}=true"}
        found: list[tuple[Path, Mapping[str, Any], Any]] = []
        for item, remove in [
            *(
                (item, self._container_remover(item["Id"]))
                for item in self._client.containers(all=True, filters=filters)
            ),
            *((item, self._network_remover(item["Id"])) for item in self._client.networks(filters=filters)),
        ]:
            labels = item["Labels"]
            owner = labels.get(LABEL_OWNER, "")
            if os.path.isabs(owner):
                found.append((Path(owner), item, remove))
        return found

    def _container_remover(self, container_id: str) -> Any:
        def remove() -> None:
            try:
                self._client.remove_container(container_id, force=True, v=True)
            except NotFound:
                return

        return remove

    def _network_remover(self, network_id: str) -> Any:
        return lambda: self.remove_network(network_id)


def new_client(url: str, timeout: float) -> Any:
    """Return docker's low-level client for `url`. Raises ENGINE_ERRORS."""
    return docker.APIClient(base_url=url, version="auto", timeout=timeout)
