"""API keys: kept privately, made once, checked."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from gateway.api_keys import ApiKeys
from gateway.auth import KEY_FILE, ApiKey, KeyCheck, all_keys, find_key
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


def sha256(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def test_each_key_opens_for_its_owner() -> None:
    keys = all_keys(ApiKey("own-key-1"), {"ada": "key-of-ada", "bob": sha256("key-of-bob"), "main": "next-own-key"})
    owners = [keys.owner({"X-Api-Key": key}) for key in ("own-key-1", "key-of-ada", "key-of-bob", "next-own-key")]
    assert owners == ["main", "ada", "bob", "main"]
    assert keys.owner({"X-Api-Key": sha256("key-of-bob")}) is None, "the hash of a key is no key"


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"ada": "short"}, "at least 8"),
        ({"ada": 12345678}, "it is a text"),
        ({"ada": "sha256:abc"}, "64 hexadecimal digits"),
        ({"uid:0": "key-of-root"}, "name has"),
        ({"": "key-of-nobody"}, "name has"),
        ({"ada": "key-of-ada", "bob": "key-of-ada"}, "also that of 'ada'"),
        ({"ada": "key-of-ada", "bob": sha256("key-of-ada")}, "also that of 'ada'"),
        ({"ada": "own-key-1"}, "also that of 'main'"),
    ],
)
def test_a_key_that_cannot_be_used_names_its_owner_and_not_itself(keys: dict[str, object], why: str) -> None:
    with pytest.raises(StartError, match=why) as caught:
        all_keys(ApiKey("own-key-1"), keys)
    assert repr(list(keys)[-1]) in str(caught.value)
    assert not any(str(key) in str(caught.value) for key in keys.values())


def test_a_list_of_keys_makes_an_owner_for_each_that_outlives_the_start() -> None:
    listed = ApiKeys().from_string(" first-key,second-key, ")
    assert list(listed.values()) == ["first-key", "second-key"]
    assert ApiKeys().from_string(sha256("first-key")) == {next(iter(listed)): sha256("first-key")}
    assert ApiKeys().from_string("{'ada': 'key-of-ada'}") == {"ada": "key-of-ada"}


def test_the_gateways_own_key_is_not_given_as_a_hash(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"only GatewayApp\.api_keys"):
        find_key(sha256("own-key-1"), tmp_path)
