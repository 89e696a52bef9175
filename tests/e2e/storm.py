"""What befalls a fleet: kill -9, SIGSTOP, drain and restart of a replica, and of a whole range."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import grpc
from tests.e2e.fleet import Replica

SECONDS = 60
FROZEN = 14.0
SETTLED = 2.0
"""After a replica is ready, the time that a pool may need to see it."""


@dataclass
class Windows:
    """When no replica of some range was alive."""

    spans: list[tuple[float, float]] = field(default_factory=list)

    @contextmanager
    def marked(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.spans.append((begin, time.monotonic()))

    def meet(self, begin: float, end: float) -> bool:
        return any(begin < ended and began < end for began, ended in self.spans)


def kill(replica: Replica, dice: random.Random) -> None:
    replica.end()
    time.sleep(dice.uniform(0, 1))
    replica.start()


def freeze(replica: Replica, dice: random.Random) -> None:
    replica.send(signal.SIGSTOP)
    time.sleep(FROZEN)
    replica.send(signal.SIGCONT)


def freeze_and_kill(replica: Replica, dice: random.Random) -> None:
    replica.send(signal.SIGSTOP)
    time.sleep(dice.uniform(0.5, 3))
    kill(replica, dice)


def drain(replica: Replica, dice: random.Random) -> None:
    with grpc.insecure_channel(replica.grpc) as channel:
        channel.unary_unary("/expertd_wire.v1.Admin/Drain")(b"", timeout=FROZEN)
    assert replica.wait() == 0
    replica.start()


def restart(replica: Replica, dice: random.Random) -> None:
    assert replica.end(signal.SIGTERM) == 0
    replica.start()


Fate = Callable[[Replica, random.Random], None]
FATES: tuple[Fate | None, ...] = (kill, freeze, drain, freeze_and_kill, None, restart)
"""What befalls one replica of a range; None: both are killed, in a marked window."""


@dataclass
class Storm:
    """Brings fate upon the two replicas of a range, one at a time, until its time is over."""

    pair: list[Replica]
    fates: list[Fate | None]
    windows: Windows
    dice: random.Random
    until: float
    alone: threading.Lock
    came: Counter[str] = field(default_factory=Counter)

    def rage(self) -> None:
        while time.monotonic() < self.until:
            for fate in self.fates:
                if time.monotonic() < self.until:
                    self.strike(fate)
            self.dice.shuffle(self.fates)

    def strike(self, fate: Fate | None) -> None:
        # A window in one range must not excuse calls that a frozen replica of the other loses.
        with self.alone if fate in (freeze, None) else nullcontext():
            if fate is None:
                self.outage()
            else:
                fate(self.dice.choice(self.pair), self.dice)
                time.sleep(SETTLED)
        self.came[getattr(fate, "__name__", "outage")] += 1

    def outage(self) -> None:
        """Kills both, in a marked window."""
        with self.windows.marked():
            both = [threading.Thread(target=kill, args=(r, self.dice)) for r in self.pair]
            for thread in both:
                thread.start()
            for thread in both:
                thread.join()
            time.sleep(SETTLED)


def storms(fleet: list[Replica], windows: Windows, dice: random.Random) -> list[Storm]:
    """One for each range; they begin at different fates."""
    until, half = time.monotonic() + SECONDS, len(FATES) // 2
    decks = [list(FATES), list(FATES[half:] + FATES[:half])]
    pairs, alone = [fleet[:2], fleet[2:]], threading.Lock()
    return [
        Storm(pair, deck, windows, random.Random(dice.random()), until, alone)
        for pair, deck in zip(pairs, decks, strict=True)
    ]
