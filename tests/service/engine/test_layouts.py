"""Copies of weights in layouts of their own stay within the budget, and calls find them there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.service.engine.parts import CPU, resident, running, warm
from tests.strategies import (
    generator,
    layer_spec,
    random_topk,
    relative,
    torch_tensor,
    wire_call,
)
from torch import Tensor

from expertd.backends.grouped.backend import Grouped
from expertd.capability.row import Row
from expertd.capability.rows import grouped
from expertd.engine.engine import Engine
from expertd.engine.layouts import Layouts, spare_bytes
from expertd.engine.resident import LayerState, Resident, Residents
from expertd.errors import NoUsablePlan
from expertd.weights.canonical import ExpertWeights

SPEC = layer_spec()
PLAIN = 4 * SPEC.num_experts * 3 * SPEC.hidden * SPEC.intermediate
"""Bytes of a layer's canonical weights."""


class Copying(Grouped):
    """Computes from a copy of the weights, as a backend with a layout of its own does."""

    def _prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None:
        assert weights is not None
        self._native = {"w13": weights.w13.clone(), "w2": weights.w2.clone()}
        super()._prepare_weights(replace(weights, **self._native), bias)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Row:
    """A row before all others, whose backend copies; with it in the table it is chosen first."""
    from expertd.capability import plan

    row = replace(grouped.ROWS[0], backend="copying", entry="copying", needs_proof=False)
    rows = (row, *plan.ROWS)
    monkeypatch.setattr(plan.plan, "__kwdefaults__", {**plan.plan.__kwdefaults__, "rows": rows})
    return row


def layer(row: Row, number: int) -> Resident:
    found = resident(SPEC, generator(number), layer=number)
    found.backends[row.cell(SPEC.quant)] = warm(Copying(row, SPEC, CPU), found.weights)
    return found


def copy_of(found: Resident) -> Copying:
    return next(b for b in found.backends.values() if isinstance(b, Copying))


def ask(engine: Engine, number: int, **fields: Any) -> tuple[str, Tensor]:
    random = generator(50)
    ids, weights = random_topk(3, SPEC.num_experts, 2, random)
    rows = torch.randn(3, SPEC.hidden, generator=random)
    call = wire_call(layer=number, hidden_states=rows, topk_ids=ids, topk_weights=weights, **fields)
    reply = engine.submit(call, "test", None).future.result(10)
    return reply.backend, torch_tensor(reply.output)


def test_what_is_held_is_counted_once() -> None:
    found = resident(SPEC, generator(1))
    assert found.weights is not None and found.nbytes == found.weights.nbytes == PLAIN
    found = layer(replace(grouped.ROWS[0], backend="copying", entry="copying"), 1)
    assert found.nbytes == 2 * PLAIN
    twin = Copying(copy_of(found).row, SPEC, CPU)
    twin.check()
    twin.prepare_weights(found.weights, None)
    twin._native = copy_of(found)._native
    twin.weights = replace(twin.weights, **twin._native)
    found.backends[replace_cell(found)] = twin
    assert found.nbytes == 2 * PLAIN, "two backends that share a copy hold one"


def replace_cell(found: Resident) -> Any:
    return next(iter(found.backends))._replace(entry="another")


def test_copies_that_fit_stay_and_others_are_let_go(copying: Row) -> None:
    layers = [layer(copying, number) for number in range(3)]
    layouts = Layouts(lambda: 2 * PLAIN, CPU)
    told = [layouts.settle(found) for found in layers]
    assert told[:2] == ["", ""]
    assert "copying" in told[2] and f"--layout-cache-bytes {2 * PLAIN}" in told[2]
    assert [found.nbytes for found in layers] == [2 * PLAIN, 2 * PLAIN, PLAIN]
    with running(*layers) as engine:
        answers = [ask(engine, number) for number in range(3)]
    assert [name for name, _ in answers] == ["copying", "copying", "grouped"]


def test_a_call_that_names_the_backend_makes_the_copy_again(copying: Row) -> None:
    """The least recently used goes; each comes back for the next call that needs it."""
    layers = [layer(copying, number) for number in range(3)]
    layouts = Layouts(lambda: 2 * PLAIN, CPU)
    for found in layers:
        layouts.settle(found)

    def held() -> list[bool]:
        return [copy_of(found).warm for found in layers]

    with running(*layers) as engine:
        truth = [ask(engine, number, backend="reference")[1] for number in range(3)]
        ask(engine, 0)
        assert held() == [True, True, False]
        for number, expected in ((2, [1, 0, 1]), (1, [0, 1, 1]), (0, [1, 1, 0]), (2, [1, 0, 1])):
            name, output = ask(engine, number, backend="copying")
            assert name == "copying" and relative(output, truth[number]) < 1e-5
            assert held() == [bool(flag) for flag in expected]
            assert sum(found.nbytes for found in layers) == 5 * PLAIN


def test_a_copy_larger_than_the_budget_is_refused_by_the_flags_name(copying: Row) -> None:
    found = layer(copying, 0)
    layouts = Layouts(lambda: PLAIN - 1, CPU)
    layouts.settle(found)
    with running(found) as engine:
        assert ask(engine, 0)[0] == "grouped"
        with pytest.raises(NoUsablePlan, match="--layout-cache-bytes") as caught:
            ask(engine, 0, backend="copying")
    (reason,) = caught.value.refusals
    assert (reason.code, reason.field) == ("layout_cache", "--layout-cache-bytes")
    assert (reason.given, reason.accepted) == (str(PLAIN - 1), f"{PLAIN} or more")


def test_a_layer_that_has_nothing_else_runs_on_its_copy(copying: Row) -> None:
    layers = [layer(copying, number) for number in range(2)]
    layouts = Layouts(lambda: PLAIN, CPU)
    for found in layers:
        cell = next(c for c, b in found.backends.items() if isinstance(b, Copying))
        found.backends = {cell: found.backends[cell]}
        layouts.settle(found)
    with running(*layers) as engine:
        assert [ask(engine, n)[0] for n in (0, 1, 1, 0)] == ["copying"] * 4
    assert sum(found.nbytes for found in layers) == 3 * PLAIN


def test_what_is_unloaded_makes_room(copying: Row) -> None:
    first, second, third = (layer(copying, number) for number in range(3))
    layouts = Layouts(lambda: PLAIN, CPU)
    assert not layouts.settle(first) and layouts.settle(second)
    first.backends = {}
    assert not layouts.settle(third)


def test_what_is_spare_is_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd.engine.layouts._memory", lambda device: 100 * PLAIN)
    residents = Residents()
    for number in range(4):
        residents.add(resident(SPEC, generator(number), layer=number))
    assert spare_bytes(CPU, residents) == 86 * PLAIN
    residents.get("m", 0).state = LayerState.UNLOADED
    assert spare_bytes(CPU, residents) == 87 * PLAIN
    monkeypatch.setattr("expertd.engine.layouts._memory", lambda device: PLAIN)
    assert spare_bytes(CPU, residents) == 0
