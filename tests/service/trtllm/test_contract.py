"""What every entry is handed, in both modes: names, dtypes and shapes of its contract."""

from __future__ import annotations

from collections.abc import Callable
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


Expected = tuple[Any, tuple[int, ...]] | None
"""A tensor's dtype and shape, or None for an argument that must be None."""

Shapes = dict[str, Expected]


def contract(row: Row, m: int) -> Shapes:
    """Section 2.5 of the reference: what a row's entry is handed, m being the rows of gemm1."""
    return CONTRACTS[f"{row.quants[0]}/{row.activation_quant}"](m)


def major_k(m: int, dtype: torch.dtype, packed: int = 1) -> Shapes:
    """Weights [L, rows, columns], packed values to an element."""
    return {
        "gemm1_weights": (dtype, (L, m, H // packed)),
        "gemm2_weights": (dtype, (L, H, N // packed)),
    }


def block_scales(m: int, dtype: torch.dtype, rows: int, columns: int) -> Shapes:
    """One scale for so many rows and columns."""
    return {
        "gemm1_weights_scale": (dtype, (L, m // rows, H // columns)),
        "gemm2_weights_scale": (dtype, (L, H // rows, N // columns)),
    }


def scalars(*names: str) -> Shapes:
    return {name: (F32, (L,)) for name in names}


SCALARS = scalars("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")


def bf16(m: int) -> Shapes:
    return {
        "hidden_states": (BF16, (T, H)),
        "gemm1_weights": (BF16, (L, H // 64, m, 64)),
        "gemm2_weights": (BF16, (L, N // 64, H, 64)),
    }


def per_tensor(m: int) -> Shapes:
    names = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
    return {"hidden_states": (E4M3, (T, H)), **major_k(m, E4M3), **scalars(*names)}


def per_channel(m: int) -> Shapes:
    return {
        "hidden_states": (E4M3, (T, H)),
        "hidden_states_scale": (F32, (T, 1)),
        **major_k(m, E4M3),
        "gemm1_per_channel_weight_scale": (F32, (L, m)),
        "gemm2_per_channel_weight_scale": (F32, (L, H)),
        **SCALARS,
    }


def deepseek(m: int) -> Shapes:
    return {
        "hidden_states": (E4M3, (T, H)),
        "hidden_states_scale": (F32, (H // 128, T)),
        **major_k(m, E4M3),
        **block_scales(m, F32, 128, 128),
    }


def mxfp8(m: int) -> Shapes:
    return {
        "hidden_states": (E4M3, (T, H)),
        "hidden_states_scale": (U8, (T, H // 32)),
        **major_k(m, E4M3),
        **block_scales(m, U8, 1, 32),
    }


def nvfp4(m: int) -> Shapes:
    return {
        "hidden_states": (U8, (T, H // 2)),
        "hidden_states_scale": (E4M3, (T, H // 16)),
        **major_k(m, U8, packed=2),
        **block_scales(m, E4M3, 1, 16),
        **SCALARS,
    }


def mxfp4(m: int) -> Shapes:
    return {**major_k(m, U8, packed=2), **block_scales(m, E4M3, 1, 32)}


def mxfp4_bf16(m: int) -> Shapes:
    return {"hidden_states": (BF16, (T, H)), "hidden_states_scale": None, **mxfp4(m)}


def mxfp4_mxfp8(m: int) -> Shapes:
    rows: Shapes = {"hidden_states": (E4M3, (T, H)), "hidden_states_scale": (E4M3, (T, H // 32))}
    return {**rows, **mxfp4(m)}


def mxint4(m: int) -> Shapes:
    return {
        "hidden_states": (BF16, (T, H)),
        "gemm1_weights": (U8, (L, H // 256, m, 128)),
        "gemm2_weights": (U8, (L, N // 256, H, 128)),
        **block_scales(m, BF16, 1, 32),
    }


CONTRACTS: dict[str, Callable[[int], Shapes]] = {
    "bf16/bf16": bf16,
    "fp8_tensor/fp8_tensor": per_tensor,
    "fp8_channel/fp8_token": per_channel,
    "fp8_block128/fp8_group128": deepseek,
    "mxfp8/mxfp8": mxfp8,
    "nvfp4/nvfp4": nvfp4,
    "mxfp4/bf16": mxfp4_bf16,
    "mxfp4/mxfp8": mxfp4_mxfp8,
    "mxint4/bf16": mxint4,
}
"""By weights/rows."""


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


def check_tensor(name: str, given: Any, expected: Expected) -> None:
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
    check_enums(row, spec, given)
    assert ("output" in given) == ("per_channel" not in row.entry)
    assert ("routing_logits" in given) == (row.mode is PlanMode.MONOLITHIC)
    assert ("topk_ids" in given) == (row.mode is PlanMode.ROUTED)
    assert "valid_hidden_size" not in given


ACTIVATION_CODES = {
    "swiglu": 3,
    "swiglu_oai": 3,
    "swiglu_step": 7,
    "geglu": 4,
    "situ": 10,
    "relu2": 6,
}
LAYOUTS = {("bf16", "bf16"): (True, 2), ("fp8_block128", "fp8_group128"): (False, 0)}
"""use_shuffled_weight and weight_layout, where they are not (True, MajorK)."""


def check_enums(row: Row, spec: LayerSpec, given: dict[str, Any]) -> None:
    """Integers of the installed version; arguments that an entry lacks are not passed."""
    formats = row.quants[0], row.activation_quant
    shuffled, layout = LAYOUTS.get((str(formats[0]), formats[1]), (True, 0))
    quantization = {"fp8_block128": 1, "mxfp8": 2}.get(row.quants[0])
    fp4 = row.entry.startswith("trtllm_fp4")
    expected: dict[str, int | bool | None] = {
        "activation_type": ACTIVATION_CODES[spec.activation.kind],
        "use_shuffled_weight": shuffled,
        "weight_layout": layout,
        "fp8_quantization_type": quantization,
        "hidden_states_scale_layout": 2 if fp4 else None,
    }
    for name in expected.keys() & given.keys():
        assert given[name] == expected[name], name
    laid_out = row.entry.startswith(("trtllm_bf16", "trtllm_fp8_block"))
    assert ("weight_layout" in given) == ("use_shuffled_weight" in given) == laid_out
    assert ("fp8_quantization_type" in given) == row.entry.startswith("trtllm_fp8_block")
    assert ("hidden_states_scale_layout" in given) == fp4
    assert ("activation_type" in given) == ("mxint4" not in row.entry)


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
