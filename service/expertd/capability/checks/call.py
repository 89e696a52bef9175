"""The call: rows, routing form, pin."""

from __future__ import annotations

from collections.abc import Iterator

from expertd.capability.checks.fault import Ask, Check, Fault, listed
from expertd.capability.row import Row
from expertd.core import PlanMode, RoutingForm


def rows(row: Row, ask: Ask) -> Iterator[Fault]:
    form = ask.form
    if form.rows_format:
        if form.rows_format not in row.formats:
            why = "it takes rows of this format in no way"
            field = "hidden_states_format"
            yield Fault("rows_format", field, form.rows_format, listed(row.formats), why)
    elif form.rows_dtype not in row.rows:
        why = f"rows of {form.rows_dtype} are not accepted without a format"
        yield Fault("rows_dtype", "hidden_states", form.rows_dtype, listed(row.rows), why)


def routing_form(row: Row, ask: Ask) -> Iterator[Fault]:
    given, why = ask.form.routing, ""
    if row.identity:
        return
    if given is RoutingForm.NONE:
        why = "a layer of experts needs router_logits, or topk_ids and topk_weights"
        yield Fault("routing_form", "routing_form", given, "logits, topk", why)
    elif row.mode is PlanMode.MONOLITHIC and given is not RoutingForm.LOGITS:
        why = "the kernel routes by itself"
        yield Fault("routing_form", "routing_form", given, "logits", why)


def logits_usable(row: Row, ask: Ask) -> Iterator[Fault]:
    spec = ask.spec
    if row.identity or ask.identity or ask.form.routing is not RoutingForm.LOGITS:
        return
    if spec.routing is None:
        why = spec.routing_refusal or "the layer's own routing is not known: send top-k ids"
        yield Fault("no_routing", "routing_form", "logits", "topk", why)


def pinned(row: Row, ask: Ask) -> Iterator[Fault]:
    if not ask.form.backend and not row.auto:
        why = f"{row.backend} is never chosen by itself"
        yield Fault("not_automatic", "backend", "auto", row.backend, why)


CHECKS: tuple[Check, ...] = (rows, routing_form, logits_usable, pinned)
