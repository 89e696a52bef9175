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
from torch.multiprocessing.reductions import StorageWeakRef

from expertd.backends.base import Backend
from expertd.backends.grouped.backend import Grouped
from expertd.capability.row import Row
from expertd.capability.rows import grouped
from expertd.engine.choice import likely_backends, likely_plans
from expertd.engine.engine import Engine
from expertd.engine.layouts import Layouts, spare_bytes
from expertd.engine.resident import LayerState, Resident, Residents
from expertd.engine.timings import Timings
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


def likely(found: Resident) -> set[Backend]:
    return likely_backends(found, (1, 4))


def test_a_copy_without_room_replaces_the_canonical_weights(copying: Row) -> None:
    first, second = layer(copying, 0), layer(copying, 1)
    layouts = Layouts(lambda: 2 * PLAIN - 1, CPU)
    assert layouts.settle(first, likely(first)) == "" and first.nbytes == 2 * PLAIN
    with running(second) as engine:
        truth = ask(engine, 1, backend="reference")[1]
    canonical = memory_of(second)
    told = layouts.settle(second, likely(second))
    assert all(piece.expired() for piece in canonical), "the memory is free"
    assert second.nbytes == PLAIN and [*second.backends.values()] == [copy_of(second)]
    assert told == (
        "this layer's weights are held in copying's layout only, one copy; "
        f"raise --layout-cache-bytes to {2 * PLAIN} to keep both"
    )
    assert [plan.backend for plan in likely_plans(second)] == ["copying"]
    with running(second) as engine:
        for pin in ("", "copying"):
            name, output = ask(engine, 1, backend=pin)
            assert name == "copying" and relative(output, truth) < 1e-5
        for pin in ("grouped", "reference"):
            with pytest.raises(NoUsablePlan) as caught:
                ask(engine, 1, backend=pin)
            (reason,) = (r for r in caught.value.refusals if r.code == "layout_cache")
            assert reason.backend == pin and reason.text.startswith(told)
            assert (reason.given, reason.accepted) == (f"{2 * PLAIN - 1}", f"{2 * PLAIN} or more")
    with pytest.raises(AssertionError, match="nothing could restore"):
        copy_of(second).release()


def memory_of(found: Resident) -> list[StorageWeakRef]:
    """What tells whether the memory of the canonical weights is free, whoever held it."""
    assert found.weights is not None
    return [StorageWeakRef(t.untyped_storage()) for t in found.weights.tensors.values()]


def test_as_many_bytes_as_were_told_keep_both(copying: Row) -> None:
    layers = [layer(copying, number) for number in range(2)]
    layouts = Layouts(lambda: 2 * PLAIN, CPU)
    assert [layouts.settle(found, likely(found)) for found in layers] == ["", ""]
    assert [found.nbytes for found in layers] == [2 * PLAIN] * 2


@pytest.mark.parametrize("also", [False, True], ids=["never", "at some sizes"])
def test_a_layout_that_not_all_of_the_commonest_calls_use_replaces_nothing(
    copying: Row, also: bool
) -> None:
    found = layer(copying, 0)
    fast, slow = copying.cell(SPEC.quant), grouped.ROWS[0].cell(SPEC.quant)
    times = {fast: (9.0, 9.0, 1.0 if also else 9.0), slow: (2.0, 2.0, 2.0)}
    found.judged(found.states, Timings(times, buckets=3))
    assert (copy_of(found) in likely(found)) is also
    assert "copying holds no weights" in Layouts(lambda: 0, CPU).settle(found, likely(found))
    assert found.weights is not None and found.nbytes == PLAIN and not found.absent
    assert copy_of(found) not in likely(found), "what was chosen before is chosen anew"
    with running(found) as engine:
        assert [ask(engine, 0, backend=pin)[0] for pin in ("", "grouped")] == ["grouped"] * 2


@pytest.mark.parametrize("room", [True, False], ids=["room for one", "no room"])
def test_of_two_layouts_the_likely_one_comes_first(copying: Row, room: bool) -> None:
    """It gets the room there is, and where there is none it is the one that stays."""
    found, other = layer(copying, 0), replace(copying, backend="another", entry="another")
    mine, cell = copy_of(found), other.cell(SPEC.quant)
    found.backends[cell] = twin = warm(Copying(other, SPEC, CPU), found.weights)
    Layouts(lambda: PLAIN if room else PLAIN - 1, CPU).settle(found, {mine})
    assert mine.warm and found.nbytes == (2 * PLAIN if room else PLAIN)
    if room:
        assert twin.spilled and not twin.warm and found.backends[cell] is twin
    else:
        assert list(found.backends.values()) == [mine] and cell in found.absent


def test_what_a_kept_backend_shares_with_the_canonical_weights_stays_and_is_counted(
    copying: Row,
) -> None:
    class Half(Copying):
        """Copies the first matrix, and reads the second as it is."""

        def _prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None:
            assert weights is not None
            self._parts = {"w13": weights.w13.clone(), "w2": weights.w2}
            Grouped._prepare_weights(self, replace(weights, **self._parts), bias)

    found = layer(copying, 0)
    found.backends[copying.cell(SPEC.quant)] = half = warm(Half(copying, SPEC, CPU), found.weights)
    first, second = memory_of(found)
    Layouts(lambda: 0, CPU).settle(found, {half})
    assert (first.expired(), second.expired()) == (True, False)
    assert found.nbytes == PLAIN


def test_a_layer_that_has_one_copy_wants_the_bytes_of_that(
    copying: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd.engine.layouts._memory", lambda device: 100 * PLAIN)
    found = layer(copying, 0)
    residents = Residents()
    residents.add(found)
    copy_of(found)._padding = torch.empty(PLAIN // 4)
    copy_of(found)._made |= {"_padding"}
    Layouts(lambda: 0, CPU).settle(found, likely(found))
    assert found.nbytes == 2 * PLAIN and spare_bytes(CPU, residents) == 88 * PLAIN
