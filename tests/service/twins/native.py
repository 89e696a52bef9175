"""Random layers in the native layout of each entry, made with FlashInfer's own CPU helpers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flashinfer.fused_moe import core, prepare
from flashinfer.fused_moe.api import QuantConfig, QuantFormat, ReLU2, SwiGLU
from flashinfer.tllm_enums import ActivationType, Fp8QuantizationType, SfLayout
from tests.service.twins.stored import (
    blocked64,
    by_row,
    exponents,
    largest_middle,
    mxfp4,
    mxfp8,
    nvfp4,
    shuffled_bytes,
    shuffled_scales,
    shuffled_values,
    tiles,
    wide,
)
from torch import Tensor

TOKENS, EXPERTS, HIDDEN, INTER = 6, 8, 256, 256
GATED = {"Swiglu", "SwigluStep", "Geglu", "Situ"}


@dataclass(frozen=True)
class Native:
    """A layer and rows: what the entry takes, and the values that its bits stand for.

    shared and per_expert are keyword arguments; x [T, H], fc1 [E, M1, H] as [up; gate],
    fc2 [E, H, I]; unit1 and unit2 [E] turn a physical value into a raw accumulator's, middle
    into what FC2 reads.
    """

    entry: str
    activation: str
    shared: dict[str, Any]
    per_expert: dict[str, Tensor]
    x: Tensor
    fc1: Tensor
    fc2: Tensor
    tolerance: float
    pair: bool = True
    listed: bool = False
    unit1: Tensor = field(default_factory=lambda: torch.ones(EXPERTS))
    unit2: Tensor = field(default_factory=lambda: torch.ones(EXPERTS))
    middle: float = 1.0

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    def held(self, first: int, count: int) -> Native:
        """The same layer where only these experts are held."""
        kept = slice(first, first + count)
        return replace(self, per_expert={k: v[kept] for k, v in self.per_expert.items()})

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Every keyword of the entry but those of routing."""
        sizes: dict[str, Any] = {
            "num_experts": EXPERTS,
            "top_k": 2,
            "n_group": None,
            "topk_group": None,
            "intermediate_size": self.fc2.shape[2],
            "local_expert_offset": 0,
            "local_num_experts": EXPERTS,
            "routed_scaling_factor": None,
            "routing_method_type": 1,
        }
        if "mxint4" not in self.entry:
            sizes["activation_type"] = int(ActivationType[self.activation])
        return {**sizes, **self.shared, **self.per_expert, **changes}


def random_layer(seed: int, gated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, fc1 [up; gate] and fc2 in bf16; experts and rows differ in size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size = 0.5 + torch.rand(EXPERTS, 1, 1, generator=generator)
    fc1 = draw(EXPERTS, (2 if gated else 1) * INTER, HIDDEN) * size / HIDDEN**0.5
    fc2 = draw(EXPERTS, HIDDEN, INTER) * size / INTER**0.5
    x = draw(TOKENS, HIDDEN) * (0.5 + torch.rand(TOKENS, 1, generator=generator))
    return x.bfloat16(), fc1.bfloat16(), fc2.bfloat16()


def bf16(seed: int, activation: str = "Swiglu") -> Native:
    x, fc1, fc2 = random_layer(seed, activation in GATED)
    view = prepare.prepare_trtllm_bf16_weights(
        fc1,
        fc2,
        num_local_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        activation=SwiGLU() if activation in GATED else ReLU2(),
    )
    weights = {name: view[name] for name in ("gemm1_weights", "gemm2_weights")}
    shared = {"hidden_states": x}
    return Native(
        "trtllm_bf16",
        activation,
        shared,
        weights,
        x.float(),
        fc1.float(),
        fc2.float(),
        tolerance=6e-3,
    )


def fp8_per_tensor(seed: int, activation: str = "Swiglu") -> Native:
    gated = activation in GATED
    x, fc1, fc2 = random_layer(seed, gated)
    middle = largest_middle(x, fc1, activation in GATED)
    view = prepare.prepare_trtllm_fp8_per_tensor_weights(
        fc1,
        fc2,
        hidden_states_scale_global=float(448 / x.float().abs().max()),
        intermediate_scale_global=float(448 / middle),
        num_local_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        activation=SwiGLU() if gated else ReLU2(),
    )
    stored, _ = prepare.prepare_trtllm_fp8_per_tensor_activations(
        x, hidden_states_scale_global=view["hidden_states_scale_global"]
    )
    names = [
        "gemm1_weights",
        "gemm2_weights",
        "output1_scales_scalar",
        "output1_scales_gate_scalar",
        "output2_scales_scalar",
    ]
    q1, s1 = prepare._quantize_fp8_per_expert(fc1)
    q2, s2 = prepare._quantize_fp8_per_expert(fc2)
    return Native(
        "trtllm_fp8_per_tensor_scale",
        activation,
        {"hidden_states": stored, "use_routing_scales_on_input": False},
        {name: view[name] for name in names},
        stored.float() / view["hidden_states_scale_global"],
        q1.float() / s1[:, None, None],
        q2.float() / s2[:, None, None],
        tolerance=0.05,
        unit1=1 / view["output1_scales_gate_scalar"],
        unit2=1 / view["output2_scales_scalar"],
        middle=448 / middle,
    )


def fp8_per_channel(seed: int, activation: str = "Swiglu") -> Native:
    gated = activation in GATED
    x, fc1, fc2 = random_layer(seed, gated)
    (q0, s0), (q1, s1), (q2, s2) = (by_row(t) for t in (x, fc1, fc2))
    ones = torch.ones(EXPERTS)
    per_expert = {
        "gemm1_weights": shuffled_bytes(q1, gated),
        "gemm1_per_channel_weight_scale": shuffled_values(s1.squeeze(-1), gated),
        "output1_scale_scalar": ones,
        "output1_scale_gate_scalar": ones.clone(),
        "gemm2_weights": shuffled_bytes(q2, False),
        "gemm2_per_channel_weight_scale": shuffled_values(s2.squeeze(-1), False),
        "output2_scale_scalar": ones.clone(),
    }
    return Native(
        "trtllm_fp8_per_channel_scale",
        activation,
        {"hidden_states": q0, "hidden_states_scale": s0, "use_routing_scales_on_input": False},
        per_expert,
        q0.float() * s0,
        q1.float() * s1,
        q2.float() * s2,
        tolerance=0.05,
        pair=False,
    )


def deepseek(seed: int, activation: str = "Swiglu") -> Native:
    x, fc1, fc2 = random_layer(seed, True)
    quant = QuantConfig(weight=QuantFormat.DeepSeekFp8, activation=QuantFormat.DeepSeekFp8)
    view = prepare.prepare_trtllm_fp8_block_weights(
        fc1,
        fc2,
        quant=quant,
        num_local_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
    )
    rows, scale = prepare.prepare_trtllm_fp8_block_activations(x, quant=quant)
    names = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
    per_expert = {name: view[name] for name in names}
    return Native(
        "trtllm_fp8_block_scale",
        activation,
        {
            "hidden_states": rows,
            "hidden_states_scale": scale,
            "fp8_quantization_type": Fp8QuantizationType.DeepSeekFp8,
        },
        per_expert,
        wide(rows.float(), scale.T),
        tiles(view["gemm1_weights"], view["gemm1_weights_scale"]),
        tiles(view["gemm2_weights"], view["gemm2_weights_scale"]),
        tolerance=0.08,
    )


def deepseek_shuffled(seed: int, activation: str = "Swiglu") -> Native:
    """DeepSeekFp8 shuffled for epilogue tile 64 and blocked along K."""
    plain = deepseek(seed, activation)
    changed = dict(plain.per_expert)
    for name in ("gemm1_weights", "gemm2_weights"):
        changed[name] = torch.stack([blocked64(expert) for expert in changed[name]])
    layout = {"use_shuffled_weight": True, "weight_layout": 2}
    return replace(plain, per_expert=changed, shared={**plain.shared, **layout})


def mxfp8_block(seed: int, activation: str = "Swiglu") -> Native:
    gated = activation in GATED
    x, fc1, fc2 = random_layer(seed, gated)
    (q0, s0), (q1, s1), (q2, s2) = (mxfp8(t) for t in (x, fc1, fc2))
    return Native(
        "trtllm_fp8_block_scale",
        activation,
        {
            "hidden_states": q0,
            "hidden_states_scale": s0,
            "fp8_quantization_type": Fp8QuantizationType.MxFp8,
            "use_shuffled_weight": True,
        },
        {
            "gemm1_weights": shuffled_bytes(q1, gated),
            "gemm1_weights_scale": shuffled_scales(s1, gated),
            "gemm2_weights": shuffled_bytes(q2, False),
            "gemm2_weights_scale": shuffled_scales(s2, False),
        },
        wide(q0.float(), exponents(s0)),
        wide(q1.float(), exponents(s1)),
        wide(q2.float(), exponents(s2)),
        tolerance=0.05,
    )


NO_PARAMETERS = ("gemm1_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm2_bias")
SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")


def nvfp4_block(seed: int, activation: str = "Swiglu") -> Native:
    gated = activation in GATED
    x, fc1, fc2 = random_layer(seed, gated)
    top = 448 * 6.0
    sx = top / x.float().abs().max()
    s1, s2 = (top / w.float().abs().amax((1, 2), keepdim=True) for w in (fc1, fc2))
    sc = float(top / largest_middle(x, fc1, activation in GATED))
    (q0, f0, x0), (q1, f1, w1), (q2, f2, w2) = (
        nvfp4(values, by) for values, by in ((x, sx), (fc1, s1), (fc2, s2))
    )
    gate = (1 / (s1 * sx)).flatten()
    alone = activation in ("Relu2", "Situ")
    e4m3 = torch.float8_e4m3fn
    per_expert = {
        "gemm1_weights": shuffled_bytes(q1, gated),
        "gemm1_weights_scale": shuffled_scales(f1.view(torch.uint8), gated).view(e4m3),
        "gemm2_weights": shuffled_bytes(q2, False),
        "gemm2_weights_scale": shuffled_scales(f2.view(torch.uint8), False).view(e4m3),
        "output1_scale_scalar": torch.full((EXPERTS,), sc) if alone else gate * sc,
        "output1_scale_gate_scalar": gate,
        "output2_scale_scalar": (1 / (s2 * sc)).flatten(),
    }
    shared = {"hidden_states": q0, "hidden_states_scale": f0, **dict.fromkeys(NO_PARAMETERS)}
    shared["hidden_states_scale_layout"] = SfLayout.layout_linear
    return Native(
        "trtllm_fp4_block_scale",
        activation,
        shared,
        per_expert,
        x0,
        w1,
        w2,
        tolerance=0.16,
        listed=True,
        unit1=1 / gate,
        unit2=(s2 * sc).flatten(),
        middle=sc,
    )


def _mxfp4_block(seed: int, activation: str, rows: dict[str, Any], x: Tensor) -> Native:
    gated = activation in GATED
    _, fc1, fc2 = random_layer(seed, gated)
    (q1, f1, w1), (q2, f2, w2) = mxfp4(fc1), mxfp4(fc2)
    e4m3 = torch.float8_e4m3fn
    per_expert = {
        "gemm1_weights": shuffled_bytes(q1, gated),
        "gemm1_weights_scale": shuffled_scales(f1, gated).view(e4m3),
        "gemm2_weights": shuffled_bytes(q2, False),
        "gemm2_weights_scale": shuffled_scales(f2, False).view(e4m3),
    }
    none = dict.fromkeys(("hidden_states_scale", *NO_PARAMETERS, *SCALARS))
    shared = {**none, "hidden_states_scale_layout": SfLayout.layout_linear, **rows}
    return Native(
        "trtllm_fp4_block_scale",
        activation,
        shared,
        per_expert,
        x,
        w1,
        w2,
        tolerance=0.05,
        listed=True,
    )


def bf16_mxfp4(seed: int, activation: str = "Swiglu") -> Native:
    x, _, _ = random_layer(seed, activation in GATED)
    return replace(_mxfp4_block(seed, activation, {"hidden_states": x}, x.float()), tolerance=6e-3)


def mxfp8_mxfp4(seed: int, activation: str = "Swiglu") -> Native:
    x, _, _ = random_layer(seed, activation in GATED)
    stored, scale = mxfp8(x)
    rows = {"hidden_states": stored, "hidden_states_scale": scale.view(torch.float8_e4m3fn)}
    return _mxfp4_block(seed, activation, rows, wide(stored.float(), exponents(scale)))


def e4m3_mxfp4(seed: int, activation: str = "Swiglu") -> Native:
    x, fc1, _ = random_layer(seed, activation in GATED)
    sx = float(448 / x.float().abs().max())
    sc = float(448 / largest_middle(x, fc1, activation in GATED))
    stored = (x.float() * sx).clamp(-448, 448).to(torch.float8_e4m3fn)
    native = _mxfp4_block(seed, activation, {"hidden_states": stored}, stored.float() / sx)
    out = sc / sx if activation in GATED else sc
    values = dict(zip(SCALARS, (out, 1 / sx, 1 / sc), strict=True))
    scalars = {name: torch.full((EXPERTS,), value) for name, value in values.items()}
    shared = {name: value for name, value in native.shared.items() if name not in SCALARS}
    return replace(
        native,
        shared=shared,
        per_expert={**native.per_expert, **scalars},
        unit1=torch.full((EXPERTS,), sx),
        unit2=torch.full((EXPERTS,), sc),
        middle=sc,
    )


def mxint4(seed: int, activation: str = "Swiglu") -> Native:
    x, fc1, fc2 = random_layer(seed, True)
    per_expert, values = {}, []
    for name, weights, gated in (("gemm1", fc1, True), ("gemm2", fc2, False)):
        codes, scales = prepare._mxint4_quantize(weights)
        scales = scales.reshape(*weights.shape[:2], -1)
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.int8)
        signed = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
        values.append(wide(signed, scales.float()))
        rows = shuffled_bytes(codes, gated)
        blocks = [core.convert_to_block_layout(expert, 128) for expert in rows]
        per_expert[f"{name}_weights"] = torch.stack(blocks)
        per_expert[f"{name}_weights_scale"] = shuffled_scales(scales, gated)
    none = dict.fromkeys(("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"))
    return Native(
        "trtllm_mxint4_block_scale",
        activation,
        {"hidden_states": x, **none},
        per_expert,
        x.float(),
        values[0],
        values[1],
        tolerance=6e-3,
        pair=False,
        listed=True,
    )


FORMATS: dict[str, Callable[..., Native]] = {
    "bf16": bf16,
    "fp8_per_tensor": fp8_per_tensor,
    "fp8_per_channel": fp8_per_channel,
    "deepseek": deepseek,
    "deepseek_shuffled": deepseek_shuffled,
    "mxfp8": mxfp8_block,
    "nvfp4": nvfp4_block,
    "bf16_mxfp4": bf16_mxfp4,
    "mxfp8_mxfp4": mxfp8_mxfp4,
    "e4m3_mxfp4": e4m3_mxfp4,
    "mxint4": mxint4,
}
