"""One module per resource, thin: parse, call, answer."""

from __future__ import annotations

from tornado.web import Application

from gateway.handlers.base import NotFoundHandler, Services
from gateway.handlers.exec import ExecHandler
from gateway.handlers.execute import ExecuteHandler
from gateway.handlers.health import DetailedHealthHandler, HealthHandler
from gateway.handlers.metrics import PoolMetricsHandler
from gateway.handlers.sessions import SessionHandler, SessionsHandler


def make_application(services: Services) -> Application:
    """Return the Tornado application that serves all families."""
    known = {"services": services}
    return Application(
        [
            (r"/exec", ExecHandler, known),
            (r"/api/v1/execute", ExecuteHandler, known),
            (r"/api/v1/sessions", SessionsHandler, known),
            (r"/api/v1/sessions/([^/]+)", SessionHandler, known),
            (r"/health", HealthHandler, known),
            (r"/health/detailed", DetailedHealthHandler, known),
            (r"/metrics/pool", PoolMetricsHandler, known),
        ],
        default_handler_class=NotFoundHandler,
        default_handler_args=known,
    )
