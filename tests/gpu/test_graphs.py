"""CUDA graphs on a card: replays equal the kernels that they were captured from, and a capture
stands in nobody's way."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
import torch
from tests.strategies import generator, layer_spec, random_topk, random_weights

from expertd.backends.base import Backend, Batch
from expertd.backends.build import build
from expertd.capability.device import detect
from expertd.capability.match import device_refusals, layer_refusals
from expertd.capability.row import Row
from expertd.capability.rows import flashinfer_cutlass, triton
from expertd.capability.rows.reference import ROWS as REFERENCE
from expertd.core import LayerSpec, QuantScheme
from expertd.core.buckets import bucket_index, token_buckets
from expertd.engine.capture import CudaCapture
from expertd.engine.graphs import LARGEST, Graphs, graphs_for
from expertd.engine.staging_cuda import stagings
from expertd.proof.run import TOLERANCES, relative_error

DEVICE = torch.device("cuda:0")
CELLS = [
    (row, quant)
    for row in (*flashinfer_cutlass.ROWS, *triton.ROWS)
    for quant in row.quants
    if quant is not QuantScheme.FP32
]
NAMES = [f"{row.backend}-{quant}-{row.activation_quant}" for row, quant in CELLS]
SIZES = (64, 1, 3, 2, 33, 7, 64, 5, 16, 1)

cells = pytest.mark.parametrize(("row", "quant"), CELLS, ids=NAMES)


@cache
def usable(row: Row) -> bool:
    return not device_refusals(row, detect("cuda:0"))


def layer(row: Row, quant: QuantScheme) -> LayerSpec:
    spec = layer_spec(hidden=256, intermediate=384, num_experts=16, expert_end=16, quant=quant)
    if not usable(row) or layer_refusals(row, spec, detect("cuda:0")):
        pytest.skip("the row does not take this layer on this card")
    return spec


def built(row: Row, spec: LayerSpec, seed: int = 0) -> Backend:
    weights = random_weights(spec, generator(seed))
    moved = {name: tensor.to(DEVICE) for name, tensor in weights.tensors.items()}
    return build(row, spec, replace(weights, **moved), None, DEVICE, token_buckets(LARGEST))


def graphs() -> Graphs:
    return graphs_for(DEVICE, token_buckets(LARGEST), enabled=True)


def batch_of(spec: LayerSpec, tokens: int, seed: int = 0) -> Batch:
    random = generator(seed + tokens)
    rows = torch.randn(tokens, spec.hidden, generator=random).bfloat16().to(DEVICE)
    ids, weights = random_topk(tokens, spec.num_experts, 2, random)
    out = torch.full_like(rows, torch.nan)
    return Batch(rows, out, ids=ids.to(DEVICE), weights=weights.to(DEVICE))


def padded(batch: Batch) -> Batch:
    """What a graph runs: the batch filled up to its bucket."""
    assert batch.ids is not None and batch.weights is not None
    more = (1 << bucket_index(len(batch.rows))) - len(batch.rows)
    fill = torch.nn.functional.pad
    rows = fill(batch.rows, (0, 0, 0, more))
    ids = fill(batch.ids, (0, 0, 0, more), value=-1)
    return Batch(rows, torch.empty_like(rows), None, ids, fill(batch.weights, (0, 0, 0, more)))


def eager(backend: Backend, batch: Batch) -> torch.Tensor:
    """What the kernels compute without a graph."""
    alike = padded(batch)
    replay, backend.replay = backend.replay, None
    backend.forward(alike)
    backend.replay = replay
    return alike.out[: len(batch.rows)]


@cells
def test_replays_equal_the_kernels(row: Row, quant: QuantScheme) -> None:
    spec = layer(row, quant)
    backend = built(row, spec)
    graphs().attach([backend])
    assert backend.replay is not None, "captured"
    reference = build(REFERENCE[0], spec, backend.canonical, None, DEVICE)
    for number, tokens in enumerate(SIZES):
        batch = batch_of(spec, tokens, number)
        assert backend.replay(batch)
        assert torch.equal(batch.out, eager(backend, batch)), tokens
        expected = replace(batch, out=torch.empty_like(batch.out, dtype=torch.float32))
        reference.forward(expected)
        assert relative_error(batch.out, expected.out) <= TOLERANCES[row.activation_quant]


@cells
def test_layers_take_turns_and_one_may_go(row: Row, quant: QuantScheme) -> None:
    spec, shared = layer(row, quant), graphs()
    layers = [built(row, spec, seed) for seed in range(3)]
    shared.attach(layers)
    for _ in range(2):
        for number, backend in enumerate(layers):
            batches = [batch_of(spec, tokens, number) for tokens in (5, 64, 1)]
            for batch in batches:
                backend.forward(batch)
            for batch in batches:
                assert torch.equal(batch.out, eager(backend, batch))
        del layers[1:2]
        gc.collect()
        torch.cuda.empty_cache()


@cells
def test_a_layer_is_captured_while_another_serves(row: Row, quant: QuantScheme) -> None:
    spec, shared = layer(row, quant), graphs()
    serving, loading = built(row, spec, 1), built(row, spec, 2)
    shared.attach([serving])
    batch = batch_of(spec, 7)
    expected = eager(serving, batch)
    torch.cuda.synchronize()

    def load() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                shared.attach([loading])

    thread = threading.Thread(target=load)
    thread.start()
    wrong = 0
    while thread.is_alive():
        batch.out.fill_(torch.nan)
        serving.forward(batch)
        wrong += not torch.equal(batch.out, expected)
    thread.join()
    assert not wrong
    again = batch_of(spec, 9)
    loading.forward(again)
    assert torch.equal(again.out, eager(loading, again))


@cells
def test_a_batch_may_fail_while_a_layer_is_captured(row: Row, quant: QuantScheme) -> None:
    """To wait for the whole card meanwhile would end the capture, and the process."""
    spec, shared = layer(row, quant), graphs()
    loading, way = built(row, spec), stagings(DEVICE)[0]

    def load() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                shared.attach([loading])
                assert loading.replay is not None

    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load)
        while not loaded.done():
            way.recover()
            time.sleep(0.001)
        loaded.result()


def test_after_a_capture_that_failed_memory_is_given_back_and_others_go_on() -> None:
    capture, memory = CudaCapture(DEVICE), torch.ones(1, device=DEVICE)

    def launches_and_fails() -> None:
        memory.add_(1)
        raise ZeroDivisionError

    for fails in (torch.cuda.synchronize, launches_and_fails):
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            capture(lambda: None, fails)
        stagings(DEVICE)[0].recover()
    capture(lambda: None, lambda: memory.add_(1))()
    assert memory.item() == 2


def test_captures_go_on_when_all_graphs_are_gone() -> None:
    """As after every layer was unloaded."""
    capture, memory = CudaCapture(DEVICE), torch.zeros(1, device=DEVICE)
    for _ in range(3):
        capture(lambda: None, lambda: memory.add_(1))()
        gc.collect()
        stagings(DEVICE)[0].recover()
    assert memory.item() == 3
