"""Which function routes on a device: torch's operations, or our kernel on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from expertd.core import LayerSpec, RoutingSpec
from expertd.routing.methods import UNKNOWABLE

Router = Callable[[RoutingSpec, Tensor, Tensor | None], tuple[Tensor, Tensor]]

ROUTERS = {
    "cpu": "expertd.routing.reference:route_for",
    "cuda": "expertd.backends.triton.router:route_for",
}
LOGITS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def router_on(device_type: str) -> Router:
    """The router of devices of this type."""
    module, _, name = ROUTERS[device_type].partition(":")
    router: Router = getattr(importlib.import_module(module), name)
    return router


def warm_up_router(spec: LayerSpec, bias: Tensor | None, device: torch.device) -> None:
    """Compiles a layer's router for every dtype of logits, so that no request has to."""
    if spec.routing is None or spec.routing.method in UNKNOWABLE:
        return
    for dtype in LOGITS:
        logits = torch.zeros(1, spec.num_experts, dtype=dtype, device=device)
        router_on(device.type)(spec.routing, logits, bias)
