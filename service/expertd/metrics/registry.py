"""Prometheus metrics: the engine's observer and the carriers' counters, in one registry."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from expertd.engine.observer import BatchReport, BatchTimes
from expertd.engine.resident import Residents
from expertd.metrics.collectors import Cells, Experts, Layers
from expertd.metrics.distribution import Distribution

SECONDS = (
    *(0.00001, 0.00003, 0.00005, 0.0001, 0.0003, 0.0006, 0.001, 0.002, 0.003, 0.006, 0.01, 0.03),
    *(0.06, 0.1, 0.3, 0.6, 1.0, 3.0, 10.0, 30.0, 100.0),
)
TOKENS = tuple(float(1 << power) for power in range(17))
REQUESTS = tuple(float(1 << power) for power in range(9))

T = TypeVar("T")

NO_PLAN = ("none", "none")
DRAINING = "draining"
REJECTIONS = {
    "TOO_LARGE": "too_large",
    "OVERLOADED": "queue_full",
    "DEADLINE_EXCEEDED": "deadline",
    "CANCELLED": "cancelled",
}
"""Reasons of errors that count as rejections, with their names here."""
MOST_NOTES = 256
"""How many calls may wait for a scrape; together they take a fraction of a millisecond."""


class CallReport(NamedTuple):
    """A call that was answered: its plan (backend, mode), its code, its time, its own stages."""

    model: str
    carrier: str
    plan: tuple[str, str]
    code: str
    nanoseconds: int
    stages: Sequence[tuple[str, int]]


class Metrics:
    """Everything that /metrics shows; methods are called from any thread."""

    def __init__(self, residents: Residents, info: dict[str, str]) -> None:
        # A *_created series for each series says nothing here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._batches: deque[BatchReport] = deque()
        self._calls: deque[CallReport] = deque()
        self._settling = threading.Lock()
        self._opening = threading.Lock()
        self._open = 0
        self._residents = residents
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        self._requests = counter(
            "expertd_requests",
            "Calls answered, by gRPC status name.",
            ("model", "carrier", "backend", "mode", "code"),
        )
        self._duration = self._distribution(
            "expertd_request_duration_seconds",
            "From a call's arrival to its encoded reply.",
            SECONDS,
            ("model", "carrier"),
        )
        self._queue = self._distribution(
            "expertd_queue_duration_seconds", "Time in the queue.", SECONDS
        )
        self._stage = self._distribution(
            "expertd_stage_duration_seconds",
            "Time of one stage: decode and encode by call, the others by batch.",
            SECONDS,
            ("stage",),
        )
        self._batch_tokens = self._distribution("expertd_batch_tokens", "Rows of a batch.", TOKENS)
        self._batch_requests = self._distribution(
            "expertd_batch_requests", "Calls of a batch.", REQUESTS
        )
        self._tokens = counter("expertd_tokens", "Rows computed.", ("model",))
        inflight = gauge("expertd_inflight_requests", "Calls being answered.")
        inflight.set_function(lambda: self._open)
        self._rejected = counter("expertd_rejected", "Calls refused or dropped.", ("reason",))
        self._nonfinite = counter(
            "expertd_nonfinite_outputs", "Rows answered with NaN or infinity.", ("model",)
        )
        self._draining = gauge("expertd_draining", "1 while draining.")
        Info("expertd_build", "Versions of this process.", registry=self.registry).info(info)
        self.registry.register(Layers(residents))
        self._child = cache(lambda family, *labels: family.labels(*labels))
        for reason in (*REJECTIONS.values(), DRAINING):
            self._child(self._rejected, reason)

    def _distribution(
        self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str] = ()
    ) -> Distribution:
        made = Distribution(name, text, bounds, labels)
        self.registry.register(made)
        return made

    def rejected(self, reason: str) -> None:
        self._child(self._rejected, reason).inc()

    def ran(self, report: BatchReport) -> None:
        self._batches.append(report)

    def started(self) -> None:
        with self._opening:
            self._open += 1

    def finished(self, report: CallReport) -> None:
        """Counts an answered call; names that are not served become "unknown"."""
        with self._opening:
            self._open -= 1
        self._calls.append(report)
        if len(self._calls) >= MOST_NOTES:
            self._settle()

    def _settle(self) -> None:
        """Counts what was noted: a hundred in a row cost a call a quarter of one alone."""
        with self._settling:
            self._count_batches(list(_taken(self._batches)))
            self._count_calls(list(_taken(self._calls)))

    def _count_batches(self, batches: Sequence[BatchReport]) -> None:
        for stage in BatchTimes._fields:
            self._stage.observe([getattr(b.times, stage) / 1e9 for b in batches], stage)
        self._queue.observe([waited / 1e9 for b in batches for waited in b.queued_ns])
        self._batch_tokens.observe([b.tokens for b in batches])
        self._batch_requests.observe([b.requests for b in batches])
        for batch in batches:
            self._child(self._tokens, batch.model).inc(batch.tokens)
            if batch.nonfinite_rows:
                self._child(self._nonfinite, batch.model).inc(batch.nonfinite_rows)

    def _count_calls(self, calls: Sequence[CallReport]) -> None:
        spent: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
        stages: defaultdict[str, list[float]] = defaultdict(list)
        for call in calls:
            known = call.model if self._residents.knows(call.model) else "unknown"
            spent[known, call.carrier, *call.plan, call.code].append(call.nanoseconds / 1e9)
            for stage, nanoseconds in call.stages:
                stages[stage].append(nanoseconds / 1e9)
        for labels, seconds in spent.items():
            self._child(self._requests, *labels).inc(len(seconds))
            self._duration.observe(seconds, *labels[:2])
        for stage, seconds in stages.items():
            self._stage.observe(seconds, stage)

    def drain(self) -> None:
        self._draining.set(1)

    def cells(self, count: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """Shows how many capability cells are in each state."""
        self.registry.register(Cells(count))

    def experts(self, each: bool) -> None:
        """Shows how even the load of each layer's experts is; with each, every one's rows too."""
        self.registry.register(Experts(self._residents, each))

    def render(self) -> bytes:
        """The text exposition; not for an event loop's thread."""
        self._settle()
        for model in {resident.model for resident in self._residents.all()}:
            # At 0 before the first, which increase() over a series that begins with 1 would miss.
            self._child(self._tokens, model)
            self._child(self._nonfinite, model)
        return generate_latest(self.registry)


def _taken(notes: deque[T]) -> Iterator[T]:
    while notes:
        yield notes.popleft()
