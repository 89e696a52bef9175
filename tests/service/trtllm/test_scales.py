"""Constants in the kernels' units: the published epilogue of raw accumulators gives the values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.service.trtllm.layers import ACTIVATIONS, layer
from tests.strategies import generator, random_weights, relative
from torch import Tensor

from expertd.backends.activation import activate
from expertd.backends.flashinfer.tied import tied_fp8
from expertd.backends.flashinfer_trtllm import scales
from expertd.core import Activation, ActivationKind, QuantScheme
from expertd.weights.dequant import dequantize

HELD, INTER, TOKENS = 3, 8, 16
GATED = [kind for kind in ACTIVATIONS if kind is not ActivationKind.RELU2]
CLAMPED = Activation(ActivationKind.SWIGLU, limit=1.5)


def epilogue(
    activation: Activation, up: Tensor, gate: Tensor, out: scales.Scalars, expert: int
) -> Tensor:
    """What the kernels document of their epilogue, on raw accumulators of one expert."""
    given = scales.activation_arguments(activation, out)
    alpha, beta, limit = (
        None if value is None else value[expert]
        for value in (given["gemm1_alpha"], given["gemm1_beta"], given["gemm1_clamp_limit"])
    )
    first, dequant = out.first[expert], out.gate[expert]
    if activation.kind is ActivationKind.SITU:
        assert alpha is not None and beta is not None
        x, u = gate * dequant, up * dequant
        squeezed = alpha * torch.tanh(x / alpha) * torch.sigmoid(x)
        return first * squeezed * beta * torch.tanh(u / beta)
    if activation.kind is ActivationKind.SWIGLU_STEP:
        assert limit is not None
        silu = torch.nn.functional.silu(gate * dequant)
        return first * torch.minimum(silu, limit * dequant) * up.clamp(-limit, limit)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    x = gate * dequant
    if activation.kind is ActivationKind.GEGLU:
        act = torch.nn.functional.gelu(x)
    else:
        act = x * torch.sigmoid((1 if alpha is None else alpha) * x)
    return first * (up + (0 if beta is None else beta)) * act


@pytest.mark.parametrize(
    "activation", [*(ACTIVATIONS[kind] for kind in GATED), CLAMPED], ids=lambda a: f"{a.kind}"
)
def test_raw_units_give_the_activation_of_the_values(activation: Activation) -> None:
    random = generator(11)
    dequant13 = (0.01 + torch.rand(HELD, 1, generator=random)).expand(HELD, 2)
    dequant2, input2 = 0.1 + torch.rand(2, HELD, generator=random)
    input13 = torch.tensor(0.03)
    out = scales.output_scalars(dequant13, dequant2, input13, input2, activation.kind)
    values = torch.randn(TOKENS, 2 * INTER, generator=random) * 4
    for expert in range(HELD):
        raw = values / (dequant13[expert, 0] * input13)
        up, gate = raw.chunk(2, dim=1)
        # The kernel's result is quantised with the second GEMM's input scale.
        found = epilogue(activation, up, gate, out, expert) * input2[expert]
        torch.testing.assert_close(found, activate(activation, values), rtol=2e-5, atol=2e-5)
        product = values[:, :INTER] / (input2[expert] * dequant2[expert])
        torch.testing.assert_close(product * out.second[expert], values[:, :INTER])


def test_not_gated() -> None:
    random = generator(12)
    dequant, input2 = 0.1 + torch.rand(2, HELD, generator=random)
    kind = ActivationKind.RELU2
    out = scales.output_scalars(dequant[:, None], dequant, torch.tensor(0.5), input2, kind)
    values = torch.randn(TOKENS, INTER, generator=random)
    for expert in range(HELD):
        raw = values / (dequant[expert] * 0.5)
        found = torch.relu(raw * out.gate[expert]).square() * out.first[expert]
        torch.testing.assert_close(found * input2[expert], torch.relu(values).square())


def test_halves_of_different_scales_without_a_clamp() -> None:
    random = generator(13)
    dequant13 = 0.1 + torch.rand(HELD, 2, generator=random)
    one, kind = torch.ones(HELD), ActivationKind.SWIGLU
    out = scales.output_scalars(dequant13, one, torch.tensor(2.0), one, kind)
    values = torch.randn(TOKENS, 2 * INTER, generator=random)
    up, gate = values.chunk(2, dim=1)
    for expert in range(HELD):
        raw_up, raw_gate = up / (dequant13[expert, 0] * 2), gate / (dequant13[expert, 1] * 2)
        found = epilogue(Activation(kind), raw_up, raw_gate, out, expert)
        torch.testing.assert_close(found, activate(Activation(kind), values))


def test_a_step_without_a_limit_does_not_get_the_kernels_own() -> None:
    step = Activation(ActivationKind.SWIGLU_STEP)
    limit = scales.activation_arguments(step, scales.unit_scalars(torch.ones(HELD)))
    assert torch.equal(limit["gemm1_clamp_limit"], torch.full((HELD,), scales.UNCLAMPED))  # type: ignore[arg-type]


def test_what_an_activation_does_not_use_is_none() -> None:
    plain = Activation(ActivationKind.SWIGLU, alpha=2.0, beta=3.0)
    given = scales.activation_arguments(plain, scales.unit_scalars(torch.ones(HELD)))
    assert set(given.values()) == {None}


@pytest.mark.parametrize("gated", [True, False])
def test_biases_are_in_raw_units(gated: bool) -> None:
    random = generator(14)
    spec = layer(QuantScheme.NVFP4, expert_bias=True, num_experts=HELD, expert_end=HELD)
    if not gated:
        spec = replace(spec, activation=ACTIVATIONS[ActivationKind.RELU2])
    weights = random_weights(spec, random)
    up, gate, second = 0.1 + torch.rand(3, HELD, generator=random)
    out = scales.Scalars(up, gate, torch.ones(HELD), second)
    first, last = scales.bias_arguments(weights, out, gated)
    assert first is not None and last is not None and weights.bias13 is not None
    rows = weights.bias13.chunk(2, dim=1) if gated else (weights.bias13,)
    units = (up, gate) if gated else (gate,)
    found = first.chunk(len(rows), dim=1)
    for half, unit, expected in zip(found, units, rows, strict=True):
        torch.testing.assert_close(half * unit[:, None], expected)
    torch.testing.assert_close(last * second[:, None], weights.bias2)


@pytest.mark.parametrize(
    ("quant", "tie", "error"),
    [
        (QuantScheme.FP8_TENSOR, tied_fp8, 0.04),
        (QuantScheme.NVFP4, scales.tied_nvfp4, 0.04),
    ],
)
def test_tied_halves_share_the_larger_scale(quant: QuantScheme, tie: object, error: float) -> None:
    spec = layer(quant, num_experts=HELD, expert_end=HELD)
    weights = random_weights(spec, generator(15))
    name = "scale13" if quant is QuantScheme.FP8_TENSOR else "global13"
    before = getattr(weights, name)
    before[1, 1] = before[1, 0]  # one expert is tied already
    tied = tie(weights)  # type: ignore[operator]
    after = getattr(tied, name)
    assert torch.equal(after, before.amax(dim=1, keepdim=True).expand(-1, 2))
    for expert in range(HELD):
        old, new = dequantize(weights, expert)[0], dequantize(tied, expert)[0]
        assert relative(new, old) < (1e-7 if expert == 1 else error)
    assert tie(tied) is tied  # type: ignore[operator]
