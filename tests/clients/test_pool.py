"""A pool over replicas that do as told: who gets what, and that the answer is one server's."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.clients.fleets import (
    HIDDEN,
    LAYER,
    MODEL,
    FakeFleet,
    FakeLink,
    FakeServer,
    ranges,
    routed,
    truth,
    whole,
)
from tests.clients.pooling import FOUR, assert_right, drawn, pool_over

from expertd_client.errors import ExpertsUnavailable


def test_rows_are_split_over_replicas_of_everything(pool_of: Any) -> None:
    fleet, (rows, logits) = whole(3), drawn(600)
    with pool_of(fleet) as pool:
        pool.layers(MODEL)
        reply = pool.call(MODEL, LAYER, rows, router_logits=logits)
    assert_right(reply.output, rows, logits)
    assert [server.rows for server in fleet.servers.values()] == [200, 200, 200]
    assert (reply.attempts, reply.rows_sent) == (3, 600) and reply.complete_rows.all()
    assert {share.target for share in reply.shares} == set(fleet.targets)
    assert all(call.router_logits and not call.partial for s in fleet for call in s.calls)


@pytest.mark.parametrize("held", [((0, 16), (0, 16)), ((0, 7), (7, 16))])
def test_large_parts_travel_as_several_messages_a_few_at_a_time(
    pool_of: Any, held: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = ranges(*held)
    under_way: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def script(server: FakeServer) -> Any:
        async def counted(call: Any) -> None:
            under_way[server.target] += 1
            most[server.target] = max(most[server.target], under_way[server.target])
            await asyncio.sleep(0.001)
            under_way[server.target] -= 1

        return counted

    for server in fleet:
        server.script = script(server)
    monkeypatch.setattr(FakeLink, "message_bytes", 100 * HIDDEN * 4)
    rows, logits = drawn(1000)
    with pool_of(fleet) as pool:
        pool.layers(MODEL)
        reply = pool.call(MODEL, LAYER, rows, router_logits=logits)
    assert_right(reply.output, rows, logits)
    calls = [call.hidden_states for server in fleet for call in server.calls]
    sizes = [states.shape[0] for states in calls if states]
    assert max(sizes) <= 100 and reply.rows_sent == sum(sizes)
    assert reply.attempts == len(sizes) == len(reply.shares)
    assert set(most.values()) == {2}, "each replica has the next message while it computes one"


@pytest.mark.parametrize("form", ["logits", "topk"])
def test_rows_go_to_the_holders_of_their_experts(pool_of: Any, form: str) -> None:
    fleet, (rows, logits) = ranges(*FOUR), drawn(300)
    ids, weights = routed(logits)
    routing = (
        {"router_logits": logits}
        if form == "logits"
        else {"topk_ids": ids.astype(np.int64), "topk_weights": weights}
    )
    with pool_of(fleet) as pool:
        pool.layers(MODEL)
        reply = pool.call(MODEL, LAYER, rows, **routing)
    assert_right(reply.output, rows, logits)
    needed = sum(int(((ids // 8) == side).any(axis=1).sum()) for side in (0, 1))
    assert reply.rows_sent == needed == sum(server.rows for server in fleet.servers.values())
    assert len(reply.shares) == 4
    assert all(c.partial and c.reply_dtype == "float32" for s in fleet for c in s.calls)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 16)), max_size=4), st.integers(0, 99))
def test_any_ranges_give_the_same_sum(held: list[tuple[int, int]], seed: int) -> None:
    fleet = ranges((0, 5), (5, 16), *((b, min(16, b + n)) for b, n in held))
    rows, logits = drawn(100, seed)
    with pool_over(fleet, shard="experts") as pool:
        assert_right(pool.forward(MODEL, LAYER, rows, router_logits=logits), rows, logits)


def test_the_order_of_answers_does_not_show() -> None:
    fleet, (rows, logits) = ranges((0, 3), (3, 9), (9, 12), (12, 16)), drawn(50)
    random = np.random.default_rng(5)

    async def late(call: Any) -> None:
        await asyncio.sleep(random.random() * 0.02)

    with pool_over(fleet) as pool:
        outputs = set()
        for number in range(8):
            for server in fleet:
                server.script = late if number else None
            outputs.add(pool.forward(MODEL, LAYER, rows, router_logits=logits).tobytes())
    assert len(outputs) == 1


@pytest.mark.parametrize("shard", ["tokens", "experts"])
def test_arrays_come_back_in_kind(pool_of: Any, shard: str) -> None:
    rows, logits = drawn(9)
    fleet = whole(2) if shard == "tokens" else ranges(*FOUR)
    with pool_of(fleet, shard=shard) as pool:
        for dtype in (torch.float32, torch.bfloat16):
            given_rows = torch.from_numpy(rows).to(dtype)
            answer = pool.forward(MODEL, LAYER, given_rows, router_logits=torch.from_numpy(logits))
            assert isinstance(answer, torch.Tensor) and answer.dtype == dtype
            expected = truth(given_rows.float().numpy(), *routed(logits))
            np.testing.assert_allclose(answer.float().numpy(), expected, rtol=1e-2, atol=1e-2)
        narrow = rows.astype(ml_dtypes.bfloat16)
        wide = pool.forward(MODEL, LAYER, narrow, router_logits=logits, reply_dtype="float32")
        assert wide.dtype == np.float32
        answer, complete = pool.forward(
            MODEL, LAYER, torch.from_numpy(rows), router_logits=logits, partial="allow"
        )
        assert complete.dtype == torch.bool and complete.tolist() == [True] * 9
        assert isinstance(answer, torch.Tensor)


@pytest.mark.parametrize("fleet", [whole(1), whole(2), ranges(*FOUR)], ids=["1", "2", "ranges"])
@pytest.mark.parametrize("tokens", [0, 1, 200])
def test_answers_are_the_callers_own_memory(fleet: FakeFleet, tokens: int) -> None:
    rows, logits = drawn(tokens)
    with pool_over(fleet) as pool:
        for kind in (np.asarray, torch.from_numpy):
            given_rows, given_logits = kind(rows), kind(logits)
            first = pool.forward(MODEL, LAYER, given_rows, router_logits=given_logits)
            first[:] = 7
            again = pool.forward(MODEL, LAYER, given_rows, router_logits=given_logits)
            assert type(first) is type(given_rows) and first.shape == (tokens, HIDDEN)
            assert not (again == 7).any()
            if tokens:
                assert_right(np.asarray(again), rows, logits)


@pytest.mark.parametrize("shard", ["tokens", "experts"])
def test_scales_travel_with_their_rows(shard: str) -> None:
    fleet = whole(3) if shard == "tokens" else ranges(*FOUR)
    rows, logits = drawn(400)
    scale = np.random.default_rng(1).random((400, 1)).astype(np.float32)
    narrow = rows.astype(ml_dtypes.float8_e4m3fn)
    with pool_over(fleet, shard=shard) as pool:
        output = pool.forward(
            MODEL,
            LAYER,
            narrow,
            router_logits=logits,
            hidden_states_format="fp8_group128",
            hidden_states_scale=scale,
            reply_dtype="float32",
        )
    assert_right(output, narrow.astype(np.float32) * scale, logits)


@pytest.mark.parametrize("shard", ["tokens", "experts"])
def test_no_rows(shard: str) -> None:
    rows, logits = drawn(0)
    with pool_over(whole(2) if shard == "tokens" else ranges(*FOUR), shard=shard) as pool:
        output = pool.forward(MODEL, LAYER, rows, router_logits=logits)
        assert output.shape == (0, HIDDEN) and output.dtype == np.float32


def test_rows_without_experts_are_nobodys_work() -> None:
    fleet = ranges(*FOUR)
    nothing = np.full((5, 2), -1, np.int32)
    with pool_over(fleet) as pool:
        reply = pool.call(
            MODEL,
            LAYER,
            np.ones((5, HIDDEN), np.float32),
            topk_ids=nothing,
            topk_weights=np.ones((5, 2), np.float32),
        )
    assert not reply.output.any() and reply.complete_rows.all() and fleet.attempts == 0


def test_priority_pin_and_id_travel() -> None:
    rows, logits = drawn(3)
    for fleet in (whole(1), ranges((0, 16))):
        with pool_over(fleet) as pool:
            pool.forward(
                MODEL,
                LAYER,
                rows,
                router_logits=logits,
                priority=-2,
                backend="triton",
                request_id="mine",
            )
        (call,) = fleet[0].calls
        assert (call.priority, call.backend, call.request_id) == (-2, "triton", "mine")


def test_many_callers_do_not_split_their_calls() -> None:
    """Each holder reads all its weights for each part, so four calls take a replica each."""
    fleet, (rows, logits) = whole(4), drawn(800)
    others = threading.Semaphore(0)
    go_on = threading.Event()

    async def wait(call: Any) -> None:
        others.release()
        while call.hidden_states.shape[0] == 1 and not go_on.is_set():
            await asyncio.sleep(0.001)

    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        for server in fleet:
            server.script = wait

        def small() -> None:
            pool.forward(MODEL, LAYER, rows[:1], router_logits=logits[:1])

        threads = [threading.Thread(target=small) for _ in range(3)]
        for thread in threads:
            thread.start()
            assert others.acquire(timeout=10)
        reply = pool.call(MODEL, LAYER, rows, router_logits=logits)
        go_on.set()
        for thread in threads:
            thread.join(10)
    assert [share.rows for share in reply.shares] == [800]


def test_an_unheld_expert_is_named() -> None:
    fleet, (rows, logits) = ranges((0, 8), (12, 16)), drawn(64)
    with (
        pool_over(fleet, wait_for_experts=False) as pool,
        pytest.raises(ExpertsUnavailable, match=r"layer m/3: no replica .* experts 8-11"),
    ):
        pool.forward(MODEL, LAYER, rows, router_logits=logits)


def test_a_server_with_everything_is_preferred_to_ranges() -> None:
    fleet = FakeFleet(FakeServer("all:1"), FakeServer("low:1", 0, 8), FakeServer("high:1", 8, 16))
    rows, logits = drawn(30)
    with pool_over(fleet) as pool:
        pool.layers(MODEL)
        assert_right(pool.forward(MODEL, LAYER, rows, router_logits=logits), rows, logits)
        assert [server.rows for server in fleet.servers.values()] == [30, 0, 0]
        fleet[0].reachable = False
        assert_right(pool.forward(MODEL, LAYER, rows, router_logits=logits), rows, logits)
        assert fleet[1].rows and fleet[2].rows
