"""GET /metrics/pool."""

from __future__ import annotations

from gateway.errors import timestamp
from gateway.handlers.base import ExecFamilyHandler


class PoolMetricsHandler(ExecFamilyHandler):
    """How many sandboxes of each kernel image are in which state, who waits, and what the pool wants."""

    def get(self) -> None:
        self.check_monitoring()
        pools = {name: pool.describe() for name, pool in self.services.pools.items()}
        self.answer({"timestamp": timestamp(), "pool": pools})
