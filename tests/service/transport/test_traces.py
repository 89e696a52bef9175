"""What a call over gRPC leaves behind when it is over: its place free, and nothing in memory.

Also where each call takes a thread.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
import torch
from tests.e2e.local import Local
from tests.e2e.servers import in_process
from tests.service.engine.parts import Gate
from tests.strategies import wire_call
from tests.waiting import until

from expertd.engine.ticket import Ticket
from expertd.transport import workers
from expertd_client import Client
from expertd_wire.codec import encode_forward_call
from expertd_wire.methods import FORWARD, FORWARD_STREAM

CALL = encode_forward_call(wire_call(model="echo", hidden_states=torch.ones(1, 8)))
MOST = 2
WIDE = 4096


@pytest.fixture(params=["no thread", "a thread each"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a call takes a thread."""
    if request.param == "a thread each":
        monkeypatch.setattr(workers, "fits", lambda: False)


@pytest.fixture
def local(way: None) -> Iterator[Local]:
    layers = ("--identity", "echo=8", "--identity", f"wide={WIDE}")
    with in_process(*layers, "--max-concurrent-calls", str(MOST)) as found:
        assert found[0].wait_ready()
        yield Local(*found)


@pytest.fixture
def forward(local: Local) -> Iterator[grpc.UnaryUnaryMultiCallable[Any, Any]]:
    with grpc.insecure_channel(local.addresses.grpc) as channel:
        grpc.channel_ready_future(channel).result(20)
        yield channel.unary_unary(FORWARD)


@pytest.fixture
def gate(local: Local) -> Iterator[Gate]:
    """What the layer does: it waits until the test is over, unless that opens it."""
    gate = Gate()
    local.script(gate)
    yield gate
    gate.opened.set()


def code(call: Any) -> str:
    error = call.exception()
    return "OK" if error is None else str(error.code().name)


def accepted(local: Local, forward: Any) -> Any:
    """A call that waits in the queue; the server hears of those who leave a moment later."""
    before, tried = local.echo.queued_tokens, list[Any]()

    def queued() -> bool:
        if not tried or tried[-1].done():
            tried.append(forward.future(CALL, timeout=20))
        return local.echo.queued_tokens == before + 1

    until(queued)
    return tried[-1]


def begun(forward: Any, gate: Gate) -> Any:
    """A call that computes; the places of those before it are free a moment after they ended."""
    tried = list[Any]()

    def entered() -> bool:
        if not tried or tried[-1].done():
            tried.append(forward.future(CALL, timeout=20))
        return gate.entered.is_set()

    until(entered)
    return tried[-1]


def test_who_leaves_takes_no_place_though_the_device_goes_on(
    local: Local, forward: Any, gate: Gate
) -> None:
    running = forward.future(CALL, timeout=20)
    assert gate.entered.wait(10)
    for _ in range(3 * MOST):
        accepted(local, forward).cancel()
        until(lambda: local.echo.queued_tokens == 0)
    running.cancel()
    full = [accepted(local, forward) for _ in range(MOST)]
    gate.opened.set()
    assert [code(call) for call in full] == ["OK"] * MOST
    assert gate.batches == [1, MOST]


def test_a_deadline_frees_the_place_of_a_call_that_never_ends(
    local: Local, forward: Any, gate: Gate
) -> None:
    stuck = [forward.future(CALL, timeout=0.5) for _ in range(MOST)]
    assert [code(call) for call in stuck] == ["DEADLINE_EXCEEDED"] * MOST
    until(lambda: local.echo.queued_tokens == 0)
    later = accepted(local, forward)
    gate.opened.set()
    assert code(later) == "OK"


def test_nothing_of_a_call_is_left_for_the_garbage_collector(
    local: Local, forward: Any, gate: Gate
) -> None:
    others = tickets()  # an executor whose device was lost keeps its own for ever
    gate.opened.set()
    assert code(forward.future(CALL, timeout=20)) == "OK"
    gc.collect()
    gc.disable()
    try:
        for call in (CALL, CALL[:-1], b"no message"):
            forward.future(call, timeout=20).exception()
        gate.opened.clear()
        gate.entered.clear()
        running = begun(forward, gate)
        forward.future(CALL, timeout=0.1).exception()
        running.cancel()
        gate.opened.set()
        until(lambda: code(forward.future(CALL, timeout=20)) == "OK")
        # The executor may keep its last until it has another.
        until(lambda: len([one for one in tickets() if one not in others]) <= 1)
    finally:
        gc.enable()


def test_nothing_of_a_call_is_left_in_its_stream(local: Local) -> None:
    before, sent = {id(ticket) for ticket in tickets()}, SimpleQueue[bytes | None]()
    gc.disable()
    try:
        with grpc.insecure_channel(local.addresses.grpc) as channel:
            answers = channel.stream_stream(FORWARD_STREAM)(iter(sent.get, None), timeout=60)
            for call in (CALL, CALL, b"no message", CALL):
                sent.put(call)
                assert next(answers)
            until(lambda: {id(ticket) for ticket in tickets()} <= before)
            sent.put(None)
            assert list(answers) == []
    finally:
        gc.enable()


def test_an_answer_that_nobody_reads_keeps_nothing_of_its_call(local: Local) -> None:
    rows = torch.ones(1024, WIDE)  # more than a caller takes unasked
    call = encode_forward_call(wire_call(model="wide", hidden_states=rows))
    before = {id(ticket) for ticket in tickets()}
    with grpc.insecure_channel(local.addresses.grpc) as channel:
        unread = channel.unary_stream(FORWARD)(call, timeout=60)
        until(lambda: b'mode="routed",model="wide"' in local.app.metrics.render())
        until(lambda: {id(ticket) for ticket in tickets()} <= before)
        assert unread.is_active()
        unread.cancel()


def test_no_thread_runs_on_when_the_server_has_stopped(way: None) -> None:
    before = set(threading.enumerate())
    with in_process("--identity", "echo=8") as (app, addresses):
        assert app.wait_ready()
        with Client(addresses.grpc) as client:
            client.forward("echo", 0, torch.ones(1, 8))
            assert client.health()
    until(lambda: set(threading.enumerate()) <= before)


def tickets() -> list[Ticket]:
    return [found for found in gc.get_objects() if type(found) is Ticket]
