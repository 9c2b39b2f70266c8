"""Which environment variables go into a sandbox: what was given for it, never what the giver runs in."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from kernelprovisioner.images import KernelImage

#: Names that describe the giver's own process or open its doors; patterns of fnmatch.
_DENIED = (
    *("BASH*", "CONDA*", "DBUS_*", "DISPLAY", "DOCKER_*", "HOME", "HOSTNAME", "JPY_*", "JUPYTER*", "LD_*", "LOGNAME"),
    *(
        "OLDPWD",
        "PATH",
        "PIPENV*",
        "POETRY*",
        "PS1",
        "PWD",
        "PYDEVD*",
        "PYTEST*",
        "PYTHON*",
        "SAMOVAR*",
        "SHELL",
        "SHLVL",
    ),
    *(
        "SSH_*",
        "SUDO_*",
        "TEMP",
        "TERM*",
        "TMP",
        "TMPDIR",
        "USER",
        "USERNAME",
        "VIRTUAL_ENV*",
        "WAYLAND*",
        "XAUTHORITY",
    ),
    *("XDG_*", "_"),
)
#: The whole environment of a kernel is bounded: it travels in one message. In bytes.
_MAX_BYTES = 256 * 1024


def added_by_caller(given: Mapping[str, str], own: Mapping[str, str], spec: Mapping[str, str]) -> dict[str, str]:
    """Return what goes into a sandbox.

    `given` is what the kernel's manager was called with (usually its whole environment and something more), `own` the
    environment of this process, `spec` the names that the kernelspec sets. A name whose value is the same in `own` was
    not added for the kernel.
    """
    chosen = {
        name: value
        for name, value in given.items()
        if name in spec or (own.get(name) != value and not denied(name) and _is_sane(name, value))
    }
    size = 0
    for name in list(chosen):
        needed = len(name) + len(chosen[name].encode(errors="replace"))
        if size + needed > _MAX_BYTES:
            del chosen[name]
        else:
            size += needed
    return chosen


def denied(name: str) -> bool:
    """Whether a variable never goes into a sandbox, whoever adds it."""
    return any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in _DENIED)


def allowed_in(image: KernelImage, env: Mapping[str, str]) -> dict[str, str]:
    """Return what a kernel image's own allow-list lets through, and no deny-list names."""
    return {
        name: value
        for name, value in env.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in image.environment_allow)
    }


def _is_sane(name: str, value: str) -> bool:
    if not name or "=" in name or "\0" in name + value:
        return False
    try:
        (name + value).encode()
    except UnicodeEncodeError:
        return False  # bytes that are no UTF-8 cannot travel in a message
    return True
