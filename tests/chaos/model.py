"""What may be answered: each request's one right answer, or an error with a cause that was really injected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.faults import ENGINE_KINDS, GATEWAY_KINDS, Happening, History, Kind

#: Marks of our cells in outputs: an answer may hold its own request's only.
MARK = re.compile(r"(?:nonce|tag)-[0-9a-f]+")
#: What the sentences of the causes say, for places that have only the sentence.
_SENTENCES = {
    "killed by signal": "signal",
    "killed or removed from outside": "removed",
    "ended with exit code": "exited",
    "ran out of memory": "out_of_memory",
    "time limit": "time_limit",
    "gave its sandbox up": "evicted",
    "container engine": "engine",
    "the engine": "engine",
    "gateway": "gateway",
    "protocol": "protocol",
    "could not be started": "start_failed",
}
_WAITED = re.compile(r"became free within ([0-9]+) s")
_UNCLAIMED = frozenset({Kind.WARM, Kind.WARMING})
#: How long the news of a sandbox's end may take to a gateway that lives.
NEWS_SECONDS = 1.0
_LOST = "former variables and files are gone"


def cell_code(nonce: str, tag: str, seconds: float) -> str:
    """A cell that counts in its session and prints who it is, at its begin and at its end."""
    return f"""\
import time
n, tag = globals().get("n", 0) + 1, globals().get("tag", {tag!r})
ran = globals().get("ran", [])
print({nonce!r}, n, tag, *(["TWICE"] if {nonce!r} in ran else []), flush=True)
ran.append({nonce!r})
time.sleep({seconds})
print({nonce!r}, "end")
"""


def cell_text(nonce: str, tag: str, count: int) -> str:
    """What the cell prints when it is its session's `count`-th one."""
    return f"{nonce} {count} {tag}\n{nonce} end\n"


class Violation(Exception):
    """An answer that no injected fault explains."""


def causes(found: Iterable[Happening], containers: Iterable[str]) -> set[str]:
    """The causes that a sandbox of one of these containers may have died of, when these faults were injected."""
    found, ours = list(found), set(containers)
    allowed: set[str] = set()
    for happening in found:
        hit = bool(happening.containers & ours)
        if hit or happening.kind in ENGINE_KINDS:
            # What ends while no gateway is there is only found gone by the next one.
            away = [other for other in found if other.kind in GATEWAY_KINDS]
            until = happening.begin + NEWS_SECONDS if hit else happening.end
            if any(other.overlaps(happening.begin, until) for other in away):
                allowed.add("gateway")
        match happening.kind:
            case Kind.KERNEL if hit:
                allowed.add("signal")
            case Kind.CLAIMED | Kind.WARM | Kind.WARMING if hit:
                allowed.add("removed")
            case Kind.ENGINE_KILL:
                allowed.add("engine")
            case Kind.ENGINE_RESTART:
                # An engine that is asked to end stops its containers first, and says so.
                allowed |= {"engine", "removed"}
            case Kind.GATEWAY_STOP:
                allowed.add("gateway")
            case _:
                pass
    return allowed


def causes_in(text: str) -> set[str]:
    """The causes that a text for people names."""
    return {cause for sentence, cause in _SENTENCES.items() if sentence in text}


@dataclass
class SessionModel:
    """What one client knows of its session, and what its next answer may therefore be."""

    tag: str
    history: History
    created: float
    session_id: str | None = None
    #: what the session's counter may be now
    counts: set[int] = field(default_factory=lambda: {0})
    #: since when its sandbox may have been hit without our knowing
    since: float = 0.0
    containers: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.since = self.created

    def take(self, nonce: str, body: dict[str, Any], sent: float, received: float) -> str:
        """Check the answer (200) of a request that was first sent at `sent`; return what it was, in one word.

        `body` has the family's common fields and `text` (standard output) and `notes` (standard error). Raises
        Violation.
        """
        self._check_marks(nonce, body)
        if body.get("container_id"):
            self.containers.add(body["container_id"])
        found = self.history.within(self.since, received)
        if self.session_id not in (None, body["session_id"]):
            self._forgotten(found)
        self.session_id = body["session_id"]
        if body["status"] == "ok":
            return self._ok(nonce, body, sent, found)
        cause = body.get("exit_cause") or {}
        if body["status"] != "died" or not cause:
            raise Violation(f"status {body['status']} without an injected reason")
        self._died(cause, found, sent)
        return f"died of {cause['cause']}"

    def unknown(self, received: float) -> None:
        """The gateway does not know the session (404). Raises Violation."""
        self._forgotten(self.history.within(self.since, received))
        self.session_id = None

    def _ok(self, nonce: str, body: dict[str, Any], sent: float, found: list[Happening]) -> str:
        notes, text = body["notes"], body["text"]
        if _LOST in notes:
            told = causes_in(notes) & (causes(found, self.containers) | {"evicted"})
            if not told:
                raise Violation(f"the session's loss has no injected cause: {notes!r}")
            self.counts = {0}
            if "evicted" in told:
                found = []
        right = {count + 1: cell_text(nonce, self.tag, count + 1) for count in self.counts}
        for count, expected in right.items():
            if text == expected:
                self.counts, self.since = {count}, sent
                return "ok"
        restarted = [happening for happening in found if happening.kind in GATEWAY_KINDS]
        for expected in right.values():
            # A gateway that came back in mid-cell has the rest of its output only, and says so.
            if restarted and "lost" in notes and text in expected:
                self.counts, self.since = set(right), sent
                return "ok, output lost"
        raise Violation(f"stdout is {text!r}, not one of {sorted(right.values())}; stderr {notes!r}")

    def _died(self, cause: dict[str, Any], found: list[Happening], sent: float) -> None:
        if cause["session_lost"]:
            allowed = causes(found, self.containers)
            self.counts = {0}
        else:
            allowed = {"gateway"} if any(happening.kind in GATEWAY_KINDS for happening in found) else set()
            self.counts |= {count + 1 for count in self.counts}
        self.since = sent
        if cause["cause"] not in allowed:
            raise Violation(f"died of {cause['cause']} ({cause['text']}), injected was {sorted(allowed) or 'nothing'}")

    def _forgotten(self, found: list[Happening]) -> None:
        """A gateway forgets what it did not have to keep: stopped in order, or the session held no sandbox."""
        gateways = [happening for happening in found if happening.kind in GATEWAY_KINDS]
        stopped = any(happening.kind is Kind.GATEWAY_STOP for happening in gateways)
        without_sandbox = self.counts == {0} or causes(found, self.containers)
        if not gateways or not (stopped or without_sandbox):
            raise Violation(f"the session {self.session_id} is forgotten; its counter was {sorted(self.counts)}")
        self.counts = {0}

    def _check_marks(self, nonce: str, body: dict[str, Any]) -> None:
        foreign = set(MARK.findall(str(body))) - {nonce, self.tag}
        if foreign:
            raise Violation(f"the answer holds marks of other requests: {sorted(foreign)}")
        if "TWICE" in body["text"]:
            raise Violation("the cell ran twice")


def check_refusal(history: History, text: str, sent: float, received: float) -> None:
    """Check a 503 or 429: is it true what it says? Raises Violation."""
    found = history.within(sent - 60.0, received)
    kinds = {happening.kind for happening in found}
    waited = _WAITED.search(text)
    if waited is not None:
        true = received - sent > float(waited[1]) - 1
    elif "shutting down" in text:
        true = bool(kinds & {Kind.GATEWAY_STOP, Kind.GATEWAY_UPGRADE})
    elif "No sandbox can be started" in text:
        true = bool(kinds & (ENGINE_KINDS | {Kind.WARMING, Kind.WARM}))
    else:
        true = bool(kinds & (ENGINE_KINDS | GATEWAY_KINDS))
    if not true:
        raise Violation(f"refused, and what it says was not injected: {text}")


def check_broken(history: History, error: Exception, sent: float, received: float) -> None:
    """Check a connection that broke or was refused: only a gateway that is away does that. Raises Violation."""
    if not any(happening.kind in GATEWAY_KINDS for happening in history.within(sent, received)):
        raise Violation(f"the connection broke while the gateway ran: {error!r}")


def check_notebook_error(history: History, text: str, containers: Iterable[str], began: float, ended: float) -> str:
    """Check a notebook's error; return the cause. Raises Violation."""
    found = history.within(began, ended)
    # One that was hit while it started never told its container.
    ours = set(containers) or set().union(*(each.containers for each in found if each.kind in _UNCLAIMED))
    allowed = causes(found, ours)
    if any(happening.kind in GATEWAY_KINDS for happening in found):
        # Without a connection for 30 s the holder gives up; a gateway that stops takes no claims.
        allowed.add("gateway")
    told = causes_in(text)
    if not told & allowed:
        raise Violation(f"the notebook's error tells of {sorted(told)}, injected was {sorted(allowed)}: {text}")
    return sorted(told & allowed)[0]
