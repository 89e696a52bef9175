"""What runs next: order, merging, limits, delay, and that nobody starves, for any queue."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import Waiting, queues

from expertd.engine.policy import MOST_OVERTAKINGS, Choice, Rules, choose

LIMITS = st.integers(1, 20)
NOW = 1000


def rank(waiting: Waiting) -> tuple[int, int]:
    return (-waiting.priority, waiting.arrived_ns)


def chosen(queue: list[Waiting], limit: int, overtaken: int = 0) -> list[Waiting]:
    """What runs now when nothing is delayed."""
    choice = choose(queue, NOW, Rules(limit), overtaken)
    assert choice.wait_ns == 0
    return choice.batch


@given(queues(), LIMITS)
def test_only_an_empty_queue_gives_an_empty_batch(queue: list[Waiting], limit: int) -> None:
    assert bool(chosen(queue, limit)) == bool(queue)


@given(queues(), LIMITS)
def test_a_batch_is_the_longest_run_of_the_first_calls_key(
    queue: list[Waiting], limit: int
) -> None:
    batch = chosen(queue, limit)
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
def test_every_call_runs_once_in_the_order_of_its_key(queue: list[Waiting], limit: int) -> None:
    left, ran, overtaken = list(queue), [], 0
    while left:
        choice = choose(left, NOW, Rules(limit), overtaken)
        assert choice.batch, "an idle device never waits"
        overtaken = choice.overtaken
        left = [w for w in left if w not in choice.batch]
        ran += choice.batch
    assert sorted(ran, key=rank) == sorted(queue, key=rank)
    for key in "ab":
        for priority in (-1, 0, 1):
            of_kind = [w for w in ran if (w.key, w.priority) == (key, priority)]
            assert of_kind == sorted(of_kind, key=rank)


@given(queues(), LIMITS, st.integers(0, MOST_OVERTAKINGS - 1))
def test_the_best_goes_first_until_the_oldest_was_overtaken_too_often(
    queue: list[Waiting], limit: int, overtaken: int
) -> None:
    if not queue:
        return
    oldest = min(queue, key=lambda w: w.arrived_ns)
    choice = choose(queue, NOW, Rules(limit), overtaken)
    assert min(queue, key=rank) in choice.batch
    assert choice.overtaken == (0 if oldest in choice.batch or len(queue) == 1 else overtaken + 1)
    assert oldest in chosen(queue, limit, MOST_OVERTAKINGS)


PRIORITIES = st.integers(-(2**31), 2**31 - 1)
ARRIVING = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9), PRIORITIES))
ARRIVALS = st.lists(ARRIVING, max_size=40)
FLOOD = [[("a", 9, 2**31 - 1)] * 2] * 30
"""Twice what the device can take, all of the highest priority there is."""


@given(ARRIVALS | st.just(FLOOD), LIMITS, st.integers(-(2**31), 0))
def test_nobody_starves(
    arrivals: list[list[tuple[str, int, int]]], limit: int, priority: int
) -> None:
    """Whatever arrives between batches, a call waits for so many batches per older call."""
    victim = Waiting("z", 1, 5, priority)
    queue = [Waiting("a", 9, 0, 0), Waiting("b", 9, 1, 7), victim]
    bound = 3 * (MOST_OVERTAKINGS + 1)
    overtaken = 0
    for number, arriving in enumerate([*arrivals, *[[]] * bound]):
        choice = choose(queue, NOW, Rules(limit), overtaken)
        overtaken = choice.overtaken
        if victim in choice.batch:
            return
        assert number < bound
        queue = [w for w in queue if w not in choice.batch]
        at = 10 + 100 * number
        queue += [Waiting(k, t, at + n, p) for n, (k, t, p) in enumerate(arriving)]
    raise AssertionError("the call never ran")


@given(queues(), LIMITS)
def test_without_merging_every_call_runs_by_itself(queue: list[Waiting], limit: int) -> None:
    batch = choose(queue, NOW, Rules(limit, merge=False)).batch
    assert batch == sorted(queue, key=rank)[:1]


@given(queues(), LIMITS, st.integers(1, 2000), st.integers(0, 3000))
def test_a_delay_lets_a_batch_form_and_no_longer(
    queue: list[Waiting], limit: int, delay: int, now: int
) -> None:
    rules = Rules(limit, delay)
    choice = choose(queue, now, rules)
    if choice.batch:
        total = sum(w.tokens for w in choice.batch)
        rest = [w for w in queue if w not in choice.batch and w.key == choice.batch[0].key]
        due = min(w.arrived_ns for w in choice.batch) + delay <= now
        assert due or total >= limit or (rest and total + min(rest, key=rank).tokens > limit)
        return
    if queue:
        assert 0 < choice.wait_ns <= delay + max(w.arrived_ns for w in queue) - now
        assert choose(queue, now + choice.wait_ns, rules).batch, "then something is due"
    if choice.wait_ns > 1:
        assert choose(queue, now + choice.wait_ns - 1, rules) == Choice([], 1, 0)


def test_a_delayed_key_lets_another_go_first() -> None:
    young, old = Waiting("a", 1, 90, 5), Waiting("b", 1, 0, 0)
    assert choose([young, old], 100, Rules(10, 50)).batch == [old]
    assert choose([young], 100, Rules(10, 50)) == Choice([], 40, 0)


@given(queues(), LIMITS)
def test_the_queue_is_left_as_it_was(queue: list[Waiting], limit: int) -> None:
    before = list(queue)
    chosen(queue, limit)
    assert queue == before


def test_a_call_over_the_limit_runs_alone() -> None:
    big, small = Waiting("a", 100, 0, 0), Waiting("a", 1, 1, 0)
    assert chosen([big, small], 10) == [big]
    assert chosen([small, big], 10) == [big]
    assert chosen([replace(small, arrived_ns=-1), big], 10) == [replace(small, arrived_ns=-1)]


@given(queues(), LIMITS, st.integers(1, 30))
def test_beside_a_running_batch_only_one_as_large_or_full_is_launched(
    queue: list[Waiting], limit: int, least: int
) -> None:
    choice = choose(queue, NOW, Rules(limit), least=least)
    free = choose(queue, NOW, Rules(limit))
    total = sum(w.tokens for w in choice.batch)
    if choice.batch:
        rest = [w for w in queue if w not in choice.batch and w.key == choice.batch[0].key]
        full = total >= limit or (rest and total + min(rest, key=rank).tokens > limit)
        assert total >= least or full
        assert choice.batch[0].key == free.batch[0].key or sum(w.tokens for w in free.batch) < least
    else:
        assert choice == Choice([], 0, 0) and sum(w.tokens for w in free.batch) < min(least, limit)
