"""The Jupyter interface: one module per resource."""

from __future__ import annotations

from typing import Any

from gateway.handlers.base import Services
from gateway.handlers.channels import ChannelsHandler
from gateway.handlers.jupyter.api import DocumentHandler, MeHandler, StatusHandler, VersionHandler
from gateway.handlers.jupyter.base import JupyterNotFoundHandler
from gateway.handlers.jupyter.kernels import InterruptHandler, KernelHandler, KernelsHandler, RestartHandler
from gateway.handlers.jupyter.kernelspecs import KernelSpecFileHandler, KernelSpecHandler, KernelSpecsHandler
from gateway.handlers.jupyter.notebook_sessions import NotebookSessionHandler, NotebookSessionsHandler
from gateway.jupyter_services import JupyterServices


def jupyter_routes(services: Services, jupyter: JupyterServices) -> list[tuple[str, Any, dict[str, Any]]]:
    """Path, handler and the handler's arguments of each resource."""
    known = {"services": services, "jupyter": jupyter}
    return [
        (r"/api/?", VersionHandler, known),
        (r"/api/status", StatusHandler, known),
        (r"/api/me", MeHandler, known),
        (r"/api/spec\.yaml", DocumentHandler, known),
        (r"/api/kernelspecs", KernelSpecsHandler, known),
        (r"/api/kernelspecs/([^/]+)", KernelSpecHandler, known),
        (r"/kernelspecs/([^/]+)/([^/]+)", KernelSpecFileHandler, known),
        (r"/api/kernels", KernelsHandler, known),
        (r"/api/kernels/([^/]+)", KernelHandler, known),
        (r"/api/kernels/([^/]+)/interrupt", InterruptHandler, known),
        (r"/api/kernels/([^/]+)/restart", RestartHandler, known),
        (r"/api/kernels/([^/]+)/channels", ChannelsHandler, known),
        (r"/api/sessions", NotebookSessionsHandler, known),
        (r"/api/sessions/([^/]+)", NotebookSessionHandler, known),
        (r"/api/.*|/kernelspecs/.*", JupyterNotFoundHandler, known),
    ]
