"""What every entry point's check yields, and the pieces that those checks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tests.twins.checks import Arguments, require
from tests.twins.compute import Experts
from tests.twins.enums import RoutingMethodType, WeightLayout
from tests.twins.layout import canonical_columns, canonical_rows, prepared_order, unswizzled
from tests.twins.limits import Groups
from tests.twins.sizes import Sizes
from torch import Tensor

Matrix = Callable[[int], Tensor]


def nothing_more(method: RoutingMethodType, size: Sizes, group: Groups) -> None:
    """No routing checks beyond the method's own."""


@dataclass(frozen=True)
class Launch:
    """A checked call: its operands, and how the entry takes routing and answers."""

    size: Sizes
    experts: Experts
    pair: bool = True
    listed: bool = False
    weigh_input: bool = False
    ignore_weights: bool = False
    recheck: Callable[[RoutingMethodType, Sizes, Groups], None] = nothing_more


@dataclass(frozen=True)
class Orders:
    """Which canonical row stands at each prepared row of FC1 and of FC2."""

    fc1: Tensor
    fc2: Tensor


def orders(size: Sizes, *, epilogue: int | None = 128, interleaved: bool = True) -> Orders:
    """The orders for this epilogue tile, None for weights that are not shuffled."""
    paired = interleaved and size.gated
    return Orders(
        prepared_order(size.rows, interleaved=paired, epilogue=epilogue),
        prepared_order(size.out_rows, interleaved=False, epilogue=epilogue),
    )


def scalars(args: Arguments, size: Sizes, *names: str) -> list[Tensor]:
    """Required fp32 [El] tensors."""
    return [args.tensor(name, [torch.float32], [size.local]) for name in names]


def bias(args: Arguments, name: str, size: Sizes, order: Tensor) -> Tensor | None:
    """An optional fp32 [El, rows] bias, back in canonical order."""
    given = args.optional(name, [torch.float32], [size.local, order.numel()])
    return None if given is None else canonical_columns(given, order)


def swizzled_scales(scales: Tensor, order: Tensor) -> Matrix:
    """Row-shuffled, 128x4-swizzled scales [El, rows, C] by expert, canonical and linear."""
    return lambda expert: canonical_rows(unswizzled(scales[expert]), order)


def check_layout(args: Arguments, *, shuffled: bool, layouts: tuple[WeightLayout, ...]) -> None:
    """use_shuffled_weight (only True where shuffled) and weight_layout."""
    given = args.flag("use_shuffled_weight")
    require(given or not shuffled, "use_shuffled_weight", given, "True")
    layout = args.whole("weight_layout", 0, 2)
    names = " or ".join(member.name for member in layouts)
    require(layout in layouts, "weight_layout", WeightLayout(layout).name, names)
