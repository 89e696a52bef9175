"""The call: rows, routing form, pin."""

from __future__ import annotations

from collections.abc import Iterator

from expertd.capability.checks.fault import Ask, Check, Fault, listed
from expertd.capability.formats import declared_activation
from expertd.capability.row import Row
from expertd.core import PlanMode, RoutingForm
from expertd.routing.methods import UNKNOWABLE

Faults = Iterator[Fault]


def rows(row: Row, ask: Ask) -> Faults:
    form = ask.form
    if form.rows_format:
        if form.rows_format not in row.formats:
            why = "rows that are already quantised go only into a kernel of that very format"
            field = "hidden_states_format"
            yield Fault("rows_format", field, form.rows_format, listed(row.formats), why)
    elif form.rows_dtype not in row.rows:
        why = f"rows of {form.rows_dtype} say nothing without a format"
        yield Fault("rows_dtype", "hidden_states", form.rows_dtype, listed(row.rows), why)


def routing_form(row: Row, ask: Ask) -> Faults:
    given = ask.form.routing
    if row.identity:
        return
    if given is RoutingForm.NONE:
        why = "a layer of experts needs router_logits, or topk_ids and topk_weights"
        yield Fault("routing_form", "routing_form", given, "logits, topk", why)
    elif row.mode is PlanMode.MONOLITHIC and given is not RoutingForm.LOGITS:
        why = "the kernel routes by itself"
        yield Fault("routing_form", "routing_form", given, "logits", why)


def logits_usable(row: Row, ask: Ask) -> Faults:
    spec = ask.spec
    if row.identity or ask.identity or ask.form.routing is not RoutingForm.LOGITS:
        return
    if spec.routing is None:
        why = spec.routing_refusal or "the layer's own routing is not known: send top-k ids"
        yield Fault("no_routing", "routing_form", "logits", "topk", why)
    elif spec.routing.method in UNKNOWABLE:
        why = f"only the caller knows what {spec.routing.method} computes: send top-k ids"
        yield Fault("no_routing", "routing_form", "logits", "topk", why)


def logits_dtype(row: Row, ask: Ask) -> Faults:
    given = ask.form.logits_dtype
    if ask.form.routing is RoutingForm.LOGITS and given and given not in row.logits:
        why = "the kernel reads no logits of that dtype"
        yield Fault("logits_dtype", "logits_dtype", given, listed(row.logits), why)


def weight_site(row: Row, ask: Ask) -> Faults:
    """Input-side weights: by the kernel, or on the rows of a top-1 call before a routed one."""
    routing = ask.spec.routing
    if routing is None or routing.weight_site in row.weight_sites or scales_rows(row, ask):
        return
    why = "the kernel multiplies the router weight into the output of an expert"
    given = routing.weight_site
    yield Fault("weight_site", "weight_site", given, listed(row.weight_sites), why)


def scales_rows(row: Row, ask: Ask) -> bool:
    """Whether the router weight can be multiplied into the rows before this kernel sees them."""
    return row.mode is PlanMode.ROUTED and ask.top_k == 1 and not ask.form.rows_format


def automatic(row: Row, ask: Ask) -> Faults:
    if ask.form.backend:
        return
    if not row.auto:
        why = f"{row.backend} is never chosen by itself"
        yield Fault("not_automatic", "backend", "auto", row.backend, why)
    declared = declared_activation(ask.spec)
    readable = ask.spec.quant in row.quants
    if readable and row.activation_quant not in ("bf16", declared):
        why = f"the checkpoint declares {declared} activations, and fewer bits are never assumed"
        yield Fault("activation_format", "backend", "auto", row.backend, why)


CHECKS: tuple[Check, ...] = (
    rows,
    routing_form,
    logits_usable,
    logits_dtype,
    weight_site,
    automatic,
)
