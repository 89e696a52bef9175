"""The layers of this process: what each is, its state, and the backends that can run it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from expertd.backends.base import Backend, native_bytes
from expertd.capability.device import DeviceInfo
from expertd.capability.plan import PlanSet
from expertd.capability.row import Cell, Row, State
from expertd.core import CallForm, LayerSpec
from expertd.engine.expert_rows import ExpertRows
from expertd.engine.timings import Timings
from expertd.errors import LayerFailed, NotFound, Unavailable
from expertd.weights.canonical import ExpertWeights
from expertd_wire.errors import Refusal

_serials = itertools.count(1)


class LayerState(StrEnum):
    LOADING = "loading"
    PROVING = "proving"
    READY = "ready"
    FAILED = "failed"
    UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class Trust:
    """What the operator allows beyond proofs, or forbids although it is proven."""

    declared: bool = False
    exact_routing: bool = False
    deterministic: bool = False


@dataclass(slots=True, eq=False)
class Resident:
    """One layer and all that was loaded for it; the loader writes it, everybody else reads.

    absent: why a row that accepts the layer has no backend here.
    """

    model: str
    layer: int
    spec: LayerSpec
    device: DeviceInfo
    state: LayerState = LayerState.LOADING
    detail: str = ""
    generation: int = 0
    digest: str = ""
    checkpoint_digest: str = ""
    weights: ExpertWeights | None = None
    bias: Tensor | None = None
    backends: dict[Cell, Backend] = field(default_factory=dict)
    absent: dict[Cell, tuple[Refusal, ...]] = field(default_factory=dict)
    states: dict[Cell, State] = field(default_factory=dict)
    plans: dict[CallForm, PlanSet] = field(default_factory=dict)
    choices: dict[CallForm, tuple[Cell, ...]] = field(default_factory=dict)
    timings: Timings = Timings()
    trust: Trust = Trust()
    queued_tokens: int = 0
    expert_rows: ExpertRows = field(default_factory=ExpertRows)
    serial: int = field(default_factory=lambda: next(_serials))

    @property
    def name(self) -> str:
        return f"{self.model}/{self.layer}"

    def judged(self, states: dict[Cell, State], timings: Timings) -> None:
        """Takes what is known of its plans now; what was planned before is forgotten."""
        self.states, self.timings = states, timings
        self.plans, self.choices = {}, {}

    def keep_only(self, kept: Collection[Backend], why: Callable[[Row], Refusal]) -> None:
        """Goes on with these backends alone, which let go of the weights they were made of."""
        dropped = {cell: b.row for cell, b in self.backends.items() if b not in kept}
        self.absent |= {cell: (why(row),) for cell, row in dropped.items()}
        self.backends = {cell: b for cell, b in self.backends.items() if cell not in dropped}
        self.weights = None
        for backend in self.backends.values():
            backend.forget_given()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in every layout."""
        weights, beside = self.weights, native_bytes(self.backends.values())
        return beside if weights is None else weights.nbytes + beside

    def require_ready(self) -> None:
        """Raises the error that fits a layer which is not ready."""
        if self.state is LayerState.READY:
            return
        if self.state in (LayerState.LOADING, LayerState.PROVING):
            raise Unavailable(f"layer {self.name} is {self.state}; try again when /readyz says so")
        raise LayerFailed(f"layer {self.name} is {self.state}: {self.detail or 'load it again'}")


class Residents:
    """All layers by model and number; replaced whole on change, so that readers need no lock."""

    def __init__(self) -> None:
        self._models: dict[str, dict[int, Resident]] = {}
        self._lock = threading.Lock()

    def add(self, resident: Resident) -> None:
        """Adds a layer, or replaces the one of the same model and number."""
        with self._lock:
            layers = {**self._models.get(resident.model, {}), resident.layer: resident}
            self._models = {**self._models, resident.model: dict(sorted(layers.items()))}

    def add_model(self, model: str) -> None:
        """Makes a model known before its layers are."""
        with self._lock:
            self._models = {**self._models, model: self._models.get(model, {})}

    def get(self, model: str, layer: int) -> Resident:
        """The layer; raises NotFound naming what there is."""
        layers = self.of(model)
        resident = layers.get(layer)
        if resident is None:
            raise NotFound(f"model {model!r} has no layer {layer}; it has {_listed(layers)}")
        return resident

    def find(self, model: str, layer: int) -> Resident | None:
        """The layer, if there is one."""
        return self._models.get(model, {}).get(layer)

    def of(self, model: str) -> dict[int, Resident]:
        """The layers of a model by number; raises NotFound naming the models there are."""
        layers = self._models.get(model)
        if layers is None:
            raise NotFound(f"model {model[:80]!r} is not served; served: {_listed(self._models)}")
        return layers

    def knows(self, model: str) -> bool:
        return model in self._models

    def all(self) -> list[Resident]:
        return [resident for layers in self._models.values() for resident in layers.values()]

    def missing(self) -> list[str]:
        """What keeps the process from being ready, for a person."""
        waiting = [f"layer {r.name} is {r.state}" for r in self.all() if _holds_up(r)]
        empty = [f"model {name} has no layers yet" for name, of in self._models.items() if not of]
        return waiting + empty


def _holds_up(resident: Resident) -> bool:
    return resident.state not in (LayerState.READY, LayerState.UNLOADED)


def _listed(names: dict[str, dict[int, Resident]] | dict[int, Resident]) -> str:
    shown = [str(name) for name in itertools.islice(names, 20)]
    return ", ".join(shown) + (", …" if len(names) > 20 else "") if shown else "none"
