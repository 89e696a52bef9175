"""A pool's callers: their mistakes, what they may ask, and how it all ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.clients.fleets import EXPERTS, HIDDEN, LAYER, MODEL, FakeLink, ranges, whole
from tests.clients.pooling import FOUR, assert_right, drawn, hang, pool_over
from tests.processes import assert_runs
from tests.waiting import until

from expertd_client import AsyncExpertPool, ExpertPool
from expertd_client.errors import (
    InvalidArgument,
    LayerFailed,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from expertd_client.fleet.loop import LoopThread


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


def test_replicas_that_let_nobody_in(pool_of: Any) -> None:
    """Waiting would not help, so the call is told why, at once."""
    fleet, (rows, logits) = whole(2), drawn(2)

    async def refuse() -> None:
        raise Unauthenticated("a token is needed")

    for server in fleet:
        server.probe = refuse
    with pool_of(fleet) as pool, pytest.raises(Unauthenticated, match="a token is needed"):
        pool.forward(MODEL, LAYER, rows, router_logits=logits)
    fleet[1].probe = None
    with pool_of(fleet) as pool:
        assert_right(pool.forward(MODEL, LAYER, rows, router_logits=logits), rows, logits)


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


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 1e10, None])
def test_what_is_as_long_as_for_ever_is_no_deadline(timeout: float | None) -> None:
    fleet, (rows, logits), told = whole(1), drawn(2), []

    class Noting(FakeLink):
        async def forward(self, request: bytes, timeout: float | None) -> bytes:
            told.append(timeout)
            return await super().forward(request, timeout)

    with ExpertPool(fleet.targets, connect=lambda t: Noting(fleet.servers[t])) as pool:
        pool.forward(MODEL, LAYER, rows, router_logits=logits, timeout=timeout)
    assert told == [None]


def test_a_timeout_that_is_no_number_is_refused(pool_of: Any) -> None:
    rows, logits = drawn(2)
    with pool_of(whole(1)) as pool:
        with pytest.raises(InvalidArgument, match="timeout nan given"):
            pool.forward(MODEL, LAYER, rows, router_logits=logits, timeout=float("nan"))
        with pytest.raises(InvalidArgument, match="timeout nan given"):
            pool.layers(timeout=float("nan"))


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


async def test_a_pool_can_be_used_and_closed_where_a_loop_is_running() -> None:
    """As in a notebook."""
    fleet, (rows, logits) = whole(1), drawn(300_000 // HIDDEN)
    with pool_over(fleet) as pool:
        output = pool.forward(MODEL, LAYER, rows, router_logits=logits)
        assert_right(output, rows, logits)
    assert not [t for t in threading.enumerate() if t.name.startswith("asyncio_")]


def test_closing_waits_for_no_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tells them may hang: a name server, a URL, a file of another machine."""
    asked, let_go = threading.Event(), threading.Event()

    def hangs(*_: Any, **__: Any) -> Any:
        asked.set()
        let_go.wait(60)
        raise OSError("let go")

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    pool = ExpertPool("dns:///nobody:1")
    closing = threading.Thread(target=pool.close)
    try:
        assert asked.wait(10)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()
    finally:
        let_go.set()
        closing.join()


def test_what_comes_while_a_pool_is_being_closed_is_told_so() -> None:
    """Between a caller's look whether the pool is open and its call, another thread may close."""

    async def work() -> None:
        """Nothing."""

    thread = LoopThread("expertd-pool")
    thread.run(work())
    thread.close(work())
    thread.close(work())
    with pytest.raises(Unavailable, match="closed"):
        thread.run(work())


FORKED = """
import os, signal
from tests.clients.pooling import ask, pool_over
from tests.clients.fleets import whole
from expertd_client.errors import Unavailable

with pool_over(whole(1)) as pool:
    ask(pool)
    child = os.fork()
    signal.alarm(30)
    try:
        ask(pool, timeout=1)
    except Unavailable as error:
        print(error)
if not child:
    with pool_over(whole(1)) as pool:
        ask(pool)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_pool_does_not_survive_a_fork() -> None:
    """Its thread is not in the child, where a call would wait for it for ever, and a close too."""
    assert "made before this process was forked" in assert_runs(FORKED)


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


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started us in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_call_whose_thread_gives_up_is_taken_back() -> None:
    """Ctrl-C while a call is under way."""
    fleet, (rows, logits) = whole(1), drawn(2)
    begun = threading.Event()

    async def wait(call: Any) -> None:
        begun.set()
        await hang(call)

    fleet[0].script = wait

    main = threading.get_ident()

    def interrupt() -> None:
        begun.wait(10)
        until(lambda: sys._current_frames()[main].f_code.co_name == "wait")
        signal.pthread_kill(main, signal.SIGINT)

    with ExpertPool(fleet.targets, connect=fleet.connect) as pool:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            pool.forward(MODEL, LAYER, rows, router_logits=logits)
        thread.join()
        until(lambda: fleet[0].cancelled)
