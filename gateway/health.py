"""Health: what /health and /health/detailed tell."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gateway.errors import timestamp
from kernelprovisioner.exit_log import ExitLog

_CHECK_SECONDS = 5.0
_EXITS_SHOWN = 10

Check = Callable[[], Awaitable[dict[str, Any]]]
"""Returns what is known of one service, with `status`: healthy, degraded or unhealthy, which an exception is, too."""


class Health:
    """Runs the checks of all services side by side, each with a deadline."""

    def __init__(self, version: str, checks: Mapping[str, Check], exits: ExitLog | None = None) -> None:
        """`exits`: how the gateway's sandboxes ended."""
        self._version = version
        self._checks = checks
        self._exits = ExitLog() if exits is None else exits

    def brief(self) -> dict[str, Any]:
        """The gateway is there: that is all that is said to everybody."""
        return {"status": "healthy", "version": self._version, "timestamp": timestamp()}

    async def detailed(self) -> dict[str, Any]:
        """Every service with its status and `response_time_ms`, how many are healthy, and how sandboxes ended."""
        names = list(self._checks)
        found = await asyncio.gather(*(_timed(self._checks[name]) for name in names))
        services = dict(zip(names, found, strict=True))
        healthy = sum(service["status"] == "healthy" for service in services.values())
        broken = any(service["status"] == "unhealthy" for service in services.values())
        return {
            "status": "unhealthy" if broken else "healthy" if healthy == len(services) else "degraded",
            "version": self._version,
            "timestamp": timestamp(),
            "services": services,
            "summary": {
                "total_services": len(services),
                "healthy_services": healthy,
                "unhealthy_services": sum(service["status"] == "unhealthy" for service in services.values()),
            },
            "exits": {
                "counts": self._exits.counts(),
                "last": [entry.as_dict() for entry in self._exits.last(_EXITS_SHOWN)],
            },
        }


async def _timed(check: Check) -> dict[str, Any]:
    began = time.monotonic()
    try:
        async with asyncio.timeout(_CHECK_SECONDS):
            found = await check()
    except TimeoutError:
        found = {"status": "unhealthy", "error": f"no answer within {_CHECK_SECONDS:g} s"}
    except Exception as error:
        found = {"status": "unhealthy", "error": str(error) or type(error).__name__}
    return {**found, "response_time_ms": round((time.monotonic() - began) * 1000, 2)}
