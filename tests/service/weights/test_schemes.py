"""Every scheme's numbers against its published formula, written out in numpy and ml_dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from expertd.core import Activation, ActivationKind, LayerSpec, QuantScheme
from expertd.weights.canonical import ExpertWeights
from expertd.weights.dequant import (
    dequantize,
    dequantize_to,
    e2m1_to_float,
    e4m3_to_float,
    e8m0_to_float,
    int4_to_float,
)
from expertd.weights.matrix import allocate
from expertd.weights.quantize import quantize, to_e2m1
from expertd.weights.storage import layer_bytes, layer_parts

# The largest |w - dequantised(quantised(w))| relative to the largest |w| that one scale covers:
# half a step of the format at its top, e4m3 2**-4, e2m1 1/6, int4 0.5/7.5, and what the scale's own
# rounding adds (e8m0 saturates up to 8/6 of e2m1's range, bf16 2**-9).
TOLERANCE = {
    QuantScheme.FP32: 0.0,
    QuantScheme.BF16: 2**-8,
    QuantScheme.FP16: 2**-10,
    QuantScheme.FP8_TENSOR: 2**-4,
    QuantScheme.FP8_CHANNEL: 2**-4,
    QuantScheme.FP8_BLOCK128: 2**-4,
    QuantScheme.MXFP8: 2**-4,
    QuantScheme.NVFP4: 1 / 6 + 2**-4,
    QuantScheme.MXFP4: 1 / 4,
    QuantScheme.MXINT4: 1 / 15 + 2**-8,
}
SCHEMES = list(QuantScheme)


def spec_of(
    quant: QuantScheme, hidden: int = 160, width: int = 96, held: int = 3, gated: bool = True
) -> LayerSpec:
    kind = ActivationKind.SWIGLU if gated else ActivationKind.RELU2
    return LayerSpec(hidden, width, held, 0, held, Activation(kind), quant, routing=None)


def random_experts(spec: LayerSpec, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    print(f"seed {seed}")
    random = torch.Generator().manual_seed(seed)
    w13 = torch.randn(spec.held, spec.rows13, spec.hidden, generator=random)
    w2 = torch.randn(spec.held, spec.hidden, spec.intermediate, generator=random)
    w13[:, ::3] *= 30  # magnitudes that differ from row to row and from half to half
    w13[:, : spec.intermediate] *= 0.2
    w2[0, :33] = 0  # whole groups of zeros
    return w13, w2


def arrays(weights: ExpertWeights) -> dict[str, np.ndarray[Any, Any]]:
    """The raw bytes of each tensor under the dtype that its scheme gives them."""
    views = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    }
    found = {}
    for name, tensor in weights.tensors.items():
        bits, dtype = views.get(tensor.dtype, (tensor.dtype, None))
        array = tensor.view(bits).numpy()
        found[name] = array if dtype is None else array.view(dtype)
    return found


def unpack(codes: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    """Bytes of two values, low nibble first, through ml_dtypes' own 4-bit types."""
    values = np.empty((*codes.shape[:-1], codes.shape[-1] * 2), np.float32)
    values[..., ::2] = (codes & 15).view(np.uint8).astype(np.uint8).view(dtype).astype(np.float32)
    values[..., 1::2] = (codes >> 4).astype(np.uint8).view(dtype).astype(np.float32)
    return values


def by_formula(
    quant: QuantScheme,
    codes: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any] | None,
    global_scale: np.ndarray[Any, Any] | None,
    rows: int,
) -> np.ndarray[Any, Any]:
    """One matrix [N, K] element by element: value(n, k) * scale(n, k) * global(n).

    rows: how many rows of it belong to one scale of a matrix (its halves have their own).
    """
    if quant in (QuantScheme.NVFP4, QuantScheme.MXFP4):
        values = unpack(codes, ml_dtypes.float4_e2m1fn)
    elif quant is QuantScheme.MXINT4:
        values = unpack(codes, ml_dtypes.int4)
    else:
        values = codes.astype(np.float32)
    if scale is None:
        return values
    if scale.dtype == np.uint8:
        scale = scale.view(ml_dtypes.float8_e8m0fnu)
    scale = scale.astype(np.float32)
    out = np.empty_like(values)
    group = {QuantScheme.NVFP4: 16, QuantScheme.FP8_BLOCK128: 128}.get(quant, 32)
    for n, k in np.ndindex(values.shape):
        if quant is QuantScheme.FP8_TENSOR:
            s = scale[n // rows]
        elif quant is QuantScheme.FP8_CHANNEL:
            s = scale[n]
        elif quant is QuantScheme.FP8_BLOCK128:
            per_half = -(-rows // 128)
            s = scale[n // rows * per_half + n % rows // 128, k // 128]
        else:
            s = scale[n, k // group]
        out[n, k] = values[n, k] * (s if global_scale is None else s * global_scale[n // rows])
    return out


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("quant", SCHEMES)
def test_dequantised_is_the_formula(quant: QuantScheme, gated: bool) -> None:
    spec = spec_of(quant, gated=gated)
    weights = quantize(*random_experts(spec, 1), quant, gated=gated, tied=False)
    raw = arrays(weights)
    for expert in range(spec.held):
        parts13 = [raw[n][expert] if n in raw else None for n in ("w13", "scale13", "global13")]
        parts2 = [raw[n][expert] if n in raw else None for n in ("w2", "scale2", "global2")]
        w13, w2 = dequantize(weights, expert)
        expected13 = by_formula(quant, *parts13, rows=spec.intermediate)
        expected2 = by_formula(quant, *parts2, rows=spec.hidden)
        np.testing.assert_array_equal(w13.numpy(), expected13)
        np.testing.assert_array_equal(w2.numpy(), expected2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quant", SCHEMES)
def test_quantised_is_close_to_what_was_given(quant: QuantScheme, tied: bool) -> None:
    spec = spec_of(quant)
    given13, given2 = random_experts(spec, 2)
    weights = quantize(given13, given2, quant, tied=tied)
    for expert in range(spec.held):
        w13, w2 = dequantize(weights, expert)
        for got, given in ((w13, given13[expert]), (w2, given2[expert])):
            reach = reach_of(quant, given, spec.intermediate if got is w13 else spec.hidden, tied)
            assert ((got - given).abs() <= TOLERANCE[quant] * reach + 2**-25).all()


def reach_of(quant: QuantScheme, given: torch.Tensor, rows: int, tied: bool) -> torch.Tensor:
    """For each element the largest magnitude under the same scale."""
    out = torch.empty_like(given)
    if quant in (QuantScheme.FP32, QuantScheme.BF16, QuantScheme.FP16):
        return given.abs()
    if quant is QuantScheme.FP8_TENSOR:
        for begin in range(0, len(given), rows):
            half = given if tied else given[begin : begin + rows]
            out[begin : begin + rows] = half.abs().max()
        return out
    if quant is QuantScheme.FP8_CHANNEL:
        return given.abs().amax(1, keepdim=True).expand_as(given)
    tall, wide = {QuantScheme.FP8_BLOCK128: (128, 128), QuantScheme.NVFP4: (1, 16)}.get(
        quant, (1, 32)
    )
    for begin in range(0, len(given), rows):
        for n in range(begin, begin + rows, tall):
            for k in range(0, given.shape[1], wide):
                block = (slice(n, min(n + tall, begin + rows)), slice(k, k + wide))
                out[block] = given[block].abs().max()
    return out


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("quant", SCHEMES)
def test_shapes_are_the_tables(quant: QuantScheme, gated: bool) -> None:
    spec = spec_of(quant, gated=gated)
    made = quantize(*random_experts(spec, 3), quant, gated=gated)
    table = {name: (f"torch.{dtype}", shape) for name, (dtype, shape) in layer_parts(spec).items()}
    assert {n: (str(t.dtype), tuple(t.shape)) for n, t in made.tensors.items()} == table
    assert layer_bytes(spec) == made.nbytes == allocate(spec, "cpu").nbytes


def test_every_e2m1_value_and_tie_rounds_as_the_standard_says() -> None:
    values = np.unique(np.concatenate([np.arange(-7, 7.001, 0.0625), [0.2500001, 5.0000005, 1e9]]))
    values = np.append(values, values[:1] * 0 - 0.0).astype(np.float32)
    values = values[: len(values) // 2 * 2]
    expected = values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    got = e2m1_to_float(to_e2m1(torch.from_numpy(values)[None]))[0].numpy()
    np.testing.assert_array_equal(got, expected)


def every_byte() -> torch.Tensor:
    """Each byte at each place modulo 256."""
    return (torch.arange(256)[None] + torch.arange(256)[:, None]).to(torch.uint8)


def test_every_e4m3_code_is_exact() -> None:
    codes = every_byte()
    expected = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got = e4m3_to_float(codes.view(torch.float8_e4m3fn))
    np.testing.assert_array_equal(got.numpy(), expected)
    assert torch.equal(got.signbit(), codes > 127), "-0.0 too"


@pytest.mark.parametrize(
    ("decode", "meaning"),
    [(e2m1_to_float, ml_dtypes.float4_e2m1fn), (int4_to_float, ml_dtypes.int4)],
)
def test_every_pair_of_nibbles_is_exact(
    decode: Callable[[torch.Tensor], torch.Tensor], meaning: type
) -> None:
    packed = every_byte()
    nibbles = np.stack((packed.numpy() & 15, packed.numpy() >> 4), -1).reshape(len(packed), -1)
    expected = nibbles.astype(np.uint8).view(meaning).astype(np.float32)
    np.testing.assert_array_equal(decode(packed).numpy(), expected)


def test_every_e8m0_value_is_exact() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    expected = bits.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(e8m0_to_float(bits).numpy(), expected)


def test_tied_halves_share_a_scale_and_untied_ones_do_not() -> None:
    spec = spec_of(QuantScheme.FP8_TENSOR)
    experts = random_experts(spec, 4)
    tied = quantize(*experts, QuantScheme.FP8_TENSOR).scale13
    untied = quantize(*experts, QuantScheme.FP8_TENSOR, tied=False).scale13
    assert tied is not None and untied is not None
    assert (tied[:, 0] == tied[:, 1]).all() and (untied[:, 0] < untied[:, 1]).all()


def test_plain_weights_of_the_dtype_asked_are_views() -> None:
    weights = quantize(*random_experts(spec_of(QuantScheme.BF16), 5), QuantScheme.BF16)
    w13, _ = dequantize_to(weights, 1, torch.bfloat16)
    assert w13.data_ptr() == weights.w13[1].data_ptr()
