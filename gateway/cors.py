"""CorsPolicy: which pages of other origins may call the Jupyter interface from a browser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

_METHODS = "GET, HEAD, POST, PATCH, DELETE, OPTIONS"
_HEADERS = "accept, content-type, authorization, x-api-key, x-xsrftoken"


@dataclass(frozen=True)
class CorsPolicy:
    """As jupyter_server's options of these names. Where none is set a valid token passes with any origin.

    No cookie is ever read here, so a page has nothing to ride on but a token that it knows.
    """

    allow_origin: str = ""
    allow_origin_pat: re.Pattern[str] | None = None
    allow_credentials: bool = False

    def permits(self, origin: str | None, host: str | None) -> bool:
        """Whether a request with these headers `Origin` and `Host` is served; those without Origin always are."""
        if origin is None or not self._restricted or self._names(origin):
            return True
        try:
            return bool(host) and urlsplit(origin).netloc.lower() == str(host).lower()
        except ValueError:
            # "http://[" is nobody's.
            return False

    def headers(self, origin: str | None, *, authenticated: bool) -> dict[str, str]:
        """The headers of an answer to `origin`; `authenticated`: whether the request carried a valid token."""
        found = {}
        if self.allow_origin:
            found["Access-Control-Allow-Origin"] = self.allow_origin
        elif origin is not None:
            # A cache must not give one origin's answer to another.
            found["Vary"] = "Origin"
            if self._names(origin) if self._restricted else authenticated:
                found["Access-Control-Allow-Origin"] = origin
        if self.allow_credentials:
            found["Access-Control-Allow-Credentials"] = "true"
        return found

    def preflight(self, origin: str | None) -> dict[str, str]:
        """The headers of the answer to OPTIONS, which never carries a token: the request itself has to."""
        allowed = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Allow-Headers": _HEADERS}
        return self.headers(origin, authenticated=True) | allowed

    @property
    def _restricted(self) -> bool:
        return bool(self.allow_origin) or self.allow_origin_pat is not None

    def _names(self, origin: str) -> bool:
        if self.allow_origin:
            return self.allow_origin == "*" or self.allow_origin.lower() == origin.lower()
        return self.allow_origin_pat is not None and self.allow_origin_pat.fullmatch(origin.lower()) is not None
