"""Which kind of array a caller uses: numpy's or torch's, and how each travels."""

from __future__ import annotations

import importlib
import sys
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from expertd_client.errors import InvalidArgument
from expertd_wire.tensors import WireTensor


class ArrayKind(Protocol):
    """Conversions of one kind of array; the modules numpy.py and torch.py are such."""

    def to_wire(self, array: Any) -> WireTensor:
        """A view of array's bytes where possible; raises WireError for its dtype."""

    def from_wire(self, tensor: WireTensor, like: Any) -> Any:
        """A writable array of its own memory, on the device of like."""

    def adopt(self, array: NDArray[Any], like: Any) -> Any:
        """The same in the memory of array, which is writable and nobody else's, if it can be."""


def kind_of(name: str, value: object) -> ArrayKind:
    """The conversions for value; torch is looked at only if the caller has imported it."""
    torch = sys.modules.get("torch")
    if isinstance(value, getattr(torch, "Tensor", ())):
        return _module("torch")
    if isinstance(value, np.ndarray):
        return _module("numpy")
    given = f"{type(value).__module__}.{type(value).__qualname__}"
    raise InvalidArgument(f"{name}: {given} given; numpy arrays and torch tensors are accepted")


def _module(name: str) -> ArrayKind:
    return cast(ArrayKind, importlib.import_module(f"expertd_client.{name}"))
