"""A method in two halves: no thread waits between them, and no way out of a call is a hang.

All of it also where grpcio's inside is unknown and each call takes a thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import grpc
import pytest
from grpc import _server
from tests.waiting import until

from expertd.errors import NotFound
from expertd.transport import workers
from expertd.transport.auth import Guard
from expertd.transport.grpc_inside import SIGNATURES, fits
from expertd.transport.grpc_server import GrpcLimits, GrpcServer
from expertd.transport.halves import Halves, Ready

MOST = 3
LIMITS = GrpcLimits(max_message_bytes=1000, max_concurrent_calls=MOST, max_header_bytes=8192)
POLLED, THREADS = "no thread", "a thread each"


class Begun(NamedTuple):
    """A call whose first half has run."""

    message: bytes
    context: Any
    ready: Ready


class Script:
    """A method whose answers are the test's business."""

    def __init__(self) -> None:
        self.begun: list[Begun] = []
        self.finished_on: list[str] = []

    def begin(self, message: bytes, context: grpc.ServicerContext, ready: Ready) -> None:
        if message == b"begin":
            raise RuntimeError("/secret")
        if message == b"at once":
            return ready(message, True)
        self.begun.append(Begun(message, context, ready))

    def finish(self, answer: Any, context: grpc.ServicerContext) -> bytes:
        self.finished_on.append(threading.current_thread().name)
        if isinstance(answer, Exception):
            raise answer
        return bytes(answer)

    def wait_for(self, count: int) -> list[Begun]:
        until(lambda: len(self.begun) == count)
        return self.begun


class Served(NamedTuple):
    """A server of the method test/M, its script and a channel to it."""

    script: Script
    channel: grpc.Channel
    refused: list[None]

    def call(self, message: bytes, **named: Any) -> Any:
        return self.channel.unary_unary("/test/M").future(message, timeout=20, **named)

    def answers(self) -> None:
        """Proves that not one call is left that takes a place."""

        def try_all() -> bool:
            self.script.begun.clear()
            calls = [self.call(b"again") for _ in range(MOST)]
            until(lambda: len(self.script.begun) + sum(c.done() for c in calls) == MOST)
            all_in = len(self.script.begun) == MOST
            for begun in list(self.script.begun):
                begun.ready(b"once more", True)
            told = [c.result() for c in calls if c.exception() is None]
            assert set(told) <= {b"once more"}
            return all_in

        until(try_all)


@contextmanager
def serving() -> Iterator[Served]:
    script, refused = Script(), list[None]()
    method = Halves(script.begin, script.finish)
    methods = {"test": {"M": grpc.unary_unary_rpc_method_handler(method)}}
    server = GrpcServer(methods, LIMITS, Guard(), None, lambda: refused.append(None))
    port = server.bind("127.0.0.1", 0)
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(script, channel, refused)
    server.stop(1)


@pytest.fixture(params=[POLLED, THREADS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == THREADS:
        monkeypatch.setattr(workers, "fits", lambda: False)
    return str(request.param)


@pytest.fixture
def served(way: str) -> Iterator[Served]:
    with serving() as found:
        yield found


def refusal(call: Any) -> tuple[str, str]:
    error = call.exception()
    assert isinstance(error, grpc.RpcError), error
    return error.code().name, error.details()  # type: ignore[attr-defined]


def handler_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "grpc"}


def test_whoever_has_the_answer_sends_it_if_that_is_quick(served: Served, way: str) -> None:
    calls = [served.call(b"%d" % n) for n in range(MOST)]
    begun = sorted(served.script.wait_for(MOST))
    assert [b.message for b in begun] == [b"0", b"1", b"2"]
    for n, at_once in ((1, True), (0, False), (2, True)):
        begun[n].ready(b"answer to " + begun[n].message, at_once)
        assert calls[n].result() == b"answer to %d" % n
    mine = threading.current_thread().name
    expected = [mine, "grpc", mine] if way == POLLED else ["grpc"] * 3
    assert served.script.finished_on == expected
    served.answers()


def test_no_thread_waits_for_an_answer(way: str) -> None:
    before = handler_threads()
    with serving() as served:
        calls = [served.call(b"") for _ in range(MOST)]
        served.script.wait_for(MOST)
        assert len(handler_threads() - before) == (0 if way == POLLED else MOST)
        assert refusal(served.call(b""))[0] == "RESOURCE_EXHAUSTED"
        assert len(served.refused) == 1
        for begun in served.script.begun:
            begun.ready(b"!", True)
        assert [call.result() for call in calls] == [b"!"] * MOST
        served.answers()


def test_where_no_thread_can_be_started_calls_wait_for_one(
    served: Served, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, start = list[threading.Thread](), threading.Thread.start

    def start_no_handler(thread: threading.Thread) -> None:
        if thread.name == "grpc":
            tried.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_no_handler)
        calls = [served.call(b"")]
        if way == POLLED:
            served.script.wait_for(1)[0].ready(b"!", False)
        until(lambda: tried)
    calls.append(served.call(b""))
    if way == THREADS:
        served.script.wait_for(1)[0].ready(b"!", False)
    served.script.wait_for(2)[1].ready(b"!", False)
    assert [call.result() for call in calls] == [b"!"] * 2
    served.answers()


def test_an_answer_may_be_there_before_the_first_half_has_ended(served: Served) -> None:
    assert served.call(b"at once").result() == b"at once"
    served.answers()


@pytest.mark.parametrize("at_once", [True, False])
def test_our_own_faults_are_internal_and_logged(
    served: Served, at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    internal = ("INTERNAL", "an internal error; the server's log says more")
    assert refusal(served.call(b"begin")) == internal
    call = served.call(b"finish")
    served.script.wait_for(1)[0].ready(RuntimeError("/secret"), at_once)
    assert refusal(call) == internal
    served.answers()
    told = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [str(r.exc_info[1]) for r in told if r.exc_info] == ["/secret"] * 2


def test_errors_of_ours_leave_as_their_status(served: Served) -> None:
    call = served.call(b"")
    served.script.wait_for(1)[0].ready(NotFound("no such layer"), True)
    assert refusal(call) == ("NOT_FOUND", "no such layer")
    served.answers()


def test_a_caller_who_left_is_told_of(served: Served) -> None:
    gone = threading.Event()
    call = served.call(b"")
    (begun,) = served.script.wait_for(1)
    assert begun.context.add_callback(gone.set)
    call.cancel()
    assert gone.wait(10)
    assert not begun.context.add_callback(gone.set), "it has left already"
    begun.ready(b"too late", True)
    served.answers()


def test_a_deadline_is_told_of_and_known(served: Served) -> None:
    gone = threading.Event()
    call = served.channel.unary_unary("/test/M").future(b"", timeout=1)
    (begun,) = served.script.wait_for(1)
    assert 0 < begun.context.time_remaining() <= 1.1
    assert begun.context.peer().startswith("ipv4:127.0.0.1:")
    begun.context.add_callback(gone.set)
    assert refusal(call)[0] == "DEADLINE_EXCEEDED"
    assert gone.wait(10)
    begun.ready(b"too late", False)
    served.answers()


def test_who_sends_no_message_is_told_and_who_leaves_before_takes_no_place(served: Served) -> None:
    stream = served.channel.stream_unary("/test/M")
    none = stream.future(iter(()), timeout=20)
    assert refusal(none)[0] in ("INVALID_ARGUMENT", "UNIMPLEMENTED")
    assert "exactly one" in refusal(none)[1]
    later = threading.Event()

    def never() -> Iterator[bytes]:
        later.wait(20)
        yield from ()

    calls = [stream.future(never(), timeout=20) for _ in range(MOST)]
    until(lambda: refusal_of_one_more(served))
    for call in calls:
        call.cancel()
    later.set()
    assert not served.script.begun
    served.answers()


def refusal_of_one_more(served: Served) -> bool:
    """Whether all places are taken."""
    probe = served.channel.stream_unary("/test/M").future(iter(()), timeout=20)
    return refusal(probe)[0] == "RESOURCE_EXHAUSTED"


def test_a_message_beyond_the_limit_never_begins(served: Served) -> None:
    assert refusal(served.call(bytes(4 << 20)))[0] == "RESOURCE_EXHAUSTED"
    assert not served.script.begun
    served.answers()


def test_a_stop_waits_for_a_call_that_no_thread_waits_for(way: str) -> None:
    with ExitStack() as stack:
        served = stack.enter_context(serving())
        call = served.call(b"")
        (begun,) = served.script.wait_for(1)
        threading.Timer(0.2, begun.ready, (b"still answered", True)).start()
        assert call.result() == b"still answered"


def test_this_grpcio_is_known_inside() -> None:
    assert fits(), f"grpcio {grpc.__version__}: see expertd.transport.grpc_inside"


@pytest.mark.parametrize("name", [*SIGNATURES, "_RECEIVE_MESSAGE_TOKEN"])
def test_another_grpcio_is_noticed_and_served_all_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = getattr(_server, name)
    with monkeypatch.context() as patch:
        patch.setattr(_server, name, lambda one, more: None)
        assert not fits() or name == "_RECEIVE_MESSAGE_TOKEN"
        patch.delattr(_server, name)
        assert not fits()
    assert getattr(_server, name) is real
    monkeypatch.setattr(workers, "fits", lambda: False)
    with serving() as served:
        assert "each call takes a thread" in caplog.text
        served.answers()
