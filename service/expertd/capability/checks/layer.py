"""Device and layer: what is known before a call arrives."""

from __future__ import annotations

from collections.abc import Iterator

from expertd.capability.checks.fault import Ask, Check, Fault, listed
from expertd.capability.row import Row


def arch(row: Row, ask: Ask) -> Iterator[Fault]:
    if row.archs and ask.device.arch not in row.archs:
        why = f"{row.entry} has no build for {ask.device.arch}"
        yield Fault("arch", "device", ask.device.arch, listed(row.archs), why)


def identity(row: Row, ask: Ask) -> Iterator[Fault]:
    if row.identity and not ask.identity:
        why = "it copies its rows and computes no experts"
        yield Fault("layer_kind", "num_experts", str(ask.spec.num_experts), "0", why)
    if ask.identity and not row.identity:
        why = "the layer is an identity layer without experts"
        yield Fault("layer_kind", "num_experts", "0", "1 and more", why)


def quant(row: Row, ask: Ask) -> Iterator[Fault]:
    if ask.spec.quant not in row.quants:
        why = f"it reads no {ask.spec.quant} weights"
        yield Fault("quant", "quant", ask.spec.quant, listed(row.quants), why)


def activation(row: Row, ask: Ask) -> Iterator[Fault]:
    kind = ask.spec.activation.kind
    if kind not in row.activations:
        why = f"there is no kernel for {kind}"
        yield Fault("activation", "activation", kind, listed(row.activations), why)


CHECKS: tuple[Check, ...] = (arch, identity, quant, activation)
