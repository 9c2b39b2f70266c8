"""API keys: kept privately, made once, checked."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from gateway.auth import KEY_FILE, KeyCheck, find_key
from gateway.errors import ExitCode, StartError


def test_a_key_is_made_once_and_kept_privately(tmp_path: Path) -> None:
    first, second = find_key("", tmp_path), find_key("", tmp_path)
    assert first.made and not second.made
    assert first.value == second.value and len(first.value) > 40
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


def test_a_configured_key_is_not_written_to_disk(tmp_path: Path) -> None:
    assert find_key("configured-key", tmp_path).path is None
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    find_key("", tmp_path)
    (tmp_path / KEY_FILE).chmod(0o644)
    with pytest.raises(StartError, match="readable by others"):
        find_key("", tmp_path)


def test_a_link_in_the_place_of_the_key_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("another-secret\n")
    (tmp_path / KEY_FILE).symlink_to(tmp_path / "other")
    with pytest.raises(StartError) as caught:
        find_key("", tmp_path)
    assert caught.value.exit_code == ExitCode.UNWRITABLE


@pytest.mark.parametrize("key", ["short", "with blank in it", "schlüssel-schlüssel", "line\nbreak-line-break"])
def test_keys_that_no_header_carries_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(StartError):
        find_key(key, tmp_path)


@pytest.mark.parametrize(
    ("headers", "owner"),
    [
        ({"X-Api-Key": "right-key"}, "main"),
        ({"Authorization": "Bearer right-key"}, "main"),
        ({"Authorization": "token right-key"}, "main"),
        ({"Authorization": "Basic right-key"}, None),
        ({"X-Api-Key": "right-keyx"}, None),
        ({"X-Api-Key": "right-ke"}, None),
        ({"X-Api-Key": "ключ"}, None),
        ({"X-Api-Key": "\udcff"}, None),
        ({"X-Api-Key": ""}, None),
        ({}, None),
    ],
)
def test_only_the_key_opens(headers: dict[str, str], owner: str | None) -> None:
    assert KeyCheck({"right-key": "main", "other-key": "other"}).owner(headers) == owner
