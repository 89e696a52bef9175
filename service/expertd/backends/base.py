"""What every backend is: check → prepare_weights → warm_up → forward, in this order only.

A backend object runs one capability row for one layer on one device. The public verbs live here
and keep the order; subclasses fill in the underscored ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from expertd.backends.footprint import bytes_beside, tensors_in
from expertd.capability.row import Row
from expertd.core import LayerSpec
from expertd.weights.canonical import ExpertWeights
from expertd_wire.errors import Refusal


@dataclass(frozen=True, slots=True)
class Batch:
    """The tensors of one launch, on the device; a backend writes every element of out.

    rows [T, H] (float8_e4m3fn with row_scales [T, H/G] for fp8 rows); ids [T, K] int32 global, -1
    for "no expert"; weights [T, K] float32, scale included; logits [T, E] for monolithic rows;
    out [T, H] in the reply's dtype.
    """

    rows: Tensor
    out: Tensor
    row_scales: Tensor | None = None
    ids: Tensor | None = None
    weights: Tensor | None = None
    logits: Tensor | None = None


class Stage(IntEnum):
    NEW = 0
    CHECKED = 1
    PREPARED = 2
    WARM = 3


class Backend(ABC):
    """One kernel entry bound to one layer."""

    def __init__(self, row: Row, spec: LayerSpec, device: torch.device) -> None:
        self.row = row
        self.spec = spec
        self.device = device
        self._stage = Stage.NEW
        self.replay: Callable[[Batch], bool] | None = None
        """Runs a batch as a captured graph, if there is one that fits it."""
        self._made: frozenset[str] = frozenset()
        self._given: tuple[ExpertWeights | None, Tensor | None] = (None, None)
        self._sizes_warmed: tuple[int, ...] = ()
        self._layout = ""
        self.spilled = False
        """Whether its layout is made only for calls that name it."""
        self.on_use: Callable[[Backend], None] | None = None
        """Told before each forward; may restore() what was released."""

    @property
    def layout(self) -> str:
        """The name of an order of the weights that it holds for itself; "" for the canonical one.

        Backends of a layer that have the same name share the copy.
        """
        return self._layout

    @property
    def canonical(self) -> ExpertWeights | None:
        """The weights that it was prepared with, unless it has forgotten them."""
        return self._given[0]

    @property
    def native_bytes(self) -> int:
        """Bytes held beside the canonical weights."""
        return bytes_beside(self.native_tensors(), self.canonical)

    def native_tensors(self) -> list[Tensor]:
        """Everything that its preparation made or refers to, but the canonical weights."""
        return list(tensors_in([vars(self).get(name) for name in self._made]))

    def check(self) -> tuple[Refusal, ...]:
        """Every reason why this machine cannot run the row; empty when it can."""
        refusals = self._check()
        if not refusals:
            self._stage = Stage.CHECKED
        return refusals

    def prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None:
        """Takes the canonical weights (and the router's correction bias) into the native layout."""
        self._expect(Stage.CHECKED)
        before = set(vars(self))
        self._prepare_weights(weights, bias)
        self._given, self._made = (weights, bias), frozenset(set(vars(self)) - before)
        self._layout = self._layout_name() if self._copies(weights) else ""
        self._stage = Stage.PREPARED

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Compiles, tunes and allocates for these batch sizes, so that no request has to."""
        self._expect(Stage.PREPARED)
        self._warm_up(tokens)
        self._sizes_warmed = tuple(tokens)
        self._stage = Stage.WARM

    @property
    def warm(self) -> bool:
        """Whether it can run."""
        return self._stage is Stage.WARM

    def release(self) -> None:
        """Lets go of all that its preparation made, until restore()."""
        self._expect(Stage.WARM)
        assert self.canonical is not None, f"{self.row.backend}: nothing could restore() it"
        self._stage, self.replay = Stage.CHECKED, None
        for name in self._made:
            delattr(self, name)
        self._made = frozenset()

    def forget_given(self) -> None:
        """Lets go of the weights it was prepared with; what was made of them stays for good."""
        self._given = (None, None)

    def restore(self) -> None:
        """Prepares and warms up as it was before release()."""
        self.prepare_weights(*self._given)
        self.warm_up(self._sizes_warmed)

    def forward(self, batch: Batch) -> None:
        """Computes batch.out from a batch of at least one row."""
        if self.on_use is not None:
            self.on_use(self)
        self._expect(Stage.WARM)
        assert batch.rows.shape[0] > 0, "empty calls are answered before any backend"
        if self.replay is None or not self.replay(batch):
            self._forward(batch)

    def _expect(self, stage: Stage) -> None:
        assert self._stage >= stage, (
            f"{self.row.backend}: {stage.name} expected, is {self._stage.name}"
        )

    def _copies(self, weights: ExpertWeights | None) -> bool:
        """Whether a copy of the matrices is held, and not only constants made of them."""
        if weights is None:
            return False
        matrices = weights.w13.untyped_storage().nbytes() + weights.w2.untyped_storage().nbytes()
        return 2 * self.native_bytes >= matrices

    def _layout_name(self) -> str:
        return f"{self.row.backend} {self.row.activation_quant}"

    def _check(self) -> tuple[Refusal, ...]:
        return ()

    @abstractmethod
    def _prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None: ...

    @abstractmethod
    def _warm_up(self, tokens: Sequence[int]) -> None: ...

    @abstractmethod
    def _forward(self, batch: Batch) -> None: ...


def native_bytes(backends: Iterable[Backend]) -> int:
    """What backends of one layer hold beside its canonical weights; shared memory counts once."""
    listed = list(backends)
    tensors = (tensor for backend in listed for tensor in backend.native_tensors())
    return bytes_beside(tensors, listed[0].canonical if listed else None)
