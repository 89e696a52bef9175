"""The faults a backend may make: each is refused, or moves the answer far from the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flashinfer import shuffle_matrix_a
from tests.service.twins import native as layouts
from tests.service.twins import plain, stored
from tests.service.twins.calls import call, packed, pairs
from tests.service.twins.native import EXPERTS, FORMATS, HIDDEN, INTER, TOKENS, Native
from tests.twins.checks import ContractError
from torch import Tensor

Fault = Callable[[Native, Tensor, Tensor], dict[str, Any]]


def _halves_swapped(native: Native, ids: Tensor, weights: Tensor) -> dict[str, Any]:
    order = torch.cat((torch.arange(INTER, 2 * INTER), torch.arange(INTER)))
    _, fc1, _ = layouts.random_layer(0, True)
    values, scales = stored.mxfp8(fc1[:, order])
    return {
        "gemm1_weights": stored.shuffled_bytes(values, True),
        "gemm1_weights_scale": stored.shuffled_scales(scales, True),
    }


def _reshuffled(epilogue: int) -> Fault:
    def fault(native: Native, ids: Tensor, weights: Tensor) -> dict[str, Any]:
        _, _, fc2 = layouts.random_layer(0, True)
        values, _ = stored.mxfp8(fc2)
        rows = [shuffle_matrix_a(each.view(torch.uint8), epilogue) for each in values]
        return {"gemm2_weights": torch.stack(rows).view(torch.float8_e4m3fn)}

    return fault


def _linear_scales(native: Native, ids: Tensor, weights: Tensor) -> dict[str, Any]:
    _, _, fc2 = layouts.random_layer(0, True)
    _, scales = stored.mxfp8(fc2)
    rows = torch.stack([stored.shuffled(each, False) for each in scales])
    return {"gemm2_weights_scale": rows}


def _not_transposed(native: Native, ids: Tensor, weights: Tensor) -> dict[str, Any]:
    scale = native.shared["hidden_states_scale"]
    return {"hidden_states_scale": scale.T.contiguous()}


def _packed_reversed(native: Native, ids: Tensor, weights: Tensor) -> dict[str, Any]:
    bits = weights.bfloat16().view(torch.int16).int() & 0xFFFF
    return {"topk_ids": (bits << 16) | (ids & 0xFFFF)}


def _plain_ids(native: Native, ids: Tensor, weights: Tensor) -> dict[str, Any]:
    return {"topk_ids": ids.clamp(min=0)}


def _offset_forgotten(native: Native, ids: Tensor, weights: Tensor) -> dict[str, Any]:
    held = native.held(4, 4)
    return {**held.per_expert, "local_expert_offset": 0, "local_num_experts": 4}


def _other_vector(native: Native, ids: Tensor, weights: Tensor) -> dict[str, Any]:
    scale = native.per_expert["gemm1_weights_scale"]
    return {"gemm1_weights_scale": scale[..., ::2].contiguous()}


def _beta_physical(native: Native, ids: Tensor, weights: Tensor) -> dict[str, Any]:
    return {"gemm1_beta": torch.ones(EXPERTS)}


def _groups_zero(native: Native, ids: Tensor, weights: Tensor) -> dict[str, Any]:
    return {"routing_method_type": 2, "n_group": 0, "topk_group": 0}


ONES = plain.Physical(beta=torch.ones(EXPERTS))
FAULTS: list[tuple[str, str, Fault, plain.Physical]] = [
    ("halves swapped", "mxfp8", _halves_swapped, plain.NONE),
    ("epilogue 64 for 128", "mxfp8", _reshuffled(64), plain.NONE),
    ("scale not transposed", "deepseek", _not_transposed, plain.NONE),
    ("packed order reversed", "bf16", _packed_reversed, plain.NONE),
    ("offset forgotten", "bf16", _offset_forgotten, plain.NONE),
    ("plain ids as packed", "bf16", _plain_ids, plain.NONE),
    ("scale of the wrong vector size", "nvfp4", _other_vector, plain.NONE),
    ("beta in the wrong unit", "nvfp4", _beta_physical, ONES),
    ("n_group 0 on fp8 block", "deepseek", _groups_zero, plain.NONE),
    ("linear for swizzled", "mxfp8", _linear_scales, plain.NONE),
]


@pytest.mark.parametrize(("what", "name", "fault", "physical"), FAULTS, ids=[f[0] for f in FAULTS])
def test_fault_is_caught(
    what: str, name: str, fault: Fault, physical: plain.Physical, seed: int
) -> None:
    native = FORMATS[name](0)
    ids, weights = pairs(seed)
    wanted = plain.output(native, ids.tolist(), weights, physical)
    arguments = {"topk_ids": packed(ids, weights), **fault(native, ids, weights)}
    try:
        got = call(native, **arguments)
    except ContractError:
        return
    assert plain.error(got, wanted) > 2 * native.tolerance, what


def test_the_right_epilogue_is_right(seed: int) -> None:
    """The fault above differs from the right call in the epilogue tile alone."""
    native = FORMATS["mxfp8"](0)
    ids, weights = pairs(seed)
    right = _reshuffled(128)(native, ids, weights)
    got = call(native, topk_ids=packed(ids, weights), **right)
    assert plain.error(got, plain.output(native, ids.tolist(), weights)) < native.tolerance


def test_a_dropped_bias_shows(seed: int) -> None:
    native = FORMATS["bf16_mxfp4"](seed)
    ids, weights = pairs(seed)
    bias = plain.Physical(bias2=torch.ones(EXPERTS, HIDDEN))
    got = call(native, topk_ids=packed(ids, weights))
    wanted = plain.output(native, ids.tolist(), weights, bias)
    assert plain.error(got, wanted) > 2 * native.tolerance


def test_an_output_that_is_left_alone_shows(seed: int) -> None:
    native = FORMATS["bf16"](seed)
    ids, weights = pairs(seed)
    output = torch.full((TOKENS, HIDDEN), float("nan"), dtype=torch.bfloat16)
    call(native, topk_ids=packed(ids, weights), output=output.clone())
    assert bool(output.isnan().all())
