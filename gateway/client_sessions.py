"""ClientSessions: the clients of one kernel, those that are away for a while included, and where each goes on."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

from gateway.client_channel import ClientChannel, ClientSession
from gateway.output_log import OutputLog

#: Clients that are away and remembered; past it the one that went first is forgotten.
MAX_AWAY = 64
MAX_SESSION_ID = 256


@dataclass
class Epoch:
    """A stretch of the log that a client may be given again. It ends when the kernel's process does."""

    #: the first number of the log that is part of it
    first: int = 1
    #: the number of the newest `restarting` status: JupyterLab connects anew when it gets one, so none comes twice
    restarting: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(8))


class ClientSessions:
    """Client sessions by what clients call them. The tags by which a kernel knows them are our own."""

    def __init__(self, log: OutputLog, window: float) -> None:
        """`window`: seconds that a client may be away."""
        self.epoch = Epoch()
        self._log = log
        self._window = window
        self._sessions: dict[str, ClientSession] = {}
        self._loop = asyncio.get_running_loop()
        #: until then clients that nobody knows may be those of an earlier gateway
        self._expected_until = 0.0

    def __iter__(self) -> Iterator[ClientSession]:
        return iter(self._sessions.values())

    @property
    def connected(self) -> list[ClientChannel]:
        """The open websockets."""
        return [session.client for session in self._sessions.values() if session.client is not None]

    def expect(self) -> None:
        """Clients of an earlier gateway will come back: they get all that has been heard since."""
        self._expected_until = self._loop.time() + self._window

    @property
    def expecting(self) -> bool:
        return self._loop.time() < self._expected_until

    def find(self, session_id: str) -> ClientSession | None:
        """The session that a client calls so."""
        return self._sessions.get(session_id)

    def add(self, session_id: str) -> ClientSession:
        """Make a new session, of a client that is away; it begins with what comes from now on."""
        self._forget_some()
        position = self.epoch.first - 1 if self.expecting else self._log.last
        session = ClientSession(f"c-{secrets.token_hex(8)}".encode(), position, gone_at=self._loop.time())
        self._sessions[session_id or secrets.token_hex(16)] = session
        return session

    def start_of(self, session: ClientSession, after: str | None) -> int:
        """The number after which a new connection goes on.

        `after`: what a numbered ping said last to a client that counts, `epoch:number`, or a number alone. One that
        makes no sense here, as that of another epoch, means all of this epoch.
        """
        start = self.epoch.first - 1
        if after is None:
            return max(start, session.position)
        epoch, _, number = after.rpartition(":")
        if epoch not in ("", self.epoch.id) or not (number.isascii() and number.isdigit()) or len(number) > 18:
            return start
        return max(start, int(number)) if int(number) <= self._log.last else start

    def new_epoch(self) -> None:
        """Nothing that the log has by now comes to a client that reconnects."""
        self.epoch.first = self._log.last + 1
        self.epoch.id = Epoch().id

    def _forget_some(self) -> None:
        """Forget who has been away for too long, or is one too many."""
        now = self._loop.time()
        away = sorted((session.gone_at, key) for key, session in self._sessions.items() if session.client is None)
        for index, (gone_at, key) in enumerate(away):
            if now - gone_at > self._window or len(away) - index >= MAX_AWAY:
                del self._sessions[key]
