"""A batch's way onto the device and back, through buffers that are used again.

Each operation of torch gives Python's lock away, and many callers then stand in line for it before
the executor: hence as few of them as a batch can do with.

On the processor both ways are short and everything is done when it returns; staging_cuda has the
ways of a card, which other batches' computing overlaps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from expertd.engine.checks import RowChecks, checks_on
from expertd.engine.observer import BatchTimes
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
MOST_VIEWS = 256
"""Places and sizes of fields whose views are kept."""
ALIGNED = 256
"""Bytes at whose multiples each field begins."""
LONG_COPY = 1 << 18
"""Bytes from which on a copy lets other threads run: giving the lock away and back costs too."""

NOTHING = memoryview(b"")

Fields = Mapping[str, Sequence[WireTensor]]


class Mark(IntEnum):
    """The moments of a batch."""

    BEGIN = 0
    STAGED = 1
    READY = 2
    ROUTED = 3
    COMPUTED = 4
    OUT = 5


class StagingBuffer:
    """One growing buffer of bytes for all fields of a batch, one behind the other, and its views.

    On the processor the buffer on the host is the device's too.
    """

    def __init__(self) -> None:
        self._allocate(1 << 16)

    def stack(self, fields: Fields) -> dict[str, Tensor]:
        """Each field's tensors [T, N] of one dtype and N, one below the other on the device.

        The results are valid until the next stack(): they are views of the buffer.
        """
        sizes = [sum(len(tensor.data) for tensor in tensors) for tensors in fields.values()]
        total = sum(map(_aligned, sizes))
        if total > len(self._memory):
            self._allocate(1 << (total - 1).bit_length())
        stacked, begin = {}, 0
        for (name, tensors), size in zip(fields.items(), sizes, strict=True):
            self._copy_in(begin, tensors)
            stacked[name] = self._view(begin, tensors)
            begin += _aligned(size)
        self._send(total)
        return stacked

    def _copy_in(self, begin: int, tensors: Sequence[WireTensor]) -> None:
        for tensor in tensors:
            end = begin + len(tensor.data)
            copy_bytes(self._memory[begin:end], tensor.data)
            begin = end

    def _view(self, begin: int, tensors: Sequence[WireTensor]) -> Tensor:
        """What lies on the device from begin on, as one tensor."""
        first = tensors[0]
        rows = first.shape[0] if len(tensors) == 1 else sum(tensor.shape[0] for tensor in tensors)
        return self._kept_view(first.dtype, rows, first.shape[1], begin)

    def _kept_view(self, dtype: str, rows: int, columns: int, begin: int) -> Tensor:
        key = (dtype, rows, columns, begin)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            whole = self._whole.view(TORCH_DTYPES[dtype])
            place = begin // whole.element_size()
            view = self._views[key] = whole.as_strided((rows, columns), (columns, 1), place)
        return view

    def _send(self, size: int) -> None:
        """Begins to copy the buffer's first bytes to the device."""

    def _allocate(self, size: int) -> None:
        host = torch.empty(size, dtype=torch.uint8)
        self._keep(host, host)

    def _keep(self, host: Tensor, on_device: Tensor) -> None:
        self._memory = host.numpy().data
        self._host, self._whole = host, on_device
        self._views: dict[tuple[str, int, int, int], Tensor] = {}


class Staging:
    """The buffer, the checks and the clock of one batch at a time."""

    def __init__(
        self, buffer: StagingBuffer | None = None, checks: RowChecks | None = None
    ) -> None:
        self._buffer = buffer or StagingBuffer()
        self._moments = [0] * len(Mark)
        self._result = NOTHING
        self.checks = checks or checks_on("cpu")

    def work_here(self) -> None:
        """Makes the device the calling thread's own: Triton and FlashInfer launch on no other."""

    def stage(self, fields: Fields) -> dict[str, Tensor]:
        """The fields of all calls on the device, where what follows may read them."""
        self.mark(Mark.BEGIN)
        stacked = self._buffer.stack(fields)
        self.mark(Mark.STAGED)
        self._moments[Mark.READY] = self._moments[Mark.STAGED]
        return stacked

    def mark(self, mark: Mark) -> None:
        """Notes when the batch gets here."""
        self._moments[mark] = time.monotonic_ns()

    def output(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory for the batch's result [T, H] on the device, of one owner."""
        memory = np.empty(rows * columns * dtype.itemsize, np.uint8)
        self._result = memory.data
        return torch.frombuffer(memory, dtype=dtype).view(rows, columns)

    def check(self, out_TH: Tensor) -> None:
        """Looks for rows of the result that are not finite, or leaves that to nonfinite()."""
        self.checks.output(out_TH)

    def nonfinite(self) -> int:
        """How many rows of the result are not finite, after wait_out() and before result()."""
        return self.checks.nonfinite()

    def bring_out(self, out_TH: Tensor) -> None:
        """Begins to bring out what output() gave, and ends the batch's work."""
        self.mark(Mark.OUT)

    def result(self) -> memoryview:
        """The bytes of the batch's result, after wait_out(); they are the asker's from here on."""
        found, self._result = self._result, NOTHING
        return found

    def wait_computed(self) -> None:
        """Returns when the device is free for another batch."""

    def wait_out(self) -> None:
        """Returns when the result and what the checks found can be read."""

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


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
