"""Replicas whose weights differ, whose ranges change, that go and come back."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.clients.fleets import LAYER, MODEL, TABLE, FakeFleet, FakeServer, ranges, whole
from tests.clients.pooling import FOUR, LOGITS, ROWS, ask, assert_right, failing, pool_over
from tests.waiting import until

from expertd_client import ExpertPool
from expertd_client.errors import ExpertsUnavailable, Unavailable


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
        assert_right(ask(pool).output, ROWS, LOGITS)


def test_weights_are_never_mixed_in_a_call(caplog: pytest.LogCaptureFixture) -> None:
    """Three replicas of old weights and two of new: a call has one kind, whoever fails."""
    old = [FakeServer(f"old{n}:1", digest="old") for n in range(3)]
    new = [FakeServer(f"new{n}:1", digest="new", table=other_weights()) for n in range(2)]
    fleet = FakeFleet(*old, *new)
    with caplog.at_level(logging.WARNING), pool_over(fleet) as pool:
        pool.layers(MODEL)
        old[0].script = failing(Unavailable("gone"), times=1)
        assert_right(ask(pool).output, ROWS, LOGITS)
        for server in old:
            server.reachable = False
        until(lambda: not [i for i in pool.layers(MODEL) if i.weights_digest == "old"])
        assert_right(ask(pool).output, ROWS, LOGITS, other_weights())
        for server in old:
            server.reachable = True
        until(lambda: len(pool.layers(MODEL)) == 5)
        assert_right(ask(pool).output, ROWS, LOGITS, other_weights())
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
        assert_right(ask(pool).output, ROWS, LOGITS, other_weights())
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
        assert_right(ask(pool).output, ROWS, LOGITS)
        for server, begin in ((fleet[0], 8), (fleet[1], 0)):
            server.serving = False
            until(lambda: len(pool.layers(MODEL)) == 1)
            server.begin, server.end, server.generation = begin, begin + 8, 2
            server.digest = f"{begin}-{begin + 8}"
            server.serving = True
            until(lambda: len(pool.layers(MODEL)) == 2)
        assert_right(ask(pool).output, ROWS, LOGITS)
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
        assert_right(ask(pool).output, ROWS, LOGITS)


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


@pytest.mark.parametrize("generation", [2, 1], ids=["loaded again", "another process"])
def test_weights_that_changed_in_silence_are_noticed(impatient: None, generation: int) -> None:
    """Its health never changed, but the reply says of which load and which weights it is."""
    fleet = whole(2)
    for server in fleet:
        server.digest = "old"
    with pool_over(fleet) as pool:
        ask(pool)
        fleet[0].digest, fleet[0].table = "new", other_weights()
        fleet[0].generation = generation
        assert_right(ask(pool).output, ROWS, LOGITS)


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
            assert_right(ask(pool).output, ROWS, LOGITS)
        before = len(fleet[0].calls)
        fleet[0].reachable = True
        until(lambda: ask(pool) and len(fleet[0].calls) > before)


def test_endpoints_are_read_again(
    impatient: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleet, listed = whole(3), tmp_path / "replicas"
    listed.write_text("r0:1  # the first\n\n# nobody else\n")
    with ExpertPool(listed, connect=fleet.connect) as pool:
        assert_right(ask(pool).output, ROWS, LOGITS)
        assert [bool(server.calls) for server in fleet] == [True, False, False]
        listed.write_text("r1:1\nr2:1\n")
        until(lambda: len(pool.layers(MODEL)) == 2)
        before = len(fleet[0].calls)
        assert_right(ask(pool).output, ROWS, LOGITS)
        assert len(fleet[0].calls) == before and fleet[1].calls and fleet[2].calls
        until(lambda: fleet.links[0].closed)
        for unreadable in ("r1:1\nnot an address\n", "", None):
            caplog.clear()
            listed.unlink() if unreadable is None else listed.write_text(unreadable)
            time.sleep(0.1)
            assert len(pool.layers(MODEL)) == 2, "a list that cannot be read changes nothing"
            assert 1 <= len(caplog.messages) <= 2, "it is read many times, and told of once"
        listed.write_text("r0:1\nr1:1\nr2:1\n")
        until(lambda: len(pool.layers(MODEL)) == 3)
    assert all(link.closed for link in fleet.links)


def test_a_lone_caller_comes_to_ask_who_returned(impatient: None) -> None:
    """Its twin is faster than the average of all, which the other range's holders bring down."""
    fleet = ranges(*FOUR)
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        replicas = pool._core._fleet.replicas
        for number, speed in enumerate((0, 1000, 10, 10)):
            pace = replicas[fleet[number].target].pace
            pace.done, pace.busy, pace.last_end = float(speed), float(speed > 0), time.monotonic()
        pool.forward(MODEL, LAYER, ROWS[:20], router_logits=LOGITS[:20])
        assert (len(fleet[0].calls), len(fleet[1].calls)) == (1, 0)
