"""The entries without block scales: bf16, FP8 per tensor and FP8 per channel."""

from __future__ import annotations

import torch
from tests.twins import formats
from tests.twins.activation import parameters
from tests.twins.checks import Arguments, require
from tests.twins.compute import Experts, ones
from tests.twins.enums import ActivationType, RoutingMethodType, WeightLayout
from tests.twins.launch import Launch, Matrix, check_layout, orders, scalars
from tests.twins.layout import canonical_columns, canonical_rows, unblocked
from tests.twins.sizes import Sizes, sizes
from torch import Tensor

BLOCK = 64
"""bf16 values in the 128 bytes of a BlockMajorK block."""
E4M3 = [torch.float8_e4m3fn]


def bf16(args: Arguments) -> Launch:
    """trtllm_bf16_moe and trtllm_bf16_routed_moe."""
    size = sizes(args, "bf16")
    check_layout(args, shuffled=True, layouts=(WeightLayout.BlockMajorK,))
    dtype = [torch.bfloat16]
    rows = args.tensor("hidden_states", dtype, [size.tokens, size.hidden])
    shape = [size.local, size.hidden // BLOCK, size.rows, BLOCK]
    gemm1 = args.tensor("gemm1_weights", dtype, shape)
    shape = [size.local, size.inter // BLOCK, size.hidden, BLOCK]
    gemm2 = args.tensor("gemm2_weights", dtype, shape)
    order = orders(size)
    one = ones(size, rows.device)
    experts = Experts(
        rows=rows.float(),
        fc1=lambda expert: canonical_rows(unblocked(gemm1[expert]), order.fc1).float(),
        fc2=lambda expert: canonical_rows(unblocked(gemm2[expert]), order.fc2).float(),
        activation=parameters(args, size),
        gate_scale=one,
        out_scale=one,
        fc2_scale=one,
        between=formats.bf16,
    )
    return Launch(size, experts)


def fp8_per_tensor(args: Arguments) -> Launch:
    """trtllm_fp8_per_tensor_scale_moe and its routed form."""
    size = sizes(args, "fp8_per_tensor")
    rows = args.tensor("hidden_states", E4M3, [size.tokens, size.hidden])
    out, gate, fc2 = scalars(
        args,
        size,
        "output1_scales_scalar",
        "output1_scales_gate_scalar",
        "output2_scales_scalar",
    )
    _check_step_limit(args, size)
    weigh_input = args.flag("use_routing_scales_on_input")
    _check_input_scales(args, weigh_input)
    fc1_rows, fc2_rows = _e4m3_weights(args, size)
    experts = Experts(
        rows=rows.float(),
        fc1=fc1_rows,
        fc2=fc2_rows,
        activation=parameters(args, size),
        gate_scale=gate,
        out_scale=out,
        fc2_scale=fc2,
        between=formats.e4m3,
    )
    return Launch(size, experts, weigh_input=weigh_input)


def fp8_per_channel(args: Arguments) -> Launch:
    """trtllm_fp8_per_channel_scale_moe and its routed form.

    With use_routing_scales_on_input the kernels read the token scales where the routing weights
    would be and finalize skips them, so the routing weights are lost.
    """
    size = sizes(args, "fp8_per_channel")
    fp32 = [torch.float32]
    rows = args.tensor("hidden_states", E4M3, [size.tokens, size.hidden])
    token = args.tensor("hidden_states_scale", fp32, [size.tokens, 1])
    shape = [size.local, size.rows]
    channel1 = args.tensor("gemm1_per_channel_weight_scale", fp32, shape)
    shape = [size.local, size.hidden]
    channel2 = args.tensor("gemm2_per_channel_weight_scale", fp32, shape)
    out, gate, fc2 = scalars(
        args, size, "output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"
    )
    lost = args.flag("use_routing_scales_on_input")
    if lost and not args.routed:
        shape = [size.tokens, size.experts]
        args.tensor("routing_logits", [torch.bfloat16], shape)  # fp32 only without input scales
    order = orders(size)
    channel1 = canonical_columns(channel1, order.fc1)
    channel2 = canonical_columns(channel2, order.fc2)
    fc1_rows, fc2_rows = _e4m3_weights(args, size)
    experts = Experts(
        rows=rows.float() * token,
        fc1=lambda expert: fc1_rows(expert) * channel1[expert].unsqueeze(1),
        fc2=lambda expert: fc2_rows(expert) * channel2[expert].unsqueeze(1),
        activation=parameters(args, size),
        gate_scale=gate,
        out_scale=out,
        fc2_scale=fc2,
        between=formats.through_rows,
    )
    return Launch(size, experts, pair=False, ignore_weights=lost)


def _e4m3_weights(args: Arguments, size: Sizes) -> tuple[Matrix, Matrix]:
    """MajorK, shuffled e4m3 weights by expert, in canonical rows and stored units."""
    gemm1 = args.tensor("gemm1_weights", E4M3, [size.local, size.rows, size.hidden])
    gemm2 = args.tensor("gemm2_weights", E4M3, [size.local, size.hidden, size.inter])
    order = orders(size)
    return _by_expert(gemm1, order.fc1), _by_expert(gemm2, order.fc2)


def _by_expert(weights: Tensor, order: Tensor) -> Matrix:
    return lambda expert: canonical_rows(formats.e4m3_values(weights[expert]), order)


def _check_step_limit(args: Arguments, size: Sizes) -> None:
    given = args.gemm1_clamp_limit is not None
    step = size.activation is ActivationType.SwigluStep
    name = size.activation.name
    require(step or not given, "gemm1_clamp_limit", f"one with {name}", "None but for SwigluStep")


def _check_input_scales(args: Arguments, weigh_input: bool) -> None:
    """Only Llama4 fills the token scales that FC1 would read."""
    llama4 = args.routing_method_type == RoutingMethodType.Llama4
    name = "use_routing_scales_on_input"
    require(llama4 or not weigh_input, name, True, "False but for Llama4")
