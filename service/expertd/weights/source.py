"""Where a layer's experts lie in a checkpoint, checked against its config; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from expertd.core import LayerSpec
from expertd.errors import FailedPrecondition
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.family import Layout
from expertd.weights.formats import Format, Part
from expertd.weights.layers import Model
from expertd.weights.shards import TensorEntry


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored matrix [N, K] of an expert: the tensors of its parts; row is its place in them."""

    n: int
    k: int
    tensors: Mapping[str, str]
    row: int | None


@dataclass(frozen=True, slots=True)
class Source:
    """A layer's experts on disk; every name and shape has been checked."""

    checkpoint: Checkpoint
    layout: Layout
    format: Format
    experts: tuple[tuple[tuple[Stored, ...], Stored], ...]


def locate(model: Model, layer: int, spec: LayerSpec) -> Source:
    """Find and check every tensor of the experts held.

    Raises FailedPrecondition naming file, tensor and expectation where one is missing or has
    another dtype or shape than config and format say.
    """
    prefix, problems = model.prefix(layer), []
    for layout, format_ in product(model.family.layouts, model.formats(layer)):
        finder = _Finder(model.checkpoint, prefix, layout, format_, spec)
        try:
            experts = tuple(finder.expert(e) for e in range(spec.expert_begin, spec.expert_end))
        except _Mismatch as problem:
            problems.append(problem)
            continue
        return Source(model.checkpoint, layout, format_, experts)
    raise FailedPrecondition(str(max(problems, key=lambda problem: problem.found)))


class _Mismatch(Exception):
    """A layout that the checkpoint does not have; found counts the tensors that fitted."""

    def __init__(self, message: str, found: int) -> None:
        super().__init__(message)
        self.found = found


@dataclass(slots=True)
class _Finder:
    """Looks a layer's tensors up under one layout."""

    checkpoint: Checkpoint
    prefix: str
    layout: Layout
    format: Format
    spec: LayerSpec
    found: int = 0

    def expert(self, expert: int) -> tuple[tuple[Stored, ...], Stored]:
        """The stored matrices before the activation (up, gate; one if fused) and the one after."""
        hidden, width = self.spec.hidden, self.spec.intermediate
        layout = self.layout
        if layout.fused != "no":
            rows, names = 2 * width, [layout.up]
        else:
            rows, names = width, [layout.up, layout.gate][: 1 + self.spec.activation.gated]
        first = tuple(self._matrix(name, expert, rows, hidden) for name in names)
        return first, self._matrix(layout.down, expert, hidden, width)

    def _matrix(self, name: str, expert: int, n: int, k: int) -> Stored:
        tensors = {}
        for part_name, part in self._parts():
            tensor = self.prefix + self.layout.part(name, expert, part.suffix)
            if part.optional and tensor not in self.checkpoint.tensors:
                continue
            self._check(tensor, part, part.shape(n, k))
            tensors[part_name] = tensor
        return Stored(n, k, tensors, expert if self.layout.stacked else None)

    def _parts(self) -> Iterator[tuple[str, Part]]:
        yield from self.format.parts.items()
        if self.spec.expert_bias:
            yield "bias", BIAS

    def _check(self, name: str, part: Part, shape: tuple[int, ...]) -> None:
        entry = self.checkpoint.tensors.get(name)
        if entry is None:
            raise _Mismatch(f"{self.checkpoint.root}: tensor {name!r} is missing", self.found)
        self.found += 1
        if entry.dtype not in part.dtypes:
            expected = " or ".join(part.dtypes)
            raise self._wrong(name, entry, f"{self.format.name} has {expected} here")
        lead = (self.spec.num_experts,) if self.layout.stacked else ()
        stored = shape[::-1] if self.layout.transposed else shape
        if _essential(entry.shape, lead) != _essential(lead + stored, lead):
            raise self._wrong(name, entry, f"config.json makes it {list(lead + stored)}")

    def _wrong(self, name: str, entry: TensorEntry, expected: str) -> _Mismatch:
        text = f"{entry.file.path}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; "
        return _Mismatch(text + expected, self.found)


BIAS = Part("bias", ("F32", "BF16", "F16"), lambda n, k: (n,))


def _essential(shape: tuple[int, ...], lead: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the ones that checkpoints add or leave out behind the leading sizes."""
    rest = shape[len(lead) :]
    return shape[: len(lead)] + tuple(size for size in rest if size != 1)
