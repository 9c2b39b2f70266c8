"""Verify a kernel image: one container, locked down as sandboxes are, in which the image's own checks run."""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker

from kernelprovisioner.build_error import BuildError
from kernelprovisioner.images import KernelImage, seccomp_profile
from kernelprovisioner.launchers.container_spec import ContainerSpec
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, explain

_STEP = "verifying"
#: Importing everything on a slow machine, in seconds; then the container is killed.
_TIMEOUT = 300.0
_LABELS = {"com.samovar.verify": "true"}

Report = Callable[[str], None]


def verify_image(engine: Any, image: KernelImage, report: Report) -> bool:
    """Run the image's `verify.py` in a container as locked down as a sandbox; return whether all its checks passed.

    Each line that it prints goes to `report`. The container is removed in any case. Raises BuildError.
    """
    script = image.folder / "verify.py"
    if not script.is_file():
        raise BuildError(_STEP, f"{script} is missing", "an image brings its own checks: write them there")
    container = None
    with tempfile.TemporaryDirectory(prefix="samovar-verify-") as directory:
        try:
            built = engine.images.get(image.tag)
            spec = ContainerSpec(
                sandbox_id=secrets.token_hex(8),
                image=image,
                image_id=built.id,
                labels=_LABELS,
                directory=Path(directory),
                key="",
                token="",
                host_uid=os.getuid(),
                host_cpus=float(engine.info()["NCPU"]),
                seccomp=seccomp_profile(),
            )
            arguments = spec.create_arguments() | {
                "entrypoint": ["/opt/kernel/bin/python", "-P", "-c", script.read_text(encoding="utf-8")],
                "host_config": spec.host_config(engine.api._version),
            }
            container = engine.containers.get(engine.api.create_container(**arguments)["Id"])
            container.start()
            return _follow(container, report)
        except docker.errors.ImageNotFound:
            raise BuildError(_STEP, f"{image.tag} is not built", f"samovar images build {image.name}") from None
        except ENGINE_ERRORS as error:
            raise BuildError(_STEP, explain(error), "check that the engine runs (docker info)") from None
        finally:
            if container is not None:
                container.remove(force=True, v=True)


def _follow(container: Any, report: Report) -> bool:
    """Pass the container's output on until it ends; kill it at the time limit."""
    overdue = threading.Timer(_TIMEOUT, container.kill)
    overdue.daemon = True
    overdue.start()
    try:
        rest = b""
        for piece in container.logs(stream=True, follow=True):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                report(line.decode(errors="replace"))
        code = int(container.wait(timeout=30)["StatusCode"])
    finally:
        overdue.cancel()
        overdue.join()
    if code > 1:
        report(f"FAILED: the container ended with exit code {code}")
    return code == 0
