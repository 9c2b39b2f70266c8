"""Diagnosis: everything that `samovar doctor` looks at, area by area. All of it blocks, and each wait is bounded."""

from __future__ import annotations

import http.client
import json
import os
import resource
import socket
import stat
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager

from gateway.app import GatewayApp
from gateway.auth import KEY_FILE
from gateway.checks import check_directory, check_engine, check_image, temporary_directory
from gateway.errors import StartError
from gateway.settings import PoolSettings, SandboxLimits
from gateway.verdicts import (
    Judgement,
    Served,
    counted,
    failure,
    good,
    judge_bounds,
    judge_cpus,
    judge_enforcement,
    judge_files,
    judge_health,
    judge_memory,
    judged,
    warning,
)
from kernelprovisioner.images import ImageError, read_images
from kernelprovisioner.inventory import Inventory, Life, take_inventory
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, explain
from kernelprovisioner.runtime import (
    CLAIM_SOCKET,
    ENVIRONMENT_NAME,
    RuntimeDirectoryError,
    check_length,
    check_private,
)

_ENGINE_SECONDS = 5.0
_HTTP_SECONDS = 8.0
_CONNECT_SECONDS = 2.0
_KERNEL = "sandbox"


def diagnose(app: GatewayApp, root: Path, client: Any | None) -> list[Judgement]:
    """Return all judgements under this configuration; `root` is the runtime directory.

    `client` is docker's low-level client, None where no engine answers or none is needed.
    """
    served, found = configuration(app)
    about_engine, info = engine(app, served, client)
    inventory = take_inventory(root, client if info else None)
    return [
        *found,
        *about_engine,
        *directories(app, root, info),
        *limits(served, info),
        *gateway(app, root, inventory),
        *leftovers(inventory),
        jupyter(),
    ]


# --- configuration and images ---------------------------------------------------------------------------------------


def configuration(app: GatewayApp) -> tuple[list[Served], list[Judgement]]:
    """Return the kernel images that would be served, and what is wrong with images and pool bounds."""
    what = "configuration"
    mend = "see docs/configuration.md, and samovar --help-all"
    try:
        there = read_images()
        pools = PoolSettings(parent=app)
        pools.check_names(there)
        chosen = [there[name] for name in app.images] if app.images else list(there.values())
        served = [
            Served(SandboxLimits(parent=app).applied_to(image), pools.of(image), pools.upkeep_of(image).schedule)
            for image in chosen
        ]
    except (StartError, ImageError) as error:
        return [], [failure(what, str(error), mend)]
    except KeyError as error:
        return [], [failure(what, f"there is no kernel image {error}; there is: {', '.join(there)}", mend)]
    return served, [good(what, "settings and kernel images can be used"), *(judge_bounds(one) for one in served)]


def engine(app: GatewayApp, served: Iterable[Served], client: Any | None) -> tuple[list[Judgement], Mapping[str, Any]]:
    """The engine and the container images in it; and what it says of itself, empty where it does not answer."""
    if app.launcher == "process":
        said = "none is used: code runs as plain processes of this user and is not isolated"
        return [warning("engine", said, "set SAMOVAR_LAUNCHER=auto")], {}
    finding = check_engine(app.docker_url, _ENGINE_SECONDS)
    facts = finding.facts
    fine = f"{facts.get('version')} at {app.docker_url} answers in {facts.get('answered_in_ms')} ms"
    found = [judged("engine", finding, fine)]
    info: Mapping[str, Any] = {}
    if client is not None and finding.status != "unhealthy":
        try:
            info = client.info()
        except ENGINE_ERRORS as error:
            found.append(failure("engine", f"it does not tell about itself: {explain(error)}", "docker info"))
    if not info:
        return found, {}
    found += judge_enforcement(info)
    for one in served:
        about = check_image(app.docker_url, one.image, app.data_directory, _ENGINE_SECONDS)
        size = about.facts.get("size", 0) / 1e6
        found.append(
            judged(f"image {one.image.name}", about, f"{one.image.tag} is there and up to date ({size:.0f} MB)")
        )
    return found, info


# --- directories ----------------------------------------------------------------------------------------------------


def directories(app: GatewayApp, root: Path, info: Mapping[str, Any]) -> list[Judgement]:
    """Data, runtime and temporary directory, where the engine keeps its containers, API key and log."""
    data = app.data_directory
    found = [
        check_place("data directory", data, "the API key, the log and recorded answers", "SAMOVAR_DATA_DIR"),
        check_runtime_directory(root),
        check_temporary_directory(),
    ]
    theirs = Path(str(info.get("DockerRootDir") or ""))
    if app.docker_url.startswith("unix:") and theirs.is_absolute() and os.access(theirs, os.W_OK | os.X_OK):
        found.append(check_place("engine's directory", theirs, "the engine's images and containers", "its data-root"))
    if not app.api_key:
        found += _check_key(data / KEY_FILE)
    if app.log_file_mb:
        found.append(_check_log(app.log_path))
    return found


def check_place(what: str, path: Path, needed_for: str, variable: str) -> Judgement:
    """Whether a directory is there, or can be made, and has room."""
    if not path.exists():
        return _to_be_made(what, path, variable)
    finding = check_directory(path, needed_for)
    return judged(what, finding, f"{path} is there and writable, {_room(finding.facts)} free")


def check_temporary_directory() -> Judgement:
    """Whether files can be made where temporary ones go."""
    path = temporary_directory()
    finding = check_directory(path, "building images and running notebooks")
    return judged("temporary directory", finding, f"{path} is writable, {_room(finding.facts)} free")


def check_runtime_directory(path: Path) -> Judgement:
    """Whether the runtime directory is ours alone, short enough for sockets, and has room."""
    what = "runtime directory"
    try:
        check_length(path)
        check_private(path)
    except RuntimeDirectoryError as error:
        problem, _, mend = str(error).rpartition("; ")
        return failure(what, problem, mend.removeprefix("run: "))
    except FileNotFoundError:
        return _to_be_made(what, path, ENVIRONMENT_NAME)
    except OSError as error:
        return failure(what, f"{path} cannot be seen: {error.strerror}", f"set {ENVIRONMENT_NAME} to another one")
    return check_place(what, path, "the sandboxes' sockets and records", ENVIRONMENT_NAME)


def _to_be_made(what: str, path: Path, variable: str) -> Judgement:
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        return good(what, f"{path} is not there yet: the first start makes it")
    said = f"{path} is not there, and you cannot make it in {parent}"
    return failure(what, said, f"have it made (mkdir -m 700 {path}), or set {variable} to another one")


def _room(facts: Mapping[str, Any]) -> str:
    free = float(facts.get("free_mb", 0))
    return f"{free / 1024:.0f} GiB" if free >= 10240 else f"{free:.0f} MiB"


def _check_key(path: Path) -> list[Judgement]:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return []  # not made yet, or the directory's own finding tells
    if mode & 0o077:
        return [failure("API key", f"{path} is readable by others (mode {mode:04o})", f"chmod 600 {path}")]
    return [good("API key", f"{path} is there and private")]


def _check_log(path: Path) -> Judgement:
    if path.exists() and not os.access(path, os.W_OK):
        return failure("log", f"{path} cannot be written", f"chown $USER {path}, or set LOG_FILE")
    return good("log", str(path) if path.exists() else f"{path} is not there yet")


# --- limits ---------------------------------------------------------------------------------------------------------


def limits(served: Iterable[Served], info: Mapping[str, Any]) -> list[Judgement]:
    """Open files, memory and CPUs against what full pools would take. `info`: what the engine says of its machine."""
    served = list(served)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = [judge_files(None if hard == resource.RLIM_INFINITY else hard, served)]
    total = info.get("MemTotal")
    if total:
        found.append(judge_memory(served, int(total)))
    if cpus := info.get("NCPU"):
        found += [judge_cpus(one, float(cpus)) for one in served]
    return found


# --- sockets and the gateway ----------------------------------------------------------------------------------------


def gateway(app: GatewayApp, root: Path, found: Inventory) -> list[Judgement]:
    """The claim socket, the port, and what a running gateway says of itself."""
    claims, pid = check_claim_socket(root / CLAIM_SOCKET)
    owners = [owner for owner in found.owners if owner.is_gateway and owner.life is Life.ALIVE]
    runs = pid is not None or any(owner.path.parent == root for owner in owners)
    return [claims, *check_port(app, runs)]


def check_claim_socket(path: Path) -> tuple[Judgement, int | None]:
    """Whether somebody serves the claim socket, and its process id."""
    what = "claim socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_SECONDS)
        try:
            probe.connect(str(path))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except FileNotFoundError:
            return good(what, "no gateway runs: Jupyter clients start their sandboxes cold (samovar serve)"), None
        except ConnectionRefusedError:
            said = f"{path} is stale: its gateway was killed, and Jupyter clients start their sandboxes cold"
            return warning(what, said, "samovar serve (it replaces the socket)"), None
        except OSError as error:
            said = f"{path} does not answer: {error.strerror or 'no answer in time'}"
            return failure(what, said, "look at the gateway: samovar ps; samovar logs"), None
    pid, _, _ = struct.unpack("3i", credentials)
    return good(what, f"{path} is served by process {pid}"), pid


def check_port(app: GatewayApp, runs: bool) -> list[Judgement]:
    """Whether the port is free or served by a gateway; of one that runs, what its health says."""
    if app.port == 0:
        return [good("port", "a free one is taken at each start")]
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(app.host, app.host)
    where = f"{host}, port {app.port},"
    try:
        status, body = _get(host, app.port, _key(app))
    except ConnectionRefusedError:
        if runs:
            said = f"a gateway runs, but nobody listens on {where} where this configuration says"
            return [warning("port", said, "run samovar doctor with the gateway's settings")]
        return [good("port", f"{where} is free")]
    except TimeoutError:
        said = f"{where} is open, but nothing is answered within {_HTTP_SECONDS:g} s"
        return [failure("port", said, f"see who it is: ss -ltnp 'sport = :{app.port}'; samovar logs")]
    except (OSError, http.client.HTTPException) as error:
        said = f"{where} cannot be used: {getattr(error, 'strerror', None) or error}"
        return [failure("port", said, f"see who it is: ss -ltnp 'sport = :{app.port}'; or set API_PORT")]
    if not isinstance(body, Mapping) or "version" not in body:
        said = f"{where} is used by another program (HTTP status {status})"
        return [failure("port", said, f"see who it is: ss -ltnp 'sport = :{app.port}'; or set API_PORT")]
    return [good("port", f"{where} is served by Samovar {body['version']}"), *judge_health(body)]


def _get(host: str, port: int, key: str | None) -> tuple[int, Any]:
    """Return status and JSON body of /health/detailed, or of /health where that needs a key that we do not have."""
    for path in ("/health/detailed", "/health"):
        connection = http.client.HTTPConnection(host, port, timeout=_HTTP_SECONDS)
        try:
            connection.request("GET", path, headers={"x-api-key": key} if key else {})
            response = connection.getresponse()
            raw = response.read(2**20)
        finally:
            connection.close()
        if response.status != http.client.UNAUTHORIZED:
            break
    try:
        return response.status, json.loads(raw)
    except ValueError:
        return response.status, None


def _key(app: GatewayApp) -> str | None:
    if app.api_key:
        return str(app.api_key)
    try:
        return (app.data_directory / KEY_FILE).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


# --- what was left, and Jupyter -------------------------------------------------------------------------------------


def leftovers(found: Inventory) -> list[Judgement]:
    """Dead owners and what could not be read of the living ones."""
    findings = [warning("runtime directory", problem, "samovar ps; samovar logs") for problem in found.problems]
    dead = [owner for owner in found.owners if owner.life is Life.DEAD]
    count = sum(sandbox.owner in dead for sandbox in found.sandboxes)
    if not dead:
        return [*findings, good("leftovers", "none: every sandbox has an owner that lives")]
    awaited = any(owner.is_awaited for owner in dead)
    mend = "samovar reap"
    if awaited:
        mend = "samovar serve (it takes up those that still run, removes the others), or samovar reap (it removes all)"
    who = "1 owner is" if len(dead) == 1 else f"{len(dead)} owners are"
    said = f"{who} gone and left {counted(count, 'sandbox', 'es')}"
    return [*findings, warning("leftovers", said, mend)]


def jupyter() -> Judgement:
    """Whether Jupyter knows our kernel."""
    if _KERNEL in KernelSpecManager().find_kernel_specs():
        return good("Jupyter", f"the kernel {_KERNEL!r} is installed")
    return warning("Jupyter", f"Jupyter does not know the kernel {_KERNEL!r}", "samovar kernelspec install")
