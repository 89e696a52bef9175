"""Between the GEMMs the twin rounds as the kernels do: far nearer to that than to plain fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flashinfer.fused_moe import prepare
from tests.service.twins import plain, stored
from tests.service.twins.calls import call, packed, pairs
from tests.service.twins.native import FORMATS, Native
from tests.service.twins.plain import Roundings
from torch import Tensor


def bf16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def groups128(values: Tensor) -> Tensor:
    codes, scale = prepare._deepseek_fp8_quantize_activations(values[None])
    return stored.wide(codes.float(), scale.T)[0]


def mx(values: Tensor) -> Tensor:
    codes, scale = stored.mxfp8(values[None])
    return stored.wide(codes.float(), stored.exponents(scale))[0]


def rows(values: Tensor) -> Tensor:
    codes, scale = stored.by_row(bf16(values)[None])
    return (codes.float() * scale)[0]


def static(native: Native) -> Callable[[Tensor], Tensor]:
    return lambda values: (values * native.middle).to(torch.float8_e4m3fn).float() / native.middle


def nvfp4(native: Native) -> Callable[[Tensor], Tensor]:
    return lambda values: stored.nvfp4(values[None], torch.tensor(native.middle))[2][0]


MIDDLE: dict[str, Callable[[Native], Callable[[Tensor], Tensor]]] = {
    "bf16": lambda native: bf16,
    "fp8_per_tensor": static,
    "fp8_per_channel": lambda native: rows,
    "deepseek": lambda native: groups128,
    "deepseek_shuffled": lambda native: groups128,
    "mxfp8": lambda native: mx,
    "nvfp4": nvfp4,
    "bf16_mxfp4": lambda native: bf16,
    "mxfp8_mxfp4": lambda native: mx,
    "e4m3_mxfp4": static,
    "mxint4": lambda native: bf16,
}


@pytest.mark.parametrize("name", FORMATS)
def test_roundings(name: str, seed: int) -> None:
    native = FORMATS[name](seed)
    ids, weights = pairs(seed)
    roundings = Roundings(
        raw=groups128 if name.startswith("deepseek") else plain.as_it_is,
        middle=MIDDLE[name](native),
        result=bf16,
    )
    got = call(native, topk_ids=packed(ids, weights))
    exact = plain.output(native, ids.tolist(), weights)
    rounded = plain.output(native, ids.tolist(), weights, roundings=roundings)
    away = (got.float() - rounded).norm(dim=1) / (rounded - exact).norm(dim=1)
    assert float(away.median()) < 0.3  # a sum in another order may flip a code in a few tokens
