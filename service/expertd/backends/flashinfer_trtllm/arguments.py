"""The arguments that describe a layer to an entry: sizes, routing, enum members by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from expertd.backends.flashinfer_trtllm.pad import Sizes
from expertd.capability.row import Row, Tier
from expertd.core import LayerSpec, PlanMode, RoutingMethod
from expertd.routing.kernel_ids import kernel_id

LEGAL_METHOD = RoutingMethod.RENORMALIZE
"""What routed calls name: their launchers still look at the method, and this one bounds least."""

Values = dict[str, Any]


def layer_values(row: Row, spec: LayerSpec, sizes: Sizes, library: Any) -> Values:
    """Every argument of the layer that is no tensor and the same in both modes."""
    assert row.call is not None
    members = dict(row.call.members)
    values: Values = {
        "num_experts": spec.num_experts,
        "intermediate_size": sizes.native_intermediate,
        "local_expert_offset": spec.expert_begin,
        "local_num_experts": spec.held,
        "do_finalize": True,
        "activation_type": _activation(row, spec, library),
        "valid_hidden_size": sizes.hidden,
        "valid_intermediate_size": sizes.intermediate,
    }
    for argument, enum in ENUMS.items():
        if enum in members:
            values[argument] = int(getattr(library, enum)[members[enum]])
    if "hidden_states_scale_layout" in row.call.prefers:
        values["hidden_states_scale_layout"] = library.SfLayout["layout_linear"]
    return values


ENUMS = {"weight_layout": "WeightLayout", "fp8_quantization_type": "Fp8QuantizationType"}
"""Arguments whose value is a member that the row names, and its enum."""


def routing_values(
    row: Row, spec: LayerSpec, bias: Tensor | None, library: Any, ungrouped: int | None
) -> Values:
    """How the experts are chosen; ungrouped is what DeepSeekV3 without groups passes for them."""
    members = {name: int(value) for name, value in library.RoutingMethodType.__members__.items()}
    if row.mode is PlanMode.ROUTED:
        # The choice is made and the weights are final.
        return {**_UNROUTED, "routing_method_type": kernel_id(LEGAL_METHOD, members)}
    routing = spec.routing
    assert routing is not None, "a layer without routing has no monolithic plan"
    tier = tier_of(row.routing[routing.method], routing.grouped)
    groups = (routing.n_group, routing.topk_group) if routing.grouped else (ungrouped, ungrouped)
    grouping = groups if routing.method is RoutingMethod.DEEPSEEK_V3 else (None, None)
    return {
        "routing_method_type": kernel_id(routing.method, members),
        "top_k": routing.top_k,
        "n_group": grouping[0],
        "topk_group": grouping[1],
        "routed_scaling_factor": routing.routed_scaling_factor if tier.scale else None,
        "routing_bias": bias,
        "norm_topk_prob": routing.renormalize,
        "use_routing_scales_on_input": routing.weight_site == "input",
    }


_UNROUTED: Mapping[str, Any] = {
    "n_group": None,
    "topk_group": None,
    "routed_scaling_factor": None,
    "routing_bias": None,
    "use_routing_scales_on_input": False,
}


def tier_of(tiers: tuple[Tier, ...], grouped: bool) -> Tier:
    """The tier for groups if the layer has them and there is one."""
    return next((tier for tier in tiers if tier.grouped == grouped), tiers[0])


def router_bias(
    row: Row, spec: LayerSpec, bias: Tensor | None, device: torch.device
) -> Tensor | None:
    """The correction bias as it is; zeros where the kernel would follow a null pointer."""
    if bias is not None or row.mode is PlanMode.ROUTED or spec.routing is None:
        return bias
    tier = tier_of(row.routing[spec.routing.method], spec.routing.grouped)
    if not tier.needs_bias:
        return None
    return torch.zeros(spec.num_experts, dtype=torch.float32, device=device)


def _activation(row: Row, spec: LayerSpec, library: Any) -> int:
    return int(library.ActivationType[row.activations[spec.activation.kind].member])
