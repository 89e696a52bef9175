"""The ways of a batch onto a card and back: pinned memory, a stream each way, events.

The card computes on the executor's own stream. A copy in waits for nothing, computing waits for its
copy in, a copy out for its computing; so both copies run beside the computing of other batches, and
nothing here makes the host wait but wait_computed() and wait_out(). To a small batch streams of its
own would cost more than they gain: it is copied on the one that computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertd.engine.capture import capturing
from expertd.engine.checks import checks_on, nonfinite_rows
from expertd.engine.observer import BatchTimes
from expertd.engine.pinned import PinnedPool
from expertd.engine.staging import Fields, Mark, Staging, StagingBuffer

BATCHES = 2
"""One computes while another is copied."""
SMALL = 1 << 20
"""Bytes of a small batch: some twenty microseconds each way."""


class PinnedBuffer(StagingBuffer):
    """A pinned buffer on the host and its twin on the card."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        super().__init__()

    def _allocate(self, size: int) -> None:
        # Both, or neither: where there is no memory, the smaller pair goes on.
        twin = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._keep(torch.empty(size, dtype=torch.uint8, pin_memory=True), twin)

    def _send(self, size: int) -> None:
        self._whole[:size].copy_(self._host[:size], non_blocking=True)


class CudaStaging(Staging):
    """The buffers and events of one batch at a time; streams and results' memory are shared."""

    def __init__(
        self,
        device: torch.device,
        inward: torch.cuda.Stream,
        outward: torch.cuda.Stream,
        results: PinnedPool,
    ) -> None:
        super().__init__(PinnedBuffer(device), checks_on("cuda"))
        self._device = device
        self._inward, self._outward, self._results = inward, outward, results
        self._events = [_event() for _ in Mark]
        self._small = False

    def work_here(self) -> None:
        torch.cuda.set_device(self._device)

    def stage(self, fields: Fields) -> dict[str, Tensor]:
        self._compute = torch.cuda.current_stream(self._device)
        size = sum(len(tensor.data) for tensors in fields.values() for tensor in tensors)
        self._small = size <= SMALL
        way = self._compute if self._small else self._inward
        self._events[Mark.BEGIN].record(way)
        with torch.cuda.stream(None if self._small else way):
            stacked = self._buffer.stack(fields)
        self._events[Mark.STAGED].record(way)
        if not self._small:
            self._compute.wait_event(self._events[Mark.STAGED])
            self.mark(Mark.READY)
        return stacked

    def mark(self, mark: Mark) -> None:
        self._events[mark].record(self._compute)

    def output(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        self._columns, self._dtype = columns, dtype
        return torch.empty(rows, columns, dtype=dtype, device=self._device)

    def check(self, out_TH: Tensor) -> None:
        if not self._small:
            super().check(out_TH)

    def nonfinite(self) -> int:
        if not self._small:
            return super().nonfinite()
        # The host has looked through so little before a kernel that does has been launched.
        brought = torch.frombuffer(self._result, dtype=self._dtype)
        return nonfinite_rows(brought.view(-1, self._columns))

    def bring_out(self, out_TH: Tensor) -> None:
        """The batch must be kept until wait_out()."""
        way = self._compute if self._small else self._outward
        if not self._small:
            way.wait_event(self._events[Mark.COMPUTED])
        brought, self._result = self._results.take(out_TH.nbytes)
        with torch.cuda.stream(None if self._small else way):
            brought.copy_(out_TH.view(torch.uint8).view(-1), non_blocking=True)
        self._events[Mark.OUT].record(way)

    def wait_computed(self) -> None:
        self._events[Mark.COMPUTED].synchronize()

    def wait_out(self) -> None:
        self._events[Mark.OUT].synchronize()

    def recover(self) -> None:
        with capturing:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def times(self) -> BatchTimes:
        ready = Mark.STAGED if self._small else Mark.READY
        return BatchTimes(
            self._between(Mark.BEGIN, Mark.STAGED),
            self._between(ready, Mark.ROUTED),
            self._between(Mark.ROUTED, Mark.COMPUTED),
            self._between(Mark.COMPUTED, Mark.OUT),
        )

    def _between(self, begin: Mark, end: Mark) -> int:
        return int(self._events[begin].elapsed_time(self._events[end]) * 1e6)


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


def stagings(device: torch.device) -> list[Staging]:
    """As many as batches may be under way on the device at once."""
    if device.type == "cpu":
        return [Staging()]
    inward, outward = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
    results = PinnedPool()
    return [CudaStaging(device, inward, outward, results) for _ in range(BATCHES)]
