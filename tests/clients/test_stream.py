"""AsyncClient.stream(): replies find their calls, errors stay with theirs, an end is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from expertd_client import (
    AsyncClient,
    DeadlineExceeded,
    ExpertdError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from expertd_client.stream import CallStream
from expertd_client.transport.base import ByteStream
from expertd_wire.codec import decode_forward_call, encode_forward_reply
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.status import pack_status

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


class Scripted(ByteStream):
    """The test's end of a stream: it takes calls and answers them when it likes."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[ForwardCall] = asyncio.Queue()
        self.replies: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed = False

    async def send(self, request: bytes) -> None:
        self.calls.put_nowait(decode_forward_call(request))

    async def receive(self) -> bytes | None:
        return await self.replies.get()

    async def close(self) -> None:
        self.closed = True

    def echo(self, call: ForwardCall) -> None:
        reply = ForwardReply(call.hidden_states, "identity", "routed", request_id=call.request_id)
        self.replies.put_nowait(encode_forward_reply(reply))

    def refuse(self, call: ForwardCall, reason: str, text: str) -> None:
        status = pack_status(reason, text)
        reply = ForwardReply(request_id=call.request_id, status=status)
        self.replies.put_nowait(encode_forward_reply(reply))


@pytest.fixture
async def carrier() -> Scripted:
    return Scripted()


@pytest.fixture
async def stream(carrier: Scripted) -> AsyncIterator[CallStream]:
    async with CallStream(carrier) as opened:
        yield opened
    assert carrier.closed


async def test_replies_in_any_order_find_their_calls(stream: CallStream, carrier: Scripted) -> None:
    tasks = [asyncio.create_task(stream.forward("m", 0, ROWS * n)) for n in range(5)]
    calls = [await carrier.calls.get() for _ in tasks]
    assert len({call.request_id for call in calls}) == 5
    for call in reversed(calls):
        carrier.echo(call)
    for number, task in enumerate(tasks):
        assert np.array_equal(await task, ROWS * number)


async def test_an_error_is_its_calls_own(stream: CallStream, carrier: Scripted) -> None:
    bad = asyncio.create_task(stream.forward("nobody", 0, ROWS))
    good = asyncio.create_task(stream.forward("m", 0, ROWS))
    first, second = await carrier.calls.get(), await carrier.calls.get()
    carrier.refuse(first, "NOT_FOUND", "model 'nobody' is not served")
    carrier.echo(second)
    with pytest.raises(NotFound, match="nobody"):
        await bad
    assert np.array_equal(await good, ROWS)


async def test_one_request_id_is_under_way_once(stream: CallStream, carrier: Scripted) -> None:
    first = asyncio.create_task(stream.call("m", 0, ROWS, request_id="same"))
    call = await carrier.calls.get()
    with pytest.raises(InvalidArgument, match="same"):
        await stream.call("m", 0, ROWS, request_id="same")
    carrier.echo(call)
    await first
    again = asyncio.create_task(stream.call("m", 0, ROWS, request_id="same"))
    carrier.echo(await carrier.calls.get())
    await again


async def test_a_late_reply_is_nobodys(stream: CallStream, carrier: Scripted) -> None:
    with pytest.raises(DeadlineExceeded, match=r"0\.05"):
        await stream.call("m", 0, ROWS, timeout=0.05)
    carrier.echo(await carrier.calls.get())
    task = asyncio.create_task(stream.forward("m", 0, ROWS))
    carrier.echo(await carrier.calls.get())
    assert np.array_equal(await task, ROWS)


async def test_a_caller_who_leaves_in_the_middle_of_a_message_breaks_nothing_off(
    stream: CallStream, carrier: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC ends a stream whose write is cancelled."""
    taken, whole = asyncio.Event(), []

    async def slow(request: bytes) -> None:
        await taken.wait()
        whole.append(request)
        carrier.calls.put_nowait(decode_forward_call(request))

    monkeypatch.setattr(carrier, "send", slow)
    waiting = asyncio.create_task(stream.forward("m", 0, ROWS, timeout=30))
    hasty = [asyncio.create_task(stream.call("m", 1, ROWS, timeout=0.05)) for _ in range(3)]
    waiting_too = asyncio.create_task(stream.forward("m", 2, ROWS, timeout=30))
    for late in hasty:
        with pytest.raises(DeadlineExceeded):
            await late
    leaver = asyncio.create_task(stream.forward("m", 0, ROWS, timeout=30))
    await asyncio.sleep(0)
    leaver.cancel()
    waiting.cancel()
    await asyncio.wait([leaver, waiting])
    taken.set()
    calls = [await asyncio.wait_for(carrier.calls.get(), 5) for _ in range(2)]
    assert [call.layer for call in calls] == [0, 2] and len(whole) == 2
    carrier.echo(calls[1])
    assert np.array_equal(await waiting_too, ROWS)


async def test_a_write_that_fails_is_its_callers_and_the_next_has_its_turn(
    stream: CallStream, carrier: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(request: bytes) -> None:
        await asyncio.sleep(0)
        raise Unavailable("it is gone")

    monkeypatch.setattr(carrier, "send", broken)
    for _ in range(2):
        with pytest.raises(Unavailable, match="gone"):
            await asyncio.wait_for(stream.call("m", 0, ROWS), 5)


async def test_the_servers_end_reaches_those_who_wait_and_those_who_come(
    stream: CallStream, carrier: Scripted
) -> None:
    waiting = asyncio.create_task(stream.call("m", 0, ROWS))
    await carrier.calls.get()
    carrier.replies.put_nowait(None)
    with pytest.raises(Unavailable, match="ended"):
        await waiting
    with pytest.raises(Unavailable, match="ended"):
        await asyncio.wait_for(stream.call("m", 0, ROWS, timeout=None), 5)


async def test_an_unreadable_reply_ends_the_stream(stream: CallStream, carrier: Scripted) -> None:
    waiting = asyncio.create_task(stream.call("m", 0, ROWS))
    await carrier.calls.get()
    carrier.replies.put_nowait(b"\xff\xff")
    for attempt in (waiting, stream.call("m", 0, ROWS)):
        with pytest.raises(ExpertdError, match="cannot be read"):
            await asyncio.wait_for(attempt, 5)


async def test_closing_is_told_to_those_who_wait(carrier: Scripted) -> None:
    async with CallStream(carrier) as stream:
        waiting = asyncio.create_task(stream.call("m", 0, ROWS))
        await carrier.calls.get()
    with pytest.raises(Unavailable, match="closed"):
        await waiting


async def test_a_server_that_is_not_there() -> None:
    async with AsyncClient("127.0.0.1:1") as client, client.stream() as stream:
        with pytest.raises(Unavailable):
            await stream.call("m", 0, ROWS, timeout=10)


async def test_a_closed_client_opens_no_stream() -> None:
    client = AsyncClient("127.0.0.1:1")
    assert await client.health(timeout=1) is False
    await client.close()
    with pytest.raises(Unavailable, match="this client was closed"):
        client.stream()
