"""Tensors: numpy's way in and out, and the refusals of shapes and dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray
from tests.wire.strategies import tensors

from expertd_wire.tensors import (
    DTYPES,
    MAX_ELEMENTS,
    WireError,
    WireTensor,
    checked_tensor,
    from_numpy,
    to_numpy,
)


@given(tensors())
def test_bytes_survive_numpy(tensor: WireTensor) -> None:
    array = to_numpy(tensor)
    assert array.shape == tensor.shape
    assert array.dtype.name == tensor.dtype
    assert from_numpy(array) == tensor


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(6, dtype=np.float32).reshape(3, 2).T,
        np.arange(24, dtype=np.int64).reshape(4, 6)[::2, ::-3],
        np.zeros((0, 7168), ml_dtypes.bfloat16),
        np.float32(3.5).reshape(()),
        np.broadcast_to(np.float16(2), (3, 2)),
    ],
    ids=["big-endian", "transposed", "strided", "empty", "scalar", "broadcast"],
)
def test_any_layout_travels_row_major_and_little_endian(array: NDArray[Any]) -> None:
    np.testing.assert_array_equal(to_numpy(from_numpy(array)), array)


def test_row_major_arrays_are_not_copied() -> None:
    array = np.zeros((2, 3), np.float32)
    tensor = from_numpy(array)
    array[1, 2] = 7
    assert to_numpy(tensor)[1, 2] == 7


def test_views_of_the_wire_cannot_be_written() -> None:
    array = to_numpy(from_numpy(np.zeros(3, np.float32)))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize("dtype", ["float64", "complex64", "uint16", "bool", "object"])
def test_other_dtypes_cannot_travel(dtype: str) -> None:
    with pytest.raises(WireError, match="cannot travel"):
        from_numpy(np.zeros(2, dtype))


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "text"),
    [
        ("float64", (1,), 8, "rows: dtype 'float64' is not one of float32"),
        ("float32", (2, 3), 23, "rows: 23 bytes given, but float32 [2, 3] takes 24"),
        ("float32", (-2, -3), 24, "rows: shape [-2, -3] has a negative size"),
        ("uint8", (1,) * 5, 1, "rows: rank 5 given, at most 4 accepted"),
        ("uint8", (MAX_ELEMENTS, 2), 0, "more than"),
        ("uint8", (2**62, 4), 0, "more than"),
        ("x" * 1000, (1,), 0, "xxx"),
    ],
)
def test_tensors_that_contradict_themselves_are_refused(
    dtype: str, shape: tuple[int, ...], size: int, text: str
) -> None:
    with pytest.raises(WireError) as refusal:
        checked_tensor("rows", dtype, shape, memoryview(bytes(size)))
    assert text in str(refusal.value)
    assert len(str(refusal.value)) < 200


def test_the_names_are_those_of_numpy_and_ml_dtypes() -> None:
    assert {name: dtype.name for name, dtype in DTYPES.items()} == {name: name for name in DTYPES}
