"""/api/kernelspecs, /api/kernelspecs/{name} and /kernelspecs/{name}/{file}."""

from __future__ import annotations

import mimetypes
from http import HTTPStatus

from gateway.errors import RequestError
from gateway.handlers.jupyter.base import JupyterHandler
from gateway.jupyter_models import KernelSpecsModel, kernelspec_model

_KEPT_SECONDS = 24 * 3600


class KernelSpecsHandler(JupyterHandler):
    """All kernelspecs."""

    def get(self) -> None:
        _ = self.owner
        specs = self.jupyter.specs
        self.answer(KernelSpecsModel(specs.default, {spec.name: kernelspec_model(spec) for spec in specs.list()}))


class KernelSpecHandler(JupyterHandler):
    """One kernelspec."""

    def get(self, name: str) -> None:
        _ = self.owner
        self.answer(kernelspec_model(self.jupyter.specs.find(name)))


class KernelSpecFileHandler(JupyterHandler):
    """A logo."""

    def get(self, name: str, file: str) -> None:
        _ = self.owner
        content = self.jupyter.specs.find(name).files.get(file)
        if content is None:
            text = f"The kernelspec {name!r} has no file {file[:80]!r}."
            raise RequestError(HTTPStatus.NOT_FOUND, "not_found", text)
        self.set_header("Content-Type", mimetypes.guess_type(file)[0] or "application/octet-stream")
        self.set_header("Cache-Control", f"private, max-age={_KEPT_SECONDS}")
        # Opened by itself, a drawing could else run code as a page of this origin.
        self.set_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; sandbox")
        self.finish(content)

    head = get
