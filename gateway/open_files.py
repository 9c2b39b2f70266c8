"""Open files: how many a gateway needs, and its own limit, which it raises as far as it may."""

from __future__ import annotations

import resource

#: What is open beside connections and sandboxes: libraries, the engine's connections, log, records.
_OWN = 112
#: Those of one sandbox (measured: 10).
_PER_SANDBOX = 12
#: As many are kept from connections at least.
_LEAST_RESERVED = 512
#: The limit is raised by so many more than that: files and the engine's connections come in waves.
_SPARE = 512
#: As many connections are served, however few files may be open.
_FEWEST_CONNECTIONS = 16


def needed(sandboxes: int, connections: int) -> int:
    """Return how many files are open with so many sandboxes and connections."""
    return _OWN + _PER_SANDBOX * sandboxes + connections


def room_for_connections(sandboxes: int, most: int) -> int:
    """Raise this process's limit for `sandboxes` and `most` connections; return how many of these there is room for."""
    reserved = max(_LEAST_RESERVED, needed(sandboxes, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + reserved + _SPARE
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        soft = limit
    free = most if soft == resource.RLIM_INFINITY else soft - reserved
    return max(_FEWEST_CONNECTIONS, min(most, free))
