"""cutlass_fused_moe on CPU, from FlashInfer's documented contract and from nothing of ours.

It has the real function's arguments, checks what the real launcher checks, and computes in float32
what the kernels compute from the arguments alone.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu


class ActivationType(IntEnum):
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Situ = 10


class Emulated:
    """Stands for FlashInfer; calls are kept for the test to look at."""

    ActivationType = ActivationType

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def cutlass_fused_moe_workspace_size(
        self, max_num_tokens: int, hidden_size: int, intermediate_size: int,
        num_experts_total: int, top_k: int, *, x_dtype: torch.dtype, weight_dtype: torch.dtype,
        use_fused_finalize: bool = True, ep_size: int = 1,
    ) -> int:  # fmt: skip
        assert num_experts_total % ep_size == 0 and not use_fused_finalize
        return max_num_tokens * top_k * (hidden_size + intermediate_size)

    def cutlass_fused_moe(
        self, input: Tensor, token_selected_experts: Tensor, token_final_scales: Tensor,
        fc1_expert_weights: Tensor, fc2_expert_weights: Tensor, output_dtype: torch.dtype,
        quant_scales: list[Tensor], fc1_expert_biases: Tensor | None = None,
        fc2_expert_biases: Tensor | None = None, swiglu_alpha: Tensor | None = None,
        swiglu_beta: Tensor | None = None, swiglu_limit: Tensor | None = None, ep_size: int = 1,
        ep_rank: int = 0, output: Tensor | None = None,
        use_deepseek_fp8_block_scale: bool = False, use_w4_group_scaling: bool = False,
        use_wfp4afp8_humming: bool = False, tune_max_num_tokens: int = 8192,
        activation_type: ActivationType = ActivationType.Swiglu, use_fused_finalize: bool = True,
        workspace_buffer: Tensor | None = None, *, situ_beta: Tensor | None = None,
        situ_linear_beta: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        arguments = {k: v for k, v in locals().items() if k != "self"}
        self.calls.append(arguments)
        assert output is not None and output.dtype == output_dtype and output.is_contiguous()
        launcher_checks(arguments)
        first, second, rows, inner = operands(arguments)
        total = torch.zeros(output.shape)
        held = len(fc1_expert_weights)
        for token, (ids, weights) in enumerate(
            zip(token_selected_experts.tolist(), token_final_scales.tolist(), strict=True)
        ):
            for expert, weight in zip(ids, weights, strict=True):
                local = expert - ep_rank * held
                if not 0 <= local < held:
                    continue
                hidden = first[local] @ rows[token]
                if fc1_expert_biases is not None and fc2_expert_biases is not None:
                    hidden = hidden + fc1_expert_biases[local].float()
                hidden = inner(local, activated(arguments, local, hidden))
                result = second[local] @ hidden
                if fc2_expert_biases is not None:
                    result = result + fc2_expert_biases[local].float()
                total[token] += weight * result
        output.copy_(total)
        return [output]


def launcher_checks(given: dict[str, Any]) -> None:
    """The dtypes and shapes that the real launcher insists on."""
    rows, ids, weights = (
        given[name] for name in ("input", "token_selected_experts", "token_final_scales")
    )
    assert ids.dtype is torch.int32 and weights.dtype is torch.float32
    assert len(rows) == len(ids) > 0 and ids.shape == weights.shape
    assert all(t.is_contiguous() for t in (rows, ids, weights))
    scratch = given["workspace_buffer"]
    needed = ids.numel() * (rows.shape[1] + given["fc2_expert_weights"].shape[2])
    assert scratch.dtype is torch.uint8 and scratch.ndim == 1 and scratch.numel() >= needed
    held = len(given["fc1_expert_weights"])
    for name in ("swiglu_alpha", "swiglu_beta", "swiglu_limit", "situ_beta", "situ_linear_beta"):
        value = given[name]
        assert value is None or (value.shape == (held,) and value.dtype is torch.float32), name
    for name in ("fc1_expert_biases", "fc2_expert_biases"):
        assert given[name] is None or given[name].dtype is given["output_dtype"], name


def operands(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Dequantised weights [L, M, H] and [L, H, I], rows [T, H], and what happens to inner rows."""
    rows, scales = given["input"], given["quant_scales"]
    first, second = given["fc1_expert_weights"].float(), given["fc2_expert_weights"].float()
    if rows.dtype is torch.float8_e4m3fn:
        dequant1, quant2, dequant2, dequant_rows = scales
        assert dequant_rows.ndim == 0 and dequant1.shape == dequant2.shape == (len(first),)
        quant2 = quant2.expand(len(first))
        # The kernel multiplies the product by dequant1, which holds the rows' scale already.
        first, second = first * dequant1[:, None, None], second * dequant2[:, None, None]
        return first, second, rows.float(), lambda e, x: e4m3(x * quant2[e])
    if given["use_deepseek_fp8_block_scale"]:
        assert rows.dtype is torch.bfloat16
        return blocks(first, scales[0]), blocks(second, scales[1]), rows.float(), keep
    assert scales == [] and rows.dtype is given["fc1_expert_weights"].dtype
    return first, second, rows.float(), keep


def keep(expert: int, inner: Tensor) -> Tensor:
    return inner


def e4m3(values: Tensor) -> Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def blocks(weights: Tensor, scales: Tensor) -> Tensor:
    assert [128 * n for n in scales.shape[1:]] == list(weights.shape[1:])
    return weights * scales.repeat_interleave(128, 1).repeat_interleave(128, 2)


def activated(given: dict[str, Any], expert: int, hidden: Tensor) -> Tensor:
    """The documented formulas; the rows of fc1 are [up; gate]."""
    kind = ActivationType(given["activation_type"])
    if kind is ActivationType.Relu2:
        return relu(hidden) ** 2
    up, gate = hidden.chunk(2)
    alpha, beta, limit, situ, linear = (
        None if given[name] is None else given[name][expert]
        for name in ("swiglu_alpha", "swiglu_beta", "swiglu_limit", "situ_beta", "situ_linear_beta")
    )
    if kind is ActivationType.Geglu:
        return gelu(gate) * up
    if kind is ActivationType.GegluTanh:
        return gelu(gate, approximate="tanh") * up
    if kind is ActivationType.SwigluStep:
        cut = torch.tensor(7.0) if limit is None else limit
        return silu(gate).minimum(cut) * up.clamp(-cut, cut)
    if kind is ActivationType.Situ:
        return situ * torch.tanh(gate / situ) * gate.sigmoid() * linear * torch.tanh(up / linear)
    if alpha is None and beta is None and limit is None:
        return silu(gate) * up
    gate, up = gate.minimum(limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)
