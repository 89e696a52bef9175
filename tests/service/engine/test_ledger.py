"""Shares of the queue: budgets hold, and nobody is refused for the sake of one who has more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.engine.drain import LEAST_SECONDS, MOST_SECONDS, UNKNOWN_SECONDS, DrainRate
from expertd.engine.ledger import Budget, Full, Held, Ledger

BUDGET = Budget(max_queued_tokens=100, max_queued_bytes=1000)


@dataclass(frozen=True)
class Call:
    client: str
    tokens: int
    nbytes: int
    priority: int
    arrived_ns: int


class Queue:
    """A queue with its ledger, and what became of those who tried to come in."""

    def __init__(self, budget: Budget = BUDGET) -> None:
        self.ledger = Ledger(budget)
        self.calls: list[Call] = []

    def put(self, call: Call) -> list[Call]:
        """Those who had to leave; raises Full and changes nothing then."""
        victims = list(self.ledger.make_room(call, self.calls))
        for victim in victims:
            self.take(victim)
        self.calls.append(call)
        self.ledger.enter(call)
        return victims

    def take(self, call: Call) -> None:
        self.calls.remove(call)
        self.ledger.leave(call)

    def held(self, client: str) -> Held:
        return self.ledger.clients.get(client, Held())

    def fill(self, client: str) -> float:
        return BUDGET.fill(self.held(client))


CALLS = st.builds(
    Call,
    client=st.sampled_from("abcd"),
    tokens=st.integers(1, 60),
    nbytes=st.integers(0, 600),
    priority=st.integers(-1, 1),
    arrived_ns=st.just(0),
)
STEPS = st.lists(CALLS | st.none(), max_size=60)


@dataclass(frozen=True)
class Attempt:
    """A call that tried to come in, what waited before it, and what came of it."""

    call: Call
    waiting: list[Call]
    before: dict[str, Held]
    result: list[Call] | Full
    queue: Queue

    @property
    def mine(self) -> Held:
        return self.before.get(self.call.client, Held()).plus(self.call)

    @property
    def others(self) -> set[str]:
        return self.before.keys() - {self.call.client}

    def leanest(self) -> Held:
        """All that would be queued if those who hold more had given up whatever they may."""
        total = self.mine
        for client in self.others:
            calls = sorted(
                (c for c in self.waiting if c.client == client),
                key=lambda c: (-c.priority, c.arrived_ns),
            )
            held = self.before[client]
            while len(calls) > 1 and BUDGET.fill(held) > BUDGET.fill(self.mine):
                held = held.minus(calls.pop())
            total = Held(total.tokens + held.tokens, total.nbytes + held.nbytes)
        return total


def play(steps: list[Call | None]) -> Iterator[Attempt]:
    """Calls come in and, at each None, the oldest leaves; every attempt, just after it."""
    queue = Queue()
    for now, step in enumerate(steps):
        if step is None:
            if queue.calls:
                queue.take(queue.calls[0])
            continue
        call = Call(step.client, step.tokens, step.nbytes, step.priority, now)
        before, calls = dict(queue.ledger.clients), list(queue.calls)
        try:
            result: list[Call] | Full = queue.put(call)
        except Full as full:
            result = full
        yield Attempt(call, calls, before, result, queue)


def assert_books_are_right(queue: Queue) -> None:
    """The books are right, and the budget holds for all but a call that waits alone."""
    for client in "abcd":
        mine = [call for call in queue.calls if call.client == client]
        tokens, nbytes = sum(c.tokens for c in mine), sum(c.nbytes for c in mine)
        assert queue.held(client) == Held(tokens, nbytes, len(mine))
    total = queue.ledger.total
    assert total.calls == len(queue.calls) == sum(h.calls for h in queue.ledger.clients.values())
    assert not BUDGET.exceeded(total) or total.calls == 1


@given(STEPS)
def test_budgets_hold_and_the_books_are_right(steps: list[Call | None]) -> None:
    for attempt in play(steps):
        assert_books_are_right(attempt.queue)
        if isinstance(attempt.result, Full):
            assert attempt.queue.calls == attempt.waiting, "a refusal takes nothing from anybody"


@given(STEPS)
def test_nobody_grows_beyond_a_share_while_others_wait(steps: list[Call | None]) -> None:
    for attempt in play(steps):
        if isinstance(attempt.result, list) and attempt.others and attempt.mine.calls > 1:
            assert BUDGET.fill(attempt.mine) <= 1 / (len(attempt.others) + 1)


@given(STEPS)
def test_room_is_made_only_by_those_who_hold_more_and_keep_one(steps: list[Call | None]) -> None:
    for attempt in play(steps):
        left = dict(attempt.before)
        for victim in attempt.result if isinstance(attempt.result, list) else ():
            assert victim.client != attempt.call.client
            assert BUDGET.fill(left[victim.client]) > BUDGET.fill(attempt.mine)
            left[victim.client] = left[victim.client].minus(victim)
            assert left[victim.client].calls >= 1


@given(STEPS)
def test_within_its_share_a_client_is_refused_only_if_nobody_can_make_room(
    steps: list[Call | None],
) -> None:
    for attempt in play(steps):
        share = 1 / (len(attempt.others) + 1)
        within = attempt.mine.calls == 1 or BUDGET.fill(attempt.mine) <= share
        if within and isinstance(attempt.result, Full):
            assert BUDGET.exceeded(attempt.leanest())


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 50))
def test_a_flood_never_keeps_another_client_from_its_share(
    flood: int, clients: int, size: int
) -> None:
    """One client fills the queue; each other then gets calls of size in, up to an equal share."""
    queue = Queue(Budget(100 * flood, 1 << 40))
    budget = queue.ledger.budget
    for at in range(100):
        queue.put(Call("flood", flood, 0, 0, at))
    with pytest.raises(Full, match="--max-queued-tokens"):
        queue.put(Call("flood", 1, 0, 9, 100))
    share = budget.max_queued_tokens // (clients + 1)
    for client in range(clients):
        for at in range(share // size):
            queue.put(Call(f"c{client}", size, 0, 0, 200 + at))
        assert queue.held(f"c{client}").tokens == share // size * size
    if share // size:
        with pytest.raises(Full, match="share"):
            queue.put(Call("flood", budget.max_queued_tokens, 0, 9, 1000))


def test_the_newest_of_the_lowest_priority_make_room() -> None:
    queue = Queue()
    calls = [Call("a", 25, 0, priority, at) for at, priority in enumerate((0, 0, 1, 0))]
    for call in calls:
        queue.put(call)
    assert queue.put(Call("b", 20, 0, 0, 9)) == [calls[3]]
    assert queue.put(Call("c", 30, 0, 0, 10)) == [calls[1]]


def test_a_lone_client_may_fill_the_queue_and_its_last_call_is_its_own() -> None:
    queue = Queue()
    queue.put(Call("a", 1000, 0, 0, 0))
    with pytest.raises(Full) as caught:
        queue.put(Call("b", 1, 0, 0, 1))
    assert caught.value.tokens == 901
    queue.take(queue.calls[0])
    for at in range(100):
        assert queue.put(Call("a", 1, 0, 0, at)) == []
    with pytest.raises(Full, match="100 tokens are queued"):
        queue.put(Call("a", 1, 0, 0, 101))


def test_bytes_are_a_budget_too() -> None:
    queue = Queue()
    queue.put(Call("a", 1, 999, 0, 0))
    with pytest.raises(Full, match="--max-queued-bytes"):
        queue.put(Call("b", 1, 2, 0, 1))


def test_the_rate_of_a_busy_queue_says_how_long_tokens_need() -> None:
    rate = DrainRate()
    assert rate.seconds(10) == UNKNOWN_SECONDS
    for at in range(50):
        rate.took(100, at * 10**9)
    assert rate.seconds(300) == pytest.approx(3.0)
    rate.idle()
    rate.took(100, 10**12)  # the idle time before it counts for nothing
    assert rate.seconds(300) == pytest.approx(3.0)
    assert rate.seconds(1 << 30) == MOST_SECONDS and rate.seconds(0) == LEAST_SECONDS
