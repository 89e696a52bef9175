"""Graphs of small batches, with a capture that remembers what it was given and runs it again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.service.engine.parts import CPU, Scripted, resident, warm
from tests.strategies import generator, layer_spec, random_topk

from expertd.backends.base import Backend, Batch
from expertd.capability.rows.grouped import ROWS as GROUPED
from expertd.core import LayerSpec, PlanMode, QuantScheme
from expertd.core.buckets import token_buckets
from expertd.engine.graphs import LARGEST, Graphs, Signature, graphs_for
from expertd.proof.batches import random_batch

SPEC = layer_spec(quant=QuantScheme.BF16)
BUCKETS = (1, 2, 4, 8)
Run = Callable[[], None]


@dataclass
class Recorder:
    """A capture whose graph runs the captured function, in inference mode as kernels would."""

    warmed: int = 0
    captured: int = 0
    replayed: list[int] = field(default_factory=list)
    fails_after: int = 10**6

    def __call__(self, warm: Run, run: Run) -> Run:
        if self.captured == self.fails_after:
            raise RuntimeError("operation not permitted when stream is capturing")
        warm()
        self.warmed += 1
        number = self.captured
        self.captured += 1

        def replay() -> None:
            self.replayed.append(number)
            run()

        return replay


def graphs(recorder: Recorder, buckets: tuple[int, ...] = BUCKETS) -> Graphs:
    return Graphs(buckets, lambda: recorder)


def grouped(spec: LayerSpec = SPEC, seed: int = 0) -> Backend:
    found = resident(spec, generator(seed)).backends
    return found[GROUPED[0].cell(spec.quant)]


def batch_of(tokens: int, seed: int, top_k: int = 2) -> Batch:
    random = generator(seed)
    rows = torch.randn(tokens, SPEC.hidden, generator=random).bfloat16()
    ids, weights = random_topk(tokens, SPEC.num_experts, top_k, random)
    return Batch(rows, torch.full_like(rows, torch.nan), ids=ids, weights=weights)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=8), st.integers(0, 999))
def test_replays_equal_the_kernels_whatever_came_before(sizes: list[int], seed: int) -> None:
    eager, replayed, recorder = grouped(), grouped(), Recorder()
    graphs(recorder).attach([replayed])
    for number, tokens in enumerate(sizes):
        batch = batch_of(tokens, seed + number)
        rows = batch.rows.clone()
        replayed.forward(batch)
        expected = replace(batch, out=torch.empty_like(batch.out))
        eager.forward(expected)
        assert torch.equal(batch.out, expected.out) and torch.equal(batch.rows, rows)
    assert len(recorder.replayed) == len(sizes)
    assert [BUCKETS[n] for n in recorder.replayed] == [
        min(b for b in BUCKETS if b >= n) for n in sizes
    ]


def test_rows_that_fill_a_bucket_up_want_nothing() -> None:
    seen: list[Batch] = []
    row = GROUPED[0]

    def look(batch: Batch) -> None:
        copies = {"rows": batch.rows.clone(), "ids": batch.ids.clone()}  # type: ignore[union-attr]
        seen.append(replace(batch, weights=batch.weights.clone(), **copies))  # type: ignore
        batch.out.copy_(batch.rows)

    backend = warm(type("Looks", (Scripted,), {"script": staticmethod(look)})(row, SPEC, CPU))
    graphs(Recorder()).attach([backend])
    seen.clear()
    for tokens in (6, 8, 5, 7):
        backend.forward(batch_of(tokens, tokens))
    for batch, tokens in zip(seen, (6, 8, 5, 7), strict=True):
        assert batch.ids is not None and batch.weights is not None
        assert len(batch.rows) == 8
        assert (batch.ids[tokens:] == -1).all() and (batch.ids[:tokens] >= 0).all()
        assert not batch.rows[tokens:].any() and not batch.weights[tokens:].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda b: replace(b, rows=b.rows.float()),
        lambda b: replace(b, out=b.out.float()),
        lambda b: replace(b, ids=b.ids[:, :1].contiguous(), weights=b.weights[:, :1].contiguous()),
        lambda b: replace(
            b,
            rows=b.rows.repeat(9, 1),
            ids=b.ids.repeat(9, 1),
            weights=b.weights.repeat(9, 1),
            out=b.out.repeat(9, 1),
        ),
    ],
    ids=["rows' dtype", "reply's dtype", "top_k", "too many rows"],
)
def test_other_forms_run_as_they_are(change: Callable[[Batch], Batch]) -> None:
    recorder, backend = Recorder(), grouped()
    graphs(recorder).attach([backend])
    batch = change(batch_of(1, 3))
    backend.forward(batch)
    assert not recorder.replayed and batch.out.isfinite().all()


def test_fp8_rows_are_another_form() -> None:
    batch = batch_of(1, 3)
    scaled = replace(batch, row_scales=torch.ones(1, 1))
    mode = PlanMode.ROUTED
    assert Signature.of(batch, mode) != Signature.of(scaled, mode)


def test_what_a_plan_does_not_read_does_not_matter() -> None:
    recorder, backend = Recorder(), grouped()
    graphs(recorder).attach([backend])
    batch = random_batch(SPEC, 3, CPU)
    assert batch.logits is not None
    backend.forward(batch)
    assert recorder.replayed == [2]


def test_a_kernel_that_cannot_be_captured_still_runs(caplog: pytest.LogCaptureFixture) -> None:
    recorder, backend = Recorder(fails_after=2), grouped()
    graphs(recorder).attach([backend])
    assert backend.replay is None and "without CUDA graphs" in caplog.text
    batch = batch_of(2, 4)
    backend.forward(batch)
    assert batch.out.isfinite().all()


def test_what_is_captured_reads_shared_buffers_and_a_warm_run_its_own() -> None:
    addresses: dict[str, set[int]] = {"warm": set(), "captured": set()}
    kept: list[Batch] = []

    def look(batch: Batch) -> None:
        kept.append(batch)  # memory that is freed could be given to another batch
        addresses[stage].add(batch.rows.data_ptr())

    def capture(warm: Run, run: Run) -> Run:
        nonlocal stage
        stage = "warm"
        warm()
        stage = "captured"
        run()
        return run

    stage = "warm"
    kind = type("Looks", (Scripted,), {"script": staticmethod(look)})
    layers = [warm(kind(GROUPED[0], SPEC, CPU)) for _ in range(3)]
    Graphs(BUCKETS, lambda: capture).attach(layers)
    assert len(addresses["captured"]) == len(BUCKETS), "one for each bucket, whatever the layer"
    assert not addresses["captured"] & addresses["warm"]


def test_layers_share_their_buffers() -> None:
    recorder = Recorder()
    shared, first, second = graphs(recorder), grouped(seed=1), grouped(seed=2)
    shared.attach([first, second])
    assert recorder.captured == 2 * len(BUCKETS) == recorder.warmed
    assert len(shared._slots) == len(BUCKETS)
    for backend, seed in ((first, 1), (second, 2), (first, 1)):
        batch, eager = batch_of(3, 5), grouped(seed=seed)
        backend.forward(batch)
        expected = replace(batch, out=torch.empty_like(batch.out))
        eager.forward(expected)
        assert torch.equal(batch.out, expected.out)


def test_a_load_replays_graphs_of_its_own() -> None:
    made: list[Recorder] = []

    def capture() -> Recorder:
        made.append(Recorder())
        return made[-1]

    mine, backend = Graphs(BUCKETS, capture), grouped()
    with mine.apart([backend]):
        backend.forward(batch_of(2, 1))
    assert backend.replay is None
    live, trial = made
    assert trial.replayed and not live.captured and not mine._slots


def test_a_monolithic_plan_is_captured_with_its_logits() -> None:
    seen: list[Batch] = []
    row = replace(GROUPED[0], mode=PlanMode.MONOLITHIC)

    def route(batch: Batch) -> None:
        seen.append(batch)
        assert batch.ids is None and batch.logits is not None
        batch.out.copy_(batch.rows * batch.logits.sum(dim=1, keepdim=True))

    backend = warm(type("Whole", (Scripted,), {"script": staticmethod(route)})(row, SPEC, CPU))
    recorder = Recorder()
    graphs(recorder).attach([backend])
    full = random_batch(SPEC, 3, CPU)
    batch = Batch(full.rows, full.out, logits=full.logits)
    backend.forward(batch)
    assert recorder.replayed == [2] and len(seen[-1].rows) == 4
    assert full.logits is not None
    assert torch.equal(batch.out, (full.rows * full.logits.sum(dim=1, keepdim=True)).bfloat16())


def test_an_unloaded_backend_takes_its_graphs_along() -> None:
    shared, backend = graphs(Recorder()), grouped()
    shared.attach([backend])
    gone = weakref.ref(backend)
    del backend
    gc.collect()
    assert gone() is None


def test_graphs_are_for_small_buckets_of_a_card() -> None:
    buckets = token_buckets(8192)
    card = torch.device("cuda", 0)
    made: list[Any] = []

    def count(device: torch.device) -> Recorder:
        made.append(device)
        return Recorder()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expertd.engine.graphs.CudaCapture", count)
        assert graphs_for(card, buckets, enabled=True).buckets == token_buckets(LARGEST)
        assert made == [card]
        assert graphs_for(card, buckets, enabled=False).buckets == ()
        assert graphs_for(CPU, buckets, enabled=True).buckets == ()
        assert made == [card]


def test_a_layer_without_experts_is_left_alone() -> None:
    recorder, backend = Recorder(), grouped()
    backend.spec = replace(SPEC, num_experts=0)
    graphs(recorder).attach([backend])
    assert backend.replay is None and not recorder.captured
