"""Each demand of the contract is enforced: one wrong argument, and the error names it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tests.service.twins.calls import call, packed, pairs
from tests.service.twins.native import EXPERTS, FORMATS, HIDDEN, TOKENS, Native
from tests.twins.checks import ContractError
from tests.twins.enums import ActivationType, Fp8QuantizationType, RoutingMethodType, SfLayout
from torch import Tensor

A, M = ActivationType, RoutingMethodType
Given = dict[str, Any]
Change = Callable[[Given], Given]


def of(name: str, change: Callable[[Tensor], Any]) -> Change:
    """One argument replaced by what the change makes of it."""
    return lambda given: {name: change(given[name])}


def to(**values: Any) -> Change:
    return lambda given: values


def wider(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor), dim=-1)


def strided(tensor: Tensor) -> Tensor:
    return wider(tensor)[..., : tensor.shape[-1]]


def off_base(tensor: Tensor) -> Tensor:
    room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return room.view(tensor.shape)


def flipped(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


EACH = list(FORMATS)


@cache
def layer(name: str, activation: str = "Swiglu") -> Native:
    """Which layer it is decides nothing here, so each is made once."""
    return FORMATS[name](0, activation)


EVERYWHERE: list[tuple[str, str, Change]] = [
    ("hidden_states", "strided", of("hidden_states", strided)),
    ("hidden_states", "3-D", of("hidden_states", lambda t: t[None])),
    ("hidden_states", "fp16", of("hidden_states", lambda t: t.to(torch.float16))),
    ("hidden_states", "off base", of("hidden_states", off_base)),
    ("gemm1_weights", "missing", to(gemm1_weights=None)),
    ("gemm1_weights", "strided", of("gemm1_weights", strided)),
    ("gemm1_weights", "short", of("gemm1_weights", lambda t: t[:, :-1].contiguous())),
    ("gemm2_weights", "experts", of("gemm2_weights", lambda t: t[:-1])),
    ("gemm2_weights", "dtype", of("gemm2_weights", lambda t: t.float())),
    ("topk_ids", "int64", of("topk_ids", lambda t: t.long())),
    ("topk_ids", "one column", of("topk_ids", lambda t: t[:, :1].contiguous())),
    ("topk_ids", "one row", of("topk_ids", lambda t: t[:1])),
    ("topk_ids", "strided", of("topk_ids", lambda t: t.T.contiguous().T)),
    ("num_experts", "none", to(num_experts=0)),
    ("num_experts", "past the tiers", to(num_experts=2052)),
    ("local_num_experts", "zero", to(local_num_experts=0)),
    ("local_num_experts", "too many", to(local_num_experts=EXPERTS + 1)),
    ("local_expert_offset", "negative", to(local_expert_offset=-1)),
    ("local_expert_offset", "past the end", to(local_expert_offset=1)),
    ("top_k", "zero", to(top_k=0)),
    ("intermediate_size", "odd", to(intermediate_size=200)),
    ("gemm1_weights", "other I", to(intermediate_size=512)),
    ("routing_method_type", "Unspecified", to(routing_method_type=10)),
    ("routing_method_type", "negative", to(routing_method_type=-1)),
    ("n_group", "a tensor", to(n_group=torch.ones(()))),
    ("routed_scaling_factor", "text", to(routed_scaling_factor="2.5")),
    ("do_finalize", "off", to(do_finalize=False)),
    ("enable_pdl", "text", to(enable_pdl="yes")),
]
EXCUSED = {
    # DeepSeekFp8's and MX scales name themselves before the weights do.
    ("deepseek", "gemm1_weights", "other I"): "gemm1_weights_scale",
    ("deepseek_shuffled", "gemm1_weights", "other I"): "gemm1_weights_scale",
    ("fp8_per_channel", "gemm1_weights", "other I"): "gemm1_per_channel_weight_scale",
    ("nvfp4", "gemm1_weights", "other I"): "gemm1_weights_scale",
}


def given(native: Native, seed: int, **changes: Any) -> Given:
    ids, weights = pairs(seed)
    return {**native.arguments(), "topk_ids": packed(ids, weights), **changes}


def refused(native: Native, mode: str = "_routed", **changes: Any) -> ContractError:
    with pytest.raises(ContractError) as caught:
        call(native, mode, **changes)
    return caught.value


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(
    ("argument", "how", "change"), EVERYWHERE, ids=[f"{a}-{h}" for a, h, _ in EVERYWHERE]
)
def test_everywhere(name: str, argument: str, how: str, change: Change, seed: int) -> None:
    native = layer(name)
    arguments = given(native, seed)
    error = refused(native, **{"topk_ids": arguments["topk_ids"], **change(arguments)})
    accepted = {argument, EXCUSED.get((name, argument, how))}
    assert error.argument in accepted, str(error)
    assert "expected" in str(error)


SPECIAL: list[tuple[str, str, Change]] = [
    ("bf16", "use_shuffled_weight", to(use_shuffled_weight=False)),
    ("bf16", "weight_layout", to(weight_layout=0)),
    ("bf16", "activation_type", to(activation_type=A.Geglu)),
    ("bf16", "activation_type", to(activation_type=A.Identity)),
    ("bf16", "activation_type", to(activation_type=A.ClampedRelu2)),
    ("bf16", "gemm1_alpha", to(gemm1_alpha=torch.ones(EXPERTS - 1))),
    ("bf16", "gemm1_beta", to(gemm1_beta=torch.ones(EXPERTS).bfloat16())),
    ("bf16", "gemm1_clamp_limit", to(gemm1_clamp_limit=torch.ones(EXPERTS, 2)[:, 0])),
    ("bf16", "output", to(output=torch.empty(TOKENS, HIDDEN - 8).bfloat16())),
    ("bf16", "output", to(output=torch.empty(TOKENS, HIDDEN))),
    ("bf16", "output", to(output=torch.empty(TOKENS, 2 * HIDDEN).bfloat16()[:, :HIDDEN])),
    ("bf16", "gemm1_lora_delta", to(gemm1_lora_delta=torch.zeros(TOKENS, 2, 512).bfloat16())),
    ("bf16", "tune_max_num_tokens", to(tune_max_num_tokens=0)),
    ("fp8_per_tensor", "hidden_states", of("hidden_states", lambda t: t.bfloat16())),
    ("fp8_per_tensor", "output1_scales_scalar", to(output1_scales_scalar=None)),
    ("fp8_per_tensor", "output1_scales_gate_scalar", to(output1_scales_gate_scalar=torch.ones(1))),
    ("fp8_per_tensor", "output2_scales_scalar", of("output2_scales_scalar", torch.Tensor.double)),
    ("fp8_per_tensor", "gemm1_clamp_limit", to(gemm1_clamp_limit=torch.ones(EXPERTS))),
    ("fp8_per_tensor", "use_routing_scales_on_input", to(use_routing_scales_on_input=True)),
    ("fp8_per_tensor", "use_routing_scales_on_input", to(use_routing_scales_on_input=0)),
    ("fp8_per_tensor", "routing_bias", to(routing_bias=torch.zeros(EXPERTS - 1))),
    ("fp8_per_channel", "hidden_states_scale", of("hidden_states_scale", lambda t: t[:, 0])),
    ("fp8_per_channel", "hidden_states_scale", of("hidden_states_scale", flipped)),
    (
        "fp8_per_channel",
        "gemm2_per_channel_weight_scale",
        of("gemm2_per_channel_weight_scale", wider),
    ),
    ("fp8_per_channel", "activation_type", to(activation_type=A.SwigluStep)),
    ("deepseek", "hidden_states_scale", of("hidden_states_scale", flipped)),
    ("deepseek", "hidden_states_scale", of("hidden_states_scale", lambda t: flipped(t).T)),
    ("deepseek", "gemm1_weights_scale", of("gemm1_weights_scale", lambda t: t.bfloat16())),
    ("deepseek", "gemm2_weights_scale", of("gemm2_weights_scale", wider)),
    ("deepseek", "activation_type", to(activation_type=A.Relu2)),
    ("deepseek", "activation_type", to(activation_type=A.SwigluStep)),
    ("deepseek", "weight_layout", to(weight_layout=1)),
    ("deepseek", "gemm1_weights", to(weight_layout=2)),
    ("deepseek", "fp8_quantization_type", to(fp8_quantization_type=0)),
    ("deepseek", "num_experts", to(num_experts=EXPERTS + 1)),
    ("deepseek", "n_group", to(routing_method_type=M.DeepSeekV3)),
    ("deepseek", "n_group", to(routing_method_type=M.DeepSeekV3, n_group=0, topk_group=0)),
    ("deepseek", "topk_group", to(routing_method_type=M.DeepSeekV3, n_group=1)),
    ("deepseek", "n_group", to(n_group=2)),
    ("deepseek", "top_k", to(routing_method_type=M.Llama4)),
    ("mxfp8", "use_shuffled_weight", to(use_shuffled_weight=False)),
    ("mxfp8", "weight_layout", to(weight_layout=2)),
    ("mxfp8", "hidden_states_scale", of("hidden_states_scale", lambda t: t.float())),
    ("mxfp8", "gemm1_weights_scale", of("gemm1_weights_scale", lambda t: t.view(torch.int8))),
    ("mxfp8", "gemm2_weights_scale", of("gemm2_weights_scale", wider)),
    ("mxfp8", "hidden_states_scale", to(fp8_quantization_type=Fp8QuantizationType.DeepSeekFp8)),
    ("mxfp8", "activation_type", to(activation_type=A.Geglu)),
    ("mxfp8", "gemm1_alpha", to(activation_type=A.SwigluStep, gemm1_alpha=torch.ones(EXPERTS))),
    ("nvfp4", "hidden_states_scale", to(hidden_states_scale=None)),
    ("nvfp4", "hidden_states_scale", of("hidden_states_scale", lambda t: t[:, ::2].contiguous())),
    ("nvfp4", "hidden_states_scale", of("hidden_states_scale", lambda t: t.view(torch.uint8))),
    ("nvfp4", "hidden_states_scale_layout", to(hidden_states_scale_layout=SfLayout.layout_128x4)),
    (
        "nvfp4",
        "gemm1_weights_scale",
        of("gemm1_weights_scale", lambda t: t[..., ::2].contiguous()),
    ),
    ("nvfp4", "output1_scale_scalar", to(output1_scale_scalar=None)),
    ("nvfp4", "output2_scale_scalar", to(output2_scale_scalar=torch.ones(EXPERTS + 1))),
    ("nvfp4", "gemm1_bias", to(gemm1_bias=torch.zeros(EXPERTS, 512).bfloat16())),
    ("nvfp4", "gemm2_bias", to(gemm2_bias=torch.zeros(EXPERTS, 512))),
    ("nvfp4", "per_token_scale", to(per_token_scale=torch.ones(TOKENS))),
    ("nvfp4", "num_fused_shared_experts", to(num_fused_shared_experts=1)),
    ("nvfp4", "gemm1_alpha", to(activation_type=A.Situ, gemm1_alpha=torch.zeros(EXPERTS))),
    ("bf16_mxfp4", "hidden_states_scale", to(hidden_states_scale=torch.ones(TOKENS, 8))),
    ("bf16_mxfp4", "gemm1_weights_scale", of("gemm1_weights_scale", wider)),
    (
        "bf16_mxfp4",
        "gemm2_weights_scale",
        of("gemm2_weights_scale", lambda t: t.view(torch.uint8)),
    ),
    ("bf16_mxfp4", "activation_type", to(activation_type=A.Relu2)),
    ("mxfp8_mxfp4", "hidden_states_scale", of("hidden_states_scale", wider)),
    ("mxfp8_mxfp4", "activation_type", to(activation_type=A.Geglu)),
    ("e4m3_mxfp4", "output1_scale_gate_scalar", to(output1_scale_gate_scalar=None)),
    ("mxint4", "gemm1_weights_scale", of("gemm1_weights_scale", lambda t: t.float())),
    ("mxint4", "gemm2_weights_scale", of("gemm2_weights_scale", wider)),
    ("mxint4", "intermediate_size", to(intermediate_size=384)),
    ("mxint4", "valid_hidden_size", to(valid_hidden_size=100)),
    ("mxint4", "valid_hidden_size", to(valid_hidden_size=HIDDEN + 8)),
    ("mxint4", "valid_intermediate_size", to(valid_intermediate_size=0)),
    ("mxint4", "output", to(valid_hidden_size=248, output=torch.empty(TOKENS, 256).bfloat16())),
]


@pytest.mark.parametrize(
    ("name", "argument", "change"),
    SPECIAL,
    ids=[f"{i}-{s[0]}-{s[1]}" for i, s in enumerate(SPECIAL)],
)
def test_of_one_entry(name: str, argument: str, change: Change, seed: int) -> None:
    native = layer(name)
    arguments = given(native, seed)
    error = refused(native, **{"topk_ids": arguments["topk_ids"], **change(arguments)})
    assert error.argument == argument, str(error)


@pytest.mark.parametrize("name", ["bf16", "mxfp8"])
def test_parameters_are_for_gated_activations(name: str, seed: int) -> None:
    native = layer(name, "Relu2")
    ids, weights = pairs(seed)
    given_ids = packed(ids, weights)
    error = refused(native, topk_ids=given_ids, gemm1_beta=torch.ones(EXPERTS))
    assert error.argument == "activation_type"


@pytest.mark.parametrize("name", EACH)
def test_no_tokens_no_launch(name: str, seed: int) -> None:
    native = layer(name)
    rows = native.shared["hidden_states"][:0]
    ids = torch.zeros(0, 2, dtype=torch.int32)
    assert refused(native, hidden_states=rows, topk_ids=ids).argument == "hidden_states"


@pytest.mark.parametrize("name", ["fp8_per_channel", "mxint4"])
def test_packed_only_entries(name: str, seed: int) -> None:
    assert refused(layer(name), topk_ids=pairs(seed)).argument == "topk_ids"


@pytest.mark.parametrize("form", ["pair", "packed"])
def test_duplicates(form: str, seed: int) -> None:
    native = layer("bf16")
    ids, weights = pairs(seed)
    ids[2] = 3
    given_ids = (ids, weights) if form == "pair" else packed(ids, weights)
    error = refused(native, topk_ids=given_ids)
    assert error.argument == "topk_ids" and error.given == [3, 3]
    ids[2] = -1
    call(native, topk_ids=packed(ids, weights))


def test_pair_weights(seed: int) -> None:
    native = layer("bf16")
    ids, weights = pairs(seed)
    for wrong in (weights.half(), weights[:, :1], weights.double(), weights[:3]):
        assert refused(native, topk_ids=(ids, wrong)).argument == "topk_weights"


def test_ids_narrow_to_sixteen_bits(seed: int) -> None:
    native = layer("bf16")
    ids, weights = pairs(seed)
    high = torch.where(ids < 0, ids, ids + 65536)
    assert torch.equal(
        call(native, topk_ids=(high, weights)), call(native, topk_ids=(ids, weights))
    )


LOGITS: list[tuple[str, str, Given]] = [
    ("routing_logits", "fp16", {"routing_logits": torch.zeros(TOKENS, EXPERTS).half()}),
    ("routing_logits", "fewer experts", {"routing_logits": torch.zeros(TOKENS, EXPERTS - 1)}),
    ("routing_logits", "fewer tokens", {"routing_logits": torch.zeros(TOKENS - 1, EXPERTS)}),
    ("routing_logits", "transposed", {"routing_logits": torch.zeros(EXPERTS, TOKENS).T}),
    ("routing_logits", "absent", {"routing_logits": None}),
    ("routing_bias", "2-D", {"routing_bias": torch.zeros(1, EXPERTS)}),
    ("routing_bias", "fp16", {"routing_bias": torch.zeros(EXPERTS).half()}),
    ("routing_bias", "null", {"routing_method_type": M.MiniMax2}),
    ("n_group", "grouped softmax", {"n_group": 2, "topk_group": 1}),
    ("topk_group", "grouped softmax", {"topk_group": 2}),
    ("routing_replay_out", "int32", {"routing_replay_out": torch.zeros(TOKENS, 2).int()}),
    ("routing_replay_out", "short", {"routing_replay_out": torch.zeros(2, 2).short()}),
    ("top_k", "Default", {"routing_method_type": M.Llama4}),
]


@pytest.mark.parametrize(
    ("argument", "how", "changes"), LOGITS, ids=[f"{a}-{h}" for a, h, _ in LOGITS]
)
def test_logits(argument: str, how: str, changes: Given, seed: int) -> None:
    native = layer("bf16")
    arguments = {"routing_logits": torch.zeros(TOKENS, EXPERTS), **changes}
    assert refused(native, "", **arguments).argument == argument


def test_per_channel_wants_bf16_logits_with_scales_on_input(seed: int) -> None:
    native = layer("fp8_per_channel")
    logits = torch.zeros(TOKENS, EXPERTS)
    error = refused(native, "", routing_logits=logits, use_routing_scales_on_input=True)
    assert error.argument == "routing_logits"


def test_an_undeclared_scale_layout_is_deprecated(seed: int) -> None:
    native = layer("nvfp4")
    arguments = given(native, seed)
    with pytest.warns(DeprecationWarning, match="hidden_states_scale_layout"):
        call(native, topk_ids=arguments["topk_ids"], hidden_states_scale_layout=None)


def test_unknown_keywords_are_refused_as_python_does(seed: int) -> None:
    native = layer("fp8_per_channel")
    with pytest.raises(TypeError, match="output"):
        call(native, topk_ids=pairs(seed)[0], output=torch.empty(1))
