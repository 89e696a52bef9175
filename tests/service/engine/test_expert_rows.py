"""Each expert's rows: counted exactly, however they were routed, only for those held here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.service.engine.parts import echo, resident, running
from tests.strategies import generator, layer_spec, random_topk, wire_call

from expertd.backends.base import Batch
from expertd.core import RoutingSpec
from expertd.engine import expert_rows
from expertd.engine.expert_rows import ExpertRows, balance
from expertd.engine.resident import Residents
from expertd.metrics.registry import Metrics
from expertd.routing.reference import route_for

SPEC = layer_spec()
EXPERTS = SPEC.num_experts


def by_hand(ids: torch.Tensor) -> list[int]:
    return [int((ids == expert).sum()) for expert in range(EXPERTS)]


@pytest.mark.parametrize("batches", [1, 3])
def test_rows_are_counted_by_logits_and_by_ids(
    batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_rows, "MOST_BATCHES", batches)
    random = generator(91)
    layer = resident(SPEC, random)
    assert layer.expert_rows.counts(SPEC) == [0] * EXPERTS
    expected = torch.zeros(EXPERTS, dtype=torch.int64)
    with running(layer) as engine:
        for tokens in (1, 5, 40, 2, 9):
            rows = torch.randn(tokens, SPEC.hidden, generator=random)
            logits = torch.randn(tokens, EXPERTS, generator=random)
            ids, weights = random_topk(tokens, EXPERTS, 3, random)
            if tokens % 2:
                ids[0, 1] = -1
            for form in (
                {"router_logits": logits},
                {"topk_ids": ids, "topk_weights": weights},
                {"topk_ids": ids.long(), "topk_weights": weights},
            ):
                call = wire_call(hidden_states=rows, **form)
                engine.submit(call, "test", None).future.result(10)
            assert SPEC.routing is not None
            routed, _ = route_for(SPEC.routing, logits)
            expected += torch.tensor(by_hand(routed)) + 2 * torch.tensor(by_hand(ids))
            assert layer.expert_rows.counts(SPEC) == expected.tolist()


def test_where_the_kernel_routes_the_logits_are_counted() -> None:
    random, rows = generator(92), ExpertRows()
    logits = torch.randn(30, EXPERTS, generator=random)
    none = torch.zeros(30, 1)
    rows.note(SPEC, Batch(none, none, logits=logits), None)
    assert SPEC.routing is not None
    ids, _ = route_for(SPEC.routing, logits)
    assert rows.counts(SPEC) == by_hand(ids)


def test_logits_are_routed_on_their_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the metrics has card 0, and Triton launches on the card of its thread."""
    logits = torch.randn(3, EXPERTS, generator=generator(95))
    on: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        on.append(tensor)
        yield
        on.clear()

    def route(spec: RoutingSpec, given: torch.Tensor, bias: None) -> tuple[torch.Tensor, ...]:
        assert len(on) == 1 and on[0] is logits
        return route_for(spec, given, bias)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(expert_rows, "router_on", lambda device_type: route)
    rows = ExpertRows()
    rows.note(SPEC, Batch(logits, logits, logits=logits), None)
    assert sum(rows.counts(SPEC)) > 0 and not on


def test_experts_that_are_not_held_have_no_rows() -> None:
    spec, rows = layer_spec(expert_begin=2, expert_end=4), ExpertRows()
    ids, weights = random_topk(50, EXPERTS, 3, generator(93))
    rows.note(spec, Batch(weights, weights, ids=ids, weights=weights), None)
    counts = by_hand(ids)
    assert rows.counts(spec) == [0, 0, *counts[2:4], 0, 0]


def test_layers_without_experts_count_nothing() -> None:
    rows = ExpertRows()
    rows.note(SPEC, Batch(torch.zeros(1, 1), torch.zeros(1, 1)), None)
    assert rows.counts(SPEC) == [0] * EXPERTS


def test_metrics_show_the_balance_and_each_expert_only_if_asked() -> None:
    random, residents = generator(94), Residents()
    spec = layer_spec(expert_begin=1, expert_end=4)
    residents.add(layer := resident(spec, random))
    residents.add(echo(8))
    ids = torch.tensor([[1, 2], [1, -1], [1, 5], [3, 1]], dtype=torch.int32)
    layer.expert_rows.note(spec, Batch(ids, ids, ids=ids, weights=ids), None)
    for each in (False, True):
        metrics = Metrics(residents, {})
        metrics.experts(each)
        shown = metrics.render().decode()
        assert 'expertd_expert_balance_ratio{layer="0",model="m"} 0.5' in shown
        assert 'model="echo"' not in shown.split("expertd_expert_balance_ratio", 1)[1]
        series = [line for line in shown.splitlines() if line.startswith("expertd_expert_rows_")]
        told = {1: 4.0, 2: 1.0, 3: 1.0} if each else {}
        assert series == [
            f'expertd_expert_rows_total{{expert="{expert}",layer="0",model="m"}} {rows}'
            for expert, rows in told.items()
        ]


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_balance_is_the_mean_over_the_most(counts: list[int]) -> None:
    found = balance(counts)
    assert 1 / len(counts) - 1e-9 <= found <= 1
    if max(counts):
        assert found * max(counts) * len(counts) == pytest.approx(sum(counts))
    assert balance([7] * 3) == balance([0]) == balance([]) == 1
    assert balance([9, 0, 0]) == pytest.approx(1 / 3)
