"""Why a claim ended without a sandbox, through no fault of the sandboxes."""

from __future__ import annotations


class PoolError(Exception):
    """A claim ended without a sandbox, through no fault of the sandboxes."""


class PoolFull(PoolError):
    """The waiting line is as long as it may get; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClaimTimeout(PoolError):
    """No sandbox became free before the claim's deadline; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PoolStopped(PoolError):
    """The pool hands out nothing any more: the gateway drains."""
