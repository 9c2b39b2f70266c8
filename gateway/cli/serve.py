"""`samovar serve`: the gateway."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from gateway.app import GatewayApp
from gateway.errors import StartError


def main(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM; what keeps it from starting is one sentence and an exit code (gateway.errors)."""
    app = GatewayApp()
    code = 0
    try:
        app.initialize(list(argv))
        app.start()
    except StartError as error:
        print(f"samovar serve: {error}", file=sys.stderr)
        code = int(error.exit_code)
    except KeyboardInterrupt:
        # Before the gateway handled signals itself there was nothing to clean up.
        code = 130
    if app.left:
        # Threads that wait for an engine which does not answer would hold up an ordinary exit.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code
