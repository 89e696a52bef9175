"""Pools over replicas that take time, on a clock of their own: a minute of them takes seconds.

A replica does one message after the other, so many rows a second; the way there and back takes
longer than that, as over gRPC. Pools are not told of each other.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tests.clients.fleets import EXPERTS, HIDDEN, LAYER, MODEL, FakeFleet, FakeLink, FakeServer

from expertd_client.dispatch import Delivery, Desk
from expertd_client.errors import Unavailable
from expertd_client.fleet.endpoints import endpoints
from expertd_client.fleet.message import pool_call
from expertd_client.fleet.placement import Policy
from expertd_client.replicas import Fleet

ROWS = 8192
MESSAGES = 14
RATE = 95_000.0
WAY_SECONDS = 0.0125
START_SECONDS = 3.0


class Loop(asyncio.SelectorEventLoop):
    """Its time is what was slept, not what passed."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def skip(timeout: float | None) -> Any:
            found = select(0)
            self._now += 0.0 if found else timeout or 0.0
            return found

        self._selector.select = skip  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now


def in_virtual_time(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(work)


@dataclass
class SlowServer(FakeServer):
    """A replica with one processor; death is what ends its calls."""

    chance: random.Random = field(default_factory=random.Random)
    free: float = 0.0
    death: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: bytes) -> bytes:
        rows = ROWS // MESSAGES
        self.queued += rows
        try:
            await self._some(WAY_SECONDS)
            now = asyncio.get_running_loop().time()
            self.free = max(now, self.free) + rows / RATE * self.chance.uniform(0.9, 1.1)
            await asyncio.sleep(self.free - now)
        finally:
            self.queued -= rows
        await self._some(WAY_SECONDS)
        self.calls.clear()
        return await super().answer(request)

    async def _some(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self.chance.uniform(0.9, 1.1))

    def computed(self, call: Any) -> Any:
        return np.zeros(call.hidden_states.shape, np.float16)

    def dies(self) -> None:
        self.reachable = False
        self.death.set()

    def returns(self) -> None:
        self.reachable, self.free, self.death = True, 0.0, asyncio.Event()
        self.generation += 1


class MortalLink(FakeLink):
    """A link that breaks when its server dies, and takes a call as so many messages."""

    message_bytes = ROWS * HIDDEN * 2 // MESSAGES

    async def forward(self, request: bytes, timeout: float | None) -> bytes:
        self._reach()
        assert isinstance(self.server, SlowServer)
        answer = asyncio.ensure_future(self.server.answer(request))
        death = asyncio.ensure_future(self.server.death.wait())
        try:
            await asyncio.wait({answer, death}, return_when="FIRST_COMPLETED")
            if not answer.done():
                raise Unavailable("the connection was reset")
            return answer.result()
        finally:
            answer.cancel()
            death.cancel()


class Crowd:
    """Callers who ask again as soon as they are answered; ended says when they were."""

    def __init__(self, replicas: int, callers: int, pools: int, seed: int) -> None:
        self.chance = random.Random(seed)
        servers = [SlowServer(f"r{n}:1", chance=self.chance) for n in range(replicas)]
        self.fleet, self.servers = FakeFleet(*servers), servers
        self.ended: list[float] = []
        self._callers, self._pools = callers, pools
        rows, ids = np.zeros((ROWS, HIDDEN), np.float16), np.arange(4, dtype=np.int32)
        self._call = pool_call(
            MODEL,
            LAYER,
            rows,
            topk_ids=np.tile(ids % EXPERTS, (ROWS, 1)),
            topk_weights=np.ones((ROWS, 4), np.float32),
        )

    async def run(self, seconds: float, events: dict[float, Callable[[], None]]) -> None:
        """All of them for so long; events happen at their times."""
        loop = asyncio.get_running_loop()
        source = endpoints(self.fleet.targets)
        fleets = [
            Fleet(source, lambda t: MortalLink(self.fleet.servers[t])) for _ in range(self._pools)
        ]
        desks = [Desk(fleet, Policy()) for fleet in fleets]
        for at, event in events.items():
            loop.call_at(at, event)
        for fleet in fleets:
            await fleet.start()
        callers = [self._calls(desks[n % self._pools], seconds) for n in range(self._callers)]
        await asyncio.gather(*callers)
        for fleet in fleets:
            await fleet.close()

    async def _calls(self, desk: Desk, until: float) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.chance.uniform(0, START_SECONDS / 2))
        while loop.time() < until:
            await Delivery(desk, self._call, loop.time() + 30, False).run()
            self.ended.append(loop.time())

    def rate(self, begin: float, end: float) -> float:
        """Rows a second that were answered in that time."""
        return ROWS * sum(begin <= at < end for at in self.ended) / (end - begin)
