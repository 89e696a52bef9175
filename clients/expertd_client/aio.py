"""The client for event loops."""

from __future__ import annotations

from typing import Unpack

import grpc

from expertd_client import queries
from expertd_client.calls import ArrayT, CallOptions, Reply, forward_call, spelled_out
from expertd_client.closing import AsyncClosing
from expertd_client.errors import DeadlineExceeded, ExpertdError, Unavailable
from expertd_client.messages import exchange
from expertd_client.queries import AnswerT, Query
from expertd_client.stream import CallStream
from expertd_client.timeouts import countdown, limit
from expertd_client.transport.base import AsyncTransport
from expertd_client.transport.grpc import AsyncGrpcTransport, GrpcSettings
from expertd_wire.methods import DEFAULT_MAX_MESSAGE_BYTES
from expertd_wire.v1 import experts_pb2 as pb


class AsyncClient(AsyncClosing):
    """A server's routed experts, from one event loop.

    target is "HOST:PORT" or an AsyncTransport; everything else is as in Client.
    """

    def __init__(
        self,
        target: str | AsyncTransport,
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        if isinstance(target, str):
            target = AsyncGrpcTransport(
                GrpcSettings(
                    target=target,
                    token=token,
                    credentials=credentials,
                    max_message_bytes=max_message_bytes,
                )
            )
        self._transport = target

    @spelled_out
    async def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        **options: Unpack[CallOptions],
    ) -> ArrayT:
        """The experts' output [T, H] for hidden_states [T, H]; options as in call."""
        reply = await self.call(model, layer, hidden_states, timeout=timeout, **options)
        return reply.output

    @spelled_out
    async def call(
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
                    reply = await self._transport.forward(request, left())
                except ExpertdError as error:
                    request = talk.throw(error)
                else:
                    request = talk.send(reply)
        except StopIteration as end:
            answer: Reply[ArrayT] = end.value
            return answer

    def stream(self) -> CallStream:
        """Many calls on one stream: `async with client.stream() as s: await s.call(...)`."""
        return CallStream(self._transport.stream())

    async def layers(
        self, model: str | None = None, *, timeout: float | None = 30.0
    ) -> list[pb.LayerInfo]:
        """Every layer of model, or of all models."""
        return await self._ask(queries.list_layers(model), timeout)

    async def layer(self, model: str, layer: int, *, timeout: float | None = 30.0) -> pb.LayerInfo:
        """One layer: its shape, its routing, its plans and their state."""
        return await self._ask(queries.get_layer(model, layer), timeout)

    async def capabilities(self, *, timeout: float | None = 30.0) -> pb.GetCapabilitiesReply:
        """What each kernel backend can do on the server's device, and why not."""
        return await self._ask(queries.get_capabilities(), timeout)

    async def health(self, *, timeout: float | None = 5.0) -> bool:
        """Whether the server is ready; False too when it cannot be reached in time."""
        try:
            return await self._ask(queries.check_health(), timeout)
        except (Unavailable, DeadlineExceeded):
            return False

    async def close(self) -> None:
        """Close the connection."""
        await self._transport.close()

    async def _ask(self, query: Query[AnswerT], timeout: float | None) -> AnswerT:
        return query.answer(await self._transport.query(query.path, query.request, limit(timeout)))
