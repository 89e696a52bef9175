"""What the engine tells about itself; metrics listen here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class BatchTimes(NamedTuple):
    """Nanoseconds of each stage of one batch."""

    stage_in: int = 0
    route: int = 0
    kernel: int = 0
    stage_out: int = 0


class BatchReport(NamedTuple):
    """A batch that ran."""

    model: str
    layer: int
    requests: int
    tokens: int
    nonfinite_rows: int
    queued_ns: Sequence[int] = ()
    times: BatchTimes = BatchTimes()


class Observer(Protocol):
    """Called from the executor's thread; must be quick and must not raise."""

    def ran(self, report: BatchReport) -> None: ...
