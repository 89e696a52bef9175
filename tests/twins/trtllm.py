"""The library object: flashinfer.fused_moe's TRT-LLM entry points, answered on any device.

Every call is bound to the real keyword signature, checked as the launcher and its kernels demand
(ContractError), and computed from the native layouts in fp32 with the kernels' roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from tests.twins import compute, enums, limits, routing
from tests.twins.checks import Arguments, ContractError
from tests.twins.entries_block import fp4_block, fp8_block, mxint4_block
from tests.twins.entries_plain import bf16, fp8_per_channel, fp8_per_tensor
from tests.twins.launch import Launch
from tests.twins.signatures import PARAMETERS, signature
from torch import Tensor

VERSION = "0.7.2.post1"

CHECKS: dict[str, Callable[[Arguments], Launch]] = {
    "trtllm_bf16": bf16,
    "trtllm_fp8_per_tensor_scale": fp8_per_tensor,
    "trtllm_fp8_per_channel_scale": fp8_per_channel,
    "trtllm_fp8_block_scale": fp8_block,
    "trtllm_fp4_block_scale": fp4_block,
    "trtllm_mxint4_block_scale": mxint4_block,
}
ENUMS = (
    "ActivationType",
    "Fp8QuantizationType",
    "RoutingInputMode",
    "RoutingMethodType",
    "SfLayout",
    "WeightLayout",
)

Entry = Callable[..., Tensor | list[Tensor]]


@cache
def library() -> SimpleNamespace:
    """One object with the attribute names of flashinfer.fused_moe and its version."""
    entries = {name: _entry(name) for name in PARAMETERS}
    members = {name: getattr(enums, name) for name in ENUMS}
    return SimpleNamespace(__version__=VERSION, ContractError=ContractError, **members, **entries)


def _entry(name: str) -> Entry:
    bound_to = signature(name)

    def entry(*args: Any, **kwargs: Any) -> Tensor | list[Tensor]:
        bound = bound_to.bind(*args, **kwargs)
        bound.apply_defaults()
        return call(Arguments(name, bound.arguments))

    entry.__name__ = entry.__qualname__ = name
    entry.__signature__ = bound_to  # type: ignore[attr-defined]
    return entry


def call(args: Arguments) -> Tensor | list[Tensor]:
    """Checks, routes and computes one call; raises ContractError."""
    check = CHECKS[args.entry.removesuffix("_moe").removesuffix("_routed")]
    launch = check(args)
    launch.recheck(limits.method(args), launch.size, limits.groups(args))
    choice = routing.choose(args, launch.size, pair=launch.pair)
    if launch.weigh_input:
        choice = replace(choice, weights=choice.weights.bfloat16().float())
    if launch.ignore_weights:
        choice = replace(choice, weights=torch.ones_like(choice.weights))
    result = compute.run(
        launch.experts, choice, launch.size, weigh_input=launch.weigh_input
    ).contiguous()
    if args.output is not None:
        result = args.output.copy_(result)
    return [result] if launch.listed else result
