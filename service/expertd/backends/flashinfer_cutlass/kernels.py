"""The one place that calls FlashInfer's CUTLASS fused MoE: by keyword only, one call at a time.

The row names what a call passes; arguments that not every version has go in where the installed
function's own signature has them.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from expertd.capability.row import Row

MODULES = ("flashinfer.fused_moe", "flashinfer.tllm_enums", "flashinfer")
"""Where FlashInfer keeps the function, its enums and its tuner; first found, first served."""

WORKSPACE_SIZE = "cutlass_fused_moe_workspace_size"

# The runner keeps state of the call that it prepares.
_one_call = threading.Lock()


class FlashInfer:
    """The functions and enums of the installed FlashInfer as attributes of one object."""

    def __init__(self) -> None:
        self._modules = [importlib.import_module(name) for name in MODULES]

    def __getattr__(self, name: str) -> Any:
        for module in self._modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"FlashInfer has no {name}")


@cache
def library() -> Any:
    """The object that has FlashInfer's functions and enums; tests put their own in its place."""
    return FlashInfer()


class Entry:
    """A row's function with what a layer passes in every call: fixed where the function takes it,
    and the activation's constants, which the row names apart."""

    def __init__(self, row: Row, fixed: Mapping[str, Any], constants: Mapping[str, Tensor]) -> None:
        assert row.call is not None
        self._function = getattr(library(), row.call.function)
        accepted = inspect.signature(self._function).parameters
        offered = (name for name in row.call.prefers if name in accepted)
        self._names = frozenset((*row.call.passes, *offered))
        self._fixed = {**self._named(fixed), **constants}

    @property
    def takes_workspace(self) -> bool:
        return "workspace_buffer" in self._names

    def __call__(self, values: Mapping[str, Any]) -> None:
        """Runs the kernel, which writes into the output that values hold."""
        with _one_call:
            self._function(**self._fixed, **self._named(values))

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in self._names}


def workspace_bytes(sizes: Mapping[str, Any]) -> int:
    """How many bytes a call of these sizes needs; sizes may hold more than is asked for."""
    function = getattr(library(), WORKSPACE_SIZE)
    accepted = inspect.signature(function).parameters
    return int(function(**{name: value for name, value in sizes.items() if name in accepted}))
