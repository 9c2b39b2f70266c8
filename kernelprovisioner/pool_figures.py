"""PoolFigures: what a pool has done and how it is, for health and metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kernelprovisioner.keeper import Upkeep
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.pool_events import Source
from kernelprovisioner.pool_state import PoolState
from kernelprovisioner.sandbox import SandboxState


@dataclass(slots=True)
class PoolFigures:
    """Totals since the pool began."""

    claims: Counter[Source] = field(default_factory=Counter)
    evictions: int = 0
    failed_starts: int = 0
    failed_probes: int = 0
    last_error: LaunchError | None = None

    def describe(self, state: PoolState, upkeep: Upkeep, now: float) -> dict[str, Any]:
        """Return counts by state, the line, what is wanted and why, totals; `now` is that of the events."""
        counts, stock = state.counts(), state.stock
        return {
            "min": state.minimum,
            "max": state.maximum,
            "starting": counts[SandboxState.STARTING],
            "warm": counts[SandboxState.WARM],
            "claimed": counts[SandboxState.CLAIMED],
            "removing": counts[SandboxState.GONE],
            "waiting": state.waiting,
            "line_bound": state.line.bound,
            "want": stock.want.count,
            "why": stock.want.why,
            "hit_rate": {"wanted": upkeep.hit_rate, "reached": self._hit_rate(), "claims": stock.claims},
            "schedule": [str(entry) for entry in upkeep.schedule],
            "failures_in_a_row": state.failures,
            "retry_in_seconds": round(max(0.0, state.retry_at - now), 1),
            "last_error": None if self.last_error is None else str(self.last_error),
            "claims": {source.value: self.claims[source] for source in Source},
            "evictions": self.evictions,
            "failed_starts": self.failed_starts,
            "failed_probes": self.failed_probes,
            "start_seconds": round(stock.start_seconds, 2),
        }

    def _hit_rate(self) -> float | None:
        """The share of claims that met a warm sandbox, of those that one would have served; None before the first."""
        plain = self.claims[Source.WARM] + self.claims[Source.STARTED]
        return round(self.claims[Source.WARM] / plain, 3) if plain else None
