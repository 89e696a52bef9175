"""Our Triton kernels on a card: what the interpreter tests, on real tensor cores, and what only a
card can show."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from tests.service.triton.expert_checks import *  # noqa: F403
from tests.service.triton.expert_checks import batch_of, cells, layer, ours, reference
from tests.strategies import generator, random_weights

from expertd.capability.device import detect
from expertd.capability.match import device_refusals
from expertd.capability.row import Row
from expertd.core import QuantScheme
from expertd.proof.run import TOLERANCES, relative_error


@pytest.fixture
def seed() -> int:
    """EXPERTD_TEST_SEED repeats a run."""
    number = int(os.environ.get("EXPERTD_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print("EXPERTD_TEST_SEED =", number)
    return number


@pytest.fixture(autouse=True)
def usable(request: pytest.FixtureRequest) -> None:
    """A card before SM89 has no fp8 to multiply."""
    row = request.getfixturevalue("row") if "row" in request.fixturenames else None
    if row is not None and device_refusals(row, detect("cuda:0")):
        pytest.skip("the row does not run on this card")


@cells
def test_batches_of_every_bucket(row: Row, quant: QuantScheme, seed: int) -> None:
    """One layer, from one token to more than any tile is high; wide enough for many K steps."""
    spec = layer(quant, hidden=1056, intermediate=736, num_experts=16, expert_end=16)
    weights = random_weights(spec, generator(seed))
    backend = ours(row, spec, weights)
    for tokens in (1, 2, 16, 63, 128, 700, 3000, 3):
        batch = batch_of(spec, tokens, 4, seed + tokens)
        backend.forward(batch)
        found = relative_error(batch.out, reference(spec, weights, batch))
        print(tokens, f"{found:.1e}")
        assert found <= TOLERANCES[row.activation_quant], tokens


@cells
def test_graphs_replay_with_new_rows_and_ids(row: Row, quant: QuantScheme, seed: int) -> None:
    """A captured call reads whatever its buffers hold, and a larger call between does no harm."""
    spec = layer(quant)
    weights = random_weights(spec, generator(seed))
    backend = ours(row, spec, weights)
    for tokens in (1, 24):
        batch = batch_of(spec, tokens, 3, seed)
        backend.forward(batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            backend.forward(batch)
        backend.forward(batch_of(spec, 2000, 3, seed))
        fresh = batch_of(spec, tokens, 3, seed + 1)
        assert batch.ids is not None and fresh.ids is not None
        batch.rows.copy_(fresh.rows)
        batch.ids.copy_(fresh.ids)
        batch.out.fill_(torch.nan)
        graph.replay()
        expected = reference(spec, weights, batch)
        assert relative_error(batch.out, expected) <= TOLERANCES[row.activation_quant]


@cells
def test_repeats_are_bitwise_equal(row: Row, quant: QuantScheme, seed: int) -> None:
    spec = layer(quant, hidden=512, intermediate=256)
    backend = ours(row, spec, random_weights(spec, generator(seed)))
    batch = batch_of(spec, 900, 5, seed)
    backend.forward(batch)
    first = batch.out.clone()
    for _ in range(5):
        batch.out.fill_(torch.nan)
        backend.forward(batch)
        assert torch.equal(batch.out, first)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@cells
def test_nothing_waits_for_the_card(row: Row, quant: QuantScheme, seed: int) -> None:
    spec = layer(quant)
    backend = ours(row, spec, random_weights(spec, generator(seed)))
    batch = batch_of(spec, 40, 3, seed)
    backend.forward(batch)
    second = replace(batch, out=torch.full_like(batch.out, torch.nan))
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.forward(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(second.out, batch.out)
