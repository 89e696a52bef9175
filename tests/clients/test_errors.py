"""Every way a call can fail becomes the class that a user would catch."""

from __future__ import annotations

import pickle
from typing import Any

import grpc
import numpy as np
import pytest
from tests.clients.servers import Server, refuse, serving

import expertd_client as ec
from expertd_client.errors import error_for
from expertd_wire import methods
from expertd_wire.errors import REASONS, Refusal

ROWS = np.zeros((2, 3), np.float32)
REFUSALS = (
    Refusal("triton", "routed", "fused/moe", "ARCH", "cpu given, cuda accepted"),
    Refusal("grouped", "routed", "grouped", "DTYPE", "float8 given"),
)
EXPECTED: dict[str, type[ec.ExpertdError]] = {
    "INVALID_ARGUMENT": ec.InvalidArgument,
    "TOO_LARGE": ec.InvalidArgument,
    "NOT_FOUND": ec.NotFound,
    "FAILED_PRECONDITION": ec.NoUsablePlan,
    "NO_USABLE_PLAN": ec.NoUsablePlan,
    "EXPERTS_NOT_HELD": ec.ExpertsNotHeld,
    "LAYER_FAILED": ec.LayerFailed,
    "OVERLOADED": ec.Overloaded,
    "UNAVAILABLE": ec.Unavailable,
    "DEADLINE_EXCEEDED": ec.DeadlineExceeded,
    "CANCELLED": ec.ExpertdError,
    "UNAUTHENTICATED": ec.Unauthenticated,
    "PERMISSION_DENIED": ec.PermissionDenied,
    "INTERNAL": ec.ExpertdError,
}


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_its_class(reason: str, client: Any, server: Server) -> None:
    for path in (methods.FORWARD, methods.LIST_LAYERS):
        server.answers[path] = refuse(reason, "what was given", REFUSALS)
    for ask in (lambda: client.forward("demo", 0, ROWS), client.layers):
        with pytest.raises(ec.ExpertdError) as failure:
            ask()
        assert type(failure.value) is EXPECTED[reason]
        assert failure.value.reason == reason
        assert failure.value.reasons == REFUSALS
        assert isinstance(failure.value.__cause__, grpc.RpcError)


def test_the_text_has_the_message_and_every_reason_once(client: Any, server: Server) -> None:
    message = "no plan: float8 given"
    server.answers[methods.FORWARD] = refuse("NO_USABLE_PLAN", message, REFUSALS)
    with pytest.raises(ec.NoUsablePlan) as failure:
        client.forward("demo", 0, ROWS)
    expected = f"{message}\n  triton/routed/fused/moe: cpu given, cuda accepted"
    assert str(failure.value) == expected


def test_many_reasons_in_any_language_arrive(client: Any, server: Server) -> None:
    refusals = tuple(Refusal(f"b{at}", "routed", "e", "C", "é" * 80) for at in range(200))
    server.answers[methods.FORWARD] = refuse("NO_USABLE_PLAN", "é%" * 3000, refusals)
    for _ in range(40):  # gRPC refuses headers over its soft limit at random
        with pytest.raises(ec.NoUsablePlan) as failure:
            client.forward("demo", 0, ROWS)
        assert 10 < len(failure.value.reasons) < 200
        assert "more reasons did not fit" in str(failure.value)


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "unreadable"])
def test_a_foreign_status_goes_by_its_code(rich: bool, client: Any, server: Server) -> None:
    def answer(request: bytes, context: Any) -> bytes:
        if rich:
            context.set_trailing_metadata(((methods.STATUS_KEY, b"\xff"),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "from a proxy")
        raise AssertionError("abort has raised")

    server.answers[methods.FORWARD] = answer
    with pytest.raises(ec.Unavailable, match="from a proxy") as failure:
        client.forward("demo", 0, ROWS)
    assert failure.value.reason == "UNAVAILABLE"


def test_a_handler_that_crashes_is_an_expertd_error(client: Any, server: Server) -> None:
    server.answers[methods.FORWARD] = lambda request, context: 1 // 0
    with pytest.raises(ec.ExpertdError) as failure:
        client.forward("demo", 0, ROWS)
    assert type(failure.value) is ec.ExpertdError


def test_a_message_over_the_servers_limit_names_both_limits(connect: Any) -> None:
    with serving(max_message_bytes=1000) as server, connect(server.target) as client:
        with pytest.raises(ec.InvalidArgument) as failure:
            client.forward("demo", 0, np.zeros((100, 100), np.float32))
        assert not server.calls
    _names_both_limits(failure.value, 256 << 20)


def test_a_message_over_the_clients_limit_names_both_limits(server: Server, connect: Any) -> None:
    rows = np.zeros((2 << 20, 1), np.uint8)
    with connect(server.target, max_message_bytes=1000) as client:
        with pytest.raises(ec.InvalidArgument) as failure:
            client.forward("demo", 0, rows)
        _names_both_limits(failure.value, 1000)
        server.answers[methods.FORWARD] = lambda request, context: bytes(2 << 20)
        with pytest.raises(ec.InvalidArgument) as failure:
            client.forward("demo", 0, rows[:1])
        _names_both_limits(failure.value, 1000)


def test_overload_that_mentions_a_size_is_still_overload(client: Any, server: Server) -> None:
    text = "queue full; Received message larger than max"
    server.answers[methods.FORWARD] = refuse("OVERLOADED", text)
    with pytest.raises(ec.Overloaded):
        client.forward("demo", 0, ROWS)


def test_messages_beyond_grpcs_four_mebibytes_pass(client: Any) -> None:
    rows = np.random.default_rng(1).standard_normal((1200, 1024)).astype(np.float32)
    np.testing.assert_array_equal(client.forward("demo", 0, rows), rows)


def test_errors_survive_pickling() -> None:
    error = error_for("FAILED_PRECONDITION", "LAYER_FAILED", "text", REFUSALS)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ec.LayerFailed
    assert (str(copy), copy.reason, copy.reasons) == (str(error), error.reason, error.reasons)


def test_errors_can_be_made_by_hand() -> None:
    assert ec.ExpertsUnavailable("none left").reason == "EXPERTS_UNAVAILABLE"
    assert isinstance(ec.ExpertsUnavailable("x"), ec.Unavailable)
    assert ec.ExpertdError("x").reasons == ()
    assert str(error_for("UNKNOWN", "", "")) == "UNKNOWN"


def _names_both_limits(error: ec.InvalidArgument, limit: int) -> None:
    assert error.reason == "TOO_LARGE"
    assert "--max-message-bytes" in str(error)
    assert f"max_message_bytes of this client ({limit})" in str(error)
