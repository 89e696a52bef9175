"""The client for threads."""

from __future__ import annotations

from typing import Unpack

import grpc

from expertd_client import queries
from expertd_client.calls import ArrayT, CallOptions, Reply, forward_call, spelled_out
from expertd_client.closing import Closing
from expertd_client.errors import DeadlineExceeded, ExpertdError, Unavailable
from expertd_client.messages import exchange
from expertd_client.queries import AnswerT, Query
from expertd_client.timeouts import countdown, limit
from expertd_client.transport.base import Transport
from expertd_client.transport.grpc import GrpcSettings, GrpcTransport
from expertd_wire.methods import DEFAULT_MAX_MESSAGE_BYTES
from expertd_wire.v1 import experts_pb2 as pb


class Client(Closing):
    """A server's routed experts, from any thread.

    target is "HOST:PORT" or a Transport. Arrays are numpy's or torch's; answers come in kind. Every
    method raises ExpertdError's family; timeout is in seconds, None waits for ever.
    """

    def __init__(
        self,
        target: str | Transport,
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        if isinstance(target, str):
            target = GrpcTransport(
                GrpcSettings(
                    target=target,
                    token=token,
                    credentials=credentials,
                    max_message_bytes=max_message_bytes,
                )
            )
        self._transport = target

    @spelled_out
    def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        **options: Unpack[CallOptions],
    ) -> ArrayT:
        """The experts' output [T, H] for hidden_states [T, H]; options as in call."""
        return self.call(model, layer, hidden_states, timeout=timeout, **options).output

    @spelled_out
    def call(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        **options: Unpack[CallOptions],
    ) -> Reply[ArrayT]:
        """Like forward, with the plan that ran and its times.

        A carrier may take many rows best as several messages, sent one after the other: then the
        plan is the first one's and the times are those of all.

        Routing is router_logits [T, E], or topk_ids and topk_weights [T, K]; further options are
        hidden_states_format, hidden_states_scale, partial, backend, reply_dtype, priority and
        request_id.
        """
        call = forward_call(model, layer, hidden_states, **options)
        talk = exchange(call, hidden_states, self._transport.message_bytes)
        left = countdown(timeout)
        request = next(talk)
        try:
            while True:
                try:
                    reply = self._transport.forward(request, left())
                except ExpertdError as error:
                    request = talk.throw(error)
                else:
                    request = talk.send(reply)
        except StopIteration as end:
            answer: Reply[ArrayT] = end.value
            return answer

    def layers(
        self, model: str | None = None, *, timeout: float | None = 30.0
    ) -> list[pb.LayerInfo]:
        """Every layer of model, or of all models."""
        return self._ask(queries.list_layers(model), timeout)

    def layer(self, model: str, layer: int, *, timeout: float | None = 30.0) -> pb.LayerInfo:
        """One layer: its shape, its routing, its plans and their state."""
        return self._ask(queries.get_layer(model, layer), timeout)

    def capabilities(self, *, timeout: float | None = 30.0) -> pb.GetCapabilitiesReply:
        """What each kernel backend can do on the server's device, and why not."""
        return self._ask(queries.get_capabilities(), timeout)

    def health(self, *, timeout: float | None = 5.0) -> bool:
        """Whether the server is ready; False too when it cannot be reached in time."""
        try:
            return self._ask(queries.check_health(), timeout)
        except (Unavailable, DeadlineExceeded):
            return False

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def _ask(self, query: Query[AnswerT], timeout: float | None) -> AnswerT:
        return query.answer(self._transport.query(query.path, query.request, limit(timeout)))
