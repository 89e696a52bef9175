"""Twelve faults that a backend could have, each planted in this one: the twin catches it.

A fault is caught if the launcher's contract refuses a call, or if the numbers are far off. Without
it the same layer is right, which every case shows first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tests.service.trtllm.layers import layer, row_of, with_inputs
from tests.service.trtllm.served import Layer
from tests.strategies import generator
from tests.twins.checks import ContractError
from torch import Tensor

from expertd.backends.flashinfer.entry import Entry
from expertd.backends.flashinfer_trtllm import (
    arguments,
    backend,
    permute,
    quantize,
    scales,
    topk,
    weights,
)
from expertd.core import Activation, ActivationKind, LayerSpec, PlanMode, QuantScheme
from expertd.routing.declared import declared_routing

pytestmark = pytest.mark.usefixtures("twin")
Q = QuantScheme
Plant = Callable[[pytest.MonkeyPatch], None]
FAR = 2.0
"""A wrong answer is at least this many times further off than the format may be."""


def halves_swapped(patch: pytest.MonkeyPatch) -> None:
    """[gate; up] as checkpoints have it, where [up; gate] is wanted."""
    right = permute.interleaved
    patch.setattr(permute, "interleaved", lambda rows: (right(rows) + rows // 2) % rows)


def epilogue_64_for_128(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(permute, "SHUFFLE_BLOCK", 16)


def scale_not_transposed(patch: pytest.MonkeyPatch) -> None:
    def fault(rows: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        codes, scale = quantize.fp8_group128(rows, input_scale)
        assert scale is not None
        # The bytes of [T, H/128] under the shape that the launcher checks.
        return codes, scale.T.contiguous().view(scale.shape)

    patch.setitem(quantize.QUANTIZERS, "fp8_group128", fault)


def packed_order_reversed(patch: pytest.MonkeyPatch) -> None:
    def fault(ids: Tensor, given: Tensor) -> Tensor:
        return (given.bfloat16().view(torch.int16).int() << 16) | ids.int()

    patch.setattr(topk, "packed", fault)


def offset_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = arguments.layer_values
    patch.setattr(arguments, "layer_values", lambda *of: {**right(*of), "local_expert_offset": 0})


def plain_ids_as_packed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(topk, "packed", lambda ids, given: ids.int())


def scale_of_the_wrong_vector_size(patch: pytest.MonkeyPatch) -> None:
    """One scale for 32 values where there is one for 16: the entry takes it for MXFP4."""
    right = weights.swizzle
    patch.setattr(weights, "swizzle", lambda given: right(given[..., ::2].contiguous()))


def alpha_in_the_wrong_unit(patch: pytest.MonkeyPatch) -> None:
    right = scales.activation_arguments

    def fault(activation: Any, units: scales.Scalars) -> dict[str, Tensor | None]:
        found = right(activation, units)
        alpha = found["gemm1_alpha"]
        return {**found, "gemm1_alpha": None if alpha is None else alpha / units.gate}

    patch.setattr(scales, "activation_arguments", fault)


def bias_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weights, "_biases", lambda *_: {"gemm1_bias": None, "gemm2_bias": None})


def n_group_0_on_fp8_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backend.Fp8Block, "ungrouped", 0)


def linear_for_swizzled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weights, "swizzle", lambda given: given)


def output_not_in_place(patch: pytest.MonkeyPatch) -> None:
    right = Entry.__call__

    def fault(entry: Entry, values: Mapping[str, Any]) -> Tensor:
        right(entry, {**values, "output": torch.empty_like(values["output"])})
        said: Tensor = values["output"]
        return said

    patch.setattr(Entry, "__call__", fault)


@dataclass(frozen=True)
class Fault:
    """A fault, and the layer on which it shows: tokens are such that no shape gives it away."""

    plant: Plant
    quant: QuantScheme
    mode: PlanMode = PlanMode.ROUTED
    changes: dict[str, Any] = field(default_factory=dict)
    activation_quant: str = ""
    tokens: int = 9


def deepseek(n_group: int) -> dict[str, Any]:
    settings = {"routing": "DeepSeekV3", "n_group": n_group, "topk_group": 1, "bias": True}
    return {"routing": declared_routing({"num_experts": 8, "top_k": 2, **settings})}


# With a small alpha the gate is nearly a straight line; with a large one it is a step.
OAI = {"activation": Activation(ActivationKind.SWIGLU_OAI, alpha=0.1, beta=0.75, limit=7.0)}
BIASED = {"expert_bias": True, **OAI}
FAULTS = (
    Fault(halves_swapped, Q.NVFP4),
    Fault(epilogue_64_for_128, Q.BF16),
    Fault(scale_not_transposed, Q.FP8_BLOCK128, tokens=5),
    Fault(packed_order_reversed, Q.FP8_CHANNEL),
    Fault(offset_forgotten, Q.MXFP8, changes={"expert_begin": 2, "expert_end": 6}),
    Fault(plain_ids_as_packed, Q.MXINT4),
    Fault(scale_of_the_wrong_vector_size, Q.NVFP4),
    Fault(alpha_in_the_wrong_unit, Q.NVFP4, changes=OAI),
    Fault(bias_dropped, Q.MXFP4, changes=BIASED, activation_quant="mxfp8"),
    Fault(n_group_0_on_fp8_block, Q.FP8_BLOCK128, PlanMode.MONOLITHIC, deepseek(1)),
    Fault(linear_for_swizzled, Q.MXFP8),
    Fault(output_not_in_place, Q.BF16),
)
REFUSED = {scale_of_the_wrong_vector_size, n_group_0_on_fp8_block}
"""The launcher itself refuses these; the others run and answer wrong."""


def made(fault: Fault) -> Layer:
    """A layer with scales, biases and rows that matter."""
    spec: LayerSpec = layer(fault.quant, **fault.changes)
    random = generator(11)
    found = Layer(
        spec,
        torch.randn(fault.tokens, spec.num_experts, generator=random),
        torch.randn(spec.num_experts, generator=random) if "routing" in fault.changes else None,
    )
    # Static scales far from 1 make a number in the wrong unit differ from the right one.
    given = with_inputs(found.weights, random)
    if spec.expert_bias:
        first = torch.randn(spec.held, spec.rows13, generator=random)
        second = torch.randn(spec.held, spec.hidden, generator=random)
        given = replace(given, bias13=first, bias2=second)
    object.__setattr__(found, "weights", given)
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_a_fault_of_the_backend_is_caught(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(fault.quant, fault.mode, fault.activation_quant)
    found = made(fault)
    assert found.error(row) <= 1, "without the fault it is right"
    fault.plant(monkeypatch)
    if fault.plant in REFUSED:
        with pytest.raises(ContractError):
            found.answer(row)
        return
    assert not found.error(row) <= FAR


def test_there_are_twelve() -> None:
    assert len({fault.plant for fault in FAULTS}) == 12
