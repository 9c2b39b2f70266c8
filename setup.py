"""What pyproject.toml cannot say: the kernelspec's files, made by the one generator, as data files of the wheel."""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# The build is isolated: nothing of ours is importable yet, and the generator needs the standard library only.
sys.path.insert(0, str(ROOT))

from kernelprovisioner.kernelspecs import KERNELSPEC_NAME, kernelspec_files  # noqa: E402

# Data files are named relative to the project, so they are written below build/ first.
FOLDER = Path("build") / "kernelspecs" / KERNELSPEC_NAME


def data_files() -> list[tuple[str, list[str]]]:
    """Write the kernelspec's files; return them with the place where Jupyter looks for them."""
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    names = []
    for name, content in kernelspec_files().items():
        (ROOT / FOLDER / name).write_bytes(content)
        names.append(str(FOLDER / name))
    return [(f"share/jupyter/kernels/{KERNELSPEC_NAME}", names)]


setup(data_files=data_files())
