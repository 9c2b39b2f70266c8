"""SandboxKernelApp: starts the kernel process. Its settings come from the supervisor; nothing is written to disk."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import zmq
from ipykernel.displayhook import ZMQDisplayHook
from ipykernel.kernelapp import IPKernelApp
from IPython.core.profiledir import ProfileDir
from tornado.ioloop import IOLoop
from traitlets import Type, observe
from traitlets.config import Config

from samovar_kernel.kernel import SandboxKernel
from samovar_kernel.output import OutputBuffer
from samovar_kernel.publisher import Publisher, open_socket
from samovar_kernel.rehearsal import rehearse
from samovar_kernel.settings import VARIABLE, KernelSettings
from samovar_kernel.streams import SandboxStream
from samovar_kernel.unsent import Ring

_USER_UMASK = 0o022
_HEARTBEAT_DEADLINE = 10.0
_PR_SET_PDEATHSIG = 1


class StartFailed(Exception):
    """The kernel cannot start; the text says why."""


class UnwrittenProfile(ProfileDir):
    """A profile directory that does not exist until something is stored in it."""

    @observe("location")
    def _location_changed(self, change: Any) -> None:
        for name in ("security", "log", "startup", "pid", "static"):
            setattr(self, f"{name}_dir", os.path.join(change["new"], getattr(self, f"{name}_dir_name")))

    def _mkdir(self, path: str, mode: int | None = None) -> bool:
        return False


class SandboxKernelApp(IPKernelApp):
    """ipykernel's application with other sources (settings) and other sinks (one shared, bounded output)."""

    kernel_class = Type(SandboxKernel, klass="ipykernel.kernelbase.Kernel")  # type: ignore[assignment]

    def __init__(self, settings: KernelSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._settings = settings
        self._output: OutputBuffer | None = None

    def initialize(self, argv: list[str] | None = None) -> None:
        """Start everything short of the loop. Raises StartFailed."""
        # whoever started this sandbox may be another user: ZeroMQ creates its sockets under this mask
        os.umask(0)
        super().initialize(argv)
        os.umask(_USER_UMASK)
        self._preload()
        rehearse(self.shell)
        _import_from_work_directory()
        if self._output is not None:
            # what start-up printed belongs to no cell
            self._output.discard()
            self.iopub_thread.ready = True
            self.iopub_thread.schedule(self.iopub_thread.pump)

    def init_profile_dir(self) -> None:
        """Use a profile that is not on disk: no start-up files, no configuration of whoever runs this."""
        # the banner names every profile but the one that is called so
        directory = os.path.join(tempfile.gettempdir(), f".samovar-ipython-{os.getpid()}", "profile_default")
        self.profile_dir = UnwrittenProfile(parent=self, location=directory)

    def init_config_files(self) -> None:
        """Read no files."""
        self.config_file_paths.clear()

    def load_config_file(self, *_: Any, **__: Any) -> None:
        """Configure what differs from ipykernel's own defaults."""
        config = Config()
        # its database thread costs a quarter of a small cell's time, and a sandbox has no past to look up
        config.HistoryManager.enabled = False
        # a section of this name is what libraries recognise a notebook by
        config.IPKernelApp.trio_loop = False
        self.update_config(config)

    def init_connection_file(self) -> None:
        """Take the endpoints from the settings."""
        self.transport = self._settings.transport
        self.ip = self._settings.ip
        for name, port in self._settings.ports.items():
            setattr(self, f"{name}_port", port)
        self.session.key = self._settings.key.encode()

    def write_connection_file(self, **kwargs: Any) -> None:
        """Write none: whoever may connect knows the key."""

    def log_connection_info(self) -> None:
        """Record the ports for `connect_request`."""
        names = ("shell", "iopub", "stdin", "hb", "control")
        self._ports = {name: getattr(self, f"{name}_port") for name in names}

    def init_iopub(self, context: zmq.Context[Any]) -> None:
        """Bind the iopub socket and start the publisher."""
        iopub = open_socket(context)
        self.iopub_port = self._bind_socket(iopub, self.iopub_port)
        self.configure_tornado_logger()
        self._output = OutputBuffer(self.session, self._settings.pipes, Ring(self._settings.ring))
        self.iopub_thread = Publisher(iopub, self.session, self._output)
        self.iopub_thread.start()
        self.iopub_socket = self.iopub_thread.background_socket

    def init_heartbeat(self) -> None:
        """Start the heartbeat and wait until its thread has bound its socket (under our umask)."""
        super().init_heartbeat()
        path = Path(f"{self.ip}-{self.hb_port}")
        deadline = time.monotonic() + _HEARTBEAT_DEADLINE
        while self.transport == "ipc" and not path.exists():
            if time.monotonic() > deadline or (self.heartbeat is not None and not self.heartbeat.is_alive()):
                raise StartFailed(f"the heartbeat cannot bind {path}")
            time.sleep(0.002)

    def init_io(self) -> None:
        """Put our streams in place of Python's."""
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        log = open(self._settings.log, "w", buffering=1, closefd=False)  # noqa: SIM115  lives as long as the process
        for handler in (*self.log.handlers, *logging.getLogger("tornado").handlers):
            if isinstance(handler, logging.StreamHandler):
                handler.stream = log
        for name in ("Comm", "ipykernel.comm"):
            logging.getLogger(name).addFilter(_is_of_a_comm)
        sys.stdout = SandboxStream(self.iopub_thread, "stdout")
        sys.stderr = SandboxStream(self.iopub_thread, "stderr")
        self.displayhook = ZMQDisplayHook(self.session, self.iopub_socket)
        sys.displayhook = self.displayhook
        self.patch_io()

    def start(self) -> None:
        """Run until the kernel is shut down."""
        # a cell that awaits is interrupted by a callback of the loop, which sleeps: each signal has to wake it
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        IOLoop.current().asyncio_loop.add_reader(reader, reader.recv, 4096)  # type: ignore[attr-defined]
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        super().start()

    def _preload(self) -> None:
        for name in self._settings.preload:
            try:
                importlib.import_module(name)
            except Exception as error:
                raise StartFailed(f"preload module {name!r} cannot be imported: {error}") from error


def _die_with_parent() -> None:
    # the supervisor watches over this process; without it nobody would end it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _is_of_a_comm(record: logging.LogRecord) -> bool:
    # a page that connects asks for comms which are not there: nothing that the running cell should be shown
    return not str(record.msg).startswith("No such comm")


def _import_from_work_directory() -> None:
    """Let a user's modules be imported, after the standard library and before the packages, as IPython does.

    IPython leaves it out under `-P`, with which the kernel starts so that nothing of the user's shadows what it loads.
    """
    if "" not in sys.path:
        packages = (i for i, path in enumerate(sys.path) if Path(path).name in ("site-packages", "dist-packages"))
        sys.path.insert(next(packages, 0), "")


def main() -> None:
    """Run the kernel that the supervisor's settings describe."""
    if VARIABLE not in os.environ:
        sys.exit(f"{VARIABLE} is not set: this program is started by samovar_kernel.supervisor")
    _die_with_parent()
    app = SandboxKernelApp.instance(settings=KernelSettings.take())
    try:
        app.initialize([])
    except StartFailed as error:
        os.write(2, f"{error}\n".encode())
        os._exit(1)
    app.start()


if __name__ == "__main__":
    main()
