"""What both kinds of pool are made of: a fleet of replicas on an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import CancelledError
from functools import partial
from math import inf
from typing import Any, TypeVar, get_args

import grpc

from expertd_client.dispatch import Delivery, Desk, Outcome
from expertd_client.errors import InvalidArgument, Unavailable
from expertd_client.fleet.endpoints import Targets, endpoints
from expertd_client.fleet.link import Connect, GrpcLink, Link
from expertd_client.fleet.loop import LoopThread
from expertd_client.fleet.message import PoolCall
from expertd_client.fleet.placement import Policy, Shard, agreed_edition, none_ready
from expertd_client.replicas import Fleet
from expertd_client.timeouts import limit
from expertd_client.transport.grpc import GrpcSettings, bearer
from expertd_wire.methods import DEFAULT_MAX_MESSAGE_BYTES
from expertd_wire.v1 import experts_pb2 as pb

T = TypeVar("T")

_LOOK_SECONDS = 0.1


class Core:
    """A fleet, what its calls share, and the thread that works for them."""

    def __init__(
        self,
        targets: Targets,
        shard: Shard,
        *,
        wait_for_experts: bool = True,
        hedge: bool = False,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        connect: Connect | None = None,
    ) -> None:
        if shard not in get_args(Shard):
            raise InvalidArgument(f"shard={shard!r}; accepted: {', '.join(get_args(Shard))}")
        bearer(token)  # raises now what is wrong with it
        source = endpoints(targets)
        dialled = partial(
            GrpcSettings, token=token, credentials=credentials, max_message_bytes=max_message_bytes
        )

        def by_grpc(target: str) -> Link:
            return GrpcLink(dialled(target=target))

        self._policy = Policy(shard, wait_for_experts, hedge)
        self._fleet = Fleet(source, connect or by_grpc)
        self._thread = LoopThread("expertd-pool")
        self._desk = Desk(self._fleet, self._policy)
        self._thread.run(self._fleet.start())

    def run(self, work: Any) -> Any:
        """What work returns, for a thread; Unavailable once the pool is closed."""
        try:
            return self._thread.run(work)
        except CancelledError:
            raise Unavailable("the pool was closed") from None

    async def arun(self, work: Any) -> Any:
        """The same for another event loop."""
        try:
            return await self._thread.arun(work)
        except asyncio.CancelledError:
            if self._thread.open:
                raise
            raise Unavailable("the pool was closed") from None

    async def deliver(self, call: PoolCall, timeout: float | None, allow: bool) -> Outcome:
        """The answer to a call."""
        seconds, now = limit(timeout), asyncio.get_running_loop().time()
        deadline = inf if seconds is None else now + seconds
        return await Delivery(self._desk, call, deadline, allow).run()

    async def layers(self, model: str | None, timeout: float | None) -> list[pb.LayerInfo]:
        """What every replica in service holds, once each has been asked or timeout is over."""
        # Who said nothing in time holds nothing that a call could use: the rest is the answer.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit(timeout)):
                while not self._fleet.all_contacted:
                    await self._fleet.changed(_LOOK_SECONDS)
        return [offer.layer for offer in self._fleet.offers(model)]

    async def layer(self, model: str, layer: int, timeout: float | None) -> pb.LayerInfo:
        """A layer, as a replica whose weights calls go to tells it."""
        try:
            async with asyncio.timeout(limit(timeout)):
                edition = await agreed_edition(self._fleet, (model, layer), self._policy)
        except TimeoutError:
            raise none_ready(self._fleet, (model, layer)) from None
        return edition.layer

    def close(self) -> None:
        """Ends calls under way, lets go of the replicas and of the thread; a second time too."""
        self._thread.close(self._fleet.close())
