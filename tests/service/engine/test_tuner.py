"""The tuner: the fastest plan of each bucket, the layouts that are kept, the table on disk.

Time is a number that scripted backends advance: nothing here depends on how fast a machine is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.service.engine.parts import CPU, Scripted, resident, warm
from tests.strategies import generator, layer_spec

from expertd.backends.base import Backend, Batch
from expertd.capability.device import detect
from expertd.capability.row import Cell, Row, State
from expertd.capability.rows.grouped import ROWS as GROUPED
from expertd.capability.rows.reference import ROWS as REFERENCE
from expertd.core import CallForm, PlanMode, RoutingForm
from expertd.core.buckets import bucket_index, token_buckets
from expertd.engine.choice import choose_backend
from expertd.engine.race import LEAST_ROUNDS, race
from expertd.engine.resident import Resident
from expertd.engine.timing_store import TimingStore
from expertd.engine.timings import Timings, kept_layout
from expertd.engine.tuner import Tuner, Tuning
from expertd.engine.watch import Watch
from expertd.errors import NoUsablePlan
from expertd.proof.batches import random_batch

SPEC = layer_spec()
LOGITS = CallForm(RoutingForm.LOGITS, "bfloat16", logits_dtype="float32", reply_dtype="bfloat16")
BUCKETS = token_buckets(64)
Cost = Callable[[int], float]
"""Microseconds of a launch of so many tokens."""


class FakeWatch(Watch):
    """A clock that stands still while nothing runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def takes(self, cost: Cost, ran: list[int] | None = None) -> Callable[[Batch], None]:
        """A forward that costs time, and remembers the sizes that it ran."""

        def forward(batch: Batch) -> None:
            self.seconds += cost(len(batch.rows)) / 1e6
            if ran is not None:
                ran.append(len(batch.rows))

        return forward


@dataclass
class Plans:
    """A layer whose plans cost what a test says."""

    layer: Resident
    watch: FakeWatch

    def add(self, name: str, cost: Cost, native: int = 0, **changes: Any) -> list[int]:
        """A proven plan of some backend; the sizes that it runs are in the list."""
        ran: list[int] = []
        row = replace(GROUPED[0], backend=name, entry=name, **changes)
        names: dict[str, Any] = {
            "script": staticmethod(self.watch.takes(cost, ran)),
            "layout": name if native else "",
        }
        backend = warm(type("Paced", (Scripted,), names)(row, SPEC, CPU))
        cell = row.cell(SPEC.quant)
        self.layer.backends[cell], self.layer.states[cell] = backend, State.PROVEN
        return ran

    def at(self, tokens: int, form: CallForm = LOGITS) -> str:
        return choose_backend(self.layer, form, tokens).row.backend


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Plans:
    """No plans yet; whatever a test adds is in the table, in that order."""
    layer = resident(SPEC, generator(0))
    layer.backends = {}
    found = Plans(layer, FakeWatch())

    def rows() -> tuple[Row, ...]:
        return tuple(backend.row for backend in layer.backends.values())

    def planned(*args: Any, **options: Any) -> Any:
        from expertd.capability.plan import plan

        return plan(*args, **options, rows=rows())

    monkeypatch.setattr("expertd.engine.choice.plan", planned)
    return found


def tuner(plans: Plans, home: Path, **options: Any) -> Tuner:
    store = TimingStore(home, detect("cpu"))
    return Tuner(store, CPU, Tuning(**{"buckets": BUCKETS} | options), plans.watch)


@given(st.integers(1, 1 << 20))
def test_every_size_has_one_bucket(tokens: int) -> None:
    buckets = token_buckets(tokens)
    assert buckets[-1] >= tokens and buckets[0] == 1
    assert buckets[bucket_index(tokens)] == buckets[-1] < 2 * tokens


def test_each_bucket_runs_on_its_fastest_plan(plans: Plans, tmp_path: Path) -> None:
    plans.add("steady", lambda tokens: 100)
    plans.add("growing", lambda tokens: 10 * tokens)
    assert plans.at(1) == "steady", "the table's first, before anything was measured"
    tuner(plans, tmp_path).tune(plans.layer)
    assert [plans.at(n) for n in (1, 8, 9, 16, 64, 5000)] == [
        *("growing", "growing", "steady", "steady", "steady", "steady")
    ]
    measured = {cell.backend: times for cell, times in plans.layer.timings.plans.items()}
    assert measured["growing"] == pytest.approx([10.0 * n for n in BUCKETS])


def test_without_tuning_the_tables_first_plan_runs(plans: Plans, tmp_path: Path) -> None:
    ran = plans.add("first", lambda tokens: 100)
    plans.add("second", lambda tokens: 1)
    tuner(plans, tmp_path, enabled=False).tune(plans.layer)
    assert {plans.at(n) for n in (1, 64)} == {"first"} and not ran
    assert not list(tmp_path.iterdir())


def test_a_pin_wins_over_the_table(plans: Plans, tmp_path: Path) -> None:
    plans.add("slow", lambda tokens: 100)
    plans.add("fast", lambda tokens: 1)
    tuner(plans, tmp_path).tune(plans.layer)
    assert plans.at(4) == "fast" and plans.at(4, replace(LOGITS, backend="slow")) == "slow"


def test_a_plan_that_is_not_proven_does_not_race(plans: Plans, tmp_path: Path) -> None:
    ran = plans.add("unproven", lambda tokens: 1, needs_proof=True)
    (cell,) = plans.layer.backends
    plans.add("proven", lambda tokens: 9)
    plans.layer.states[cell] = State.PRESENT
    tuner(plans, tmp_path).tune(plans.layer)
    assert plans.at(1) == "proven" and not ran


def test_from_logits_a_routed_plan_pays_for_the_router(
    plans: Plans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = plans.watch.takes(lambda tokens: 50)
    monkeypatch.setattr("expertd.engine.tuner._route", lambda _, batch: router(batch))
    monkeypatch.setattr("expertd.capability.match.CHECKS", ())
    plans.add("whole", lambda tokens: 100, mode=PlanMode.MONOLITHIC)
    plans.add("experts", lambda tokens: 60)
    tuner(plans, tmp_path).tune(plans.layer)
    assert plans.layer.timings.router == pytest.approx([50.0] * len(BUCKETS))
    assert plans.at(4) == "whole"
    topk = replace(LOGITS, routing=RoutingForm.TOPK, logits_dtype="", top_k=2)
    assert plans.at(4, topk) == "experts"


def test_a_plan_that_fails_is_passed_over_from_there_on(plans: Plans, tmp_path: Path) -> None:
    tried: list[int] = []

    def dies(tokens: int) -> float:
        tried.append(tokens)
        if tokens > 8:
            raise torch.OutOfMemoryError("planted")
        return 1

    plans.add("fragile", dies)
    plans.add("sturdy", lambda tokens: 100)
    tuner(plans, tmp_path).tune(plans.layer)
    assert [plans.at(n) for n in (1, 8, 9, 64)] == ["fragile", "fragile", "sturdy", "sturdy"]
    assert max(tried) == 16 and tried.count(16) == 1


def test_the_table_is_read_by_layers_of_the_shape_and_the_next_start(
    plans: Plans, tmp_path: Path
) -> None:
    plans.add("slow", lambda tokens: 100)
    ran = plans.add("fast", lambda tokens: 1)
    first = tuner(plans, tmp_path)
    first.tune(plans.layer)
    times = len(ran)
    assert times
    first.tune(plans.layer)
    tuner(plans, tmp_path).tune(plans.layer)
    tuner(plans, tmp_path, buckets=token_buckets(8)).tune(plans.layer)
    assert len(ran) == times and plans.at(1) == "fast"
    tuner(plans, tmp_path, renew=True).tune(plans.layer)
    assert len(ran) == 2 * times
    tuner(plans, tmp_path, buckets=token_buckets(128)).tune(plans.layer)
    assert max(ran) == 128, "a larger bucket has to be measured"


def test_a_new_plan_makes_the_old_table_stale(plans: Plans, tmp_path: Path) -> None:
    old = plans.add("old", lambda tokens: 100)
    tuner(plans, tmp_path).tune(plans.layer)
    plans.add("new", lambda tokens: 1)
    times = len(old)
    tuner(plans, tmp_path).tune(plans.layer)
    assert plans.at(1) == "new" and len(old) > times, "both race again, side by side"


@pytest.mark.parametrize("spoil", ["", "[]", '{"shapes": [1, {}]}', '{"shapes": 3}', "\x00"])
def test_a_broken_table_is_measured_again(plans: Plans, tmp_path: Path, spoil: str) -> None:
    ran = plans.add("slow", lambda tokens: 100)
    plans.add("fast", lambda tokens: 1)
    tuner(plans, tmp_path).tune(plans.layer)
    (file,) = tmp_path.glob("timings-*.json")
    assert json.loads(file.read_text())["shapes"][0]["buckets"] == len(BUCKETS)
    file.write_text(spoil)
    times = len(ran)
    tuner(plans, tmp_path).tune(plans.layer)
    assert len(ran) > times and plans.at(1) == "fast"


@pytest.mark.parametrize("change", [{"plans": 3}, {"router": [0.0]}, {"plans": [{}]}])
def test_a_table_that_makes_no_sense_is_measured_again(
    plans: Plans, tmp_path: Path, change: Mapping[str, Any]
) -> None:
    plans.add("only", lambda tokens: 100)
    tuner(plans, tmp_path).tune(plans.layer)
    (file,) = tmp_path.glob("timings-*.json")
    (entry,) = json.loads(file.read_text())["shapes"]
    file.write_text(json.dumps({"shapes": [entry | change]}))
    assert TimingStore(tmp_path, detect("cpu")).find(SPEC) is None


def test_each_shape_has_its_own_table(plans: Plans, tmp_path: Path) -> None:
    plans.add("only", lambda tokens: 100)
    mine = tuner(plans, tmp_path)
    mine.tune(plans.layer)
    plans.layer.spec = replace(SPEC, intermediate=64)
    assert TimingStore(tmp_path, detect("cpu")).find(plans.layer.spec) is None
    mine.tune(plans.layer)
    for spec in (SPEC, plans.layer.spec):
        assert TimingStore(tmp_path, detect("cpu")).find(spec) is not None


def test_another_device_or_version_has_its_own_table(plans: Plans, tmp_path: Path) -> None:
    plans.add("only", lambda tokens: 100)
    tuner(plans, tmp_path).tune(plans.layer)
    assert TimingStore(tmp_path, detect("cpu")).find(SPEC) is not None
    for change in ({"flashinfer": "9.9"}, {"name": "another card"}):
        assert TimingStore(tmp_path, replace(detect("cpu"), **change)).find(SPEC) is None


def test_a_layout_that_does_not_pay_is_dropped_and_says_so(plans: Plans, tmp_path: Path) -> None:
    plans.add("canonical", lambda tokens: 100)
    plans.add("native", lambda tokens: 98, native=1 << 30)
    mine = tuner(plans, tmp_path)
    mine.tune(plans.layer)
    assert {cell.backend for cell in plans.layer.backends} == {"canonical"}
    assert {cell.backend for cell in mine.left_out(SPEC)} == {"native"}
    assert {cell.backend for cell in plans.layer.absent} == {"native"}


def test_a_pin_on_a_dropped_layout_is_refused_with_the_reason(
    plans: Plans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans.add("canonical", lambda tokens: 100)
    plans.add("native", lambda tokens: 200, native=1)
    rows = tuple(backend.row for backend in plans.layer.backends.values())
    tuner(plans, tmp_path).tune(plans.layer)
    from expertd.capability.plan import plan

    monkeypatch.setattr(
        "expertd.engine.choice.plan", lambda *a, **options: plan(*a, **options, rows=rows)
    )
    with pytest.raises(NoUsablePlan) as refused:
        plans.at(1, replace(LOGITS, backend="native"))
    assert [reason.code for reason in refused.value.refusals] == ["layout_not_kept"]


def test_a_layout_that_pays_is_kept(plans: Plans, tmp_path: Path) -> None:
    plans.add("canonical", lambda tokens: 100)
    plans.add("native", lambda tokens: 50 if tokens > 8 else 200, native=1)
    plans.add("other", lambda tokens: 90, native=1)
    tuner(plans, tmp_path).tune(plans.layer)
    assert {cell.backend for cell in plans.layer.backends} == {"canonical", "native"}
    assert [plans.at(n) for n in (1, 8, 16, 64)] == ["canonical"] * 2 + ["native"] * 2


def test_a_layer_with_native_plans_only_keeps_one_layout(plans: Plans, tmp_path: Path) -> None:
    plans.add("one", lambda tokens: 100, native=1)
    plans.add("two", lambda tokens: 99, native=1)
    tuner(plans, tmp_path).tune(plans.layer)
    assert {cell.backend for cell in plans.layer.backends} == {"two"}


def cell(name: str) -> Cell:
    return replace(GROUPED[0], backend=name).cell(SPEC.quant)


TIMES = st.lists(st.floats(1, 1e6), min_size=3, max_size=3).map(tuple)


@given(st.dictionaries(st.sampled_from("abcd"), TIMES, min_size=1), st.randoms())
def test_a_choice_is_never_slower_than_any_plan(
    measured: dict[str, tuple[float, ...]], random: Any
) -> None:
    cells = [cell(name) for name in measured]
    random.shuffle(cells)
    timings = Timings({cell(name): times for name, times in measured.items()})
    chosen = timings.choices(cells, from_logits=True)
    for index, choice in enumerate(chosen):
        assert timings.plans[choice][index] == min(t[index] for t in measured.values())


@given(st.dictionaries(st.sampled_from("abcd"), TIMES, min_size=1), st.data())
def test_no_other_layout_beside_the_canonical_one_is_much_better(
    measured: dict[str, tuple[float, ...]], data: st.DataObject
) -> None:
    names = st.sampled_from(["", "x", "y"])
    layouts = {cell(name): data.draw(names) for name in measured}
    timings = Timings({cell(name): times for name, times in measured.items()})
    kept = kept_layout(timings, layouts, gain=1.03)
    mine = timings.loss(c for c, own in layouts.items() if own in ("", kept))
    for other in {"", *layouts.values()}:
        rest = timings.loss(c for c, own in layouts.items() if own in ("", other))
        assert mine <= 1.03 * rest + 1e-9


def test_the_race_ends_with_its_budget() -> None:
    watch, ran = FakeWatch(), list[int]()
    batch_of = lambda tokens: random_batch(SPEC, tokens, CPU)  # noqa: E731
    rivals = {"only": watch.takes(lambda tokens: tokens * 1e5, ran)}
    times = race(rivals, batch_of, token_buckets(1 << 12), watch, seconds=20)
    assert 2 < len(times["only"]) < 12 and watch.now() <= 20
    assert ran.count(1) > LEAST_ROUNDS
    assert times["only"][1] == pytest.approx(2e5)


def test_real_plans_race_on_the_processor(tmp_path: Path) -> None:
    layer = resident(SPEC, generator(1))
    rivals: dict[str, Callable[[Batch], None]] = {
        c.backend: backend.forward for c, backend in layer.backends.items()
    }
    assert set(rivals) == {"grouped", "reference"}
    with torch.inference_mode():
        times = race(rivals, lambda n: random_batch(SPEC, n, CPU), (1, 2, 4), Watch(), 5)
    assert {len(mine) for mine in times.values()} == {3}
    assert all(time > 0 for mine in times.values() for time in mine)


def test_random_batches_fit_any_layer() -> None:
    for changes in ({}, {"routing": None}, {"expert_begin": 2, "expert_end": 4}):
        spec = layer_spec(**changes)
        batch = random_batch(spec, 9, CPU)
        assert batch.ids is not None and batch.out.isnan().all()
        held = (batch.ids >= spec.expert_begin) & (batch.ids < spec.expert_end)
        assert held.all() and all(len(set(row)) == len(row) for row in batch.ids.tolist())
        backend: Backend = resident(spec, generator(2)).backends[REFERENCE[0].cell(spec.quant)]
        backend.forward(batch)
        assert batch.out.isfinite().all()
