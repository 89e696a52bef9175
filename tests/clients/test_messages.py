"""Calls that travel as several messages: nothing lost, one answer of one set of weights."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from tests.clients.servers import Server, echo, refuse

from expertd_client import ExpertdError, InvalidArgument
from expertd_client.sharding import LEAST_ROWS
from expertd_client.transport.grpc import AsyncGrpcTransport, GrpcTransport
from expertd_wire import methods
from expertd_wire.codec import decode_forward_reply, encode_forward_reply
from expertd_wire.tensors import WireTensor, to_numpy

HIDDEN, MESSAGE_ROWS = 24, 100
TOKENS = 3 * MESSAGE_ROWS + 7


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    for transport in (GrpcTransport, AsyncGrpcTransport):
        monkeypatch.setattr(transport, "message_bytes", MESSAGE_ROWS * HIDDEN * 4)


def rows_and_routing() -> tuple[Any, dict[str, Any]]:
    random = np.random.default_rng()
    return random.standard_normal((TOKENS, HIDDEN), np.float32), {
        "router_logits": random.standard_normal((TOKENS, 4), np.float32),
        "topk_ids": random.integers(0, 4, (TOKENS, 2)),
        "topk_weights": random.random((TOKENS, 2), np.float32),
        "hidden_states_scale": random.integers(0, 9, (TOKENS, 1), np.uint8),
    }


def changed(server: Server, **fields: Any) -> None:
    """Every answer has these fields; a list gives one after the other, its last one for ever."""
    counts = {name: iter(value) for name, value in fields.items()}
    now: dict[str, Any] = {}

    def answer(request: bytes, context: Any) -> bytes:
        for name, values in counts.items():
            now[name] = next(values, now.get(name))
        server.echo(request, context)
        return encode_forward_reply(decode_forward_reply(echo(request))._replace(**now))

    server.answers[methods.FORWARD] = answer


def test_every_row_arrives_once_with_all_that_belongs_to_it(client: Any, server: Server) -> None:
    rows, routing = rows_and_routing()
    options = {"partial": True, "request_id": "r", "priority": 3, "backend": "triton"}
    np.testing.assert_array_equal(client.forward("demo", 1, rows, **routing, **options), rows)
    assert [len(to_numpy(c.hidden_states)) for c in server.calls] == [76, 77, 77, 77]
    for name, tensor in {"hidden_states": rows, **routing}.items():
        sent = np.concatenate([to_numpy(getattr(call, name)) for call in server.calls])
        np.testing.assert_array_equal(sent, tensor)
    for call in server.calls:
        assert options.items() <= call._asdict().items()


def test_what_fits_into_one_message_is_not_cut(client: Any, server: Server) -> None:
    client.forward("demo", 0, np.ones((MESSAGE_ROWS, HIDDEN), np.float32))
    wide = np.ones((LEAST_ROWS, 10 * MESSAGE_ROWS * HIDDEN), np.float32)
    client.forward("demo", 0, wide)
    assert len(server.calls) == 2


def test_tensors_come_back_in_kind_and_may_be_written_to(client: Any, server: Server) -> None:
    rows = torch.randn(TOKENS, HIDDEN, dtype=torch.float32).bfloat16().repeat(1, 2)
    answer = client.forward("demo", 0, rows)
    assert len(server.calls) > 1
    torch.testing.assert_close(answer, rows, rtol=0, atol=0)
    answer += 1


def test_the_times_are_those_of_all_messages(client: Any) -> None:
    reply = client.call("demo", 0, rows_and_routing()[0])
    assert (reply.queued_ns, reply.staged_ns, reply.computed_ns) == (4, 8, 12)
    assert reply.backend == "identity"


@pytest.mark.parametrize(
    "told",
    [
        {"generation": [1, 1, 2]},
        {"generation": [1, 2, 1, 2]},
        {"generation": range(1, 1 << 30)},
        {"generation": [1] * 5, "weights_digest": ["old", "old", "old", "new", "new"]},
    ],
    ids=["loaded again", "servers in turn", "loaded all the time", "a rolling update"],
)
def test_weights_that_change_meanwhile_are_not_mixed(
    client: Any, server: Server, told: dict[str, Any]
) -> None:
    rows, _ = rows_and_routing()
    changed(server, **told)
    np.testing.assert_array_equal(client.forward("demo", 0, rows, timeout=None), rows)
    assert [len(to_numpy(call.hidden_states)) for call in server.calls] == [76, 77, 77, 77, TOKENS]


def test_the_same_weights_of_several_servers_are_one(client: Any, server: Server) -> None:
    changed(server, generation=[1, 2, 1, 2], weights_digest=["same"] * 4)
    client.forward("demo", 0, rows_and_routing()[0])
    assert len(server.calls) == 4


def test_the_messages_share_the_deadline_of_their_call(client: Any, server: Server) -> None:
    def slowly(request: bytes, context: Any) -> bytes:
        time.sleep(0.2)
        return server.echo(request, context)

    server.answers[methods.FORWARD] = slowly
    client.forward("demo", 0, rows_and_routing()[0], timeout=20)
    left = [deadline or 0.0 for deadline in server.deadlines]
    assert left[0] - left[3] > 0.4


def test_no_deadline_is_none_for_any_message(client: Any, server: Server) -> None:
    client.forward("demo", 0, rows_and_routing()[0], timeout=None)
    assert all(deadline is None or deadline > 1e8 for deadline in server.deadlines)


def test_an_error_says_where_its_rows_are_counted_from(client: Any, server: Server) -> None:
    refusal = refuse("INVALID_ARGUMENT", "topk_ids: row 3 has an id outside 0..3")
    answers = iter([server.echo, server.echo, refusal])
    server.answers[methods.FORWARD] = lambda *call: next(answers)(*call)
    with pytest.raises(InvalidArgument, match="row 3") as caught:
        client.forward("demo", 0, rows_and_routing()[0])
    assert caught.value.__notes__ == ["rows are counted from row 153 of the call"]


def test_replies_that_do_not_fit_together_are_refused(client: Any, server: Server) -> None:
    wrong = WireTensor("float32", (1, HIDDEN), memoryview(bytes(4 * HIDDEN)))
    changed(server, output=[wrong])
    with pytest.raises(ExpertdError, match=r"76 rows .* float32 \[1, 24\]"):
        client.forward("demo", 0, rows_and_routing()[0])


@pytest.mark.parametrize("count", [5, 77, TOKENS - 1])
def test_routing_for_other_rows_is_left_to_the_server_to_refuse(
    client: Any, server: Server, count: int
) -> None:
    """Cut, such a call could become messages that each look right."""
    rows, _ = rows_and_routing()
    client.forward("demo", 0, rows, router_logits=np.ones((count, 4), np.float32))
    (call,) = server.calls
    assert call.hidden_states.shape == (TOKENS, HIDDEN)
    assert call.router_logits.shape == (count, 4)
