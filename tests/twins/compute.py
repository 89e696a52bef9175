"""The experts of one call in fp32, rounded where the kernels round: both GEMMs and finalize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tests.twins.activation import Activation, activate
from tests.twins.routing import Choice
from tests.twins.sizes import Sizes
from torch import Tensor


def as_it_is(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Experts:
    """One call's operands, dequantised and in canonical order; [El] means per local expert.

    rows are [T, H]; fc1(e) is [M1, H] as [up; gate], fc2(e) is [out_rows, I], biases likewise.
    gate_scale, out_scale and fc2_scale [El] multiply raw accumulators.
    stored rounds FC1's rows before an activation that is not fused; between is what FC2 reads.
    """

    rows: Tensor
    fc1: Callable[[int], Tensor]
    fc2: Callable[[int], Tensor]
    activation: Activation
    gate_scale: Tensor
    out_scale: Tensor
    fc2_scale: Tensor
    between: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor], Tensor] = as_it_is
    fc1_bias: Tensor | None = None
    fc2_bias: Tensor | None = None


def run(experts: Experts, choice: Choice, size: Sizes, *, weigh_input: bool = False) -> Tensor:
    """[T, width] bf16; weigh_input multiplies FC1's accumulators instead of the output."""
    pairs = torch.zeros(*choice.ids.shape, size.out_rows, dtype=torch.bfloat16)
    pairs = pairs.to(experts.rows.device)
    for expert in sorted(set(choice.local.flatten().tolist()) - {-1}):
        token, slot = (choice.local == expert).nonzero(as_tuple=True)
        weight = choice.weights[token, slot].unsqueeze(1) if weigh_input else None
        pairs[token, slot] = _expert(experts, size, expert, experts.rows[token], weight)
    weights = torch.ones_like(choice.weights) if weigh_input else choice.weights
    return _finalize(pairs, weights, choice.local >= 0)[:, : size.width].to(torch.bfloat16)


def _expert(
    experts: Experts, size: Sizes, expert: int, rows: Tensor, weight: Tensor | None
) -> Tensor:
    if expert >= size.local:
        return torch.full((rows.shape[0], size.out_rows), torch.nan).bfloat16().to(rows.device)
    middle = _fc1(experts, size, expert, rows, weight)
    used = size.contract_inter
    out = experts.between(middle) @ experts.fc2(expert)[:, :used].T
    if experts.fc2_bias is not None:
        out = out + experts.fc2_bias[expert]
    return (out * experts.fc2_scale[expert]).to(torch.bfloat16)


def _fc1(experts: Experts, size: Sizes, expert: int, rows: Tensor, weight: Tensor | None) -> Tensor:
    """The activation's output [N, contract_inter], times the scale it is quantised with."""
    halves = 2 if size.gated else 1
    matrix = experts.fc1(expert).reshape(halves, size.inter, size.hidden)
    matrix = matrix[:, : size.contract_inter, : size.contract_hidden].flatten(0, 1)
    raw = rows[:, : size.contract_hidden] @ matrix.T
    if weight is not None:
        raw = raw * weight
    if experts.fc1_bias is not None:
        bias = experts.fc1_bias[expert].reshape(halves, size.inter)[:, : size.contract_inter]
        raw = raw + bias.flatten()
    raw = experts.stored(raw)
    gate, out = experts.gate_scale[expert], experts.out_scale[expert]
    return activate(experts.activation, raw, gate, out, expert)


def _finalize(pairs: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """Sum over k in list order, in fp32; a dropped pair is skipped, not multiplied by zero."""
    total = torch.zeros(pairs.shape[0], pairs.shape[2], device=pairs.device)
    for slot in range(pairs.shape[1]):
        term = weights[:, slot, None] * pairs[:, slot].float()
        total = torch.where(kept[:, slot, None], total + term, total)
    return total


def ones(size: Sizes, device: torch.device) -> Tensor:
    """The scales [El] of a format that has none."""
    return torch.ones(size.local, device=device)
