"""Tensors on the wire: the dtype table and a checked view of somebody's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "uint8": np.dtype("u1"),
}
"""Every dtype that may travel, by its name in numpy or ml_dtypes."""

MAX_RANK = 4
MAX_ELEMENTS = 1 << 40


class WireError(ValueError):
    """Bytes from outside that are not what the contract says; the text is fit for the caller."""


class WireTensor(NamedTuple):
    """A row-major, little-endian tensor that views bytes it does not own."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.data)


def checked_tensor(name: str, dtype: str, shape: Sequence[int], data: memoryview) -> WireTensor:
    """A tensor whose dtype, shape and length agree; raises WireError naming the field otherwise."""
    known = DTYPES.get(dtype)
    if known is None:
        raise WireError(f"{name}: dtype {dtype!r:.60} is not one of {', '.join(DTYPES)}")
    expected = element_count(name, shape) * known.itemsize
    if expected != len(data):
        raise WireError(
            f"{name}: {len(data)} bytes given, but {dtype} {list(shape)} takes {expected}"
        )
    return WireTensor(dtype, tuple(shape), data)


def element_count(name: str, shape: Sequence[int]) -> int:
    """The product of shape; raises WireError for a rank, a size or a product beyond the limits."""
    if len(shape) > MAX_RANK:
        raise WireError(f"{name}: rank {len(shape)} given, at most {MAX_RANK} accepted")
    count = 1
    for size in shape:
        if size < 0:
            raise WireError(f"{name}: shape {list(shape)} has a negative size")
        count *= size
    if count > MAX_ELEMENTS:
        raise WireError(f"{name}: shape {list(shape)} has more than {MAX_ELEMENTS} elements")
    return count


def from_numpy(array: NDArray[Any]) -> WireTensor:
    """A view of array's bytes, a copy if they are not row-major; raises WireError for its dtype."""
    name = array.dtype.name
    if name not in DTYPES:
        raise WireError(f"dtype {name!r} cannot travel; use one of {', '.join(DTYPES)}")
    flat = np.ascontiguousarray(array, dtype=DTYPES[name]).reshape(-1)
    return WireTensor(name, array.shape, flat.view(np.uint8).data)


def to_numpy(tensor: WireTensor) -> NDArray[Any]:
    """A read-only array that views tensor's bytes."""
    array = np.frombuffer(tensor.data, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)
    array.flags.writeable = False
    return array
