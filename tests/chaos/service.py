"""A gateway as a service manager runs it: started again whenever it has ended."""

from __future__ import annotations

import signal
import subprocess
import threading
import time

from tests.chaos.event_log import EventLog
from tests.chaos.faults import Happening, History, Kind
from tests.gateway_process import GatewayProcess

#: As a unit file would say.
RESTART_SECONDS = 0.2
STOP_SECONDS = 90.0


class GatewayService(threading.Thread):
    """Restarts `gateway` until `finish`. One that is to be upgraded next keeps its sandboxes on SIGTERM."""

    def __init__(self, gateway: GatewayProcess, history: History, log: EventLog) -> None:
        super().__init__(name="service", daemon=True)
        self.gateway = gateway
        self._history = history
        self._log = log
        self._finished = threading.Event()
        #: set while the gateway is there and healthy
        self.up = threading.Event()
        self._going: list[Happening] = []

    def end(self, kind: Kind) -> bool:
        """End the gateway in this way; it comes back by itself. Returns False where it is just away."""
        process = self.gateway.process
        if not self.up.is_set() or process is None or process.poll() is not None:
            return False
        if kind is Kind.GATEWAY_UPGRADE and "SAMOVAR_KEEP_SANDBOXES" not in self.gateway.settings:
            kind = Kind.GATEWAY_STOP
        elif kind is Kind.GATEWAY_STOP and "SAMOVAR_KEEP_SANDBOXES" in self.gateway.settings:
            # What SIGTERM does is configured: SIGINT always stops.
            self._leave(kind, signal.SIGINT)
            return True
        self._leave(kind, signal.SIGKILL if kind is Kind.GATEWAY_KILL else signal.SIGTERM)
        return True

    def run(self) -> None:
        self.up.set()
        while True:
            process = self.gateway.process
            assert process is not None
            while process.poll() is None and not self._finished.wait(0.02):
                pass
            if self._finished.is_set():
                return
            code = process.returncode
            if not self._going:
                self._log.violation("gateway", f"it ended by itself with exit code {code}; see {self.gateway.log}")
            self.up.clear()
            time.sleep(RESTART_SECONDS)
            self._start()

    def finish(self) -> int:
        """End the gateway for good, as Ctrl-C does: it removes what it has. Returns its exit code."""
        self.up.wait(STOP_SECONDS)
        self._finished.set()
        self.join()
        process = self.gateway.process
        assert process is not None
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._log.violation("gateway", f"it did not stop within {STOP_SECONDS:g} s of Ctrl-C")
            process.kill()
            return process.wait()

    def _leave(self, kind: Kind, signum: int) -> None:
        process = self.gateway.process
        assert process is not None
        happening = self._history.begin(kind)
        self._going.append(happening)
        self.up.clear()
        self._log.write("fault", kind=kind, pid=process.pid)
        process.send_signal(signum)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._log.violation("gateway", f"it did not stop within {STOP_SECONDS:g} s of {kind}")
            process.kill()
        else:
            if kind is not Kind.GATEWAY_KILL and process.returncode != 0:
                self._log.violation("gateway", f"exit code {process.returncode} after {kind}")

    def _start(self) -> None:
        """Until it is healthy; it may end at once where the engine is away."""
        began = time.monotonic()
        while not self._finished.is_set():
            try:
                self.gateway.start(STOP_SECONDS)
            except AssertionError:
                process = self.gateway.process
                assert process is not None
                self._log.write("start failed", code=process.poll())
                if process.poll() is None:
                    self._log.violation("gateway", f"not healthy within {STOP_SECONDS:g} s; see {self.gateway.log}")
                    process.kill()
                    process.wait()
                time.sleep(RESTART_SECONDS)
                continue
            now = time.monotonic()
            self._log.write("gateway up", after=round(now - began, 2))
            while self._going:
                self._going.pop().end = now
            self.up.set()
            return
