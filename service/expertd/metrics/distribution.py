"""A histogram that the hot path can afford."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric


class Distribution:
    """A histogram family that takes many values at once, each for one bisection, from any thread.

    prometheus_client's take a lock for each of three counters, which the hot path would feel.
    """

    def __init__(
        self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str] = ()
    ) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(bounds)
        self._les = [*map(str, self._bounds), "+Inf"]
        self._labels = tuple(labels)
        self._lock = threading.Lock()
        # For each series the count of each bucket, then the sum of all values.
        self._counts: dict[tuple[str, ...], list[float]] = {}
        if not labels:
            self._begin(())

    def observe(self, values: Sequence[float], *labels: str) -> None:
        """Counts each value in the bucket of the least bound that is not below it."""
        if not values:
            return
        with self._lock:
            counts = self._counts.get(labels) or self._begin(labels)
            for value in values:
                counts[bisect_left(self._bounds, value)] += 1
            counts[-1] += sum(values)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        with self._lock:
            found = [(labels, [*counts]) for labels, counts in self._counts.items()]
        for labels, (*counts, total) in found:
            buckets = list(zip(self._les, accumulate(counts), strict=True))
            family.add_metric(labels, buckets, total)
        yield family

    def _begin(self, labels: tuple[str, ...]) -> list[float]:
        """A series appears with its first value; one without labels is there from the start."""
        return self._counts.setdefault(labels, [0.0] * (len(self._les) + 1))
