"""Answers: clients that do not take theirs are bounded in bytes and time, and a drain waits for the others."""

from __future__ import annotations

import asyncio

from gateway.answers import Answers


def untaken(answers: Answers, size: int, closed: list[int], number: int = 0) -> asyncio.Future[None]:
    taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    answers.add(taken, size, lambda: closed.append(number))
    return taken


async def test_past_the_bound_the_one_that_waits_longest_is_hung_up_on() -> None:
    answers, closed = Answers(max_bytes=100), list[int]()
    taken = [untaken(answers, 40, closed, number) for number in range(2)]
    taken[0].set_result(None)
    await asyncio.sleep(0)
    untaken(answers, 40, closed, 2)
    assert closed == []
    untaken(answers, 40, closed, 3)
    assert closed == [1]
    untaken(answers, 200, closed, 4)
    assert closed == [1, 2, 3, 4]


async def test_an_answer_that_takes_too_long_is_given_up_and_one_that_was_taken_is_not() -> None:
    answers, closed = Answers(seconds=0.02), list[int]()
    untaken(answers, 1, closed, 0)
    untaken(answers, 1, closed, 1).set_result(None)
    await asyncio.sleep(0.05)
    assert closed == [0]


async def test_a_drain_waits_until_answers_are_taken_but_not_for_ever() -> None:
    answers, closed = Answers(), list[int]()
    taken = untaken(answers, 1, closed)
    asyncio.get_running_loop().call_later(0.02, taken.set_result, None)
    await answers.taken(5.0)
    assert taken.done()
    untaken(answers, 1, closed)
    await answers.taken(0.01)
    assert closed == []
