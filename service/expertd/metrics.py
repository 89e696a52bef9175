"""Prometheus metrics: the engine's observer and the carriers' counters, in one registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from expertd.engine.observer import BatchReport
from expertd.engine.resident import LayerState, Resident, Residents

SECONDS = (
    *(0.00001, 0.00003, 0.00005, 0.0001, 0.0003, 0.0006, 0.001, 0.002, 0.003, 0.006, 0.01, 0.03),
    *(0.06, 0.1, 0.3, 0.6, 1.0, 3.0, 10.0, 30.0, 100.0),
)
TOKENS = tuple(float(1 << power) for power in range(17))
REQUESTS = tuple(float(1 << power) for power in range(9))

NO_PLAN = ("none", "none")


class Metrics:
    """Everything that /metrics shows; methods are called from any thread."""

    def __init__(self, residents: Residents, info: dict[str, str]) -> None:
        # A *_created series for each series says nothing here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._residents = residents
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        seconds = partial(histogram, buckets=SECONDS)
        self._requests = counter(
            "expertd_requests",
            "Calls answered, by gRPC status name.",
            ("model", "carrier", "backend", "mode", "code"),
        )
        self._duration = seconds(
            "expertd_request_duration_seconds",
            "From a call's arrival to its encoded reply.",
            ("model", "carrier"),
        )
        self._queue = seconds("expertd_queue_duration_seconds", "Time in the queue.")
        self._stage = seconds(
            "expertd_stage_duration_seconds",
            "Time of one stage: decode and encode by call, the others by batch.",
            ("stage",),
        )
        self._batch_tokens = histogram("expertd_batch_tokens", "Rows of a batch.", buckets=TOKENS)
        self._batch_requests = histogram(
            "expertd_batch_requests", "Calls of a batch.", buckets=REQUESTS
        )
        self._tokens = counter("expertd_tokens", "Rows computed.", ("model",))
        self._inflight = gauge("expertd_inflight_requests", "Calls being answered.")
        self._rejected = counter("expertd_rejected", "Calls refused or dropped.", ("reason",))
        self._nonfinite = counter(
            "expertd_nonfinite_outputs", "Rows answered with NaN or infinity.", ("model",)
        )
        self._draining = gauge("expertd_draining", "1 while draining.")
        Info("expertd_build", "Versions of this process.", registry=self.registry).info(info)
        self.registry.register(_LayerCollector(residents))
        self._child = cache(lambda family, *labels: family.labels(*labels))

    def rejected(self, reason: str) -> None:
        self._child(self._rejected, reason).inc()

    def ran(self, report: BatchReport) -> None:
        times = report.times
        for stage in ("stage_in", "route", "kernel", "stage_out"):
            self.stage(stage, getattr(times, stage))
        for waited in report.queued_ns:
            self._queue.observe(waited / 1e9)
        self._batch_tokens.observe(report.tokens)
        self._batch_requests.observe(report.requests)
        self._child(self._tokens, report.model).inc(report.tokens)
        if report.nonfinite_rows:
            self._child(self._nonfinite, report.model).inc(report.nonfinite_rows)

    def stage(self, stage: str, nanoseconds: int) -> None:
        self._child(self._stage, stage).observe(nanoseconds / 1e9)

    def started(self) -> None:
        self._inflight.inc()

    def finished(
        self, model: str, carrier: str, plan: tuple[str, str], code: str, nanoseconds: int
    ) -> None:
        """Counts an answered call; names that are not served become "unknown"."""
        self._inflight.dec()
        known = model if self._residents.knows(model) else "unknown"
        self._child(self._requests, known, carrier, *plan, code).inc()
        self._child(self._duration, known, carrier).observe(nanoseconds / 1e9)

    def drain(self) -> None:
        self._draining.set(1)

    def cells(self, count: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """Shows how many capability cells are in each state."""
        self.registry.register(_CellCollector(count))

    def render(self) -> bytes:
        """The text exposition; not for an event loop's thread."""
        return generate_latest(self.registry)


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
