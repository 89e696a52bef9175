"""admit: does this call fit this layer? Everything that can be told without touching a value."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from expertd.core import CallForm, LayerSpec, RoutingForm
from expertd.errors import ExpertsNotHeld, FailedPrecondition, InvalidArgument, TooLarge
from expertd_wire.messages import ForwardCall
from expertd_wire.tensors import WireTensor

ROWS = ("bfloat16", "float16", "float32")
LOGITS = ("float32", "bfloat16", "float16")
IDS = ("int32", "int64")
WEIGHTS = ("float32", "bfloat16")
FP8_ROWS = ("float8_e4m3fn", "uint8")
REPLIES = ("bfloat16", "float16", "float32")
ROW_FORMATS: dict[str, tuple[int, str]] = {"fp8_group128": (128, "float32"), "mxfp8": (32, "uint8")}
"""Formats of fp8 rows: how many columns share a scale, and the scale's dtype."""


def admit(spec: LayerSpec, call: ForwardCall, max_tokens: int, pin: str = "") -> CallForm:
    """The call's form, pinned to a backend by the call or else by pin.

    Raises InvalidArgument, TooLarge, ExpertsNotHeld or FailedPrecondition.
    """
    tokens = _check_rows(spec, call)
    if tokens > max_tokens:
        raise TooLarge(f"{tokens} rows given, at most {max_tokens} accepted (--max-call-tokens)")
    routing = _routing_form(call)
    if spec.num_experts:
        _CHECKS[routing](spec, call, tokens)
    _one_of("reply_dtype", call.reply_dtype, ("", *REPLIES))
    return _form(call, routing, call.backend or pin)


def _check_rows(spec: LayerSpec, call: ForwardCall) -> int:
    rows = call.hidden_states
    if rows is None:
        raise InvalidArgument("hidden_states is missing; send [tokens, hidden] rows")
    if len(rows.shape) != 2 or rows.shape[1] != spec.hidden:
        raise InvalidArgument(
            f"hidden_states: shape {list(rows.shape)} given, [tokens, {spec.hidden}] accepted"
        )
    if call.hidden_states_format:
        _check_fp8_rows(spec, call, rows)
    elif rows.dtype in FP8_ROWS:
        raise InvalidArgument(
            f"hidden_states: {rows.dtype} rows need hidden_states_format "
            f"({', '.join(ROW_FORMATS)}) and hidden_states_scale"
        )
    else:
        _one_of("hidden_states: dtype", rows.dtype, ROWS)
        if call.hidden_states_scale is not None:
            raise InvalidArgument("hidden_states_scale is given without hidden_states_format")
    return rows.shape[0]


def _check_fp8_rows(spec: LayerSpec, call: ForwardCall, rows: WireTensor) -> None:
    _one_of("hidden_states_format", call.hidden_states_format, tuple(ROW_FORMATS))
    _one_of("hidden_states: dtype of fp8 rows", rows.dtype, FP8_ROWS)
    group, dtype = ROW_FORMATS[call.hidden_states_format]
    if spec.hidden % group:
        raise InvalidArgument(
            f"hidden_states_format {call.hidden_states_format} needs a hidden size that is a "
            f"multiple of {group}; this layer's is {spec.hidden}: send bfloat16 rows"
        )
    scale = _present("hidden_states_scale", call.hidden_states_scale)
    _shape("hidden_states_scale", scale, (rows.shape[0], spec.hidden // group))
    _one_of("hidden_states_scale: dtype", scale.dtype, (dtype,))


def _routing_form(call: ForwardCall) -> RoutingForm:
    has_topk = call.topk_ids is not None or call.topk_weights is not None
    if call.router_logits is not None and has_topk:
        raise InvalidArgument("both router_logits and topk_ids/topk_weights given; send one form")
    if has_topk:
        return RoutingForm.TOPK
    return RoutingForm.NONE if call.router_logits is None else RoutingForm.LOGITS


def _check_none(spec: LayerSpec, call: ForwardCall, tokens: int) -> None:
    raise InvalidArgument("no routing given; send router_logits, or topk_ids with topk_weights")


def _check_logits(spec: LayerSpec, call: ForwardCall, tokens: int) -> None:
    logits = _present("router_logits", call.router_logits)
    _shape("router_logits", logits, (tokens, spec.num_experts))
    _one_of("router_logits: dtype", logits.dtype, LOGITS)
    if spec.routing is None:
        raise FailedPrecondition(
            spec.routing_refusal or "this layer cannot route from logits; send topk_ids and weights"
        )
    if not spec.complete and not call.partial:
        raise ExpertsNotHeld(
            f"experts {spec.expert_begin}-{spec.expert_end - 1} of {spec.num_experts} are held, "
            "logits may choose any; set partial and add the partial sums of all holders"
        )


def _check_topk(spec: LayerSpec, call: ForwardCall, tokens: int) -> None:
    ids = _present("topk_ids", call.topk_ids)
    weights = _present("topk_weights", call.topk_weights)
    if len(ids.shape) != 2 or ids.shape[0] != tokens or not 1 <= ids.shape[1] <= spec.num_experts:
        raise InvalidArgument(
            f"topk_ids: shape {list(ids.shape)} given, [{tokens}, 1..{spec.num_experts}] accepted"
        )
    _shape("topk_weights", weights, ids.shape)
    _one_of("topk_ids: dtype", ids.dtype, IDS)
    _one_of("topk_weights: dtype", weights.dtype, WEIGHTS)


_CHECKS = {
    RoutingForm.NONE: _check_none,
    RoutingForm.LOGITS: _check_logits,
    RoutingForm.TOPK: _check_topk,
}


def _form(call: ForwardCall, routing: RoutingForm, backend: str) -> CallForm:
    rows = _present("hidden_states", call.hidden_states)
    logits, ids, weights = call.router_logits, call.topk_ids, call.topk_weights
    return _shared(
        routing,
        rows.dtype,
        call.hidden_states_format,
        "" if logits is None else logits.dtype,
        "" if ids is None else ids.dtype,
        "" if weights is None else weights.dtype,
        _width(ids),
        call.partial,
        backend,
        call.reply_dtype or _default_reply(call, rows),
    )


@lru_cache(maxsize=1024)
def _shared(*fields: Any) -> CallForm:
    """The form with these fields, made once: equal forms are mostly the same object."""
    return CallForm(*fields)


def _default_reply(call: ForwardCall, rows: WireTensor) -> str:
    if call.partial:
        return "float32"
    return "bfloat16" if call.hidden_states_format else rows.dtype


def _width(ids: WireTensor | None) -> int:
    """K; layers without experts take tensors of any rank."""
    return ids.shape[-1] if ids is not None and ids.shape else 0


def _present(name: str, tensor: WireTensor | None) -> WireTensor:
    if tensor is None:
        raise InvalidArgument(f"{name} is missing")
    return tensor


def _shape(name: str, tensor: WireTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise InvalidArgument(
            f"{name}: shape {list(tensor.shape)} given, {list(expected)} accepted"
        )


def _one_of(name: str, given: str, accepted: tuple[str, ...]) -> None:
    if given not in accepted:
        known = ", ".join(name for name in accepted if name)
        raise InvalidArgument(f"{name} {given[:60]!r} given; accepted: {known}")
