"""API keys: where the gateway's key comes from, and whether a request carries it."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import ExitCode, StartError

#: Who owns what is made with the gateway's own key. Not derived from the key, so that a new key keeps the owner.
DEFAULT_OWNER = "main"
KEY_FILE = "api-key"
_MIN_LENGTH = 8


@dataclass(frozen=True)
class ApiKey:
    """The key that opens this gateway. `path`: where it is kept, None for one that was configured; `made`: just now."""

    value: str
    path: Path | None = None
    made: bool = False


def find_key(configured: str, data_directory: Path) -> ApiKey:
    """Return the configured key, else the one kept in the data directory, else a new one that is kept there, mode 0600.

    Raises StartError where the key is too short or the file cannot be used.
    """
    if configured:
        return ApiKey(_checked(configured, "The configured API key"))
    path = data_directory / KEY_FILE
    try:
        return _read(path)
    except FileNotFoundError:
        return _make(path)
    except OSError as error:
        raise StartError(f"The API key in {path} cannot be read: {error.strerror}.", ExitCode.UNWRITABLE) from None


class KeyCheck:
    """Tells whose key a request carries, in the same time for every wrong one."""

    def __init__(self, owners: Mapping[str, str]) -> None:
        """`owners` maps each key to its owner's id; only digests of the keys are held."""
        self._owners = [(_digest(key), owner) for key, owner in owners.items()]

    def owner(self, headers: Mapping[str, str]) -> str | None:
        """Return the owner by `x-api-key` or `Authorization: Bearer|token …`, or None without a valid key."""
        presented = headers.get("X-Api-Key") or _bearer(headers.get("Authorization", ""))
        if not presented:
            return None
        digest = _digest(presented)
        found: str | None = None
        for known, owner in self._owners:
            if hmac.compare_digest(known, digest):
                found = owner
        return found


def _bearer(header: str) -> str:
    scheme, _, value = header.partition(" ")
    return value.strip() if scheme.lower() in ("bearer", "token") else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _checked(key: str, what: str) -> str:
    if len(key) < _MIN_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise StartError(
            f"{what} cannot be used: it needs at least {_MIN_LENGTH} printable ASCII characters without blanks.",
            ExitCode.CONFIGURATION,
        )
    return key


def _read(path: Path) -> ApiKey:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(handle, encoding="ascii", errors="replace") as file:
        if stat.S_IMODE(os.fstat(handle).st_mode) & 0o077:
            raise StartError(
                f"The API key in {path} is readable by others; make it 0600, or delete it to get a new one.",
                ExitCode.CONFIGURATION,
            )
        return ApiKey(_checked(file.read(4096).strip(), f"The API key in {path}"), path)


def _make(path: Path) -> ApiKey:
    key = f"sk-{secrets.token_urlsafe(32)}"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        # Another gateway that starts at this moment made it.
        return _read(path)
    except OSError as error:
        raise StartError(f"The API key cannot be kept in {path}: {error.strerror}.", ExitCode.UNWRITABLE) from None
    with open(handle, "w", encoding="ascii") as file:
        file.write(key + "\n")
    return ApiKey(key, path, made=True)
