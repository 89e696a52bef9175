"""Gauges and counters that are read where they are kept, at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from expertd.engine.expert_rows import balance
from expertd.engine.resident import LayerState, Resident, Residents


class Layers:
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
            key = (resident.model, _device(resident))
            held[key] = held.get(key, 0) + resident.nbytes
        for labels, nbytes in held.items():
            weights.add_metric(labels, nbytes)
        yield from (state, weights, queued)


class Experts:
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


class Cells:
    """How many capability cells are in each state."""

    def __init__(self, count: Callable[[], Iterable[tuple[str, int]]]) -> None:
        self._count = count

    def collect(self) -> Iterator[Metric]:
        cells = GaugeMetricFamily(
            "expertd_capability_cells", "Capability cells by state.", labels=("state",)
        )
        for state, count in self._count():
            cells.add_metric((state,), count)
        yield cells


def _device(resident: Resident) -> str:
    index = resident.device.index
    return resident.device.kind if index is None else f"{resident.device.kind}:{index}"
