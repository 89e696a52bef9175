"""From the carriers' bytes to tensors on the device, through buffers that are used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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


class StagingBuffer:
    """One growing host buffer, pinned if the device is a card.

    Every operation of torch costs a small call microseconds when its code is cold: hence the views
    that are kept, and no copy to where the data already is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._here = device.type == "cpu"
        self._allocate(1 << 16)

    def stack(self, tensors: Sequence[WireTensor]) -> Tensor:
        """Tensors [T, N] of one dtype and N, one below the other on the device.

        The result is valid until the next stack(): it may be a view of the buffer.
        """
        total = sum(tensor.nbytes for tensor in tensors)
        if total > len(self._memory):
            self._allocate(1 << (total - 1).bit_length())
        begin = 0
        for tensor in tensors:
            self._memory[begin : begin + tensor.nbytes] = tensor.data
            begin += tensor.nbytes
        rows, columns = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
        host = self._view(tensors[0].dtype, rows, columns)
        return host if self._here else host.to(self._device, non_blocking=True)

    def _view(self, dtype: str, rows: int, columns: int) -> Tensor:
        """The buffer's beginning as [rows, columns]; the last view of each dtype is kept."""
        view = self._views[dtype]
        if view.shape != (rows, columns):
            view = self._views[dtype] = view.as_strided((rows, columns), (columns, 1))
        return view

    def _allocate(self, size: int) -> None:
        pinned = self._device.type == "cuda"
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._memory = buffer.numpy().data
        self._views = {name: buffer.view(dtype) for name, dtype in TORCH_DTYPES.items()}


class Staging:
    """The buffers of one executor, one for each field of a call."""

    FIELDS: dict[str, Callable[[Ticket], WireTensor | None]] = {
        "rows": lambda ticket: ticket.call.hidden_states,
        "scales": lambda ticket: ticket.call.hidden_states_scale,
        "logits": lambda ticket: ticket.call.router_logits,
        "ids": lambda ticket: ticket.call.topk_ids,
        "weights": lambda ticket: ticket.call.topk_weights,
    }

    def __init__(self, device: torch.device) -> None:
        self._buffers = {name: StagingBuffer(device) for name in self.FIELDS}

    def stage(self, name: str, tickets: Sequence[Ticket]) -> Tensor | None:
        """One field of all tickets as one tensor; None if calls of their form have none."""
        found = [self.FIELDS[name](ticket) for ticket in tickets]
        present = [tensor for tensor in found if tensor is not None]
        if not present:
            return None
        assert len(present) == len(tickets), "calls of one form have the same fields"
        return self._buffers[name].stack(present)


def host_bytes(out_TH: Tensor) -> memoryview:
    """The bytes of a contiguous result in host memory."""
    host = out_TH if out_TH.device.type == "cpu" else out_TH.cpu()
    return host.view(torch.uint8).numpy().data.cast("B")
