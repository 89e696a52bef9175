"""One call of a pool as numpy views, and the messages that its parts travel in."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

from expertd_client.arrays import kind_of
from expertd_client.errors import ExpertdError, InvalidArgument, NoUsablePlan, Unavailable
from expertd_client.routing import route_for, router_of
from expertd_client.sharding import Part, Rows, Work, take_rows
from expertd_wire.codec import decode_forward_reply, encode_forward_call
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.tensors import DTYPES, WireError, from_numpy, to_numpy
from expertd_wire.v1 import experts_pb2 as pb

REPLIES = ("bfloat16", "float16", "float32")
_INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCall:
    """Tensors [T, …] that view the caller's memory, and what goes with every part of the call."""

    model: str
    layer: int
    hidden_states: Rows
    router_logits: Rows | None = None
    topk_ids: Rows | None = None
    topk_weights: Rows | None = None
    hidden_states_scale: Rows | None = None
    hidden_states_format: str = ""
    backend: str = ""
    reply_dtype: str = ""
    priority: int = 0
    request_id: str = ""

    @property
    def tokens(self) -> int:
        return len(self.hidden_states) if self.hidden_states.ndim else 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The answer's, as a server would choose it."""
        chosen = self.reply_dtype or (
            "bfloat16" if self.hidden_states_format else self.hidden_states.dtype.name
        )
        return DTYPES[chosen]

    def request(self, work: Work, sums: bool) -> bytes:
        """The ForwardRequest of some of the rows; sums asks for partial sums in float32."""
        logits = None if sums else self._some(self.router_logits, work)
        ids = work.ids if sums else self._some(self.topk_ids, work)
        weights = work.weights if sums else self._some(self.topk_weights, work)
        tensors = {
            "hidden_states": self._some(self.hidden_states, work),
            "router_logits": logits,
            "topk_ids": ids,
            "topk_weights": weights,
            "hidden_states_scale": self._some(self.hidden_states_scale, work),
        }
        travelling = {name: from_numpy(t) for name, t in tensors.items() if t is not None}
        try:
            return encode_forward_call(
                ForwardCall(
                    model=self.model,
                    layer=self.layer,
                    hidden_states_format=self.hidden_states_format,
                    partial=sums,
                    backend=self.backend,
                    reply_dtype="float32" if sums else self.reply_dtype,
                    request_id=self.request_id,
                    priority=self.priority,
                    **travelling,
                )
            )
        except WireError as problem:
            raise InvalidArgument(str(problem)) from problem

    def _some(self, tensor: Rows | None, work: Work) -> Rows | None:
        """Those rows of a tensor; all of one that does not fit, for a server to refuse."""
        if tensor is None or not tensor.ndim or len(tensor) != self.tokens:
            return tensor
        return take_rows(tensor, work.rows)


def pool_call(
    model: str,
    layer: int,
    hidden_states: Any,
    *,
    router_logits: Any | None = None,
    topk_ids: Any | None = None,
    topk_weights: Any | None = None,
    hidden_states_format: str | None = None,
    hidden_states_scale: Any | None = None,
    backend: str | None = None,
    reply_dtype: str | None = None,
    priority: int = 0,
    request_id: str | None = None,
) -> PoolCall:
    """A caller's arrays as a PoolCall; raises InvalidArgument for what cannot travel."""
    if reply_dtype and reply_dtype not in REPLIES:
        accepted = ", ".join(REPLIES)
        raise InvalidArgument(f"reply_dtype {reply_dtype!r:.60} given; accepted: {accepted}")
    return PoolCall(
        model=model,
        layer=index(layer),
        hidden_states=_view("hidden_states", hidden_states),
        router_logits=_optional("router_logits", router_logits),
        topk_ids=_optional("topk_ids", topk_ids),
        topk_weights=_optional("topk_weights", topk_weights),
        hidden_states_format=hidden_states_format or "",
        hidden_states_scale=_optional("hidden_states_scale", hidden_states_scale),
        backend=backend or "",
        reply_dtype=reply_dtype or "",
        priority=index(priority),
        request_id=request_id or "",
    )


def _optional(name: str, value: Any | None) -> Rows | None:
    return None if value is None else _view(name, value)


def _view(name: str, value: Any) -> Rows:
    try:
        return to_numpy(kind_of(name, value).to_wire(value))
    except WireError as problem:
        raise InvalidArgument(f"{name}: {problem}") from problem


def work_by_experts(call: PoolCall, layer: pb.LayerInfo) -> Work:
    """Every row with the experts that it needs; raises InvalidArgument as a server would."""
    rows = call.hidden_states
    if rows.ndim != 2 or rows.shape[1] != layer.hidden:
        raise InvalidArgument(
            f"hidden_states: shape {list(rows.shape)} given, [tokens, {layer.hidden}] accepted"
        )
    if call.router_logits is not None:
        if call.topk_ids is not None or call.topk_weights is not None:
            raise InvalidArgument(
                "both router_logits and topk_ids/topk_weights given; send one form"
            )
        ids, weights = _routed(call.router_logits, layer)
    else:
        ids, weights = _given(call, layer)
    if len(ids) != call.tokens:
        raise InvalidArgument(f"{call.tokens} rows given, but routing for {len(ids)}")
    return Work(np.arange(call.tokens), ids, weights)


def _routed(logits: Rows, layer: pb.LayerInfo) -> tuple[Rows, Rows]:
    if not layer.HasField("routing"):
        raise NoUsablePlan("this layer cannot route from logits; send topk_ids and topk_weights")
    return route_for(router_of(layer), logits)


def _given(call: PoolCall, layer: pb.LayerInfo) -> tuple[Rows, Rows]:
    ids, weights = call.topk_ids, call.topk_weights
    if ids is None and weights is None:
        raise InvalidArgument("no routing given; send router_logits, or topk_ids with topk_weights")
    if ids is None or weights is None:
        raise InvalidArgument("topk_ids and topk_weights belong together; one of them is missing")
    if ids.ndim != 2 or ids.shape != weights.shape or ids.dtype not in _INTEGERS:
        raise InvalidArgument(
            f"topk_ids: {ids.dtype} {list(ids.shape)} and topk_weights {list(weights.shape)} "
            f"given; int32 or int64 [{call.tokens}, K] and the same shape accepted"
        )
    wrong = ((ids < -1) | (ids >= layer.num_experts)).any(axis=1)
    if wrong.any():
        raise InvalidArgument(
            f"topk_ids: row {int(np.argmax(wrong))} has an id outside "
            f"0..{layer.num_experts - 1} (-1 means no expert)"
        )
    return ids, weights


def read_reply(data: bytes, part: Part, hidden: int, dtype: np.dtype[Any]) -> ForwardReply:
    """The reply to a part; raises Unavailable for one that is not what was asked for.

    Such a replica is not the server that it said it was, so another may do better.
    """
    try:
        reply = decode_forward_reply(data)
    except WireError as problem:
        raise Unavailable(f"a replica's reply cannot be read: {problem}") from problem
    if reply.output is None:
        raise Unavailable("a replica's reply has no output")
    expected = (dtype.name, (len(part.work.rows), hidden))
    if (reply.output.dtype, reply.output.shape) != expected:
        raise Unavailable(
            f"a replica answered {reply.output.dtype} {list(reply.output.shape)}; "
            f"{expected[0]} {list(expected[1])} was asked for"
        )
    holder = part.holder
    if reply.generation and reply.generation != holder.generation:
        raise Unavailable(f"{holder.name} has loaded the layer again since it was asked")
    if reply.weights_digest and reply.weights_digest != holder.digest:
        raise Unavailable(f"{holder.name} answered from other weights than it said it has")
    return reply


def output_of(reply: ForwardReply) -> Rows:
    """A read-only view of a reply's output."""
    if reply.output is None:
        raise ExpertdError("the reply has no output")
    return to_numpy(reply.output)
