"""Settings: from command line, environment and file, and one clear sentence for what is wrong with them."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

import pytest

from gateway.app import GatewayApp
from gateway.cli import main
from gateway.cli.configuration import configured
from gateway.errors import ExitCode, StartError
from gateway.idle import IdleBounds
from gateway.limits import OwnerBounds
from gateway.settings import OwnerLimits, PoolSettings, SandboxLimits, SessionSettings, environment_name
from kernelprovisioner.images import KernelImage, PoolBounds, read_images


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests."""
    import os

    for name in list(os.environ):
        if name.startswith(("SAMOVAR_", "API_", "MAX_", "CONTAINER_POOL_", "DOCKER_", "LOG_LEVEL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def app(*argv: str) -> GatewayApp:
    made = GatewayApp()
    made.initialize(list(argv))
    return made


@pytest.fixture
def python_image() -> KernelImage:
    return read_images()["python"]


def test_the_command_line_wins_over_ours_over_known_names_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "samovar_config.py").write_text("c.GatewayApp.port = 1001\nc.GatewayApp.host = '::1'\n")
    assert (app().port, app().host) == (1001, "::1")
    monkeypatch.setenv("API_PORT", "1002")
    assert app().port == 1002
    monkeypatch.setenv("SAMOVAR_PORT", "1003")
    assert app().port == 1003
    assert app("--port=1004").port == 1004
    assert app().host == "::1"


def test_every_trait_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment_name("GatewayApp", "data_dir") == "SAMOVAR_DATA_DIR"
    assert environment_name("PoolSettings", "max_size") == "SAMOVAR_POOL_SETTINGS_MAX_SIZE"
    monkeypatch.setenv("SAMOVAR_POOL_SETTINGS_MAX_SIZE", "7")
    assert PoolSettings(parent=app()).max_size == 7


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (
            '["2 python on Mondays 08:55-10:00", "3 python on Fridays 08:55-10:00"]',
            ["2 python on Mondays", "3 python on F"],
        ),
        ("2 python on Mondays 08:55-10:00", ["2 python"]),
        ("[]", []),
    ],
)
def test_lists_come_from_variables_too(monkeypatch: pytest.MonkeyPatch, text: str, entries: list[str]) -> None:
    monkeypatch.setenv("SAMOVAR_POOL_SETTINGS_SCHEDULE", text)
    monkeypatch.setenv("SAMOVAR_IMAGES", "['python']")
    made = app()
    assert made.images == ["python"]
    read = PoolSettings(parent=made).schedule
    assert len(read) == len(entries) and all(map(str.startswith, read, entries))


def test_known_names_reach_pool_and_limits(monkeypatch: pytest.MonkeyPatch, python_image: KernelImage) -> None:
    known = {
        "CONTAINER_POOL_MIN_SIZE": "3",
        "CONTAINER_POOL_MAX_SIZE": "9",
        "CONTAINER_POOL_PY_MIN": "1",
        "MAX_MEMORY_MB": "300",
        "MAX_CPUS": "0.5",
        "MAX_PIDS": "50",
        "MAX_EXECUTION_TIME": "7",
    }
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    parent = app()
    assert PoolSettings(parent=parent).of(python_image) == PoolBounds(1, 9)
    limits = SandboxLimits(parent=parent).applied_to(python_image).limits
    assert (limits.memory_mb, limits.cpus, limits.pids) == (300, 0.5, 50)
    assert limits.work_mb == python_image.limits.work_mb


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("API_PORT", "many", "API_PORT='many'"),
        ("API_PORT", "70000", "65535"),
        ("MAX_CPUS", "0", "MAX_CPUS"),
        ("MAX_CPUS", "inf", "MAX_CPUS"),
        ("SAMOVAR_POOL_SETTINGS_LINE_BOUND", "0", "LINE_BOUND"),
        ("SAMOVAR_POOL_SETTINGS_SCHEDULE", "[1, 2]", "SAMOVAR_POOL_SETTINGS_SCHEDULE='[1, 2]'"),
        ("SAMOVAR_POOL_SETTINGS_HIT_RATE", "1.5", "HIT_RATE"),
        ("SAMOVAR_EXECUTION_SETTINGS_MAX_OUTPUT_MB", "inf", "MAX_OUTPUT_MB"),
        ("CONTAINER_POOL_PY_MAX", "x", "CONTAINER_POOL_PY_MAX"),
        ("LOG_LEVEL", "loud", "LOG_LEVEL"),
        ("MAX_EXECUTION_TIME", "nan", "MAX_EXECUTION_TIME='nan'"),
        ("MAX_EXECUTION_TIME", "inf", "finite"),
        ("MAX_CPUS", "nan", "MAX_CPUS"),
        ("SAMOVAR_DRAIN_TIMEOUT", "nan", "SAMOVAR_DRAIN_TIMEOUT"),
        ("SAMOVAR_DOCKER_LAUNCHER_ENGINE_TIMEOUT", "nan", "ENGINE_TIMEOUT"),
        ("SAMOVAR_LAUNCHER", "rocket", "SAMOVAR_LAUNCHER"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartError, match="Bad configuration") as caught:
        app()
    assert words in str(caught.value)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--GatewayApp.prot=5", "did you mean 'port'"),
        ("--prot=5", "did you mean 'port'"),
        ("--Gateway.port=5", "did you mean 'GatewayApp'"),
        ("--port=x", "port"),
        ("--GatewayApp.drain_timeout=nan", "finite"),
        ("--GatewayApp.show_config=True", "no setting 'show_config'"),
        ("--Application.show_config_json=True", "no setting 'show_config_json'"),
        ("--GatewayApp.log_format=x", "no setting 'log_format'"),
        ("--Application.log_datefmt=x", "no setting 'log_datefmt'"),
        ("--GatewayApp.logging_config={}", "no setting 'logging_config'"),
        ("rubbish", "rubbish"),
    ],
)
def test_a_bad_argument_is_named(argument: str, words: str) -> None:
    with pytest.raises(StartError) as caught:
        app(argument)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("c.GatewayApp.prot = 5\n", "prot"),
        ("x = 1\ny = 1 / 0\n", "line 2: ZeroDivisionError"),
        ("x = (\n", "line 1"),
        ("c.GatewayApp.port = 'x'\n", "port"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "samovar_config.py").write_text(text)
    with pytest.raises(StartError) as caught:
        app()
    assert words in str(caught.value)


def test_a_file_that_was_named_must_be_there() -> None:
    with pytest.raises(StartError, match=r"other\.py does not exist"):
        app("--config=other.py")


@pytest.mark.parametrize("level", ["warning", "WARN", "30"])
def test_levels_of_the_log(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("LOG_LEVEL", level)
    assert app().log_level == logging.WARNING
    assert app("--log-level=ERROR", "--Application.log_level=INFO").log_level == logging.ERROR


def test_the_help_shows_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    GatewayApp().print_help(classes=True)
    said = capsys.readouterr().out
    assert not re.search("show.config|log_format|log_datefmt|logging_config", said)
    assert re.search(r"GatewayApp.log_level=.*?Default: 'INFO'", said, re.DOTALL)


def test_other_commands_read_the_same_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samovar_config.py").write_text(
        "c.DockerLauncher.docker_url = 'unix:///no/engine.sock'\nc.GatewayApp.data_dir = 'kept'\n"
        "c.GatewayApp.runtime_dir = '/tmp/sv-there'\nc.GatewayApp.launcher = 'docker'\n"
    )
    found = configured(argparse.Namespace(config=None))
    assert (found.docker_url, found.data_directory) == ("unix:///no/engine.sock", tmp_path / "kept")
    assert found.provisioner_environment == {
        "SAMOVAR_LAUNCHER": "docker",
        "DOCKER_BASE_URL": "unix:///no/engine.sock",
        "SAMOVAR_RUNTIME_DIR": "/tmp/sv-there",
    }
    assert main(["images", "list"]) == ExitCode.NO_ENGINE
    assert "unix:///no/engine.sock" in capsys.readouterr().err
    assert main(["images", "--config", "other.py", "list"]) == ExitCode.CONFIGURATION
    monkeypatch.setenv("DOCKER_BASE_URL", "unix:///another.sock")
    assert configured(argparse.Namespace(config=None)).docker_url == "unix:///another.sock"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"min_size": 30}, (30, 30)),
        ({"max_size": 1}, (1, 1)),
        ({"min_size": 0}, (0, None)),
        ({"bounds": {"python": {"min": 5, "max": 6}}, "min_size": 1, "max_size": 2}, (5, 6)),
    ],
)
def test_pool_bounds(
    settings: dict[str, object], expected: tuple[int, int | None] | None, python_image: KernelImage
) -> None:
    bounds = PoolSettings(**settings).of(python_image)
    least, most = expected or (python_image.pool.min, python_image.pool.max)
    assert bounds == PoolBounds(least, most or python_image.pool.max)


@pytest.mark.parametrize(
    "settings",
    [{"min_size": 3, "max_size": 2}, {"bounds": {"python": {"mox": 2}}}, {"bounds": {"python": {"max": "2"}}}],
)
def test_impossible_bounds_are_refused(settings: dict[str, object], python_image: KernelImage) -> None:
    with pytest.raises(StartError, match="Bad configuration"):
        PoolSettings(**settings).of(python_image)


def test_a_schedule_is_read_for_each_image(python_image: KernelImage) -> None:
    settings = PoolSettings(
        schedule=["30 python on Mondays 08:55-10:00", "2 other on weekends 10:00-12:00"], hit_rate=0.9
    )
    upkeep = settings.upkeep_of(python_image)
    assert [str(entry) for entry in upkeep.schedule] == ["30 python on Mondays 08:55-10:00"]
    assert (upkeep.hit_rate, upkeep.max_age, upkeep.probe_interval) == (0.9, 43200.0, 15.0)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("30 python on Moondays 08:55-10:00", "'moondays' is no day"),
        ("30 pyhton on Mondays 08:55-10:00", r"no kernel image 'pyhton' \(did you mean 'python'\?\)"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(entry: str, words: str, python_image: KernelImage) -> None:
    with pytest.raises(StartError, match=rf"Bad configuration: PoolSettings\.schedule: .*{words}"):
        PoolSettings(schedule=[entry]).check_names([python_image.name])


def test_bounds_of_an_image_that_is_not_there_are_refused(python_image: KernelImage) -> None:
    settings = PoolSettings(bounds={"pyhton": {"min": 1}})
    with pytest.raises(StartError, match=r"'pyhton' \(did you mean 'python'\?\)"):
        settings.check_names([python_image.name])
    PoolSettings(bounds={"python": {"min": 1}}).check_names([python_image.name])


def test_keys_limits_and_idle_times_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEYS", "first-key,second-key")
    monkeypatch.setenv("MAX_CONCURRENT_EXECUTIONS", "5")
    monkeypatch.setenv("SAMOVAR_SESSION_SETTINGS_IDLE_TIMEOUT", "60")
    parent = app()
    assert sorted(parent.api_keys.values()) == ["first-key", "second-key"]
    assert OwnerLimits(parent=parent).bounds == OwnerBounds(sessions=None, executions=5)
    assert SessionSettings(parent=parent).bounds == IdleBounds(session=60.0, one_off=60.0)
    monkeypatch.setenv("SAMOVAR_API_KEYS", '{"ada": "key-of-ada"}')
    assert app().api_keys == {"ada": "key-of-ada"}


def test_keys_that_cannot_be_read_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMOVAR_API_KEYS", '{"ada": "key-of-ada"')
    with pytest.raises(StartError, match="SAMOVAR_API_KEYS cannot be used") as caught:
        app()
    assert "key-of-ada" not in str(caught.value)
