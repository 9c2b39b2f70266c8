"""`samovar run`: what a person is told when there is nothing to run; runs themselves are tested with sandboxes."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from tqdm import tqdm

from gateway.cli import main
from gateway.cli.run import _as_text, _write


def test_a_missing_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "none.ipynb")]) == 66
    assert capsys.readouterr().err == f"samovar run: {tmp_path}/none.ipynb: there is no such file.\n"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"nbformat": 4}', "print(1)", "\x00\xff"])
def test_what_is_no_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "bad.ipynb"
    path.write_text(text)
    assert main(["run", str(path)]) == 78
    error = capsys.readouterr().err
    assert error.startswith(f"samovar run: {path} is not a notebook: ") and error.count("\n") == 1


def test_an_output_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "book.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), path)
    assert main(["run", str(path), "-o", str(tmp_path / "none" / "out.ipynb")]) == 73
    assert "does not exist or is not writable" in capsys.readouterr().err


def test_the_output_is_written_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.ipynb"
    path.write_text("old")
    _write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("ü")]), path)
    assert nbformat.read(path, as_version=4).cells[0].source == "ü"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.ipynb"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("gateway:8000", "'gateway:8000' is no address of a gateway: it begins with http:// or https://"),
        ("http://127.0.0.1:1", "no gateway answers at http://127.0.0.1:1: "),
    ],
)
def test_a_gateway_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str, reason: str
) -> None:
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # else it leaves a thread
    path = tmp_path / "book.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), path)
    assert main(["run", str(path), "--gateway-url", url]) == 70
    assert capsys.readouterr().err.startswith(f"samovar run: {reason}")


def test_a_key_without_a_gateway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "none.ipynb"), "--api-key", "x"])
    assert "--api-key goes with --gateway-url" in capsys.readouterr().err


def test_outputs_as_text() -> None:
    output = nbformat.v4.new_output
    assert _as_text(output("stream", name="stdout", text="a\n")) == "a\n"
    assert _as_text(output("execute_result", data={"text/plain": "42"})) == "42\n"
    assert _as_text(output("error", ename="E", evalue="v", traceback=["t"])) == ""
