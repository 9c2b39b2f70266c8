"""ConfigurableLauncher: what the launchers share, so that their settings are traits."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from traitlets import MetaHasTraits
from traitlets.config import LoggingConfigurable

from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import Endpoint, Launcher, LaunchError
from kernelprovisioner.runtime import OwnerDirectory, RuntimeDirectoryError, RuntimeRoot, check_socket_path

#: Jupyter's five channels in the order of their ipc port numbers, 1 to 5.
CHANNELS = ("shell", "iopub", "stdin", "control", "hb")

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMEXPR_MAX_THREADS",
    "LOKY_MAX_CPU_COUNT",
    "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "PYTHON_CPU_COUNT",
)


class LauncherMeta(abc.ABCMeta, MetaHasTraits):
    """The metaclass of a Launcher that has traits."""


class ConfigurableLauncher(Launcher, LoggingConfigurable, metaclass=LauncherMeta):
    """A launcher with traits and an owner directory, which it holds from `start()` to `stop()`."""

    def __init__(self, runtime: RuntimeRoot, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.runtime = runtime
        self._owner: OwnerDirectory | None = None
        #: whether our owner directory still holds what a dead gateway left
        self._unsettled = False

    @property
    def owner(self) -> OwnerDirectory:
        """The owner directory. Raises RuntimeError before `start()` and after `stop()`."""
        if self._owner is None:
            raise RuntimeError(f"the {self.name} launcher is not started")
        return self._owner

    def _take_owner(self, kind: str, resume: bool) -> list[OwnerDirectory]:
        """Make our owner directory, or continue as a dead gateway. Return the dead owners of our kind, to be reaped.

        Blocks. Raises LaunchError.
        """
        with runtime_errors_as_launch_errors():
            return self._took_owner(kind, resume)

    def _took_owner(self, kind: str, resume: bool) -> list[OwnerDirectory]:
        dead: list[OwnerDirectory] = []
        for owner in self.runtime.dead_owners(gateways=resume):
            # What another engine's owner left cannot be seen from here.
            if owner.read_kind() in (kind, None):
                dead.append(owner)
            else:
                owner.release()
        gateways = [owner for owner in dead if resume and owner.is_gateways and owner.read_kind() == kind]
        if gateways:
            # Nothing is written: a full disk must not keep a gateway from what is there already.
            self._owner = max(gateways, key=lambda owner: owner.path.stat().st_mtime)
            self._owner.continue_as_gateway()
            self._unsettled = True
            dead.remove(self._owner)
            return dead
        self._owner = self.runtime.owner_directory()
        self._owner.write_kind(kind)
        if resume:
            self._owner.mark_gateway()
        return dead

    def _give_owner_up(self, keep: bool) -> None:
        """Remove our owner directory; with `keep`, or while a dead gateway's things are in it, leave it. Blocks."""
        if self._owner is None:
            return
        if keep or self._unsettled:
            self._owner.release()
        else:
            # A holder that was killed leaves its link.
            self.runtime.remove_links_into(self._owner)
            self._owner.close()
        self._owner = None


def ipc_endpoints(directory: Path) -> tuple[dict[str, Endpoint], Endpoint]:
    """Return the channels' endpoints and the supervisor's in a sandbox's directory."""
    channels = {
        name: Endpoint(path=check_socket_path(directory / f"k-{port}")) for port, name in enumerate(CHANNELS, start=1)
    }
    return channels, Endpoint(path=check_socket_path(directory / "sup"))


def thread_variables(image: KernelImage) -> dict[str, str]:
    """Return the variables that tell libraries how many threads to start: as many as the sandbox has CPUs."""
    return dict.fromkeys(_THREAD_VARIABLES, str(max(1, math.floor(image.limits.cpus))))


@contextlib.contextmanager
def runtime_errors_as_launch_errors() -> Iterator[None]:
    """Turn what is wrong with the runtime directory into a LaunchError, a full disk included."""
    try:
        yield
    except RuntimeDirectoryError as error:
        raise LaunchError(str(error)) from error
    except OSError as error:
        raise LaunchError(f"the runtime directory cannot be used: {error}") from error
