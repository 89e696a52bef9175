"""The keyword signatures of the twelve entry points in flashinfer 0.7.2.post1, as text."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

_EXPERTS = (
    "num_experts, top_k, n_group, topk_group, intermediate_size, "
    "local_expert_offset, local_num_experts"
)
_BF16_TAIL = (
    "tune_max_num_tokens=8192, activation_type=3, {norm}routing_replay_out=None, "
    "gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None, output=None"
)
_BF16 = (
    f"hidden_states, gemm1_weights, gemm2_weights, {_EXPERTS}, routed_scaling_factor=None, "
    "routing_method_type=0, use_shuffled_weight=True, weight_layout=2, do_finalize=True, "
    "enable_pdl=True, "
)
_PER_TENSOR = (
    "routing_bias, hidden_states, gemm1_weights, output1_scales_scalar, "
    f"output1_scales_gate_scalar, gemm2_weights, output2_scales_scalar, {_EXPERTS}, "
    "routed_scaling_factor, use_routing_scales_on_input, routing_method_type=0, do_finalize=True, "
    "enable_pdl=None, tune_max_num_tokens=8192, activation_type=3, "
)
_PER_TENSOR_TAIL = "routing_replay_out=None, output=None, gemm1_clamp_limit=None"
_PER_CHANNEL = (
    "routing_bias, hidden_states, hidden_states_scale, gemm1_weights, "
    "gemm1_per_channel_weight_scale, output1_scale_scalar, output1_scale_gate_scalar, "
    f"gemm2_weights, gemm2_per_channel_weight_scale, output2_scale_scalar, {_EXPERTS}, "
    "routed_scaling_factor, "
)
_PER_CHANNEL_TAIL = (
    "routing_method_type=0, do_finalize=True, enable_pdl=None, tune_max_num_tokens=8192, "
    "activation_type=3"
)
_BLOCK = (
    "routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, "
    f"gemm2_weights, gemm2_weights_scale, {_EXPERTS}, routed_scaling_factor, "
    "routing_method_type=0, use_shuffled_weight=False, weight_layout=0, do_finalize=True, "
    "enable_pdl=None, "
)
_FP4 = (
    "routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, "
    "gemm1_bias, gemm1_alpha, gemm1_beta, gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, "
    "gemm2_bias, output1_scale_scalar, output1_scale_gate_scalar, output2_scale_scalar, "
    f"{_EXPERTS}, routed_scaling_factor, routing_method_type=0, do_finalize=True, "
    "enable_pdl=None, activation_type=3, per_token_scale=None, output=None, "
    "tune_max_num_tokens=8192, "
)
_MXINT4 = (
    "hidden_states, gemm1_weights, gemm1_weights_scale, gemm1_alpha, gemm1_beta, "
    f"gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, {_EXPERTS}, routed_scaling_factor, "
    "routing_method_type=0, do_finalize=True, enable_pdl=None, "
)
_VALID = "valid_hidden_size=None, valid_intermediate_size=None"

PARAMETERS: dict[str, str] = {
    "trtllm_bf16_moe": "routing_logits, routing_bias, "
    + _BF16
    + _BF16_TAIL.format(norm="norm_topk_prob=True, "),
    "trtllm_bf16_routed_moe": "topk_ids, "
    + _BF16
    + "gemm1_lora_delta=None, "
    + _BF16_TAIL.format(norm=""),
    "trtllm_fp8_per_tensor_scale_moe": (
        f"routing_logits, {_PER_TENSOR}norm_topk_prob=True, {_PER_TENSOR_TAIL}"
    ),
    "trtllm_fp8_per_tensor_scale_routed_moe": f"topk_ids, {_PER_TENSOR}{_PER_TENSOR_TAIL}",
    "trtllm_fp8_per_channel_scale_moe": (
        f"routing_logits, {_PER_CHANNEL}use_routing_scales_on_input, {_PER_CHANNEL_TAIL}, "
        "norm_topk_prob=True"
    ),
    "trtllm_fp8_per_channel_scale_routed_moe": (
        f"topk_ids, {_PER_CHANNEL}use_routing_scales_on_input=False, {_PER_CHANNEL_TAIL}"
    ),
    "trtllm_fp8_block_scale_moe": (
        f"routing_logits, {_BLOCK}tune_max_num_tokens=8192, fp8_quantization_type=1, "
        "num_fused_shared_experts=None, activation_type=3, norm_topk_prob=True, "
        "routing_replay_out=None, gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None, "
        f"output=None, {_VALID}, *, gemm1_bias=None, gemm2_bias=None"
    ),
    "trtllm_fp8_block_scale_routed_moe": (
        f"topk_ids, {_BLOCK}gemm1_lora_delta=None, output=None, tune_max_num_tokens=8192, "
        "fp8_quantization_type=1, activation_type=3, gemm1_alpha=None, gemm1_beta=None, "
        f"gemm1_clamp_limit=None, {_VALID}"
    ),
    "trtllm_fp4_block_scale_moe": (
        f"routing_logits, {_FP4}norm_topk_prob=True, routing_replay_out=None, "
        f"num_fused_shared_experts=None, {_VALID}, hidden_states_scale_layout=None"
    ),
    "trtllm_fp4_block_scale_routed_moe": (
        f"topk_ids, {_FP4}gemm1_lora_delta=None, {_VALID}, num_fused_shared_experts=None, "
        "hidden_states_scale_layout=None"
    ),
    "trtllm_mxint4_block_scale_moe": (
        f"routing_logits, routing_bias, {_MXINT4}output=None, tune_max_num_tokens=8192, "
        f"norm_topk_prob=True, routing_replay_out=None, {_VALID}"
    ),
    "trtllm_mxint4_block_scale_routed_moe": (
        f"topk_ids, {_MXINT4}gemm1_lora_delta=None, output=None, tune_max_num_tokens=8192, {_VALID}"
    ),
}


def signature(entry: str) -> inspect.Signature:
    """The signature of an entry point by name."""
    return inspect.Signature(list(_parameters(PARAMETERS[entry])))


def _parameters(text: str) -> Iterator[inspect.Parameter]:
    free, _, by_keyword = text.partition(", *, ")
    for kind, part in (
        (inspect.Parameter.POSITIONAL_OR_KEYWORD, free),
        (inspect.Parameter.KEYWORD_ONLY, by_keyword),
    ):
        for parameter in filter(None, part.split(", ")):
            name, _, default = parameter.partition("=")
            value = ast.literal_eval(default) if default else inspect.Parameter.empty
            yield inspect.Parameter(name, kind, default=value)
