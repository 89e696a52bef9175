"""The one place that calls FlashInfer: by keyword only, one call at a time.

Which arguments a call passes is data: the row names them (KernelCall, Use), and the installed
function's own signature decides about those that not every version has. drift.py binds the same
names to every recorded version.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from expertd.backends.flashinfer.library import alone, library
from expertd.capability.row import Row
from expertd.core import Activation


class Entry:
    """A row's function, with the names of the arguments that a layer passes to it."""

    def __init__(self, row: Row, activation: Activation, padded: bool = False) -> None:
        assert row.call is not None
        self._function = getattr(library(), row.call.function)
        accepted = inspect.signature(self._function).parameters
        self.names = argument_names(row, activation, padded, accepted)

    def __call__(self, values: Mapping[str, Any]) -> Tensor:
        """The output, wherever the entry put it; values may hold more than is passed."""
        with alone:
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
