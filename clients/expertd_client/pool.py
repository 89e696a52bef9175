"""Many replicas as one: Client's forward, over servers that hold all experts or a range each."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, Unpack, overload

import grpc
import numpy as np

from expertd_client.arrays import kind_of
from expertd_client.calls import ArrayT, spelled_out
from expertd_client.closing import AsyncClosing, Closing
from expertd_client.dispatch import Outcome, Share
from expertd_client.errors import InvalidArgument
from expertd_client.fleet.core import Core
from expertd_client.fleet.endpoints import Targets
from expertd_client.fleet.link import Connect
from expertd_client.fleet.message import PoolCall, pool_call
from expertd_client.fleet.placement import Shard
from expertd_wire.tensors import from_numpy
from expertd_wire.v1 import experts_pb2 as pb

Partial = Literal["refuse", "allow"]


class PoolSettings(TypedDict, total=False):
    """What both pools take by keyword; ExpertPool says what each means, Core the defaults."""

    wait_for_experts: bool
    hedge: bool
    token: str | None
    credentials: grpc.ChannelCredentials | None
    max_message_bytes: int
    connect: Connect | None


class PoolOptions(TypedDict, total=False):
    """What a pool's forward and call take by keyword, besides partial and timeout."""

    router_logits: Any | None
    topk_ids: Any | None
    topk_weights: Any | None
    hidden_states_format: str | None
    hidden_states_scale: Any | None
    backend: str | None
    reply_dtype: str | None
    priority: int
    request_id: str | None


@dataclass(frozen=True, slots=True)
class PoolReply(Generic[ArrayT]):
    """output [T, H]; complete_rows [T] bool says which rows have all their experts.

    shares says who answered how many rows, one for each message (large parts travel as several);
    attempts how often a replica was asked.
    """

    output: ArrayT
    complete_rows: ArrayT
    shares: tuple[Share, ...]
    attempts: int

    @property
    def rows_sent(self) -> int:
        """Rows that were answered for this call; a row goes to every replica that it needs."""
        return sum(share.rows for share in self.shares)


class ExpertPool(Closing):
    """The routed experts of many servers, from any thread; close() it, or use `with`.

    targets: a list of "HOST:PORT", one such, "dns:///NAME:PORT" (every address of the name), or a
    file (a Path, "file:PATH") or http(s) URL with one "HOST:PORT" a line; the last three are read
    again while the pool is open. shard: "tokens" splits rows over replicas that hold all experts,
    "experts" sends each row to the holders of its experts and adds their partial sums, "auto" does
    the first where it can.

    Calls have no effects, so what fails or stalls at one replica is asked of another, within the
    caller's deadline. Replicas of one layer whose settings or weights differ are never mixed in a
    call. wait_for_experts (on by default) holds a call for experts that nobody holds until its
    deadline, then raises ExpertsUnavailable; without it that is raised at once. hedge sends a late
    part of a call to a second replica as well, for at most one part in twenty. token, credentials
    and max_message_bytes are as in Client; connect makes the Link to a target, gRPC's by default.
    """

    def __init__(
        self, targets: Targets, *, shard: Shard = "auto", **settings: Unpack[PoolSettings]
    ) -> None:
        self._core = Core(targets, shard, **settings)

    @overload
    def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Literal["refuse"] = "refuse",
        **options: Unpack[PoolOptions],
    ) -> ArrayT: ...

    @overload
    def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Literal["allow"],
        **options: Unpack[PoolOptions],
    ) -> tuple[ArrayT, ArrayT]: ...

    @spelled_out
    def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Partial = "refuse",
        **options: Unpack[PoolOptions],
    ) -> ArrayT | tuple[ArrayT, ArrayT]:
        """The experts' output [T, H] for hidden_states [T, H]; options as in Client.call.

        partial="allow" returns (output, complete_rows): what could be had, and a bool array [T] of
        the rows that have all their experts. Raises ExpertdError's family.
        """
        reply = self.call(model, layer, hidden_states, timeout=timeout, partial=partial, **options)
        return reply.output if partial == "refuse" else (reply.output, reply.complete_rows)

    @spelled_out
    def call(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Partial = "refuse",
        **options: Unpack[PoolOptions],
    ) -> PoolReply[ArrayT]:
        """Like forward, with who answered what."""
        call, allow = _order(model, layer, hidden_states, partial, options)
        outcome = self._core.run(self._core.deliver(call, timeout, allow))
        return _reply(outcome, hidden_states)

    def layers(
        self, model: str | None = None, *, timeout: float | None = 30.0
    ) -> list[pb.LayerInfo]:
        """What every replica holds of model, or of all models: one entry per replica and layer."""
        found: list[pb.LayerInfo] = self._core.run(self._core.layers(model, timeout))
        return found

    def layer(self, model: str, layer: int, *, timeout: float | None = 30.0) -> pb.LayerInfo:
        """One layer as some ready replica tells it; its expert range is that replica's."""
        found: pb.LayerInfo = self._core.run(self._core.layer(model, layer, timeout))
        return found

    def close(self) -> None:
        """Close all connections; calls under way end with Unavailable."""
        self._core.close()


class AsyncExpertPool(AsyncClosing):
    """ExpertPool for event loops: the same arguments, the same methods to await.

    It works in a thread of its own, so it belongs to no loop; cancelling a call takes it back.
    """

    def __init__(
        self, targets: Targets, *, shard: Shard = "auto", **settings: Unpack[PoolSettings]
    ) -> None:
        self._core = Core(targets, shard, **settings)

    @overload
    async def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Literal["refuse"] = "refuse",
        **options: Unpack[PoolOptions],
    ) -> ArrayT: ...

    @overload
    async def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Literal["allow"],
        **options: Unpack[PoolOptions],
    ) -> tuple[ArrayT, ArrayT]: ...

    @spelled_out
    async def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Partial = "refuse",
        **options: Unpack[PoolOptions],
    ) -> ArrayT | tuple[ArrayT, ArrayT]:
        """As ExpertPool.forward."""
        reply = await self.call(
            model, layer, hidden_states, timeout=timeout, partial=partial, **options
        )
        return reply.output if partial == "refuse" else (reply.output, reply.complete_rows)

    @spelled_out
    async def call(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        partial: Partial = "refuse",
        **options: Unpack[PoolOptions],
    ) -> PoolReply[ArrayT]:
        """As ExpertPool.call."""
        call, allow = _order(model, layer, hidden_states, partial, options)
        outcome = await self._core.arun(self._core.deliver(call, timeout, allow))
        return _reply(outcome, hidden_states)

    async def layers(
        self, model: str | None = None, *, timeout: float | None = 30.0
    ) -> list[pb.LayerInfo]:
        """As ExpertPool.layers."""
        found: list[pb.LayerInfo] = await self._core.arun(self._core.layers(model, timeout))
        return found

    async def layer(self, model: str, layer: int, *, timeout: float | None = 30.0) -> pb.LayerInfo:
        """As ExpertPool.layer."""
        found: pb.LayerInfo = await self._core.arun(self._core.layer(model, layer, timeout))
        return found

    async def close(self) -> None:
        """As ExpertPool.close."""
        await asyncio.to_thread(self._core.close)


def _order(
    model: str, layer: int, hidden_states: Any, partial: Partial, options: PoolOptions
) -> tuple[PoolCall, bool]:
    """The call, and whether it may be answered in part."""
    if partial not in ("refuse", "allow"):
        raise InvalidArgument(f'partial={partial!r}; accepted: "refuse", "allow"')
    return pool_call(model, layer, hidden_states, **options), partial == "allow"


def _reply(outcome: Outcome, like: ArrayT) -> PoolReply[ArrayT]:
    """The outcome in arrays of like's kind."""
    kind = kind_of("hidden_states", like)
    complete = kind.adopt(outcome.complete.view(np.uint8), like)
    if outcome.output.flags.writeable:
        output = kind.adopt(outcome.output, like)
    else:
        output = kind.from_wire(from_numpy(outcome.output), like)
    return PoolReply(output, complete != 0, outcome.shares, outcome.attempts)
