"""Prometheus metrics: the engine's observer and the carriers' counters, in one registry."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest

from expertd.engine.expert_rows import balance
from expertd.engine.observer import BatchReport, BatchTimes
from expertd.engine.resident import LayerState, Resident, Residents

SECONDS = (
    *(0.00001, 0.00003, 0.00005, 0.0001, 0.0003, 0.0006, 0.001, 0.002, 0.003, 0.006, 0.01, 0.03),
    *(0.06, 0.1, 0.3, 0.6, 1.0, 3.0, 10.0, 30.0, 100.0),
)
TOKENS = tuple(float(1 << power) for power in range(17))
REQUESTS = tuple(float(1 << power) for power in range(9))

T = TypeVar("T")

NO_PLAN = ("none", "none")
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
        self.registry.register(_LayerCollector(residents))
        self._child = cache(lambda family, *labels: family.labels(*labels))

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
        self.registry.register(_CellCollector(count))

    def experts(self, each: bool) -> None:
        """Shows how even the load of each layer's experts is; with each, every one's rows too."""
        self.registry.register(_ExpertCollector(self._residents, each))

    def render(self) -> bytes:
        """The text exposition; not for an event loop's thread."""
        self._settle()
        return generate_latest(self.registry)


def _taken(notes: deque[T]) -> Iterator[T]:
    while notes:
        yield notes.popleft()


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


class _LayerCollector:
    """Gauges that are read off the layers at scrape time."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents

    def collect(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "expertd_layer_state",
            "1 for the state a layer is in, 0 for the others.",
            labels=("model", "layer", "state"),
        )
        weights = GaugeMetricFamily(
            "expertd_weights_bytes", "Bytes of expert weights held.", labels=("model", "device")
        )
        queued = GaugeMetricFamily("expertd_queued_tokens", "Rows waiting.")
        held: dict[tuple[str, str], int] = {}
        queued.add_metric((), sum(resident.queued_tokens for resident in self._residents.all()))
        for resident in self._residents.all():
            for name in LayerState:
                is_it = float(resident.state is name)
                state.add_metric((resident.model, str(resident.layer), name), is_it)
            key = (resident.model, device_label(resident))
            held[key] = held.get(key, 0) + resident.nbytes
        for labels, nbytes in held.items():
            weights.add_metric(labels, nbytes)
        yield from (state, weights, queued)


class _ExpertCollector:
    """The load of experts, read off the layers at scrape time."""

    def __init__(self, residents: Residents, each: bool) -> None:
        self._residents = residents
        self._each = each

    def collect(self) -> Iterator[Metric]:
        even = GaugeMetricFamily(
            "expertd_expert_balance_ratio",
            "Mean over most of the rows that a layer's experts were given; 1 is even.",
            labels=("model", "layer"),
        )
        rows = CounterMetricFamily(
            "expertd_expert_rows",
            "Rows that an expert was given since its layer was loaded.",
            labels=("model", "layer", "expert"),
        )
        for resident in self._residents.all():
            spec, names = resident.spec, (resident.model, str(resident.layer))
            if not spec.num_experts:
                continue
            held = range(spec.expert_begin, spec.expert_end)
            counts = resident.expert_rows.counts(spec)[held.start : held.stop]
            even.add_metric(names, balance(counts))
            for expert, given in zip(held, counts, strict=True) if self._each else ():
                rows.add_metric((*names, str(expert)), given)
        yield even
        if self._each:
            yield rows


class _CellCollector:
    def __init__(self, count: Callable[[], Iterable[tuple[str, int]]]) -> None:
        self._count = count

    def collect(self) -> Iterator[Metric]:
        cells = GaugeMetricFamily(
            "expertd_capability_cells", "Capability cells by state.", labels=("state",)
        )
        for state, count in self._count():
            cells.add_metric((state,), count)
        yield cells


def device_label(resident: Resident) -> str:
    index = resident.device.index
    return resident.device.kind if index is None else f"{resident.device.kind}:{index}"
