"""What clients offer of permessage-deflate (RFC 7692): the offers that can be taken; the others are declined."""

from __future__ import annotations

import re

_NAME = "permessage-deflate"
#: Tornado knows what these mean, and fails on any other value. zlib writes no window of 8 bits.
_VALUES = {
    "server_no_context_takeover": re.compile(""),
    "client_no_context_takeover": re.compile(""),
    "server_max_window_bits": re.compile("9|1[0-5]"),
    "client_max_window_bits": re.compile("|[89]|1[0-5]"),
}


def acceptable(header: str) -> list[tuple[str, dict[str, str | None]]]:
    """Return the acceptable offers of a Sec-WebSocket-Extensions header, in its order; None: without a value."""
    offers = []
    for offer in header.split(","):
        name, *parameters = (part.strip() for part in offer.split(";"))
        values = _values(parameters) if name == _NAME else None
        if values is not None:
            offers.append((name, values))
    return offers


def _values(parameters: list[str]) -> dict[str, str | None] | None:
    """Return the parameters of an offer; None where one is unknown, wrong or there twice."""
    values: dict[str, str | None] = {}
    for parameter in parameters:
        name, equals, value = parameter.partition("=")
        value = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
        known = _VALUES.get(name)
        if known is None or name in values or (equals and not value) or not known.fullmatch(value):
            return None
        values[name] = value or None
    return values
