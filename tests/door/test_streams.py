"""ForwardStream on real servers: any order, errors per message, bounds, callers that leave."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch
from tests.e2e.local import Local
from tests.e2e.servers import in_process
from tests.service.engine.parts import Gate
from tests.strategies import torch_tensor, wire_call
from tests.waiting import until

from expertd_wire.codec import decode_forward_reply, encode_forward_call
from expertd_wire.messages import ForwardReply
from expertd_wire.methods import FORWARD_STREAM
from expertd_wire.status import unpack_status

FLAGS = ("--identity", "echo=8", "--max-message-bytes", "65536", "--max-stream-calls", "3")


@pytest.fixture
def local() -> Iterator[Local]:
    with in_process(*FLAGS) as (app, addresses):
        assert app.wait_ready()
        yield Local(app, addresses)


class RawStream:
    """One stream without our client's code; send None to say that all was sent."""

    def __init__(self, channel: grpc.Channel, timeout: float = 30) -> None:
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call = channel.stream_stream(FORWARD_STREAM)(
            iter(self.outbox.get, None), timeout=timeout
        )

    def send(self, name: str, **fields: Any) -> None:
        fields = {"model": "echo", "hidden_states": torch.full((2, 8), 1.0)} | fields
        self.outbox.put(encode_forward_call(wire_call(request_id=name, **fields)))

    def receive(self) -> ForwardReply:
        return decode_forward_reply(next(self.call))


@pytest.fixture
def stream(local: Local) -> Iterator[RawStream]:
    with grpc.insecure_channel(local.addresses.grpc) as channel:
        opened = RawStream(channel)
        yield opened
        opened.call.cancel()


def reason(reply: ForwardReply) -> str:
    return unpack_status(reply.status).reason if reply.status else "OK"


def metric(local: Local, begins: str) -> float:
    lines = local.app.metrics.render().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(begins))


def test_every_message_has_its_own_answer_or_error(local: Local, stream: RawStream) -> None:
    stream.send("good", hidden_states=torch.full((1, 8), 4.0))
    stream.send("model", model="nobody")
    stream.send("width", hidden_states=torch.ones(2, 9))
    stream.outbox.put(b"\xff\xff\xff")
    stream.outbox.put(b"\x1a\x80\x80\x80\x80\x04")
    stream.send("large", hidden_states=torch.ones(1 << 12, 8))
    stream.send("empty", hidden_states=torch.ones(0, 8))
    stream.send("last", hidden_states=torch.full((3, 8), 5.0))
    stream.outbox.put(None)
    replies = [decode_forward_reply(data) for data in stream.call]
    found = {reply.request_id: reply for reply in replies if reply.request_id}
    assert {name: reason(reply) for name, reply in found.items()} == {
        "good": "OK",
        "model": "NOT_FOUND",
        "width": "INVALID_ARGUMENT",
        "empty": "OK",
        "last": "OK",
    }
    unnamed = sorted(reason(reply) for reply in replies if not reply.request_id)
    assert unnamed == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "TOO_LARGE"]
    assert torch.equal(torch_tensor(found["good"].output), torch.full((1, 8), 4.0))
    assert torch.equal(torch_tensor(found["last"].output), torch.full((3, 8), 5.0))
    assert stream.call.code() is grpc.StatusCode.OK
    assert metric(local, "expertd_requests_total{") == 8
    assert metric(local, "expertd_inflight_requests ") == 0


def test_a_slow_call_does_not_hold_up_the_others(local: Local, stream: RawStream) -> None:
    local.script(gate := Gate())
    stream.send("slow")
    assert gate.entered.wait(10)
    stream.send("refused", model="nobody")
    stream.send("empty", hidden_states=torch.ones(0, 8))
    assert [stream.receive().request_id for _ in range(2)] == ["refused", "empty"]
    gate.opened.set()
    assert stream.receive().request_id == "slow"


def test_no_more_calls_than_the_limit_are_read(local: Local, stream: RawStream) -> None:
    local.script(gate := Gate())
    for number in range(9):
        stream.send(str(number))
    assert gate.entered.wait(10)
    until(lambda: metric(local, "expertd_inflight_requests ") == 3)
    assert not passes(lambda: metric(local, "expertd_inflight_requests ") > 3)
    gate.opened.set()
    assert {stream.receive().request_id for _ in range(9)} == set("012345678")


def passes(holds: Callable[[], bool]) -> bool:
    """Whether it becomes true soon."""
    waiting = threading.Event()
    return any(holds() or waiting.wait(0.05) for _ in range(10))


def test_a_caller_that_leaves_takes_its_calls_along(local: Local, stream: RawStream) -> None:
    local.script(gate := Gate())
    waiting = local.in_background(1)
    assert gate.entered.wait(10)
    for number in range(5):
        stream.send(str(number))
    until(lambda: local.echo.queued_tokens == 6)
    stream.call.cancel()
    until(lambda: local.echo.queued_tokens == 0)
    until(lambda: metric(local, "expertd_inflight_requests ") == 1)  # the call in the background
    gate.opened.set()
    for thread in waiting:
        thread.join(10)
    assert gate.batches == [2], "no call of the stream was run"
    until(lambda: 'reason="cancelled"' in local.app.metrics.render().decode())
    until(lambda: not any(t.name == "stream" for t in threading.enumerate()))
    assert local.app._ingress.taken == 0


def test_a_call_that_runs_when_its_caller_leaves_is_still_counted(
    local: Local, stream: RawStream
) -> None:
    local.script(gate := Gate())
    stream.send("running")
    assert gate.entered.wait(10)
    stream.call.cancel()
    gate.opened.set()
    until(lambda: metric(local, "expertd_inflight_requests ") == 0)
    assert metric(local, "expertd_requests_total{") == 1
    assert local.app._ingress.taken == 0


def test_a_stream_ends_at_its_deadline(local: Local) -> None:
    local.script(gate := Gate())
    with grpc.insecure_channel(local.addresses.grpc) as channel:
        late = RawStream(channel, timeout=0.5)
        late.send("late")
        with pytest.raises(grpc.RpcError) as caught:
            late.receive()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    gate.opened.set()
    until(lambda: metric(local, "expertd_inflight_requests ") == 0)


def test_a_fault_of_ours_is_that_messages_error(
    local: Local, stream: RawStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(local.app.engine, "submit", fail)
    stream.send("first")
    stream.send("second")
    for reply in (stream.receive(), stream.receive()):
        status = unpack_status(reply.status)
        assert status.reason == "INTERNAL" and "secret" not in status.message


def test_what_streams_hold_counts_as_ingress() -> None:
    limits = ("--max-message-bytes", "1048576", "--max-concurrent-calls", "2")
    flags = ("--identity", "echo=8", *limits, "--ingress-bytes", str(2 << 20))
    with in_process(*flags) as (app, addresses):
        assert app.wait_ready()
        local = Local(app, addresses)
        local.script(gate := Gate())
        with grpc.insecure_channel(addresses.grpc) as channel:
            stream = RawStream(channel)
            for number in range(4):
                stream.send(str(number), hidden_states=torch.ones(20_000, 8))  # 640 kB each
            refused = stream.receive()
            assert reason(refused) == "OVERLOADED"
            assert "--ingress-bytes" in unpack_status(refused.status).message
            gate.opened.set()
            assert [reason(stream.receive()) for _ in range(3)] == ["OK", "OK", "OK"]
            stream.call.cancel()
        until(lambda: app._ingress.taken == 0)
