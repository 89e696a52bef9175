"""The one place that calls FlashInfer: by keyword only, one call at a time.

Which arguments a call passes is data: the row names them (KernelCall, Use), and the installed
function's own signature decides about those that not every version has. drift.py binds the same
names to every recorded version.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from torch import Tensor

from expertd.capability.row import Row
from expertd.core import Activation

MODULES = ("flashinfer.fused_moe", "flashinfer.tllm_enums", "flashinfer")
"""Where FlashInfer keeps its entry points, its enums, and the rest; first found, first served."""

_stand_in: Any = None
# The launchers keep their runners and caches to one thread and stream at a time.
_one_call = threading.Lock()


class FlashInfer:
    """The entry points and enums of the installed FlashInfer as attributes of one object."""

    def __init__(self) -> None:
        self._modules = [importlib.import_module(name) for name in MODULES]

    def __getattr__(self, name: str) -> Any:
        for module in self._modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"FlashInfer has no {name}")


def library() -> Any:
    """The object that has the entry points and enums: FlashInfer, or what stands in for it."""
    return _stand_in if _stand_in is not None else _flashinfer()


def stand_in(other: Any | None) -> None:
    """Puts an object with FlashInfer's names in its place (simulation, tests); None ends that."""
    global _stand_in
    _stand_in = other


def simulated() -> bool:
    """Whether something stands in for FlashInfer: then there is nothing to download or to tune."""
    return _stand_in is not None


@cache
def _flashinfer() -> FlashInfer:
    return FlashInfer()


class Entry:
    """A row's entry point, with the names of the arguments that this layer passes to it."""

    def __init__(self, row: Row, activation: Activation, padded: bool) -> None:
        assert row.call is not None
        self._function = getattr(library(), row.call.function)
        accepted = inspect.signature(self._function).parameters
        self.names = argument_names(row, activation, padded, accepted)

    def __call__(self, values: Mapping[str, Any]) -> Tensor:
        """The output, wherever the entry put it; values may hold more than is passed."""
        with _one_call:
            result = self._function(**{name: values[name] for name in self.names})
        # Some entries return a tensor, some a list of one, and a coming version only lists.
        output: Tensor = result[0] if isinstance(result, (list, tuple)) else result
        return output


def argument_names(
    row: Row, activation: Activation, padded: bool, accepted: Collection[str]
) -> tuple[str, ...]:
    """What a call of this row passes to a function that accepts these arguments."""
    call, use = row.call, row.activations[activation.kind]
    assert call is not None
    clamp = (use.limit or ()) if activation.limit is not None else ()
    wishes = (*call.prefers, *(call.padding if padded else ()))
    offered = (name for name in wishes if name in accepted)
    return tuple(dict.fromkeys((*call.passes, *use.passes, *clamp, *offered)))
