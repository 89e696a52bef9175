"""Replicas that fail, stall, refuse or are late under a pool."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
from tests.clients.fleets import LAYER, MODEL, FakeFleet, ranges, whole
from tests.clients.pooling import (
    FOUR,
    LOGITS,
    ROWS,
    ask,
    assert_right,
    failing,
    hang,
    pool_over,
)
from tests.waiting import until

from expertd_client import dispatch, replicas
from expertd_client.errors import (
    DeadlineExceeded,
    ExpertdError,
    ExpertsNotHeld,
    InvalidArgument,
    LayerFailed,
    NotFound,
    NoUsablePlan,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from expertd_wire.tensors import to_numpy


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("Socket closed"),
        Overloaded("full, but come back at once", retry_seconds=0.0),
        LayerFailed("unloaded a moment ago"),
        ExpertsNotHeld("another range by now"),
        NotFound("another model by now"),
        ExpertdError("Stream removed", reason="UNKNOWN"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("fleet", [whole(2), ranges(*FOUR)], ids=["tokens", "experts"])
def test_what_fails_at_one_is_asked_of_another(fleet: FakeFleet, error: ExpertdError) -> None:
    for server in fleet:
        server.script, server.calls = None, []
    fleet[0].script = failing(error)
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        reply = ask(pool)
    assert_right(reply.output, ROWS, LOGITS)
    assert reply.attempts == len(reply.shares) + 1
    assert fleet[0].target not in {share.target for share in reply.shares}


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("row 3 has NaN"),
        NoUsablePlan("nothing runs it"),
        Unauthenticated("no token"),
        PermissionDenied("wrong scope"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_every_replica_would_say_is_not_asked_again(error: ExpertdError) -> None:
    fleet = whole(2)
    fleet[0].script = fleet[1].script = failing(error)
    with pool_over(fleet) as pool, pytest.raises(type(error), match=str(error)):
        pool.forward(MODEL, LAYER, ROWS[:2], router_logits=LOGITS[:2])
    assert fleet.attempts == 1


def test_a_call_that_replicas_fail_on_is_not_tried_at_all_of_them() -> None:
    """Else one such call would take every replica out of use for a while."""
    fleet = whole(5)
    for server in fleet:
        server.script = failing(ExpertdError("the server's log says why", reason="INTERNAL"))
    with pool_over(fleet) as pool, pytest.raises(ExpertdError, match="the server's log says"):
        pool.forward(MODEL, LAYER, ROWS[:2], router_logits=LOGITS[:2])
    assert fleet.attempts == 2


def test_the_faults_of_one_replica_are_its_own() -> None:
    fleet = whole(3)
    fleet[0].script = failing(ExpertdError("a broken card", reason="INTERNAL"))
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        for _ in range(3):
            assert_right(ask(pool).output, ROWS, LOGITS)


def test_an_error_that_counts_rows_says_among_which() -> None:
    """A part's own row 3 is another row of the call."""
    fleet = whole(2)

    async def refuse_the_second(call: Any) -> None:
        if (to_numpy(call.hidden_states)[-1] == ROWS[-1]).all():
            raise InvalidArgument("row 3 has NaN")

    for server in fleet:
        server.script = refuse_the_second
    with pool_over(fleet) as pool, pytest.raises(InvalidArgument) as refusal:
        ask(pool)
    assert refusal.value.__notes__ == [
        "rows are counted among 150 of the call's rows 150 to 299 that a replica was sent"
    ]


def test_an_overloaded_replica_is_left_alone_as_long_as_it_asks() -> None:
    fleet, times = whole(1), []

    async def script(call: Any) -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            raise Overloaded("full", retry_seconds=0.4)

    fleet[0].script = script
    with pool_over(fleet) as pool:
        assert_right(ask(pool).output, ROWS, LOGITS)
    assert len(times) == 2 and times[1] - times[0] >= 0.4


def test_overload_that_does_not_end_is_told_as_such() -> None:
    fleet = whole(2)
    for server in fleet:
        server.script = failing(Overloaded("the queue is full"))
    with pool_over(fleet) as pool:
        begin = time.monotonic()
        with pytest.raises(Overloaded, match="the queue is full"):
            ask(pool, timeout=0.4)
        assert time.monotonic() - begin >= 0.4
    assert fleet.attempts < 20, "replicas that are overloaded are asked ever more seldom"


def test_a_part_that_stalls_is_asked_of_another(impatient: None) -> None:
    fleet = ranges(*FOUR)
    fleet[0].script = hang
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        reply = ask(pool)
        assert_right(reply.output, ROWS, LOGITS)
        assert fleet[0].target not in {share.target for share in reply.shares}
        assert fleet[0].cancelled == 1, "the answer that nobody waits for is taken back"


def test_a_stalled_replica_is_avoided_until_it_answers(impatient: None) -> None:
    fleet = whole(2)
    stuck = threading.Event()
    stuck.set()

    async def probe() -> None:
        while stuck.is_set():
            await asyncio.sleep(0.005)

    with pool_over(fleet) as pool:
        stuck.clear()
        pool.layers(MODEL)
        stuck.set()
        fleet[0].script, fleet[0].probe = hang, probe
        assert_right(ask(pool).output, ROWS, LOGITS)
        before = len(fleet[0].calls)
        for _ in range(5):
            ask(pool)
        assert len(fleet[0].calls) == before
        fleet[0].script = None
        stuck.clear()
        until(lambda: ask(pool) and len(fleet[0].calls) > before)


def test_a_slow_replica_without_another_is_waited_for(impatient: None) -> None:
    fleet = whole(1)

    async def slow(call: Any) -> None:
        await asyncio.sleep(0.4)

    fleet[0].script = slow
    with pool_over(fleet) as pool:
        assert ask(pool).attempts == 1


@pytest.mark.parametrize("hedge", [True, False])
def test_hedging(hedge: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "STALL_SECONDS", 30.0)
    fleet, small = whole(2), slice(0, 4)
    slow = threading.Event()

    async def script(call: Any) -> None:
        if slow.is_set() and fleet.attempts == asked + 1:
            await asyncio.sleep(60 if hedge else 0.5)

    def taken_back() -> int:
        return fleet[0].cancelled + fleet[1].cancelled

    with pool_over(fleet, hedge=hedge) as pool:
        pool.layers(MODEL)
        for _ in range(20):
            pool.call(MODEL, LAYER, ROWS[small], router_logits=LOGITS[small])
        asked, before = fleet.attempts, taken_back()
        fleet[0].script = fleet[1].script = script
        slow.set()
        reply = pool.call(MODEL, LAYER, ROWS[small], router_logits=LOGITS[small])
    assert_right(reply.output, ROWS[small], LOGITS[small])
    assert reply.attempts == (2 if hedge else 1)
    assert taken_back() - before == (1 if hedge else 0)


def test_hedges_have_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were every call thought late at once, one in twenty would still be asked twice, and ten."""
    monkeypatch.setattr(dispatch.Latencies, "p95", lambda *_: 0.0)
    fleet, row = whole(2), slice(0, 1)

    async def slow(call: Any) -> None:
        await asyncio.sleep(0.005)

    fleet[0].script = fleet[1].script = slow
    with pool_over(fleet, hedge=True) as pool:
        pool.layers(MODEL)
        for _ in range(100):
            pool.call(MODEL, LAYER, ROWS[row], router_logits=LOGITS[row])
    assert 105 <= fleet.attempts <= 100 + 10 + 100 // 20 + 1


def test_a_call_ends_at_its_deadline(impatient: None) -> None:
    fleet = ranges(*FOUR)
    for server in fleet:
        server.script = hang
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"within the deadline; late: r\d:1, r\d:1"):
            ask(pool, timeout=0.5)
        assert 0.5 <= time.monotonic() - begin < 5
        until(lambda: all(server.cancelled == len(server.calls) for server in fleet))


def test_an_answer_of_another_form_is_not_believed() -> None:
    fleet = whole(2)
    honest = fleet[0].computed
    for wrong in (lambda out: out[:-1], lambda out: out.astype(np.float16), lambda out: out[:, :4]):
        fleet[0].computed = lambda call, cut=wrong: cut(honest(call))  # type: ignore[method-assign]
        with pool_over(fleet) as pool:
            pool.layers(MODEL)
            reply = ask(pool)
        assert_right(reply.output, ROWS, LOGITS)
        assert {share.target for share in reply.shares} == {fleet[1].target}


def test_no_load_is_left_behind(impatient: None) -> None:
    fleet = ranges(*FOUR)
    fleet[0].script, fleet[2].script = hang, failing(Unavailable("no"), times=3)
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        for timeout in (5.0, 0.01, 5.0):
            try:
                ask(pool, timeout=timeout)
            except ExpertdError as error:
                print(error)
        known = pool._core._fleet.replicas
        until(lambda: [replica.pace.rows for replica in known.values()] == [0] * 4)


def test_retries_are_rationed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that fail every call at once are not asked more than the budget allows."""
    monkeypatch.setattr(replicas.Pause, "failed", lambda *_: None)
    fleet = whole(2)
    for server in fleet:
        server.script = failing(Unavailable("no"))
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        begin, calls = time.monotonic(), 0
        while not calls or fleet.attempts < 100:
            with pytest.raises(ExpertdError):
                ask(pool, timeout=0.5)
            calls += 1
        spent = time.monotonic() - begin
    assert 100 <= fleet.attempts <= 100 + 2 * calls + 10 * spent + 5
