"""What every entry is handed, in both modes: names, dtypes and shapes of its contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.service.trtllm.layers import ACTIVATIONS, backend_of, batch_of, layer
from tests.service.trtllm.recording import ANSWER, Recording
from torch import Tensor

from expertd.capability.row import Row
from expertd.capability.rows.flashinfer_trtllm import ROWS
from expertd.core import ActivationKind, LayerSpec, PlanMode

E4M3, BF16, F32, U8 = torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.uint8
# Tokens, hidden, intermediate, experts held.
T, H, N, L = 5, 256, 512, 8

CASES = [
    pytest.param(row, kind, id=f"{row.entry}-{row.activation_quant}-{row.quants[0]}-{kind}")
    for row in ROWS
    for kind in row.activations
]


def contract(row: Row, m: int) -> dict[str, tuple[Any, tuple[int, ...]] | None]:
    """Section 2.5 of the reference as a table: (dtype, shape), or None for "must be None"."""
    block = {"gemm1_weights_scale", "gemm2_weights_scale"}
    table: dict[str, dict[str, tuple[Any, tuple[int, ...]] | None]] = {
        "bf16/bf16": {
            "hidden_states": (BF16, (T, H)),
            "gemm1_weights": (BF16, (L, H // 64, m, 64)),
            "gemm2_weights": (BF16, (L, N // 64, H, 64)),
        },
        "fp8_tensor/fp8_tensor": {
            "hidden_states": (E4M3, (T, H)),
            "gemm1_weights": (E4M3, (L, m, H)),
            "gemm2_weights": (E4M3, (L, H, N)),
            "output1_scales_scalar": (F32, (L,)),
            "output1_scales_gate_scalar": (F32, (L,)),
            "output2_scales_scalar": (F32, (L,)),
        },
        "fp8_channel/fp8_token": {
            "hidden_states": (E4M3, (T, H)),
            "hidden_states_scale": (F32, (T, 1)),
            "gemm1_weights": (E4M3, (L, m, H)),
            "gemm2_weights": (E4M3, (L, H, N)),
            "gemm1_per_channel_weight_scale": (F32, (L, m)),
            "gemm2_per_channel_weight_scale": (F32, (L, H)),
            "output1_scale_scalar": (F32, (L,)),
            "output1_scale_gate_scalar": (F32, (L,)),
            "output2_scale_scalar": (F32, (L,)),
        },
        "fp8_block128/fp8_group128": {
            "hidden_states": (E4M3, (T, H)),
            "hidden_states_scale": (F32, (H // 128, T)),
            "gemm1_weights": (E4M3, (L, m, H)),
            "gemm2_weights": (E4M3, (L, H, N)),
            "gemm1_weights_scale": (F32, (L, m // 128, H // 128)),
            "gemm2_weights_scale": (F32, (L, H // 128, N // 128)),
        },
        "mxfp8/mxfp8": {
            "hidden_states": (E4M3, (T, H)),
            "hidden_states_scale": (U8, (T, H // 32)),
            "gemm1_weights": (E4M3, (L, m, H)),
            "gemm2_weights": (E4M3, (L, H, N)),
            "gemm1_weights_scale": (U8, (L, m, H // 32)),
            "gemm2_weights_scale": (U8, (L, H, N // 32)),
        },
        "nvfp4/nvfp4": {
            "hidden_states": (U8, (T, H // 2)),
            "hidden_states_scale": (E4M3, (T, H // 16)),
            "gemm1_weights": (U8, (L, m, H // 2)),
            "gemm2_weights": (U8, (L, H, N // 2)),
            "gemm1_weights_scale": (E4M3, (L, m, H // 16)),
            "gemm2_weights_scale": (E4M3, (L, H, N // 16)),
            "output1_scale_scalar": (F32, (L,)),
            "output1_scale_gate_scalar": (F32, (L,)),
            "output2_scale_scalar": (F32, (L,)),
        },
        "mxint4/bf16": {
            "hidden_states": (BF16, (T, H)),
            "gemm1_weights": (U8, (L, H // 256, m, 128)),
            "gemm2_weights": (U8, (L, N // 256, H, 128)),
            "gemm1_weights_scale": (BF16, (L, m, H // 32)),
            "gemm2_weights_scale": (BF16, (L, H, N // 32)),
        },
    }
    mxfp4 = {
        "gemm1_weights": (U8, (L, m, H // 2)),
        "gemm2_weights": (U8, (L, H, N // 2)),
        **{
            name: (E4M3, (L, rows, columns // 32))
            for name, rows, columns in zip(sorted(block), (m, H), (H, N), strict=True)
        },
    }
    rows = {"hidden_states": (BF16, (T, H)), "hidden_states_scale": None}
    table["mxfp4/bf16"] = {**mxfp4, **rows}
    rows = {"hidden_states": (E4M3, (T, H)), "hidden_states_scale": (E4M3, (T, H // 32))}
    table["mxfp4/mxfp8"] = {**mxfp4, **rows}
    return table[f"{row.quants[0]}/{row.activation_quant}"]


@pytest.mark.parametrize(("row", "kind"), CASES)
def test_a_call_binds_and_keeps_the_contract(
    recording: Recording, row: Row, kind: ActivationKind
) -> None:
    activation = ACTIVATIONS[kind]
    bias = row.expert_bias and kind is not ActivationKind.SWIGLU
    spec = layer(row.quants[0], intermediate=N, activation=activation, expert_bias=bias)
    backend = backend_of(row, spec)
    batch = batch_of(row, spec)
    backend.forward(batch)
    given = recording.last
    m = N * (2 if activation.gated else 1)
    for name, expected in contract(row, m).items():
        check_tensor(name, given[name], expected)
    check_common(row, spec, given)
    check_parameters(row, spec, given)
    assert bool((batch.out == ANSWER).all())


def check_tensor(name: str, given: Any, expected: tuple[Any, tuple[int, ...]] | None) -> None:
    if expected is None:
        assert given is None, name
        return
    assert isinstance(given, Tensor) and given.is_contiguous(), name
    assert (given.dtype, tuple(given.shape)) == expected, name


def check_common(row: Row, spec: LayerSpec, given: dict[str, Any]) -> None:
    expected = {
        "num_experts": 8,
        "intermediate_size": N,
        "local_expert_offset": 0,
        "local_num_experts": L,
        "do_finalize": True,
        "top_k": 2,
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": None,
        "tune_max_num_tokens": 8192,
        "routing_method_type": 1,
    }
    for name, value in expected.items():
        assert given[name] == value, name
    codes = {"swiglu": 3, "swiglu_oai": 3, "swiglu_step": 7, "geglu": 4, "situ": 10, "relu2": 6}
    if "activation_type" in given:
        assert given["activation_type"] == codes[spec.activation.kind]
    else:
        assert "mxint4" in row.entry
    layouts = {"trtllm_bf16": (True, 2), "trtllm_fp8_block": (row.quants[0] == "mxfp8", 0)}
    for prefix, layout in layouts.items():
        if row.entry.startswith(prefix):
            assert (given["use_shuffled_weight"], given["weight_layout"]) == layout
    if row.entry.startswith("trtllm_fp8_block"):
        assert given["fp8_quantization_type"] == (2 if row.quants[0] == "mxfp8" else 1)
    if row.entry.startswith("trtllm_fp4"):
        assert int(given["hidden_states_scale_layout"]) == 2
    assert ("output" in given) == ("per_channel" not in row.entry)
    assert ("routing_logits" in given) == (row.mode is PlanMode.MONOLITHIC)
    assert ("topk_ids" in given) == (row.mode is PlanMode.ROUTED)
    assert "valid_hidden_size" not in given


def check_parameters(row: Row, spec: LayerSpec, given: dict[str, Any]) -> None:
    """Constants of the activation and biases: present where used, None or absent elsewhere."""
    used = {
        ActivationKind.SWIGLU_OAI: {"gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"},
        ActivationKind.SITU: {"gemm1_alpha", "gemm1_beta"},
        ActivationKind.SWIGLU_STEP: {"gemm1_clamp_limit"},
    }.get(spec.activation.kind, set())
    for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"):
        expected = (F32, (L,)) if name in used else None
        check_tensor(name, given.get(name), expected)
    for name, width in (("gemm1_bias", spec.rows13), ("gemm2_bias", H)):
        check_tensor(name, given.get(name), (F32, (L, width)) if spec.expert_bias else None)
