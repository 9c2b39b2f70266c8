"""GET /health and /health/detailed."""

from __future__ import annotations

from http import HTTPStatus

from gateway.handlers.base import ExecFamilyHandler


class HealthHandler(ExecFamilyHandler):
    """Is the gateway there? Open to everybody."""

    def get(self) -> None:
        self.answer(self.services.health.brief())


class DetailedHealthHandler(ExecFamilyHandler):
    """Engine, images, pools, records and directories, each with its status; and how sandboxes ended, by cause."""

    async def get(self) -> None:
        self.check_monitoring()
        report = await self.services.health.detailed()
        broken = report["status"] == "unhealthy"
        self.answer(report, HTTPStatus.SERVICE_UNAVAILABLE if broken else HTTPStatus.OK)
