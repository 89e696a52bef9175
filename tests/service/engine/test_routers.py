"""Who routes on which device, and that a layer's router is ready before its first call."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from tests.strategies import layer_spec

from expertd.core import RoutingMethod
from expertd.engine import routers
from expertd.routing import reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", routers.ROUTERS)
def test_routers_exist(device: str) -> None:
    pytest.importorskip("triton")
    module, _, name = routers.ROUTERS[device].partition(":")
    assert routers.router_on(device) is getattr(importlib.import_module(module), name)


def test_torch_routes_on_cpu() -> None:
    assert routers.router_on("cpu") is reference.route_for


def test_warm_up_routes_every_dtype_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, tuple[int, ...], object]] = []
    bias = torch.zeros(6)

    def route(spec, logits, given):  # type: ignore[no-untyped-def]
        seen.append((logits.dtype, tuple(logits.shape), given))
        return logits, logits

    monkeypatch.setattr(routers, "router_on", lambda device_type: route)
    routers.warm_up_router(layer_spec(), bias, CPU)
    assert seen == [(dtype, (1, 6), bias) for dtype in routers.LOGITS]


def test_layers_that_take_no_logits_have_nothing_to_warm() -> None:
    spec = layer_spec()
    assert spec.routing is not None
    for routing in (None, replace(spec.routing, method=RoutingMethod.CUSTOM)):
        routers.warm_up_router(replace(spec, routing=routing), None, CPU)
