"""Cells begin in order of arrival, a few at once; one that takes long holds nobody up for longer than a small one."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from gateway.pace import Pace

#: Longer than any test: no place is given up before its block ends.
NEVER = 3600.0


class Cells:
    """Cells at one pace; which have begun, in this order, and how many run."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.begun: list[int] = []
        self.running = 0
        self.most = 0

    async def run(self, number: int, end: asyncio.Event) -> None:
        async with self.pace.place():
            self.begun.append(number)
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await end.wait()
            finally:
                self.running -= 1


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_some_begin_at_once_and_the_others_when_those_end() -> None:
    cells = Cells(Pace(2, small=NEVER))
    ends = [asyncio.Event() for _ in range(4)]
    tasks = [asyncio.create_task(cells.run(number, end)) for number, end in enumerate(ends)]
    await settle()
    assert cells.begun == [0, 1]
    ends[1].set()
    await settle()
    assert cells.begun == [0, 1, 2]
    for end in ends:
        end.set()
    await asyncio.gather(*tasks)
    assert cells.begun == [0, 1, 2, 3] and cells.most == 2


async def test_a_long_one_gives_its_place_up_once_and_runs_on() -> None:
    cells = Cells(Pace(1, small=0.01))
    long, next_ = asyncio.Event(), asyncio.Event()
    tasks = [asyncio.create_task(cells.run(number, end)) for number, end in enumerate((long, next_, next_))]
    await asyncio.sleep(0.2)
    assert cells.begun == [0, 1, 2] and cells.running == 3
    long.set()
    next_.set()
    await asyncio.gather(*tasks)
    # Places given up early do not come back twice.
    cells.most = 0
    cells.pace._small = NEVER
    end = asyncio.Event()
    tasks = [asyncio.create_task(cells.run(number, end)) for number in range(3)]
    await settle()
    assert cells.running == 1
    end.set()
    await asyncio.gather(*tasks)
    assert cells.most == 1


@given(st.integers(1, 3), st.lists(st.sampled_from(["begin", "end", "cancel", "cancel and end"]), max_size=40))
def test_no_place_is_lost_or_doubled_whoever_goes_away(width: int, steps: list[str]) -> None:
    async def run() -> None:
        cells = Cells(Pace(width, small=NEVER))
        ends: dict[asyncio.Task[None], asyncio.Event] = {}
        for number, step in enumerate(steps):
            if step == "begin":
                end = asyncio.Event()
                ends[asyncio.create_task(cells.run(number, end))] = end
            alive = [task for task in ends if not task.done()]
            if alive and step in ("end", "cancel and end"):
                # The one that ends hands its place to the one that is cancelled at this moment.
                ends[alive[0]].set()
            if alive and step.startswith("cancel"):
                await asyncio.sleep(0)
                alive[-1].cancel()
            if step != "cancel and end":
                await settle()
                waiting = [task for task in ends if not task.done()]
                assert cells.running == min(width, len(waiting))
        for end in ends.values():
            end.set()
        await asyncio.gather(*ends, return_exceptions=True)
        assert cells.running == 0 and cells.most <= width

    asyncio.run(run())
