"""A call's way into bytes and a reply's way out of them; the same for both clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from operator import index
from typing import Any, Generic, TypedDict, TypeVar, Unpack

from expertd_client.arrays import kind_of
from expertd_client.errors import ExpertdError, InvalidArgument
from expertd_wire.codec import decode_forward_reply, encode_forward_call
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.tensors import WireError, WireTensor

ArrayT = TypeVar("ArrayT")
MethodT = TypeVar("MethodT", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Reply(Generic[ArrayT]):
    """An answer: output [T, H], the plan that made it, and the nanoseconds it took."""

    output: ArrayT
    backend: str
    mode: str
    entry: str
    queued_ns: int
    staged_ns: int
    computed_ns: int


class CallOptions(TypedDict, total=False):
    """What forward and call take by keyword; forward_call has the defaults."""

    router_logits: Any | None
    topk_ids: Any | None
    topk_weights: Any | None
    hidden_states_format: str | None
    hidden_states_scale: Any | None
    partial: bool
    backend: str | None
    reply_dtype: str | None
    priority: int
    request_id: str | None


def encode_call(
    model: str, layer: int, hidden_states: Any, **options: Unpack[CallOptions]
) -> bytes:
    """The bytes of a ForwardRequest; raises InvalidArgument for what cannot travel."""
    return encoded(forward_call(model, layer, hidden_states, **options))


def forward_call(
    model: str,
    layer: int,
    hidden_states: Any,
    *,
    router_logits: Any | None = None,
    topk_ids: Any | None = None,
    topk_weights: Any | None = None,
    hidden_states_format: str | None = None,
    hidden_states_scale: Any | None = None,
    partial: bool = False,
    backend: str | None = None,
    reply_dtype: str | None = None,
    priority: int = 0,
    request_id: str | None = None,
) -> ForwardCall:
    """A call that views the caller's arrays; raises InvalidArgument for what cannot travel.

    Whether it makes sense is the server's to say: it knows the layer.
    """
    return ForwardCall(
        model=model,
        layer=index(layer),
        hidden_states=_tensor("hidden_states", hidden_states),
        router_logits=_optional("router_logits", router_logits),
        topk_ids=_optional("topk_ids", topk_ids),
        topk_weights=_optional("topk_weights", topk_weights),
        hidden_states_format=hidden_states_format or "",
        hidden_states_scale=_optional("hidden_states_scale", hidden_states_scale),
        partial=bool(partial),
        backend=backend or "",
        reply_dtype=reply_dtype or "",
        request_id=request_id or "",
        priority=index(priority),
    )


_OPTIONS = [p for p in signature(forward_call).parameters.values() if p.kind is p.KEYWORD_ONLY]


def spelled_out(method: MethodT) -> MethodT:
    """method; inspect and help() now name what its **options may be, with the defaults."""
    told = signature(method)
    own = [p for p in told.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    known = {p.name for p in own}
    options = [p for p in _OPTIONS if p.name not in known]
    ordered = sorted((*options, *own), key=lambda p: p.kind)
    method.__signature__ = told.replace(parameters=ordered)  # type: ignore[attr-defined]
    return method


def encoded(call: ForwardCall) -> bytes:
    """The bytes of a ForwardRequest; raises InvalidArgument for what cannot travel."""
    try:
        return encode_forward_call(call)
    except WireError as problem:
        raise InvalidArgument(str(problem)) from problem


def decode_reply(data: bytes, like: ArrayT) -> Reply[ArrayT]:
    """The reply in data, its output an array of like's kind; raises ExpertdError for bad bytes."""
    output, reply = decoded(data)
    return reply_of(kind_of("hidden_states", like).from_wire(output, like), reply)


def decoded(data: bytes) -> tuple[WireTensor, ForwardReply]:
    """A reply's output and the whole of it; raises ExpertdError for bad bytes."""
    try:
        reply = decode_forward_reply(data)
    except WireError as problem:
        raise ExpertdError(f"the server's reply cannot be read: {problem}") from problem
    if reply.output is None:
        raise ExpertdError("the server's reply has no output")
    return reply.output, reply


def reply_of(output: ArrayT, reply: ForwardReply) -> Reply[ArrayT]:
    """What a caller gets: the output, and what reply says of how it was made."""
    return Reply(
        output=output,
        backend=reply.backend,
        mode=reply.mode,
        entry=reply.entry,
        queued_ns=reply.queued_ns,
        staged_ns=reply.staged_ns,
        computed_ns=reply.computed_ns,
    )


def _optional(name: str, value: Any | None) -> WireTensor | None:
    return None if value is None else _tensor(name, value)


def _tensor(name: str, value: Any) -> WireTensor:
    try:
        return kind_of(name, value).to_wire(value)
    except WireError as problem:
        raise InvalidArgument(f"{name}: {problem}") from problem
