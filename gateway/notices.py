"""What the next cell of a session says first of what happened since its last one."""

from __future__ import annotations

from gateway.execution import CellResult
from kernelprovisioner.sandbox_exit import SandboxExit


def new_sandbox(exit: SandboxExit | None) -> str | None:
    """What the first cell in a new sandbox says of the end of the former one, if there was one."""
    if exit is None:
        return None
    return f"[samovar: {exit} This is a new sandbox: the session's former variables and files are gone.]\n"


def how_it_ended(result: CellResult) -> str:
    """What the next answer of a session says of a cell that nobody got the answer of."""
    if result.note is not None:
        end = result.note.text
    elif result.error is not None:
        end = f"It ended with {result.error.ename}: {result.error.evalue}."
    else:
        end = "It has ended."
    return f"[samovar: a cell of this session ran when the gateway was lost. {end} Output of it is lost.]\n"
