"""Experts that nobody holds, and answers of what could be had."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from tests.clients.fleets import HIDDEN, LAYER, MODEL, TABLE, FakeLink, ranges, routed, whole
from tests.clients.pooling import (
    FOUR,
    LOGITS,
    ROWS,
    ask,
    assert_right,
    drawn,
    failing,
    hang,
    pool_over,
)
from tests.waiting import until

from expertd_client import ExpertPool
from expertd_client.errors import (
    DeadlineExceeded,
    ExpertdError,
    ExpertsUnavailable,
    InvalidArgument,
    Overloaded,
)


def test_a_call_waits_for_experts_that_nobody_holds() -> None:
    fleet = ranges((0, 8), (8, 16))
    fleet[1].reachable = False
    with pool_over(fleet) as pool:
        until(lambda: pool.layers(MODEL))
        with pytest.raises(ExpertsUnavailable, match=r"layer m/3: .* experts 8-15"):
            ask(pool, timeout=0.3)
        threading.Timer(0.3, setattr, (fleet[1], "reachable", True)).start()
        assert_right(ask(pool, timeout=20).output, ROWS, LOGITS)


def test_a_call_that_must_not_wait() -> None:
    fleet = ranges((0, 8), (8, 16))
    fleet[1].reachable = False
    with pool_over(fleet, wait_for_experts=False) as pool:
        with pytest.raises(ExpertsUnavailable, match="experts 8-15"):
            ask(pool, timeout=30)
        some = LOGITS.copy()
        some[:, 8:] = -np.inf
        output = pool.forward(MODEL, LAYER, ROWS, router_logits=some)
        assert_right(output, ROWS, some)


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
    assert_right(output, ROWS, LOGITS, low)
    ids, _ = routed(LOGITS)
    assert complete.tolist() == (ids < 8).all(axis=1).tolist()
    assert 0 < complete.sum() < len(ROWS)


class Silent(FakeLink):
    """A link to an address from which nothing comes: packets are dropped, or it is stopped."""

    async def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        await asyncio.sleep(timeout or 60)
        raise DeadlineExceeded("no answer")

    async def watch(self) -> AsyncIterator[bool]:
        await asyncio.sleep(60)
        yield False


def test_an_address_from_which_nothing_comes_keeps_nobody_waiting(impatient: None) -> None:
    fleet = ranges((0, 8), (8, 16))
    links = {"r0:1": FakeLink(fleet[0]), "r1:1": Silent(fleet[1])}
    with ExpertPool(list(links), connect=links.__getitem__) as pool:
        begin = time.monotonic()
        assert 0 < ask(pool, partial="allow", timeout=40).complete_rows.sum() < len(ROWS)
        assert time.monotonic() - begin < 20
    links = {"r0:1": FakeLink(fleet[0]), "r1:1": Silent(fleet[1])}
    with ExpertPool(list(links), connect=links.__getitem__, wait_for_experts=False) as pool:
        with pytest.raises(ExpertsUnavailable, match="experts 8-15"):
            ask(pool, timeout=40)
        assert time.monotonic() - begin < 30


def test_who_is_away_is_told(tmp_path: Path) -> None:
    fleet = whole(2)
    fleet[0].reachable = fleet[1].reachable = False
    with pool_over(fleet) as pool:
        with pytest.raises(ExpertsUnavailable, match="not in service: r0:1, r1:1"):
            ask(pool, timeout=0.2)
        with pytest.raises(ExpertsUnavailable, match="not in service: r0:1, r1:1"):
            pool.layer(MODEL, LAYER, timeout=0.2)
    (tmp_path / "replicas").write_text("two words\n")
    with ExpertPool(tmp_path / "replicas", connect=fleet.connect) as pool:
        with pytest.raises(ExpertsUnavailable, match="'two words' given; HOST:PORT"):
            ask(pool, timeout=0.2)
        (tmp_path / "replicas").write_text("r0:1\n")
        fleet[0].reachable = True
        assert_right(ask(pool, timeout=20).output, ROWS, LOGITS)


def test_what_could_be_had_in_time(impatient: None) -> None:
    fleet = ranges((0, 8), (8, 16))
    fleet[1].script = hang
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        begin = time.monotonic()
        reply = ask(pool, partial="allow", timeout=0.6)
        assert 0.4 <= time.monotonic() - begin < 5
    assert 0 < reply.complete_rows.sum() < len(ROWS)


def test_what_could_be_had_while_somebody_is_left_alone() -> None:
    """Experts whose holder is busy are waited for; those of the others are not lost with them."""
    fleet = ranges((0, 8), (8, 16))
    fleet[1].script = failing(Overloaded("busy", retry_seconds=60))
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        first, second = (ask(pool, partial="allow", timeout=1) for _ in range(2))
    assert len(fleet[1].calls) == 1
    assert second.complete_rows.tolist() == first.complete_rows.tolist()
    assert 0 < second.complete_rows.sum() < len(ROWS)
    np.testing.assert_array_equal(first.output, second.output)


def test_what_a_replica_said_last_is_told_when_there_is_nobody_else() -> None:
    fleet = whole(1)
    fleet[0].script = failing(ExpertdError("a fault of ours, number 7"))
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        with pytest.raises(ExpertdError, match="the last error: a fault of ours, number 7"):
            ask(pool, timeout=0.5)


def test_what_could_be_had_of_no_rows() -> None:
    rows, logits = drawn(0)
    with pool_over(ranges(*FOUR)) as pool:
        output, complete = pool.forward(MODEL, LAYER, rows, router_logits=logits, partial="allow")
    assert output.shape == (0, HIDDEN) and complete.shape == (0,)


def test_a_mistake_in_one_part_is_told_before_the_others_are_done() -> None:
    fleet = ranges((0, 8), (8, 16))
    fleet[0].script, fleet[1].script = hang, failing(InvalidArgument("twice"))
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        begin = time.monotonic()
        with pytest.raises(InvalidArgument, match="twice"):
            ask(pool, partial="allow", timeout=40)
        assert time.monotonic() - begin < 20


def test_a_call_that_must_not_wait_lets_everybody_speak_first() -> None:
    fleet = ranges((0, 8), (8, 16))

    async def slow() -> None:
        await asyncio.sleep(0.2)

    fleet[1].probe = slow
    with pool_over(fleet, wait_for_experts=False) as pool:
        assert_right(ask(pool).output, ROWS, LOGITS)


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
