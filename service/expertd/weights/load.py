"""A layer's experts from disk into canonical tensors on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from expertd.core import LayerSpec
from expertd.errors import FailedPrecondition
from expertd.weights.assemble import Assembler
from expertd.weights.canonical import ExpertWeights
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import Model
from expertd.weights.matrix import allocate
from expertd.weights.reader import stream
from expertd.weights.source import locate

Progress = Callable[[int], None]
"""Told of the bytes of weights that have come in addition."""


def load_layer(
    checkpoint: Checkpoint,
    layer: int,
    spec: LayerSpec,
    device: torch.device | str,
    progress: Progress | None = None,
) -> tuple[ExpertWeights, Tensor | None]:
    """The layer's experts held, and its correction bias float32 [E] when its router has one.

    Raises FailedPrecondition naming file, tensor and expectation for anything that is not as it
    should be.
    """
    model = Model.of(checkpoint)
    weights = load_experts(model, layer, spec, device, progress)
    return weights, correction_bias(model, layer, spec, device)


def load_experts(
    model: Model,
    layer: int,
    spec: LayerSpec,
    device: torch.device | str,
    progress: Progress | None = None,
) -> ExpertWeights:
    """The experts of a layer alone.

    Reading, conversion and copy to the device overlap, through staging of a fixed size. Raises
    as load_layer does.
    """
    source = locate(model, layer, spec)
    weights = allocate(spec, device, static_inputs=source.static_inputs)
    with _stream_of_its_own(weights.device):
        assembler = Assembler(source, weights)
        for expert, staged in stream(source, weights.device):
            assembler.add(expert.number - spec.expert_begin, expert, staged)
            if progress is not None:
                progress(weights.nbytes // spec.held)
        assembler.check()
    return weights


@contextmanager
def _stream_of_its_own(device: torch.device) -> Iterator[None]:
    """On a GPU a stream that nothing else waits for; all of its work is done at the end."""
    if device.type != "cuda":
        yield
        return
    side = torch.Stream(device)
    # The memory may be what a call has just let go of, whose kernels still use it.
    side.wait_stream(torch.cuda.current_stream(device))
    with side:
        try:
            yield
        finally:
            # Of a load that fails too: its memory goes, and calls would be written into.
            side.synchronize()


def correction_bias(
    model: Model, layer: int, spec: LayerSpec, device: torch.device | str
) -> Tensor | None:
    """The bias [E] that the layer's selection adds; raises FailedPrecondition if it is missing."""
    if spec.routing is None or not spec.routing.bias:
        return None
    checkpoint, prefix = model.checkpoint, model.prefix(layer)
    names = [prefix + name for name in model.family.correction_bias]
    name = next((n for n in names if n in checkpoint.tensors), names[0])
    bias = checkpoint.read(name).float().reshape(-1)
    if bias.shape != (spec.num_experts,) or not bias.isfinite().all():
        raise FailedPrecondition(
            f"{checkpoint.entry(name).file.path}: tensor {name!r} is "
            f"{list(checkpoint.entry(name).shape)}; {spec.num_experts} finite numbers are needed"
        )
    return bias.to(device)
