"""What the log says of a request: never a key that stands in its query string."""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from urllib.parse import unquote_plus

from tornado.web import RequestHandler

#: Parts of the names of query arguments whose values nobody is to read in a log.
_SECRET = ("token", "key", "secret", "password", "auth")
_HIDDEN = "[hidden]"
_log = logging.getLogger("tornado.access")


def log_request(handler: RequestHandler) -> None:
    """As Tornado does; but whoever is one too many is no fault of ours, and a flood of them would bury what is one."""
    status = handler.get_status()
    too_many = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    level = logging.INFO if status < 400 or too_many else logging.WARNING if status < 500 else logging.ERROR
    request = handler.request
    took, uri = 1000 * request.request_time(), shown_uri(request.uri)
    _log.log(level, "%d %s %s (%s) %.2f ms", status, request.method, uri, request.remote_ip, took)


def shown_uri(uri: str | None) -> str:
    """`uri` with the values of such query arguments as may be secret left out, however their names are written."""
    # Where a client has encoded the mark, or sent a fragment, a key may follow all the same.
    path, mark, query = (*re.split(r"(\?|%3[Ff]|#)", uri or "", maxsplit=1), "", "")[:3]
    # Some clients separate with ";".
    return path + mark + "".join(map(_shown, re.split(r"([&;])", query)))


def _shown(argument: str) -> str:
    name, equals, _ = argument.partition("=")
    plain = unquote_plus(name).lower()
    # Nothing after a name that is one: a key that stands there by itself is not an argument's name.
    return f"{name}={_HIDDEN}" if equals and any(word in plain for word in _SECRET) else argument
