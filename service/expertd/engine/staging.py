"""A batch's way onto the device and back, through buffers that are used again.

Each operation of torch gives Python's lock away, and many callers then stand in line for it before
the executor: hence as few of them as a batch can do with.

On the processor both ways are short and everything is done when it returns; staging_cuda has the
ways of a card, which other batches' computing overlaps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from expertd.engine.observer import BatchTimes
from expertd.engine.ticket import Ticket
from expertd_wire.tensors import WireTensor

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
MOST_VIEWS = 64
"""Sizes of batches whose views are kept."""
LONG_COPY = 1 << 18
"""Bytes from which on a copy lets other threads run: giving the lock away and back costs too."""


class Mark(IntEnum):
    """The moments of a batch."""

    BEGIN = 0
    STAGED = 1
    READY = 2
    ROUTED = 3
    COMPUTED = 4
    OUT = 5


class StagingBuffer:
    """One growing buffer of bytes for one field of the calls, and views of it."""

    def __init__(self) -> None:
        self._allocate(1 << 16)

    def stack(self, tensors: Sequence[WireTensor]) -> Tensor:
        """Tensors [T, N] of one dtype and N, one below the other on the device.

        The result is valid until the next stack(): it is a view of the buffer.
        """
        total = sum(tensor.nbytes for tensor in tensors)
        if total > len(self._memory):
            self._allocate(1 << (total - 1).bit_length())
        begin = 0
        for tensor in tensors:
            copy_bytes(self._memory[begin : begin + tensor.nbytes], tensor.data)
            begin += tensor.nbytes
        rows, columns = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
        return self._view(tensors[0].dtype, rows, columns)

    def _view(self, dtype: str, rows: int, columns: int) -> Tensor:
        """The buffer's beginning as [rows, columns]."""
        shape = (dtype, rows, columns)
        view = self._views.get(shape)
        if view is None:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            whole = self._whole.view(TORCH_DTYPES[dtype])
            view = self._views[shape] = whole.as_strided((rows, columns), (columns, 1))
        return view

    def _allocate(self, size: int) -> None:
        self._keep(torch.empty(size, dtype=torch.uint8))

    def _keep(self, host: Tensor) -> None:
        self._whole = host
        self._memory = host.numpy().data
        self._views: dict[tuple[str, int, int], Tensor] = {}


class Staging:
    """The buffers and the clock of one batch at a time, one buffer for each field of a call."""

    FIELDS: dict[str, Callable[[Ticket], WireTensor | None]] = {
        "rows": lambda ticket: ticket.call.hidden_states,
        "scales": lambda ticket: ticket.call.hidden_states_scale,
        "logits": lambda ticket: ticket.call.router_logits,
        "ids": lambda ticket: ticket.call.topk_ids,
        "weights": lambda ticket: ticket.call.topk_weights,
    }

    def __init__(self, buffer: Callable[[], StagingBuffer] = StagingBuffer) -> None:
        self._buffers = {name: buffer() for name in self.FIELDS}
        self._moments = [0] * len(Mark)

    def stage(self, name: str, tickets: Sequence[Ticket]) -> Tensor | None:
        """One field of all tickets as one tensor; None if calls of their form have none."""
        found = [self.FIELDS[name](ticket) for ticket in tickets]
        present = [tensor for tensor in found if tensor is not None]
        if not present:
            return None
        assert len(present) == len(tickets), "calls of one form have the same fields"
        return self._buffers[name].stack(present)

    def mark(self, mark: Mark) -> None:
        """Notes when the batch gets here."""
        self._moments[mark] = time.monotonic_ns()

    def staged(self) -> None:
        """Every field is staged: what follows may read them."""
        self.mark(Mark.STAGED)
        self._moments[Mark.READY] = self._moments[Mark.STAGED]

    def output(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory for the batch's result [T, H] on the device, of one owner."""
        rows, columns = shape
        array = np.empty((rows, columns * dtype.itemsize), np.uint8)
        self._result = array.data.cast("B")
        return torch.from_numpy(array).view(dtype)

    def host_bytes(self, out_TH: Tensor) -> memoryview:
        """The bytes of the batch's result, brought out."""
        return self._result

    def count_nonfinite(self, out_TH: Tensor) -> int | Tensor:
        """How many rows hold NaN or infinity, known when the batch is out."""
        return nonfinite_rows(out_TH)

    def bring_out(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tensors in host memory, readable after wait_out()."""
        return list(tensors)

    def wait_computed(self) -> None:
        """Returns when the device is free for another batch."""

    def wait_out(self) -> None:
        """Returns when what was brought out can be read."""

    def recover(self) -> None:
        """After a failed launch: waits for whatever of it still runs, gives spare memory back."""

    def times(self) -> BatchTimes:
        """How long each stage took."""
        begin, staged, ready, routed, computed, out = self._moments
        return BatchTimes(staged - begin, routed - ready, computed - routed, out - computed)


def copy_bytes(out: memoryview, data: memoryview) -> None:
    """Copies data to out, of the same length; other threads run while it copies much."""
    if len(data) < LONG_COPY:
        out[:] = data
    else:
        np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(data, np.uint8))


def nonfinite_rows(out_TH: Tensor) -> int:
    """How many rows hold NaN or infinity.

    A sum is finite only if all it adds is, and costs a tenth of asking each number; one that
    overflows is looked at closely.
    """
    if math.isfinite(out_TH.sum()):
        return 0
    suspects = out_TH[~torch.isfinite(out_TH.sum(dim=1))]
    return int((~torch.isfinite(suspects)).any(dim=1).sum())
