"""FlashInfer's trtllm_* entries on SM100, SM103, SM107: routing by themselves, and routed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from expertd.capability.row import KernelCall, Limits, Row, Use
from expertd.capability.rows.trtllm_routing import ROUNDING, ROUTING
from expertd.core import ActivationKind, PlanMode, QuantScheme
from expertd.routing.rounding import Rounding

ARCHS = ("sm100", "sm103", "sm107")
LOGITS = ("float32", "bfloat16")

_KIND = ("activation_type",)
_SWIGLU = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
PLAIN = {ActivationKind.SWIGLU: Use("Swiglu")}
CLAMPED = {
    ActivationKind.SWIGLU: Use("Swiglu", limit=_SWIGLU),
    ActivationKind.SWIGLU_OAI: Use("Swiglu", _SWIGLU, limit=()),
}
RELU2 = {ActivationKind.RELU2: Use("Relu2", _KIND)}
# Without a limit of its own the kernel clamps at 7, so one is always passed.
_STEP = Use("SwigluStep", (*_KIND, "gemm1_clamp_limit"), (), since="0.6.18")
STEP = {ActivationKind.SWIGLU_STEP: _STEP}
FP4_ONLY = {
    ActivationKind.GEGLU: Use("Geglu", _KIND),
    ActivationKind.SITU: Use("Situ", (*_KIND, *_SWIGLU), since="0.7.0"),
}

_SHAPE = (
    "num_experts",
    "top_k",
    "n_group",
    "topk_group",
    "intermediate_size",
    "local_expert_offset",
    "local_num_experts",
    "routed_scaling_factor",
    "routing_method_type",
    "do_finalize",
    "tune_max_num_tokens",
)
_WEIGHTS = ("hidden_states", "gemm1_weights", "gemm2_weights")
_SCALES = ("gemm1_weights_scale", "gemm2_weights_scale")
_TENSOR_SCALARS = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
_SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
_WISHES = ("output", "activation_type")
_VALID = ("valid_hidden_size", "valid_intermediate_size")

BF16 = Row(
    backend="flashinfer_trtllm",
    entry="trtllm_bf16_moe",
    mode=PlanMode.MONOLITHIC,
    archs=ARCHS,
    quants=(QuantScheme.BF16,),
    activation_quant="bf16",
    activations=CLAMPED | RELU2 | STEP,
    load="expertd.backends.flashinfer_trtllm.backend:Bf16",
    limits=Limits(
        hidden_multiple=128,
        intermediate_multiple=128,
        padded=("intermediate",),
        max_experts=2048,
        max_top_k=32,
    ),
    library="flashinfer",
    call=KernelCall(
        "trtllm_bf16_moe",
        (*_WEIGHTS, *_SHAPE, "use_shuffled_weight", "weight_layout"),
        prefers=_WISHES,
        members=(("WeightLayout", "BlockMajorK"),),
        pair_since="0.7.0",
    ),
    since="0.6.8",
)
PER_TENSOR = replace(
    BF16,
    entry="trtllm_fp8_per_tensor_scale_moe",
    quants=(QuantScheme.FP8_TENSOR,),
    activation_quant="fp8_tensor",
    activations=PLAIN | RELU2 | {ActivationKind.SWIGLU_STEP: _STEP._replace(since="0.7.2.post1")},
    load="expertd.backends.flashinfer_trtllm.backend:Fp8PerTensor",
    weight_sites=("output", "input"),
    call=KernelCall(
        "trtllm_fp8_per_tensor_scale_moe",
        (*_WEIGHTS, *_TENSOR_SCALARS, *_SHAPE, "use_routing_scales_on_input", "routing_bias"),
        prefers=_WISHES,
        pair_since="0.7.0",
    ),
)
PER_CHANNEL = replace(
    PER_TENSOR,
    entry="trtllm_fp8_per_channel_scale_moe",
    quants=(QuantScheme.FP8_CHANNEL,),
    activation_quant="fp8_token",
    activations=PLAIN | RELU2,
    load="expertd.backends.flashinfer_trtllm.backend:Fp8PerChannel",
    # With weights on the input its first GEMM reads the token scales in their place: they are lost.
    weight_sites=("output",),
    # This entry alone has no output argument in any version: its result is copied once.
    call=KernelCall(
        "trtllm_fp8_per_channel_scale_moe",
        (
            *_WEIGHTS,
            "hidden_states_scale",
            "gemm1_per_channel_weight_scale",
            "gemm2_per_channel_weight_scale",
            *_SCALARS,
            *_SHAPE,
            "use_routing_scales_on_input",
            "routing_bias",
        ),
        prefers=_KIND,
    ),
    since="0.7.0",
)
_FP8_BLOCK = KernelCall(
    "trtllm_fp8_block_scale_moe",
    (
        *_WEIGHTS,
        "hidden_states_scale",
        *_SCALES,
        *_SHAPE,
        "routing_bias",
        "use_shuffled_weight",
        "weight_layout",
        "fp8_quantization_type",
    ),
    prefers=_WISHES,
    pair_since="0.7.0",
)
DEEPSEEK_FP8 = replace(
    BF16,
    entry="trtllm_fp8_block_scale_moe",
    quants=(QuantScheme.FP8_BLOCK128,),
    activation_quant="fp8_group128",
    activations=CLAMPED,
    formats=("fp8_group128",),
    load="expertd.backends.flashinfer_trtllm.backend:Fp8Block",
    limits=replace(BF16.limits, experts_multiple=4, more_experts_than_top_k=True),
    call=replace(
        _FP8_BLOCK,
        members=(("WeightLayout", "MajorK"), ("Fp8QuantizationType", "DeepSeekFp8")),
    ),
)
MXFP8 = replace(
    DEEPSEEK_FP8,
    quants=(QuantScheme.MXFP8,),
    activation_quant="mxfp8",
    activations=CLAMPED | RELU2 | STEP,
    formats=("mxfp8",),
    load="expertd.backends.flashinfer_trtllm.backend:MxFp8",
    limits=replace(DEEPSEEK_FP8.limits, padded=("hidden", "intermediate")),
    call=replace(
        _FP8_BLOCK,
        padding=_VALID,
        members=(("WeightLayout", "MajorK"), ("Fp8QuantizationType", "MxFp8")),
    ),
)
NVFP4 = replace(
    BF16,
    entry="trtllm_fp4_block_scale_moe",
    quants=(QuantScheme.NVFP4,),
    activation_quant="nvfp4",
    activations=CLAMPED | RELU2 | STEP | FP4_ONLY,
    load="expertd.backends.flashinfer_trtllm.backend:Fp4",
    expert_bias=True,
    limits=replace(BF16.limits, padded=("hidden", "intermediate")),
    call=KernelCall(
        "trtllm_fp4_block_scale_moe",
        (
            *_WEIGHTS,
            "hidden_states_scale",
            *_SCALES,
            *_SCALARS,
            *_SWIGLU,
            "gemm1_bias",
            "gemm2_bias",
            *_SHAPE,
            "routing_bias",
        ),
        prefers=(*_WISHES, "hidden_states_scale_layout"),
        padding=_VALID,
        pair_since="0.6.12",
    ),
)
MXFP4_BF16 = replace(
    NVFP4,
    quants=(QuantScheme.MXFP4,),
    # FlashInfer's own tests expect this pair to fail on SM103.
    archs=("sm100", "sm107"),
    activation_quant="bf16",
    activations=CLAMPED,
)
MXFP4_MXFP8 = replace(
    NVFP4,
    quants=(QuantScheme.MXFP4,),
    activation_quant="mxfp8",
    activations=CLAMPED | RELU2,
    formats=("mxfp8",),
)
MXINT4 = replace(
    NVFP4,
    entry="trtllm_mxint4_block_scale_moe",
    quants=(QuantScheme.MXINT4,),
    activation_quant="bf16",
    # It takes alpha, beta and a clamp, but one of its paths drops them: plain SwiGLU only.
    activations=PLAIN,
    load="expertd.backends.flashinfer_trtllm.backend:MxInt4",
    expert_bias=False,
    limits=replace(NVFP4.limits, hidden_multiple=256, intermediate_multiple=256),
    call=KernelCall(
        "trtllm_mxint4_block_scale_moe",
        (*_WEIGHTS, *_SCALES, *_SWIGLU, *_SHAPE),
        prefers=("output",),
        padding=_VALID,
    ),
)

FROM_LOGITS = ("routing_logits", "routing_bias")
FROM_IDS = ("topk_ids",)


def _modes(base: Row, routed_since: str) -> Iterator[Row]:
    """The entry that routes by itself and its _routed_ twin, which takes ids and weights."""
    call = base.call
    assert call is not None
    own = tuple(name for name in call.passes if name != "routing_bias")
    yield replace(
        base,
        routing=ROUTING,
        logits=LOGITS,
        rounding=ROUNDING,
        call=replace(call, passes=(*FROM_LOGITS, *own), prefers=(*call.prefers, "norm_topk_prob")),
    )
    packed = call.pair_since is None
    yield replace(
        base,
        entry=base.entry.replace("_moe", "_routed_moe"),
        mode=PlanMode.ROUTED,
        weight_sites=("output",),
        rounding=Rounding(weights="bfloat16") if packed else Rounding(),
        call=replace(
            call,
            function=call.function.replace("_moe", "_routed_moe"),
            passes=(*FROM_IDS, *call.passes),
        ),
        since=routed_since,
    )


ROWS = tuple(
    row
    for base, routed_since in (
        (BF16, "0.6.8"),
        (PER_TENSOR, "0.6.17"),
        (PER_CHANNEL, "0.7.0"),
        (DEEPSEEK_FP8, "0.6.8"),
        (MXFP8, "0.6.8"),
        (NVFP4, "0.6.8"),
        (MXFP4_BF16, "0.6.8"),
        (MXFP4_MXFP8, "0.6.8"),
        (MXINT4, "0.6.13"),
    )
    for row in _modes(base, routed_since)
)
