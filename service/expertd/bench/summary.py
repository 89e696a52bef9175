"""From samples to figures: percentiles, rates, the mean batch, and where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from expertd.bench.load import Cell
from expertd.bench.workers import Outcome, Sample

PERCENTILES = (50, 90, 99)
BUSY = "OVERLOADED"
"""The reason of a refusal that is an answer: a server under load sheds calls."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One cell's figures; times in milliseconds, split being means over the answered calls.

    split: queue, stages and kernel as the server tells them; rpc is what is left of the latency.
    mean_batch counts this bench's own calls of a launch: calls of one launch share its times.
    """

    tokens: int
    concurrency: int
    rate: float
    calls: int
    calls_per_s: float
    tokens_per_s: float
    gb_per_s: float
    latency_ms: dict[str, float]
    split_ms: dict[str, float]
    mean_batch: float
    refused: dict[str, int]
    refused_p50_ms: float

    @property
    def failed(self) -> dict[str, int]:
        """Calls by reason that a server which is well would have answered, or refused as busy."""
        return {reason: count for reason, count in self.refused.items() if reason != BUSY}

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(cell: Cell, nbytes: int, outcomes: Sequence[Outcome]) -> Summary:
    """The figures of one cell whose calls carry nbytes each."""
    samples = [sample for outcome in outcomes for sample in outcome.samples]
    answered = [sample for sample in samples if not sample.reason]
    refused = [sample for sample in samples if sample.reason]
    seconds = max((outcome.seconds for outcome in outcomes), default=0.0)
    rate = len(answered) / seconds if seconds else 0.0
    return Summary(
        cell.tokens,
        cell.concurrency,
        cell.rate,
        len(answered),
        rate,
        rate * cell.tokens,
        rate * nbytes / 1e9,
        _percentiles(answered),
        _split(answered),
        _mean_batch(answered),
        dict(Counter(sample.reason for sample in refused)),
        _percentiles(refused)["p50"],
    )


def _percentiles(samples: Sequence[Sample]) -> dict[str, float]:
    """Milliseconds; 0 where there are no samples."""
    latency = np.array([sample.latency for sample in samples] or [0]) / 1e6
    values = np.percentile(latency, PERCENTILES)
    named = {f"p{p}": float(v) for p, v in zip(PERCENTILES, values, strict=True)}
    return named | {"max": float(latency.max())}


def _split(samples: Sequence[Sample]) -> dict[str, float]:
    columns = np.array([sample[:4] for sample in samples] or [(0, 0, 0, 0)], dtype=np.float64)
    total, queue, stages, kernel = (columns.mean(axis=0) / 1e6).tolist()
    rest = max(0.0, total - queue - stages - kernel)
    return {"queue": queue, "stages": stages, "kernel": kernel, "rpc": rest}


def _mean_batch(samples: Sequence[Sample]) -> float:
    launches = {(sample.staged, sample.computed) for sample in samples}
    return len(samples) / len(launches) if launches else 0.0
