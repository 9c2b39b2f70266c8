"""What a sandbox's container looks like: a pure function from a launch request to the engine's create arguments."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from docker.types import HostConfig, LogConfig, Mount, Ulimit

from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.launchers.configurable import CHANNELS, thread_variables

LABEL_MANAGED = "com.samovar.managed"
#: operators of code-interpreter servers already filter by this one
LABEL_MANAGED_ALIAS = "com.code-interpreter.managed"
LABEL_OWNER = "com.samovar.owner"
LABEL_BOOT = "com.samovar.boot"
LABEL_SANDBOX = "com.samovar.sandbox"

WORK_DIRECTORY = "/mnt/data"
RUNTIME_MOUNT = "/samovar"
#: ports inside the container where the transport is tcp
TCP_PORTS = {name: 50000 + number for number, name in enumerate((*CHANNELS, "supervisor"), start=1)}

WARMING_CPU_SHARES = 128
WARM_CPU_SHARES = 1024

_KERNEL_COMMAND = ["/opt/kernel/bin/python", "-P", "-m", "samovar_kernel.app"]
# The image's own user; the second one where the first is the gateway's uid.
_SANDBOX_UIDS = (10001, 10002)
# A tmpfs inode costs about 1 KiB of the container's memory, so many empty files must end in ENOSPC, not in a kill.
_INODES_PER_MB = 64
_MIN_INODES = 4096
_LOG_SIZE = "256k"


@dataclass(frozen=True)
class ContainerSpec:
    """One sandbox's container, as it is to be made."""

    sandbox_id: str
    image: KernelImage
    image_id: str  # the engine's id of the container image
    labels: dict[str, str]
    directory: Path  # the sandbox's runtime directory on the host
    key: str
    token: str
    host_uid: int  # the launcher's own
    host_cpus: float
    seccomp: str  # the profile's JSON
    transport: str = "ipc"
    network: str | None = None  # tcp: the bridge's name
    mount: Path | None = None
    mount_gid: int | None = None

    @property
    def name(self) -> str:
        """The container's name, known before it exists, so that a half-made one can be removed."""
        return container_name(self.sandbox_id)

    @property
    def uid(self) -> int:
        """The container's uid: never the launcher's own."""
        return sandbox_uid(self.host_uid)

    def create_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of docker's `APIClient.create_container`, without its host configuration."""
        return {
            "image": self.image_id,
            "name": self.name,
            "hostname": "sandbox",
            "user": f"{self.uid}:{self.uid if self.mount_gid is None else self.mount_gid}",
            # Not the work directory: a mounted one may hold modules that would shadow the supervisor's own.
            "working_dir": "/",
            "environment": self.environment(),
            "labels": self.labels,
            "ports": list(TCP_PORTS.values()) if self.transport == "tcp" else None,
            "stdin_open": False,
            "tty": False,
            # Else the proxies of the user's own Docker configuration would go in.
            "use_config_proxy": False,
        }

    def host_config(self, version: str) -> HostConfig:
        """Return the engine's host configuration: every limit and every lock of the sandbox."""
        limits = self.image.limits
        security = ["no-new-privileges:true", f"seccomp={self.seccomp}"]
        mounts = []
        tmpfs = {"/tmp": _tmpfs_options(limits.tmp_mb, "mode=1777")}
        if self.transport == "ipc":
            mounts.append(Mount(RUNTIME_MOUNT, str(self.directory), type="bind", propagation="rprivate"))
        if self.mount is not None:
            mounts.append(Mount(WORK_DIRECTORY, str(self.mount), type="bind", propagation="rprivate"))
        else:
            tmpfs[WORK_DIRECTORY] = _tmpfs_options(limits.work_mb, f"uid={self.uid}", f"gid={self.uid}", "mode=0755")
        memory = limits.container_memory_mb * 2**20
        return HostConfig(
            version=version,
            network_mode=self.network or "none",
            port_bindings=dict.fromkeys(TCP_PORTS.values(), ("127.0.0.1", None)) if self.network else None,
            read_only=True,
            cap_drop=["ALL"],
            security_opt=security,
            init=False,
            ipc_mode="private",
            pids_limit=limits.pids,
            mem_limit=memory,
            memswap_limit=memory,
            nano_cpus=int(min(limits.cpus, self.host_cpus) * 1e9),
            cpu_shares=WARMING_CPU_SHARES,
            ulimits=[
                Ulimit(name="nofile", soft=limits.open_files, hard=limits.open_files),
                Ulimit(name="core", soft=0, hard=0),
                # The engine mounts /dev/mqueue writable; without bytes for queues nothing can be made there.
                Ulimit(name="msgqueue", soft=0, hard=0),
            ],
            tmpfs=tmpfs,
            shm_size=limits.shm_mb * 2**20,
            mounts=mounts,
            log_config=LogConfig(type=LogConfig.types.JSON, config={"max-size": _LOG_SIZE, "max-file": "1"}),
            restart_policy={"Name": "no"},
        )

    def template(self, version: str) -> str:
        """Return a hash of all that a sandbox is made from: image, limits, settings; not of what is its own."""
        plain = replace(
            self,
            sandbox_id="",
            labels={},
            directory=Path("/"),
            key="",
            token="",
            network=self.network and "network",
            mount=None,
            mount_gid=None,
        )
        made_from = json.dumps([plain.create_arguments(), plain.host_config(version)], sort_keys=True)
        return hashlib.sha256(made_from.encode()).hexdigest()[:16]

    def environment(self) -> dict[str, str]:
        """Return the container's whole environment beside the image's own: nothing comes from the launcher's."""
        return thread_variables(self.image) | self.image.environment | {"SAMOVAR_SUPERVISOR": self.supervisor_config()}

    def supervisor_config(self) -> str:
        """Return the supervisor's configuration as JSON."""
        config: dict[str, Any] = {
            "token": self.token,
            "key": self.key,
            "transport": self.transport,
            "directory": RUNTIME_MOUNT,
            "work_directory": WORK_DIRECTORY,
            "preload": list(self.image.preload),
            "kernel": _KERNEL_COMMAND,
        }
        if self.transport == "tcp":
            config["ports"] = TCP_PORTS
        return json.dumps(config)


def container_name(sandbox_id: str) -> str:
    """Return the name of a sandbox's container."""
    return f"samovar-{sandbox_id}"


def sandbox_uid(host_uid: int) -> int:
    """Return the uid that sandboxes of a launcher with this uid run as: never its own."""
    return next(uid for uid in _SANDBOX_UIDS if uid != host_uid)


def mount_group(mount: Path) -> int:
    """Return the group id that a sandbox needs for this work directory. Raises LaunchError where it cannot be used."""
    try:
        found = mount.stat()
    except OSError as error:
        raise LaunchError(f"the work directory {mount} cannot be mounted: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise LaunchError(f"the work directory {mount} cannot be mounted: it is not a directory")
    if found.st_mode & 0o050 != 0o050:
        raise LaunchError(
            f"the work directory {mount} cannot be mounted: its group may not read it; "
            f"run `chmod g+rwxs {mount}`, or let the kernel work on a copy"
        )
    return found.st_gid


def _tmpfs_options(size_mb: int, *more: str) -> str:
    inodes = max(_MIN_INODES, size_mb * _INODES_PER_MB)
    # exec: people compile and load extensions in their directory, and an interpreter needs no such right anyway.
    return ",".join(("rw", "exec", "nosuid", "nodev", f"size={size_mb}m", f"nr_inodes={inodes}", *more))
