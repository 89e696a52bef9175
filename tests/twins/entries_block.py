"""The entries with block scales: FP8 block (DeepSeekFp8, MxFp8), FP4 and MXINT4."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tests.twins import formats, limits
from tests.twins.activation import parameters
from tests.twins.checks import Arguments, ContractError, require
from tests.twins.compute import Experts, as_it_is, ones
from tests.twins.enums import ActivationType, Fp8QuantizationType, SfLayout, WeightLayout
from tests.twins.launch import Launch, Matrix, bias, check_layout, orders, swizzled_scales
from tests.twins.layout import canonical_rows, unblocked
from tests.twins.sizes import Sizes, sizes
from torch import Tensor

E4M3 = [torch.float8_e4m3fn]
BYTE = [torch.uint8]
FP32 = [torch.float32]
BYTES_PER_BLOCK = 128


def fp8_block(args: Arguments) -> Launch:
    """trtllm_fp8_block_scale_moe and its routed form."""
    given = args.fp8_quantization_type
    known = [Fp8QuantizationType.DeepSeekFp8, Fp8QuantizationType.MxFp8]
    require(given in known, "fp8_quantization_type", given, "DeepSeekFp8 or MxFp8")
    by_type = _deepseek if given == Fp8QuantizationType.DeepSeekFp8 else _mxfp8
    size, experts = by_type(args)
    return Launch(size, experts, recheck=limits.check_fp8_block)


def _deepseek(args: Arguments) -> tuple[Sizes, Experts]:
    size = sizes(args, "deepseek_fp8")
    check_layout(args, shuffled=False, layouts=(WeightLayout.MajorK, WeightLayout.BlockMajorK))
    rows = args.tensor("hidden_states", E4M3, [size.tokens, size.hidden])
    shape = [size.hidden // 128, size.tokens]
    scale = args.tensor("hidden_states_scale", FP32, shape)
    shape = [size.local, size.rows // 128, size.hidden // 128]
    scale1 = args.tensor("gemm1_weights_scale", FP32, shape)
    shape = [size.local, size.out_rows // 128, size.inter // 128]
    scale2 = args.tensor("gemm2_weights_scale", FP32, shape)
    epilogue = 64 if args.use_shuffled_weight else None
    order = orders(size, epilogue=epilogue, interleaved=False)
    gemm1 = _deepseek_weights(args, "gemm1_weights", size.local, size.rows, size.hidden)
    gemm2 = _deepseek_weights(args, "gemm2_weights", size.local, size.out_rows, size.inter)
    one = ones(size, rows.device)
    experts = Experts(
        rows=formats.scaled(rows.float(), scale.T),
        fc1=lambda expert: _tiles(canonical_rows(gemm1(expert), order.fc1), scale1[expert]),
        fc2=lambda expert: _tiles(canonical_rows(gemm2(expert), order.fc2), scale2[expert]),
        activation=parameters(args, size),
        gate_scale=one,
        out_scale=one,
        fc2_scale=one,
        stored=formats.through_groups128,
        between=formats.through_groups128,
        fc1_bias=bias(args, "gemm1_bias", size, order.fc1),
        fc2_bias=bias(args, "gemm2_bias", size, order.fc2),
    )
    return size, experts


def _deepseek_weights(args: Arguments, name: str, local: int, rows: int, columns: int) -> Matrix:
    if args.weight_layout == WeightLayout.MajorK:
        whole = args.tensor(name, E4M3, [local, rows, columns])
        return lambda expert: formats.e4m3_values(whole[expert])
    shape = [local, columns // BYTES_PER_BLOCK, rows, BYTES_PER_BLOCK]
    blocks = args.tensor(name, E4M3, shape)
    return lambda expert: unblocked(formats.e4m3_values(blocks[expert]))


def _tiles(weights: Tensor, scales: Tensor) -> Tensor:
    """[M, K] with one scale per 128 x 128."""
    return formats.scaled(weights, scales.repeat_interleave(128, dim=0))


def _mxfp8(args: Arguments) -> tuple[Sizes, Experts]:
    size = sizes(args, "mxfp8")
    check_layout(args, shuffled=True, layouts=(WeightLayout.MajorK,))
    rows = args.tensor("hidden_states", E4M3, [size.tokens, size.hidden])
    scale = args.flat("hidden_states_scale", BYTE, [size.tokens, size.hidden // 32])
    gemm1 = args.tensor("gemm1_weights", E4M3, [size.local, size.rows, size.hidden])
    gemm2 = args.tensor("gemm2_weights", E4M3, [size.local, size.out_rows, size.inter])
    shape = [size.local, size.rows, size.hidden // 32]
    scale1 = args.flat("gemm1_weights_scale", BYTE, shape)
    shape = [size.local, size.out_rows, size.inter // 32]
    scale2 = args.flat("gemm2_weights_scale", BYTE, shape)
    order = orders(size)
    one = ones(size, rows.device)
    decode = _Decoder(formats.e4m3_values, formats.e8m0_values)
    experts = Experts(
        rows=formats.scaled(rows.float(), formats.e8m0_values(scale)),
        fc1=decode.matrix(gemm1, scale1, order.fc1),
        fc2=decode.matrix(gemm2, scale2, order.fc2),
        activation=parameters(args, size),
        gate_scale=one,
        out_scale=one,
        fc2_scale=one,
        between=formats.through_mxfp8,
        fc1_bias=bias(args, "gemm1_bias", size, order.fc1),
        fc2_bias=bias(args, "gemm2_bias", size, order.fc2),
    )
    return size, experts


@dataclass(frozen=True)
class _Decoder:
    """Stored weights to fp32, and stored scales to fp32."""

    values: Callable[[Tensor], Tensor]
    scales: Callable[[Tensor], Tensor]

    def matrix(self, weights: Tensor, scales: Tensor, order: Tensor) -> Matrix:
        """MajorK weights with swizzled scales, by expert, canonical and dequantised."""
        linear = swizzled_scales(scales, order)

        def dequantised(expert: int) -> Tensor:
            values = canonical_rows(self.values(weights[expert]), order)
            return formats.scaled(values, self.scales(linear(expert)))

        return dequantised


@dataclass(frozen=True)
class _Fp4:
    """One activation format beside FP4 weights: its scale's vector size and FC2's input."""

    vector: int
    weights: int
    scales: Callable[[Tensor], Tensor]
    between: Callable[[Tensor], Tensor]
    scalars: bool


_FP4: dict[str, _Fp4] = {
    "nvfp4": _Fp4(16, 16, formats.e4m3_values, formats.through_nvfp4, scalars=True),
    "mxfp8_mxfp4": _Fp4(32, 32, formats.e8m0_values, formats.through_mxfp8, scalars=False),
    "bf16_mxfp4": _Fp4(0, 32, formats.e8m0_values, formats.bf16, scalars=False),
    "e4m3_mxfp4": _Fp4(0, 32, formats.e8m0_values, formats.e4m3, scalars=True),
}
_OUTPUT_SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")


def fp4_block(args: Arguments) -> Launch:
    """trtllm_fp4_block_scale_moe and its routed form: the formats are inferred from the scales."""
    name = _activation_format(args)
    packed = 2 if args.hidden_states.dtype == torch.uint8 else 1
    size = sizes(args, name, packed=packed)
    fmt = _FP4[name]
    rows = _fp4_rows(args, size, name)
    order = orders(size)
    decode = _Decoder(formats.fp4_values, fmt.scales)
    shape = [size.local, size.rows, size.hidden]
    gemm1, scale1 = _fp4_weights(args, "gemm1_weights", shape, fmt)
    shape = [size.local, size.out_rows, size.inter]
    gemm2, scale2 = _fp4_weights(args, "gemm2_weights", shape, fmt)
    out, gate, fc2 = (_scalar(args, size, scalar, fmt) for scalar in _OUTPUT_SCALARS)
    experts = Experts(
        rows=rows,
        fc1=decode.matrix(gemm1, scale1, order.fc1),
        fc2=decode.matrix(gemm2, scale2, order.fc2),
        activation=parameters(args, size, anywhere=True),
        gate_scale=gate,
        out_scale=out,
        fc2_scale=fc2,
        between=fmt.between,
        fc1_bias=bias(args, "gemm1_bias", size, order.fc1),
        fc2_bias=bias(args, "gemm2_bias", size, order.fc2),
    )
    return Launch(size, experts, listed=True)


def _activation_format(args: Arguments) -> str:
    """The row of _FP4 that the dtype and the scale's element count select."""
    rows, scale = args.hidden_states, args.hidden_states_scale
    require(isinstance(rows, Tensor) and rows.ndim == 2, "hidden_states", rows, "a tensor [T, H]")
    require(rows.shape[0] > 0, "hidden_states", list(rows.shape), "at least one token")
    require(scale is None or scale.numel() > 0, "hidden_states_scale", scale, "scales or None")
    if rows.dtype == torch.bfloat16:
        require(scale is None, "hidden_states_scale", scale, "None beside bf16 rows")
        return "bf16_mxfp4"
    if rows.dtype == torch.float8_e4m3fn:
        return "e4m3_mxfp4" if scale is None else _by_vector(rows.numel(), scale, 32, "mxfp8_mxfp4")
    require(rows.dtype == torch.uint8, "hidden_states", rows.dtype, "bf16, e4m3 or packed uint8")
    require(scale is not None, "hidden_states_scale", None, "e4m3 scales beside FP4 rows")
    return _by_vector(rows.numel() * 2, scale, 16, "nvfp4")


def _by_vector(values: int, scale: Tensor, vector: int, name: str) -> str:
    given = values // scale.numel()
    expected = f"one scale per {vector} values for {name}"
    require(given == vector, "hidden_states_scale", f"one per {given}", expected)
    return name


def _fp4_rows(args: Arguments, size: Sizes, name: str) -> Tensor:
    """The rows in fp32, with their block scales where they have some."""
    packed = args.hidden_states.dtype == torch.uint8
    shape = [size.tokens, size.hidden // 2 if packed else size.hidden]
    stored = args.tensor("hidden_states", [args.hidden_states.dtype], shape)
    values = formats.fp4_values(stored) if packed else stored.float()
    fmt = _FP4[name]
    if not fmt.vector:
        return values
    _check_scale_layout(args.hidden_states_scale_layout)
    shape = [size.tokens, size.hidden // fmt.vector]
    scale = args.flat("hidden_states_scale", E4M3, shape)
    return formats.scaled(values, fmt.scales(scale))


def _check_scale_layout(given: object) -> None:
    if given is None:
        text = "hidden_states_scale without hidden_states_scale_layout is deprecated"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return
    linear = given == SfLayout.layout_linear
    require(linear, "hidden_states_scale_layout", given, "layout_linear: routed rows need it")


def _fp4_weights(args: Arguments, name: str, shape: list[int], fmt: _Fp4) -> tuple[Tensor, Tensor]:
    local, rows, columns = shape
    weights = args.tensor(name, BYTE, [local, rows, columns // 2])
    # The launcher infers the format from this count; any other has no kernel beside these rows.
    scales = args.flat(f"{name}_scale", E4M3, [local, rows, columns // fmt.weights])
    return weights, scales


def _scalar(args: Arguments, size: Sizes, name: str, fmt: _Fp4) -> Tensor:
    given = args.optional(name, FP32, [size.local])
    if given is not None:
        return given
    if fmt.scalars:
        raise ContractError(name, None, f"fp32 [{size.local}]: required by this format")
    return ones(size, args.hidden_states.device)


def mxint4_block(args: Arguments) -> Launch:
    """trtllm_mxint4_block_scale_moe and its routed form."""
    size = sizes(args, "bf16_mxint4")
    bf16 = [torch.bfloat16]
    rows = args.tensor("hidden_states", bf16, [size.tokens, size.hidden])
    order = orders(size)
    one = ones(size, rows.device)
    activation = parameters(args, size)
    assert activation.kind is ActivationType.Swiglu
    fc1 = _mxint4_matrix(args, "gemm1_weights", [size.local, size.rows, size.hidden], order.fc1)
    fc2 = _mxint4_matrix(args, "gemm2_weights", [size.local, size.out_rows, size.inter], order.fc2)
    experts = Experts(
        rows=rows.float(),
        fc1=fc1,
        fc2=fc2,
        activation=activation,
        gate_scale=one,
        out_scale=one,
        fc2_scale=one,
        stored=as_it_is,
        between=formats.bf16,
    )
    return Launch(size, experts, pair=False, listed=True)


def _mxint4_matrix(args: Arguments, name: str, shape: list[int], order: Tensor) -> Matrix:
    local, rows, columns = shape
    blocked = [local, columns // 2 // BYTES_PER_BLOCK, rows, BYTES_PER_BLOCK]
    blocks = args.tensor(name, BYTE, blocked)
    scales = args.flat(f"{name}_scale", [torch.bfloat16], [local, rows, columns // 32])
    linear = swizzled_scales(scales, order)

    def dequantised(expert: int) -> Tensor:
        values = canonical_rows(formats.int4_values(unblocked(blocks[expert])), order)
        return formats.scaled(values, linear(expert).float())

    return dequantised
