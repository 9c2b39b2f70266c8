"""One REST client: runs cells in sessions that come and go, repeats what broke, and checks every answer."""

from __future__ import annotations

import http.client
import random
import secrets
import threading
import time
import urllib.error
from collections import Counter
from typing import Any

from tests.chaos.event_log import EventLog
from tests.chaos.faults import GATEWAY_KINDS, History
from tests.chaos.model import SessionModel, Violation, cell_code, check_broken, check_refusal
from tests.gateway_process import Answer, GatewayProcess

#: How long one request may take, with all its repetitions, while things break.
REQUEST_SECONDS = 280.0
#: How long a gateway that lives lets a request wait in line.
LINE_SECONDS = 120.0
#: Cells in one session, at least and at most.
CELLS = (10, 40)
_BROKEN = (OSError, http.client.HTTPException)


class RestClient(threading.Thread):
    """Asks until `stop` is set. `family`: `exec` or `execute`, whose interface it uses."""

    def __init__(
        self, name: str, gateway: GatewayProcess, history: History, log: EventLog, stop: threading.Event, seed: str
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.outcomes: Counter[str] = Counter()
        self.model: SessionModel | None = None
        self._gateway = gateway
        self._history = history
        self._log = log
        self._stopped = stop
        self._dice = random.Random(f"{seed} {name}")
        self._family = self._dice.choice(("exec", "execute"))

    @property
    def containers(self) -> set[str]:
        """The containers that its session has had."""
        return set(self.model.containers) if self.model is not None else set()

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._session()
        except Exception as error:
            self._log.violation(self.name, f"the client itself failed: {error!r}")

    def last_cell(self) -> None:
        """Once more, now that nothing breaks: the session must be there, and be right."""
        if self.model is not None:
            self._request(self.model, 0.0)

    def _session(self) -> None:
        self.model = model = SessionModel(f"tag-{secrets.token_hex(6)}", self._history, time.monotonic())
        for _ in range(self._dice.randint(*CELLS)):
            if self._stopped.wait(self._dice.choice((0, 0, self._dice.random(), 2 * self._dice.random()))):
                return
            seconds = self._dice.choice((0.0, 0.0, 0.0, self._dice.random(), 2 * self._dice.random()))
            if not self._request(model, round(seconds, 2)):
                break
        self._end_session(model)

    def _request(self, model: SessionModel, seconds: float) -> bool:
        """One cell, until it is answered; return whether the session is of further use."""
        nonce = f"nonce-{secrets.token_hex(8)}"
        sent = time.monotonic()
        try:
            outcome = self._until_answered(model, nonce, cell_code(nonce, model.tag, seconds), sent)
        except Violation as violation:
            self._log.violation(self.name, f"{nonce} in session {model.session_id}: {violation}")
            self.outcomes["VIOLATION"] += 1
            return False
        self.outcomes[outcome] += 1
        took = round(time.monotonic() - sent, 3)
        self._log.write("answer", who=self.name, session=model.session_id, nonce=nonce, outcome=outcome, took=took)
        return outcome not in ("forgotten", "given up")

    def _until_answered(self, model: SessionModel, nonce: str, code: str, sent: float) -> str:
        body: dict[str, Any] = {"code": code}
        if self._family == "exec":
            body["lang"] = "py"
        if model.session_id is not None:
            body["session_id"] = model.session_id
        while time.monotonic() < sent + REQUEST_SECONDS:
            tried = time.monotonic()
            try:
                answer = self._ask(nonce, body, sent + REQUEST_SECONDS - tried)
            except TimeoutError:
                break
            except _BROKEN as error:
                if not isinstance(error, urllib.error.URLError):
                    self._log.write("broken", who=self.name, nonce=nonce, error=repr(error))
                check_broken(self._history, error, tried, time.monotonic())
                time.sleep(0.2)
                continue
            if answer.status == 200:
                outcome = model.take(nonce, _common(self._family, answer.body), sent, time.monotonic())
                if outcome == "ok" and self._dice.random() < 0.1:
                    self._repeat(nonce, body, answer)
                return outcome
            if answer.status == 404:
                model.unknown(time.monotonic())
                return "forgotten"
            if answer.status not in (429, 503):
                raise Violation(f"status {answer.status}: {answer.body}")
            self._log.write("refused", who=self.name, nonce=nonce, text=str(answer.body))
            self.outcomes["refused"] += 1
            check_refusal(self._history, str(answer.body), tried, time.monotonic())
            time.sleep(min(1.0, float(answer.headers.get("retry-after", 1))))
        now = time.monotonic()
        if any(happening.kind in GATEWAY_KINDS for happening in self._history.within(now - LINE_SECONDS, now)):
            # Each gateway was lost or stopped before it was this one's turn: it was never accepted.
            return "given up"
        raise Violation(f"no answer within {REQUEST_SECONDS:g} s")

    def _ask(self, nonce: str, body: dict[str, Any], timeout: float) -> Answer:
        path = "/exec" if self._family == "exec" else "/api/v1/execute"
        return self._gateway.call("POST", path, body, headers={"Idempotency-Key": nonce}, timeout=timeout)

    def _repeat(self, nonce: str, body: dict[str, Any], first: Answer) -> None:
        """A repetition of what was answered gets the same answer, and runs nothing: the next counter would tell."""
        try:
            again = self._ask(nonce, body, REQUEST_SECONDS)
        except _BROKEN:
            return
        if again.status == 503:
            return
        if again.status != 200 or again.body != first.body:
            raise Violation(f"the repetition was answered otherwise: {again}")

    def _end_session(self, model: SessionModel) -> None:
        if model.session_id is not None:
            try:
                self._gateway.call("DELETE", f"/api/v1/sessions/{model.session_id}", timeout=60)
            except _BROKEN as error:
                self._log.write("broken", who=self.name, error=repr(error))


def _common(family: str, body: dict[str, Any]) -> dict[str, Any]:
    """What both families' answers say, under the same names. Raises Violation where a field is missing."""
    needed = {"session_id", "status", "exit_cause", *(("stdout", "stderr") if family == "exec" else ("outputs",))}
    if missing := needed - set(body):
        raise Violation(f"the answer lacks {sorted(missing)}: {body}")
    if family == "exec":
        return {**body, "text": body["stdout"], "notes": body["stderr"]}
    streams = {"stdout": "", "stderr": ""}
    for output in body["outputs"]:
        if output["output_type"] == "stream":
            streams[output["name"]] += output["text"]
    return {**body, "text": streams["stdout"], "notes": streams["stderr"]}
