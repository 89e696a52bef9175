"""Random layers in the native layout of each entry, made with FlashInfer's own CPU helpers.

Scales are swizzled, formats without a CPU helper quantised and biases permuted here, by other
means than the twin's: views and permutes for the swizzle, ml_dtypes for the number formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from flashinfer.fused_moe import core, prepare
from flashinfer.fused_moe.api import QuantConfig, QuantFormat, ReLU2, SwiGLU
from flashinfer.tllm_enums import ActivationType, Fp8QuantizationType, SfLayout
from torch import Tensor

TOKENS, EXPERTS, HIDDEN, INTER = 6, 8, 256, 256
GATED = {"Swiglu", "SwigluStep", "Geglu", "Situ"}


@dataclass(frozen=True)
class Native:
    """A layer and rows: what the entry takes, and the values that its bits stand for.

    shared and per_expert are keyword arguments; x [T, H], fc1 [E, M1, H] as [up; gate],
    fc2 [E, H, I]; unit1 and unit2 [E] turn a physical value into a raw accumulator's.
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


def shuffled(rows: Tensor, gated: bool) -> Tensor:
    """[M, K] of bytes in the order of FC1 (gated) or of FC2 and plain FC1."""
    order = core._maybe_get_cached_w3_w1_permute_indices({}, rows, 128, is_gated_act_gemm=gated)
    return rows[order]


def shuffled_bytes(weights: Tensor, gated: bool) -> Tensor:
    """[E, M, K] of any 8-bit dtype."""
    each = [shuffled(expert.view(torch.uint8), gated) for expert in weights]
    return torch.stack(each).view(weights.dtype)


def shuffled_values(values: Tensor, gated: bool) -> Tensor:
    """[E, M] fp32, as wide rows of one column each."""
    order = core._maybe_get_cached_w3_w1_permute_indices(
        {}, torch.zeros(values.shape[1], 4, dtype=torch.uint8), 128, is_gated_act_gemm=gated
    )
    return values[:, order].contiguous()


def swizzled(scales: Tensor) -> Tensor:
    """[R, C] as the 128x4 swizzle lays it out, in the same shape."""
    rows, columns = scales.shape
    tiles = scales.view(rows // 128, 4, 32, columns // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(rows, columns)


def shuffled_scales(scales: Tensor, gated: bool) -> Tensor:
    """[E, M, C] in the weights' row order, then swizzled."""
    return torch.stack([swizzled(shuffled(expert, gated)) for expert in scales])


def wide(values: Tensor, scales: Tensor) -> Tensor:
    """[..., K] times [..., K / v]."""
    return values * scales.repeat_interleave(values.shape[-1] // scales.shape[-1], dim=-1)


def mxfp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] as e4m3 and [..., K / 32] exponent bytes, scale rounded up."""
    groups = values.float().unflatten(-1, (-1, 32))
    exponent = torch.ceil(torch.log2(groups.abs().amax(-1) / 448.0)).clamp(-127, 127)
    quantised = groups / torch.exp2(exponent).unsqueeze(-1)
    stored = quantised.clamp(-448, 448).flatten(-2).to(torch.float8_e4m3fn)
    return stored, (exponent + 127).to(torch.uint8)


def exponents(scales: Tensor) -> Tensor:
    """Exponent bytes as fp32, by ml_dtypes."""
    return torch.from_numpy(scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))


def e2m1_codes(values: Tensor) -> Tensor:
    """One code a byte, by ml_dtypes."""
    stored = values.numpy().astype(ml_dtypes.float4_e2m1fn)
    return torch.from_numpy(stored.view(np.uint8) & 15)


def e2m1_values(codes: Tensor) -> Tensor:
    stored = codes.numpy().astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    return torch.from_numpy(stored.astype(np.float32))


def packed(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def nvfp4(values: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, e4m3 scales per 16, and the values they stand for without the multiplier."""
    groups = (values.float() * multiplier).unflatten(-1, (-1, 16))
    scale = (groups.abs().amax(-1) / 6.0).clamp(max=448).to(torch.float8_e4m3fn)
    divisor = scale.float().clamp(min=1e-9).unsqueeze(-1)
    codes = e2m1_codes((groups / divisor).clamp(-6, 6).flatten(-2))
    return packed(codes), scale, wide(e2m1_values(codes), scale.float()) / multiplier


def mxfp4(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[E, M, K] by FlashInfer's torch quantiser: packed, exponent bytes, values."""
    pairs = [prepare._quantize_mxfp4_linear(expert) for expert in weights]
    codes = torch.stack([code for code, _ in pairs])
    scales = torch.stack([scale.reshape(weights.shape[1], -1) for _, scale in pairs])
    halves = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return codes, scales, wide(e2m1_values(halves), exponents(scales))


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
    values = (x.float(), fc1.float(), fc2.float())
    return Native("trtllm_bf16", activation, shared, weights, *values, tolerance=6e-3)


def fp8_per_tensor(seed: int, activation: str = "Swiglu") -> Native:
    gated = activation in GATED
    x, fc1, fc2 = random_layer(seed, gated)
    middle = _largest_middle(x, fc1, activation)
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
    names = ("gemm1_weights", "gemm2_weights", "output1_scales_scalar")
    names += ("output1_scales_gate_scalar", "output2_scales_scalar")
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
    )


def fp8_per_channel(seed: int, activation: str = "Swiglu") -> Native:
    gated = activation in GATED
    x, fc1, fc2 = random_layer(seed, gated)
    (q0, s0), (q1, s1), (q2, s2) = (_by_row(t) for t in (x, fc1, fc2))
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
        _tiles(view["gemm1_weights"], view["gemm1_weights_scale"]),
        _tiles(view["gemm2_weights"], view["gemm2_weights_scale"]),
        tolerance=0.06,
    )


def deepseek_shuffled(seed: int, activation: str = "Swiglu") -> Native:
    """DeepSeekFp8 shuffled for epilogue tile 64 and blocked along K."""
    plain = deepseek(seed, activation)
    changed = dict(plain.per_expert)
    for name in ("gemm1_weights", "gemm2_weights"):
        changed[name] = torch.stack([_blocked64(expert) for expert in changed[name]])
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
    sc = float(top / _largest_middle(x, fc1, activation))
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
    return _mxfp4_block(seed, activation, {"hidden_states": x}, x.float())


def mxfp8_mxfp4(seed: int, activation: str = "Swiglu") -> Native:
    x, _, _ = random_layer(seed, activation in GATED)
    stored, scale = mxfp8(x)
    rows = {"hidden_states": stored, "hidden_states_scale": scale.view(torch.float8_e4m3fn)}
    return _mxfp4_block(seed, activation, rows, wide(stored.float(), exponents(scale)))


def e4m3_mxfp4(seed: int, activation: str = "Swiglu") -> Native:
    x, fc1, _ = random_layer(seed, activation in GATED)
    sx = float(448 / x.float().abs().max())
    sc = float(448 / _largest_middle(x, fc1, activation))
    stored = (x.float() * sx).clamp(-448, 448).to(torch.float8_e4m3fn)
    native = _mxfp4_block(seed, activation, {"hidden_states": stored}, stored.float() / sx)
    out = sc / sx if activation in GATED else sc
    values = dict(zip(SCALARS, (out, 1 / sx, 1 / sc), strict=True))
    scalars = {name: torch.full((EXPERTS,), value) for name, value in values.items()}
    shared = {name: value for name, value in native.shared.items() if name not in SCALARS}
    units = {"unit1": torch.full((EXPERTS,), sx), "unit2": torch.full((EXPERTS,), sc)}
    return replace(native, shared=shared, per_expert={**native.per_expert, **scalars}, **units)


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
        *values,
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


def _largest_middle(x: Tensor, fc1: Tensor, activation: str) -> float:
    """The largest activation output of any row through any expert."""
    raw = torch.einsum("th,emh->etm", x.float(), fc1.float())
    if activation not in GATED:
        return float(torch.relu(raw).square().max())
    up, gate = raw.chunk(2, dim=2)
    return float((up * torch.nn.functional.silu(gate)).abs().max())


def _by_row(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.float().abs().amax(-1, keepdim=True) / 448
    return (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def _tiles(weights: Tensor, scales: Tensor) -> Tensor:
    return wide(weights.float(), scales.repeat_interleave(128, dim=1))


def _blocked64(weights: Tensor) -> Tensor:
    from flashinfer import shuffle_matrix_a

    rows = shuffle_matrix_a(weights.view(torch.uint8), 64)
    return core.convert_to_block_layout(rows, 128).view(torch.float8_e4m3fn)
