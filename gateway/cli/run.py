"""`samovar run NOTEBOOK [-o OUT]`: execute a notebook in a sandbox, with a progress bar."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.client import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

from gateway.cli.configuration import add_option, configured
from gateway.cli.terminal import harmless
from gateway.errors import ExitCode, StartError
from kernelprovisioner.launchers.base import LaunchError

if TYPE_CHECKING:
    from jupyter_client.manager import KernelManager

KERNEL_NAME = "sandbox"
_CELL_FAILED = 1
_INTERRUPTED = 130


class RunError(Exception):
    """The notebook could not be run; one sentence for a person, and the exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Interrupted(Exception):
    """The run was ended by SIGINT or SIGTERM; its kernel is gone."""


class NotebookRun(NotebookClient):
    """An nbclient that shows its progress and ends in order when it is interrupted."""

    def __init__(
        self, notebook: nbformat.NotebookNode, directory: Path, make_manager: Callable[[], KernelManager] | None = None
    ) -> None:
        super().__init__(
            notebook,
            kernel_name=KERNEL_NAME,
            timeout=None,
            resources={"metadata": {"path": str(directory)}},
            on_cell_start=self._cell_starts,
            on_cell_executed=self._cell_ended,
        )
        cells = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
        self._interrupted = False
        self._make_manager = make_manager
        # disable=None: no bar where nobody looks at a terminal
        self._bar = tqdm(total=cells, unit="cell", desc="starting", disable=None, leave=False)

    def create_kernel_manager(self) -> KernelManager:
        """As nbclient does it, or a manager of a gateway's kernels."""
        if self._make_manager is None:
            return super().create_kernel_manager()
        self.km = self._make_manager()
        return self.km

    async def async_start_new_kernel(self, **kwargs: Any) -> None:
        """Start the kernel; from here on an interrupt cancels the run, and nbclient's clean-up ends the kernel."""
        task = asyncio.current_task()

        def interrupt() -> None:
            self._interrupted = True
            assert task is not None
            task.cancel()

        # nbclient's own handlers end the kernel under the running cell, which then fails with an unrelated error.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        await super().async_start_new_kernel(**kwargs)

    async def run(self) -> None:
        """Execute all cells. Raises what nbclient raises, and Interrupted."""
        try:
            await self.async_execute()
        except (asyncio.CancelledError, Exception) as error:
            # nbclient takes a cancelled cell for a dead kernel.
            if self._interrupted:
                raise Interrupted from error
            raise
        finally:
            self._bar.close()

    def _cell_starts(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "code":
            self._bar.set_description(f"cell {cell_index + 1}")

    def _cell_ended(self, cell: nbformat.NotebookNode, cell_index: int, execute_reply: dict[str, Any]) -> None:
        self._bar.update()
        for output in cell.outputs:
            if text := _as_text(output):
                tqdm.write(harmless(text), file=sys.stdout, end="")
        sys.stdout.flush()


def main(argv: Sequence[str]) -> int:
    """Run a notebook; return the exit code: 0 all cells ran, 1 a cell failed, 130 interrupted, others as sysexits.h."""
    parser = argparse.ArgumentParser(
        prog="samovar run",
        description="Execute a notebook in a sandbox and print what its cells print. "
        "Its cells see the files of the notebook's directory, as a copy; files they write come back. "
        "With --gateway-url they see none of this machine's files.",
    )
    parser.add_argument("notebook", type=Path, metavar="NOTEBOOK")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="write the executed notebook here")
    parser.add_argument("--gateway-url", metavar="URL", help="take the sandbox from this gateway, by HTTP")
    parser.add_argument("--api-key", metavar="KEY", help="the gateway's API key (default: the variable API_KEY)")
    add_option(parser)
    arguments = parser.parse_args(argv)
    if arguments.api_key is not None and arguments.gateway_url is None:
        parser.error("--api-key goes with --gateway-url")
    try:
        app = configured(arguments)
        make_manager = None
        if arguments.gateway_url is not None:
            make_manager = _remote(arguments.gateway_url, arguments.api_key or app.api_key)
        return _run(arguments.notebook, arguments.output, app.provisioner_environment, make_manager)
    except (RunError, StartError) as error:
        print(f"samovar run: {error}", file=sys.stderr)
        return error.exit_code


def _remote(url: str, api_key: str) -> Callable[[], KernelManager]:
    # Only this needs what it imports.
    from gateway.remote import RemoteKernelManager

    return lambda: RemoteKernelManager(gateway_url=url, api_key=api_key, kernel_name=KERNEL_NAME)


def _run(
    path: Path,
    output: Path | None,
    environment: Mapping[str, str],
    make_manager: Callable[[], KernelManager] | None,
) -> int:
    notebook = _read(path)
    if output is not None and not os.access(output.parent, os.W_OK):
        raise RunError(f"{output}: its directory does not exist or is not writable.", ExitCode.UNWRITABLE)
    # The kernel's provisioner reads nothing else.
    os.environ.update(environment)
    try:
        asyncio.run(NotebookRun(notebook, path.resolve().parent, make_manager).run())
        code = 0
    except CellExecutionError as error:
        print(f"samovar run: a cell of {path} failed:\n{harmless(str(error), '')}", file=sys.stderr)
        code = _CELL_FAILED
    except (Interrupted, KeyboardInterrupt):
        print("samovar run: interrupted.", file=sys.stderr)
        code = _INTERRUPTED
    except NoSuchKernel:
        raise RunError(
            f"the kernel {KERNEL_NAME!r} is not installed; install it with: samovar kernelspec install", ExitCode.FAILED
        ) from None
    except (LaunchError, RuntimeError, TimeoutError) as error:
        # DeadKernelError is one of these, with the cause of death as its text where the provisioner could tell it.
        print(f"samovar run: {error}", file=sys.stderr)
        code = ExitCode.FAILED
    if output is not None:
        _write(notebook, output)
        print(f"samovar run: {'wrote' if code == 0 else 'wrote what ran to'} {output}", file=sys.stderr)
    return code


def _read(path: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise RunError(f"{path}: there is no such file.", ExitCode.NO_INPUT) from None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}.", ExitCode.NO_INPUT) from None
    except (ValueError, AttributeError, KeyError, nbformat.ValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{path} is not a notebook: {reason[:200]}", ExitCode.CONFIGURATION) from None


def _write(notebook: nbformat.NotebookNode, output: Path) -> None:
    """Write the notebook as a whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=output.parent, prefix=f".{output.name}.", delete=False
        ) as file:
            nbformat.write(notebook, file)
        os.chmod(file.name, 0o666 & ~_umask())
        os.replace(file.name, output)
    except OSError as error:
        raise RunError(f"{output} could not be written: {error.strerror}.", ExitCode.UNWRITABLE) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _as_text(output: nbformat.NotebookNode) -> str:
    """What of one output can be shown at a terminal; a failed cell's traceback is told at the end instead."""
    if output.output_type == "stream":
        return str(output.text)
    if output.output_type in ("execute_result", "display_data"):
        return str(output.data.get("text/plain", "")).rstrip("\n") + "\n"
    return ""
