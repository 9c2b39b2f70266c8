"""KernelSettings: what the supervisor tells the kernel process, in one inherited environment variable.

Standard library only, and no dataclass (its module costs megabytes): the supervisor imports this module as PID 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

VARIABLE = "SAMOVAR_KERNEL"


class KernelSettings(NamedTuple):
    """Endpoints, key and inherited descriptors of one kernel. `ip` is a path's beginning (ipc) or an address (tcp).

    `pipes` are the read ends behind fd 1 and 2, `ring` the unsent output, `log` where the kernel's own messages go.
    """

    transport: str
    ip: str
    ports: Mapping[str, int]
    key: str
    preload: tuple[str, ...]
    pipes: Mapping[str, int]
    ring: int
    log: int

    def to_environment(self) -> str:
        """Return the variable's value."""
        return json.dumps(self._asdict())

    @classmethod
    def take(cls) -> KernelSettings:
        """Return the settings and take them out of the environment, so that user code never sees the key."""
        values = json.loads(os.environ.pop(VARIABLE))
        return cls(**{**values, "preload": tuple(values["preload"])})
