"""What every backend is: check → prepare_weights → warm_up → forward, in this order only.

A backend object runs one capability row for one layer on one device. The public verbs live here
and keep the order; subclasses fill in the underscored ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

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

    @property
    def native_bytes(self) -> int:
        """Bytes of weights in a layout of its own; 0 where it reads the canonical ones."""
        return 0

    def check(self) -> tuple[Refusal, ...]:
        """Every reason why this machine cannot run the row; empty when it can."""
        refusals = self._check()
        if not refusals:
            self._stage = Stage.CHECKED
        return refusals

    def prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None:
        """Takes the canonical weights (and the router's correction bias) into the native layout."""
        self._expect(Stage.CHECKED)
        self._prepare_weights(weights, bias)
        self._stage = Stage.PREPARED

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Compiles, tunes and allocates for these batch sizes, so that no request has to."""
        self._expect(Stage.PREPARED)
        self._warm_up(tokens)
        self._stage = Stage.WARM

    def forward(self, batch: Batch) -> None:
        """Computes batch.out from a batch of at least one row."""
        self._expect(Stage.WARM)
        assert batch.rows.shape[0] > 0, "empty calls are answered before any backend"
        if self.replay is None or not self.replay(batch):
            self._forward(batch)

    def _expect(self, stage: Stage) -> None:
        assert self._stage >= stage, (
            f"{self.row.backend}: {stage.name} expected, is {self._stage.name}"
        )

    def _check(self) -> tuple[Refusal, ...]:
        return ()

    @abstractmethod
    def _prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None: ...

    @abstractmethod
    def _warm_up(self, tokens: Sequence[int]) -> None: ...

    @abstractmethod
    def _forward(self, batch: Batch) -> None: ...
