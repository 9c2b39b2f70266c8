"""Checks of what a gateway stands on: each blocks and returns a finding, for /health/detailed and `samovar doctor`."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import docker

from kernelprovisioner.build_error import BuildError
from kernelprovisioner.image_builder import ImageBuilder
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, explain, new_client

#: An engine that takes longer for its version is slow: it usually needs some milliseconds.
SLOW_SECONDS = 2.0
#: What to do about one.
BUSY_ENGINE = "see what keeps the engine busy (disk, memory, other containers)"
#: What to do where only the engine could tell.
SEE_ENGINE = "see what is said of the engine"
#: Less free space than this is told before it runs out.
LOW_BYTES = 16 * 2**20
_LOW_INODES = 256
#: What a check writes, to find out whether writing works.
_PROBE_BYTES = 64 * 1024
_MEBIBYTE = 2**20

Status = Literal["healthy", "degraded", "unhealthy"]


@dataclass(frozen=True)
class Finding:
    """What one check found: a status; unless it is healthy what is wrong and how to mend it; and facts."""

    status: Status
    error: str | None = None
    remedy: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the finding for a JSON answer."""
        told = {"error": self.error, "remedy": self.remedy}
        return {"status": self.status, **{name: text for name, text in told.items() if text is not None}, **self.facts}


def temporary_directory() -> Path:
    """Where temporary files go. Not tempfile's own choice: where /tmp is full it takes another one, or raises."""
    return Path(os.environ.get("TMPDIR") or "/tmp")


def check_directory(path: Path, needed_for: str, *, when_full: Status = "unhealthy") -> Finding:
    """Whether files can be made and written in a directory; `needed_for` ends the sentence "it is needed for …"."""
    try:
        status = os.statvfs(path)
        # It has no name, or loses it at once: nothing stays if we are killed.
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
    except OSError as error:
        return Finding(
            when_full,
            f"{path} cannot be written: {error.strerror}; it is needed for {needed_for}",
            f"make room in {path}, and see that it is writable",
            {"path": str(path)},
        )
    free = status.f_bavail * status.f_frsize
    facts = {"path": str(path), "free_mb": free // _MEBIBYTE}
    # A file system that does not count its inodes says that it has none at all.
    if free < LOW_BYTES or (status.f_files and status.f_favail < _LOW_INODES):
        what = f"{facts['free_mb']} MB" if free < LOW_BYTES else f"room for {status.f_favail} files"
        text = f"{path} is nearly full: {what} left; it is needed for {needed_for}"
        return Finding("degraded", text, f"make room in {path}", facts)
    return Finding("healthy", facts=facts)


def check_engine(url: str, timeout: float) -> Finding:
    """Whether a container engine answers at `url`, within `timeout` seconds, and how fast."""
    began = time.monotonic()
    try:
        client = new_client(url, timeout)
        took = time.monotonic() - began
        try:
            version = client.version()
        finally:
            client.close()
    except ENGINE_ERRORS as error:
        return Finding(
            "unhealthy",
            f"no container engine answers at {url}: {explain(error)}",
            "start Docker, or set DOCKER_BASE_URL; sessions that hold a sandbox go on meanwhile",
            {"url": url},
        )
    facts = {"url": url, "version": version.get("Version"), "api_version": version.get("ApiVersion")}
    facts["answered_in_ms"] = round(took * 1000, 1)
    if took > SLOW_SECONDS:
        text = f"the container engine at {url} is slow: it took {took:.1f} s to answer"
        return Finding("degraded", text, BUSY_ENGINE, facts)
    return Finding("healthy", facts=facts)


def check_image(url: str, image: KernelImage, data_directory: Path, timeout: float) -> Finding:
    """Whether the engine at `url` has the container image of a kernel image, made from what its folder holds now."""
    build = f"samovar images build {image.name}"
    try:
        client = docker.DockerClient(base_url=url, timeout=max(1, math.ceil(timeout)))
        try:
            built = ImageBuilder(client, data_directory, lambda _: None).built(image)
        finally:
            client.close()
    except (BuildError, *ENGINE_ERRORS) as error:
        reason = error if isinstance(error, BuildError) else explain(error)
        return Finding("degraded", f"whether {image.tag} is there is not known: {reason}", SEE_ENGINE)
    if built is None:
        return Finding("unhealthy", f"the container image {image.tag} is missing", f"run: {build}")
    facts = {
        "image_id": built.image_id,
        "created": built.created,
        "size": built.size,
        "current": built.current,
    }
    if not built.current:
        return Finding("degraded", f"the container image {image.tag} is older than its folder", f"run: {build}", facts)
    return Finding("healthy", facts=facts)
