"""The `sandbox` kernelspec: what Jupyter lists and starts.

One generator for the wheel's data files and for `samovar kernelspec install`. Standard library only at import: setup.py
reads it before anything is installed.
"""

from __future__ import annotations

import json
from pathlib import Path

KERNELSPEC_NAME = "sandbox"
PROVISIONER_NAME = "samovar-provisioner"

_LOGO = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" role="img" aria-label="Samovar">
  <path d="M26 9c-3-3 3-4 0-7M32 9c-3-3 3-4 0-7M38 9c-3-3 3-4 0-7" fill="none" stroke="#9aa5b1" stroke-width="1.6" \
stroke-linecap="round"/>
  <rect x="25" y="11" width="14" height="4" rx="2" fill="#8c4a12"/>
  <path d="M19 18h26l-2 27c-.3 4-3 6-7 6h-8c-4 0-6.700-2-7-6z" fill="#d9822b"/>
  <path d="M23 21h4l1 26h-2c-1.500 0-2-1-2.100-2.500z" fill="#f5b971"/>
  <path d="M19 21c-8 0-9 12-1 13M45 21c8 0 9 12 1 13" fill="none" stroke="#8c4a12" stroke-width="2.600"/>
  <path d="M32 36v4h-5v3" fill="none" stroke="#6b3510" stroke-width="3"/>
  <circle cx="32" cy="34" r="2.600" fill="#6b3510"/>
  <rect x="23" y="51" width="18" height="4" fill="#8c4a12"/>
  <path d="M18 61c0-4 3-6 6-6h16c3 0 6 2 6 6z" fill="#6b3510"/>
</svg>
"""


def kernelspec_files() -> dict[str, bytes]:
    """Return the kernelspec's files: name → content."""
    return {"kernel.json": (json.dumps(_kernel_json(), indent=1) + "\n").encode(), "logo-svg.svg": _LOGO.encode()}


def install(*, user: bool = False, prefix: str | None = None) -> Path:
    """Install the kernelspec and return its directory.

    In the user's Jupyter directory (`user`), below `prefix`, or by default below the running interpreter's prefix.
    Raises OSError where the place cannot be written.
    """
    import sys
    import tempfile

    from jupyter_client.kernelspec import KernelSpecManager

    with tempfile.TemporaryDirectory(prefix="samovar-kernelspec-") as source:
        for name, content in kernelspec_files().items():
            (Path(source) / name).write_bytes(content)
            (Path(source) / name).chmod(0o644)
        Path(source).chmod(0o755)
        where = KernelSpecManager().install_kernel_spec(
            source, KERNELSPEC_NAME, user=user, prefix=None if user else prefix or sys.prefix
        )
    return Path(where)


def _kernel_json() -> dict[str, object]:
    return {
        # Never run: the provisioner starts the kernel. Jupyter only wants a list that names the connection file.
        "argv": [PROVISIONER_NAME, "{connection_file}"],
        "display_name": "Python 3 (sandbox)",
        "language": "python",
        "interrupt_mode": "message",
        "metadata": {
            "debugger": True,
            "kernel_provisioner": {
                "provisioner_name": PROVISIONER_NAME,
                "config": {"image": "python", "work_directory": "copy"},
            },
        },
    }
