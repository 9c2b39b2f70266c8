"""Twelve people at work beside 50 calls at once that name nobody: no one loses a sandbox, and no call starves.

This is one of the bursts that come every 30 s; a virtual clock plays them all in tests/unit/test_fairness.py.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import statistics

import pytest

from tests.gateway_process import KEY
from tests.integration.engine_census import Census
from tests.integration.light_gateway import LightGateway, light_gateway

pytestmark = [pytest.mark.service, pytest.mark.limit(200)]

PEOPLE = 12
PLACES = 20
CALLS = 50


class Person:
    """Somebody who counts in a session: a lost sandbox would make them start again at 1."""

    def __init__(self, gateway: LightGateway, number: int) -> None:
        self._gateway = gateway
        self._random = random.Random(number)
        #: half of them have a key of their own, the others share one with the calls, and say who they are
        self._key = f"key-of-person-{number}" if number % 2 else KEY
        self._fields = {} if number % 2 else {"user_id": f"person{number}"}
        self._cells = 0
        self.containers: set[str] = set()
        self.seconds: list[float] = []

    async def cell(self) -> None:
        code = "n = globals().get('n', 0) + 1; print(n)"
        answer = await self._gateway.exec(code, key=self._key, **self._fields)
        self._cells += 1
        assert answer.status == 200, answer
        assert (answer.body["stdout"], answer.body["stderr"]) == (f"{self._cells}\n", ""), answer
        self._fields["session_id"] = answer.body["session_id"]
        self.containers.add(answer.body["container_id"])
        self.seconds.append(answer.seconds)

    async def work(self, until: asyncio.Event) -> None:
        while not until.is_set():
            await self.cell()
            await asyncio.sleep(self._random.uniform(1.0, 3.0))


async def call(gateway: LightGateway) -> float:
    """One call that names nobody; returns the seconds that it waited in line."""
    nonce = secrets.token_hex(8)
    answer = await gateway.exec(f"print({nonce!r})")
    assert answer.status == 200 and answer.body["stdout"] == f"{nonce}\n", answer
    return float(answer.body["timings"]["wait_ms"]) / 1000


async def test_people_at_work_beside_calls_that_name_nobody(
    docker_url: str, kernel_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEYS", ",".join(f"key-of-person-{number}" for number in range(PEOPLE)))
    pool = {"min_size": 2, "max_size": PLACES, "line_bound": 200}
    options = [f"--PoolSettings.{name}={value}" for name, value in pool.items()]
    async with light_gateway(docker_url, monkeypatch, *options) as gateway:
        people = [Person(gateway, number) for number in range(PEOPLE)]
        with Census(docker_url, gateway.runtime) as census:
            await asyncio.gather(*(person.cell() for person in people))
            alone, beside = asyncio.Event(), asyncio.Event()
            asyncio.get_running_loop().call_later(8.0, alone.set)
            await asyncio.gather(*(person.work(alone) for person in people))
            before = [seconds for person in people for seconds in person.seconds[1:]]
            counts = [len(person.seconds) for person in people]

            async def flood() -> list[float]:
                try:
                    return await asyncio.gather(*(call(gateway) for _ in range(CALLS)))
                finally:
                    beside.set()

            waited, *_ = await asyncio.gather(flood(), *(person.work(beside) for person in people))
        during = [s for person, count in zip(people, counts, strict=True) for s in person.seconds[count:]]
        print(
            f"people's cells: p50 {1000 * statistics.median(before):.1f} ms alone, "
            f"{1000 * statistics.median(during):.1f} ms beside the calls ({len(during)} cells); "
            f"calls waited {statistics.median(waited):.1f} s (median), {max(waited):.1f} s at most"
        )
        assert [len(person.containers) for person in people] == [1] * PEOPLE, "somebody at work lost a sandbox"
        assert len(waited) == CALLS
        assert len(census.most) <= PLACES, "\n".join(census.most)
