"""Activation parameters, biases and padding: the units and extents that the kernels read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.service.twins import native as layouts
from tests.service.twins import plain, stored
from tests.service.twins.calls import call, packed, pairs
from tests.service.twins.native import EXPERTS, FORMATS, HIDDEN, INTER, TOKENS, Native
from tests.service.twins.plain import Physical

TAKES_PARAMETERS = ["bf16", "deepseek", "deepseek_shuffled", "mxfp8", "nvfp4"]
TAKES_PARAMETERS += ["bf16_mxfp4", "mxfp8_mxfp4", "e4m3_mxfp4", "mxint4"]
TAKES_BIAS = ["deepseek", "deepseek_shuffled", "mxfp8", "nvfp4"]
TAKES_BIAS += ["bf16_mxfp4", "mxfp8_mxfp4", "e4m3_mxfp4"]
STEPS = ["bf16", "fp8_per_tensor", "mxfp8", "nvfp4"]


def spread(low: float, high: float) -> torch.Tensor:
    """A different value for every expert."""
    return torch.linspace(low, high, EXPERTS)


def units(native: Native, physical: Physical) -> dict[str, torch.Tensor]:
    """The parameters as the kernels take them: alpha as it is, the others per accumulator."""
    given: dict[str, torch.Tensor] = {}
    for name, value, unit in (
        ("gemm1_alpha", physical.alpha, torch.ones(EXPERTS)),
        ("gemm1_beta", physical.beta, native.unit1),
        ("gemm1_clamp_limit", physical.limit, native.unit1),
    ):
        if value is not None:
            given[name] = value * unit
    return given


def errors(native: Native, physical: Physical, **changes: Any) -> tuple[float, float]:
    """The error against the answer with the parameters, and what the parameters change."""
    scores = torch.stack([torch.randperm(EXPERTS) for _ in range(TOKENS)]) / 2
    ids = scores.topk(2, dim=1).indices
    weights = torch.softmax(scores.gather(1, ids), dim=1)
    got = call(native, "", routing_logits=scores, **changes)
    wanted = plain.output(native, ids.tolist(), weights, physical)
    without = plain.output(native, ids.tolist(), weights)
    return plain.error(got, wanted), plain.error(wanted, without)


@pytest.mark.parametrize("name", TAKES_PARAMETERS)
@pytest.mark.parametrize("which", ["alpha", "beta", "limit", "all"])
def test_swiglu_parameters(name: str, which: str, seed: int) -> None:
    native = FORMATS[name](seed)
    every = {"alpha": spread(-8.0, 0.5), "beta": spread(0.4, 1.5), "limit": spread(0.1, 0.5)}
    physical = Physical(**(every if which == "all" else {which: every[which]}))
    got, difference = errors(native, physical, **units(native, physical))
    assert got < 1.5 * native.tolerance
    assert difference > 2 * native.tolerance, "the parameters must matter, or nothing is tested"


@pytest.mark.parametrize("name", STEPS)
def test_swiglu_step_limit(name: str, seed: int) -> None:
    native = FORMATS[name](seed, "SwigluStep")
    physical = Physical(limit=spread(0.1, 0.4))
    got, difference = errors(native, physical, **units(native, physical))
    assert got < 1.5 * native.tolerance
    assert difference > 2 * native.tolerance


@pytest.mark.parametrize("name", STEPS)
def test_swiglu_step_without_a_limit_is_seven(name: str, seed: int) -> None:
    large = layouts.random_layer

    def scaled_up(*args: Any) -> Any:
        x, fc1, fc2 = large(*args)
        return x, fc1 * 8, fc2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "random_layer", scaled_up)
        native = FORMATS[name](seed, "SwigluStep")
    got, difference = errors(native, Physical(limit=torch.full((EXPERTS,), 7.0)))
    _, clamped = errors(native, Physical(limit=torch.full((EXPERTS,), 1e9)))
    assert got < 1.5 * native.tolerance
    assert difference == 0 and clamped > 2 * native.tolerance


def test_situ_parameters(seed: int) -> None:
    native = FORMATS["nvfp4"](seed, "Situ")
    physical = Physical(alpha=spread(0.2, 0.6), beta=spread(0.2, 0.6))
    given = {"gemm1_alpha": physical.alpha, "gemm1_beta": physical.beta}
    got, difference = errors(native, physical, **given)
    assert got < 1.5 * native.tolerance
    assert difference > 2 * native.tolerance


@pytest.mark.parametrize("name", TAKES_BIAS)
def test_biases_in_the_prepared_row_order(name: str, seed: int) -> None:
    native = FORMATS[name](seed)
    first, second = torch.randn(EXPERTS, 2 * INTER) / 2, torch.randn(EXPERTS, HIDDEN)
    physical = Physical(bias1=first, bias2=second)
    raw = {
        "gemm1_bias": prepared(first * native.unit1[:, None], name, gated=True),
        "gemm2_bias": prepared(second * native.unit2[:, None], name, gated=False),
    }
    got, difference = errors(native, physical, **raw)
    assert got < 1.5 * native.tolerance
    assert difference > 2 * native.tolerance


def prepared(values: torch.Tensor, name: str, gated: bool) -> torch.Tensor:
    """A bias in the row order of the format's weights."""
    if name == "deepseek":
        return values
    if name == "deepseek_shuffled":
        order = torch.tensor([2 * (j % 8) + j // 8 for j in range(16)])
        return values.reshape(EXPERTS, -1, 16)[:, :, order].flatten(1)
    return stored.shuffled_values(values, gated)


def padded(native: Native, hidden: int, inter: int) -> Native:
    """The values of a layer whose last columns and rows are padding, zero up to the next 128."""
    x, fc1, fc2 = native.x.clone(), native.fc1.clone(), native.fc2.clone()
    x[:, hidden:] = 0
    halves = fc1.view(EXPERTS, 2, -1, HIDDEN)
    halves[:, :, inter:] = 0
    halves[..., hidden:] = 0
    fc2[:, hidden:] = 0
    fc2[..., inter:] = 0
    return replace(native, x=x, fc1=fc1, fc2=fc2)


def test_valid_sizes_of_a_padded_layer(seed: int) -> None:
    hidden, inter = 200, 136
    real = layouts.random_layer

    def with_padding(*args: Any) -> Any:
        x, fc1, fc2 = real(*args)
        zeroed = padded(
            Native("", "Swiglu", {}, {}, x.float(), fc1.float(), fc2.float(), tolerance=0.0),
            hidden,
            inter,
        )
        return zeroed.x.bfloat16(), zeroed.fc1.bfloat16(), zeroed.fc2.bfloat16()

    for name in ("bf16_mxfp4", "mxint4"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layouts, "random_layer", with_padding)
            native = FORMATS[name](seed)
        ids, weights = pairs(seed)
        sizes: dict[str, Any] = {
            "valid_hidden_size": hidden,
            "valid_intermediate_size": inter,
        }
        got = call(native, topk_ids=packed(ids, weights), **sizes)
        wanted = plain.output(native, ids.tolist(), weights)[:, :hidden]
        assert got.shape == (TOKENS, hidden)
        assert plain.error(got, wanted) < native.tolerance


def test_what_lies_beyond_the_valid_sizes_is_not_read(seed: int) -> None:
    """H = I = 256 with valid sizes up to 128: FC2 has 128 rows, the rest may hold anything."""
    native = FORMATS["mxfp8"](seed)
    ids, weights = pairs(seed)
    scale = native.shared["hidden_states_scale"].clone()
    scale[:, 4:] = 255  # NaN
    _, _, fc2 = layouts.random_layer(seed, True)
    values, exponents = stored.mxfp8(fc2[:, :128])
    narrow = {
        "hidden_states_scale": scale,
        "gemm2_weights": stored.shuffled_bytes(values, False),
        "gemm2_weights_scale": stored.shuffled_scales(exponents, False),
        "valid_hidden_size": 120,
        "valid_intermediate_size": 100,
    }
    got = call(native, topk_ids=packed(ids, weights), **narrow)
    cut = replace(
        native,
        x=native.x[:, :128],
        fc1=native.fc1.view(EXPERTS, 2, -1, HIDDEN)[:, :, :128, :128].flatten(1, 2),
        fc2=native.fc2[:, :120, :128],
    )
    assert plain.error(got, plain.output(cut, ids.tolist(), weights)) < native.tolerance


def test_a_narrow_output_is_the_first_columns(seed: int) -> None:
    native = FORMATS["nvfp4"](seed)
    ids, weights = pairs(seed)
    whole = call(native, topk_ids=packed(ids, weights))
    output = torch.empty(TOKENS, 200, dtype=torch.bfloat16)
    call(native, topk_ids=packed(ids, weights), output=output)
    assert torch.equal(output, whole[:, :200])
