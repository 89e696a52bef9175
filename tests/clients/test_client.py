"""Both clients against a real gRPC server: calls, questions, settings."""

from __future__ import annotations

import ast
import asyncio
import inspect
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.clients import servers
from tests.clients.servers import Server

import expertd_client
from expertd_client import (
    AsyncClient,
    AsyncExpertPool,
    Client,
    DeadlineExceeded,
    ExpertdError,
    ExpertPool,
    InvalidArgument,
    Unavailable,
)
from expertd_client.stream import CallStream
from expertd_client.transport.in_process import AsyncInProcessTransport, InProcessTransport
from expertd_wire import methods
from expertd_wire.tensors import from_numpy

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_a_call_carries_every_option(client: Any, server: Server) -> None:
    tensors = {
        "router_logits": np.ones((2, 4), np.float32),
        "topk_ids": np.ones((2, 1), np.int64),
        "topk_weights": np.full((2, 1), 0.5, np.float32),
        "hidden_states_scale": np.ones((2, 1), np.uint8),
    }
    plain = {
        "hidden_states_format": "mxfp8",
        "partial": True,
        "backend": "triton",
        "reply_dtype": "float32",
        "priority": -5,
        "request_id": "r-1",
    }
    client.forward("demo", 3, ROWS, **tensors, **plain)
    (call,) = server.calls
    sent = call._asdict()
    assert sent == plain | {name: from_numpy(array) for name, array in tensors.items()} | {
        "model": "demo",
        "layer": 3,
        "hidden_states": from_numpy(ROWS),
    }


def test_a_call_without_routing_is_sent(client: Any, server: Server) -> None:
    np.testing.assert_array_equal(client.forward("demo", 0, ROWS), ROWS)
    assert server.calls[0].router_logits is None


def test_a_reply_has_the_plan_and_the_times(client: Any) -> None:
    reply = client.call("demo", np.int64(0), ROWS)
    np.testing.assert_array_equal(reply.output, ROWS)
    assert (reply.backend, reply.mode, reply.entry) == ("identity", "routed", "identity")
    assert (reply.queued_ns, reply.staged_ns, reply.computed_ns) == (1, 2, 3)


def test_questions_are_answered(client: Any) -> None:
    assert [layer.model for layer in client.layers()] == ["a", "b"]
    assert [(layer.model, layer.hidden) for layer in client.layers("demo")] == [("demo", 256)]
    assert client.layer("demo", 7).layer == 7
    assert client.capabilities().cells[0].backend == "triton"


def test_health_is_true_only_when_serving(client: Any, server: Server) -> None:
    assert client.health() is True
    server.answers[methods.HEALTH_CHECK] = lambda request, context: b"\x08\x02"
    assert client.health() is False


def test_an_unreachable_server_is_unhealthy_and_unavailable(connect: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with connect(f"127.0.0.1:{unused.getsockname()[1]}") as client:
            assert client.health() is False
            with pytest.raises(Unavailable) as failure:
                client.forward("demo", 0, ROWS)
    assert failure.value.reason == "UNAVAILABLE"


def test_a_client_made_before_its_server_finds_it(connect: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with connect(f"127.0.0.1:{port}") as client:
        for _ in range(5):
            assert client.health(timeout=1) is False
        server = grpc.server(servers.ThreadPoolExecutor(1), handlers=(Server(),))
        server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        assert any(client.health(timeout=1) or _pause() for _ in range(100))
        server.stop(None).wait()


def test_deadlines_are_the_callers(client: Any, server: Server) -> None:
    client.forward("demo", 0, ROWS)
    client.forward("demo", 0, ROWS, timeout=500)
    default, given = server.deadlines
    assert default is not None and given is not None
    assert 0 < default <= 31 < given <= 510  # gRPC rounds up


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 1e10, None])
def test_what_is_as_long_as_for_ever_is_no_deadline(
    timeout: float | None, client: Any, server: Server
) -> None:
    client.forward("demo", 0, ROWS, timeout=timeout)
    (left,) = server.deadlines
    assert left is None or left > 1e9
    assert client.health(timeout=timeout)


def test_a_timeout_that_is_no_number_is_refused(client: Any) -> None:
    with pytest.raises(InvalidArgument, match="timeout nan given"):
        client.forward("demo", 0, ROWS, timeout=float("nan"))
    with pytest.raises(InvalidArgument, match="timeout nan given"):
        client.layers(timeout=float("nan"))


def test_a_server_that_hangs_ends_in_deadline_exceeded(client: Any, server: Server) -> None:
    done = threading.Event()
    server.answers[methods.FORWARD] = lambda request, context: b"" if done.wait(60) else b""
    with pytest.raises(DeadlineExceeded) as failure:
        client.forward("demo", 0, ROWS, timeout=0.05)
    server.answers[methods.HEALTH_CHECK] = server.answers[methods.FORWARD]
    assert client.health(timeout=0.05) is False
    done.set()
    assert failure.value.reason == "DEADLINE_EXCEEDED"


def test_a_token_travels_as_a_bearer(server: Server, connect: Any) -> None:
    with connect(server.target, token="s3cret") as client:
        client.forward("demo", 0, ROWS)
        assert server.metadata["authorization"] == "Bearer s3cret"
        server.metadata = {}
        client.layers()
        assert server.metadata["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("target", ["", " ", "a b:1", "127.0.0.1:1\n"])
def test_what_is_no_target_is_refused(target: str, connect: Any) -> None:
    with pytest.raises(InvalidArgument, match="HOST:PORT is accepted"):
        connect(target)


@pytest.mark.parametrize("token", ["", "a b", "line\n", "tokén"])
def test_a_bad_token_is_refused_and_not_repeated(token: str, connect: Any) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        connect("127.0.0.1:1", token=token)
    assert not token or token not in str(refusal.value)


@pytest.mark.parametrize(
    "reply", [b"\xff", b"", b"\x0a\x03\x0a\x01x"], ids=["garbage", "empty", "bad tensor"]
)
def test_a_reply_that_cannot_be_read_is_an_error(reply: bytes, client: Any, server: Server) -> None:
    server.answers[methods.FORWARD] = lambda request, context: reply
    with pytest.raises(ExpertdError, match="server's reply"):
        client.forward("demo", 0, ROWS)


def test_an_answer_that_cannot_be_read_is_an_error(client: Any, server: Server) -> None:
    server.answers[methods.GET_LAYER] = lambda request, context: b"\xff"
    with pytest.raises(ExpertdError, match="GetLayer cannot be read"):
        client.layer("demo", 0)


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda client: client.forward("demo", 0, [[1.0]]), "hidden_states: builtins.list given"),
        (lambda client: client.forward("demo", 0, np.zeros((1, 2))), "hidden_states: dtype 'float"),
        (lambda client: client.forward("demo", 0, ROWS, topk_ids=[0]), "topk_ids: builtins.list"),
        (lambda client: client.forward("demo", 2**31, ROWS), "layer: 2147483648 does not fit"),
        (lambda client: client.forward("\ud800", 0, ROWS), "model: "),
        (lambda client: client.layer("demo", 2**31), "2147483648"),
        (lambda client: client.layers("\ud800"), "ud800"),
    ],
)
def test_what_cannot_travel_is_refused(
    ask: Callable[[Any], object], text: str, client: Any
) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        ask(client)
    assert text in str(refusal.value)


def test_unknown_options_are_a_type_error(client: Any) -> None:
    with pytest.raises(TypeError, match="top_k"):
        client.forward("demo", 0, ROWS, top_k=3)


def test_a_function_can_be_the_server() -> None:
    answers = {
        methods.FORWARD: servers.echo,
        methods.LIST_LAYERS: servers.list_layers,
        methods.HEALTH_CHECK: lambda request: b"\x08\x01",
    }
    with Client(InProcessTransport(lambda path, request: answers[path](request))) as client:
        np.testing.assert_array_equal(client.forward("demo", 0, ROWS), ROWS)
        assert client.health()
        assert len(client.layers()) == 2


async def test_a_function_can_be_the_async_server() -> None:
    def fail(path: str, request: bytes) -> bytes:
        raise Unavailable("draining")

    async with expertd_client.AsyncClient(AsyncInProcessTransport(fail)) as client:
        assert await client.health() is False
        with pytest.raises(Unavailable, match="draining"):
            await client.forward("demo", 0, ROWS)


def test_a_closed_client_says_that_it_was(connect: Any, server: Server) -> None:
    with connect(server.target) as client:  # which closes it once more
        assert client.forward("demo", 0, ROWS).shape == ROWS.shape
        client.close()
        for ask in (lambda: client.forward("demo", 0, ROWS), client.layers):
            with pytest.raises(Unavailable, match="this client was closed"):
                ask()
        assert client.health() is False


def test_an_async_client_can_be_made_outside_the_loop_and_closed_unused(connect: Any) -> None:
    with connect("127.0.0.1:1") as unused:
        assert callable(unused.forward)


def test_an_async_client_says_that_it_belongs_to_another_loop(server: Server) -> None:
    client = AsyncClient(server.target)

    async def answered() -> Any:
        return await client.forward("m", 0, ROWS, timeout=20)

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        """asyncio.run() would also take away the loop that pytest keeps."""
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(work)

    assert run(answered()).shape == ROWS.shape
    for question in (answered, client.health, client.layers):
        with pytest.raises(InvalidArgument, match="make a client for each loop"):
            run(question())
    run(client.close())


def test_both_clients_have_the_same_surface() -> None:
    root = Path(expertd_client.__file__).parent
    asynchronous = _signatures(root / "aio.py")
    assert asynchronous.pop("stream") == "self"  # a stream is for event loops only
    assert _signatures(root / "client.py") == asynchronous


def test_the_public_surface_is_listed() -> None:
    assert sorted(expertd_client.__all__) == sorted(
        name
        for name, value in vars(expertd_client).items()
        if isinstance(value, type) and not name.startswith("_")
    )


def _signatures(path: Path) -> dict[str, str]:
    methods_of = next(node for node in ast.parse(path.read_text()).body if _is_class(node)).body
    return {
        node.name.replace("__a", "__"): ast.unparse(node.args).replace("Async", "")
        for node in methods_of
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def _is_class(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef)


def _pause() -> bool:
    time.sleep(0.05)
    return False


def test_an_internal_error_without_a_reason_is_the_carriers(client: Any, server: Server) -> None:
    """A stream that breaks off ends so; others may be asked."""
    server.answers[methods.FORWARD] = lambda request, context: context.abort(
        grpc.StatusCode.INTERNAL, "Stream removed"
    )
    with pytest.raises(Unavailable, match="Stream removed"):
        client.forward("demo", 0, ROWS)


FORWARD = (
    "(self, model, layer, hidden_states, *, router_logits=None, topk_ids=None, topk_weights=None, "
    "hidden_states_format=None, hidden_states_scale=None, partial=False, backend=None, "
    "reply_dtype=None, priority=0, request_id=None, timeout=30.0)"
)


@pytest.mark.parametrize("kind", [Client, AsyncClient, CallStream, ExpertPool, AsyncExpertPool])
@pytest.mark.parametrize("name", ["forward", "call"])
def test_inspect_names_every_option(kind: type, name: str) -> None:
    told = inspect.signature(getattr(kind, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in told.parameters.values()]
    shown = str(inspect.Signature(bare))
    if kind in (ExpertPool, AsyncExpertPool):
        wanted = FORWARD.replace(" partial=False,", "").replace("=30.0", "=30.0, partial='refuse'")
        assert shown == wanted
    else:
        assert shown == FORWARD
