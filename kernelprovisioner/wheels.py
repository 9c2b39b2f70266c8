"""The wheels of a kernel image: fetched on the host for the image's Python and processor, checked, kept."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from kernelprovisioner.build_error import BuildError

#: The newest glibc (2.x) that wheels may ask for: Debian 12's, which the bases have.
_GLIBC_MINOR = 36
_STEP = "fetching the wheels"

Report = Callable[[str], None]


def fetch_wheels(requirements: Path, *, image: str, python: str, machine: str, cache: Path, report: Report) -> Path:
    """Return a directory with exactly the wheels of `requirements`, downloading what the cache lacks.

    `python` is "3.11", `machine` "x86_64" or "aarch64". Older sets of the same image leave the cache.
    Raises BuildError.
    """
    content = requirements.read_bytes()
    identity = hashlib.sha256(f"{python} {machine}\n".encode() + content).hexdigest()[:16]
    complete = cache / f"{image}-{identity}"
    if complete.is_dir():
        return complete
    count = len(re.findall(rb"^[A-Za-z0-9][^\s=]*==", content, re.MULTILINE))
    report(f"fetching {count} wheels for Python {python} on {machine}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{image}-", dir=cache))
    except OSError as error:
        raise BuildError(_STEP, str(error), f"make {cache} writable") from None
    try:
        _download(requirements, partial, python, machine, count, report)
        # Only a whole set gets its name, so an interrupted download is never taken for one.
        partial.rename(complete)
    except OSError as error:
        raise BuildError(_STEP, str(error), f"check free space and permissions of {cache}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for older in cache.glob(f"{image}-*"):
        if older != complete and re.fullmatch(rf"{re.escape(image)}-[0-9a-f]{{16}}", older.name):
            shutil.rmtree(older, ignore_errors=True)
    report(f"  {sum(wheel.stat().st_size for wheel in complete.iterdir()) / 1e6:.0f} MB in {complete}")
    return complete


def pip_arguments(requirements: Path, target: Path, python: str, machine: str) -> list[str]:
    """Return pip's arguments: wheels only, each pinned and checked by its hash, none for this host's own Python."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(_GLIBC_MINOR, 4, -1)]
    platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
    arguments = ["download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input"]
    arguments += [
        "--progress-bar=off",
        "--disable-pip-version-check",
        "--implementation=cp",
        f"--python-version={python}",
    ]
    arguments += [f"--abi={abi}" for abi in (f"cp{python.replace('.', '')}", "abi3", "none")]
    arguments += [f"--platform={platform}" for platform in platforms]
    return [*arguments, f"--dest={target}", f"--requirement={requirements}"]


def _download(requirements: Path, target: Path, python: str, machine: str, count: int, report: Report) -> None:
    command = [sys.executable, "-m", "pip", *pip_arguments(requirements, target, python, machine)]
    lines: list[str] = []
    collected = 0
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines = [*lines[-14:], line.rstrip()]
            if line.startswith("Collecting "):
                collected += 1
                if collected % 10 == 0:
                    report(f"  {collected} of {count}")
    if process.returncode == 0:
        return
    output = "\n".join(lines)
    if "No module named pip" in output:
        raise BuildError(_STEP, f"{sys.executable} has no pip", f"{sys.executable} -m ensurepip, or install pip there")
    if "DO NOT MATCH THE HASHES" in output:
        advice = "a package is not the one that was pinned: do not use it; check the package index that pip asks"
    elif "No matching distribution" in output or "Could not find a version" in output:
        advice = (
            f"check that pip reaches its package index, and that each pin has a wheel for Python {python} on {machine}"
        )
    else:
        advice = "check that pip reaches its package index (its own configuration and PIP_* variables apply)"
    raise BuildError(_STEP, f"pip ended with exit code {process.returncode}:\n{output}", advice)
