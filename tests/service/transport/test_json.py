"""Messages as JSON: names of the .proto, every field, numbers as numbers."""

from __future__ import annotations

import json

import torch
from tests.service.engine.parts import resident
from tests.strategies import generator, layer_spec

from expertd.core import RoutingMethod, RoutingSpec
from expertd.transport.http import to_json
from expertd.transport.messages import layer_info
from expertd_wire.v1 import experts_pb2 as pb

ROUTING = RoutingSpec(RoutingMethod.DEEPSEEK_V3, "sigmoid", 2, n_group=2, topk_group=1, bias=True)


def test_every_field_of_a_layer_is_there() -> None:
    random = generator(1)
    layer = resident(layer_spec(routing=ROUTING), random)
    layer.bias = torch.arange(6).float()
    told = to_json(layer_info(layer))
    assert set(told) == {field.name for field in pb.LayerInfo.DESCRIPTOR.fields}
    assert told["routing"]["correction_bias"]["shape"] == [6]
    assert told["queued_tokens"] == 0 and told["expert_begin"] == 0
    assert told["plans"][0]["backend"] == "grouped"
    json.dumps(told, allow_nan=False)


def test_an_unset_optional_is_left_out_and_a_set_zero_is_not() -> None:
    assert "eps" not in to_json(pb.RoutingInfo())
    assert to_json(pb.RoutingInfo(eps=0.0))["eps"] == 0
