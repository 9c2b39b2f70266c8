"""200 creations at once: never more than places or limits, nobody lost in line, its deadline and its end honoured."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from tests.integration.engine_census import Census
from tests.integration.light_gateway import LightGateway, Timed, light_gateway

pytestmark = pytest.mark.service

CREATIONS = 200
PLACES = 3
LINE = 6
LINE_SECONDS = 5.0


async def create(gateway: LightGateway, nonces: list[str], **fields: str) -> list[Timed]:
    """A new session for each nonce, all at once; what was run has given the right answer."""
    answers = await asyncio.gather(*(gateway.exec(f"print({nonce!r})", **fields) for nonce in nonces))
    for nonce, answer in zip(nonces, answers, strict=True):
        assert answer.status in (200, 429, 503), answer
        if answer.status == 200:
            assert answer.body["stdout"] == f"{nonce}\n", answer
        else:
            assert int(answer.headers["Retry-After"]) >= 1
    return list(answers)


def nonces() -> list[str]:
    return [secrets.token_hex(4) for _ in range(CREATIONS)]


def options(**pool: float) -> list[str]:
    bounds = {"min_size": PLACES, "max_size": PLACES, "line_bound": LINE, **pool}
    return [f"--PoolSettings.{name}={value}" for name, value in bounds.items()]


async def test_beyond_the_line_the_answer_comes_at_once_and_in_it_at_the_deadline(
    docker_url: str, kernel_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with light_gateway(docker_url, monkeypatch, *options(line_timeout=LINE_SECONDS)) as gateway:
        await gateway.reached("warm", PLACES)
        # All places are busy for longer than anybody may wait.
        code = f"import time; time.sleep({LINE_SECONDS + 4})"
        sleeping = [asyncio.create_task(gateway.exec(code)) for _ in range(PLACES)]
        await gateway.reached("claimed", PLACES)
        answers = await create(gateway, nonces())
        assert {answer.status for answer in answers} == {503}
        beyond = [answer for answer in answers if "claims wait already" in answer.body["error"]]
        waited = [answer for answer in answers if "became free within" in answer.body["error"]]
        assert (len(beyond), len(waited)) == (CREATIONS - LINE, LINE)
        assert max(answer.seconds for answer in beyond) < LINE_SECONDS <= min(answer.seconds for answer in waited)
        assert (await gateway.pool())["waiting"] == 0
        assert [(await one).status for one in sleeping] == [200] * PLACES


async def test_nobody_is_lost_in_line_and_there_are_never_more_sandboxes_than_places(
    docker_url: str, kernel_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with light_gateway(docker_url, monkeypatch, *options()) as gateway:
        await gateway.reached("warm", PLACES)
        with Census(docker_url, gateway.runtime) as census:
            answers = await create(gateway, nonces())
            served = [answer for answer in answers if answer.status == 200]
            assert len(served) >= PLACES + LINE
            assert len({answer.body["container_id"] for answer in served}) == len(served)
            assert all("claims wait already" in answer.body["error"] for answer in answers if answer.status == 503)
            assert sorted({answer.body["source"] for answer in served}) == ["started", "warm"]
            assert max(answer.body["timings"]["wait_ms"] for answer in served) > 0
            assert (await gateway.pool())["waiting"] == 0
        assert len(census.most) <= PLACES, "\n".join(census.most)


async def test_two_hundred_creations_of_two_owners_within_their_limits(
    docker_url: str, kernel_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = (
        *("--PoolSettings.min_size=2", "--PoolSettings.max_size=8"),
        *("--OwnerLimits.max_sessions=2", "--OwnerLimits.max_executions=10"),
    )
    monkeypatch.setenv("API_KEYS", "key-of-ada,key-of-bob")
    async with light_gateway(docker_url, monkeypatch, *limits) as gateway:
        both = await asyncio.gather(
            *(
                create(gateway, nonces()[: CREATIONS // 2], key=key, user_id="one")
                for key in ("key-of-ada", "key-of-bob")
            )
        )
        for answers in both:
            assert [answer.status for answer in answers].count(200) == 2
            assert [answer.status for answer in answers].count(429) == CREATIONS // 2 - 2
            named = {answer.body["details"][0]["code"] for answer in answers if answer.status == 429}
            assert named == {"max_sessions", "max_executions"}
        assert (await gateway.pool())["claimed"] == 4


async def test_a_session_that_nobody_uses_gives_its_container_back_and_its_next_call_says_so(
    docker_url: str, kernel_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ("--PoolSettings.min_size=0", "--SessionSettings.one_off_idle_timeout=1")
    async with light_gateway(docker_url, monkeypatch, *limits) as gateway:
        first = await gateway.exec("x = 1")
        await gateway.reached("claimed", 0)
        again = await gateway.exec("print(x)", session_id=first.body["session_id"])
        assert again.body["status"] == "error" and again.body["container_id"] != first.body["container_id"]
        assert "was not used for 1 s and gave its sandbox up" in again.body["stderr"]
