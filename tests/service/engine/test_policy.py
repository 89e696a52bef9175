"""What runs next: order, merging and limits, for any queue."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import Waiting, queues

from expertd.engine.policy import choose

LIMITS = st.integers(1, 20)


def rank(waiting: Waiting) -> tuple[int, int]:
    return (-waiting.priority, waiting.arrived_ns)


@given(queues(), LIMITS)
def test_only_an_empty_queue_gives_an_empty_batch(queue: list[Waiting], limit: int) -> None:
    assert bool(choose(queue, limit)) == bool(queue)


@given(queues(), LIMITS)
def test_a_batch_is_the_longest_run_of_the_first_calls_key(
    queue: list[Waiting], limit: int
) -> None:
    batch = choose(queue, limit)
    if not queue:
        return
    first = min(queue, key=rank)
    same_key = sorted((w for w in queue if w.key == first.key), key=rank)
    assert batch == same_key[: len(batch)]
    total = sum(w.tokens for w in batch)
    assert len(batch) == 1 or total <= limit
    if len(batch) < len(same_key):
        assert total + same_key[len(batch)].tokens > limit


@given(queues(), LIMITS)
def test_every_call_runs_once_and_none_overtakes_its_betters(
    queue: list[Waiting], limit: int
) -> None:
    left, ran = list(queue), []
    while left:
        batch = choose(left, limit)
        best = min(left, key=rank)
        assert best in batch
        left = [w for w in left if w not in batch]
        ran += batch
    assert sorted(ran, key=rank) == sorted(queue, key=rank)
    for key in "ab":
        of_key = [w for w in ran if w.key == key]
        assert of_key == sorted(of_key, key=rank)


@given(queues(), LIMITS)
def test_the_queue_is_left_as_it_was(queue: list[Waiting], limit: int) -> None:
    before = list(queue)
    choose(queue, limit)
    assert queue == before


def test_a_call_over_the_limit_runs_alone() -> None:
    big, small = Waiting("a", 100, 0, 0), Waiting("a", 1, 1, 0)
    assert choose([big, small], 10) == [big]
    assert choose([small, big], 10) == [big]
