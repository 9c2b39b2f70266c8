"""Why a claim ended without a sandbox, through no fault of the sandboxes."""

from __future__ import annotations


class PoolError(Exception):
    """A claim ended without a sandbox, through no fault of the sandboxes."""


class PoolBusy(PoolError):
    """It may go better in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PoolFull(PoolBusy):
    """The waiting line is as long as it may get."""


class ClaimTimeout(PoolBusy):
    """No sandbox became free before the claim's deadline."""


class PoolStopped(PoolError):
    """The pool hands out nothing any more: the gateway drains."""
