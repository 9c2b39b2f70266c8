"""The `samovar` command, one module per subcommand. Each is imported only when it is used."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from gateway import __version__

#: name → module with `main(argv) -> exit code`, and what it is for
COMMANDS = {
    "serve": ("gateway.cli.serve", "keep sandboxes warm and serve them by HTTP and to Jupyter clients"),
    "run": ("gateway.cli.run", "execute a notebook in a sandbox"),
    "ps": ("gateway.cli.ps", "list the sandboxes: state, age, session, memory, CPU"),
    "doctor": ("gateway.cli.doctor", "find what is wrong, and say how to mend it"),
    "logs": ("gateway.cli.logs", "read the gateway's log"),
    "reap": ("gateway.cli.reap", "remove what dead owners left behind"),
    "images": ("gateway.cli.images", "build, list and verify kernel images"),
    "kernelspec": ("gateway.cli.kernelspec", "install the `sandbox` kernel for Jupyter"),
}
_USAGE_ERROR = 64
# As a shell says it of a process that SIGPIPE killed.
_PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        print(end="", flush=True)
    except BrokenPipeError:
        # `samovar ps | head`: what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _PIPE_CLOSED
    return code


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else _USAGE_ERROR
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] == "--help-all":
        print(_help(), "\n", sep="")
        arguments = ["serve", "--help-all"]
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"samovar: there is no command {name!r}; there is: {', '.join(COMMANDS)}.", file=sys.stderr)
        return _USAGE_ERROR
    command = importlib.import_module(COMMANDS[name][0])
    code: int = command.main(rest)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items())
    return (
        "usage: samovar COMMAND [ARGUMENTS]\n\nPre-warmed Jupyter kernels in locked-down containers.\n\n"
        f"{commands}\n\n`samovar COMMAND --help` says more; `samovar --help-all` explains every setting."
    )
