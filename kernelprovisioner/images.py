"""KernelImage: one folder of kernel-images/, read from its image.toml and validated."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

#: Labels of a container image that `samovar images build` made.
LABEL_IMAGE = "com.samovar.image"
LABEL_TEMPLATE = "com.samovar.template"
LABEL_BASE = "com.samovar.base"
LABEL_BASE_ID = "com.samovar.base-id"
#: on the stage that installs the packages: kept as build cache, untagged
LABEL_STAGE = "com.samovar.stage"

#: Files of an image's folder that explain it, but do not make it.
EXPLAINS = frozenset({"README.md", "requirements.in", "verify.py"})

_NAME = re.compile(r"[a-z][a-z0-9-]{0,38}")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VERSION = re.compile(r"\d+\.\d+")


class ImageError(Exception):
    """A kernel image's folder cannot be used; the text names file, line and what to change."""


@dataclass(frozen=True)
class Limits:
    """What the operating system enforces on one sandbox. Sizes in MiB; cpus in cores."""

    memory_mb: int = 512
    cpus: float = 1.0
    pids: int = 128
    open_files: int = 1024
    work_mb: int = 256
    tmp_mb: int = 64
    shm_mb: int = 64

    @property
    def container_memory_mb(self) -> int:
        """The container's memory limit: tmpfs pages are charged to it, so they are added (measured, DESIGN.md)."""
        return self.memory_mb + self.work_mb + self.tmp_mb + self.shm_mb


@dataclass(frozen=True)
class PoolBounds:
    """`min` warm sandboxes are kept ready; `max` bounds all live ones of the image, warm and claimed."""

    min: int = 2
    max: int = 10


@dataclass(frozen=True)
class KernelImage:
    """One kernel image as its folder describes it."""

    name: str
    language: str
    display_name: str
    folder: Path
    base: str
    #: the base's Python that the pinned wheels are for ("3.11"); None where the image installs no wheels
    python: str | None = None
    preload: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    pool: PoolBounds = field(default_factory=PoolBounds)
    environment: dict[str, str] = field(default_factory=dict)
    #: names that a caller may set in a sandbox's environment; "*" allows all that no deny-list names
    environment_allow: tuple[str, ...] = ("*",)

    @property
    def repository(self) -> str:
        """The container image's repository name, without tag."""
        return f"samovar/{self.name}"

    @property
    def tag(self) -> str:
        """The container image that sandboxes start from."""
        return f"{self.repository}:latest"


#: Lowest and highest value of each number in image.toml.
_BOUNDS: dict[str, tuple[float, float]] = {
    "limits.memory_mb": (64, 1 << 20),
    "limits.cpus": (0.05, 1024),
    "limits.pids": (8, 1 << 16),
    "limits.open_files": (64, 1 << 20),
    "limits.work_mb": (1, 1 << 20),
    "limits.tmp_mb": (1, 1 << 20),
    "limits.shm_mb": (1, 1 << 20),
    "pool.min": (0, 10_000),
    "pool.max": (1, 10_000),
}
_KEYS: dict[str, frozenset[str]] = {
    "": frozenset({"language", "display_name", "base", "python", "preload", "limits", "pool", "environment"}),
    "limits": frozenset(f.name for f in fields(Limits)),
    "pool": frozenset(f.name for f in fields(PoolBounds)),
    "environment": frozenset({"allow", "set"}),
}


def read_image(folder: Path) -> KernelImage:
    """The image that `folder` describes. Raises ImageError naming file, line, key and the value that is wrong."""
    path = folder / "image.toml"
    if not _NAME.fullmatch(folder.name):
        raise ImageError(
            f"{folder}: a kernel image's folder is named with lower-case letters, digits and '-', at most 39 of them"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{path}: cannot be read: {error}") from None
    return _Reader(path, text).image()


def read_images(root: Path | None = None) -> dict[str, KernelImage]:
    """All kernel images by name, from `root` or from where this installation keeps them. Raises ImageError."""
    root = kernel_images_folder() if root is None else root
    return {path.parent.name: read_image(path.parent) for path in sorted(root.glob("*/image.toml"))}


def find_image(name: str, root: Path | None = None) -> KernelImage:
    """The kernel image called `name`. Raises ImageError that lists what there is."""
    root = kernel_images_folder() if root is None else root
    if _NAME.fullmatch(name) and (root / name / "image.toml").is_file():
        return read_image(root / name)
    known = ", ".join(sorted(path.parent.name for path in root.glob("*/image.toml"))) or "none"
    raise ImageError(f"there is no kernel image '{name}' in {root}; there are: {known}")


def kernel_images_folder() -> Path:
    """Where the kernel images' folders are: package data of an installed wheel, else `kernel-images/` of the checkout.

    Raises ImageError if neither is there.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "kernel_images", here.parent / "kernel-images"):
        if (folder / "seccomp.json").is_file():
            return folder
    raise ImageError(f"the kernel images are missing from this installation (looked beside {here}): install it again")


def seccomp_profile() -> str:
    """The seccomp profile of every sandbox, as JSON text. Raises ImageError if it is missing."""
    path = kernel_images_folder() / "seccomp.json"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ImageError(f"seccomp profile {path} cannot be read ({error.strerror}): install samovar again") from None


def samovar_kernel_folder() -> Path:
    """The source of the package that runs inside every container. Raises ImageError if it is missing."""
    spec = importlib.util.find_spec("samovar_kernel")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).resolve().parent
    folder = kernel_images_folder() / "samovar_kernel"
    if not (folder / "__init__.py").is_file():
        raise ImageError("the package samovar_kernel is missing from this installation: install it again")
    return folder


def source_files(folder: Path) -> dict[str, bytes]:
    """Relative name → content of the files in `folder` that a build sees: no bytecode, no hidden ones, no links."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if hidden or path.is_symlink() or not path.is_file():
            continue
        found[relative.as_posix()] = path.read_bytes()
    return found


def build_files(image: KernelImage) -> dict[str, bytes]:
    """Name in the build context → content of all that makes the container image, beside its base and its wheels."""
    files = {name: content for name, content in source_files(image.folder).items() if name not in EXPLAINS}
    kernel = source_files(samovar_kernel_folder())
    return files | {f"samovar_kernel/{name}": content for name, content in kernel.items()}


def template_hash(base: str, files: Mapping[str, bytes]) -> str:
    """64 hex digits over everything that makes a container image: the base's name and its `build_files`."""
    digest = hashlib.sha256()

    def add(name: str, content: bytes) -> None:
        # The lengths keep two different sets of files from giving the same bytes.
        digest.update(f"{len(name)}:{name}:{len(content)}:".encode() + content)

    add("base", base.encode())
    for name in sorted(files):
        add(f"file/{name}", files[name])
    return digest.hexdigest()


_Numbers = TypeVar("_Numbers", Limits, PoolBounds)


class _Reader:
    """One image.toml: its text, what it parses to, and where each key stands."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines = text.splitlines()
        try:
            self.data: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            at = re.search(r" \(at line (\d+), column \d+\)$", str(error))
            line = int(at[1]) if at else max(1, len(self.lines))
            what = str(error).removesuffix(at[0]) if at else str(error).replace(" (at end of document)", "")
            raise ImageError(f"{path}:{line}: not valid TOML: {what}") from None

    def image(self) -> KernelImage:
        self._check_keys("", self.data)
        language = self._text("language")
        limits = self._numbers("limits", Limits)
        pool = self._numbers("pool", PoolBounds)
        if pool.min > pool.max:
            raise self._wrong("pool.min", f"must not be above pool.max ({pool.max})", pool.min)
        environment = self._table("environment")
        self._check_keys("environment", environment)
        python = self._text("python") if "python" in self.data else None
        if python is not None and not _VERSION.fullmatch(python):
            raise self._wrong("python", 'must be a version such as "3.11"', python)
        if python is None and (self.path.parent / "requirements.txt").is_file():
            raise self._wrong("python", "is missing: requirements.txt needs to know for which Python", None)
        return KernelImage(
            name=self.path.parent.name,
            language=language,
            display_name=self._text("display_name"),
            folder=self.path.parent,
            base=self._text("base"),
            python=python,
            preload=self._names("preload", _MODULE, "a module's name"),
            limits=limits,
            pool=pool,
            environment=self._variables(),
            environment_allow=self._names("environment.allow", _VARIABLE, "a variable's name", default=("*",)),
        )

    def _wrong(self, key: str, rule: str, value: object) -> ImageError:
        shown = "" if value is None else f", not {value!r}"
        return ImageError(f"{self.path}:{self._line(key)}: {key} {rule}{shown}")

    def _line(self, key: str) -> int:
        """The line (from 1) where `key` (dotted) is set; the line of its table, or 1, if it is not found."""
        table, line_of_parent = "", 1
        for number, line in enumerate(self.lines, start=1):
            if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
                table = re.sub(r"[\s\"']", "", header[1])
                if table == key:
                    return number
                if key.startswith(f"{table}."):
                    line_of_parent = number
            elif setting := re.match(r"\s*([\w\-\"'. ]+?)\s*=", line):
                name = re.sub(r"[\s\"']", "", setting[1])
                full = f"{table}.{name}" if table else name
                if full == key:
                    return number
                if key.startswith(f"{full}."):
                    line_of_parent = number
        return line_of_parent

    def _check_keys(self, table: str, data: dict[str, Any]) -> None:
        for key in data:
            if key in _KEYS[table]:
                continue
            near = difflib.get_close_matches(key, _KEYS[table], n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(sorted(_KEYS[table]))}"
            full = f"{table}.{key}" if table else key
            raise self._wrong(full, f"is not a known key; {hint}", None)

    def _table(self, key: str, within: dict[str, Any] | None = None) -> dict[str, Any]:
        value = (self.data if within is None else within).get(key.rpartition(".")[2], {})
        if not isinstance(value, dict):
            raise self._wrong(key, f"must be a table ([{key}])", value)
        return value

    def _text(self, key: str) -> str:
        value = self.data.get(key)
        if value is None:
            raise self._wrong(key, "is missing", None)
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise self._wrong(key, "must be a text of one line, not empty", value)
        return value

    def _numbers(self, table: str, kind: type[_Numbers]) -> _Numbers:
        """`kind` with the numbers that `table` sets; a whole number is needed where the default is one."""
        data = self._table(table)
        self._check_keys(table, data)
        whole = {f.name: isinstance(f.default, int) for f in fields(kind)}
        for name, value in data.items():
            key = f"{table}.{name}"
            low, high = _BOUNDS[key]
            number = isinstance(value, int if whole[name] else int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                a_number = "a whole number" if whole[name] else "a number"
                raise self._wrong(key, f"must be {a_number} from {low:g} to {high:,}", value)
        return kind(**data)

    def _names(self, key: str, pattern: re.Pattern[str], what: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        table, _, name = key.rpartition(".")
        value = (self._table(table) if table else self.data).get(name)
        if value is None:
            return default
        if not isinstance(value, list):
            raise self._wrong(key, "must be a list of texts", value)
        for item in value:
            if not isinstance(item, str) or not (pattern.fullmatch(item) or (item == "*" and "*" in default)):
                raise self._wrong(key, f"must hold only texts that are {what}", item)
        return tuple(value)

    def _variables(self) -> dict[str, str]:
        variables = self._table("environment.set", self._table("environment"))
        for name, value in variables.items():
            if not _VARIABLE.fullmatch(name):
                raise self._wrong(f"environment.set.{name}", "is not a variable's name", None)
            if not isinstance(value, str) or "\0" in value:
                raise self._wrong(f"environment.set.{name}", "must be a text", value)
        return variables
