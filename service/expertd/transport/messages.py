"""The answers to questions, as protobuf messages: layers and capabilities."""

from __future__ import annotations

from expertd.capability import report
from expertd.capability.device import DeviceInfo
from expertd.capability.plan import Plan, States
from expertd.core import Activation, RoutingSpec
from expertd.engine.choice import likely_plans
from expertd.engine.resident import Resident, Residents
from expertd_wire.v1 import experts_pb2 as pb


def list_layers(residents: Residents, model: str) -> pb.ListLayersReply:
    """All layers, or those of one model; raises NotFound."""
    found = residents.of(model).values() if model else residents.all()
    return pb.ListLayersReply(layers=[layer_info(resident) for resident in found])


def layer_info(resident: Resident) -> pb.LayerInfo:
    """What a client may want to know of a layer."""
    spec = resident.spec
    info = pb.LayerInfo(
        model=resident.model,
        layer=resident.layer,
        state=resident.state,
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        num_experts=spec.num_experts,
        expert_begin=spec.expert_begin,
        expert_end=spec.expert_end,
        top_k=spec.routing.top_k if spec.routing else 0,
        activation=_activation_info(spec.activation) if spec.num_experts else None,
        quant=spec.quant if spec.num_experts else "",
        weights_digest=resident.digest,
        checkpoint_digest=resident.checkpoint_digest,
        generation=resident.generation,
        queued_tokens=resident.queued_tokens,
        expert_rows=resident.expert_rows.counts(spec),
        plans=[_plan_info(plan, resident) for plan in likely_plans(resident)],
        detail=resident.detail,
    )
    if spec.routing is not None:
        info.routing.CopyFrom(_routing_info(spec.routing, resident))
    return info


def _plan_info(plan: Plan, resident: Resident) -> pb.PlanInfo:
    times = resident.timings.plans.get(plan.row.cell(resident.spec.quant), ())
    return pb.PlanInfo(
        backend=plan.backend,
        mode=plan.mode,
        entry=plan.entry,
        state=plan.state,
        microseconds={1 << index: time for index, time in enumerate(times)},
    )


def _activation_info(activation: Activation) -> pb.ActivationInfo:
    return pb.ActivationInfo(
        name=activation.kind,
        alpha=activation.alpha,
        beta=activation.beta,
        limit=activation.limit,
    )


def _routing_info(routing: RoutingSpec, resident: Resident) -> pb.RoutingInfo:
    info = pb.RoutingInfo(
        method=routing.method,
        scoring=routing.scoring,
        renormalize=routing.renormalize,
        n_group=routing.n_group or 0,
        topk_group=routing.topk_group or 0,
        routed_scaling_factor=routing.routed_scaling_factor,
        scale_site=routing.scale_site,
        weight_site=routing.weight_site,
        eps=routing.eps,
        group_fill="" if routing.group_fill is None else f"{routing.group_fill:g}",
        group_score=routing.group_score,
    )
    if resident.bias is not None:
        bias = resident.bias.cpu().numpy()
        info.correction_bias.CopyFrom(
            pb.Tensor(dtype="float32", shape=bias.shape, data=bias.tobytes())
        )
    return info


def capabilities(device: DeviceInfo, states: States) -> pb.GetCapabilitiesReply:
    """Every cell of the table on this device, with its state and why."""
    found = report.capabilities(device, states)
    return pb.GetCapabilitiesReply(
        device=found["device"],
        flashinfer=found["flashinfer"] or "",
        cells=[pb.Cell(**cell) for cell in found["cells"]],
        drift=found["drift"],
    )
