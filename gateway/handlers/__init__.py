"""One module per resource, thin: parse, call, answer."""

from __future__ import annotations

from tornado.web import Application

from gateway.access_log import log_request
from gateway.handlers.base import NotFoundHandler, Services
from gateway.handlers.exec import ExecHandler, exec_answer
from gateway.handlers.execute import ExecuteHandler, execute_answer
from gateway.handlers.health import DetailedHealthHandler, HealthHandler
from gateway.handlers.jupyter import jupyter_routes
from gateway.handlers.metrics import PoolMetricsHandler
from gateway.handlers.sessions import SessionHandler, SessionsHandler
from gateway.idempotency import EXEC, EXECUTE
from gateway.jupyter_services import JupyterServices

#: How the answer of each kind of call looks.
SHAPES = {EXEC: exec_answer, EXECUTE: execute_answer}


def make_application(services: Services, jupyter: JupyterServices) -> Application:
    """Return the Tornado application that serves all families."""
    known = {"services": services}
    return Application(
        [
            (r"/exec", ExecHandler, known),
            (r"/api/v1/execute", ExecuteHandler, known),
            (r"/api/v1/sessions", SessionsHandler, known),
            (r"/api/v1/sessions/([^/]+)", SessionHandler, known),
            (r"/api/v1(?:/.*)?", NotFoundHandler, known),
            (r"/health", HealthHandler, known),
            (r"/health/detailed", DetailedHealthHandler, known),
            (r"/metrics/pool", PoolMetricsHandler, known),
            *jupyter_routes(services, jupyter),
        ],
        default_handler_class=NotFoundHandler,
        default_handler_args=known,
        log_function=log_request,
    )
