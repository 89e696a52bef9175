"""A pool over replicas that do as told: who gets what, and that the answer is one server's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.clients.fleets import (
    EXPERTS,
    HIDDEN,
    LAYER,
    MODEL,
    TABLE,
    FakeFleet,
    FakeServer,
    ranges,
    routed,
    truth,
    whole,
)

from expertd_client import AsyncExpertPool, ExpertPool
from expertd_client.errors import (
    ExpertsUnavailable,
    InvalidArgument,
    LayerFailed,
    NotFound,
    Unavailable,
)

FOUR = ((0, 8), (0, 8), (8, 16), (8, 16))


class Blocking:
    """An AsyncExpertPool with ExpertPool's methods, so that one test covers both."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._runner = asyncio.Runner()
        self._pool = AsyncExpertPool(*args, **settings)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._pool, name)
        return lambda *args, **options: self._runner.run(method(*args, **options))

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *failure: Any) -> None:
        self.close()
        self._runner.close()


@pytest.fixture(params=[ExpertPool, Blocking], ids=["sync", "async"])
def pool_of(request: pytest.FixtureRequest) -> Any:
    """Makes a pool over a fake fleet, of either kind."""

    def make(fleet: FakeFleet, **settings: Any) -> Any:
        return request.param(fleet.targets, connect=fleet.connect, **settings)

    return make


@contextmanager
def pool_over(fleet: FakeFleet, **settings: Any) -> Iterator[ExpertPool]:
    with ExpertPool(fleet.targets, connect=fleet.connect, **settings) as pool:
        yield pool


def drawn(tokens: int, seed: int = 0) -> tuple[Any, Any]:
    """Rows and logits."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((tokens, HIDDEN)).astype(np.float32)
    return rows, random.standard_normal((tokens, EXPERTS)).astype(np.float32)


def right(output: Any, rows: Any, logits: Any, table: Any = TABLE) -> None:
    np.testing.assert_allclose(output, truth(rows, *routed(logits), table), rtol=1e-5, atol=1e-5)


def test_rows_are_split_over_replicas_of_everything(pool_of: Any) -> None:
    fleet, (rows, logits) = whole(3), drawn(600)
    with pool_of(fleet) as pool:
        pool.layers(MODEL)
        reply = pool.call(MODEL, LAYER, rows, router_logits=logits)
    right(reply.output, rows, logits)
    assert [server.rows for server in fleet.servers.values()] == [200, 200, 200]
    assert (reply.attempts, reply.rows_sent) == (3, 600) and reply.complete_rows.all()
    assert {share.target for share in reply.shares} == set(fleet.targets)
    assert all(call.router_logits and not call.partial for s in fleet for call in s.calls)


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
    right(reply.output, rows, logits)
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
        right(pool.forward(MODEL, LAYER, rows, router_logits=logits), rows, logits)


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
                right(np.asarray(again), rows, logits)


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
    right(output, narrow.astype(np.float32) * scale, logits)


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


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"router_logits": None}, "no routing given"),
        ({"topk_ids": np.zeros((3, 1), np.int32)}, "both router_logits and topk"),
        ({"router_logits": np.zeros((3, 5), np.float32)}, r"\[tokens, 16\] accepted"),
        ({"router_logits": np.zeros((2, 16), np.float32)}, "3 rows given, but routing for 2"),
        ({"router_logits": np.full((3, 16), np.nan, np.float32)}, "row 0 has NaN"),
        ({"reply_dtype": "int8"}, "accepted: bfloat16, float16, float32"),
        ({"partial": True}, '"refuse", "allow"'),
        ({"router_logits": [[0.0]]}, "numpy arrays and torch tensors"),
    ],
)
def test_mistakes_of_the_caller(changes: dict[str, Any], text: str) -> None:
    rows, logits = drawn(3)
    with pool_over(ranges(*FOUR)) as pool, pytest.raises(InvalidArgument, match=text):
        pool.forward(MODEL, LAYER, rows, **{"router_logits": logits} | changes)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (np.array([[0, 16]], np.int32), r"row 0 has an id outside 0\.\.15"),
        (np.array([[0, -2]], np.int32), "outside"),
        (np.array([[0.0, 1.0]], np.float32), "int32 or int64"),
        (np.array([[0]], np.int32), "the same shape"),
        (None, "belong together"),
    ],
)
def test_ids_that_no_replica_has(ids: Any, text: str) -> None:
    row, weights = np.ones((1, HIDDEN), np.float32), np.ones((1, 2), np.float32)
    with pool_over(ranges(*FOUR)) as pool, pytest.raises(InvalidArgument, match=text):
        pool.forward(MODEL, LAYER, row, topk_ids=ids, topk_weights=weights)


def test_rows_of_another_width() -> None:
    with (
        pool_over(ranges(*FOUR)) as pool,
        pytest.raises(InvalidArgument, match=r"\[tokens, 8\] accepted"),
    ):
        pool.forward(MODEL, LAYER, np.ones((2, 9), np.float32), router_logits=drawn(2)[1])


def test_unknown_model_and_failed_layer(pool_of: Any) -> None:
    fleet, (rows, logits) = whole(2), drawn(2)
    with pool_of(fleet) as pool:
        with pytest.raises(NotFound, match="models there: m"):
            pool.forward("other", LAYER, rows, router_logits=logits)
        with pytest.raises(NotFound, match="layer 4"):
            pool.forward(MODEL, 4, rows, router_logits=logits)
    for server in fleet:
        server.state = "failed"
    with pool_of(fleet) as pool, pytest.raises(LayerFailed, match="as told by a test"):
        pool.forward(MODEL, LAYER, rows, router_logits=logits)


def test_what_the_pool_knows(pool_of: Any) -> None:
    with pool_of(ranges(*FOUR)) as pool:
        assert pool.layer(MODEL, LAYER).num_experts == EXPERTS
        held = sorted((info.expert_begin, info.expert_end) for info in pool.layers(MODEL))
        assert held == sorted(FOUR)
        assert pool.layers("other") == []


def test_a_bad_setting_is_told_at_once() -> None:
    with pytest.raises(InvalidArgument, match="auto, tokens, experts"):
        ExpertPool(["a:1"], shard="rows")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="HOST:PORT"):
        ExpertPool(["http:/nowhere"])
    with pytest.raises(InvalidArgument, match="none given"):
        ExpertPool([])
    with pytest.raises(InvalidArgument, match="token"):
        ExpertPool(["a:1"], token="two words")
    assert not [thread for thread in threading.enumerate() if thread.name == "expertd-pool"]


def test_closing_ends_calls_and_threads() -> None:
    fleet, (rows, logits) = whole(1), drawn(2)
    caught: list[BaseException] = []
    begun = threading.Event()

    async def hang(call: Any) -> None:
        begun.set()
        await asyncio.sleep(60)

    fleet[0].script = hang
    pool = ExpertPool(fleet.targets, connect=fleet.connect)

    def call() -> None:
        try:
            pool.forward(MODEL, LAYER, rows, router_logits=logits)
        except Unavailable as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(10)
    pool.close()
    pool.close()
    thread.join(10)
    assert len(caught) == 1 and all(link.closed for link in fleet.links)
    with pytest.raises(Unavailable, match="closed"):
        pool.forward(MODEL, LAYER, rows, router_logits=logits)
    assert not [t for t in threading.enumerate() if t.name == "expertd-pool"]


async def test_a_cancelled_call_is_taken_back() -> None:
    fleet, (rows, logits) = whole(1), drawn(2)
    begun = threading.Event()

    async def hang(call: Any) -> None:
        begun.set()
        await asyncio.sleep(60)

    fleet[0].script = hang
    async with AsyncExpertPool(fleet.targets, connect=fleet.connect) as pool:
        call = asyncio.create_task(pool.forward(MODEL, LAYER, rows, router_logits=logits))
        assert await asyncio.to_thread(begun.wait, 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        until = time.monotonic() + 10
        while not fleet[0].cancelled:
            assert time.monotonic() < until
            await asyncio.sleep(0.01)


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
        right(pool.forward(MODEL, LAYER, rows, router_logits=logits), rows, logits)
        assert [server.rows for server in fleet.servers.values()] == [30, 0, 0]
        fleet[0].reachable = False
        right(pool.forward(MODEL, LAYER, rows, router_logits=logits), rows, logits)
        assert fleet[1].rows and fleet[2].rows
