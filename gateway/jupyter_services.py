"""JupyterServices: what the handlers of the Jupyter interface answer with, beside what all handlers have."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from gateway.bounded_server import MAX_CONNECTIONS
from gateway.cors import CorsPolicy
from gateway.kernels import KernelRegistry
from gateway.kernelspecs import KernelSpecs
from gateway.notebook_sessions import NotebookSessions
from gateway.open_websockets import OpenWebsockets


@dataclass(frozen=True)
class JupyterServices:
    """`started`: when the gateway started; `calls`: when each owner last called."""

    kernels: KernelRegistry
    specs: KernelSpecs
    notebooks: NotebookSessions
    cors: CorsPolicy = field(default_factory=CorsPolicy)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    calls: dict[str, datetime] = field(default_factory=dict)
    websockets: OpenWebsockets = field(default_factory=lambda: OpenWebsockets(MAX_CONNECTIONS))

    def last_activity(self, owner: str) -> datetime:
        """When the owner, or one of its kernels, last did something."""
        moments = [kernel.last_activity for kernel in self.kernels.list(owner)]
        return max([self.started, self.calls.get(owner, self.started), *moments])
