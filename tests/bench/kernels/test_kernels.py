"""What the kernel bench is made of, as far as it needs no card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.bench.kernels.cells import Cell
from tests.bench.kernels.plans import named, reference_of, usable_rows
from tests.bench.kernels.report import as_markdown
from tests.bench.kernels.roof import Card, Roof, roof
from tests.bench.kernels.shapes import SHAPES, VLLM, Shape, goal
from tests.bench.kernels.timing import Timing
from tests.bench.kernels.weights import first_rows, random_batches, random_weights

from expertd.capability.device import simulated
from expertd.core import QuantScheme
from expertd.weights.storage import layer_bytes

CPU = torch.device("cpu")
TIMING = Timing(median=20.0, low=19.0, high=21.0, samples=9, graph=True)


def small(quant: QuantScheme) -> Shape:
    whole = SHAPES[0].spec
    spec = replace(whole, hidden=256, intermediate=128, num_experts=16, expert_end=16, quant=quant)
    return Shape("small", spec)


@pytest.mark.parametrize("quant", QuantScheme)
def test_weights_are_valid_and_outputs_of_order_one(quant: QuantScheme) -> None:
    shape = small(quant)
    batch = random_batches(shape, 16, 1, CPU)[0]
    out = first_rows(batch, 16)
    reference_of(shape, random_weights(shape.spec, CPU), CPU).forward(out)
    assert out.out.isfinite().all()
    assert 0.05 < out.out.std() < 2


def test_single_tokens_share_no_expert_with_their_neighbours() -> None:
    batches = random_batches(SHAPES[4], 1, 40, CPU)
    for before, after in zip(batches, batches[1:], strict=False):
        assert before.ids is not None and after.ids is not None
        assert len({*before.ids[0].tolist(), *after.ids[0].tolist()}) == 12
    assert len(batches) == 40


def test_roof_is_the_larger_of_bytes_and_flops() -> None:
    shape = small(QuantScheme.BF16)
    batches = random_batches(shape, 1, 2, CPU)
    slow_memory, slow_gemm = Card(1e6, {"bf16": 1e15}), Card(1e15, {"bf16": 1e6})
    read = layer_bytes(shape.spec) / 16 * 8 / 1e6
    flops = 8 * 2 * 3 * 256 * 128 / 1e6
    assert roof(slow_memory, shape, batches, "bf16") == Roof(pytest.approx(read * 1e6), "memory")
    assert roof(slow_gemm, shape, batches, "bf16") == Roof(pytest.approx(flops * 1e6), "compute")


def test_goals() -> None:
    assert goal(1, fp8=True, roof_us=30.0) == 1.5
    assert goal(1, fp8=True, roof_us=300.0) == 1.3
    assert [goal(4096, fp8, 1.0) for fp8 in (False, True)] == [1.8, 2.0]
    assert goal(77, fp8=True, roof_us=1.0) is None


def test_every_shape_has_a_plan_on_hopper() -> None:
    card = simulated("sm90", "0.7.2.post1")
    for shape in SHAPES:
        assert "triton" in {row.backend for row in usable_rows(shape, card, [])}


def test_shapes_are_found_by_parts_of_their_names() -> None:
    assert [s.name for s in named(SHAPES, ["qwen", "OSS"])] == ["Qwen3-30B", "gpt-oss-120b"]
    assert len(list(named(SHAPES, []))) == 5


def test_tables_show_best_goal_marks_and_faults() -> None:
    shape = Shape("small", SHAPES[0].spec, {VLLM: {16: 1.03}})
    slower = replace(TIMING, median=30.0, graph=False)
    faster = replace(TIMING, median=5.0)
    cells = [
        Cell("small", 16, "a bf16", "bf16", TIMING, Roof(19.0, "memory"), 2e-3, 1e-2),
        Cell("small", 16, "b fp8", "fp8", slower, Roof(19.0, "memory"), 3e-2, 8e-2),
        Cell("small", 16, "c fp8", "fp8", faster, Roof(19.0, "memory"), 5e-1, 8e-2),
        Cell("small", 64, "b fp8", "fp8", fault="RuntimeError: no"),
    ]
    facts = {
        "date": "today",
        "card": "a card",
        "driver": "1",
        "cuda": "13",
        "command": "it",
        "versions": {"torch": "2"},
        "bandwidth": 4e12,
        "peaks": {"bf16": 8e14},
    }
    text = as_markdown(facts, [shape], cells, [])
    assert "Goals met: 1 of 1." in text and "kernels in 0 of 0 (goal" in text
    assert "| a bf16 | **20.0 (2.0) 1.05×** 2e-03 |" in text
    assert "| b fp8 | 30.0 (2.0) 1.58× 3e-02 E |" in text
    assert "| c fp8 | 5.0 (2.0) 0.26× 5e-01 WRONG |" in text
    assert "| goal | 1.10× met |" in text
    assert f"| {VLLM} | 1.03 |" in text
    assert "- b fp8, 64 tokens: RuntimeError: no" in text
