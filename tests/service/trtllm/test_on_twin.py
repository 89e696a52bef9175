"""Every cell of the table against the reference, with the independent twin as the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.service.trtllm.layers import layer, row_of, with_inputs
from tests.service.trtllm.served import Layer, refused
from tests.strategies import generator

from expertd.backends.flashinfer_trtllm.scales import DEFAULTS
from expertd.capability.device import simulated
from expertd.capability.row import Row, State
from expertd.capability.rows.flashinfer_trtllm import ROWS
from expertd.core import Activation, ActivationKind, PlanMode, QuantScheme
from expertd.proof.cases import CASES
from expertd.proof.run import prove
from expertd.routing.declared import declared_routing

pytestmark = pytest.mark.usefixtures("twin")
CELLS = [(row, quant) for row in ROWS for quant in row.quants]
CLAMPED = [
    (row, kind)
    for row in ROWS
    if row.mode is PlanMode.ROUTED
    for kind, use in row.activations.items()
    if use.limit is not None
]


def untried(row: Row) -> Iterator[str]:
    """The cases of expertd verify that an entry cannot be asked, by its row."""
    if row.activations[ActivationKind.SWIGLU].limit is None:
        yield "clamp exceeded"
    if ActivationKind.RELU2 not in row.activations:
        yield "padded sizes, not gated"
    if ActivationKind.SITU not in row.activations:
        yield "rows that bend SiTU"
    if row.mode is PlanMode.MONOLITHIC and "input" not in row.weight_sites:
        yield "input-side weights"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "quant"), CELLS, ids=["/".join(row.cell(quant)) for row, quant in CELLS]
)
def test_a_cell_equals_the_reference(row: Row, quant: QuantScheme) -> None:
    device = replace(simulated("sm100"), kind="cpu")
    proof = prove(row, quant, device)
    assert proof.state is State.PROVEN, proof.failures[:3]
    tried = {trial.case for trial in proof.trials}
    assert tried == {case.name for case in CASES} - set(untried(row))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (ActivationKind.SWIGLU_OAI, (1.5 * 1.702, 1.0)),
        (ActivationKind.SITU, (1.5 * 4.0, 25.0)),
        (ActivationKind.SITU, (4.0, 1.5 * 25.0)),
    ],
)
def test_four_bits_hide_no_wrong_constant(
    kind: ActivationKind, wrong: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounding of rows is larger than what a wrong unit does, unless it is taken out."""
    (row,) = [r for r in ROWS if r.activation_quant == "nvfp4" and r.mode is PlanMode.ROUTED]
    device = replace(simulated("sm100"), kind="cpu")
    telling = tuple(case for case in CASES if case.every_activation or case.rows_size > 1)
    monkeypatch.setattr("expertd.proof.run.CASES", telling)
    assert prove(row, QuantScheme.NVFP4, device).state is State.PROVEN
    monkeypatch.setitem(DEFAULTS, kind, wrong)
    failures = prove(row, QuantScheme.NVFP4, device).failures
    assert failures and all(kind in trial.layer for trial in failures)


@pytest.mark.parametrize(
    ("row", "kind"),
    CLAMPED,
    ids=[f"{row.quants[0]}-{row.activation_quant}-{kind}" for row, kind in CLAMPED],
)
def test_a_clamp_that_is_exceeded(row: Row, kind: ActivationKind) -> None:
    """In the unit of each format, with static scales far from 1; it changes the answer."""
    answers = []
    for limit in (0.5, 1e6):
        spec = layer(row.quants[0], activation=Activation(kind, limit=limit))
        logits = torch.randn(7, spec.num_experts, generator=generator(21))
        made = Layer(spec, logits)
        object.__setattr__(made, "weights", with_inputs(made.weights, generator(22)))
        assert made.error(row) <= 1
        answers.append(made.truth())
    assert (answers[0] - answers[1]).norm() > 0.1 * answers[1].norm()


@pytest.mark.parametrize("tokens", [2, 9])
def test_why_llama4_with_a_range_is_not_routed_in_the_kernel(tokens: int) -> None:
    """With few tokens the kernel takes global ids for local ones; given ids it is right."""
    routing = declared_routing({"num_experts": 8, "top_k": 1, "routing": "Llama4"})
    changes = {"routing": routing, "expert_begin": 4, "expert_end": 8}
    spec = layer(QuantScheme.FP8_TENSOR, **changes)
    made = Layer(spec, torch.randn(tokens, 8, generator=generator(23)))
    monolithic, routed = (row_of(spec.quant, mode) for mode in PlanMode)
    assert "global ids for local ones" in refused(spec, PlanMode.MONOLITHIC)
    assert made.error(routed) <= 1
    assert (made.error(monolithic) <= 1) is (tokens > 3)
