"""Settings: traits beside those of the gateway itself, and how environment variables and a file reach all of them."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from traitlets import Dict, HasTraits, Integer, List, TraitError, TraitType, Unicode
from traitlets.config import Config, Configurable
from traitlets.config.loader import ConfigFileNotFound, PyFileConfigLoader

from gateway.errors import ExitCode, StartError
from gateway.execution import CellLimits
from gateway.idle import IdleBounds
from gateway.limits import OwnerBounds
from kernelprovisioner import schedule as schedules
from kernelprovisioner.images import KernelImage, PoolBounds
from kernelprovisioner.keeper import Upkeep
from kernelprovisioner.traits import FiniteFloat

PREFIX = "SAMOVAR_"
#: Names of the environment that other parts read, or that are set for processes we start.
_OTHER_NAMES = frozenset({"SAMOVAR_CLAIM_SOCKET", "SAMOVAR_KERNEL", "SAMOVAR_SUPERVISOR"})
#: What operators of code interpreters set already: name → class and trait.
KNOWN_NAMES = {
    "API_HOST": ("GatewayApp", "host"),
    "API_PORT": ("GatewayApp", "port"),
    "API_KEY": ("GatewayApp", "api_key"),
    "API_KEYS": ("GatewayApp", "api_keys"),
    "LOG_LEVEL": ("GatewayApp", "log_level"),
    "LOG_FILE": ("GatewayApp", "log_file"),
    "LOG_FORMAT": ("GatewayApp", "log_style"),
    "DOCKER_BASE_URL": ("DockerLauncher", "docker_url"),
    "CONTAINER_POOL_MIN_SIZE": ("PoolSettings", "min_size"),
    "CONTAINER_POOL_MAX_SIZE": ("PoolSettings", "max_size"),
    "MAX_EXECUTION_TIME": ("ExecutionSettings", "max_execution_time"),
    "MAX_CONCURRENT_EXECUTIONS": ("OwnerLimits", "max_executions"),
    "MAX_MEMORY_MB": ("SandboxLimits", "memory_mb"),
    "MAX_CPUS": ("SandboxLimits", "cpus"),
    "MAX_PIDS": ("SandboxLimits", "pids"),
}
#: The same for the pool of one kernel image: name → image and bound.
_IMAGE_BOUNDS = {
    "CONTAINER_POOL_PY_MIN": ("python", "min"),
    "CONTAINER_POOL_PY_MAX": ("python", "max"),
}


def default_data_directory(environ: Mapping[str, str]) -> Path:
    """Where data is kept if nothing else is said: `samovar` in the user's directory for data."""
    home = environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "samovar"


class PoolSettings(Configurable):
    """How many sandboxes are kept. What is not set here, each kernel image's image.toml says."""

    min_size = Integer(None, min=0, allow_none=True, help="Warm sandboxes kept ready for each kernel image.").tag(
        config=True
    )
    max_size = Integer(
        None, min=1, allow_none=True, help="Most live sandboxes of each kernel image, warm and claimed."
    ).tag(config=True)
    bounds = Dict(
        help='Bounds for single kernel images, before min_size and max_size: {"python": {"min": 2, "max": 20}}.'
    ).tag(config=True)
    line_bound = Integer(
        None, min=1, allow_none=True, help="Requests that may wait for a sandbox; default: 4 times the maximum."
    ).tag(config=True)
    line_timeout = FiniteFloat(120.0, min=0.1, help="Seconds that a request may wait for a sandbox.").tag(config=True)
    hit_rate = FiniteFloat(
        0.95,
        min=0,
        max=1,
        help="Share of requests that are to find a warm sandbox: so many more than the minimum are kept, up to the "
        "maximum, as would have done for those of the last 30 minutes. 0: none more.",
    ).tag(config=True)
    schedule = List(
        Unicode(),
        help="Sandboxes that are ready at certain times of the week (this machine's local time): "
        '["30 python on Mondays 08:55-10:00"]. Those that are claimed from the first time on count.',
    ).tag(config=True)
    max_age = FiniteFloat(12 * 3600.0, min=60, help="Seconds after which a warm sandbox is replaced by a new one.").tag(
        config=True
    )
    probe_interval = FiniteFloat(
        15.0, min=1, help="Seconds between two probes of each warm sandbox; one that does not answer is replaced."
    ).tag(config=True)

    def check_names(self, images: Iterable[str]) -> None:
        """Raise StartError where `bounds` names a kernel image that is not among `images`."""
        known = list(images)
        for name in self.bounds:
            if name not in known:
                raise bad_configuration(
                    f"PoolSettings.bounds: there is no kernel image {name!r}{_nearest(name, known)}"
                )
        for entry in self._entries():
            if entry.image not in known:
                there = f"there is no kernel image {entry.image!r}{_nearest(entry.image, known)}"
                raise bad_configuration(f"PoolSettings.schedule: {there}")

    def upkeep_of(self, image: KernelImage) -> Upkeep:
        """How the pool of one image looks after itself. Raises StartError where the schedule cannot be read."""
        entries = tuple(entry for entry in self._entries() if entry.image == image.name)
        return Upkeep(self.hit_rate, entries, self.max_age, self.probe_interval)

    def _entries(self) -> list[schedules.Entry]:
        try:
            return [schedules.parse(text) for text in self.schedule]
        except schedules.ScheduleError as error:
            raise bad_configuration(f"PoolSettings.schedule: {error}") from None

    def of(self, image: KernelImage) -> PoolBounds:
        """The bounds of one image's pool. Raises StartError where they make no sense."""
        own = self.bounds.get(image.name, {})
        if not isinstance(own, dict) or not set(own) <= {"min", "max"}:
            raise bad_configuration(
                f"PoolSettings.bounds[{image.name!r}] needs a dictionary with min and max, not {own!r}"
            )
        least = own.get("min", image.pool.min if self.min_size is None else self.min_size)
        most = own.get("max", image.pool.max if self.max_size is None else self.max_size)
        for value in (least, most):
            if isinstance(value, bool) or not isinstance(value, int):
                raise bad_configuration(f"the pool bounds of {image.name!r} need whole numbers, not {value!r}")
        if "max" not in own and self.max_size is None:
            # Who asks for more warm ones than image.toml allows at most means both.
            most = max(most, least)
        elif "min" not in own and self.min_size is None:
            least = min(least, most)
        if not 0 <= least <= most or most < 1:
            raise bad_configuration(f"the pool of {image.name!r} cannot have min={least} and max={most}")
        return PoolBounds(least, most)


class SandboxLimits(Configurable):
    """What the operating system enforces on each sandbox. What is not set here, each kernel image's image.toml says."""

    memory_mb = Integer(
        None,
        min=64,
        max=1 << 20,
        allow_none=True,
        help="Memory in MiB; what the in-memory work directory may hold comes on top.",
    ).tag(config=True)
    cpus = FiniteFloat(None, min=0.05, max=1024, allow_none=True, help="CPU cores.").tag(config=True)
    pids = Integer(None, min=8, max=1 << 16, allow_none=True, help="Processes and threads.").tag(config=True)

    def applied_to(self, image: KernelImage) -> KernelImage:
        """The image with these limits."""
        changes = {name: getattr(self, name) for name in ("memory_mb", "cpus", "pids")}
        chosen = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(image, limits=dataclasses.replace(image.limits, **chosen))


class ExecutionSettings(Configurable):
    """Bounds on one cell that comes by HTTP."""

    max_execution_time = FiniteFloat(
        60.0, min=0.1, help="Longest time limit of a cell in seconds, and the default."
    ).tag(config=True)
    interrupt_grace = FiniteFloat(
        5.0, min=0.1, help="Seconds that an interrupted cell has to end before its sandbox is killed."
    ).tag(config=True)
    max_output_mb = FiniteFloat(
        8.0,
        min=0.01,
        max=1024,
        help="Most output of one cell in MiB, and most text of each of its streams; the rest is cut.",
    ).tag(config=True)
    max_outputs = Integer(1000, min=1, help="Most outputs of one cell; the rest is cut.").tag(config=True)

    @property
    def cell_limits(self) -> CellLimits:
        return CellLimits(self.interrupt_grace, int(self.max_output_mb * 2**20), self.max_outputs)


class OwnerLimits(Configurable):
    """What each owner of an API key may have at once; one more is answered with 429."""

    max_sessions = Integer(
        None,
        min=1,
        allow_none=True,
        help="Sessions and kernels that hold a sandbox; default: as many as the pools have.",
    ).tag(config=True)
    max_executions = Integer(
        None, min=1, allow_none=True, help="Executions accepted and not answered yet; default: any number."
    ).tag(config=True)

    @property
    def bounds(self) -> OwnerBounds:
        return OwnerBounds(self.max_sessions, self.max_executions)


class SessionSettings(Configurable):
    """How long a session that came by HTTP keeps its sandbox without a request."""

    idle_timeout = FiniteFloat(
        3600.0, min=0.1, help="Seconds without a request after which a session gives its sandbox up."
    ).tag(config=True)
    one_off_idle_timeout = FiniteFloat(
        300.0,
        min=0.1,
        help="The same where the call named no session, entity or user, and nobody came back to its session.",
    ).tag(config=True)

    @property
    def bounds(self) -> IdleBounds:
        return IdleBounds(self.idle_timeout, min(self.idle_timeout, self.one_off_idle_timeout))


def environment_config(classes: Iterable[type[Configurable]], environ: Mapping[str, str]) -> tuple[Config, list[str]]:
    """Return what the environment sets, and the SAMOVAR_ names that mean nothing.

    SAMOVAR_PORT is GatewayApp.port, SAMOVAR_POOL_SETTINGS_MIN_SIZE is PoolSettings.min_size, and so on; they win over
    the names in KNOWN_NAMES. Raises StartError where a value cannot be read.
    """
    traits = {(cls.__name__, name): trait for cls in classes for name, trait in cls.class_traits(config=True).items()}
    config = Config()
    for variable, target in KNOWN_NAMES.items():
        if environ.get(variable):
            _set(config, target, traits[target], variable, environ[variable])
    for variable, (image, bound) in _IMAGE_BOUNDS.items():
        if environ.get(variable):
            value = _parsed(Integer(), variable, environ[variable])
            config["PoolSettings"].setdefault("bounds", {}).setdefault(image, {})[bound] = value
    ours = {environment_name(*target): target for target in traits}
    unknown = []
    for variable, value in environ.items():
        if variable in ours:
            _set(config, ours[variable], traits[ours[variable]], variable, value)
        elif variable.startswith(PREFIX) and variable not in _OTHER_NAMES:
            unknown.append(variable)
    return config, sorted(unknown)


def environment_name(class_name: str, trait: str) -> str:
    """The environment variable of our own that sets a trait."""
    if class_name == "GatewayApp":
        return f"{PREFIX}{trait.upper()}"
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name)
    return f"{PREFIX}{words.upper()}_{trait.upper()}"


def file_config(path: Path) -> Config:
    """Return what a configuration file sets. Raises StartError that names file and line."""
    try:
        return PyFileConfigLoader(path.name, str(path.parent)).load_config()
    except ConfigFileNotFound:
        raise bad_configuration(f"the configuration file {path} does not exist") from None
    except SyntaxError as error:
        raise bad_configuration(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise bad_configuration(f"{where}: {type(error).__name__}: {error}") from None


def check_names(config: Config, classes: Iterable[type[Configurable]], where: str, options: Iterable[str] = ()) -> None:
    """Raise StartError for the first class or trait in `config` that does not exist; `options` may be meant too."""
    known: dict[str, set[str]] = {}
    for cls in classes:
        # A class is also set through the names of what it inherits from.
        for parent in cls.mro():
            if issubclass(parent, Configurable):
                settings = cls.class_traits(config=True).keys() & parent.class_traits(config=True).keys()
                known.setdefault(parent.__name__, set()).update(settings)
    for section, values in config.items():
        if section not in known:
            raise bad_configuration(
                f"{where}: there is no option or class {section!r}{_nearest(section, [*options, *known])}"
            )
        for name in values:
            if name not in known[section]:
                raise bad_configuration(f"{where}: {section} has no setting {name!r}{_nearest(name, known[section])}")


def bad_trait(error: Exception) -> StartError:
    """The sentence for a value that a trait refuses."""
    return bad_configuration(_in_words(error))


def _set(config: Config, target: tuple[str, str], trait: TraitType[Any, Any], variable: str, text: str) -> None:
    section, name = target
    if name == "log_level":
        text = text.upper()
    config[section][name] = _parsed(trait, variable, text)


def _parsed(trait: TraitType[Any, Any], variable: str, text: str) -> Any:
    try:
        if isinstance(trait, List):
            # As on the command line; not its from_string, since the traits of its elements ask for their owner.
            return trait.validate(HasTraits(), _listed(text))
        value = trait.from_string(text)
        return trait.validate(None, value) if value is not None and hasattr(trait, "validate") else value
    except (TraitError, ValueError, TypeError, SyntaxError) as error:
        shown = "" if trait.metadata.get("secret") else f"={text!r}"
        raise bad_configuration(
            f"the environment variable {variable}{shown} cannot be used: {_in_words(error)}"
        ) from None


def _listed(text: str) -> list[Any]:
    """The Python or JSON list that the text is, or else one with the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return value if isinstance(value, list) else [text]


def _in_words(error: Exception) -> str:
    """A trait's complaint on one line, without the name of a class that says nothing to its reader."""
    return re.sub(r" (trait )?of an? NoneType instance", "", " ".join(str(error).split())).rstrip(".")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def bad_configuration(text: str) -> StartError:
    """The sentence for a configuration that cannot be used."""
    return StartError(f"Bad configuration: {text}.", ExitCode.CONFIGURATION)
