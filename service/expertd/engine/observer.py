"""What the engine tells about itself; metrics listen here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class BatchTimes:
    """Nanoseconds of each stage of one batch."""

    stage_in: int = 0
    route: int = 0
    kernel: int = 0
    stage_out: int = 0


@dataclass(frozen=True, slots=True)
class BatchReport:
    """A batch that ran."""

    model: str
    layer: int
    requests: int
    tokens: int
    nonfinite_rows: int
    queued_ns: list[int] = field(default_factory=list)
    times: BatchTimes = field(default_factory=BatchTimes)


class Observer(Protocol):
    """Called from the executor's thread; must be quick and must not raise."""

    def ran(self, report: BatchReport) -> None: ...
