"""FlashInfer's cutlass_fused_moe: routed only, canonical weights as they are on SM90."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from expertd.capability.row import KernelCall, Limits, Row, Use
from expertd.core import ActivationKind, PlanMode, QuantScheme

ARCHS = ("sm89", "sm90", "sm100", "sm103", "sm107", "sm120", "sm121")

_SWIGLU = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
# Swiglu with alpha, beta and limit is promoted to SwigluBias by the kernel library itself.
ACTIVATIONS: Mapping[ActivationKind, Use] = {
    ActivationKind.SWIGLU: Use("Swiglu", limit=_SWIGLU),
    ActivationKind.SWIGLU_OAI: Use("SwigluBias", _SWIGLU, limit=()),
    ActivationKind.SWIGLU_STEP: Use("SwigluStep", ("swiglu_limit",), (), since="0.6.13"),
    ActivationKind.GEGLU: Use("Geglu"),
    ActivationKind.GEGLU_TANH: Use("GegluTanh", since="0.6.15"),
    ActivationKind.RELU2: Use("Relu2"),
    # 0.6.16 to 0.6.18 name Situ in Python, but its number is another function in the kernels.
    ActivationKind.SITU: Use("Situ", ("situ_beta", "situ_linear_beta"), since="0.7.0"),
}

PASSES = (
    "input",
    "token_selected_experts",
    "token_final_scales",
    "fc1_expert_weights",
    "fc2_expert_weights",
    "output_dtype",
    "quant_scales",
    "fc1_expert_biases",
    "fc2_expert_biases",
    "ep_size",
    "ep_rank",
    "output",
    "activation_type",
    "tune_max_num_tokens",
)
_CALL = KernelCall("cutlass_fused_moe", PASSES, prefers=("use_fused_finalize", "workspace_buffer"))

_BF16 = Row(
    backend="flashinfer_cutlass",
    entry="cutlass_fused_moe",
    mode=PlanMode.ROUTED,
    archs=ARCHS,
    quants=(QuantScheme.BF16, QuantScheme.FP16),
    activation_quant="bf16",
    activations=ACTIVATIONS,
    load="expertd.backends.flashinfer_cutlass.backend:Cutlass",
    expert_bias=True,
    expert_range="equal",
    limits=Limits(hidden_multiple=8, intermediate_multiple=8),
    # It switches the fused finalize off, which adds with atomics.
    repeats_with="use_fused_finalize",
    library="flashinfer",
    call=_CALL,
    since="0.6.8",
)
_MIXED = replace(
    _BF16,
    archs=("sm90",),
    quants=(QuantScheme.MXFP4,),
    limits=Limits(hidden_multiple=128, intermediate_multiple=128),
    repeats_with="",
    # Before, a race of TMA descriptors gave wrong tiles now and then (reverted and fixed again).
    since="0.6.18",
)


def _passing(*flags: str) -> KernelCall:
    return replace(_CALL, passes=PASSES + flags)


ROWS = (
    _BF16,
    replace(
        _BF16,
        quants=(QuantScheme.FP8_TENSOR,),
        activation_quant="fp8_tensor",
        limits=Limits(hidden_multiple=16, intermediate_multiple=16),
    ),
    replace(
        _BF16,
        archs=("sm90",),
        quants=(QuantScheme.FP8_BLOCK128,),
        activation_quant="fp8_group128",
        limits=Limits(hidden_multiple=128, intermediate_multiple=128),
        call=_passing("use_deepseek_fp8_block_scale"),
    ),
    replace(_MIXED, call=_passing("use_w4_group_scaling")),
    replace(
        _MIXED,
        activation_quant="fp8",
        call=_passing("use_w4_group_scaling", "use_wfp4afp8_humming"),
    ),
)
