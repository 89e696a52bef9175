"""From a layer through the planner to the backend and the twin, beside the fp32 reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from tests.strategies import generator
from torch import Tensor

from expertd.backends.base import Batch
from expertd.backends.build import build
from expertd.capability.device import DeviceInfo, simulated
from expertd.capability.plan import PlanSet, plan
from expertd.capability.row import Row
from expertd.capability.rows.reference import ROWS as REFERENCE
from expertd.core import CallForm, LayerSpec, PlanMode, RoutingForm, RoutingSpec
from expertd.proof.run import TOLERANCES, random_weights, relative_error
from expertd.routing.reference import route_for
from expertd.weights.canonical import ExpertWeights

CPU = torch.device("cpu")
LOGITS = CallForm(
    RoutingForm.LOGITS, "bfloat16", logits_dtype="float32", backend="flashinfer_trtllm"
)
TOPK = replace(LOGITS, routing=RoutingForm.TOPK, weights_dtype="float32", top_k=4)
SAME_FORMAT = 1e-2
"""What both modes of one format may differ by: the kernel keeps its weights in bfloat16."""


def device(flashinfer: str | None = None) -> DeviceInfo:
    """A simulated B200, as the server makes it."""
    found = replace(simulated("sm100", flashinfer), kind="cpu")
    return found if flashinfer else replace(found, simulated=False)


def ask(spec: LayerSpec, form: CallForm = LOGITS, flashinfer: str | None = None) -> PlanSet:
    """What the planner says of calls that are pinned to the backend."""
    return plan(spec, form, device(flashinfer), trust_declared=True)


def refused(spec: LayerSpec, mode: PlanMode, flashinfer: str | None = None) -> str:
    """All that the planner says against the layer's plans in a mode."""
    found = ask(spec, flashinfer=flashinfer)
    return "\n".join(
        reason.text
        for entry in found.rejected
        if entry.row.mode is mode and spec.quant in entry.row.quants
        for reason in entry.refusals
    )


@dataclass(frozen=True)
class Layer:
    """A layer with weights, and one call for it; every test brings logits of its own.

    chosen_by is the routing that a caller of its own ids and weights used.
    """

    spec: LayerSpec
    logits: Tensor
    bias: Tensor | None = None
    chosen_by: RoutingSpec | None = None
    seed: int = 3
    weights: ExpertWeights = field(init=False)

    def __post_init__(self) -> None:
        made = random_weights(self.spec, generator(self.seed), CPU)
        object.__setattr__(self, "weights", made)

    @property
    def tokens(self) -> int:
        return len(self.logits)

    def batch(self, row: Row) -> Batch:
        """The call as the engine hands it to a row's backend, its output poisoned."""
        routing = self.chosen_by or self.spec.routing
        assert routing is not None
        rows = torch.randn(self.tokens, self.spec.hidden, generator=generator(self.seed + 1))
        out = torch.full(rows.shape, torch.nan, dtype=torch.bfloat16)
        batch = Batch(rows.bfloat16(), out)
        if row.mode is PlanMode.MONOLITHIC:
            return replace(batch, logits=self.logits)
        ids, weights = route_for(routing, self.logits, self.bias)
        return replace(batch, ids=ids, weights=weights)

    def answer(self, row: Row) -> Tensor:
        """What a row's backend makes of the call."""
        backend = build(row, self.spec, self.weights, self.bias, CPU)
        batch = self.batch(row)
        backend.forward(batch)
        return batch.out

    def truth(self) -> Tensor:
        """What the fp32 reference makes of it."""
        (row,) = REFERENCE
        batch = self.batch(row)
        exact = replace(batch, out=torch.empty_like(batch.out, dtype=torch.float32))
        build(row, self.spec, self.weights, None, CPU).forward(exact)
        return exact.out

    def error(self, row: Row) -> float:
        """The relative error of a row, as a share of what its format may have."""
        return relative_error(self.answer(row), self.truth()) / TOLERANCES[row.activation_quant]


def served(layer: Layer) -> set[PlanMode]:
    """The modes in which the planner offers the layer, each answer compared.

    With the reference within what the rows' format allows; and, sharper for the routing, with the
    other mode of the same format.
    """
    dtype = str(layer.logits.dtype).removeprefix("torch.")
    form = replace(LOGITS, logits_dtype=dtype)
    answers: dict[tuple[str, PlanMode], Tensor] = {}
    truth = layer.truth()
    for usable in ask(layer.spec, form).usable:
        found = layer.answer(usable.row)
        assert relative_error(found, truth) <= TOLERANCES[usable.activation], usable.row
        answers[usable.activation, usable.mode] = found
    same_in_both_modes(answers)
    return {mode for _, mode in answers}


def same_in_both_modes(answers: Mapping[tuple[str, PlanMode], Tensor]) -> None:
    for (activation, mode), found in answers.items():
        routed = answers[activation, PlanMode.ROUTED]
        assert relative_error(found, routed) <= SAME_FORMAT, (activation, mode)
