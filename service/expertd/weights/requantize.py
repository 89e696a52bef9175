"""A plain checkpoint → the same with its routed experts quantised, in the published layout."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from expertd.core import LayerSpec, QuantScheme
from expertd.errors import FailedPrecondition, InvalidArgument
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.dequant import dequantize
from expertd.weights.export import EXPORTS, OAI, Export, stored_parts
from expertd.weights.family import Layout
from expertd.weights.layers import Model, layer_spec
from expertd.weights.load import Progress, load_experts
from expertd.weights.matrix import Matrix
from expertd.weights.quantize import quantize_matrix, quantize_together
from expertd.weights.source import locate
from expertd.weights.storage import STORAGE
from expertd.weights.writer import ShardWriter, new_directory, write_json

EXPERTS_AT_ONCE = 8
KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Files beside the weights that are copied: tokenizers and settings, nothing that is executed."""

Tensors = dict[str, Tensor]


def quantize_checkpoint(
    path: Path, out: Path, quant: QuantScheme, progress: Progress | None = None
) -> None:
    """Write to `out` the checkpoint at path with its experts in a scheme, the rest unchanged.

    Raises InvalidArgument when out exists or nothing writes the scheme, FailedPrecondition for a
    checkpoint that is quantised already or cannot have it.
    """
    with new_directory(out) as directory:
        quantize_into(path, directory, quant, progress)


def quantize_into(
    path: Path, directory: Path, quant: QuantScheme, progress: Progress | None = None
) -> None:
    """The same into a directory that is there and empty; raises as quantize_checkpoint does."""
    model = Model.of(Checkpoint.open(path))
    if model.config.get("quantization_config"):
        raise FailedPrecondition(f"{path}: is quantised already; give the plain checkpoint")
    layout, export = _form(model, quant)
    consumed: set[str] = set()
    writer = ShardWriter(directory)
    for layer in sorted(model.prefixes):
        spec = layer_spec(model, layer)
        _check_sizes(spec, quant)
        consumed |= _expert_tensors(model, layer, spec)
        tensors = dict(_quantised(model, layer, spec, layout, export))
        writer.add(tensors)
        if progress is not None:
            progress(sum(t.numel() * t.element_size() for t in tensors.values()))
    rest = [name for name in model.checkpoint.tensors if name not in consumed]
    writer.add_all((name, model.checkpoint.read(name)) for name in rest)
    writer.finish()
    _settle(model, directory, export, rest)


def _form(model: Model, quant: QuantScheme) -> tuple[Layout, Export]:
    """A tensor for each matrix; gpt-oss has a form of its own."""
    if model.family.expert_bias and quant is QuantScheme.MXFP4:
        return model.family.layouts[0], OAI
    layout = next((form for form in model.family.layouts if not form.stacked), None)
    if quant not in EXPORTS:
        raise InvalidArgument(f"quant {quant.value!r} is not one of {', '.join(EXPORTS)}")
    if layout is None:
        raise FailedPrecondition(
            f"model_type {model.config.get('model_type')!r} has no published {quant.value} layout"
        )
    return layout, EXPORTS[quant]


def _check_sizes(spec: LayerSpec, quant: QuantScheme) -> None:
    """Groups of values must fill a row of either matrix."""
    rows, group = STORAGE[quant].block
    sizes = (spec.hidden, spec.intermediate)
    if rows == 1 and group and any(size % group for size in sizes):
        raise FailedPrecondition(
            f"{quant.value} takes rows in groups of {group}; this model has rows of {sizes}"
        )


def _expert_tensors(model: Model, layer: int, spec: LayerSpec) -> set[str]:
    """The tensors that quantised ones take the place of."""
    source = locate(model, layer, spec)
    return {
        name
        for expert in source.experts
        for stored in (*expert.first, expert.second)
        for part, name in stored.tensors.items()
        if part != "bias"
    }


def _quantised(
    model: Model, layer: int, spec: LayerSpec, layout: Layout, export: Export
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a layer's experts; those of a stacked layout when all are there."""
    stacks: dict[str, list[Tensor]] = {}
    for expert, w13, w2 in _experts(model, layer, spec):
        for name, matrix in _matrices(layout, spec, w13, w2, export.format.quant):
            for suffix, tensor in stored_parts(export.format, matrix).items():
                full = model.prefix(layer) + layout.part(name, expert, suffix)
                if layout.stacked:
                    stacks.setdefault(full, []).append(tensor)
                else:
                    yield full, tensor
    yield from ((name, torch.stack(tensors)) for name, tensors in stacks.items())


def _experts(model: Model, layer: int, spec: LayerSpec) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert's number and float32 matrices, few experts in memory at a time."""
    for begin in range(0, spec.num_experts, EXPERTS_AT_ONCE):
        end = min(begin + EXPERTS_AT_ONCE, spec.num_experts)
        held = replace(spec, expert_begin=begin, expert_end=end)
        weights = load_experts(model, layer, held, "cpu")
        for expert in range(begin, end):
            yield expert, *dequantize(weights, expert - begin)


def _matrices(
    layout: Layout, spec: LayerSpec, w13: Tensor, w2: Tensor, quant: QuantScheme
) -> Iterator[tuple[str, Matrix]]:
    """An expert's quantised matrices under the layout's names; gate and up share their scale."""
    halves = w13.chunk(2 if spec.activation.gated else 1)
    if layout.fused == "interleaved":
        up, gate = halves
        turns = torch.stack((gate, up), 1).flatten(0, 1)
        yield layout.up, quantize_matrix(turns, quant, turns.abs().amax())
    else:
        names = (layout.up, layout.gate)
        yield from zip(names, quantize_together(halves, quant, tied=True), strict=False)
    yield layout.down, quantize_matrix(w2, quant, w2.abs().amax())


def _settle(model: Model, directory: Path, export: Export, rest: list[str]) -> None:
    """config.json with the declaration, and the files that a tokenizer needs."""
    checkpoint = model.checkpoint
    for path in checkpoint.root.iterdir():
        if path.suffix in KEPT_SUFFIXES and not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)
    plain = sorted(name.removesuffix(".weight") for name in rest if _is_linear(checkpoint, name))
    declaration = export.declare(plain)
    write_json(directory / "config.json", {**checkpoint.config, "quantization_config": declaration})
    if export.own_file:
        own = {key: value for key, value in declaration.items() if key != "quant_method"}
        own |= {"exclude_modules": own.pop("ignore"), "kv_cache_quant_algo": None}
        file = {"producer": {"name": "expertd"}, "quantization": own}
        write_json(directory / "hf_quant_config.json", file)


def _is_linear(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(".weight") and len(checkpoint.tensors[name].shape) == 2
