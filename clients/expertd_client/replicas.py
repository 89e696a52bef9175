"""The replicas of a pool: who is there, what each holds, and who may be asked now.

Everything here belongs to one event loop; only Fleet.offers may be read from elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

from expertd_client import queries
from expertd_client.errors import (
    DeadlineExceeded,
    ExpertdError,
    LayerFailed,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from expertd_client.fleet.editions import Edition, Offer, choose, editions
from expertd_client.fleet.endpoints import Endpoints
from expertd_client.fleet.link import Connect, Link
from expertd_client.fleet.pace import FIRST_SPEED, HOPE, Pace, Pause
from expertd_client.sharding import Holder
from expertd_wire.v1 import experts_pb2 as pb

log = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
"""How often a replica is asked what it holds, and how long its answer may take."""

REWATCH_SECONDS = 0.2
REREAD_SECONDS = 2.0
_MOST_TOLD = 8

LayerKey = tuple[str, int]


class Replica:
    """One server as this pool sees it.

    serving and layers are None while they are not known; epoch counts how often it was lost, so
    that what it said before then is not believed afterwards.
    """

    def __init__(self, target: str, link: Link) -> None:
        self.target = target
        self.link = link
        self.serving: bool | None = None
        self.layers: dict[LayerKey, pb.LayerInfo] | None = None
        self.epoch = 0
        self.stalled = False
        self.refusal: ExpertdError | None = None
        self.pace = Pace()
        self.pause = Pause()
        self.queued_by_others = 0
        self.nudge = asyncio.Event()

    def holder(self, offer: Offer, speed: float | None, hoped: float) -> Holder:
        """Its range of a layer, with its present load; hoped is its speed if it is not measured.

        Others' rows count only then: a speed is measured beside them, and what was told of them two
        seconds ago would drive every pool away from a replica at once, and back again.
        """
        waiting = self.pace.rows + (self.queued_by_others if speed is None else 0)
        told = offer.layer
        return Holder(
            self.target, *offer.range, speed or hoped, waiting, told.generation, told.weights_digest
        )

    def failed(self, error: ExpertdError, now: float) -> None:
        """Leaves it alone for a while, and asks it what has become of it."""
        self.pause.failed(now, error.retry_seconds)
        if not isinstance(error, Overloaded):
            self.nudge.set()

    def answered(self, rows: int, begin: float, now: float) -> None:
        """It has done some rows, so it is well."""
        self.pace.finished(rows, begin, now)
        self.pause.succeeded()
        self.stalled = False

    @property
    def contacted(self) -> bool:
        """Whether it has answered, or is known to be out of service."""
        answered = self.layers is not None or self.refusal is not None
        return self.serving is False or (self.serving is True and answered)

    def health(self, serving: bool) -> None:
        """What its health service says; what it holds may have changed with it."""
        if serving != self.serving:
            self.serving, self.epoch = serving, self.epoch + 1
            self.layers = self.refusal = None
            self.stalled = False
            self.pause.succeeded()
            self.nudge.set()

    def told(self, layers: list[pb.LayerInfo]) -> None:
        """Its answer to ListLayers."""
        self.layers = {(layer.model, layer.layer): layer for layer in layers}
        queued = sum(layer.queued_tokens for layer in layers)
        self.queued_by_others = max(0, queued - self.pace.rows)
        self.stalled, self.refusal = False, None


class Fleet:
    """Every replica of a pool, kept fresh by tasks of its own until close()."""

    def __init__(self, source: Endpoints, connect: Connect) -> None:
        self._source = source
        self._connect = connect
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()
        self._current: dict[LayerKey, tuple[bytes, str]] = {}
        self._editions: dict[LayerKey, list[Edition]] = {}
        self._read_once = False
        self._unread = ""
        self.replicas: dict[str, Replica] = {}

    async def start(self) -> None:
        """Begins to read the endpoints and to watch who is there."""
        self._tasks[""] = [_spawn(self._follow())]

    async def close(self) -> None:
        """Lets go of every replica."""
        tasks = [*self._leaving, *(task for some in self._tasks.values() for task in some)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self.replicas.values():
            replica.link.close()
        self.replicas = {}

    async def changed(self, seconds: float) -> None:
        """Waits until something has changed, but not longer than seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._change.wait()

    @property
    def all_contacted(self) -> bool:
        """Whether each replica has answered, been found unreachable, or taken too long to answer.

        An address from which nothing comes, not even a refusal, keeps nobody waiting.
        """
        return self._read_once and all(r.contacted or r.stalled for r in self.replicas.values())

    @property
    def absent(self) -> str:
        """Why nobody may be there, in words: endpoints that cannot be read, or who is away."""
        away = [replica.target for replica in self.replicas.values() if not replica.serving]
        told = f"not in service: {names(away)}" if away else ""
        return "; ".join(filter(None, (self._unread, told)))

    def offers(self, model: str | None = None) -> list[Offer]:
        """What every serving replica holds, ready or not."""
        return [
            Offer(replica.target, layer)
            for replica in list(self.replicas.values())
            if replica.serving
            for layer in list((replica.layers or {}).values())
            if model in (None, layer.model)
        ]

    def holders(self, offers: Sequence[Offer], now: float) -> list[Holder]:
        """These replicas with their load; one that is not measured is thought to be the fastest.

        Else a lone caller, who asks the fastest of a range, would never come to measure it.
        """
        replicas = [(offer, self.replicas[offer.target]) for offer in offers]
        speeds = [replica.pace.speed(now) for _, replica in replicas]
        known = [speed for speed in speeds if speed is not None]
        hoped = HOPE * max(known) if known else FIRST_SPEED
        return [
            replica.holder(offer, speed, hoped)
            for (offer, replica), speed in zip(replicas, speeds, strict=True)
        ]

    def editions(self, model: str, layer: int) -> list[Edition]:
        """The weights of a layer that are ready somewhere, by what may be mixed."""
        found = self._editions.get((model, layer))
        if found is None:
            known = [offer for offer in self.offers(model) if offer.layer.layer == layer]
            found = editions(offer for offer in known if offer.layer.state == "ready")
            self._editions[model, layer] = found
        return found

    def edition(self, model: str, layer: int) -> Edition | None:
        """The weights that a call of now is to use; None if nobody has any.

        Raises NotFound or LayerFailed if every replica has answered, and none will ever have them,
        or the reason for which they do not say what they have.
        """
        found = self.editions(model, layer)
        if not found:
            self._refuse(model, layer)
        chosen = choose(found, self._current.get((model, layer)))
        if chosen is not None and self._current.get((model, layer)) != chosen.key:
            self._current[model, layer] = chosen.key
            if len(found) > 1:
                log.warning(_several(model, layer, found, chosen))
        return chosen

    def _refuse(self, model: str, layer: int) -> None:
        known = [offer for offer in self.offers(model) if offer.layer.layer == layer]
        if not self.replicas or not all(r.serving and r.contacted for r in self.replicas.values()):
            return
        refusals = [r.refusal for r in self.replicas.values() if r.refusal is not None]
        if refusals and not known:
            raise refusals[0].with_traceback(None)
        if not known:
            served = sorted({o.layer.model for o in self.offers()})
            raise NotFound(
                f"no replica has layer {layer} of model {model[:80]!r}; models there: "
                f"{', '.join(served) or 'none'}"
            )
        if all(offer.layer.state == "failed" for offer in known):
            raise LayerFailed(f"layer {model}/{layer} failed: {known[0].layer.detail}")

    async def _follow(self) -> None:
        """Keeps the replicas equal to what the endpoints' source says."""
        while True:
            try:
                self._settle(await self._source.read())
                self._unread = ""
            except ExpertdError as error:
                if self._unread != str(error):
                    log.warning("endpoints stay as they were: %s", error)
                self._unread = str(error)
            self._read_once = True
            if not self._source.changing:
                return
            await asyncio.sleep(REREAD_SECONDS)

    def _settle(self, targets: tuple[str, ...]) -> None:
        for target in targets:
            if target not in self.replicas:
                replica = self.replicas[target] = Replica(target, self._connect(target))
                self._tasks[target] = [_spawn(self._watch(replica)), _spawn(self._probe(replica))]
        for target in self.replicas.keys() - set(targets):
            leaving = self._leave(self.replicas.pop(target), self._tasks.pop(target))
            self._leaving.add(task := _spawn(leaving))
            task.add_done_callback(self._leaving.discard)
        self._notify()

    async def _leave(self, replica: Replica, keepers: list[asyncio.Task[None]]) -> None:
        """Lets go of a replica that is no longer listed, once its calls have ended."""
        try:
            for task in keepers:
                task.cancel()
            while replica.pace.rows:
                await asyncio.sleep(REWATCH_SECONDS)
        finally:
            replica.link.close()

    async def _watch(self, replica: Replica) -> None:
        """Follows its health; a watch that breaks means that it is gone until it says otherwise."""
        while True:
            with suppress(ExpertdError):
                async for serving in replica.link.watch():
                    replica.health(serving)
                    self._notify()
            replica.health(False)
            self._notify()
            await asyncio.sleep(REWATCH_SECONDS)

    async def _probe(self, replica: Replica) -> None:
        """Asks what it holds, now and then and when nudged."""
        while True:
            replica.nudge.clear()
            await self._ask(replica)
            self._notify()
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_SECONDS):
                    await replica.nudge.wait()

    async def _ask(self, replica: Replica) -> None:
        question, epoch = queries.list_layers(None), replica.epoch
        try:
            data = await replica.link.query(question.path, question.request, PROBE_SECONDS)
            if epoch == replica.epoch:
                replica.told(question.answer(data))
        except DeadlineExceeded:
            replica.stalled = True
        except Unavailable:
            if replica.serving is None:
                replica.serving = False
        except (Unauthenticated, PermissionDenied) as error:
            replica.refusal = error
        except ExpertdError as error:
            log.warning("replica %s: %s", replica.target, error)

    def _notify(self) -> None:
        """Forgets what was made of the replicas' answers, and wakes those who wait for others."""
        self._editions = {}
        self._change.set()
        self._change = asyncio.Event()


def names(targets: Sequence[str]) -> str:
    """The first of them, for an error's text."""
    more = ", …" if len(targets) > _MOST_TOLD else ""
    return f"{', '.join(targets[:_MOST_TOLD])}{more}"


def _several(model: str, layer: int, found: list[Edition], chosen: Edition) -> str:
    others = [o.target for e in found if e is not chosen for o in e.offers]
    return (
        f"layer {model}/{layer}: the replicas' weights differ; calls go to "
        f"{', '.join(o.target for o in chosen.offers)}, none to {', '.join(others)}"
    )


def _spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(work)
