"""torch tensors on the wire; imported only for callers who pass one."""

from __future__ import annotations

import numpy as np
import torch

from expertd_wire.tensors import DTYPES, WireError, WireTensor


def to_wire(array: torch.Tensor) -> WireTensor:
    """A view of array's bytes on the host, copied only if it must be; raises WireError."""
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise WireError(f"dtype {dtype!r} cannot travel; use one of {', '.join(DTYPES)}")
    host = array.detach().cpu().contiguous()
    return WireTensor(dtype, tuple(array.shape), _bytes(host).data)


def from_wire(tensor: WireTensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor with tensor's dtype and values, on the device of like."""
    host = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="cpu")
    _bytes(host)[:] = np.frombuffer(tensor.data, np.uint8)
    return host.to(like.device)


def _bytes(host: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes of a contiguous tensor on the host, as an array that shares them."""
    return host.reshape(-1).view(torch.uint8).numpy()
