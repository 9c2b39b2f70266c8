"""AnswerStore: what calls with an Idempotency-Key were answered, and which of them were sent to a kernel, on disk."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

STORE_FILE = "answers.sqlite"
#: How long an answer is kept, in seconds; and how many of them, and their bytes: past it the oldest go, of the owner
#: that has most.
KEPT_SECONDS = 24 * 3600.0
MAX_ANSWERS = 10_000
MAX_BYTES = 256 * 1024 * 1024
#: How long another gateway that shares the data directory may keep us waiting.
_BUSY_SECONDS = 5.0
_SCHEMA = """
CREATE TABLE calls (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    kind TEXT NOT NULL,
    gateway TEXT NOT NULL,
    session_id TEXT NOT NULL,
    sandbox_id TEXT NOT NULL,
    container_id TEXT NOT NULL,
    msg_id TEXT NOT NULL,
    at REAL NOT NULL,
    size INTEGER NOT NULL DEFAULT 0,
    answer BLOB,
    PRIMARY KEY (owner, key)
);
CREATE INDEX calls_by_age ON calls (at, size);
"""
#: A store of another shape is made anew: what is in it is of use for a day only.
_VERSION = 1
T = TypeVar("T")


class StoreError(Exception):
    """The store cannot be read or written; the text says why."""


@dataclass(frozen=True)
class KeyedCall:
    """A call with an Idempotency-Key: whose, the key, and what tells this call from another one under the same key."""

    owner: str
    key: str
    kind: str
    fingerprint: bytes

    @property
    def place(self) -> tuple[str, str]:
        """What no two calls share."""
        return self.owner, self.key


@dataclass(frozen=True)
class SentCell:
    """Where a call's cell was sent: the gateway (its owner directory), session, sandbox, and the request's id."""

    gateway: str
    session_id: str
    sandbox_id: str
    container_id: str
    msg_id: str


@dataclass(frozen=True)
class KeptCall:
    """A call whose cell was sent once. `answer` is None as long as nobody has recorded one."""

    call: KeyedCall
    cell: SentCell
    answer: bytes | None


class AnswerStore:
    """One SQLite file. Nothing blocks the loop; a call is on disk, synced, when a method returns."""

    def __init__(self, path: Path) -> None:
        """`path` is made where it does not exist, by the first call that needs it."""
        self.path = path
        self._thread = ThreadPoolExecutor(1, "samovar-answers")
        self._database: sqlite3.Connection | None = None
        self._closed = False

    async def close(self) -> None:
        """Close the file and end the thread. May be called again."""
        if not self._closed:
            self._closed = True
            await self._call(self._close)
            self._thread.shutdown()

    async def find(self, call: KeyedCall) -> KeptCall | None:
        """The call under the same key, whatever its fingerprint. Raises StoreError."""
        return await self._call(self._find, call)

    async def sent(self, call: KeyedCall, cell: SentCell) -> None:
        """Record that the call's cell is about to be sent: from now on it is never sent again. Raises StoreError."""
        await self._call(self._sent, call, cell)

    async def answered(self, call: KeyedCall, answer: bytes) -> None:
        """Record the answer of a call that was sent. Raises StoreError."""
        await self._call(self._answered, call, answer)

    async def unanswered(self, gateway: str) -> list[KeptCall]:
        """The calls that this gateway sent and did not record an answer of. Raises StoreError."""
        return await self._call(self._unanswered, gateway)

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        if self._closed and function != self._close:
            raise StoreError(f"{self.path}: it is closed, since the gateway stops")
        work = functools.partial(self._guarded, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _guarded(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return function(*arguments)
        except (sqlite3.Error, OSError) as error:
            # A connection whose disk was full or whose file went is of no use: the next call opens a new one.
            if self._database is not None:
                self._database.close()
                self._database = None
            raise StoreError(f"{self.path}: {error}") from error

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            self.path.touch(mode=0o600)
            database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                database.execute("PRAGMA journal_mode = WAL")
                # Also after a power cut no cell runs twice.
                database.execute("PRAGMA synchronous = FULL")
                (version,) = database.execute("PRAGMA user_version").fetchone()
                if version != _VERSION:
                    make = f"DROP TABLE IF EXISTS calls; {_SCHEMA} PRAGMA user_version = {_VERSION};"
                    database.executescript(f"BEGIN IMMEDIATE; {make} COMMIT")
            except BaseException:
                database.close()
                raise
            self._database = database
        return self._database

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _find(self, call: KeyedCall) -> KeptCall | None:
        row = self._open().execute(
            f"SELECT {_COLUMNS} FROM calls WHERE owner = ? AND key = ? AND at > ?",
            (call.owner, call.key, time.time() - KEPT_SECONDS),
        )
        found = row.fetchone()
        return None if found is None else _kept(found)

    def _sent(self, call: KeyedCall, cell: SentCell) -> None:
        database = self._open()
        database.execute("DELETE FROM calls WHERE at <= ?", (time.time() - KEPT_SECONDS,))
        database.execute(
            "INSERT INTO calls (owner, key, kind, fingerprint, gateway, session_id, sandbox_id, container_id, msg_id,"
            " at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(call.owner, call.key, call.kind, call.fingerprint),
                *(cell.gateway, cell.session_id, cell.sandbox_id, cell.container_id, cell.msg_id),
                time.time(),
            ),
        )

    def _answered(self, call: KeyedCall, answer: bytes) -> None:
        database = self._open()
        found = database.execute(
            "UPDATE calls SET answer = ?, size = ?, at = ? WHERE owner = ? AND key = ?",
            (answer, len(answer), time.time(), call.owner, call.key),
        )
        if not found.rowcount:
            raise StoreError(f"{self.path}: what was recorded of the call before it ran is not there any more")
        count, size = database.execute("SELECT count(*), sum(size) FROM calls").fetchone()
        if count > MAX_ANSWERS or size > MAX_BYTES:
            # What somebody keeps costs others nothing: rows go by how much younger their own owner has. One that is not
            # answered stays: it is all that keeps its cell from running twice.
            database.execute(
                "WITH own AS (SELECT rowid AS id, at, size, row_number() OVER newest AS number, sum(size) OVER newest"
                " AS bytes FROM calls WHERE answer IS NOT NULL"
                " WINDOW newest AS (PARTITION BY owner ORDER BY at DESC, rowid DESC))"
                " DELETE FROM calls WHERE rowid IN (SELECT id FROM (SELECT id,"
                " row_number() OVER (ORDER BY number, at DESC, id DESC) AS number,"
                " sum(size) OVER (ORDER BY bytes, at DESC, id DESC) AS bytes FROM own) WHERE number > ? OR bytes > ?)",
                (MAX_ANSWERS, MAX_BYTES),
            )

    def _unanswered(self, gateway: str) -> list[KeptCall]:
        rows = self._open().execute(
            f"SELECT {_COLUMNS} FROM calls WHERE gateway = ? AND answer IS NULL AND at > ?",
            (gateway, time.time() - KEPT_SECONDS),
        )
        return [_kept(row) for row in rows]


_COLUMNS = "owner, key, kind, fingerprint, gateway, session_id, sandbox_id, container_id, msg_id, answer"


def _kept(row: tuple[str, str, str, bytes, str, str, str, str, str, bytes | None]) -> KeptCall:
    owner, key, kind, fingerprint, gateway, session_id, sandbox_id, container_id, msg_id, answer = row
    return KeptCall(
        KeyedCall(owner, key, kind, fingerprint),
        SentCell(gateway, session_id, sandbox_id, container_id, msg_id),
        answer,
    )
