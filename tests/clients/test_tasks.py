"""Several attempts at once: which of them decides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest

from expertd_client.errors import InvalidArgument, Unavailable
from expertd_client.fleet.tasks import cancel, first_good, together

RETRIED, FINAL = Unavailable("gone"), InvalidArgument("row 3")


async def after(seconds: float, outcome: Any) -> Any:
    await asyncio.sleep(seconds)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


async def ended(*steps: tuple[float, Any]) -> list[asyncio.Task[Any]]:
    """Tasks, of which those that take no time are done."""
    tasks = [asyncio.ensure_future(after(*step)) for step in steps]
    await asyncio.sleep(0.01)
    return tasks


async def test_a_good_answer_wins_over_errors_of_the_same_moment() -> None:
    for order in permutations([(0.0, RETRIED), (0.0, "good"), (0.0, RETRIED)]):
        assert await first_good(await ended(*order)) == "good"


async def test_errors_that_another_may_mend_are_waited_out() -> None:
    assert await first_good(await ended((0.0, RETRIED), (0.05, "good"))) == "good"
    with pytest.raises(Unavailable):
        await first_good(await ended((0.0, RETRIED), (0.02, RETRIED)))


async def test_a_final_error_ends_the_race() -> None:
    tasks = await ended((0.0, FINAL), (60.0, "too late"))
    with pytest.raises(InvalidArgument):
        await first_good(tasks)
    await cancel(tasks)
    assert tasks[1].cancelled()


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_what_fails_ends_the_others(count: int) -> None:
    ends: list[str] = []

    async def step(number: int, then: Callable[[], None]) -> int:
        try:
            await asyncio.sleep(0 if number == 0 else 60)
            then()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        return number

    def fail() -> None:
        raise RETRIED

    with pytest.raises(Unavailable):
        await together([step(number, fail) for number in range(count)])
    assert ends == ["cancelled"] * (count - 1)
