"""The layer: what is known before a call arrives."""

from __future__ import annotations

from collections.abc import Iterator

from expertd.capability.checks.fault import Ask, Check, Fault, listed, multiple_of
from expertd.capability.row import Row

Faults = Iterator[Fault]


def arch(row: Row, ask: Ask) -> Faults:
    if row.archs and ask.device.arch not in row.archs:
        why = f"{row.entry} has no kernels for {ask.device.arch}"
        yield Fault("arch", "device", ask.device.arch, listed(row.archs), why)


def identity(row: Row, ask: Ask) -> Faults:
    if row.identity and not ask.identity:
        why = "it copies its rows and computes no experts"
        yield Fault("layer_kind", "num_experts", str(ask.spec.num_experts), "0", why)
    if ask.identity and not row.identity:
        why = "the layer is an identity layer without experts"
        yield Fault("layer_kind", "num_experts", "0", ">= 1", why)


def quant(row: Row, ask: Ask) -> Faults:
    if ask.spec.quant not in row.quants:
        why = f"it reads no {ask.spec.quant} weights"
        yield Fault("quant", "quant", ask.spec.quant, listed(row.quants), why)


def activation(row: Row, ask: Ask) -> Faults:
    kind = ask.spec.activation.kind
    if kind not in row.activations:
        why = f"there is no kernel for {kind} in this format"
        yield Fault("activation", "activation", kind, listed(row.activations), why)


def limit(row: Row, ask: Ask) -> Faults:
    given = ask.spec.activation
    use = row.activations.get(given.kind)
    if use is not None and use.limit is None and given.limit is not None:
        why = "the kernel does not clamp, so the limit would be dropped"
        yield Fault("limit", "limit", str(given.limit), "none", why)


def expert_bias(row: Row, ask: Ask) -> Faults:
    if ask.spec.expert_bias and not row.expert_bias:
        why = "the entry has no biases of the experts"
        yield Fault("expert_bias", "expert_bias", "true", "false", why)


def experts_multiple(row: Row, ask: Ask) -> Faults:
    given, step = ask.spec.num_experts, row.limits.experts_multiple
    if given % step:
        why = "the launcher insists on it"
        yield Fault("experts_multiple", "num_experts", str(given), multiple_of(step), why)


def expert_range(row: Row, ask: Ask) -> Faults:
    spec = ask.spec
    if row.expert_range == "any" or spec.complete or not spec.held:
        return
    if spec.num_experts % spec.held or spec.expert_begin % spec.held:
        given = f"{spec.expert_begin}-{spec.expert_end - 1}"
        why = "ranks hold equal parts of the layer, each starting where the one before ends"
        accepted = f"an equal part of 0-{spec.num_experts - 1}"
        yield Fault("expert_range", "experts", given, accepted, why)


def hidden(row: Row, ask: Ask) -> Faults:
    step, padded = row.limits.hidden_multiple, "hidden" in row.limits.padded
    if ask.spec.hidden % step and not (padded and pads_hidden(row, ask)):
        why = "rows of this kernel are whole blocks and cannot be padded here"
        yield Fault("hidden_multiple", "hidden", str(ask.spec.hidden), multiple_of(step), why)


def intermediate(row: Row, ask: Ask) -> Faults:
    step, padded = row.limits.intermediate_multiple, "intermediate" in row.limits.padded
    if ask.spec.intermediate % step and not padded:
        given = str(ask.spec.intermediate)
        why = "experts of this kernel are whole blocks wide"
        yield Fault("intermediate_multiple", "intermediate", given, multiple_of(step), why)


def pads_hidden(row: Row, ask: Ask) -> bool:
    """Whether the library's entry can be told the sizes before padding."""
    if row.call is None or ask.library is None:
        return False
    signature = ask.library.functions.get(row.call.function)
    return signature is not None and signature.names.issuperset(row.call.padding)


CHECKS: tuple[Check, ...] = (
    identity,
    quant,
    activation,
    limit,
    expert_bias,
    experts_multiple,
    expert_range,
    hidden,
    intermediate,
)
