"""SandboxKernel: ipykernel's kernel, with what a sandbox adds: claim, cell arguments, a notice, its own output."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

from ipykernel.ipkernel import IPythonKernel
from traitlets import Type

from samovar_kernel.claim import Claim, ClaimRefused, requested_key
from samovar_kernel.ended import EndedCells
from samovar_kernel.history import keep_in_memory
from samovar_kernel.publisher import Publisher
from samovar_kernel.rehearsal import rehearse

_INTERRUPT = "raise KeyboardInterrupt"
# They have no busy and idle: nobody's notebook shows them, and a claim's would be signed with two different keys.
_SILENT_REQUESTS = ("samovar_claim_request", "samovar_probe_request")


class SandboxKernel(IPythonKernel):
    """A thin layer: everything that ipykernel does stays as it is."""

    iopub_thread: Publisher
    # the pause before each reply papers over a flush that is not waited for; ours keeps its order by itself
    _execute_sleep = 0.0
    debugger_class = Type("samovar_kernel.debugger.SandboxDebugger")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.control_handlers["samovar_claim_request"] = self.samovar_claim_request
        self.control_handlers["samovar_probe_request"] = self.samovar_probe_request
        # the cells that run, each by its msg_id, and their numbers: more than one where there are subshells
        self._running: dict[str, int | None] = {}
        self._ended = EndedCells()
        self._claim: Claim | None = None
        self._notice: str | None = None
        self._hold: float = 0.0
        self._hold_until: float | None = None
        self._interrupted_early = False
        assert self.shell is not None  # IPythonKernel's constructor made it
        keep_in_memory(self.shell.history_manager)
        show = self.shell._showtraceback
        # not by a subclass of the shell: libraries recognise a notebook by the name of its class
        self.shell._showtraceback = partial(self.iopub_thread.call_at_once, show)

    async def samovar_claim_request(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """Make this kernel personal, once. The answer, also a refusal, is signed with the key that was asked for."""
        session, shell = self.session, self.shell
        if session is None or shell is None:
            return
        try:
            if self._claim is not None:
                raise ClaimRefused("this kernel has been claimed before")
            claim = Claim.from_content(parent["content"])
        except ClaimRefused as error:
            # By a copy: who asked listens with the new key already, but a kernel that refuses keeps its own.
            answering = session.clone()
            with suppress(ClaimRefused):
                answering.key = requested_key(parent["content"])
            content = {"status": "error", "ename": type(error).__name__, "evalue": str(error), "traceback": []}
            answering.send(stream, "samovar_claim_reply", content, parent, ident)
            return
        claim.apply(shell.user_ns)
        self._claim = claim
        self.iopub_thread.flush()
        self.iopub_thread.output.forget()
        self._ended.clear()
        self._notice = claim.notice
        self._hold = claim.hold
        session.key = claim.key
        session.send(stream, "samovar_claim_reply", {"status": "ok"}, parent, ident)

    async def samovar_probe_request(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """Say which cell runs and which ended unheard. A kernel that nobody has claimed yet is kept from going cold."""
        session, shell = self.session, self.shell
        if session is None or shell is None:
            return
        running, count = next(iter(self._running.copy().items()), (None, None))
        content = {
            "status": "ok",
            "running": running,
            "running_count": count,
            "execution_count": shell.execution_count,
            "ended": self._ended.missed(self.iopub_thread.left_at),
        }
        session.send(stream, "samovar_probe_reply", content, parent, ident)
        if self._claim is None:
            # in the thread that will run the cells, after the answer: a claim that comes now waits for nothing
            self.io_loop.add_callback(self._keep_warm)

    async def debug_request(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """Hand a request to the debugger. Its start waits for a running cell: others are answered meanwhile."""
        if parent["content"].get("command") == "initialize":
            self._control_lock.release()
            try:
                await self.debugger.listen()
            finally:
                await self._control_lock.acquire()
                self.set_parent(ident, parent, channel="control")
        await super().debug_request(stream, ident, parent)

    def _keep_warm(self) -> None:
        if self._claim is None and not self._running:
            rehearse(self.shell)

    def _publish_status(self, status: str, channel: str, parent: dict[str, Any] | None = None) -> None:
        if channel == "control" and self.get_parent("control").get("msg_type") in _SILENT_REQUESTS:
            return
        super()._publish_status(status, channel, parent)

    async def dispatch_shell(self, msg: Any, /, subshell_id: str | None = None, *, concurrent: bool = False) -> None:
        """Hold the first requests after a claim that asked for it: its holder's clients are still connecting."""
        if self._hold:
            if self._hold_until is None:
                self._hold_until = time.monotonic() + self._hold
            await asyncio.sleep(max(0.0, self._hold_until - time.monotonic()))
            self._hold = 0.0
        await super().dispatch_shell(msg, subshell_id=subshell_id, concurrent=concurrent)

    def pre_handler_hook(self) -> None:
        """User code may run from here on: an interrupt raises in it."""
        super().pre_handler_hook()
        if _in_main_thread():
            self.iopub_thread.ending = False
            self.iopub_thread.user_code = True

    def post_handler_hook(self) -> None:
        """No user code runs any more."""
        super().post_handler_hook()
        if _in_main_thread():
            self.iopub_thread.user_code = False

    async def execute_request(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """Run a cell, with `sys.argv[1:]` of its own where its metadata says so."""
        self.iopub_thread.output.begin_cell(parent["header"])
        if _in_main_thread():
            # from here to the reply an interrupt may raise in the cell's code only, else there would be no reply
            self._interrupted_early = False
            signal.signal(signal.SIGINT, self._note_interrupt)
            self.iopub_thread.user_code = False
        msg_id = str(parent["header"].get("msg_id"))
        argv, previous = _cell_arguments(parent), sys.argv
        self._running[msg_id] = None
        try:
            if argv is not None:
                sys.argv = [*previous[:1], *argv]
            await super().execute_request(stream, ident, parent)
        finally:
            self._running.pop(msg_id, None)
            if argv is not None:
                sys.argv = previous

    def _publish_execute_input(self, code: str, parent: dict[str, Any], execution_count: int) -> None:
        self._running[str(parent["header"].get("msg_id"))] = execution_count
        super()._publish_execute_input(code, parent, execution_count)

    async def do_execute(self, code: str, silent: bool, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run a cell's code. All it printed is queued, in order, when this returns."""
        if self._notice and not silent:
            sys.stderr.write(self._notice.rstrip("\n") + "\n")
            self._notice = None
        if not _in_main_thread():
            reply: dict[str, Any] = await super().do_execute(code, silent, *args, **kwargs)
            return reply
        publisher = self.iopub_thread
        run = super().do_execute
        try:
            try:
                publisher.user_code = True
                signal.signal(signal.SIGINT, signal.default_int_handler)
                reply = await run(_INTERRUPT if self._interrupted_early else code, silent, *args, **kwargs)
            finally:
                signal.signal(signal.SIGINT, self._note_interrupt)
                publisher.user_code = False
        except KeyboardInterrupt:
            # it came in the code around the cell's own
            reply = await run(_INTERRUPT, silent, *args, **kwargs)
        publisher.output.finish_pipes()
        if not silent:
            self._ended.add(self.get_parent("shell")["header"], reply)
        return reply

    def _send_abort_reply(self, stream: Any, msg: dict[str, Any], idents: Any) -> None:
        super()._send_abort_reply(stream, msg, idents)
        if msg["header"]["msg_type"] == "execute_request":
            self._ended.add(msg["header"], {"status": "aborted"})

    def _note_interrupt(self, *_: Any) -> None:
        self._interrupted_early = True

    def _input_request(self, prompt: str, ident: Any, parent: Any, password: bool = False) -> str:
        # what was printed must be on the screen before the question
        self.iopub_thread.call_at_once(self.iopub_thread.flush)
        answer: str = super()._input_request(prompt, ident, parent, password)
        return answer


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _cell_arguments(parent: dict[str, Any]) -> list[str] | None:
    ours = parent.get("metadata", {}).get("samovar")
    argv = ours.get("argv") if isinstance(ours, dict) else None
    if isinstance(argv, list) and all(isinstance(argument, str) for argument in argv):
        return argv
    return None
