"""What a check is asked, and how it says no."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from expertd.capability.device import DeviceInfo
from expertd.capability.library import Library
from expertd.capability.row import Row
from expertd.core import CallForm, LayerSpec


class Ask(NamedTuple):
    """A layer, a call's form, a device and its FlashInfer, and what the operator wants of kernels.

    exact: none may route by itself; repeatable: the same call gives the same bits each time.
    """

    spec: LayerSpec
    form: CallForm
    device: DeviceInfo
    library: Library | None = None
    exact: bool = False
    repeatable: bool = False

    @property
    def identity(self) -> bool:
        """Whether the layer has no experts at all and copies its rows."""
        return self.spec.num_experts == 0

    @property
    def top_k(self) -> int:
        """K of this call: its own, or the router's."""
        return self.form.top_k or (self.spec.routing.top_k if self.spec.routing else 0)


class Fault(NamedTuple):
    """One reason against a row: the field, what was given, what is accepted, and why."""

    code: str
    field: str
    given: str
    accepted: str
    why: str


Check = Callable[[Row, Ask], Iterator[Fault]]


def listed(values: Iterable[str]) -> str:
    return ", ".join(values) or "none"


def at_most(bound: int) -> str:
    return f"<= {bound}"


def multiple_of(step: int) -> str:
    return f"a multiple of {step}"
