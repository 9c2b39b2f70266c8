"""One module per resource, thin: parse, call, answer."""

from __future__ import annotations

import logging
from http import HTTPStatus

from tornado.web import Application, RequestHandler

from gateway.handlers.base import NotFoundHandler, Services
from gateway.handlers.exec import ExecHandler, exec_answer
from gateway.handlers.execute import ExecuteHandler, execute_answer
from gateway.handlers.health import DetailedHealthHandler, HealthHandler
from gateway.handlers.metrics import PoolMetricsHandler
from gateway.handlers.sessions import SessionHandler, SessionsHandler
from gateway.idempotency import EXEC, EXECUTE

_log = logging.getLogger("tornado.access")
#: How the answer of each kind of call looks.
SHAPES = {EXEC: exec_answer, EXECUTE: execute_answer}


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
        log_function=_log_request,
    )


def _log_request(handler: RequestHandler) -> None:
    """As Tornado does; but whoever is one too many is no fault of ours, and a flood of them would bury what is one."""
    status = handler.get_status()
    too_many = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    level = logging.INFO if status < 400 or too_many else logging.WARNING if status < 500 else logging.ERROR
    request = handler.request
    took = 1000 * request.request_time()
    _log.log(level, "%d %s %s (%s) %.2f ms", status, request.method, request.uri, request.remote_ip, took)
