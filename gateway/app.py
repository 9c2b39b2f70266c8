"""GatewayApp: configuration, start, drain, stop of `samovar serve`."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from traitlets import Bool, Dict, Enum, Integer, List, TraitError, Unicode, default
from traitlets.config import Application, Config, Configurable
from traitlets.config.loader import ArgumentError

from gateway import __version__
from gateway.api_keys import ApiKeys
from gateway.jupyter_settings import JupyterSettings
from gateway.log_file import LOG_FILE_NAME, log_to_file, set_up_logging
from gateway.settings import (
    ExecutionSettings,
    OwnerLimits,
    PoolSettings,
    SandboxLimits,
    SessionSettings,
    bad_trait,
    check_names,
    default_data_directory,
    environment_config,
    file_config,
)
from kernelprovisioner.launchers import DockerLauncher, LauncherKind, ProcessLauncher
from kernelprovisioner.launchers.docker_engine import engine_url
from kernelprovisioner.runtime import ENVIRONMENT_NAME
from kernelprovisioner.traits import FiniteFloat

if TYPE_CHECKING:
    from gateway.server import Gateway

CONFIG_FILE = "samovar_config.py"
LOG_LEVELS = ("DEBUG", "INFO", "WARN", "WARNING", "ERROR", "CRITICAL", 10, 20, 30, 40, 50)
_log = logging.getLogger(__name__)


class GatewayApp(Application):
    """`samovar serve`: keeps sandboxes warm and runs cells in them."""

    name = "samovar-serve"
    version = __version__
    #: after `start`: the sandboxes whose removal nobody has confirmed
    left: Sequence[str] = ()
    description = """Start the gateway: a pool of warm sandboxes, POST /exec and POST /api/v1/execute, and the claim
    socket for Jupyter clients of this user. Settings come from the command line, then SAMOVAR_… variables, then the
    environment names that code interpreters know (API_PORT, MAX_MEMORY_MB, …), then samovar_config.py."""
    classes = [  # noqa: RUF012
        *(PoolSettings, SandboxLimits, ExecutionSettings, OwnerLimits, SessionSettings, JupyterSettings),
        *(DockerLauncher, ProcessLauncher),
    ]

    host = Unicode("127.0.0.1", help="Address to listen on; 0.0.0.0 is all of this machine's.").tag(config=True)
    port = Integer(8000, min=0, max=65535, help="Port to listen on; 0 takes a free one.").tag(config=True)
    api_key = Unicode(
        help="The API key. Empty: the one kept in the data directory; the first start makes it and shows it once."
    ).tag(config=True)
    api_keys = ApiKeys(
        help='Further API keys, each with its owner: {"ada": "KEY", "bob": "sha256:…"}; or keys separated by commas. '
        "Owners do not see each other's sessions, and share the places fairly."
    ).tag(config=True, secret=True)
    launcher = Enum(
        ("auto", "docker", "process"),
        default_value="auto",
        help="docker: containers. process: plain processes WITHOUT ISOLATION, for development. auto: containers where "
        "an engine answers, else processes.",
    ).tag(config=True)
    images = List(Unicode(), help="Names of the kernel images to serve; empty: all.").tag(config=True)
    data_dir = Unicode(
        help="Directory of all that is kept on disk; by default `samovar` in $XDG_DATA_HOME or ~/.local/share."
    ).tag(config=True)
    runtime_dir = Unicode(help="Directory of sockets; empty: /run/samovar, or the user's runtime directory.").tag(
        config=True
    )
    config_file = Unicode(CONFIG_FILE, help="Configuration file; the default one may be missing.").tag(config=True)
    drain_timeout = FiniteFloat(
        10.0, min=0, help="Seconds that running cells have to end after Ctrl-C or SIGTERM."
    ).tag(config=True)
    keep_sandboxes = Bool(
        False,
        help="On SIGTERM leave warm and claimed sandboxes to the gateway that starts next: sessions keep their "
        "variables over an upgrade. They end by themselves after 60 s without a gateway. Ctrl-C always removes them.",
    ).tag(config=True)
    local_monitoring = Bool(
        True, help="Let this host call /health/detailed and /metrics/pool without a key (switch off behind a proxy)."
    ).tag(config=True)
    log_level = Enum(LOG_LEVELS, default_value="INFO", help="The least level of what is logged.").tag(config=True)
    log_style = Enum(
        ("text", "json"), default_value="text", help="How the log on standard error is written: text or JSON lines."
    ).tag(config=True)
    log_file = Unicode(
        help="The log file (JSON lines), which samovar logs reads; empty: samovar.log in the data directory."
    ).tag(config=True)
    log_file_mb = Integer(
        10, min=0, max=4096, help="MiB of log after which a new file is begun, beside 4 older ones; 0: no log file."
    ).tag(config=True)
    first_cell = Bool(False, help="After the start run a first cell, and print commands to try.").tag(config=True)

    # What traitlets has for every application and this one has not: without the tag they are no settings.
    # show_config would print the API key.
    show_config = Bool(False)
    show_config_json = Bool(False)
    log_format = Unicode("%(message)s")
    log_datefmt = Unicode("")
    logging_config = Dict()

    aliases = {  # noqa: RUF012 - as Application has it
        "host": "GatewayApp.host",
        "port": "GatewayApp.port",
        "launcher": "GatewayApp.launcher",
        "config": "GatewayApp.config_file",
        "data-dir": "GatewayApp.data_dir",
        "runtime-dir": "GatewayApp.runtime_dir",
        "log-level": "GatewayApp.log_level",
    }
    flags = {  # noqa: RUF012
        "first-cell": ({"GatewayApp": {"first_cell": True}}, "Run a first cell and print commands to try."),
        "keep-sandboxes": (
            {"GatewayApp": {"keep_sandboxes": True}},
            "On SIGTERM leave the sandboxes to the next gateway.",
        ),
        "debug": ({"GatewayApp": {"log_level": "DEBUG"}}, "Log everything."),
    }

    @default("data_dir")
    def _default_data_dir(self) -> str:
        return str(default_data_directory(os.environ))

    def emit_help(self, classes: bool = False) -> Generator[str, None, None]:
        """As traitlets does, without a section for Application: what there is of its settings is shown as ours."""
        if not classes:
            yield from super().emit_help()
            return
        yield from self.emit_description()
        yield from self.emit_options_help()
        for cls in self.classes:
            yield cls.class_get_help()
            yield ""

    def initialize(self, argv: list[str] | None = None) -> None:
        """Bring all configuration together, and log as it says. Raises StartError for what is wrong in it."""
        unknown = self.configure(argv)
        set_up_logging(cast("int | str", self.log_level), as_json=self.log_style == "json")
        for name in unknown:
            _log.warning("the environment variable %s is no setting of Samovar and has no effect", name)

    def configure(self, argv: list[str] | None) -> list[str]:
        """Bring all configuration together; return the SAMOVAR_ variables that mean nothing. Raises StartError."""
        try:
            # Unwrapped: its decorator would print and exit with 1 by itself.
            inspect.unwrap(Application.parse_command_line)(self, argv)
            command_line = self.cli_config
            classes: list[type[Configurable]] = [type(self), *self.classes]
            environment, unknown = environment_config(classes, os.environ)
            check_names(command_line, classes, "the command line", [*self.aliases, *self.flags])
            merged = Config()
            for config in (self._file(command_line, environment, classes), environment, command_line):
                merged.merge(config)
            self.update_config(merged)
        except (TraitError, ArgumentError) as error:
            raise bad_trait(error) from None
        if self.extra_args:
            raise bad_trait(TraitError(f"{self.extra_args[0]!r} is no option of samovar serve"))
        return unknown

    def start(self) -> None:
        """Serve until SIGINT or SIGTERM. Raises StartError."""
        try:
            with log_to_file(self.log_path, self.log_file_mb * 2**20):
                asyncio.run(self._main())
        except TraitError as error:
            raise bad_trait(error) from None

    @property
    def data_directory(self) -> Path:
        """The directory of all that is kept on disk."""
        return Path(self.data_dir).expanduser().absolute()

    @property
    def log_path(self) -> Path:
        """The log file."""
        return Path(self.log_file).expanduser().absolute() if self.log_file else self.data_directory / LOG_FILE_NAME

    @property
    def runtime_directory(self) -> Path | None:
        """The directory of sockets; None: where it usually is."""
        return Path(self.runtime_dir).expanduser().absolute() if self.runtime_dir else None

    @property
    def docker_url(self) -> str:
        """The container engine's address."""
        return str(self.config.get("DockerLauncher", {}).get("docker_url") or engine_url(os.environ))

    @property
    def provisioner_environment(self) -> dict[str, str]:
        """The variables by which a provisioner does what this configuration says."""
        found = {"SAMOVAR_LAUNCHER": str(self.launcher), "DOCKER_BASE_URL": self.docker_url}
        if self.runtime_directory is not None:
            found[ENVIRONMENT_NAME] = str(self.runtime_directory)
        return found

    def gateway(self, report: Callable[[str], None]) -> Gateway:
        """A gateway with this configuration, not started."""
        # Only `samovar serve` needs what it imports; the other commands start sooner without.
        from gateway.server import Gateway, GatewaySettings

        settings = GatewaySettings(
            host=self.host,
            port=self.port,
            launcher=cast(LauncherKind, self.launcher),
            images=tuple(self.images),
            data_directory=self.data_directory,
            runtime_directory=self.runtime_directory,
            api_key=self.api_key,
            api_keys=dict(self.api_keys),
            drain_timeout=self.drain_timeout,
            local_monitoring=self.local_monitoring,
        )
        return Gateway(settings, self, report)

    async def _main(self) -> None:
        gateway = self.gateway(_say)
        stopping = asyncio.Event()

        def stop(signum: signal.Signals) -> None:
            if signum is signal.SIGINT:
                # Also when both come at once, in whatever order they are seen.
                gateway.keep = False
            elif not stopping.is_set():
                gateway.keep = self.keep_sandboxes
            if stopping.is_set():
                gateway.hurry.set()
            stopping.set()

        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop, signum)
        asked = asyncio.create_task(stopping.wait(), name="wait for a signal")
        try:
            await self._serve(gateway, asked)
        finally:
            self.left = gateway.left

    async def _serve(self, gateway: Gateway, asked: asyncio.Task[Any]) -> None:
        if not await _unless_asked(asked, gateway.start()):
            _say("Stopped before the gateway was ready.")
            return
        try:
            self._announce(gateway)
            if self.first_cell:
                # It imports what only this needs.
                from gateway import first_cell

                await _unless_asked(asked, first_cell.run(gateway))
            await asked
            _log.info("the gateway stops")
            _say(f"Stopping: running cells are given up to {self.drain_timeout:g} s (Ctrl-C again: none).")
        finally:
            await gateway.stop()
        if gateway.kept:
            _say(f"Stopped; {len(gateway.kept)} sandboxes wait up to 60 s for the next gateway.")
        elif gateway.left:
            _say("Stopped; the container engine did not confirm all removals: the next start removes what is left.")
        else:
            _say("Stopped; nothing was left behind.")

    def _announce(self, gateway: Gateway) -> None:
        if not gateway.isolated:
            _say(_warning())
        if gateway.key.made:
            _say(f"A new API key was made. It is shown this once, and kept in {gateway.key.path}:")
            _say(f"\n    {gateway.key.value}\n")
        elif gateway.key.path is not None:
            _say(f"The API key is the one in {gateway.key.path}.")
        host = f"[{self.host}]" if ":" in self.host else self.host
        _say(f"Samovar {__version__} serves http://{host}:{gateway.port} with the {gateway.launcher.name} launcher.")
        # For `samovar logs`: what the terminal shows is not in the log.
        _log.info("the gateway serves port %d; its sandboxes are in %s", gateway.port, gateway.runtime.path)

    def _file(self, command_line: Config, environment: Config, classes: list[Any]) -> Config:
        chosen = Config()
        chosen.merge(environment)
        chosen.merge(command_line)
        named = chosen.get("GatewayApp", {}).get("config_file")
        path = Path(str(named or CONFIG_FILE)).expanduser().absolute()
        if named is None and not path.exists():
            return Config()
        config = file_config(path)
        check_names(config, classes, str(path))
        return config


async def _unless_asked(asked: asyncio.Task[Any], work: Any) -> bool:
    """Return True once `work` is done; cancel it and return False when the process is asked to stop before."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({asked, task}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False
    task.result()
    return True


def _say(text: str) -> None:
    """For the person at the terminal: standard output is theirs, the log goes to standard error."""
    print(text, flush=True)


def _warning() -> str:
    lines = (
        "WARNING: CODE IS NOT ISOLATED",
        "",
        "The process launcher runs all code as plain processes of this user:",
        "it can read your files, use your network and stop your programs.",
        "Start Docker (or set DOCKER_BASE_URL) to get locked-down containers.",
    )
    width = max(map(len, lines)) + 4
    box = "\n".join(["!" * (width + 4), *(f"!!{line.center(width)}!!" for line in lines), "!" * (width + 4)])
    return f"\n\033[1;31m{box}\033[0m\n" if sys.stdout.isatty() else f"\n{box}\n"
