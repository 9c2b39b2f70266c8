"""Claim: what makes a warm kernel personal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

MAX_HOLD = 10.0
"""Seconds that shell requests may be held at most."""


class ClaimRefused(Exception):
    """The claim request is not valid, or this kernel has an owner already."""


@dataclass(frozen=True)
class Claim:
    """One claim request, checked. `hold` is in seconds."""

    key: bytes
    kernel_id: str
    env: dict[str, str]
    session_name: str | None
    notice: str | None
    hold: float

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Claim:
        """Return the claim that `content` asks for. Raises ClaimRefused, naming the field that is wrong."""
        env = content.get("env") or {}
        if not isinstance(env, dict) or not all(isinstance(item, str) for pair in env.items() for item in pair):
            raise ClaimRefused("env must be an object of strings")
        bad = next((name for name in env if not name or "=" in name or "\0" in name + env[name]), None)
        if bad is not None:
            raise ClaimRefused(f"env: {bad!r} cannot be a variable of the environment")
        try:
            for pair in env.items():
                "".join(pair).encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise ClaimRefused(f"env: {error}") from None
        hold = content.get("hold_ms", 0)
        if not isinstance(hold, int | float) or not 0 <= hold <= MAX_HOLD * 1000:
            raise ClaimRefused(f"hold_ms must be a number from 0 to {MAX_HOLD * 1000:.0f}")
        return cls(
            key=requested_key(content),
            kernel_id=_text(content, "kernel_id") or "",
            env=env,
            session_name=_text(content, "session_name"),
            notice=_text(content, "notice"),
            hold=hold / 1000,
        )

    def apply(self, user_ns: dict[str, Any]) -> None:
        """Take over environment and session name."""
        os.environ.update(self.env)
        if self.session_name:
            user_ns["__session__"] = self.session_name


def requested_key(content: dict[str, Any]) -> bytes:
    """Return the key that `content` asks for. Raises ClaimRefused where it is none; an empty one would sign nothing."""
    key = content.get("key")
    try:
        if isinstance(key, str) and key:
            return key.encode()
    except UnicodeEncodeError:
        pass
    raise ClaimRefused("key must be a string that is not empty")


def _text(content: dict[str, Any], field: str) -> str | None:
    value = content.get(field)
    if value is None or isinstance(value, str):
        return value
    raise ClaimRefused(f"{field} must be a string")
