"""`samovar serve`: the gateway."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gateway.app import GatewayApp
from gateway.errors import StartError


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; what keeps it from starting is one sentence and an exit code (gateway.errors)."""
    app = GatewayApp()
    try:
        app.initialize(list(argv))
        app.start()
    except StartError as error:
        print(f"samovar serve: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        # Before the gateway handled signals itself there was nothing to clean up.
        return 130
    return 0
