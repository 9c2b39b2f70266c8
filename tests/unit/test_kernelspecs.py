"""The `sandbox` kernelspec: one generator, and what Jupyter reads from what it writes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

from kernelprovisioner import kernelspecs


def test_the_files_are_what_jupyter_needs() -> None:
    files = kernelspecs.kernelspec_files()
    assert set(files) == {"kernel.json", "logo-svg.svg"}
    spec = json.loads(files["kernel.json"])
    assert spec["display_name"] == "Python 3 (sandbox)"
    assert spec["interrupt_mode"] == "message"
    assert spec["language"] == "python"
    assert spec["metadata"]["debugger"] is True
    assert spec["metadata"]["kernel_provisioner"] == {
        "provisioner_name": "samovar-provisioner",
        "config": {"image": "python", "work_directory": "copy"},
    }
    assert ElementTree.fromstring(files["logo-svg.svg"]).tag.endswith("svg")


def test_it_is_installed_where_jupyter_finds_it(tmp_path: Path) -> None:
    where = kernelspecs.install(prefix=str(tmp_path))
    assert where == tmp_path / "share" / "jupyter" / "kernels" / "sandbox"
    manager = KernelSpecManager(kernel_dirs=[str(where.parent)])
    assert manager.find_kernel_specs()["sandbox"] == str(where)
    spec = KernelSpec.from_resource_dir(str(where))
    assert spec.display_name == "Python 3 (sandbox)"
    # Again: an older one is replaced.
    assert kernelspecs.install(prefix=str(tmp_path)) == where
