"""One call's way over a fleet: its parts, what happens when one is late or fails, the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf

import numpy as np
from numpy.typing import NDArray

from expertd_client.errors import DeadlineExceeded, ExpertdError, Overloaded
from expertd_client.fleet.message import PoolCall, output_of, read_reply, work_by_experts
from expertd_client.fleet.pace import Allowance, Latencies
from expertd_client.fleet.placement import Changed, Placement, Policy, agreed_edition, none_ready
from expertd_client.fleet.tasks import cancel, final, first_good, off, together
from expertd_client.replicas import Fleet, Replica, names
from expertd_client.sharding import (
    Part,
    Piece,
    Rows,
    Split,
    Work,
    add_up,
    cut,
    most_rows,
    put_together,
)

STALL_SECONDS = 1.0
"""An answer that takes this long, and four times as long as usual, is asked for elsewhere too."""

UNMEASURED_STALL_SECONDS = 5.0
_TURN_SECONDS = 0.05
_MARGIN_SECONDS = 0.05
"""A call that may be partial returns this long before its deadline, to be in time."""

MOST_ON_THE_WAY = 2
"""Messages of one call that a replica is sent at once: one travels while another is computed."""

MOST_FAULTY = 2
"""A call that so many replicas answer with their own fault is not tried at others."""

NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Share:
    """What one replica answered of a call."""

    target: str
    rows: int
    backend: str
    seconds: float


@dataclass(slots=True)
class Desk:
    """What all calls of a pool share."""

    fleet: Fleet
    policy: Policy
    latencies: Latencies = field(default_factory=Latencies)
    retries: Allowance = field(default_factory=lambda: Allowance(100.0, 10.0, 0.2))
    hedges: Allowance = field(default_factory=lambda: Allowance(10.0, 0.0, 0.05))
    callers: int = 0


@dataclass(slots=True)
class Got:
    """Answered parts, and the work that nobody could do."""

    pieces: list[Piece] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    missing: list[Work] = field(default_factory=list)

    @classmethod
    def joined(cls, missing: Work | None, parts: Sequence[Got]) -> Got:
        """All of them as one."""
        pieces = [piece for part in parts for piece in part.pieces]
        shares = [share for part in parts for share in part.shares]
        lost = [work for part in parts for work in part.missing]
        return cls(pieces, shares, lost if missing is None else [missing, *lost])


@dataclass(frozen=True, slots=True)
class Outcome:
    """output [T, H], which rows are complete [T], who answered what, and in how many attempts."""

    output: Rows
    complete: NDArray[np.bool_]
    shares: tuple[Share, ...]
    attempts: int


class Delivery:
    """One call under way; run() once. deadline is of the event loop's clock, perhaps inf."""

    def __init__(self, desk: Desk, call: PoolCall, deadline: float, allow: bool) -> None:
        self._desk = desk
        self._call = call
        self._deadline = deadline
        self._allow = allow
        self._loop = asyncio.get_running_loop()
        self._place: Placement | None = None
        self._last: ExpertdError | None = None
        self._attempts = 0
        self._faulty: set[str] = set()
        self._late: set[str] = set()
        self._reserved: dict[int, tuple[Part, Replica]] = {}
        self._lanes: dict[str, asyncio.Semaphore] = {}

    async def run(self) -> Outcome:
        """The answer; raises ExpertdError's family."""
        self._desk.callers += 1
        try:
            async with asyncio.timeout_at(None if self._deadline == inf else self._deadline):
                while True:
                    try:
                        return await self._once()
                    except Changed:
                        # The replicas have other weights by now, and the parts of two editions
                        # never make one answer: all over again, while the deadline lasts.
                        continue
        except TimeoutError:
            raise self._too_late() from self._last
        finally:
            self._desk.callers -= 1
            for part, _ in list(self._reserved.values()):
                self._release(part)

    async def _once(self) -> Outcome:
        key = (self._call.model, self._call.layer)
        edition = await agreed_edition(self._desk.fleet, key, self._desk.policy)
        place = Placement(self._desk.fleet, self._desk.policy, key, edition, self._allow)
        self._place = place
        if place.sums:
            numbers = self._call.tokens * edition.layer.num_experts
            work = await off(4 * numbers, partial(work_by_experts, self._call, edition.layer))
        else:
            work = Work(np.arange(self._call.tokens))
        step = self._what_can_be_had if self._allow else self._deliver
        got = await step(place, work)
        return await off(self._call.hidden_states.nbytes, partial(self._outcome, place, got))

    async def _what_can_be_had(self, place: Placement, work: Work) -> Got:
        """What is there shortly before the deadline; nothing waits for what nobody can do now."""
        try:
            async with asyncio.timeout(self._most()):
                split = await self._placed(place, work, NOBODY, some=True)
        except TimeoutError:
            return Got(missing=[work])
        steps = [(self._carried(place, part, NOBODY), part.work) for part in split.parts]
        if split.missing is not None:
            steps.append((self._deliver(place, split.missing), split.missing))
        tasks = {asyncio.ensure_future(step): its_work for step, its_work in steps}
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=self._most(), return_when="FIRST_EXCEPTION")
            done = [
                task.result() if task.done() else Got(missing=[its_work])
                for task, its_work in tasks.items()
            ]
        finally:
            await cancel(tasks)
        return Got.joined(None, done)

    def _most(self) -> float | None:
        left = self._left()
        return None if left is None else left - min(_MARGIN_SECONDS, left / 10)

    def _left(self) -> float | None:
        """Seconds to the deadline; None if there is none."""
        if self._deadline == inf:
            return None
        return max(0.001, self._deadline - self._loop.time())

    async def _deliver(
        self, place: Placement, work: Work, excluded: frozenset[str] = NOBODY
    ) -> Got:
        """Every part of some work, each until it is done."""
        split = await self._placed(place, work, excluded)
        parts = [self._carried(place, part, excluded) for part in split.parts]
        return Got.joined(split.missing, await together(parts))

    async def _carried(self, place: Placement, part: Part, excluded: frozenset[str]) -> Got:
        """One part until it is done, by another replica whenever one has failed."""
        while True:
            try:
                # Its time counts from its turn: one that waits for others is not late.
                async with self._lane(part):
                    return await self._raced(place, part, excluded)
            except ExpertdError as error:
                if final(error) or self._is_the_calls_own(error, part.holder.name):
                    raise
                self._last = error
            excluded |= {part.holder.name}
            await self._turn()
            split = await self._placed(place, part.work, excluded)
            if split.missing is not None or len(split.parts) != 1:
                parts = [self._carried(place, smaller, excluded) for smaller in split.parts]
                return Got.joined(split.missing, await together(parts))
            (part,) = split.parts

    def _is_the_calls_own(self, error: ExpertdError, name: str) -> bool:
        """Whether a further replica has failed in itself: then it is the call, most likely."""
        if error.reason == "INTERNAL":
            self._faulty.add(name)
        return len(self._faulty) >= MOST_FAULTY

    async def _placed(
        self, place: Placement, work: Work, excluded: frozenset[str], *, some: bool = False
    ) -> Split:
        """Who is to do it; their load grows at once, so that the next call sees it."""
        split = await place.place(work, excluded, self._desk.callers, some=some)
        parts = tuple(smaller for part in split.parts for smaller in self._messages(part))
        for part in parts:
            replica = self._desk.fleet.replicas[part.holder.name]
            replica.pace.rows += len(part.work.rows)
            self._reserved[id(part)] = part, replica
        return Split(parts, split.missing)

    def _messages(self, part: Part) -> list[Part]:
        """The part as the messages that its replica's carrier takes best."""
        link = self._desk.fleet.replicas[part.holder.name].link
        call = self._call
        return cut(part, most_rows(call.hidden_states.nbytes, call.tokens, link.message_bytes))

    def _lane(self, part: Part) -> asyncio.Semaphore:
        return self._lanes.setdefault(part.holder.name, asyncio.Semaphore(MOST_ON_THE_WAY))

    def _release(self, part: Part) -> None:
        _, replica = self._reserved.pop(id(part))
        replica.pace.rows -= len(part.work.rows)

    async def _turn(self) -> None:
        """Waits for its turn to try again: retries must not bury those who are left."""
        while not self._desk.retries.take(self._loop.time()):
            await asyncio.sleep(_TURN_SECONDS)

    async def _raced(self, place: Placement, part: Part, excluded: frozenset[str]) -> Got:
        """One attempt, and a second one elsewhere if it is late; the first answer counts."""
        others = excluded | {part.holder.name}
        begin = self._loop.time()
        running: list[asyncio.Task[Got]] = [self._loop.create_task(self._attempt(place, part))]
        try:
            for after, stalled in self._alarms(len(part.work.rows)):
                wait = max(0.0, begin + after - self._loop.time())
                done, _ = await asyncio.wait(running, timeout=wait)
                if done:
                    break
                if self._worth_a_second(place, part, others, stalled):
                    second = self._deliver(place, part.work, others)
                    running.append(self._loop.create_task(second))
                    break
            return await first_good(running)
        finally:
            await cancel(running)

    def _alarms(self, rows: int) -> Iterator[tuple[float, bool]]:
        """Seconds after which an attempt is late, and whether that late means stalled."""
        usual = self._desk.latencies.p95(rows)
        if usual is not None and self._desk.policy.hedge:
            yield usual, False
        stall = UNMEASURED_STALL_SECONDS if usual is None else max(STALL_SECONDS, 4 * usual)
        left = self._left()
        stall = stall if left is None else min(stall, left / 2)
        times = 1
        while True:
            yield stall * times, True
            times += 1

    def _worth_a_second(
        self, place: Placement, part: Part, others: frozenset[str], stalled: bool
    ) -> bool:
        replica = self._desk.fleet.replicas.get(part.holder.name)
        if stalled:
            self._late.add(part.holder.name)
        if stalled and replica is not None:
            replica.stalled = True
            replica.nudge.set()
        if place.split(part.work, others, self._desk.callers).missing is not None:
            return False
        return stalled or self._desk.hedges.take(self._loop.time())

    async def _attempt(self, place: Placement, part: Part) -> Got:
        """One part at one replica, once; raises what came of it."""
        _, replica = self._reserved[id(part)]
        rows, begin = len(part.work.rows), self._loop.time()
        self._attempts += 1
        try:
            got = await self._asked(place, replica, part)
        except ExpertdError as error:
            if not final(error):
                replica.failed(error, self._loop.time())
            elif rows < self._call.tokens:
                error.add_note(f"rows are counted among {part.work.told} that a replica was sent")
            raise
        finally:
            self._release(part)
        self._note(replica, rows, begin)
        return got

    async def _asked(self, place: Placement, replica: Replica, part: Part) -> Got:
        call, work, begin = self._call, part.work, self._loop.time()
        size = len(work.rows) * call.hidden_states.nbytes // max(1, call.tokens)
        request = await off(size, partial(call.request, work, place.sums))
        data = await replica.link.forward(request, self._left())
        dtype = np.dtype(np.float32) if place.sums else call.dtype
        reply = read_reply(data, part, place.edition.layer.hidden, dtype)
        spent = self._loop.time() - begin
        share = Share(replica.target, len(work.rows), reply.backend, spent)
        return Got([Piece(part.holder, work.rows, output_of(reply))], [share])

    def _note(self, replica: Replica, rows: int, begin: float) -> None:
        """An answer: it tells of the replica's speed, and earns tokens for others' second tries."""
        now = self._loop.time()
        replica.answered(rows, begin, now)
        self._desk.latencies.add(rows, now - begin)
        self._desk.retries.earn()
        self._desk.hedges.earn()

    def _too_late(self) -> ExpertdError:
        if isinstance(self._last, Overloaded):
            return self._last
        if self._place is None:
            return none_ready(self._desk.fleet, (self._call.model, self._call.layer))
        last = f"the last error: {self._last}" if self._last else ""
        if self._place.waiting:
            return self._place.unavailable([*sorted(self._place.waiting), last])
        late = f"late: {names(sorted(self._late))}" if self._late else ""
        told = ("no answer within the deadline", late, last)
        return DeadlineExceeded("; ".join(filter(None, told)))

    def _outcome(self, place: Placement, got: Got) -> Outcome:
        tokens, hidden = self._call.tokens, place.edition.layer.hidden
        complete = np.ones(tokens, np.bool_)
        for work in got.missing:
            complete[work.rows] = False
        merge: Callable[..., Rows] = add_up if place.sums else put_together
        output = merge(tokens, hidden, got.pieces, self._call.dtype)
        return Outcome(output, complete, tuple(got.shares), self._attempts)
