"""What the project's own files say of each other is true."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

from benchmarks import report
from gateway.app import GatewayApp
from gateway.cli import COMMANDS
from gateway.settings import KNOWN_NAMES, environment_name
from kernelprovisioner.sandbox_exit import ExitCause

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_in_the_wheel() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for name in ("gateway", "kernelprovisioner")
        for path in (ROOT / name).rglob("*.py")
    }
    assert listed == found | {"samovar_kernel", "kernelprovisioner.kernel_images"}


def test_every_dependency_is_bounded() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *(one for extra in extras.values() for one in extra)]:
        # The clients whose conformance is tested have one version each.
        pinned = requirement in extras["test"] and re.fullmatch(r"[\w-]+==[\d.]+", requirement)
        assert pinned or re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+|samovar\[\w+\]", requirement), requirement


def _environment_names(class_name: str, trait: str) -> list[str]:
    """What sets a trait: the variables that code interpreters know, and last our own, which wins."""
    known = [name for name, target in KNOWN_NAMES.items() if target == (class_name, trait)]
    return [*known, environment_name(class_name, trait)]


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for cls in [GatewayApp, *GatewayApp.classes]:
        section = text.partition(f"## {cls.__name__}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", section, re.MULTILINE)
        documented = {name: re.findall(r"`(\w+)`", environment) for name, _, environment in rows}
        settings = cls.class_traits(config=True)
        assert documented == {name: _environment_names(cls.__name__, name) for name in settings}, cls.__name__
        for name, shown, _ in rows:
            plain = settings[name].default_value
            if shown.startswith("`") and isinstance(plain, bool | int | float | str) and plain != "":
                assert shown == f"`{plain}`", name
    for known in KNOWN_NAMES:
        assert f"`{known}`" in text


def test_the_readme_shows_the_results() -> None:
    document = json.loads(report.RESULTS.read_text())
    text = report.README.read_text()
    assert report.readme_with(text, document) == text, (
        "the README's table is not that of results.json: run `make bench`"
    )
    samples = json.loads(report.SAMPLES.read_text())
    for row in document["results"]:
        assert len(samples[row["case"]]) == row["n"]
        assert report.percentile(samples[row["case"]], 0.99) == pytest.approx(row["p99_ms"], abs=0.001)


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_operators_guide_knows_all_causes_and_only_commands_that_exist() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \| .*? \| .*? \|$", text, re.MULTILINE)) == set(ExitCause)
    assert set(re.findall(r"(?:`|/bin/)samovar (\w+)", text)) <= set(COMMANDS)


def test_every_target_of_the_contributing_page_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_example_notebook_is_clean() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "sandbox"
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")


def test_percentiles_are_samples() -> None:
    samples = [float(n) for n in range(1, 101)]
    assert report.percentile(samples, 0.99) == 99.0
    assert report.percentile([5.0], 0.99) == 5.0


def test_a_missed_bar_is_said() -> None:
    held = report.result("live", [1.2] * 10, [1.0] * 10)
    missed = report.result("claim", [0.5] * 9 + [9.0], [1.0] * 10)
    assert (held.held, missed.held) == (True, False)
    versions = {"cpus": 2, "engine": "1", "python": "3", "ipykernel": "7", "pyzmq": "27"}
    lines = report.table({"versions": versions, "results": [vars(held), vars(missed)]}).splitlines()
    assert lines[2].endswith("| 1.20 | ≤ 1.3 |")
    assert lines[3].endswith("| 0.50 (p99 9.00) | ≤ 0.6 (p99 ≤ 4), missed |")
