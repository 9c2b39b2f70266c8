"""KernelSpecs: the kernels that Jupyter clients may start here, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from gateway.errors import Detail, ExitCode, RequestError, StartError
from kernelprovisioner.images import KernelImage
from kernelprovisioner.kernelspecs import KERNELSPEC_NAME, kernelspec_files

#: The kernel image whose kernelspec is not called like it, but as in a JupyterLab with our provisioner.
_PYTHON = "python"
#: What jupyter_client takes for a kernelspec's name.
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")


@dataclass(frozen=True)
class KernelSpec:
    """A name under which a kernel image is offered."""

    name: str
    image: KernelImage

    @property
    def files(self) -> dict[str, bytes]:
        """The files beside its description: name → content."""
        return {name: content for name, content in kernelspec_files().items() if name.startswith("logo-")}


class KernelSpecs:
    """One kernelspec for each kernel image, and the aliases that are configured."""

    def __init__(self, images: Mapping[str, KernelImage], aliases: Mapping[str, object], default: str = "") -> None:
        """`aliases`: further name → name of a kernelspec. Raises StartError for a name that means nothing."""
        named = {KERNELSPEC_NAME if name == _PYTHON else name: image for name, image in images.items()}
        self._specs = {name: KernelSpec(name, image) for name, image in named.items()}
        for alias, name in aliases.items():
            if not isinstance(name, str) or name not in named:
                raise _bad(f"JupyterSettings.kernel_aliases[{alias!r}]: there is no kernel {name!r}", named)
            if not _NAME.fullmatch(alias):
                text = "a kernel's name has letters, digits, '.', '_' and '-'"
                raise _bad(f"JupyterSettings.kernel_aliases[{alias!r}]: {text}", named)
            self._specs[alias] = KernelSpec(alias, named[name])
        if default and default not in self._specs:
            raise _bad(f"JupyterSettings.default_kernel_name: there is no kernel {default!r}", self._specs)
        #: the name of the kernel that is started where none is asked for
        self.default = default or (KERNELSPEC_NAME if KERNELSPEC_NAME in self._specs else next(iter(self._specs), ""))

    def list(self) -> list[KernelSpec]:
        """All of them, aliases last."""
        return list(self._specs.values())

    def find(self, name: str) -> KernelSpec:
        """The kernelspec of that name. Raises RequestError (404)."""
        spec = self._specs.get(name)
        if spec is None:
            raise RequestError(HTTPStatus.NOT_FOUND, "kernelspec_not_found", self._missing(name))
        return spec

    def resolve(self, name: str | None) -> KernelSpec:
        """What a request to start a kernel means; no name is the default's. Raises RequestError (400)."""
        spec = self._specs.get(name or self.default)
        if spec is None:
            text = self._missing(name or self.default)
            details = [Detail("name", text, "not_found")]
            raise RequestError(HTTPStatus.BAD_REQUEST, "kernelspec_not_found", text, details=details)
        return spec

    def _missing(self, name: str) -> str:
        return f"There is no kernel {name[:80]!r} here; there is: {', '.join(self._specs) or 'none'}."


def _bad(text: str, known: Mapping[str, object]) -> StartError:
    there = ", ".join(known) or "none"
    return StartError(f"Bad configuration: {text}; there is: {there}.", ExitCode.CONFIGURATION)
