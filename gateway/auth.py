"""API keys: where the gateway's own key comes from, who else has one, and whose a request carries."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import ExitCode, StartError

#: Who owns what is made with the gateway's own key. Not derived from the key, so that a new key keeps the owner.
DEFAULT_OWNER = "main"
KEY_FILE = "api-key"
#: How a key is written of which only the SHA-256 is known here.
HASHED = "sha256:"
_MIN_LENGTH = 8
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


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
        if configured.startswith(HASHED):
            raise StartError(
                "The configured API key cannot be used: only GatewayApp.api_keys may have a hash instead of a key.",
                ExitCode.CONFIGURATION,
            )
        return ApiKey(_checked(configured, "The configured API key"))
    path = data_directory / KEY_FILE
    try:
        return _read(path)
    except FileNotFoundError:
        return _make(path)
    except OSError as error:
        raise StartError(f"The API key in {path} cannot be read: {error.strerror}.", ExitCode.UNWRITABLE) from None


def all_keys(own: ApiKey, others: Mapping[str, object]) -> KeyCheck:
    """Return the check for the gateway's own key and those in `others`: owner's id → key or `sha256:` and its digest.

    Raises StartError that names the owner whose key cannot be used.
    """
    owners = {own.value: DEFAULT_OWNER}
    digests = {known_digest(own.value): DEFAULT_OWNER}
    for owner, key in others.items():
        what = f"The API key of {owner!r} in GatewayApp.api_keys"
        if not _OWNER.fullmatch(owner):
            text = f"{what} cannot be used: an owner's name has up to 64 letters, digits, '.', '_' and '-'."
        elif not isinstance(key, str) or (key.startswith(HASHED) and not _HEX_DIGEST.fullmatch(key[len(HASHED) :])):
            text = f"{what} cannot be used: it is a text, or {HASHED} and the 64 hexadecimal digits of its SHA-256."
        elif digests.setdefault(known_digest(_checked(key, what)), owner) != owner:
            text = f"{what} cannot be used: it is also that of {digests[known_digest(key)]!r}."
        else:
            owners[key] = owner
            continue
        raise StartError(text, ExitCode.CONFIGURATION)
    return KeyCheck(owners)


def known_digest(key: str) -> bytes:
    """Return the SHA-256 of a key as it is configured: itself, or `sha256:` and that digest."""
    return bytes.fromhex(key[len(HASHED) :]) if key.startswith(HASHED) else _digest(key)


class KeyCheck:
    """Tells whose key a request carries. Keys are looked up by digest: the time it takes says nothing of a key."""

    def __init__(self, owners: Mapping[str, str]) -> None:
        """`owners` maps each key, or `sha256:` and its digest, to its owner's id; only digests are held."""
        self._owners = {known_digest(key): owner for key, owner in owners.items()}

    def owner(self, headers: Mapping[str, str], token: str = "") -> str | None:
        """Return the owner by `x-api-key`, `Authorization: Bearer|token …` or `token`, or None without a valid key."""
        presented = headers.get("X-Api-Key") or _bearer(headers.get("Authorization", "")) or token
        return self._owners.get(_digest(presented)) if presented else None


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
