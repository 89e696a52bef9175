"""The plans that may run a call, in order of preference, and why every other row may not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from expertd.capability.checks.fault import Ask, Fault
from expertd.capability.device import DeviceInfo
from expertd.capability.formats import declared_activation
from expertd.capability.library import library
from expertd.capability.match import refusal, refusals
from expertd.capability.row import Cell, Row, State
from expertd.capability.rows import ROWS
from expertd.core import CallForm, LayerSpec, PlanMode, RoutingForm
from expertd.errors import InvalidArgument
from expertd_wire.errors import Refusal

States = Mapping[Cell, State]


@dataclass(frozen=True, slots=True)
class Plan:
    """A row that may run a call, and where the router's factors are applied: exactly once each.

    scale_in_weights: expertd's own router multiplies the routed scale into the weights; otherwise
    the kernel applies it (monolithic) or the caller's weights are final (top-k form).
    weights_on: where the router weight multiplies: an expert's output or input (both done by the
    kernel), or the rows before it (then the kernel's weights are 1).
    """

    row: Row
    state: State
    scale_in_weights: bool
    weights_on: Literal["output", "input", "rows"]

    @property
    def backend(self) -> str:
        return self.row.backend

    @property
    def mode(self) -> PlanMode:
        return self.row.mode

    @property
    def entry(self) -> str:
        return self.row.entry

    @property
    def activation(self) -> str:
        """The format in which the rows enter the first GEMM."""
        return self.row.activation_quant


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that may not run a call, with every reason."""

    row: Row
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class PlanSet:
    """What may run a call (best first) and what may not."""

    usable: tuple[Plan, ...]
    rejected: tuple[Rejected, ...]

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The reasons of all rejected rows, for an error's details."""
        return tuple(reason for entry in self.rejected for reason in entry.refusals)


def plan(
    spec: LayerSpec,
    form: CallForm,
    device: DeviceInfo,
    *,
    states: States | None = None,
    rows: tuple[Row, ...] = ROWS,
    trust_declared: bool = False,
    exact_routing: bool = False,
    deterministic: bool = False,
) -> PlanSet:
    """Judge every row (of the pinned backend, if the form pins one) for calls of this form.

    Raises InvalidArgument for a pin that names no backend.
    """
    usable: list[Plan] = []
    rejected: list[Rejected] = []
    for row in _candidates(rows, form.backend):
        state = (states or {}).get(row.cell(spec.quant), state_of(row, device))
        reasons = (
            *refusals(
                row, spec, form, device, exact_routing=exact_routing, deterministic=deterministic
            ),
            *_state_refusals(row, state, trust_declared),
        )
        if reasons:
            rejected.append(Rejected(row, reasons))
        else:
            usable.append(_plan(row, state, Ask(spec, form, device)))
    return PlanSet(_ordered(usable, spec), tuple(rejected))


def state_of(row: Row, device: DeviceInfo) -> State:
    """What is known without a proof: present where its library was inspected on this machine."""
    if device.simulated:
        return State.DECLARED
    found = library(device.flashinfer) if row.library == "flashinfer" else None
    here = row.library != "flashinfer" or (found is not None and found.installed)
    return State.PRESENT if here else State.DECLARED


def _ordered(usable: list[Plan], spec: LayerSpec) -> tuple[Plan, ...]:
    """Backends as the table orders them; within one, the declared activation format first."""
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys(p.backend for p in usable))}
    declared = declared_activation(spec)
    key = [(ranks[p.backend], p.activation != declared, n) for n, p in enumerate(usable)]
    return tuple(usable[n] for *_, n in sorted(key))


def _candidates(rows: tuple[Row, ...], pin: str) -> tuple[Row, ...]:
    if not pin:
        return rows
    names = tuple(dict.fromkeys(row.backend for row in rows))
    if pin not in names:
        raise InvalidArgument(f"backend {pin!r:.80} is not one of {', '.join(names)}")
    return tuple(row for row in rows if row.backend == pin)


def _state_refusals(row: Row, state: State, trust_declared: bool) -> tuple[Refusal, ...]:
    if state is State.FAILED:
        why = "its proof on this device failed"
        return (refusal(row, Fault("proof_failed", "state", state, "proven", why)),)
    if state is State.PROVEN or trust_declared or not row.needs_proof:
        return ()
    why = "it is not proven on this device; run expertd verify, or start with --trust declared"
    return (refusal(row, Fault("not_proven", "state", state, "proven", why)),)


def _plan(row: Row, state: State, ask: Ask) -> Plan:
    from_logits = ask.form.routing is RoutingForm.LOGITS
    site = ask.spec.routing.weight_site if ask.spec.routing else "output"
    return Plan(
        row=row,
        state=state,
        scale_in_weights=from_logits and row.mode is PlanMode.ROUTED,
        weights_on=site if site in row.weight_sites else "rows",
    )
