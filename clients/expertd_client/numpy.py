"""numpy arrays on the wire; bfloat16 and float8_e4m3fn are ml_dtypes' types."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from expertd_wire.tensors import WireTensor, from_numpy, to_numpy


def to_wire(array: NDArray[Any]) -> WireTensor:
    """A view of array's bytes, a copy if they are not row-major; raises WireError for its dtype."""
    return from_numpy(array)


def from_wire(tensor: WireTensor, like: NDArray[Any]) -> NDArray[Any]:
    """A writable array with tensor's dtype and values."""
    return to_numpy(tensor).copy()


def adopt(array: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
    """array itself."""
    return array
