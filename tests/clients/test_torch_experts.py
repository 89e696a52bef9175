"""RemoteExperts: a module without weights whose forward is a call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.clients.servers import Server, refuse
from torch import Tensor, nn

from expertd_client import Client, Overloaded
from expertd_client.torch import RemoteExperts
from expertd_wire.methods import FORWARD
from expertd_wire.tensors import to_numpy


@pytest.fixture
def experts(server: Server) -> Iterator[RemoteExperts]:
    with Client(server.target) as client:
        yield RemoteExperts(client, "m", 3, timeout=7.0)


def sent(server: Server, name: str) -> Tensor:
    tensor = getattr(server.calls[-1], name)
    assert tensor is not None
    return torch.from_numpy(to_numpy(tensor).copy())


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3), (0,)])
def test_any_leading_sizes(experts: RemoteExperts, server: Server, shape: tuple[int, ...]) -> None:
    rows, ids = torch.randn(*shape, 8), torch.randint(-1, 4, (*shape, 2))
    weights = torch.rand(*shape, 2)
    assert torch.equal(experts(rows, topk_ids=ids, topk_weights=weights), rows)
    assert torch.equal(sent(server, "topk_ids"), ids.view(-1, 2))
    assert torch.equal(sent(server, "topk_weights"), weights.view(-1, 2))
    assert (server.calls[-1].model, server.calls[-1].layer) == ("m", 3)
    assert server.deadlines[-1] == pytest.approx(7, abs=3)


def test_logits_and_layouts(experts: RemoteExperts, server: Server) -> None:
    rows = torch.randn(8, 3, 2, dtype=torch.bfloat16).permute(1, 2, 0)
    logits = torch.randn(5, 3, 2).permute(1, 2, 0)
    assert torch.equal(experts(rows, router_logits=logits), rows)
    assert torch.equal(sent(server, "router_logits"), logits.reshape(-1, 5))
    assert server.calls[-1].topk_ids is None


def test_a_module_among_others_that_holds_nothing(experts: RemoteExperts) -> None:
    model = nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": experts})
    assert set(model.state_dict()) == {"gate.weight", "gate.bias"}
    assert "'m', layer 3" in repr(model)


@pytest.mark.parametrize("trained", ["rows", "weights"])
def test_whoever_wants_a_gradient_is_told(experts: RemoteExperts, trained: str) -> None:
    rows, weights = torch.randn(4, 8), torch.rand(4, 2)
    {"rows": rows, "weights": weights}[trained].requires_grad_()
    ids = torch.zeros(4, 2, dtype=torch.int32)
    answer = experts(rows, topk_ids=ids, topk_weights=weights)
    with pytest.raises(RuntimeError, match="no gradient"):
        answer.sum().backward()
    with torch.no_grad():
        assert not experts(rows, topk_ids=ids, topk_weights=weights).requires_grad


def test_errors_are_the_clients(experts: RemoteExperts, server: Server) -> None:
    server.answers[FORWARD] = refuse("OVERLOADED", "later")
    with pytest.raises(Overloaded):
        experts(torch.randn(1, 8), router_logits=torch.randn(1, 4))
