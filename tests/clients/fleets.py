"""Replicas without a network: each holds a range of experts that scale rows, and does as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertd_client.errors import Unavailable
from expertd_client.fleet.link import Link
from expertd_client.routing import Router, route_for
from expertd_wire.codec import decode_forward_call, encode_forward_reply
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.methods import LIST_LAYERS
from expertd_wire.tensors import DTYPES, from_numpy, to_numpy
from expertd_wire.v1 import experts_pb2 as pb

MODEL, LAYER = "m", 3
HIDDEN, EXPERTS, TOP_K = 8, 16, 4
ROUTER = Router(method="RenormalizeNaive", num_experts=EXPERTS, top_k=TOP_K)
TABLE = np.random.default_rng(11).standard_normal((EXPERTS, HIDDEN)).astype(np.float32)
"""Expert e makes row * TABLE[e] of a row."""

Script = Callable[[ForwardCall], Awaitable[None]]


def truth(rows: Any, ids: Any, weights: Any, table: Any = TABLE) -> NDArray[np.float32]:
    """What one server of all experts answers, in float32."""
    held = np.where(ids[..., None] >= 0, table[ids], np.float32(0))
    used = np.where(ids >= 0, weights, 0).astype(np.float32)
    scales: NDArray[np.float32] = (held * used[..., None]).sum(axis=1)
    return rows.astype(np.float32) * scales


def routed(logits: Any) -> tuple[Any, Any]:
    return route_for(ROUTER, logits)


@dataclass
class FakeServer:
    """A replica; script runs before each answer and may raise, wait, or never return."""

    target: str
    begin: int = 0
    end: int = EXPERTS
    digest: str = ""
    checkpoint: str = ""
    table: NDArray[np.float32] = field(default_factory=lambda: TABLE)
    serving: bool = True
    reachable: bool = True
    state: str = "ready"
    generation: int = 1
    queued: int = 0
    script: Script | None = None
    probe: Callable[[], Awaitable[None]] | None = None
    calls: list[ForwardCall] = field(default_factory=list)
    finished: int = 0
    cancelled: int = 0

    @property
    def rows(self) -> int:
        """Rows of all calls that came here."""
        return sum(call.hidden_states.shape[0] for call in self.calls if call.hidden_states)

    @property
    def weights(self) -> str:
        """The digest that it tells."""
        return self.digest or f"{self.begin}-{self.end}"

    def info(self) -> pb.LayerInfo:
        routing = pb.RoutingInfo(
            method=ROUTER.method, renormalize=True, routed_scaling_factor=1.0, group_score="top2"
        )
        return pb.LayerInfo(
            model=MODEL,
            layer=LAYER,
            state=self.state,
            hidden=HIDDEN,
            num_experts=EXPERTS,
            expert_begin=self.begin,
            expert_end=self.end,
            top_k=TOP_K,
            routing=routing,
            weights_digest=self.weights,
            checkpoint_digest=self.checkpoint,
            generation=self.generation,
            queued_tokens=self.queued,
            detail="as told by a test",
        )

    async def answer(self, request: bytes) -> bytes:
        call = decode_forward_call(request)
        self.calls.append(call)
        if self.script is not None:
            await self.script(call)
        self.finished += 1
        output = from_numpy(self.computed(call))
        loaded = {"generation": self.generation, "weights_digest": self.weights}
        return encode_forward_reply(ForwardReply(output, "fake", **loaded))

    def computed(self, call: ForwardCall) -> Any:
        assert call.hidden_states is not None
        rows = to_numpy(call.hidden_states)
        dtype = DTYPES[call.reply_dtype or rows.dtype.name]
        if call.hidden_states_scale is not None:
            rows = rows.astype(np.float32) * np.repeat(
                to_numpy(call.hidden_states_scale), rows.shape[1], axis=1
            )
        if call.router_logits is not None:
            ids, weights = routed(to_numpy(call.router_logits))
        else:
            assert call.topk_ids is not None and call.topk_weights is not None
            ids, weights = to_numpy(call.topk_ids), to_numpy(call.topk_weights)
        held = (ids >= self.begin) & (ids < self.end)
        assert call.partial or (held | (ids < 0)).all(), "partial is missing"
        return truth(rows, np.where(held, ids, -1), weights, self.table).astype(dtype)


class FakeLink(Link):
    """A pool's link to a FakeServer."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.closed = False

    async def forward(self, request: bytes, timeout: float | None) -> bytes:
        self._reach()
        try:
            return await self.server.answer(request)
        except asyncio.CancelledError:
            self.server.cancelled += 1
            raise

    async def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        assert path == LIST_LAYERS
        self._reach()
        info = self.server.info()
        if self.server.probe is not None:
            await self.server.probe()
        return bytes(pb.ListLayersReply(layers=[info]).SerializeToString())

    async def watch(self) -> AsyncIterator[bool]:
        told = None
        while self.server.reachable:
            if told != self.server.serving:
                told = self.server.serving
                yield told
            await asyncio.sleep(0.005)

    def close(self) -> None:
        self.closed = True

    def _reach(self) -> None:
        if not self.server.reachable:
            raise Unavailable(f"{self.server.target} cannot be reached")


class FakeFleet:
    """Servers by their target; connect is a pool's."""

    def __init__(self, *servers: FakeServer) -> None:
        self.servers = {server.target: server for server in servers}
        self.links: list[FakeLink] = []

    @property
    def targets(self) -> list[str]:
        return list(self.servers)

    def connect(self, target: str) -> Link:
        self.links.append(FakeLink(self.servers[target]))
        return self.links[-1]

    def __getitem__(self, number: int) -> FakeServer:
        return list(self.servers.values())[number]

    def __iter__(self) -> Iterator[FakeServer]:
        return iter(self.servers.values())

    @property
    def attempts(self) -> int:
        return sum(len(server.calls) for server in self.servers.values())


def whole(count: int) -> FakeFleet:
    """Replicas that hold all experts."""
    return FakeFleet(*(FakeServer(f"r{n}:1") for n in range(count)))


def ranges(*held: tuple[int, int]) -> FakeFleet:
    """Replicas that hold these ranges."""
    return FakeFleet(*(FakeServer(f"r{n}:1", begin, end) for n, (begin, end) in enumerate(held)))
