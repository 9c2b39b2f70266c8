"""BuildError: which step of making a kernel image failed, why, and what to do."""

from __future__ import annotations


class BuildError(Exception):
    """A kernel image could not be made. `str()` is what a person should read."""

    def __init__(self, step: str, reason: str, advice: str) -> None:
        super().__init__(step, reason, advice)
        self.step = step
        self.reason = reason
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.step} failed: {self.reason.strip()}\nWhat to do: {self.advice}"
