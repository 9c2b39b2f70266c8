"""The image that kernel images start from: pulled where a registry can be reached, else bootstrapped on the host."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker

from kernelprovisioner.build_error import BuildError
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, explain

#: The base that is made here where there is no registry: Debian with its own Python.
BOOTSTRAPPED = "samovar-base:bookworm"
_SUITE = "bookworm"
_PACKAGES = ("python3", "python3-venv", "ca-certificates", "tzdata")
#: Nobody reads manuals in a sandbox; licences stay.
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*")
_KEPT = ("/usr/share/doc/*/copyright",)
#: Silence of a registry, in seconds, after which it counts as out of reach.
_PULL_SILENCE = 30
#: Importing a file system of 200 MB takes an engine seconds; minutes on a slow disk.
_IMPORT_TIMEOUT = 600

Report = Callable[[str], None]


def find_base(engine: Any, official: str, asked: str | None, architecture: str, report: Report) -> str:
    """Return the reference of a base that is present in the engine, fetching or making it if need be.

    `asked` is the base that the caller insists on; without it, what is there already goes before a pull of
    `official`, and that before a bootstrap. `architecture` is Debian's name ("amd64"). Raises BuildError.
    """
    for reference in [asked] if asked else [official, BOOTSTRAPPED]:
        if is_present(engine, reference):
            return reference
    if asked != BOOTSTRAPPED:
        reference = asked or official
        reason = _pull(engine, reference, report)
        if reason is None:
            return reference
        if asked:
            raise BuildError(
                f"pulling the base {asked}",
                reason,
                "check the name and the engine's connection to the registry, or leave --base out: "
                "a base is then made on this machine",
            )
        report(f"{reference} cannot be pulled ({reason}), so a base is made on this machine")
    _bootstrap(engine, architecture, report)
    return BOOTSTRAPPED


def is_present(engine: Any, reference: str) -> bool:
    """Return whether the engine has the image, without asking any registry."""
    try:
        engine.images.get(reference)
    except docker.errors.ImageNotFound:
        return False
    return True


def _pull(engine: Any, reference: str, report: Report) -> str | None:
    """Pull an image; return why it could not be had, or None."""
    report(f"pulling {reference}")
    repository, tag = docker.utils.parse_repository_tag(reference)
    try:
        with _patience(engine, _PULL_SILENCE):
            for event in engine.api.pull(repository, tag=tag or "latest", stream=True, decode=True):
                if "error" in event:
                    return str(event["error"])
                if event.get("status") == "Pull complete":
                    report(f"  layer {event.get('id', '')} is there")
    except ENGINE_ERRORS as error:
        return explain(error)
    return None if is_present(engine, reference) else "the engine did not say why"


def _bootstrap(engine: Any, architecture: str, report: Report) -> None:
    """Make BOOTSTRAPPED from Debian's packages and import it. Raises BuildError."""
    step = f"making the base {BOOTSTRAPPED}"
    program = shutil.which("mmdebstrap")
    if program is None:
        raise BuildError(
            step,
            "mmdebstrap is not installed, and it is what makes a base without a Docker registry",
            "on Debian and Ubuntu: apt-get install mmdebstrap; elsewhere: give a base image with Python by --base",
        )
    report(f"{step} from Debian's packages (half a minute)")
    with tempfile.TemporaryDirectory(prefix="samovar-base-") as directory:
        archive = Path(directory) / "root.tar"
        command = [program, "--variant=minbase", f"--architectures={architecture}", f"--include={','.join(_PACKAGES)}"]
        command += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
        command += [f"--dpkgopt=path-include={pattern}" for pattern in _KEPT]
        output = _run([*command, _SUITE, str(archive)], step, report)
        if not archive.is_file():
            raise BuildError(step, f"mmdebstrap wrote nothing: {output}", "run it by hand to see why")
        report(f"importing {archive.stat().st_size / 1e6:.0f} MB into the engine")
        repository, _, tag = BOOTSTRAPPED.partition(":")
        try:
            with _patience(engine, _IMPORT_TIMEOUT):
                engine.api.import_image_from_file(str(archive), repository=repository, tag=tag)
        except ENGINE_ERRORS as error:
            raise BuildError(
                step, f"the engine refused it: {explain(error)}", "see the engine's log and its free disk space"
            ) from None


def _run(command: list[str], step: str, report: Report) -> str:
    """Run mmdebstrap, pass its progress on, return the end of its output. Raises BuildError."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            line = line.rstrip()
            lines = [*lines[-14:], line]
            if line.startswith(("I: ", "W: ")):
                report(f"  {line[3:]}")
    if process.returncode != 0:
        raise BuildError(
            step,
            f"mmdebstrap ended with exit code {process.returncode}:\n" + "\n".join(lines),
            "check that this machine reaches a Debian mirror (apt-get update) and has 1 GB free in its temporary "
            "directory; as a user other than root, mmdebstrap needs user namespaces and the package uidmap",
        )
    return "\n".join(lines)


@contextlib.contextmanager
def _patience(engine: Any, seconds: int) -> Iterator[None]:
    """For its duration the engine's client waits this long for an answer."""
    before = engine.api.timeout
    engine.api.timeout = seconds
    try:
        yield
    finally:
        engine.api.timeout = before
