"""Runs rivals side by side on batches of growing size and says how long each took."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import TypeVar

from expertd.backends.base import Batch
from expertd.engine.timings import Times
from expertd.engine.watch import Watch

log = logging.getLogger(__name__)

LEAST_ROUNDS, MOST_ROUNDS = 2, 20

Name = TypeVar("Name")
Rivals = Mapping[Name, Callable[[Batch], None]]


def race(
    rivals: Rivals[Name],
    batch_of: Callable[[int], Batch],
    buckets: Sequence[int],
    watch: Watch,
    seconds: float,
) -> dict[Name, Times]:
    """The median microseconds of each rival at each bucket, as far as the seconds reach.

    A bucket is begun only if its least number of rounds fits, given that it takes twice as long as
    the one before it. A rival that fails at a bucket is not tried at larger ones.
    """
    end = watch.now() + seconds
    found: dict[Name, Times] = {name: () for name in rivals}
    running, expected = dict(rivals), 0.0
    for place, tokens in enumerate(buckets):
        left = end - watch.now()
        if not running or expected > left:
            break
        until = watch.now() + left / (len(buckets) - place)
        heats = _heats(running, batch_of(tokens), watch, until)
        running = {name: run for name, run in running.items() if name in heats}
        for name, times in heats.items():
            found[name] = (*found[name], median(times))
        slowest = sum(max(times) for times in heats.values())
        expected = 2 * (1 + LEAST_ROUNDS) * slowest / 1e6
    return found


def _heats(
    rivals: Rivals[Name], batch: Batch, watch: Watch, until: float
) -> dict[Name, list[float]]:
    """Rounds in which every rival runs once; one that fails is left out."""
    heats: dict[Name, list[float]] = {}
    for name, run in rivals.items():
        try:
            watch.microseconds(partial(run, batch))
        except Exception:
            log.warning("%s failed at %d tokens", name, len(batch.rows), exc_info=True)
        else:
            heats[name] = []
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and watch.now() > until:
            break
        for name in heats:
            run = rivals[name]
            heats[name].append(watch.microseconds(lambda run=run: run(batch)))  # type: ignore[misc]
    return heats
