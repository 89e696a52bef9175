"""Who has how much in the queue, and who must make room when it is full.

Everybody may fill the queue alone. While others wait, nobody adds to what is more than an equal
share of it, and when it is full, whoever holds the most gives up its newest calls to one that holds
less; the last call of a client is never taken from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar


class Held(NamedTuple):
    """What one client, or all of them, have in the queue."""

    tokens: int = 0
    nbytes: int = 0
    calls: int = 0

    def plus(self, call: Queued) -> Held:
        return Held(self.tokens + call.tokens, self.nbytes + call.nbytes, self.calls + 1)

    def minus(self, call: Queued) -> Held:
        return Held(self.tokens - call.tokens, self.nbytes - call.nbytes, self.calls - 1)


NOTHING = Held()


class Queued(Protocol):
    """What the ledger needs to know of a call."""

    @property
    def client(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def priority(self) -> int: ...

    @property
    def arrived_ns(self) -> int: ...


Q = TypeVar("Q", bound=Queued)


@dataclass(frozen=True, slots=True)
class Budget:
    """What may wait at most, of all clients together."""

    max_queued_tokens: int = 65536
    max_queued_bytes: int = 1 << 30

    def fill(self, held: Held) -> float:
        """How much of the queue this is: of its tokens or its bytes, whichever is more."""
        return max(held.tokens / self.max_queued_tokens, held.nbytes / self.max_queued_bytes)

    def exceeded(self, held: Held) -> str:
        """The flag of the limit that this exceeds, if any."""
        if held.tokens > self.max_queued_tokens:
            return "--max-queued-tokens"
        return "--max-queued-bytes" if held.nbytes > self.max_queued_bytes else ""


class Full(Exception):
    """There is no room: why, and how many tokens must leave before there is."""

    def __init__(self, why: str, tokens: int) -> None:
        super().__init__(why)
        self.tokens = tokens


class Ledger:
    """Counts what is queued, in all and by client; says who may come in."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        # tokens, nbytes, calls: counted in place, as every call passes here twice.
        self._total = [0, 0, 0]
        self._held: dict[str, list[int]] = {}

    def enter(self, call: Queued) -> None:
        self._count(call, 1)

    def leave(self, call: Queued) -> None:
        self._count(call, -1)
        if not self._held[call.client][2]:
            del self._held[call.client]

    def _count(self, call: Queued, sign: int) -> None:
        held = self._held.get(call.client) or self._held.setdefault(call.client, [0, 0, 0])
        for counts in (held, self._total):
            counts[0] += sign * call.tokens
            counts[1] += sign * call.nbytes
            counts[2] += sign

    @property
    def total(self) -> Held:
        return Held(*self._total)

    @property
    def clients(self) -> dict[str, Held]:
        """What each client has that has anything."""
        return {client: Held(*held) for client, held in self._held.items()}

    def make_room(self, newcomer: Queued, queue: Iterable[Q]) -> Sequence[Q]:
        """The queued calls that must leave for this one to wait; raises Full.

        An empty queue takes a call of any size.
        """
        if not self._held:
            return ()
        mine = Held(*self._held.get(newcomer.client, NOTHING)).plus(newcomer)
        self._check_share(mine, others=len(self._held.keys() - {newcomer.client}))
        limit = self.budget.exceeded(self.total.plus(newcomer))
        return self._victims(newcomer, mine, queue, limit) if limit else ()

    def _check_share(self, mine: Held, others: int) -> None:
        if others and mine.calls > 1 and self.budget.fill(mine) > 1 / (others + 1):
            share = self.budget.max_queued_tokens // (others + 1)
            raise Full(
                f"{mine.tokens} tokens would be queued for this client, whose share is {share} "
                f"while {others} more wait (--max-queued-tokens, --max-queued-bytes)",
                max(1, mine.tokens - share),
            )

    def _victims(self, newcomer: Queued, mine: Held, queue: Iterable[Q], limit: str) -> list[Q]:
        """The newest calls of those who hold the most, until the newcomer fits."""
        giving = sorted(queue, key=lambda call: (-call.priority, call.arrived_ns))
        left, total = self.clients, self.total.plus(newcomer)
        victims: list[Q] = []
        while self.budget.exceeded(total):
            fullest = self._fullest(left, mine, newcomer.client)
            if fullest is None:
                over = total.tokens - self.budget.max_queued_tokens
                raise Full(
                    f"{self.total.tokens} tokens are queued ({limit})",
                    over if over > 0 else self.total.tokens,
                )
            index = max(at for at, call in enumerate(giving) if call.client == fullest)
            victim = giving.pop(index)
            victims.append(victim)
            left[fullest], total = left[fullest].minus(victim), total.minus(victim)
        return victims

    def _fullest(self, left: dict[str, Held], mine: Held, client: str) -> str | None:
        """Who holds the most of those who hold more than mine and have a call to spare."""
        able = {
            name: self.budget.fill(held)
            for name, held in left.items()
            if name != client and held.calls > 1 and self.budget.fill(held) > self.budget.fill(mine)
        }
        return max(able, key=lambda name: able[name], default=None)
