"""Loads layers in a thread of its own, while other layers serve."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from expertd.backends.build import build
from expertd.backends.grouped.weights import packed
from expertd.capability.checks.fault import Fault
from expertd.capability.device import DeviceInfo
from expertd.capability.match import layer_refusals, refusal
from expertd.capability.row import Row, State
from expertd.capability.rows import ROWS
from expertd.core import Activation, ActivationKind, LayerSpec, PlanMode, QuantScheme
from expertd.engine.checks import warm_up_checks
from expertd.engine.choice import likely_backends
from expertd.engine.forms import warm_up_forms
from expertd.engine.graphs import Graphs
from expertd.engine.layouts import Layouts
from expertd.engine.resident import LayerState, Resident, Residents, Trust
from expertd.engine.routers import warm_up_router
from expertd.engine.timings import Timings
from expertd.engine.tuner import Tuner, not_kept, rivals
from expertd.errors import ExpertdError, NoUsablePlan
from expertd.proof.prover import Prover
from expertd.proof.selfcheck import self_check
from expertd.proof.shape import Layer
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.digest import weights_digest
from expertd.weights.fingerprint import checkpoint_digest
from expertd.weights.layers import survey
from expertd.weights.load import load_layer
from expertd.weights.progress import Meter
from expertd.weights.storage import layer_bytes
from expertd_wire.errors import Refusal

log = logging.getLogger(__name__)

IDENTITY_LAYER = 0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that the operator configured: a checkpoint's directory and what to load of it."""

    name: str
    path: Path
    layers: frozenset[int] | None = None
    experts: tuple[int, int] | None = None


class Loader:
    """Fills Residents from checkpoints; a layer that fails says why and leaves the others alone."""

    def __init__(
        self,
        residents: Residents,
        device: DeviceInfo,
        torch_device: torch.device,
        prover: Prover,
        tuner: Tuner,
        graphs: Graphs,
        trust: Trust,
        layouts: Layouts | None = None,
    ) -> None:
        self._residents = residents
        self._device = device
        self._torch_device = torch_device
        self._prover = prover
        self._tuner = tuner
        self._graphs = graphs
        self._trust = trust
        self._layouts = layouts
        self._stream = torch.Stream(torch_device) if torch_device.type == "cuda" else None

    def add_identity(self, name: str, hidden: int) -> None:
        """Serves the identity layer as layer 0 of a model."""
        resident = Resident(name, IDENTITY_LAYER, identity_spec(hidden), self._device)
        with self._apart():
            self._build_backends(resident)
        resident.generation, resident.state = 1, LayerState.READY
        self._residents.add(resident)

    def announce(self, source: ModelSource) -> list[Resident]:
        """Opens a checkpoint and makes its layers known; raises what is wrong with all of them."""
        self._residents.add_model(source.name)
        checkpoint = Checkpoint.open(source.path, skip_broken=True)
        told = survey(checkpoint, source.layers, source.experts)
        if told.refused and not told.specs:
            raise next(iter(told.refused.values()))
        found = [self._renewed(source.name, number, spec) for number, spec in told.specs.items()]
        found += [self._refused(source.name, number, why) for number, why in told.refused.items()]
        for resident in found:
            self._residents.add(resident)
        return found

    def load(self, source: ModelSource, residents: list[Resident]) -> None:
        """Loads announced layers one after the other, but for those that have failed already."""
        residents = [resident for resident in residents if resident.state is LayerState.LOADING]
        try:
            checkpoint = Checkpoint.open(source.path, skip_broken=True)
        except ExpertdError as error:
            for resident in residents:
                self._fail(resident, str(error))
            return
        for resident in residents:
            self._load_one(checkpoint, resident)

    def unload(self, residents: list[Resident]) -> None:
        """Forgets the weights; a batch that runs holds its own reference until it ends."""
        for resident in residents:
            resident.state, resident.detail = LayerState.UNLOADED, "unloaded by an operator"
            self._forget(resident)

    def _renewed(self, model: str, layer: int, spec: LayerSpec) -> Resident:
        """A fresh resident that goes on counting generations where its predecessor stopped."""
        before = self._residents.find(model, layer)
        generation = before.generation if before else 0
        return Resident(model, layer, spec, self._device, generation=generation, trust=self._trust)

    def _refused(self, model: str, layer: int, why: ExpertdError) -> Resident:
        """A layer that has failed before anything of it could be told."""
        resident = self._renewed(model, layer, identity_spec(hidden=0))
        self._fail(resident, str(why))
        return resident

    def _load_one(self, checkpoint: Checkpoint, resident: Resident) -> None:
        try:
            with Meter(resident.name, layer_bytes(resident.spec)) as meter:
                resident.weights, resident.bias = load_layer(
                    checkpoint, resident.layer, resident.spec, self._torch_device, progress=meter
                )
            with self._apart():
                resident.digest = weights_digest(resident.weights, resident.bias)
                resident.checkpoint_digest = checkpoint_digest(checkpoint, resident.layer)
                if self._device.arch == "cpu":  # all of its backends read packed weights too
                    resident.weights = packed(resident.weights, resident.name)
                self._build_backends(resident)
        except ExpertdError as error:
            self._fail(resident, str(error))
        except torch.OutOfMemoryError as error:
            self._fail(resident, f"the device has no room; --layers, --experts load less: {error}")
        except Exception:
            log.exception("loading layer %s failed", resident.name)
            self._fail(resident, "its load failed; the server's log says why")
        else:
            resident.generation += 1
            resident.state = LayerState.READY
            log.info("layer %s is ready: %d bytes", resident.name, resident.nbytes)

    def _fail(self, resident: Resident, why: str) -> None:
        resident.state, resident.detail = LayerState.FAILED, why
        self._forget(resident)
        log.error("layer %s failed: %s", resident.name, why)

    def _forget(self, resident: Resident) -> None:
        resident.weights, resident.bias, resident.backends = None, None, {}
        resident.judged(resident.states, Timings())

    def _build_backends(self, resident: Resident) -> None:
        """Every backend whose row accepts the layer on this device, proven and checked."""
        resident.state = LayerState.PROVING
        warm_up_router(resident.spec, resident.bias, self._torch_device)
        warm_up_checks(resident.spec, self._torch_device)
        for row in self._rows(resident):
            self._build(row, resident)
        resident.judged(self._prover.states(resident.backends), Timings())
        warm_up_forms(rivals(resident).values(), self._torch_device, self._tuner.buckets)
        self._self_check(resident)
        with self._graphs.apart(rivals(resident).values()):
            self._tuner.tune(resident)
            self._prove_shape(resident)
        if self._layouts is not None:
            likely = likely_backends(resident, self._tuner.buckets)
            resident.detail = self._layouts.settle(resident, likely)
        self._graphs.attach(likely_backends(resident, self._graphs.buckets))

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """On a card beside the stream of calls: kernels keep scratch memory for each stream.

        The stream makes its card the thread's own as well: Triton launches on no other.
        """
        if self._stream is None:
            yield
            return
        with self._stream:
            yield
            self._stream.synchronize()

    def _build(self, row: Row, resident: Resident) -> None:
        """The row's backend, warm for every size of batch; or the reasons why there is none."""
        cell, spec = row.cell(resident.spec.quant), resident.spec
        if cell in self._tuner.left_out(spec):
            resident.absent[cell] = (not_kept(row),)
            return
        given = (row, spec, resident.weights, resident.bias, self._torch_device)
        try:
            resident.backends[cell] = build(*given, self._tuner.buckets)
        except NoUsablePlan as refused:
            resident.absent[cell] = refused.refusals
            # Its text alone: whoever keeps a log's records would keep the weights by its traceback.
            log.warning("layer %s: %s", resident.name, str(refused))
        except torch.OutOfMemoryError as error:
            resident.absent[cell] = (_no_memory(row),)
            log.warning("layer %s has no %s: %s", resident.name, row.entry, str(error))

    def _self_check(self, resident: Resident) -> None:
        layer = layer_of(resident)
        if layer is not None:
            routed = [b for cell, b in layer.backends.items() if cell.mode is PlanMode.ROUTED]
            self_check(resident.spec, layer.reference, routed)

    def _prove_shape(self, resident: Resident) -> None:
        """What will serve is proven as it will serve: tuned, at every bucket, on its true shape."""
        layer = layer_of(resident)
        if layer is None or self._trust.declared:
            return
        states = resident.states
        proven = {c: b for c, b in layer.backends.items() if states.get(c) is State.PROVEN}
        layer = replace(layer, backends=proven)
        on_shape = self._prover.shape_states(layer, self._tuner.buckets)
        resident.judged({**states, **on_shape}, resident.timings)

    def _rows(self, resident: Resident) -> Iterator[Row]:
        return (row for row in ROWS if not layer_refusals(row, resident.spec, self._device))


def layer_of(resident: Resident) -> Layer | None:
    """The backends to compare with the reference: all that have not failed; None without it."""
    failed = {cell for cell, state in resident.states.items() if state is State.FAILED}
    others = {cell: b for cell, b in resident.backends.items() if cell not in failed}
    names = [cell for cell in others if cell.backend == "reference"]
    if not names:
        return None
    reference = others.pop(names[0])
    return Layer(resident.spec, others, reference, resident.bias)


def _no_memory(row: Row) -> Refusal:
    why = "the device had no memory left for what this backend holds beside the weights"
    return refusal(row, Fault("no_memory", "device", "full", "room for its layout", why))


def identity_spec(hidden: int) -> LayerSpec:
    """A layer without experts."""
    return LayerSpec(
        hidden=hidden,
        intermediate=0,
        num_experts=0,
        expert_begin=0,
        expert_end=0,
        activation=Activation(ActivationKind.SWIGLU),
        quant=QuantScheme.BF16,
        routing=None,
    )
