"""What the launcher and its documents demand of every argument, and the error that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: TMA and 128-bit stores take only bases on this boundary."""
ALIGNED = frozenset(
    {
        "hidden_states",
        "gemm1_weights",
        "gemm1_weights_scale",
        "gemm2_weights",
        "gemm2_weights_scale",
        "output",
    }
)


class ContractError(RuntimeError):
    """A call that the launcher refuses, or whose result its kernels leave undefined."""

    def __init__(self, argument: str, given: object, expected: str) -> None:
        super().__init__(f"{argument}: given {given}; expected {expected}")
        self.argument = argument
        self.given = given
        self.expected = expected


def require(condition: bool, argument: str, given: object, expected: str) -> None:
    """Raises ContractError unless the condition holds."""
    if not condition:
        raise ContractError(argument, given, expected)


@dataclass(frozen=True)
class Arguments:
    """The bound arguments of one call; those an entry does not have read as None."""

    entry: str
    values: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.values.get(name)

    @property
    def routed(self) -> bool:
        return "topk_ids" in self.values

    def tensor(self, name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> Tensor:
        """A required tensor of one of these dtypes and exactly this shape."""
        value = self._given(name, shape)
        self.check(name, value, dtypes, shape)
        return value

    def optional(
        self, name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int]
    ) -> Tensor | None:
        """A tensor as above, or None."""
        return None if self.values.get(name) is None else self.tensor(name, dtypes, shape)

    def flat(self, name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> Tensor:
        """A required tensor of this many elements in any shape that starts with the first size."""
        value = self._given(name, shape)
        numel = torch.Size(shape).numel()
        require(value.numel() == numel, name, list(value.shape), f"{numel} elements {list(shape)}")
        leads = value.ndim == 1 or value.shape[0] == shape[0]
        require(leads, name, list(value.shape), f"{list(shape)} or flat")
        self.check(name, value, dtypes, value.shape)
        return value.reshape(shape)

    def _given(self, name: str, shape: Sequence[int]) -> Tensor:
        value = self.values.get(name)
        if not isinstance(value, Tensor):
            raise ContractError(name, value, f"a tensor {list(shape)}")
        return value

    def check(
        self, name: str, value: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int]
    ) -> None:
        """dtype, shape, contiguity, device and alignment of one tensor."""
        accepted = " or ".join(str(dtype) for dtype in dtypes)
        require(value.dtype in dtypes, name, value.dtype, accepted)
        require(list(value.shape) == list(shape), name, list(value.shape), f"shape {list(shape)}")
        require(value.is_contiguous(), name, f"strides {value.stride()}", "a contiguous tensor")
        device = self.values["hidden_states"].device
        require(value.device == device, name, value.device, f"{device}, as hidden_states")
        offset = value.data_ptr() % ALIGNMENT if name in ALIGNED else 0
        require(offset == 0, name, f"a base {offset} bytes off", f"{ALIGNMENT}-byte alignment")

    def whole(self, name: str, low: int, high: int) -> int:
        """An int between the bounds, both inclusive; a bool or a tensor is not one."""
        value = self.values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise ContractError(name, value, f"an int in [{low}, {high}]")

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        require(isinstance(value, bool), name, value, "a bool")
        return bool(value)

    def absent(self, name: str, why: str) -> None:
        """An argument that this twin does not emulate, or that the contract forbids here."""
        value = self.values.get(name)
        given = list(value.shape) if isinstance(value, Tensor) else value
        require(value is None or (value == 0) is True, name, given, f"None: {why}")
