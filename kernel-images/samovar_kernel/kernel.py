"""SandboxKernel: ipykernel's kernel, with what a sandbox adds: the claim, arguments of a cell, a notice, its own output."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from ipykernel.ipkernel import IPythonKernel

from samovar_kernel.claim import Claim, ClaimRefused
from samovar_kernel.publisher import Publisher


class SandboxKernel(IPythonKernel):
    """A thin layer: everything that ipykernel does stays as it is."""

    iopub_thread: Publisher
    # the pause before each reply papers over a flush that is not waited for; ours keeps its order by itself
    _execute_sleep = 0.0

    control_msg_types = [*IPythonKernel.control_msg_types, "samovar_claim_request"]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._claim: Claim | None = None
        self._notice: str | None = None
        self._hold: float = 0.0
        self._hold_until: float | None = None

    async def samovar_claim_request(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """Make this kernel personal, once. The answer is signed with the new key; a refusal with the present one."""
        try:
            if self._claim is not None:
                raise ClaimRefused("this kernel has been claimed before")
            claim = Claim.from_content(parent["content"])
            claim.apply(self.shell.user_ns)
        except (ClaimRefused, OSError) as error:
            content = {"status": "error", "ename": type(error).__name__, "evalue": str(error), "traceback": []}
            self.session.send(stream, "samovar_claim_reply", content, parent, ident)
            return
        self._claim = claim
        self._notice = claim.notice
        self._hold = claim.hold
        self.session.key = claim.key
        self.session.send(stream, "samovar_claim_reply", {"status": "ok"}, parent, ident)

    def _publish_status(self, status: str, channel: str, parent: dict[str, Any] | None = None) -> None:
        # a claim has no busy and idle: they would be signed with two different keys
        if channel == "control" and self.get_parent("control").get("msg_type") == "samovar_claim_request":
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
        self.iopub_thread.user_code = True
        super().pre_handler_hook()

    def post_handler_hook(self) -> None:
        """No user code runs any more."""
        super().post_handler_hook()
        self.iopub_thread.user_code = False

    def _publish_execute_input(self, code: str, parent: dict[str, Any], execution_count: int) -> None:
        self.iopub_thread.user_code = False
        super()._publish_execute_input(code, parent, execution_count)

    async def execute_request(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """Run a cell, with `sys.argv[1:]` of its own where its metadata says so."""
        argv = _cell_arguments(parent)
        if argv is None:
            await super().execute_request(stream, ident, parent)
            return
        previous = sys.argv
        sys.argv = [*previous[:1], *argv]
        try:
            await super().execute_request(stream, ident, parent)
        finally:
            sys.argv = previous

    async def do_execute(self, code: str, silent: bool, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Run a cell's code. All it printed is queued, in order, when this returns."""
        if self._notice and not silent:
            sys.stderr.write(self._notice.rstrip("\n") + "\n")
            self._notice = None
        self.iopub_thread.user_code = True
        try:
            reply: dict[str, Any] = await super().do_execute(code, silent, *args, **kwargs)
        finally:
            self.iopub_thread.user_code = False
            self.iopub_thread.output.finish_pipes()
        return reply

    def _input_request(self, prompt: str, ident: Any, parent: Any, password: bool = False) -> str:
        # what was printed must be on the screen before the question
        self.iopub_thread.flush_now()
        answer: str = super()._input_request(prompt, ident, parent, password)
        return answer


def _cell_arguments(parent: dict[str, Any]) -> list[str] | None:
    ours = parent.get("metadata", {}).get("samovar")
    argv = ours.get("argv") if isinstance(ours, dict) else None
    if isinstance(argv, list) and all(isinstance(argument, str) for argument in argv):
        return argv
    return None

