"""Replicas that fail, stall, refuse, change or come back under a pool."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.clients.fleets import (
    HIDDEN,
    LAYER,
    MODEL,
    TABLE,
    FakeFleet,
    FakeServer,
    ranges,
    routed,
    whole,
)
from tests.clients.test_pool import FOUR, drawn, pool_over, right

from expertd_client import ExpertPool, dispatch, replicas
from expertd_client.errors import (
    DeadlineExceeded,
    ExpertdError,
    ExpertsNotHeld,
    ExpertsUnavailable,
    InvalidArgument,
    LayerFailed,
    NotFound,
    NoUsablePlan,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)

ROWS, LOGITS = drawn(300)


def ask(pool: ExpertPool, **options: Any) -> Any:
    return pool.call(MODEL, LAYER, ROWS, router_logits=LOGITS, **options)


def failing(error: Exception, times: int = 10**9) -> Any:
    """A script that raises error that many times."""
    left = iter(range(times))

    async def script(call: Any) -> None:
        if next(left, None) is not None:
            raise error

    return script


async def hang(call: Any) -> None:
    await asyncio.sleep(60)


def until(done: Any) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stalls are seen at once, and so are changes."""
    monkeypatch.setattr(dispatch, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(dispatch, "UNMEASURED_STALL_SECONDS", 0.05)
    monkeypatch.setattr(replicas, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(replicas, "REREAD_SECONDS", 0.02)


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
    right(reply.output, ROWS, LOGITS)
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


def test_an_overloaded_replica_is_left_alone_as_long_as_it_asks() -> None:
    fleet, times = whole(1), []

    async def script(call: Any) -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            raise Overloaded("full", retry_seconds=0.4)

    fleet[0].script = script
    with pool_over(fleet) as pool:
        right(ask(pool).output, ROWS, LOGITS)
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
        right(reply.output, ROWS, LOGITS)
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
        right(ask(pool).output, ROWS, LOGITS)
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
        if slow.is_set() and len(fleet[0].calls) + len(fleet[1].calls) == asked + 1:
            await asyncio.sleep(0.5)

    with pool_over(fleet, hedge=hedge) as pool:
        pool.layers(MODEL)
        for _ in range(20):
            pool.call(MODEL, LAYER, ROWS[small], router_logits=LOGITS[small])
        asked = fleet.attempts
        fleet[0].script = fleet[1].script = script
        slow.set()
        reply = pool.call(MODEL, LAYER, ROWS[small], router_logits=LOGITS[small])
    right(reply.output, ROWS[small], LOGITS[small])
    assert reply.attempts == (2 if hedge else 1)
    assert fleet[0].cancelled + fleet[1].cancelled == (1 if hedge else 0)


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
        with pytest.raises(DeadlineExceeded):
            ask(pool, timeout=0.5)
        assert 0.5 <= time.monotonic() - begin < 5
        until(lambda: all(server.cancelled == len(server.calls) for server in fleet))


def test_a_call_waits_for_experts_that_nobody_holds() -> None:
    fleet = ranges((0, 8), (8, 16))
    fleet[1].reachable = False
    with pool_over(fleet) as pool:
        with pytest.raises(ExpertsUnavailable, match=r"layer m/3: .* experts 8-15"):
            ask(pool, timeout=0.3)
        threading.Timer(0.3, setattr, (fleet[1], "reachable", True)).start()
        right(ask(pool, timeout=20).output, ROWS, LOGITS)


def test_a_call_that_must_not_wait() -> None:
    fleet = ranges((0, 8), (8, 16))
    fleet[1].reachable = False
    with pool_over(fleet, wait_for_experts=False) as pool:
        with pytest.raises(ExpertsUnavailable, match="experts 8-15"):
            ask(pool, timeout=30)
        some = LOGITS.copy()
        some[:, 8:] = -np.inf
        output = pool.forward(MODEL, LAYER, ROWS, router_logits=some)
        right(output, ROWS, some)


def test_nobody_there_at_all() -> None:
    fleet = whole(2)
    fleet[0].reachable = fleet[1].reachable = False
    with pool_over(fleet) as pool, pytest.raises(ExpertsUnavailable, match="layer m/3"):
        ask(pool, timeout=0.2)
    with (
        pool_over(fleet, wait_for_experts=False) as pool,
        pytest.raises(ExpertsUnavailable, match="layer m/3"),
    ):
        ask(pool)


def test_what_could_be_had() -> None:
    fleet = ranges((0, 8), (8, 16))
    fleet[1].reachable = False
    with pool_over(fleet) as pool:
        output, complete = pool.forward(
            MODEL, LAYER, ROWS, router_logits=LOGITS, partial="allow", timeout=10
        )
    low = TABLE.copy()
    low[8:] = 0
    right(output, ROWS, LOGITS, low)
    ids, _ = routed(LOGITS)
    assert complete.tolist() == (ids < 8).all(axis=1).tolist()
    assert 0 < complete.sum() < len(ROWS)


def test_what_could_be_had_in_time(impatient: None) -> None:
    fleet = ranges((0, 8), (8, 16))
    fleet[1].script = hang
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        begin = time.monotonic()
        reply = ask(pool, partial="allow", timeout=0.6)
        assert 0.4 <= time.monotonic() - begin < 5
    assert 0 < reply.complete_rows.sum() < len(ROWS)


def test_an_answer_of_another_form_is_not_believed() -> None:
    fleet = whole(2)
    honest = fleet[0].computed
    for wrong in (lambda out: out[:-1], lambda out: out.astype(np.float16), lambda out: out[:, :4]):
        fleet[0].computed = lambda call, cut=wrong: cut(honest(call))  # type: ignore[method-assign]
        with pool_over(fleet) as pool:
            pool.layers(MODEL)
            reply = ask(pool)
        right(reply.output, ROWS, LOGITS)
        assert {share.target for share in reply.shares} == {fleet[1].target}


def other_weights() -> Any:
    return TABLE * np.float32(-3)


def test_twins_that_differ_are_refused() -> None:
    fleet = ranges(*FOUR)
    fleet[2].digest, fleet[2].table = "another", other_weights()
    with pool_over(fleet, wait_for_experts=False) as pool:
        pool.layers(MODEL)
        with pytest.raises(ExpertsUnavailable) as caught:
            ask(pool)
    for part in ("experts 8-15 have different weights_digest", "another at r2:1", "8-16 at r3:1"):
        assert part in str(caught.value)
    assert not fleet[2].calls and not fleet[3].calls


def test_ranges_of_two_checkpoints_are_never_mixed() -> None:
    """Their digests are of different ranges and tell nothing; that of the checkpoint does."""
    fleet = ranges((0, 8), (8, 16), (8, 16))
    for server, checkpoint in zip(fleet, ("old", "new", "new"), strict=True):
        server.checkpoint = checkpoint
    with pool_over(fleet, wait_for_experts=False) as pool:
        pool.layers(MODEL)
        with pytest.raises(ExpertsUnavailable, match="experts 0-7 .*other weights .*r0:1"):
            ask(pool)
        assert fleet.attempts == 0
        with pytest.raises(ExpertsUnavailable):
            ask(pool, partial="refuse")
        fleet[0].serving = False
        until(lambda: len(pool.layers(MODEL)) == 2)
        fleet[0].checkpoint, fleet[0].serving = "new", True
        until(lambda: len(pool.layers(MODEL)) == 3)
        right(ask(pool).output, ROWS, LOGITS)


def test_weights_are_never_mixed_in_a_call(caplog: pytest.LogCaptureFixture) -> None:
    """Three replicas of old weights and two of new: a call has one kind, whoever fails."""
    old = [FakeServer(f"old{n}:1", digest="old") for n in range(3)]
    new = [FakeServer(f"new{n}:1", digest="new", table=other_weights()) for n in range(2)]
    fleet = FakeFleet(*old, *new)
    with caplog.at_level(logging.WARNING), pool_over(fleet) as pool:
        pool.layers(MODEL)
        old[0].script = failing(Unavailable("gone"), times=1)
        right(ask(pool).output, ROWS, LOGITS)
        for server in old:
            server.reachable = False
        until(lambda: not [i for i in pool.layers(MODEL) if i.weights_digest == "old"])
        right(ask(pool).output, ROWS, LOGITS, other_weights())
        for server in old:
            server.reachable = True
        until(lambda: len(pool.layers(MODEL)) == 5)
        right(ask(pool).output, ROWS, LOGITS, other_weights())
    assert "the replicas' weights differ" in caplog.text


def test_a_call_that_lost_its_weights_begins_again(impatient: None) -> None:
    """Its first parts were of weights that nobody has any more: they are thrown away."""
    fleet = FakeFleet(
        *(FakeServer(f"old{n}:1", digest="old") for n in range(2)),
        FakeServer("new:1", digest="new", table=other_weights()),
    )

    async def die(call: Any) -> None:
        fleet[0].reachable = fleet[1].reachable = False
        await asyncio.sleep(0.02)
        raise Unavailable("gone")

    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        fleet[1].script = die
        right(ask(pool).output, ROWS, LOGITS, other_weights())
    assert len(fleet[0].calls) == 1, "an answer with old weights was there to be mixed in"


def test_settings_that_differ_are_never_mixed() -> None:
    fleet = ranges((0, 8), (8, 16))
    plain = fleet[1].info

    def odd() -> Any:
        info = plain()
        info.routing.routed_scaling_factor = 2.5
        return info

    fleet[1].info = odd  # type: ignore[method-assign]
    with (
        pool_over(fleet, wait_for_experts=False) as pool,
        pytest.raises(ExpertsUnavailable),
    ):
        ask(pool)


def test_ranges_may_change_while_serving(impatient: None) -> None:
    fleet = ranges((0, 8), (8, 16))
    with pool_over(fleet) as pool:
        right(ask(pool).output, ROWS, LOGITS)
        for server, begin in ((fleet[0], 8), (fleet[1], 0)):
            server.serving = False
            until(lambda: len(pool.layers(MODEL)) == 1)
            server.begin, server.end, server.generation = begin, begin + 8, 2
            server.digest = f"{begin}-{begin + 8}"
            server.serving = True
            until(lambda: len(pool.layers(MODEL)) == 2)
        right(ask(pool).output, ROWS, LOGITS)
        assert len(fleet[0].calls) == len(fleet[1].calls) == 2


def test_what_a_replica_held_before_it_went_is_not_believed(impatient: None) -> None:
    """Two replicas come back with each other's range, and take their time to say so."""
    fleet = ranges((0, 8), (8, 16))
    late = threading.Event()

    async def probe() -> None:
        while not late.is_set():
            await asyncio.sleep(0.005)

    with pool_over(fleet) as pool:
        ask(pool)
        for server in fleet:
            server.serving, server.probe = False, probe
        until(lambda: not pool.layers(MODEL))
        for server in fleet:
            server.begin, server.end = (8, 16) if server.begin == 0 else (0, 8)
            server.digest, server.serving = f"{server.begin}-{server.end}", True
        threading.Timer(0.2, late.set).start()
        right(ask(pool).output, ROWS, LOGITS)


def test_an_answer_from_before_is_not_believed(impatient: None) -> None:
    """A probe was under way when the replica went and came back with other weights."""
    fleet = FakeFleet(FakeServer("r:1", digest="old"))
    server, asked, gates = fleet[0], [], [threading.Event() for _ in range(3)]

    async def probe() -> None:
        asked.append(server.digest)
        gate = gates[min(len(asked), 3) - 1]
        while not gate.is_set():
            await asyncio.sleep(0.002)

    with pool_over(fleet) as pool:
        ask(pool)
        server.probe = probe
        until(lambda: asked)
        server.serving = False
        until(lambda: not pool.layers(MODEL))
        server.digest, server.serving = "new", True
        time.sleep(0.05)
        gates[0].set()
        until(lambda: len(asked) == 2)
        assert pool.layers(MODEL, timeout=0.1) == []
        gates[1].set()
        gates[2].set()
        until(lambda: [info.weights_digest for info in pool.layers(MODEL)] == ["new"])


def test_a_call_that_must_not_wait_lets_everybody_speak_first() -> None:
    fleet = ranges((0, 8), (8, 16))

    async def slow() -> None:
        await asyncio.sleep(0.2)

    fleet[1].probe = slow
    with pool_over(fleet, wait_for_experts=False) as pool:
        right(ask(pool).output, ROWS, LOGITS)


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


def test_a_draining_replica_gets_nothing_new() -> None:
    fleet = whole(2)
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        ask(pool)
        fleet[0].serving = False
        until(lambda: len(pool.layers(MODEL)) == 1)
        before = len(fleet[0].calls)
        for _ in range(5):
            ask(pool)
        assert len(fleet[0].calls) == before


def test_a_replica_that_returns_is_used_again() -> None:
    fleet = whole(2)
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        fleet[0].reachable = False
        for _ in range(5):
            right(ask(pool).output, ROWS, LOGITS)
        before = len(fleet[0].calls)
        fleet[0].reachable = True
        until(lambda: ask(pool) and len(fleet[0].calls) > before)


def test_retries_are_rationed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that fail every call at once are not asked more than the budget allows."""
    monkeypatch.setattr(replicas.Pause, "failed", lambda *_: None)
    fleet = whole(2)
    for server in fleet:
        server.script = failing(Unavailable("no"))
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        with pytest.raises(ExpertdError):
            ask(pool, timeout=0.5)
    assert 100 <= fleet.attempts <= 100 + 2 + 0.5 * 10 + 5


def test_endpoints_are_read_again(impatient: None, tmp_path: Path) -> None:
    fleet, listed = whole(3), tmp_path / "replicas"
    listed.write_text("r0:1  # the first\n\n# nobody else\n")
    with ExpertPool(listed, connect=fleet.connect) as pool:
        right(ask(pool).output, ROWS, LOGITS)
        assert [bool(server.calls) for server in fleet] == [True, False, False]
        listed.write_text("r1:1\nr2:1\n")
        until(lambda: len(pool.layers(MODEL)) == 2)
        before = len(fleet[0].calls)
        right(ask(pool).output, ROWS, LOGITS)
        assert len(fleet[0].calls) == before and fleet[1].calls and fleet[2].calls
        until(lambda: fleet.links[0].closed)
        listed.write_text("r1:1\nnot an address\n")
        time.sleep(0.1)
        assert len(pool.layers(MODEL)) == 2, "a list that cannot be read changes nothing"
    assert all(link.closed for link in fleet.links)


def test_weights_of_no_expert_are_nobodys() -> None:
    fleet = ranges(*FOUR)
    with pool_over(fleet) as pool:
        output = pool.forward(
            MODEL,
            LAYER,
            np.ones((1, HIDDEN), np.float32),
            topk_ids=np.array([[5, -1]], np.int32),
            topk_weights=np.array([[2.0, np.nan]], np.float32),
        )
    np.testing.assert_allclose(output[0], 2 * TABLE[5], rtol=1e-6)
